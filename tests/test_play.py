"""What users do with both training scripts before and after a run: presets, defaults, playing a trained agent."""

import json
import os
import sys

import gymnasium as gym
import imageio
import numpy as np
import open_clip
import pytest
from conftest import KNEELING, LYING, ROOT, TINY_CLIP, load, one_line, run

import ppo_vlmrm
import sac_vlmrm
from sac_vlmrm import regularized_reward

SHORT = dict(clip=TINY_CLIP, num_envs=2, episode_length=10, total_timesteps=80, eval_episodes=2, eval_every=10**9)
SAC = SHORT | dict(learning_starts=20, batch_size=32, device="cpu", video=False)
PPO = SHORT | dict(num_steps=20, num_minibatches=4, update_epochs=2, device="cpu", video=False)
BOTH = pytest.mark.parametrize("script,flags", [(sac_vlmrm, SAC), (ppo_vlmrm, PPO)], ids=["sac", "ppo"])
KNEES = "a robot on its knees"


def parse(script, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["script", *map(str, words)])
    return script.parse_args()


def test_the_preset_is_vlm_rms_humanoid_and_single_flags_override_it(monkeypatch):
    args = parse(sac_vlmrm, monkeypatch, "--preset", "paper")
    values = (args.total_timesteps, args.learning_starts, args.learning_rate, args.gamma, args.tau, args.batch_size)
    assert values == (10_000_000, 50_000, 6e-4, 0.95, 0.005, 512)
    assert (args.updates_per_frame, args.n_step, args.ent_coef, args.anneal_lr) == (1 / 32, 1, 1.0, False)
    changed = parse(sac_vlmrm, monkeypatch, "--gamma", "0.9", "--preset", "paper")
    assert changed.gamma == 0.9 and changed.batch_size == 512
    assert parse(sac_vlmrm, monkeypatch) == sac_vlmrm.Args()  # without it, the defaults
    assert parse(ppo_vlmrm, monkeypatch, "--preset", "paper").total_timesteps == 10_000_000


@BOTH
def test_a_clips_folder_is_found_from_anywhere_afterwards(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ("--clip", "tests/tiny_clip", "--run-dir", tmp_path)
    args = parse(script, monkeypatch, *words)
    (tmp_path / "args.json").write_text(json.dumps(script.asdict(args), default=str))
    (tmp_path / "checkpoint.pt").touch()
    resumed = parse(script, monkeypatch, *words, "--resume", "auto")  # which refuses other flags than the run's
    assert resumed.resume == tmp_path
    monkeypatch.chdir(tmp_path)
    assert parse(script, monkeypatch, "--play", tmp_path).clip == TINY_CLIP


@BOTH
def test_what_a_run_needed_for_training_is_not_asked_for_to_play_it(script, flags, tmp_path, monkeypatch):
    args = script.Args(**flags | dict(goal=("a", "b"), eval_goal=("c",), track=True, clip_precision="fp16"))
    (tmp_path / "args.json").write_text(json.dumps(script.asdict(args), default=str))
    played = parse(script, monkeypatch, "--play", tmp_path, "--eval-goal", "d")
    assert played.clip_precision == "auto" and not played.track
    assert (played.goal, played.eval_goal) == (("a", "b", "c"), ("d",))


@BOTH
def test_a_resumed_run_keeps_what_overrode_the_preset(script, flags, tmp_path, monkeypatch):
    args = parse(script, monkeypatch, "--preset", "paper", "--gamma", "0.9", "--run-dir", tmp_path)
    (tmp_path / "args.json").write_text(json.dumps(script.asdict(args), default=str))
    resumed = parse(script, monkeypatch, "--resume", tmp_path)
    assert resumed == script.replace(args, resume=tmp_path, run_dir=None)


def test_a_clip_that_taught_the_papers_humanoid_nothing_is_named(capsys):
    squashed = open_clip.transform.PreprocessCfg(resize_mode="squash")  # nobody asks for the size of the frames
    for clip, said in (("ViT-L-14", True), ("RN50", True), ("ViT-bigG-14", False)):
        sac_vlmrm.warn_of_rewards(sac_vlmrm.Args(clip=clip), squashed, envs=None)
        message = capsys.readouterr().err
        assert ("0% of the episodes" in message and "reward_only_eval.py" in message) is said


@pytest.fixture(scope="module", params=[(sac_vlmrm, SAC), (ppo_vlmrm, PPO)], ids=["sac", "ppo"])
def trained(request, tmp_path_factory):
    """A short run of two goals: its script and its folder."""
    script, flags = request.param
    run_dir = tmp_path_factory.mktemp("run") / "run"
    return script, script.train(script.Args(**flags, goal=(KNEELING, LYING), run_dir=run_dir))


def test_playing_acts_by_the_checkpoint_from_new_starts_and_scores_the_new_sentence(trained, clip, render):
    script, run_dir = trained
    name = script.__name__
    too_few = {"buffer_size": 1} if name == "sac_vlmrm" else {"num_minibatches": 1000}  # to train with
    result = run(name, play=run_dir, goal=(KNEES,), eval_goal=(KNEELING,), eval_episodes=3, video=True, **too_few)
    assert result.returncode == 0, result.stderr
    files = {goal: f"play-80-{script.slug(goal)}" for goal in (KNEES, KNEELING)}
    assert {path.stem for path in (run_dir / "videos").iterdir()} == set(files.values())
    video = imageio.mimread(run_dir / "videos" / f"{files[KNEES]}.mp4", memtest=False)
    assert len(video) == 10 and video[0].shape == (480, 480, 3)
    assert (run_dir / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()  # what made the run is kept

    text = dict(zip((KNEES, KNEELING, LYING), clip.encode_text([KNEES, KNEELING, LYING]), strict=True))
    order = [KNEELING, LYING, KNEES]  # the trained goals, then the new one
    goals = script.goal_inputs(script.torch.stack([text[goal] for goal in order]), 2)
    args = script.Args(**json.loads((run_dir / "args.json").read_text()))
    make = script.PPO if name == "ppo_vlmrm" else script.SAC
    agent = make(args, 348, gym.spaces.Box(-1, 1, (17,)), goals)
    agent.load_state_dict({**load(run_dir, "best.pt")["agent"], "goals": goals})
    seeds = script.episode_seeds(args.seed, 2, n=3)
    assert not set(seeds) & set(script.episode_seeds(args.seed, 1, n=16))  # not those of the run's own evaluations
    for goal, file in files.items():
        rollout = np.load(run_dir / "rollouts" / f"{file}.npz")
        assert str(rollout["goal"]) == goal and rollout["qpos"].shape == (3, 10, 24)
        for episode, seed in enumerate(seeds):
            env = gym.make("Humanoid-v5")
            state, _ = env.reset(seed=seed)
            for t in range(10):
                inputs = np.tile(state.astype(np.float32), (2, 1)), np.full(2, order.index(goal))
                state = env.step(0.4 * agent.act(*inputs, deterministic=True)[0])[0]  # the Humanoid's bounds
                np.testing.assert_allclose(env.unwrapped.data.qpos, rollout["qpos"][episode, t], atol=1e-4)
        embeddings = clip.encode_images(render("Humanoid-v5", list(rollout["qpos"][0])))
        expected = regularized_reward(embeddings, text[goal][None], text[goal], 0.0)[:, 0]
        np.testing.assert_allclose(rollout["clip_rewards"][0], expected, atol=1e-4)


def test_an_agent_is_not_played_for_goals_that_it_knows_by_other_embeddings(trained):
    script, run_dir = trained
    assert "--template" in one_line(run(script.__name__, play=run_dir, template="lying face down, no {}"))


def test_without_a_goal_all_of_the_runs_own_are_played(trained):
    script, run_dir = trained
    best = run_dir / "best.pt"
    best.rename(run_dir / "later.pt")  # as before the first evaluation
    result = run(script.__name__, play=run_dir, eval_episodes=1, video=False)
    (run_dir / "later.pt").rename(best)
    assert result.returncode == 0 and "checkpoint.pt is played" in result.stderr
    assert {line.split(":")[0] for line in result.stdout.splitlines()} >= {
        f"clip_return/{script.slug(goal)}" for goal in (KNEELING, LYING)
    }


@BOTH
def test_an_agent_of_one_goal_does_not_pretend_to_understand_another(script, flags, tmp_path):
    run_dir = script.train(script.Args(**flags, reward="regularized", run_dir=tmp_path / "run"))
    assert "does not see its goal" in one_line(run(script.__name__, play=run_dir, goal=(LYING,)))


@pytest.mark.parametrize("script", [sac_vlmrm, ppo_vlmrm], ids=["sac", "ppo"])
def test_paths_of_images_are_absolute_and_the_run_of_another_script_is_named(script, tmp_path, monkeypatch, capsys):
    words = ["--goal", "a robot", "a.PNG", "--eval-goal", "b.jpg", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    args = script.parse_args()
    assert (*args.goal, *args.eval_goal) == ("a robot", os.path.abspath("a.PNG"), os.path.abspath("b.jpg"))
    assert script.slug(args.goal[1]) == "a-png"
    (tmp_path / "args.json").write_text('{"goal": ["a"], "of_another": 1}')
    for flag in ("--play", "--resume"):
        monkeypatch.setattr(sys, "argv", ["script.py", flag, str(tmp_path)])
        with pytest.raises(SystemExit):
            script.parse_args()
        assert "another script or version, with --of-another" in capsys.readouterr().err
