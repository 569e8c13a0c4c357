"""Counts the successful episodes of saved rollouts, as VLM-RM defines success, and draws them.

    python sac_vlmrm.py --play runs/a --eval-episodes 100
    python tests/tools/success.py runs/a/rollouts/play-*.npz
    python tests/tools/success.py runs/?/rollouts/play-*.npz --gif kneeling.gif --curves kneeling.png

An episode succeeds when at least half of its steps are in the goal state, by the criteria of reward_only_eval.py and
two of lying below.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import imageio
import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[2]))
from reward_only_eval import TASKS, SceneRenderer, meets


@dataclass
class Args:
    rollouts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """rollouts of sac_vlmrm.py or ppo_vlmrm.py"""
    task: str | None = None
    """what the goals ask for, such as kneeling (default: the task whose prompt a goal is)"""
    gif: Path | None = None
    """write episodes here: three of one rollout, or the first one of each, a multiple of four in rows of four"""
    curves: Path | None = None
    """write the runs' learning curves here"""


def lying(side):
    """The criterion of lying with the front up (side 1) or down (side -1)."""

    def criterion(model, data):
        """The torso below 0.3 m, its front within 45 degrees of straight up or down."""
        return data.body("torso").xpos[2] < 0.3 and side * data.body("torso").xmat[6] > 0.7

    return criterion


LYING = {
    "on-its-back": ("a humanoid robot lying on its back", lying(1)),
    "face-down": ("a humanoid robot lying face down", lying(-1)),
}


def criterion_of(goal, task):
    tasks = TASKS | LYING
    for name, (prompt, criterion) in tasks.items():
        if name == task or (task is None and prompt == goal):
            return criterion
    sys.exit(f'error: no task is "{goal}": name one with --task ({", ".join(tasks)})')


def steps_met(rollout, criterion, model):
    """Whether a goal state is reached, at each step of each episode: [episodes, T]; not after an episode's end."""
    qpos, lengths = rollout["qpos"], rollout["lengths"]
    met = meets(criterion, model, qpos.reshape(-1, qpos.shape[2])).reshape(qpos.shape[:2])
    return met * (np.arange(qpos.shape[1]) < lengths[:, None])


def successful(rollout, criterion, model):
    """Which episodes are in the goal state for at least half of their steps: [episodes]."""
    return steps_met(rollout, criterion, model).sum(1) >= 0.5 * rollout["lengths"]


def draw_curves(run_dirs, path):
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, run_dir in enumerate(run_dirs):
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        for tag, style, what in (("charts/clip_return", "-", "exploring"), ("eval/clip_return", "o", "evaluation")):
            steps, values = zip(*((event.step, event.value) for event in events.Scalars(tag)), strict=True)
            label = f"{run_dir.name}, {what}"
            axes.plot(steps, values, style, markersize=4, alpha=0.8, color=f"C{index}", label=label)
    axes.set(xlabel="environment frames", ylabel="CLIP return of an episode")
    axes.locator_params("x", nbins=6)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(args):
    env = gym.make("Humanoid-v5").unwrapped
    episodes = []
    for path in args.rollouts:
        rollout = np.load(path)
        qpos = rollout["qpos"]
        criterion = criterion_of(str(rollout["goal"]), args.task)
        met = steps_met(rollout, criterion, env.model)
        successes = f"{successful(rollout, criterion, env.model).sum()} of {len(qpos)} episodes successful"
        share = f"{met.sum() / rollout['lengths'].sum():.1%} of all steps in the goal state"
        first = np.argmax(met, 1)[met.any(1)]  # of the episodes that get there
        steps = f"{share}, first at {first.mean():.0f}" if len(first) else share
        print(f'{path}, "{rollout["goal"]}": {successes}, {steps}')
        episodes.append(qpos)
    if args.curves:
        draw_curves(list(dict.fromkeys(path.parent.parent for path in args.rollouts)), args.curves)
    if args.gif:
        shown = list(episodes[0][:3]) if len(episodes) == 1 else [qpos[0] for qpos in episodes]
        camera = dict(distance=3.1, elevation=-10.0, azimuth=180.0, lookat=(0, 0, 0.85), follow=True, restyle=True)
        render = SceneRenderer(env.fullpath, (210, 210), **camera)
        films = [np.stack([render(qpos[t]) for t in range(0, len(qpos), 4)]) for qpos in shown]
        columns = 4 if len(films) % 4 == 0 else len(films)
        rows = [np.concatenate(films[i : i + columns], axis=2) for i in range(0, len(films), columns)]
        imageio.mimsave(args.gif, np.concatenate(rows, axis=1), duration=120, loop=0)


if __name__ == "__main__":
    main(tyro.cli(Args))
