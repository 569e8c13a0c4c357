"""Several goals and the binary reward, in both training scripts."""

import json
import shutil
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import scipy.special
import torch
from conftest import KNEELING, LYING, TINY_CLIP, make_clip, one_line, run, values
from conftest import unit as numpy_unit

import ppo_vlmrm
import sac_vlmrm
from sac_vlmrm import CLIP, binary_reward, goal_inputs, regularized_reward

SHORT = dict(
    clip=TINY_CLIP, num_envs=4, episode_length=10, eval_every=10**9, eval_episodes=2, video=False, device="cpu"
)
SAC = SHORT | dict(n_step=1, learning_starts=80, updates_per_frame=0.25, batch_size=32, total_timesteps=160)
PPO = SHORT | dict(num_steps=20, num_minibatches=4, update_epochs=2, total_timesteps=160)
POLE = dict(
    env_id="InvertedPendulum-v5",
    camera_azimuth=90.0,
    camera_distance=3.0,
    camera_lookat=(0.0, 0.0, 0.3),
    goal=("pole vertically upright on top of the cart",),
    reward="binary",
    negatives=("pole fallen over beside the cart",),
    baseline="pole and cart",
)
BOTH = pytest.mark.parametrize("script,flags", [(sac_vlmrm, SAC), (ppo_vlmrm, PPO)], ids=["sac", "ppo"])


def unit(rng, *shape):
    return torch.from_numpy(numpy_unit(rng, *shape))


# ---- images, precision, temperature


def test_an_image_is_a_goal(clip, kneeling_frame, tmp_path):
    image = shutil.copy(f"{TINY_CLIP}/kneeling.png", tmp_path / "kneeling.PNG")
    reward = sac_vlmrm.ClipReward(sac_vlmrm.Args(goal=(str(image), LYING), template=("{}", "a photo of {}")), clip)
    of_the_image, of_lying = reward(kneeling_frame[None], [0, 1])[0]
    assert of_the_image == pytest.approx(1.0, abs=1e-5) and of_lying < 0.5
    result = run(
        "sac_vlmrm", **SAC | dict(goal=(image, LYING), num_envs=2, total_timesteps=20, run_dir=tmp_path / "run")
    )
    assert result.returncode == 0, result.stderr
    assert "no-such-file.png" in one_line(run("sac_vlmrm", **SHORT, goal="no-such-file.png", run_dir=tmp_path / "none"))


@BOTH
def test_what_auto_precision_became_is_kept_and_the_text_tower_is_not(script, flags, tmp_path, monkeypatch):
    towers = []

    def drop(model, drop=script.drop_text_tower):
        frames = torch.rand(2, 3, 96, 96)
        before = sum(p.numel() for p in model.parameters()), model.encode_image(frames)
        drop(model)
        towers.append((before[0], sum(p.numel() for p in model.parameters())))
        torch.testing.assert_close(model.encode_image(frames), before[1], rtol=0, atol=0)

    monkeypatch.setattr(script, "drop_text_tower", drop)
    run_dir = script.train(script.Args(**flags | dict(num_envs=2, total_timesteps=20, run_dir=tmp_path / "run")))
    assert json.loads((run_dir / "args.json").read_text())["clip_precision"] == "fp32"
    assert towers[0][1] < 0.3 * towers[0][0]


def test_the_temperature_is_the_models_own_unless_given(clip):
    frames = torch.randint(256, (64, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    goals = dict(reward="binary", goal=(KNEELING, LYING), threshold=0.8)
    own = sac_vlmrm.ClipReward(sac_vlmrm.Args(**goals), clip)(frames, [0, 1])
    scale = float(clip.model.logit_scale.exp())
    given = [
        sac_vlmrm.ClipReward(sac_vlmrm.Args(**goals, temperature=t), clip)(frames, [0, 1]) for t in (1 / scale, 1e-3)
    ]
    np.testing.assert_array_equal(own, given[0])
    assert (own != given[1]).any()


# ---- the binary reward


@pytest.mark.parametrize("temperature", [1e-9, 1e-4, 0.01, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.99])
def test_binary_reward_is_scipys_softmax_over_a_threshold(temperature, threshold):
    rng = np.random.default_rng(0)
    frames, goals, negatives = unit(rng, 50, 8), unit(rng, 3, 8), unit(rng, 2, 8)
    cosines = frames.numpy() @ torch.cat([goals, negatives]).numpy().T
    expected = scipy.special.softmax(cosines / temperature, axis=1)[:, :3] > threshold
    actual = binary_reward(frames, goals, negatives, temperature, threshold)
    np.testing.assert_array_equal(actual.numpy(), expected)
    assert expected.any() or temperature >= 0.1


def test_a_tie_is_no_success_and_a_hair_decides_at_a_low_temperature():
    frame, goal = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    tied = torch.tensor([[0.6, -0.8]])  # the same cosine with the frame
    assert binary_reward(frame, goal, tied, 1e-9, 0.5).item() == 0.0  # 0.5 is not above 0.5
    assert binary_reward(frame, goal, tied, 1e-9, 0.49).item() == 1.0
    hair = torch.tensor([[0.6 - 1e-6, -0.8]])
    assert binary_reward(frame, goal, hair, 1e-9, 0.99).item() == 1.0
    assert binary_reward(frame, goal, hair, 1.0, 0.51).item() == 0.0
    assert binary_reward(frame, goal, goal[:0], 0.01, 0.5).item() == 1.0  # alone, a goal has all the probability
    assert binary_reward(frame * torch.nan, goal, tied, 0.01, 0.5).isnan().all()  # which ends a run, as 0 would not


def test_goals_are_negatives_of_each_other():
    rng = np.random.default_rng(1)
    frames, goals = unit(rng, 40, 4), unit(rng, 3, 4)
    together = binary_reward(frames, goals, goals[:0], 0.05, 0.5)
    for i in range(3):
        others = torch.cat([goals[:i], goals[i + 1 :]])
        torch.testing.assert_close(together[:, i : i + 1], binary_reward(frames, goals[i : i + 1], others, 0.05, 0.5))
    assert (together.sum(1) <= 1).all() and together.any(0).all()


def clip_of(embeddings):
    """Stands in for a CLIP that knows these prompts; frames are given as their embeddings."""
    flags = dict(device=torch.device("cpu"), batch_size=2, encode_images=lambda frames: frames)
    return SimpleNamespace(encode_text=lambda prompts, _: torch.stack([embeddings[p] for p in prompts]), **flags)


@BOTH
def test_a_held_out_goal_competes_with_what_is_trained_on_and_not_with_other_held_out_ones(script, flags):
    x, y, z = torch.eye(3)
    text = {"trained": x, "negative": y, "held out": z, "the same": z, "robot": x}
    clip = clip_of(text)
    prompts = dict(goal=("trained",), eval_goal=("held out", "the same"), negatives=("negative",), baseline="robot")
    prompts["temperature"] = 0.01
    reward = script.ClipReward(script.Args(reward="binary", **prompts), clip)
    assert reward(torch.stack([x, y, z]), [0, 1, 2]).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("kind", ["binary", "regularized"])
@BOTH
def test_templates_that_agree_more_win_no_softmax(script, flags, kind):
    """The mean embedding of an ensemble is shorter the less its parts agree; the frame is as near to both goals."""
    text = {"agreed": (0.25, 0.9682, 0), "scattered": (0.25, 0, 0.9682), "robot": (1, 0, 0)}
    lengths = {"agreed": 0.95, "scattered": 0.93, "robot": 1.0}
    means = {name: lengths[name] * torch.tensor(x, dtype=torch.float32) for name, x in text.items()}
    clip = clip_of(means)
    args = script.Args(reward=kind, goal=("agreed", "scattered"), baseline="robot", temperature=0.01, threshold=0.45)
    agreed, scattered = script.ClipReward(args, clip)(torch.tensor([[1.0, 0.0, 0.0]]), [0, 1])[0]
    assert (agreed == scattered == 1) if kind == "binary" else agreed != scattered  # VLM-RM's is as its code has it


@BOTH
def test_termination_on_success_ends_an_episode_where_the_reward_is_1(script, flags, tmp_path):
    easy = script.train(
        script.Args(**{**flags, **POLE, "threshold": 0.0}, terminate_on_success=True, run_dir=tmp_path / "easy")
    )
    logged = values(easy)  # every frame is a success: episodes of one step
    assert set(logged["charts/episodic_length"]) == {1.0} and set(logged["charts/clip_return"]) == {1.0}
    assert logged["eval/success_rate"] == [1.0] and logged["eval/episodic_length"] == [1.0]
    rollout = np.load(next((easy / "rollouts").iterdir()))
    assert rollout["lengths"].tolist() == [1, 1] and rollout["clip_rewards"].sum(1).tolist() == [1, 1]
    hard = script.train(
        script.Args(
            **{**flags, **POLE, "threshold": 0.999999, "temperature": 100.0},
            terminate_on_success=True,
            run_dir=tmp_path / "hard",
        )
    )
    logged = values(hard)  # none is
    assert set(logged["charts/episodic_length"]) == {10.0} and set(logged["charts/clip_return"]) == {0.0}
    assert logged["eval/success_rate"] == [0.0]


def test_success_at_the_goal_of_the_batch_ends_the_bootstrapping():
    torch.manual_seed(0)
    agent = sac_vlmrm.SAC(
        sac_vlmrm.Args(gamma=0.9, autotune=False, terminate_on_success=True, reward="binary"),
        3,
        gym.spaces.Box(-1, 1, (2,)),
    )
    agent.make_optimizers()
    for parameter in agent.critic_target.parameters():
        parameter.zero_()
    for q in (agent.critic_target.q1, agent.critic_target.q2):
        q[-1].bias.fill_(50.0)
    batch = dict(
        states=torch.zeros(8, 3),
        actions=torch.zeros(8, 2),
        next_states=torch.zeros(8, 3),
        discounts=torch.full((8,), 0.9),
        goal_ids=torch.zeros(8, dtype=torch.int64),
    )
    assert agent.update(batch | {"rewards": torch.ones(8)})["critic_loss"] < 10
    assert agent.update(batch | {"rewards": torch.zeros(8)})["critic_loss"] > 2 * 40**2


# ---- several goals


def test_goal_inputs_tell_goals_apart_and_leave_a_single_one_out():
    clip = make_clip()
    goals = clip.encode_text([KNEELING, LYING, "a humanoid robot standing up", "a robot on its knees"])
    inputs = goal_inputs(goals, 3)
    torch.testing.assert_close(inputs[:3].mean(0), torch.zeros(goals.shape[1]), atol=1e-5, rtol=0)
    assert inputs[:3].square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-5)
    distances = torch.cdist(inputs[3:], inputs[:3])[0]  # other words for kneeling are nearest to kneeling
    assert distances.argmin() == 0
    assert goal_inputs(goals[:1], 1).shape == (1, 0)


def test_each_transition_has_its_own_goals_reward_and_relabelled_ones_equal_fresh_ones(tmp_path, monkeypatch):
    frames, encode = [], CLIP.encode_images
    monkeypatch.setattr(CLIP, "encode_images", lambda self, x: frames.append(x.copy()) or encode(self, x))
    run_dir = sac_vlmrm.train(sac_vlmrm.Args(**SAC, goal=(KNEELING, LYING), relabel=0.5, run_dir=tmp_path / "run"))
    monkeypatch.undo()
    clip = make_clip()
    *goals, baseline = clip.encode_text([KNEELING, LYING, "a humanoid robot"])
    embeddings = clip.encode_images(np.concatenate(frames[:4]))  # four phases of 40 frames, then the evaluation's
    fresh = regularized_reward(embeddings, torch.stack(goals), baseline, 0.0)  # [160, 2]

    buffer = sac_vlmrm.ReplayBuffer(1000, 348, 17, "cpu", n_goals=2)
    sac_vlmrm.load_rows(buffer, run_dir / "replay.bin", 160)
    pursued = buffer.rows[:160, -1].long()
    assert 0.2 < pursued.float().mean() < 0.8  # both goals are drawn, one for each episode
    assert (pursued.view(4, 10, 4) == pursued.view(4, 10, 4)[:, :1]).all()
    row_of = {tuple(row[:348].tolist()): i for i, row in enumerate(buffer.rows[:160])}
    torch.manual_seed(0)
    for relabel, swapped in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        (batch,) = buffer.batches(1, 2000, relabel)
        rows = torch.tensor([row_of[tuple(state.tolist())] for state in batch["states"]])
        torch.testing.assert_close(batch["rewards"], fresh[rows, batch["goal_ids"]], atol=1e-4, rtol=0)
        assert (batch["goal_ids"] != pursued[rows]).float().mean().item() == pytest.approx(swapped, abs=0.05)


@BOTH
def test_every_goal_is_evaluated_also_those_never_trained_on(script, flags, tmp_path):
    held_out = "a robot on its knees"
    run_dir = tmp_path / "run"  # in a process of its own, since its videos start OpenGL
    flags = {**flags, "video": True, "goal": (KNEELING, LYING), "eval_goal": (held_out,), "run_dir": run_dir}
    result = run(script.__name__, **flags)
    assert result.returncode == 0, result.stderr
    logged, names = values(run_dir), [script.slug(goal) for goal in (KNEELING, LYING, held_out)]
    returns = [logged[f"eval/clip_return/{name}"][0] for name in names]
    assert logged["eval/clip_return"][0] == pytest.approx(np.mean(returns[:2]), rel=1e-5)  # of those it trains on
    assert {f"charts/clip_return/{name}" for name in names[:2]} <= logged.keys()
    for name, goal, value in zip(names, (KNEELING, LYING, held_out), returns, strict=True):
        assert (run_dir / "videos" / f"160-{name}.mp4").exists()
        rollout = np.load(run_dir / "rollouts" / f"160-{name}.npz")
        assert str(rollout["goal"]) == goal and rollout["clip_rewards"].sum(1).mean() == pytest.approx(value, rel=1e-4)
    saved = torch.load(run_dir / "best.pt", weights_only=True)
    assert saved["agent"]["goals"].shape == (3, 128)
    assert json.loads((run_dir / "args.json").read_text())["eval_goal"] == [held_out]


@BOTH
def test_the_policy_sees_its_goal(script, flags):
    torch.manual_seed(0)
    goals = torch.randn(2, 16)
    make = script.SAC if script is sac_vlmrm else script.PPO
    agent = make(script.Args(), 3, gym.spaces.Box(-1, 1, (2,)), goals)
    states = np.ones((2, 3), np.float32)
    actions = agent.act(states, np.array([0, 1]), deterministic=True)
    assert np.abs(actions[0] - actions[1]).max() > 1e-4
    np.testing.assert_allclose(agent.act(states, np.array([1, 0]), deterministic=True), actions[::-1], atol=1e-6)


def test_episode_charts_count_the_episodes_that_ended():
    ended, rewards = np.zeros((6, 2), bool), np.ones((6, 2), np.float32)
    args = sac_vlmrm.Args(goal=("a", "b"))
    goals = np.array([[0, 1]] * 3 + [[1, 1]] * 3)
    charts = sac_vlmrm.episode_charts(args, ended, rewards, None, goals)  # none ended: the parts
    assert charts == {"charts/env_return": 6.0, "charts/episodic_length": 6.0}
    ended[2, 0] = True  # environment 0 ends after 3 steps, and starts one that the phase cuts
    ended[5, 1] = True
    charts = sac_vlmrm.episode_charts(args, ended, rewards, 2 * rewards, goals)
    assert charts["charts/env_return"] == charts["charts/episodic_length"] == 4.5
    assert charts["charts/clip_return"] == 9.0
    assert charts["charts/clip_return/a"] == 6.0 and charts["charts/clip_return/b"] == 12.0


BAD_INPUT = {
    "same goal twice": (["--goal", "a robot", "A  robot."], "first 70 letters"),
    "held-out goal is trained on": (["--goal", "a robot", "b", "--eval-goal", "b"], "first 70 letters"),
    "held-out goal of one": (["--goal", "a", "--eval-goal", "b"], "--eval-goal"),
    "nothing to compare with": (["--reward", "binary"], "--negatives"),
    "goal is negative": (["--reward", "binary", "--goal", "a", "--negatives", "a"], "--negatives"),
    "termination without success": (["--terminate-on-success"], "--reward binary"),
    "goals of the environment": (["--reward", "env", "--goal", "a robot", "b"], "--reward env"),
    "empty goal": (["--goal", "a robot", " "], "is empty"),
    "goals one by one": (["--goal", "a", "--goal", "b"], "given twice"),
    "goals one by one with signs": (["--eval-goal=a", "--eval_goal", "b"], "given twice"),
    "no wandb": (["--track"], "wandb"),
    "a sentence without quotes": (["--goal", "a", "humanoid", "robot", "kneeling"], "in quotes"),
    "negatives of another reward": (["--negatives", "x"], "--reward binary"),
    "a picture against words": (["--reward", "binary", "--goal", "a.png", "--negatives", "x"], "images, not both"),
    "a picture on the line to words": (["--alpha", "0.5", "--goal", "a.png"], "images, not both"),
    "alpha of another reward": (["--reward", "binary", "--negatives", "x", "--alpha", "0.5"], "--alpha"),
    "unknown device": (["--device", "gpu"], "device type"),
    "resumed elsewhere": (["--resume", "a", "--run-dir", "b"], "--run-dir"),
}


@pytest.mark.parametrize("script", [sac_vlmrm, ppo_vlmrm], ids=["sac", "ppo"])
@pytest.mark.parametrize("words,named", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_flags_that_cannot_work_together_are_one_line_and_status_2(script, words, named, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script", "--clip", TINY_CLIP, *words])
    with pytest.raises(SystemExit) as end:
        script.train(script.parse_args())
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and named in message


@pytest.mark.parametrize("script", [sac_vlmrm, ppo_vlmrm], ids=["sac", "ppo"])
@pytest.mark.parametrize("goals", [("跪着的机器人", "站着的机器人"), ("bed", "sofa")])
def test_goals_may_be_in_any_script_and_single_words(script, goals, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", "--goal", *goals])
    args = script.parse_args()
    script.check_args(args)
    assert args.goal == goals and script.slug(goals[0]) == goals[0]
    assert script.slug("A robot, kneeling.") == "a-robot-kneeling"


OUT_OF_RANGE = {
    "share": (["--gamma", "95"], "--gamma: must be >=0, <=1"),
    "not a number": (["--gamma", "nan"], "--gamma: must be >=0, <=1"),
    "negative rate": (["--learning-rate", "-1"], "--learning-rate: must be >0"),
    "negative seed": (["--seed", "-1"], "--seed: must be >=0"),
    "count": (["--num-envs", "0"], "--num-envs: must be >=1"),
    "temperature": (["--temperature", "0"], "must be >0"),
    "threshold": (["--threshold", "1.5"], "--threshold: must be >=0, <=1"),
    "alpha": (["--alpha", "1.5"], "--alpha: must be >=0, <=1"),
}


@pytest.mark.parametrize("script", [sac_vlmrm, ppo_vlmrm], ids=["sac", "ppo"])
@pytest.mark.parametrize("words,said", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE.keys())
def test_numbers_out_of_their_flags_range_are_refused_with_status_2(script, words, said, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", *words])
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    assert end.value.code == 2 and said in capsys.readouterr().err
