"""Trains tasks one after another and ends each when its agent succeeds: the rows of docs/results.md, "Eight tasks".

    python tests/tools/train_tasks.py --task kneeling standing lotus --seed 1

After each evaluation it counts the successful episodes; from 15 of 16 on `best.pt` plays 100, and with 92 of them the
run is stopped. A run that is there already goes on, also one that was stopped at its success.
"""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from success import LYING, steps_met, successful

import reward_only_eval

ROOT = Path(__file__).parents[2]
TASKS = reward_only_eval.TASKS | LYING


@dataclass
class Args:
    task: tuple[str, ...]
    """which of VLM-RM's tasks, such as kneeling"""
    script: str = "sac_vlmrm.py"
    """the training script"""
    clip: str = "tests/tiny_clip"
    """--clip of the runs"""
    seed: int = 1
    """--seed of the runs"""
    eval_every: int = 12500
    """frames between two evaluations"""
    runs: Path = Path("runs")
    """the folder of the runs' folders, such as runs/kneeling-1"""


def tell(run_dir, path, task, model, minutes):
    """Prints how many episodes of a rollout are successful; returns their share."""
    rollout = np.load(path)
    criterion = TASKS[task][1]
    good = successful(rollout, criterion, model)
    steps = steps_met(rollout, criterion, model).sum() / rollout["lengths"].sum()
    count = f"{good.sum()} of {len(good)} episodes, {steps:.1%} of the steps"
    print(f"{run_dir.name} at {path.stem}, {minutes:.0f} min: {count}", flush=True)
    return good.mean()


def train(args, task, model):
    """One run, up to its success or its end."""
    run_dir = args.runs / f"{task}-{args.seed}"
    args.runs.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, ROOT / args.script]
    flags = ["--goal", TASKS[task][0], "--clip", args.clip, "--seed", args.seed, "--eval-every", args.eval_every]
    begun, seen = time.time(), set(run_dir.glob("rollouts/[0-9]*.npz"))
    with open(args.runs / f"{task}-{args.seed}.log", "a") as log:

        def command(*flags):
            return dict(args=[str(word) for word in (*script, *flags)], stdout=log, stderr=subprocess.STDOUT)

        run = subprocess.Popen(**command(*flags, "--no-video", "--run-dir", run_dir, "--resume", "auto"))
        ended = False
        while not ended:
            time.sleep(10)
            ended = run.poll() is not None
            new = set(run_dir.glob("rollouts/[0-9]*.npz")) - seen
            for path in sorted(new, key=lambda path: int(path.stem)):
                if time.time() - path.stat().st_mtime < 5 and not ended:
                    break  # best.pt is written after it
                seen.add(path)
                share = tell(run_dir, path, task, model, (time.time() - begun) / 60)
                if share < 15 / 16 and not ended:
                    continue
                subprocess.run(**command("--play", run_dir, "--eval-episodes", 100, "--no-video"), check=True)
                played = max(run_dir.glob("rollouts/play-*.npz"), key=lambda path: path.stat().st_mtime)
                if tell(run_dir, played, task, model, (time.time() - begun) / 60) >= 0.92:
                    run.send_signal(signal.SIGTERM)
                    run.wait()
                    return
    if run.returncode:
        sys.exit(f"error: {run_dir} ended with status {run.returncode}, see {log.name}")


def main(args):
    model = gym.make("Humanoid-v5").unwrapped.model
    for task in args.task:
        train(args, task, model)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
