"""Plays trained agents for 100 deterministic episodes and counts the successful ones: kneeling, as VLM-RM defines it.

    python tests/success.py runs/a runs/b runs/c
    python tests/success.py runs/a runs/b runs/c --gif docs/kneeling.gif --figure docs/kneeling.png

A step is in the goal state as reward_only_eval.py has it (`kneeling`): both knees within 0.12 m of the floor, the
torso's up-axis above 0.7, the robot on the floor. An episode succeeds when at least half of its steps are.
The starts differ from those of training and of its evaluations. Nothing is rendered, so this takes seconds.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))
import reward_only_eval  # these two before mujoco: they set MUJOCO_GL where there is no display
import sac_vlmrm

import gymnasium as gym
import imageio
import matplotlib
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs of sac_vlmrm.py"""
    checkpoint: str = "best.pt"
    """the checkpoint to judge: best.pt, of the highest CLIP return in evaluation, or checkpoint.pt, the last"""
    episodes: int = 100
    """deterministic episodes"""
    gif: Path | None = None
    """write an episode of the first run here"""
    figure: Path | None = None
    """write the runs' learning curves here"""


def kneeling_steps(qpos):
    """Which states of trajectories of qpos [episodes, T, 24] are kneeling: bool [episodes, T]."""
    model = gym.make("Humanoid-v5").unwrapped.model
    return reward_only_eval.meets(reward_only_eval.kneeling, model, qpos.reshape(-1, 24)).reshape(qpos.shape[:2]) == 1


def play(run_dir, checkpoint, episodes):
    """qpos [episodes, T, nq] of deterministic episodes of a run's agent."""
    saved = torch.load(run_dir / checkpoint, weights_only=True)
    names = {field.name for field in dataclasses.fields(sac_vlmrm.Args)}
    args = sac_vlmrm.Args(**{k: v for k, v in json.loads((run_dir / "args.json").read_text()).items() if k in names})
    with sac_vlmrm.make_envs(args, 64) as envs:
        envs.set_attr("rendering", False)
        state_dim, action_dim = envs.single_observation_space["state"].shape[0], envs.single_action_space.shape[0]
        agent = sac_vlmrm.SAC(args, state_dim, action_dim, saved["agent"]["goals"])
        agent.load_state_dict(saved["agent"])

        def policy(states):  # of the first goal
            return agent.act(states, np.zeros(len(states), int), deterministic=True)

        result = sac_vlmrm.evaluate(envs, policy, None, episodes, args.episode_length, seed=2024)
    return result["qpos"], saved["global_step"]


def main(args):
    trajectories = []
    for run_dir in args.run_dirs:
        qpos, frames = play(run_dir, args.checkpoint, args.episodes)
        steps = kneeling_steps(qpos)
        trajectories.append(qpos)
        print(f"{run_dir}, {args.checkpoint} of frame {frames}: {(steps.mean(1) >= 0.5).sum()} of {len(steps)} episodes"
              f" successful, {steps.mean():.1%} of all steps kneeling, first at step {np.argmax(steps, 1).mean():.0f}")
    if args.figure:
        figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
        for run_dir in args.run_dirs:
            events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
            for tag, style in (("charts/clip_return", "-"), ("eval/clip_return", "o")):
                points = [(event.step, event.value) for event in events.Scalars(tag)]
                axes.plot(*zip(*points, strict=True), style, markersize=4, alpha=0.8,
                          color=f"C{args.run_dirs.index(run_dir)}",
                          label=f"{run_dir.name}, {'exploring' if style == '-' else 'evaluation'}")
        axes.set(xlabel="environment frames", ylabel="CLIP return of an episode")
        axes.legend(fontsize=7)
        figure.savefig(args.figure, dpi=110)
    if args.gif:
        scene = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0, 0, 0.9), follow=True, restyle=True)
        render = sac_vlmrm.SceneRenderer(gym.make("Humanoid-v5").unwrapped.fullpath, (240, 240), **scene)
        frames = [np.concatenate([render(q[t]) for q in trajectories[0][:3]], axis=1) for t in range(0, 100, 2)]
        imageio.mimsave(args.gif, frames, duration=60, loop=0)


if __name__ == "__main__":
    main(tyro.cli(Args))
