"""Behaviour of reward_only_eval.py, through its own functions and its command line, on states and saved runs."""

import csv
import itertools
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY_CLIP, make_clip, one_line, run
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

import reward_only_eval
import sac_vlmrm
from reward_only_eval import (
    METRICS,
    Args,
    Source,
    Variant,
    describe_sources,
    epic_distance,
    evaluate_reward,
    gather_frames,
    goal_probability,
    judge,
    make_sweep,
    notes_on,
)

# ---- EPIC and the other metrics


def test_templates_that_agree_more_win_no_softmax():
    goal, baseline, negative = torch.tensor([[0.25, 0.9682, 0], [1, 0, 0], [0.25, 0, 0.9682]])
    prompts = torch.stack([0.95 * goal, baseline, 0.93 * negative])
    _, scores = reward_only_eval.rewards_of(torch.tensor([[1.0, 0, 0]]), prompts, None, 0.01, 0.5)
    assert scores[0] == pytest.approx(0.5, abs=1e-4)


def test_epic_distance_is_its_definition():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50).astype(float)
    rewards = labels + rng.normal(size=50)
    rho = np.corrcoef(rewards, labels)[0, 1]
    assert epic_distance(rewards, labels) == pytest.approx(math.sqrt((1 - rho) / 2), abs=1e-12)
    assert epic_distance(3 * labels - 7, labels) == pytest.approx(0, abs=1e-7)
    assert epic_distance(-labels, labels) == pytest.approx(1)


def test_epic_distance_is_that_of_canonicalised_rewards_of_transitions():
    """EPIC by brute force, from its definition (Gleave et al. 2021), on all transitions of 6 states and 3 actions."""
    rng, gamma, n_states, n_actions = np.random.default_rng(1), 0.9, 6, 3
    p_state, p_action = rng.dirichlet(np.ones(n_states)), rng.dirichlet(np.ones(n_actions))
    coverage = rng.dirichlet(np.ones(n_states * n_actions * n_states)).reshape(n_states, n_actions, n_states)
    states = range(n_states)

    def canonical(reward):  # [s, a, s'] -> R + E[gamma R(s', A, S') - R(s, A, S') - gamma R(S, A, S')]
        ahead = np.einsum("sat,a,t->s", reward, p_action, p_state)  # E R(s, A, S')
        mean = ahead @ p_state
        return np.array(
            [
                [
                    [reward[s, a, t] + gamma * ahead[t] - ahead[s] - gamma * mean for t in states]
                    for a in range(n_actions)
                ]
                for s in states
            ]
        )

    def distance(a, b):  # Pearson distance under the coverage distribution
        a, b = (x - (coverage * x).sum() for x in (canonical(a), canonical(b)))
        rho = (coverage * a * b).sum() / math.sqrt((coverage * a**2).sum() * (coverage * b**2).sum())
        return math.sqrt((1 - rho) / 2)

    value, goal = rng.normal(size=n_states), np.array([0, 0, 1, 0, 1, 1.0])
    of_next = lambda x: np.broadcast_to(x, coverage.shape)  # noqa: E731  a reward of the state after the step
    count = 200_000  # frames as they would be met: s' drawn from the coverage distribution
    frames = np.repeat(np.arange(n_states), np.round(coverage.sum((0, 1)) * count).astype(int))
    assert epic_distance(value[frames], goal[frames]) == pytest.approx(
        distance(of_next(value), of_next(goal)), abs=1e-4
    )


def variant(rewards, scores=None, threshold=None):
    rewards = np.asarray(rewards, np.float32)
    scores = rewards if scores is None else scores
    return Variant("alpha 0", "alpha 0", "model", 1, "goal", "{}", 0.0, threshold, rewards, scores)


def source(labels, episodes=0, kind="frames"):
    table = pd.DataFrame({"source": kind, "episode": episodes, "step": range(len(labels)), "label": labels})
    return Source(kind, kind, table.astype({"label": float}).assign(progress=table["step"], position=table["step"]))


def judged(variant, *sources, **flags):
    """Judges a variant on these sources; returns the notes, and what is known of the sources."""
    args = Args(goal=("goal",), **flags)
    frames = gather_frames(sources, args.label_threshold)
    judge(variant, frames, args.bootstrap)
    return list(notes_on([variant], sources, frames, args)), describe_sources(sources, frames, [variant])


@pytest.mark.filterwarnings("error")  # scipy and scikit-learn warn before they return a NaN
def test_ties_constants_and_one_class_are_notes_not_nans():
    for labels, rewards, undefined, note in (
        ([0, 0, 1, 1], [0.5] * 4, {"pearson", "epic"}, "the reward is the same"),
        ([0, 0, 1, 1], np.float32(0.5) + np.arange(4) * 1e-8, {"pearson", "epic"}, "the reward is the same"),
        ([1, 1, 1, 1], [1, 2, 3, 4], set(METRICS), "4 of 4 labelled frames are the goal"),
        ([0, 0, 0, 0], [1, 2, 3, 4], set(METRICS), "0 of 4 labelled frames are the goal"),
        ([0.3] * 4, [1, 2, 3, 4], set(METRICS), "All labels are the same"),
        (
            [0.1, 0.4, 0.4, 0.9],
            [1, 2, 3, 4],
            {"roc_auc", "average_precision", "false_positive_rate"},
            "--label-threshold",
        ),
        ([0, 1, 1, 0], [1, 1, 2, 2], set(), "one episode"),
        ([math.nan] * 4, [1, 2, 3, 4], set(METRICS), "No frame has a label"),
    ):
        v = variant(rewards)
        notes, _ = judged(v, source(labels))
        assert any(note in n for n in notes), (note, notes)
        assert {name for name, value in v.metrics.items() if value is None} == undefined, labels
        assert all(value is None or math.isfinite(value) for value in v.metrics.values())
        assert not v.intervals
    tied = variant([1, 1, 2, 2])
    judged(tied, source([0, 1, 1, 0]))
    assert tied.metrics["roc_auc"] == 0.5 and tied.metrics["pearson"] == pytest.approx(0, abs=1e-9)


def test_graded_labels_count_as_they_are_and_as_classes_above_a_threshold():
    labels, rewards = [0.0, 0.2, 0.7, 0.9], [1.0, 3.0, 2.0, 4.0]
    v = variant(rewards)
    judged(v, source(labels), label_threshold=0.5)
    assert v.metrics["pearson"] == pytest.approx(np.corrcoef(labels, rewards)[0, 1])
    assert v.metrics["roc_auc"] == roc_auc_score([0, 0, 1, 1], rewards) == 0.75
    assert v.metrics["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_graded_labels_of_one_source_leave_the_classes_of_another_alone():
    sources = [source([0, 1, 1, 0], kind="rollout"), source([1.0, 2.0, 4.0, 5.0], episodes=[0, 0, 1, 1])]
    assert gather_frames(sources, 3.0)["goal_state"].tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    assert gather_frames(sources, None)["goal_state"].fillna(-1).tolist() == [0, 1, 1, 0, -1, -1, -1, -1]
    _, described = judged(variant(np.arange(8)), *sources, label_threshold=3.0)
    assert [about["success_rate"] for about in described] == [1.0, 0.5]


def test_the_false_positive_rate_is_at_the_threshold_in_use():
    labels, p = np.array([0, 0, 0, 0, 1, 1]), np.array([0.1, 0.6, 0.5, 0.2, 0.9, 0.3])
    v = variant(p > 0.5, p, 0.5)  # a binary reward
    judged(v, source(labels), reward="binary")
    assert v.metrics["false_positive_rate"] == 0.25  # only 0.6 is above
    assert v.metrics["pearson"] == pytest.approx(np.corrcoef(p > 0.5, labels)[0, 1])  # of what is trained on
    assert v.metrics["roc_auc"] == roc_auc_score(labels, p)  # of what is cut
    v = variant([0.1, 0.2, 0.3, 0.7, 0.7, 0.9])  # the highest F1 takes the upper three
    judged(v, source(labels))
    assert v.metrics["false_positive_rate"] == 0.25


def test_a_binary_rewards_thresholds_are_dots_on_its_curve():
    labels, p = [0, 0, 0, 0, 1, 1], np.array([0.1, 0.6, 0.5, 0.2, 0.9, 0.3])
    v, frames = replace(variant(p > 0.5, p, 0.5), alpha=None), source(labels)
    judged(v, frames, reward="binary")
    (axes,) = reward_only_eval.plot_precision_recall([v], [frames], gather_frames([frames], None)).axes
    dots = {text.get_text(): text.xy for text in axes.texts}
    assert dots == {"0.1": (1, 0.4), "0.3": (0.5, 1 / 3), "0.5": (0.5, 0.5), "0.7": (0.5, 1), "0.9": (0, 1)}


def test_intervals_are_over_episodes_so_that_more_frames_of_the_same_do_not_narrow_them():
    rng = np.random.default_rng(0)
    labels, rewards = rng.integers(0, 2, 40), rng.normal(size=40)
    rewards += labels
    widths = []
    for repeat in (1, 25):
        v, episodes = variant(np.repeat(rewards, repeat)), np.repeat(np.arange(20), 2 * repeat)
        frames = source(np.repeat(labels, repeat), episodes)
        sweep = source([0.0, 1.0], kind="sweep")  # before the frames, and no part of the metrics
        v.rewards = v.scores = np.concatenate([[90, -90], v.rewards]).astype(np.float32)
        judged(v, sweep, frames, bootstrap=200)
        low, high = v.intervals["pearson"]
        assert low < v.metrics["pearson"] < high
        low, high = v.intervals["roc_auc"]
        assert low < v.metrics["roc_auc"] == roc_auc_score(labels, rewards.astype(np.float32)) < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.01) and widths[0] > 0.1
    rng, drawn = np.random.default_rng(0), []
    for _ in range(200):
        chosen = (2 * rng.integers(20, size=20)[:, None] + [0, 1]).ravel()  # an episode is two frames
        drawn.append(roc_auc_score(labels[chosen], rewards[chosen]))
    assert widths[0] == pytest.approx(np.subtract(*np.percentile(drawn, (97.5, 2.5))))


def test_success_is_half_of_an_episodes_steps_in_the_goal_state():
    labels = [1, 1, 0, 0] + [1, 0, 0, 0] + [1, 1, 1, 1]
    v = variant(np.arange(12))
    _, (rollout,) = judged(v, source(labels, np.repeat([0, 1, 2], 4), "rollout"))
    assert rollout["episodes"] == 3 and rollout["success_rate"] == 2 / 3 and rollout["goal_share"] == 7 / 12
    assert rollout["low"] < 2 / 3 < rollout["high"] < 1


def test_the_probability_is_the_one_that_the_binary_reward_cuts():
    frames, text = (
        torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(i).normal(size=(n, 8))), dim=1)
        for i, n in ((0, 500), (1, 5))
    )
    p = goal_probability(frames, text[:2], text[2:], 0.1)
    assert (
        torch.equal((p > 0.4).float(), sac_vlmrm.binary_reward(frames, text[:2], text[2:], 0.1, 0.4))
        and 0.1 < (p > 0.4).float().mean() < 0.9
    )


# ---- states and frames


class FakeRenderer:
    """Stands in for SceneRenderer where this process must not start OpenGL; the last joint is a frame's brightness."""

    made = []

    def __init__(self, xml_path, size, **scene):
        self.size = size
        FakeRenderer.made.append(size)

    def __call__(self, qpos):
        return np.full((*self.size, 3), int(np.clip(128 + 60 * qpos[-1], 0, 255)), np.uint8)


def judge_in_process(monkeypatch, tmp_path, **flags):
    monkeypatch.setattr(reward_only_eval, "SceneRenderer", FakeRenderer)
    FakeRenderer.made = []
    flags = {"clip": (TINY_CLIP,), "device": "cpu", "out_dir": tmp_path / "report", "bootstrap": 20, **flags}
    evaluate_reward(Args(**flags))
    return json.loads((tmp_path / "report" / "results.json").read_text())


def test_each_frame_is_rendered_and_encoded_once_whatever_is_judged(monkeypatch, tmp_path):
    encoded, encode = [], reward_only_eval.CLIP.encode_images
    monkeypatch.setattr(
        reward_only_eval.CLIP, "encode_images", lambda self, x: encoded.append(len(x)) or encode(self, x)
    )
    results = judge_in_process(
        monkeypatch,
        tmp_path,
        env_id="InvertedPendulum-v5",
        sweep=("hinge:-1:1", "pole"),
        task="pole",
        sweep_points=300,
        bootstrap=0,
        goal=("a pole", "a rod"),
        alpha=(0.0, 0.5, 1.0),
        template=("{}", "one {}"),
        clip=(TINY_CLIP, str(ROOT / "tests/../tests/tiny_clip")),
    )
    assert sum(encoded) == 2 * 600 and max(encoded) <= 256  # two models; streamed
    assert FakeRenderer.made.count((96, 96)) == 1  # for both
    assert len(results["rewards"]) == 2 * 2 * 3 * 3  # models, wordings, alphas; both templates averaged, and each alone
    assert {r["template"] for r in results["rewards"]} == {"{}", "one {}", "mean of 2"}
    assert (tmp_path / "report" / "scale.png").stat().st_size > 5000


def test_models_of_different_input_sizes_get_frames_of_their_own_size(monkeypatch, tmp_path):
    config = json.loads((Path(TINY_CLIP) / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "open_clip_config.json").write_text(json.dumps(config))
    weights = open_clip.model.CLIP(**config["model_cfg"]).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "small" / "open_clip_model.safetensors",
    )
    seen, encode = set(), reward_only_eval.CLIP.encode_images
    monkeypatch.setattr(
        reward_only_eval.CLIP, "encode_images", lambda self, x: seen.add((self.size, x.shape[1:3])) or encode(self, x)
    )
    judge_in_process(
        monkeypatch,
        tmp_path,
        env_id="InvertedPendulum-v5",
        sweep=("pole",),
        sweep_points=5,
        goal=("a pole",),
        clip=(TINY_CLIP, str(tmp_path / "small")),
    )
    assert seen == {((96, 96), (96, 96)), ((64, 64), (64, 64))}
    assert (
        FakeRenderer.made.count((96, 96)) == FakeRenderer.made.count((64, 64)) - 1 == 1
    )  # and 64 px to try the renderer


def test_a_binary_reward_competes_with_its_negatives_but_not_with_itself(monkeypatch, tmp_path):
    clip = make_clip()
    states = make_sweep("pole", 101, gym.make("InvertedPendulum-v5").unwrapped).qpos
    frames = clip.encode_images(np.stack([FakeRenderer(None, (96, 96))(state) for state in states]))
    text = clip.encode_text(["a pole", "a rod"])
    threshold = goal_probability(frames, text[:1], text[1:], 0.05).median().item()  # half of the rewards are 1
    flags = dict(env_id="InvertedPendulum-v5", sweep=("pole",), task="pole", goal=("a pole",), reward="binary")
    flags |= dict(negatives=("a rod", "a pole"), temperature=0.05, threshold=threshold)
    results = judge_in_process(monkeypatch, tmp_path, **flags)
    (reward,) = results["rewards"]
    assert reward["threshold"] == threshold and reward["alpha"] is None and reward["metrics"]["roc_auc"] is not None
    with open(tmp_path / "report" / "rewards.csv") as file:
        rewards = [float(row[-1]) for row in list(csv.reader(file))[1:]]
    expected = sac_vlmrm.binary_reward(frames, text[:1], text[1:], 0.05, threshold)[:, 0].numpy()
    assert (
        np.mean(np.array(rewards) == expected) > 0.97 and 0.4 < expected.mean() < 0.6
    )  # but for the one at the threshold


def test_the_goals_of_a_run_compete_with_each_other_but_a_single_one_not_with_other_words_for_it(tmp_path, monkeypatch):
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    save_rollout(tmp_path / "run" / "rollouts" / "1.npz")
    for goals, expected in ((["a"], ("b",)), (["a", "c"], ("b", "a", "c"))):
        (tmp_path / "run" / "args.json").write_text(json.dumps({"goal": goals, "negatives": ["b"]}))
        assert reward_only_eval.flags_of_run(tmp_path / "run" / "rollouts" / "1.npz")["negatives"] == expected
    monkeypatch.chdir(tmp_path / "run" / "rollouts")
    assert reward_only_eval.flags_of_run(Path("1.npz"))["negatives"] == expected


@pytest.mark.parametrize("given", ["", "--clip ViT-L-14", "--clip=ViT-L-14"])
def test_a_runs_weights_are_those_of_its_own_model_alone(given, tmp_path, monkeypatch):
    path = tmp_path / "run" / "rollouts" / "1.npz"
    path.parent.mkdir(parents=True)
    save_rollout(path)
    (tmp_path / "run" / "args.json").write_text(json.dumps({"clip": "ViT-B-32", "clip_pretrained": "openai"}))
    monkeypatch.setattr(sys, "argv", ["reward_only_eval.py", "--rollouts", str(path), *given.split()])
    args = reward_only_eval.read_flags()
    assert (args.clip, args.clip_pretrained) == ((("ViT-L-14",), ()) if given else (("ViT-B-32",), ("openai",)))


def test_every_photo_of_a_folder_is_shown(tmp_path):
    write_frames(tmp_path / "images")
    photos = reward_only_eval.load_frames(tmp_path / "images")
    frames = gather_frames([photos], None)
    sheet = reward_only_eval.plot_contact_sheet(variant(np.arange(12)), [photos], frames, None, Args())
    assert sum(len(axes.images) for axes in sheet.axes) == 16  # eight with the highest rewards, eight with the lowest


def write_frames(folder, count=12):
    folder.mkdir()
    for i in range(count):
        frame = np.full((96, 96, 3), 20 * i, np.uint8)
        Image.fromarray(frame).save(folder / f"{i:02d}.png")


def test_images_are_in_the_order_of_their_numbers_and_upright(tmp_path):
    (tmp_path / "images").mkdir()
    orientation = Image.Exif()
    orientation[0x0112] = 6  # a quarter turn, as of a phone that was held upright
    for i in range(12):
        Image.new("RGB", (8, 4), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png", exif=orientation if i == 2 else None)
    loaded = reward_only_eval.load_frames(tmp_path / "images")
    assert [frame[0, 0, 0] for chunk in loaded.chunks(None) for frame in chunk] == list(range(12))
    assert loaded.frame(None, 2).shape == (8, 4, 3) and loaded.frame(None, 3).shape == (4, 8, 3)
    for name in ("a.gif", "a.webp"):
        first, *more = (Image.fromarray(np.full((6, 6, 3), i, np.uint8)) for i in (0, 100, 200))
        first.save(tmp_path / name, save_all=True, append_images=more, lossless=True)
        (frames,) = reward_only_eval.load_frames(tmp_path / name).chunks(None)
        assert frames.shape == (3, 6, 6, 3) and frames[:, 0, 0, 0].tolist() == [0, 100, 200]


def test_a_reward_that_is_not_finite_is_no_perfect_one():
    prompts, frames = torch.eye(3), torch.full((4, 3), torch.nan)
    for alpha in (0.0, None):
        with pytest.raises(FloatingPointError, match="finite"):
            reward_only_eval.rewards_of(frames, prompts, alpha, 0.01, 0.5)


def test_images_and_videos_with_labels(monkeypatch, tmp_path):
    write_frames(tmp_path / "images")
    rows = [f"{i:02d}.png,{int(i > 5)},{'abc'[i // 4]}" for i in range(11)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,episode", *rows]))
    results = judge_in_process(
        monkeypatch, tmp_path, frames=tmp_path / "images", labels=tmp_path / "labels.csv", goal=("a robot",)
    )
    assert results["labelled_frames"] == 11 and results["goal_share"] == pytest.approx(5 / 11)
    assert any("1 frames without a label" in note for note in results["notes"])
    assert any("only 3 episodes" in note for note in results["notes"])
    with open(tmp_path / "report" / "rewards.csv") as file:
        header, *table = csv.reader(file)
    assert header[:5] == ["source", "episode", "step", "position", "label"] and len(table) == 12
    assert Path(table[7][0]).name == "07.png" and table[7][1:5] == ["1", "7", "", "1"] and table[11][4] == ""

    video = tmp_path / "video.mp4"
    imageio.mimsave(video, [np.full((64, 96, 3), 20 * i, np.uint8) for i in range(12)], fps=10, macro_block_size=1)
    (tmp_path / "labels.csv").write_text("0,0\n3,0.25\n11,1\n")
    results = judge_in_process(monkeypatch, tmp_path, frames=video, labels=tmp_path / "labels.csv", goal=("a robot",))
    assert results["labelled_frames"] == 3 and any("graded" in note for note in results["notes"])
    assert any("square" in note for note in results["notes"])
    assert results["rewards"][0]["metrics"]["pearson"] is not None


# ---- whole runs


def test_the_readmes_command_leaves_a_report_that_holds_everything(tmp_path):
    flags = dict(clip=TINY_CLIP, task="kneeling", sweep="kneeling", alpha=(0, 0.25, 0.5, 0.75, 1), out_dir=tmp_path)
    result = run("reward_only_eval", **flags)
    assert result.returncode == 0, result.stderr
    assert "frames/s" in result.stderr and str(tmp_path / "report.html") in result.stdout
    assert "alpha 0.75" in result.stdout and "one episode" in result.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["alpha"] for r in results["rewards"]] == [0, 0.25, 0.5, 0.75, 1]
    for reward in results["rewards"]:
        assert reward["metrics"]["roc_auc"] > 0.9 and reward["rank_correlation"]["sweep kneeling"] > 0.85
        assert not reward["intervals"]
    page = (tmp_path / "report.html").read_text()
    for name in ("landscapes", "precision_recall", "histograms", "contact_sheet"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 10
        assert f"alt='{name}' src='data:image/png;base64," in page
    assert "://" not in page and "@media print" in page and "Both knees within" in page
    with open(tmp_path / "rewards.csv") as file:
        assert len(list(csv.reader(file))) == 1 + 101


def test_a_saved_state_has_the_reward_that_training_computed(tmp_path):
    """With the run's own flags, read from its folder: another camera, alpha, templates and size than the defaults."""
    flags = dict(
        num_envs=2, episode_length=25, total_timesteps=50, learning_starts=1000, eval_every=50, eval_episodes=3
    )
    flags |= dict(camera_distance=3, camera_azimuth=170, alpha=0.5, template=("{}", "a picture of {}"), render_size=120)
    flags |= dict(camera_follow=False, video=False, device="cpu", clip=TINY_CLIP, run_dir=tmp_path / "run")
    result = run("sac_vlmrm", **flags)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "run" / "rollouts").glob("*.npz")
    result = run("reward_only_eval", rollouts=path, out_dir=tmp_path / "report")
    assert result.returncode == 0, result.stderr
    recorded = np.load(path)["clip_rewards"]
    with open(tmp_path / "report" / "rewards.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == recorded.size == 75
    (name,) = (column for column in rows[0] if column.startswith("alpha 0.5") and "template 1" in column)
    np.testing.assert_allclose([float(row[name]) for row in rows], recorded.ravel(), atol=1e-4)
    assert [(row["episode"], row["step"]) for row in rows] == [(str(e), str(t)) for e in range(3) for t in range(25)]
    alone = [float(row[next(c for c in rows[0] if "template 2" in c)]) for row in rows]
    assert np.abs(alone - recorded.ravel()).max() > 1e-3  # one template alone is another reward
    assert "0 of 75 labelled" in result.stdout
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    (rollout,) = results["sources"]
    assert rollout["recorded"] == "alpha 0.5, template 1" in result.stdout and rollout["difference"] < 1e-4
    assert results["args"]["task"] == "kneeling" and rollout["episodes"] == 3 and rollout["success_rate"] == 0

    saved = tmp_path / "run" / "args.json"
    saved.write_text(saved.read_text().replace('"regularized"', '"mine"'))
    assert "--reward mine" in one_line(run("reward_only_eval", rollouts=path))  # a fork's is not taken for another


def save_rollout(path, env_id="Humanoid-v5", nq=24, **changes):
    arrays = {"qpos": np.zeros((2, 5, nq)), "lengths": np.array([5, 3]), "env_id": env_id, "goal": "x"}
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})


def test_frames_after_the_end_of_an_episode_are_dropped(tmp_path):
    qpos = np.arange(2 * 5 * 24.0).reshape(2, 5, 24)
    save_rollout(tmp_path / "a.npz", qpos=qpos, clip_rewards=np.arange(10.0).reshape(2, 5))
    loaded = reward_only_eval.load_rollout(tmp_path / "a.npz", "Humanoid-v5", gym.make("Humanoid-v5").unwrapped.model)
    assert loaded.table["episode"].tolist() == [0] * 5 + [1] * 3
    assert loaded.table["step"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    np.testing.assert_array_equal(loaded.qpos, np.concatenate([qpos[0], qpos[1, :3]]))
    np.testing.assert_array_equal(loaded.table["recorded"], [0, 1, 2, 3, 4, 5, 6, 7])


BAD_INPUT = {  # flags, in which {} is a folder, and what the one line must name
    "all tasks and a goal": ("--task all --goal x", "--goal"),
    "all tasks of pictures": ("--task all --frames {}/images", "--frames"),
    "all tasks of a line": ("--task all --sweep kneeling", "--sweep"),
    "nothing": ("--task kneeling", "--rollouts"),
    "missing rollout": ("--rollouts {}/no.npz", "no.npz"),
    "no rollout": ("--rollouts {}/text.npz", "text.npz"),
    "another environment": ("--rollouts {}/hopper.npz --env-id Humanoid-v5", "Hopper-v5"),
    "two environments": ("--rollouts {}/humanoid.npz {}/hopper.npz --goal x", "one environment"),
    "no states": ("--rollouts {}/blind.npz --goal x", "--frames"),
    "states of another size": ("--rollouts {}/small.npz --goal x", "24"),
    "states not finite": ("--rollouts {}/nan.npz --goal x", "finite"),
    "wrong task for the robot": ("--rollouts {}/hopper.npz --task kneeling --goal x", "kneeling is a task of Humanoid"),
    "missing frames": ("--frames {}/none --goal x", "none"),
    "no images": ("--frames {}/empty --goal x", "no images"),
    "unreadable image": ("--frames {}/broken --goal x", "a.png"),
    "unreadable video": ("--frames {}/text.npz --goal x", "nor a video"),
    "missing labels": ("--frames {}/images --goal x --labels {}/no.csv", "no.csv"),
    "labels without frames": ("--sweep pole --labels {}/x.csv", "--frames"),
    "label of no frame": ("--frames {}/images --goal x --labels {}/other.csv", "99.png"),
    "label that is no number": ("--frames {}/images --goal x --labels {}/word.csv", "no number"),
    "two labels": ("--frames {}/images --goal x --labels {}/twice.csv", "already"),
    "no labels": ("--frames {}/images --goal x --labels {}/header.csv", "holds no labels"),
    "empty sweep": ("--env-id InvertedPendulum-v5 --sweep hinge:1:1 --goal x", "empty sweep"),
    "sweep of no joint": ("--env-id InvertedPendulum-v5 --sweep knee:0:1 --goal x", "slider, hinge"),
    "sweep of nothing": ("--sweep knelling", "kneeling"),
    "sweep of another robot": ("--env-id Ant-v5 --sweep kneeling", "Humanoid"),
    "not MuJoCo": ("--env-id CartPole-v1 --sweep x:0:1 --goal x", "draws its frames itself"),
    "environment": ("--env-id Humanoid-v55 --sweep kneeling", "`v5`"),
    "no goal": ("--env-id Ant-v5 --sweep root_z:0:1", "--goal"),
    "goal is baseline": ("--sweep kneeling --goal x y --baseline x --alpha 0 0.5", "--baseline"),
    "template": ("--sweep kneeling --template photo", "--template"),
    "missing goal image": ("--sweep kneeling --goal no.PNG", "no.PNG"),
    "image against sentence": (f"--sweep kneeling --goal {TINY_CLIP}/kneeling.png --alpha 0 0.5", "not both"),
    "flag given twice": ("--sweep kneeling --goal a --goal b", "all after one --goal"),
    "negatives that nothing uses": ("--sweep kneeling --negatives x", "--negatives needs --reward binary"),
    "alpha of binary": ("--sweep kneeling --reward binary --negatives x --alpha 0.5", "--alpha needs --reward regul"),
    "no quotes": ("--sweep kneeling --goal a humanoid robot", "put a sentence in quotes"),
    "no negatives": ("--sweep kneeling --reward binary", "--negatives"),
    "tags": ("--sweep kneeling --clip-pretrained a b", "--clip-pretrained"),
    "clip": ("--sweep kneeling --clip ViT-L-41", "ViT-L-14"),
    "one alpha twice": ("--sweep kneeling --alpha 0 0.0", "--alpha names one twice"),
    "one model twice": ("--sweep kneeling --clip RN50 RN50 --clip-pretrained openai openai", "--clip names one twice"),
    "long prompt": (f"--sweep kneeling --goal '{'word ' * 60}'", "too long"),
    "device": ("--sweep kneeling --device cuda", "NVIDIA"),
    "folder": (f"--sweep kneeling --clip {TINY_CLIP} --out-dir /dev/null/x", "'/dev/null/x'"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_frames(folder / "images")
    for name in ("empty", "broken"):
        (folder / name).mkdir()
    for name in ("text.npz", "broken/a.png"):
        (folder / name).write_text("nothing of the kind")
    for name, text in {
        "other": "99.png,1",
        "word": "00.png,1\n01.png,yes",
        "twice": "00.png,1\n0,1",
        "header": "file,label",
    }.items():
        (folder / f"{name}.csv").write_text(text)
    save_rollout(folder / "humanoid.npz")
    save_rollout(folder / "hopper.npz", "Hopper-v5", 6)
    save_rollout(folder / "small.npz", nq=7)
    save_rollout(folder / "blind.npz", "CartPole-v1", qpos=None)
    save_rollout(folder / "nan.npz", qpos=np.full((2, 5, 24), np.nan))
    return folder


@pytest.mark.parametrize("flags,named", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_status_2(flags, named, bad_files, monkeypatch, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    clip = [] if "--clip " in flags else ["--clip", TINY_CLIP]
    monkeypatch.setattr(sys, "argv", ["reward_only_eval.py", *shlex.split(flags.replace("{}", str(bad_files))), *clip])
    monkeypatch.setattr(reward_only_eval, "SceneRenderer", FakeRenderer)
    monkeypatch.setattr(reward_only_eval, "encode", lambda *_: pytest.fail("something slow started"))
    with pytest.raises(SystemExit) as end:
        evaluate_reward(reward_only_eval.read_flags())
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and named in lines[0], lines


def test_all_tasks_are_judged_on_the_committed_states_by_every_reward(tmp_path):
    result = run("reward_only_eval", "--alpha", 0, 1, task="all", clip=TINY_CLIP, device="cpu", out_dir=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows, states = results["tasks"], np.load(ROOT / "tests" / "humanoid_states.npz")
    assert {(row["reward"], row["task"]) for row in rows} == set(
        itertools.product(("alpha 0", "alpha 1"), reward_only_eval.EIGHT)
    )
    labels = dict(zip(states["tasks"], states["labels"].mean((0, 1)), strict=True))
    for row in rows:  # by the criteria as they are today
        assert row["goal states"] == f"{labels[row['task']]:.1%}" and row["ROC-AUC"] > 0.85, row
    for mean in results["mean"]:
        of_reward = [row["EPIC distance"] for row in rows if row["reward"] == mean["reward"]]
        assert mean["EPIC distance"] == pytest.approx(np.mean(of_reward)) and mean["frames/s"] > 1
    assert (tmp_path / "heat_map.png").stat().st_size > 1000 and "Each task" in result.stdout
    assert f"Models: {TINY_CLIP} (4.7M" in result.stdout and "Baseline: a humanoid robot" in result.stdout
    assert "worst" in (tmp_path / "report.html").read_text()


def test_all_tasks_are_judged_also_where_no_state_is_the_goal_and_by_two_weights_of_one_model(
    monkeypatch, tmp_path, capsys
):
    path = tmp_path / "run" / "rollouts" / "standing.npz"
    path.parent.mkdir(parents=True)
    save_rollout(path, qpos=np.tile(gym.make("Humanoid-v5").unwrapped.init_qpos, (2, 5, 1)))
    # What the goals of a run would compete with in the other reward is of no concern here.
    (tmp_path / "run" / "args.json").write_text(json.dumps({"goal": ["a", "/gone.png"], "reward": "regularized"}))
    find = reward_only_eval.find_clip
    monkeypatch.setattr(reward_only_eval, "find_clip", lambda clip, tag, mode: find(TINY_CLIP, None, mode))
    monkeypatch.setattr(reward_only_eval, "SceneRenderer", FakeRenderer)
    flags = ["--task", "all", "--rollouts", path, path, "--out-dir", tmp_path / "report"]
    flags += ["--clip", "Tiny", "Tiny", "--clip-pretrained", "default", "other", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["reward_only_eval.py", *map(str, flags)])
    reward_only_eval.evaluate_all_tasks(reward_only_eval.read_flags())
    output = capsys.readouterr().out
    assert "8 states" in output and "Tiny, alpha 0" in output and "Tiny other, alpha 0" in output
    text = (tmp_path / "report" / "results.json").read_text()
    results = json.loads(text)
    assert "NaN" not in text and None in results["tasks"][0].values()
    assert [mean["tasks"] for mean in results["mean"]] == [0, 0]


def test_the_committed_states_are_small_and_hold_goal_states_of_every_task():
    path = ROOT / "tests" / "humanoid_states.npz"
    states = np.load(path)
    assert path.stat().st_size < 1e6 and states["qpos"].shape[::2] == (1500, 24)
    assert states["labels"].sum((0, 1)).min() > 30


def test_the_committed_states_can_be_judged_by_one_task_alone(monkeypatch):
    states = str(ROOT / "tests" / "humanoid_states.npz")
    monkeypatch.setattr(sys, "argv", ["reward_only_eval.py", "--rollouts", states, "--task", "arms-raised"])
    assert reward_only_eval.read_flags().goal == ("a humanoid robot standing up, with both arms raised",)


OUT_OF_RANGE = ("--sweep-points 1", "--alpha 0 1.5", "--temperature 0", "--clip-batch-size 0", "--bootstrap -1")


@pytest.mark.parametrize("flags", OUT_OF_RANGE)
def test_a_value_out_of_its_range_is_named_by_tyro(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reward_only_eval.py", "--sweep", "kneeling", *flags.split()])
    with pytest.raises(SystemExit) as end:
        reward_only_eval.read_flags()
    assert end.value.code == 2 and f"Error parsing {flags.split()[0]}" in capsys.readouterr().err


def test_a_mistake_on_the_command_line_has_a_traceback_only_if_asked_for(tmp_path):
    assert "none" in one_line(run("reward_only_eval", frames=tmp_path / "none", goal="x"))
    result = run("reward_only_eval", frames=tmp_path / "none", goal="x", traceback=True)
    assert result.returncode == 1 and "Traceback" in result.stderr and "none" in result.stderr
