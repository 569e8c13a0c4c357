"""Adds states of agents to tests/tiny_clip/agent_states.npz, so that the embedded CLIP learns what they exploit.

    python tests/tools/agent_states.py --train runs/hips-1/rollouts/*.npz --held-out runs/hips-2/rollouts/*.npz

Held out are runs that the training data has no states of. Afterwards train anew: python tests/tiny_clip/train.py
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

FILE = Path(__file__).parents[1] / "tiny_clip" / "agent_states.npz"


@dataclass
class Args:
    train: tuple[Path, ...] = ()
    """rollouts of the humanoid whose states are trained on"""
    held_out: tuple[Path, ...] = ()
    """rollouts whose states judge the model"""
    each: int = 300
    """states of each rollout file, drawn at random"""
    seed: int = 0
    """seed of the draw"""


def main(args):
    rng = np.random.default_rng(args.seed)
    with np.load(FILE) as saved:
        states = dict(saved)
    for name, paths in (("agents", args.train), ("held_out", args.held_out)):
        for path in paths:
            qpos = np.load(path)["qpos"].reshape(-1, 24)
            qpos = rng.permutation(qpos[np.isfinite(qpos).all(1)])[: args.each]
            qpos[:, :2] = 0.0  # where on the floor does not matter
            states[name] = np.concatenate([states[name], qpos.astype(np.float16)])
    np.savez_compressed(FILE, **states)
    print(f"{FILE}: { ({name: len(rows) for name, rows in states.items()}) }, {FILE.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
