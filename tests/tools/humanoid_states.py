"""Makes tests/humanoid_states.npz, the states by which `reward_only_eval.py --task all` judges a reward.

    python tests/tools/humanoid_states.py AGENT_ROLLOUTS.npz ...

A third are poses, noised; a third lie on the way from one pose to another; a third are states of agents, from rollouts
of the training scripts (early, late and hacking ones) and from tests/tiny_clip/agent_states.npz. Each is an episode.
"""

import sys
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from poses import HUMANOID, POSED, WRONG_FOR_ALL

from reward_only_eval import TASKS, meets, to_floor

ROOT = Path(__file__).parents[2]
HEIGHTS = (0.0, 0.0, 0.0, 0.1)  # meters above the floor: a quarter of the poses is in the air


def noised(rng, qpos, scale):
    """A pose with noise in the joints and the tilt, in radians, by the floor or a little above it."""
    qpos = qpos.copy()
    qpos[7:] += rng.normal(0, scale, 17)
    qpos[7:] = qpos[7:].clip(*HUMANOID.model.jnt_range[1:].T)
    qpos[3:7] += rng.normal(0, scale / 4, 4)
    qpos[3:7] /= np.linalg.norm(qpos[3:7])
    qpos = to_floor(HUMANOID.model, mujoco.MjData(HUMANOID.model), qpos)
    qpos[2] += rng.choice(HEIGHTS) * rng.random()
    return qpos


def between(rng, start, end):
    """A state on the line from one pose to another."""
    share = rng.random()
    qpos = (1 - share) * start + share * end
    return noised(rng, np.concatenate([qpos[:3], qpos[3:7] / np.linalg.norm(qpos[3:7]), qpos[7:]]), 0.03)


def main(paths):
    rng, n = np.random.default_rng(0), 500
    met = [[state for state in good.values()] for good, _ in POSED.values()]
    missed = [state for _, bad in POSED.values() for state in bad.values()] + list(WRONG_FOR_ALL.values())
    every = [state for states in met for state in states] + missed
    posed = []
    for states in met:  # as many near each task's goal states
        posed += [
            noised(rng, states[rng.integers(len(states))], rng.choice((0.02, 0.05, 0.15))) for _ in range(n // 12)
        ]
    posed += [noised(rng, missed[rng.integers(len(missed))], 0.05) for _ in range(n - len(posed))]
    way = [between(rng, every[rng.integers(len(every))], every[rng.integers(len(every))]) for _ in range(n)]
    visited = [np.load(path)["qpos"].reshape(-1, 24) for path in paths]
    saved = np.load(ROOT / "tests" / "tiny_clip" / "agent_states.npz")
    visited += [saved[name] for name in ("search", "agents", "held_out")]  # not `next`: it was added later
    agents = [states[rng.integers(len(states))] for states in visited for _ in range(-(-n // len(visited)))][:n]
    qpos = np.float32([*posed, *way, *agents])[:, None]  # [episodes, 1, nq]
    qpos[..., :2] = 0.0  # where on the floor does not matter
    tasks = [task for task in TASKS if task != "pole"]
    labels = np.stack([meets(TASKS[task][1], HUMANOID.model, qpos[:, 0]) for task in tasks], 1)[:, None]
    path = ROOT / "tests" / "humanoid_states.npz"
    about = dict(env_id="Humanoid-v5", goal="", lengths=np.ones(len(qpos), int), tasks=tasks)
    np.savez_compressed(path, qpos=qpos, labels=labels.astype(bool), **about)
    kinds = ("poses", "on the way", "agents")
    for task, column in zip(tasks, labels[:, 0].T.reshape(len(tasks), 3, n).sum(2), strict=True):
        print(task, ", ".join(f"{kind}: {int(count)}" for kind, count in zip(kinds, column, strict=True)))
    print(f"{path}: {len(qpos)} states, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
