"""Plays trained agents for 100 deterministic episodes and counts the successful ones, as VLM-RM defines success.

    python tests/success.py runs/a runs/b runs/c
    python tests/success.py runs/a runs/b runs/c --gif docs/kneeling.gif --figure docs/kneeling.png
    python tests/success.py runs/four --tasks kneeling on-its-back arms-raised face-down --gif docs/four.gif

An episode succeeds when at least half of its steps are in the goal state, by the criteria of reward_only_eval.py and two
of lying below. Runs of both training scripts are played; of one with several goals, each goal, the held-out ones too.
The starts differ from those of training and of its evaluations. Nothing is rendered, so this takes seconds.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_vlmrm  # the scripts before mujoco: they set MUJOCO_GL where there is no display
import reward_only_eval
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
    """folders of finished runs of sac_vlmrm.py or ppo_vlmrm.py"""
    tasks: tuple[str, ...] = ("kneeling",)
    """what each goal asks for, in the order of --goal and --eval-goal; the last one stands for the goals after it"""
    checkpoint: str = "best.pt"
    """the checkpoint to judge: best.pt, of the highest CLIP return in evaluation, or checkpoint.pt, the last"""
    episodes: int = 100
    """deterministic episodes of each goal"""
    gif: Path | None = None
    """write episodes of the first run here: three of one goal, or one of each"""
    figure: Path | None = None
    """write the runs' learning curves here"""


def lying(side):
    """Criterion of lying: the torso below 0.3 m, and its front points up (side 1) or down (side -1) by 45 degrees."""
    return lambda model, data: data.body("torso").xpos[2] < 0.3 and side * data.body("torso").xmat[6] > 0.7


CRITERIA = {task: criterion for task, (_, criterion) in reward_only_eval.TASKS.items()}
CRITERIA |= {"on-its-back": lying(1), "face-down": lying(-1)}


def play(run_dir, checkpoint, episodes):
    """Deterministic episodes of a run's agent: goal -> qpos [episodes, T, nq], and the checkpoint's frame."""
    saved, flags = torch.load(run_dir / checkpoint, weights_only=True), json.loads((run_dir / "args.json").read_text())
    script = ppo_vlmrm if "num_steps" in flags else sac_vlmrm
    names = {field.name for field in dataclasses.fields(script.Args)}
    args = script.Args(**{name: value for name, value in flags.items() if name in names})
    trajectories = {}
    with script.make_envs(args, 64) as envs:
        envs.set_attr("rendering", False)
        state_dim, space = envs.single_observation_space["state"].shape[0], envs.single_action_space
        if script is ppo_vlmrm:
            agent = ppo_vlmrm.PPO(args, state_dim, space, saved["agent"]["goals"])
        else:
            agent = sac_vlmrm.SAC(args, state_dim, space.shape[0], saved["agent"]["goals"])
        agent.load_state_dict(saved["agent"])
        for index, goal in enumerate((*args.goal, *args.eval_goal)):

            def policy(states, index=index):
                return agent.act(states, np.full(len(states), index), deterministic=True)

            trajectories[goal] = script.evaluate(envs, policy, None, episodes, args.episode_length, seed=2024)["qpos"]
    return trajectories, saved["global_step"]


def draw_curves(run_dirs, path):
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for index, run_dir in enumerate(run_dirs):
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        for tag, style, what in (("charts/clip_return", "-", "exploring"), ("eval/clip_return", "o", "evaluation")):
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            axes.plot(*zip(*points, strict=True), style, markersize=4, alpha=0.8, color=f"C{index}",
                      label=f"{run_dir.name}, {what}")  # fmt: skip
    axes.set(xlabel="environment frames", ylabel="CLIP return of an episode")
    axes.locator_params("x", nbins=6)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(args):
    model, first = gym.make("Humanoid-v5").unwrapped.model, None
    for run_dir in args.run_dirs:
        trajectories, frames = play(run_dir, args.checkpoint, args.episodes)
        first = first or trajectories
        for index, (goal, qpos) in enumerate(trajectories.items()):
            criterion = CRITERIA[args.tasks[min(index, len(args.tasks) - 1)]]
            met = reward_only_eval.meets(criterion, model, qpos.reshape(-1, 24)).reshape(qpos.shape[:2])
            print(f"{run_dir}, {args.checkpoint} of frame {frames}, {goal!r}: {(met.mean(1) >= 0.5).sum()} of {len(met)}"
                  f" episodes successful, {met.mean():.1%} of all steps in the goal state, first at step"
                  f" {np.argmax(met, 1).mean():.0f}")
    if args.figure:
        draw_curves(args.run_dirs, args.figure)
    if args.gif:
        shown = list(next(iter(first.values()))[:3]) if len(first) == 1 else [qpos[0] for qpos in first.values()]
        scene = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0, 0, 0.9), follow=True, restyle=True)
        render = sac_vlmrm.SceneRenderer(gym.make("Humanoid-v5").unwrapped.fullpath, (240, 240), **scene)
        frames = [np.concatenate([render(qpos[t]) for qpos in shown], axis=1) for t in range(0, len(shown[0]), 2)]
        imageio.mimsave(args.gif, frames, duration=60, loop=0)


if __name__ == "__main__":
    main(tyro.cli(Args))
