"""Compares saved runs that differ in a flag: how good is the reward of each, and does its agent do the task?

    python sac_vlmrm.py --goal "a humanoid robot kneeling" --clip tests/tiny_clip --alpha 0.5 --run-dir runs/alpha-0.5
    python sac_vlmrm.py --play runs/alpha-0.5 --eval-episodes 100                       # and so for each alpha
    python tests/tools/experiments.py runs/alpha-* --by alpha --figure docs/alpha.png

For each run: EPIC distance and ROC-AUC of its reward over the states of tests/humanoid_states.npz, and the successful
share of the episodes that were played last, for each of VLM-RM's tasks that it was trained on.
"""

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from success import LYING, successful

import reward_only_eval
from reward_only_eval import TASKS

TASKS.update(LYING)


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of sac_vlmrm.py or ppo_vlmrm.py"""
    by: str
    """the flag that they differ in; `parameters` is the size of the CLIP model"""
    figure: Path | None = None
    """draw the success rate and the EPIC distance here"""


def judge(flags, task, prompt):
    """Of the reward that a run's flags describe: EPIC distance, ROC-AUC and the CLIP model's parameters."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        states = Path(__file__).parents[1] / "humanoid_states.npz"
        settings = dict(rollouts=(states,), task=task, goal=(prompt,), bootstrap=0, out_dir=Path(folder))
        reward_only_eval.evaluate_reward(reward_only_eval.Args(**flags | settings))
        result = json.loads((Path(folder) / "results.json").read_text())["rewards"][0]
    return result["metrics"]["epic"], result["metrics"]["roc_auc"], result["parameters"]


def rows_of(run_dir, by, model):
    """A row for each goal of a run that is a task."""
    saved = json.loads((run_dir / "args.json").read_text())
    for task, (prompt, criterion) in TASKS.items():
        if prompt not in saved["goal"]:
            continue
        played = [path for path in run_dir.glob("rollouts/play-*.npz") if np.load(path)["goal"] == prompt]
        if not played:
            sys.exit(f"error: {run_dir}: play it first, with --play {run_dir} --eval-episodes 100")
        latest = max(played, key=lambda path: path.stat().st_mtime)
        success = successful(np.load(latest), criterion, model).mean()
        epic, auc, parameters = judge(reward_only_eval.flags_of_run(latest), task, prompt)
        value = parameters if by == "parameters" else saved[by]
        value = len(value) if by == "goal" else value
        yield {by: value, "run": run_dir.name, "task": task, "success": success, "EPIC": epic, "ROC-AUC": auc}


def draw(table, by, path):
    """The success rate and the EPIC distance of each run against the flag, a color a task."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("success", "EPIC"), strict=True):
        for task, rows in table.groupby("task", sort=False):
            x = rows[by] if pd.api.types.is_numeric_dtype(table[by]) else rows[by].astype(str)
            axes.plot(x, rows[column], "o", alpha=0.8, label=task)
        axes.set(xlabel=by, ylabel={"success": "successful episodes", "EPIC": "EPIC distance"}[column])
        axes.set_ylim((-0.03, 1.03) if column == "success" else (-0.02, 0.76))
        axes.legend(fontsize=7)
    axes.axhline(0.5**0.5, color="gray", linestyle=":")  # on those of the EPIC distance, the last ones
    axes.text(axes.get_xlim()[0], 0.5**0.5, " unrelated", va="bottom", fontsize=7)
    figure.savefig(path, dpi=110)


def main(args):
    args.by = args.by.replace("-", "_")  # as args.json has it
    model = gym.make("Humanoid-v5").unwrapped.model
    rows = [row for run_dir in args.runs for row in rows_of(run_dir, args.by, model)]
    if not rows:
        sys.exit(f"error: no goal of these runs is the prompt of a task ({', '.join(TASKS)})")
    table = pd.DataFrame(rows).sort_values([args.by, "run"])
    print(table.to_string(index=False, float_format="%.3f"))
    if args.figure:
        draw(table, args.by, args.figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
