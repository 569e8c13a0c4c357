"""Behaviour of sac_vlmrm.py, through its own functions and its command line, on real renders and the embedded CLIP."""

import copy
import functools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio
import numpy as np
import open_clip
import pytest
import torch
from conftest import KNEELING, ROOT, SCENE, TINY_CLIP, load, make_clip, one_line, run, scalars, unit, values
from PIL import Image

import sac_vlmrm
from sac_vlmrm import CLIP, SAC, Args, ReplayBuffer, RunningNorm, find_clip, regularized_reward

TINY_RUN = dict(
    clip=TINY_CLIP,
    num_envs=2,
    episode_length=10,
    learning_starts=40,
    updates_per_frame=0.5,
    batch_size=32,
    total_timesteps=80,
    eval_every=10**9,
    eval_episodes=2,
    video=False,
    device="cpu",
)
GOLDEN = [0.46528, 0.7961, 0.90637]  # kneeling.png for "a humanoid robot kneeling", at alpha 0, 0.5 and 1


# ---- the reward


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_reward_is_the_papers_equation_with_an_explicit_projection(alpha):
    rng = np.random.default_rng(0)
    s, g, b = unit(rng, 6, 16), unit(rng, 3, 16), unit(rng, 16)
    expected = np.empty((6, 3))
    for j in range(3):
        d = g[j] - b
        projection = np.outer(d, d) / (d @ d)  # D x D, onto the direction of the line through b and g
        for i in range(6):
            on_line = b + projection @ (s[i] - b)
            expected[i, j] = 1 - 0.5 * np.sum((alpha * on_line + (1 - alpha) * s[i] - g[j]) ** 2)
    actual = regularized_reward(*(torch.from_numpy(x) for x in (s, g, b)), alpha)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-12)


def test_reward_limits():
    rng = np.random.default_rng(1)
    s, g, b = (torch.from_numpy(x) for x in (unit(rng, 5, 8), unit(rng, 2, 8), unit(rng, 8)))
    torch.testing.assert_close(regularized_reward(s, g, b, 0.0), s @ g.T)  # alpha 0: the cosine
    d = torch.nn.functional.normalize(g[0] - b, dim=0)
    orthogonal = torch.from_numpy(unit(rng, 8))
    orthogonal = orthogonal - (orthogonal @ d) * d
    moved = regularized_reward(s + orthogonal, g[:1], b, 1.0)  # alpha 1: what is orthogonal to g - b does not count
    torch.testing.assert_close(moved, regularized_reward(s, g[:1], b, 1.0))
    torch.testing.assert_close(regularized_reward(g, g, b, 0.7).diag(), torch.ones(2, dtype=torch.float64))


# ---- CLIP


def test_golden_values_of_the_embedded_clip(clip, kneeling_frame):
    goal, baseline = clip.encode_text(["a humanoid robot kneeling", "a humanoid robot"]).split(1)
    embedding = clip.encode_images(kneeling_frame[None])
    assert embedding.norm().item() == pytest.approx(1.0, abs=1e-6)
    rewards = [regularized_reward(embedding, goal, baseline[0], alpha).item() for alpha in (0.0, 0.5, 1.0)]
    assert rewards == pytest.approx(GOLDEN, abs=2e-4)


def test_clip_prefers_the_sentence_of_the_frame(clip, kneeling_frame):
    prompts = ["a humanoid robot kneeling", "a humanoid robot standing up", "a humanoid robot lying on its back"]
    similarities = clip.encode_images(kneeling_frame[None]) @ clip.encode_text(prompts).T
    assert similarities.argmax() == 0
    upside_down = clip.encode_images(kneeling_frame[::-1].copy()[None]) @ clip.encode_text(prompts).T
    assert upside_down[0, 0] < similarities[0, 0] - 0.1


@pytest.mark.parametrize("shape", [(96, 96), (480, 480), (400, 600), (64, 80)])
def test_preprocessing_is_open_clips_own(clip, shape):
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{TINY_CLIP}")
    expected = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
    torch.testing.assert_close(clip.preprocess(torch.from_numpy(frames)), expected, rtol=0, atol=1e-6)


def test_padding_shows_the_sides_that_the_models_own_crop_cuts_off(clip):
    frames = np.full((2, 60, 120, 3), 128, np.uint8)
    frames[1, :, 100:] = 255  # as MountainCar's flag, right of the square in the middle
    padding = make_clip(resize_mode="longest")
    for model, differ in ((clip, False), (padding, True)):
        images = model.preprocess(torch.from_numpy(frames))
        assert images.shape == (2, 3, 96, 96) and (not torch.equal(*images)) is differ
    torch.testing.assert_close(images[:, :, :24], -(clip.mean / clip.std).expand(2, 3, 24, 96))  # black above


def test_embeddings_do_not_depend_on_the_chunk_size(clip):
    frames = np.random.default_rng(0).integers(0, 256, (7, 96, 96, 3), np.uint8)
    whole = clip.encode_images(frames)
    small = copy.copy(clip)
    small.batch_size = 3
    torch.testing.assert_close(small.encode_images(frames), whole, rtol=0, atol=1e-5)


def test_templates_are_averaged_after_normalisation(clip):
    single = [clip.encode_text(["robot"], [template]) for template in ("a {}", "one {}, kneeling")]
    torch.testing.assert_close(clip.encode_text(["robot"], ("a {}", "one {}, kneeling")), sum(single) / 2)


# ---- the rendered environments


def test_a_frame_is_upright_and_shows_the_robot_from_its_qpos_alone(render):
    env = gym.make("Humanoid-v5")
    env.reset(seed=0)
    qpos = env.unwrapped.data.qpos.copy()
    far, low = qpos.copy(), qpos.copy()
    far[:2] += (3.0, -2.0)
    low[2] -= 0.5
    frame, far_frame, low_frame, again = render("Humanoid-v5", [qpos, far, low, qpos])
    assert frame.shape == (96, 96, 3) and frame.dtype == np.uint8
    sky, floor = frame[:20].mean((0, 1)), frame[-20:].mean((0, 1))
    assert sky[2] - sky[0] > 40 and abs(floor[2] - floor[0]) < 20  # a blue sky above a grey floor
    robot = (frame > 110).all(-1)  # it is lighter than both
    rows, columns = np.nonzero(robot)
    assert 100 < robot.sum() < 600 and 42 < columns.mean() < 54 and 20 < rows.min() < rows.max() < 80
    far_robot = (far_frame > 110).all(-1)
    assert (far_robot == robot).mean() > 0.99  # the camera follows x and y
    assert np.nonzero((low_frame > 110).all(-1))[0].mean() > rows.mean() + 5  # but never the height
    np.testing.assert_array_equal(again, frame)


def test_every_frame_scored_is_the_one_after_its_step_also_the_last_of_an_episode(tmp_path, monkeypatch, render):
    scored = []
    encode = CLIP.encode_images
    monkeypatch.setattr(CLIP, "encode_images", lambda self, x: scored.append(x.copy()) or encode(self, x))
    args = Args(**{**TINY_RUN, "total_timesteps": 40, "learning_starts": 40, "run_dir": tmp_path / "run"})
    sac_vlmrm.train(args)
    frames = np.concatenate(scored[:2]).reshape(2, 10, 2, 96, 96, 3)  # two phases [T, N, ...]; then the evaluation's

    # The same episodes, played by plain Gymnasium with the same actions and rendered from its states.
    states = []
    for phase in range(2):
        envs = [gym.make("Humanoid-v5", max_episode_steps=10) for _ in range(2)]
        *starts, numpy_seed, _ = sac_vlmrm.episode_seeds(args.seed, 0, phase * 20, n=4)
        rng = np.random.default_rng(numpy_seed)
        for env, seed in zip(envs, starts, strict=True):
            env.reset(seed=seed)
        for _ in range(10):
            actions = rng.uniform(-1.0, 1.0, (2, 17)).astype(np.float32)
            for n, env in enumerate(envs):
                env.step(actions[n] * 0.4)  # the Humanoid's bounds
                states.append(env.unwrapped.data.qpos.copy())
    expected = render("Humanoid-v5", states).reshape(frames.shape)
    difference = np.abs(expected.astype(int) - frames).max((-1, -2, -3))
    assert difference.max() <= 2, difference


def test_terminations_are_ignored_unless_asked_for(tmp_path, capsys):
    flags = dict(
        TINY_RUN, env_id="Hopper-v5", episode_length=60, total_timesteps=120, learning_starts=10**6, reward="env"
    )
    run_dir = sac_vlmrm.train(Args(**{**flags, "run_dir": tmp_path / "a"}))
    assert scalars(run_dir)["charts/episodic_length"] == [(120, 60.0)]
    assert "warning: --learning-starts 1000000" in capsys.readouterr().err  # nothing is learned, and it says so
    run_dir = sac_vlmrm.train(Args(**{**flags, "run_dir": tmp_path / "b", "early_termination": True}))
    assert scalars(run_dir)["charts/episodic_length"][0][1] < 40  # a random hopper falls within some 20 steps


# ---- SAC


def fill(buffer, values):
    x = torch.tensor(values, dtype=torch.float32)
    buffer.add(
        states=x[:, None],
        actions=-x[:, None],
        rewards=x,
        next_states=x[:, None] + 1,
        discounts=x > 100,
        goal_ids=torch.zeros(len(x)),
    )


def test_replay_buffer_wraps_around_and_keeps_the_newest():
    buffer = ReplayBuffer(5, 1, 1, "cpu")
    fill(buffer, [0, 1, 2])
    assert set(next(buffer.batches(1, 100))["rewards"].tolist()) == {0, 1, 2}
    fill(buffer, [3, 4, 105, 106])
    batch, other = buffer.batches(2, 1000)
    assert not torch.equal(batch["rewards"], other["rewards"])
    assert batch["states"].shape == (1000, 1) and batch["rewards"].shape == (1000,)
    assert set(batch["rewards"].tolist()) == {2, 3, 4, 105, 106}
    torch.testing.assert_close(batch["next_states"], batch["states"] + 1)  # rows stay together
    torch.testing.assert_close(batch["states"][:, 0], batch["rewards"])
    torch.testing.assert_close(batch["actions"], -batch["states"])
    torch.testing.assert_close(batch["discounts"], (batch["rewards"] > 100).float())


@pytest.mark.parametrize("rounds", [1, 2, 7, 23])
def test_replay_buffer_on_disk_is_the_one_in_memory_and_spares_what_the_last_checkpoint_needs(tmp_path, rounds):
    buffer, rng = ReplayBuffer(10, 1, 1, "cpu"), np.random.default_rng(rounds)
    before = None
    for i in range(rounds):
        fill(buffer, list(i + rng.random(rng.integers(1, 11))))
        sac_vlmrm.save_rows(buffer, tmp_path / "replay.bin")
        if before is not None:  # as after a kill between this save and the checkpoint that would refer to it
            again = ReplayBuffer(10, 1, 1, "cpu")
            sac_vlmrm.load_rows(again, tmp_path / "replay.bin", before.total)
            used = min(before.total, 10)
            torch.testing.assert_close(again.rows[:used], before.rows[:used], rtol=0, atol=0)
        before = copy.deepcopy(buffer)
    with pytest.raises(ValueError, match="truncated"):
        sac_vlmrm.load_rows(ReplayBuffer(1000, 1, 1, "cpu"), tmp_path / "replay.bin", 2000)


def test_running_norm_is_the_mean_and_deviation_of_all_batches():
    x = np.random.default_rng(0).normal(5.0, [1.0, 1000.0], (300, 2))
    norm = RunningNorm(2)
    for part in np.split(x, [10, 11, 150]):
        norm.update(torch.from_numpy(part).float())
    np.testing.assert_allclose(norm.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var, x.var(0), rtol=1e-5)
    expected = ((x - x.mean(0)) / x.std(0)).clip(-10, 10)
    np.testing.assert_allclose(norm(torch.from_numpy(x).float()), expected, atol=1e-3)
    assert norm(torch.tensor([1e6, -1e6])).tolist() == [10.0, -10.0]


def make_agent(dtype=torch.float32, **flags):
    torch.manual_seed(0)
    args = Args(learning_rate=1e-3, gamma=0.9, tau=0.1, **dict(normalize_reward=False) | flags)
    rng = np.random.default_rng(0)
    n_goals = len(args.goal)
    goals = torch.tensor(rng.normal(size=(n_goals, 4))) if n_goals > 1 else None
    agent = SAC(args, 3, gym.spaces.Box(-1, 1, (2,)), goals).to(dtype)
    agent.make_optimizers()
    batch = dict(
        states=rng.normal(size=(16, 3)),
        actions=rng.uniform(-1, 1, (16, 2)),
        rewards=rng.normal(size=16),
        next_states=rng.normal(size=(16, 3)),
        discounts=0.9 * rng.integers(0, 2, 16),
    )
    batch = {name: torch.tensor(value, dtype=dtype) for name, value in batch.items()}
    own = torch.tensor(rng.random(16) < 0.5) if n_goals > 1 else torch.ones(16, dtype=torch.bool)
    return agent, batch | {"goal_ids": torch.tensor(rng.integers(n_goals, size=16)), "own": own}


def reference_update(nets, log_ent_coef, optimizers, batch, gamma, tau):
    """SAC from Haarnoja et al.'s equations with torch.distributions, its own loops and unfused Adam.

    Each goal has an entropy coefficient, tuned by the states that were visited for that goal.
    """
    actor, q1, q2, target1, target2 = nets
    normal, tanh = torch.distributions.Normal, torch.distributions.transforms.TanhTransform

    def policy(states):
        mean, raw = actor(states).split(2, dim=1)
        log_std = -5 + 0.5 * (2 - -5) * (torch.tanh(raw) + 1)
        squashed = torch.distributions.TransformedDistribution(normal(mean, log_std.exp()), [tanh(cache_size=1)])
        action = squashed.rsample()
        return action, squashed.log_prob(action).sum(1)

    def q(net, states, actions):
        return net(torch.cat([states, actions], 1))[:, 0]

    ent_coef = torch.stack([log_ent_coef.detach()[goal].exp() for goal in batch["goal_ids"]])
    with torch.no_grad():
        action, log_prob = policy(batch["next_states"])
        value = (
            torch.minimum(*(q(net, batch["next_states"], action) for net in (target1, target2))) - ent_coef * log_prob
        )
        y = torch.where(batch["discounts"] == 0, batch["rewards"], batch["rewards"] + gamma * value)
    for net in (q1, q2):
        loss = torch.nn.functional.mse_loss(q(net, batch["states"], batch["actions"]), y)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        for p, grad in zip(net.parameters(), grads, strict=True):
            p.grad = grad
    optimizers["critic"].step()
    action, log_prob = policy(batch["states"])
    loss = (ent_coef * log_prob - torch.minimum(q(q1, batch["states"], action), q(q2, batch["states"], action))).mean()
    for p, grad in zip(actor.parameters(), torch.autograd.grad(loss, list(actor.parameters())), strict=True):
        p.grad = grad
    optimizers["actor"].step()
    log_ent_coef.grad = torch.zeros_like(log_ent_coef)
    for goal, own, log_p in zip(batch["goal_ids"], batch["own"], log_prob.detach(), strict=True):
        log_ent_coef.grad[goal] -= own * (log_p - 2.0) / 16  # the target entropy is minus two action dimensions
    optimizers["ent_coef"].step()
    with torch.no_grad():
        for net, slow in ((q1, target1), (q2, target2)):
            for p, s in zip(net.parameters(), slow.parameters(), strict=True):
                s.copy_(tau * p + (1 - tau) * s)


@pytest.mark.parametrize("goals", [("left",), ("left", "right", "up")])
@pytest.mark.parametrize("normalize_reward", [False, True])
def test_update_matches_an_independent_implementation(normalize_reward, goals):
    agent, batch = make_agent(torch.float64, normalize_reward=normalize_reward, goal=goals)
    agent.reward_stats.mean.fill_(0.5)
    agent.reward_stats.var.fill_(4.0)
    reference = copy.deepcopy(agent)
    critic, target = reference.critic, reference.critic_target
    nets = [reference.actor.net, critic.q1, critic.q2, target.q1, target.q2]
    groups = {
        "actor": nets[0].parameters(),
        "critic": [*critic.q1.parameters(), *critic.q2.parameters()],
        "ent_coef": [reference.log_ent_coef],
    }
    optimizers = {name: torch.optim.Adam(group, 1e-3, fused=False, foreach=False) for name, group in groups.items()}
    expected = dict(batch)
    for name in ("states", "next_states"):
        expected[name] = torch.cat([batch[name], agent.goals[batch["goal_ids"]]], 1)
    if normalize_reward:  # 10 rewards of 0.5 before a discount of 0, one before a discount of 0.9
        steps = torch.where(batch["discounts"] == 0.0, 10.0, 1.0)
        expected["rewards"] = (batch["rewards"] - 0.5 * steps) / 2.0 * 0.2
    torch.manual_seed(1)
    for _ in range(3):
        losses = agent.update(batch)
    torch.manual_seed(1)
    for _ in range(3):
        reference_update(nets, reference.log_ent_coef, optimizers, expected, 0.9, 0.1)
    assert all(np.isfinite(loss.item()) for loss in losses.values())
    for (name, p), q in zip(agent.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shift,ends_early", [(0.0, False), (-7.0, False), (0.0, True)])
@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_updates_do_not_depend_on_the_scale_and_the_offset_of_a_clip_reward(scale, shift, ends_early):
    """Each goal's reward r is another one's scale r + shift: after n steps, or fewer at an episode's end."""
    rng, goals, n, gamma = np.random.default_rng(0), ("left", "right"), 4, 0.9
    rewards = rng.normal([0.3, -0.2], [0.1, 0.4], (200, 2))
    states, ended = np.zeros((50, 4, 3), np.float32), np.arange(50) % 10 == 9
    outcome = states, np.zeros((50, 4), bool), np.repeat(ended[:, None], 4, 1)
    goal_ids, targets = torch.from_numpy(rng.integers(2, size=200)), []
    for transformed in (rewards, scale * rewards + shift):
        args = Args(goal=goals, gamma=gamma, n_step=n, early_termination=ends_early)
        agent = SAC(args, 3, gym.spaces.Box(-1, 1, (2,)), torch.zeros(2, 5))
        agent.reward_stats.update(torch.from_numpy(transformed))
        steps = transformed.reshape(50, 4, 2).astype(np.float32)
        returns, _, discounts = sac_vlmrm.n_step_returns(steps, *outcome, gamma, n)
        returns = torch.from_numpy(returns).flatten(0, 1).gather(1, goal_ids[:, None]).squeeze(1)
        batch = dict(rewards=returns, discounts=torch.from_numpy(discounts).flatten(), goal_ids=goal_ids)
        targets.append(agent.scaled_rewards(batch))
    torch.testing.assert_close(targets[0], targets[1], rtol=1e-3, atol=1e-3)  # float32 of -7.0 and a few hundredths
    one_step = torch.from_numpy(discounts == np.float32(gamma)).flatten()
    for goal in range(2):
        assert targets[0][one_step & (goal_ids == goal)].std() == pytest.approx(0.2, rel=0.6)


@pytest.mark.parametrize(
    "flags,scale,mean",
    [
        ({}, 0.1, 0.5),
        ({"early_termination": True}, 0.1, 0.0),
        ({"reward": "env"}, 1, 0.0),
        ({"reward": "binary"}, 1, 0.0),
    ],
)
def test_only_a_regularized_reward_is_scaled_and_shifted_only_where_no_episode_ends_early(flags, scale, mean):
    agent, batch = make_agent(**{"normalize_reward": True} | flags)
    agent.reward_stats.mean.fill_(0.5)
    agent.reward_stats.var.fill_(4.0)
    steps = torch.where(batch["discounts"] == 0.0, 10.0, 1.0)
    torch.testing.assert_close(agent.scaled_rewards(batch), scale * (batch["rewards"] - mean * steps))


def test_targets_bootstrap_unless_terminated():
    agent, batch = make_agent(autotune=False)
    batch["rewards"][:] = 0.0
    for parameter in agent.critic_target.parameters():
        parameter.zero_()
    agent.critic_target.q1[-1].bias.fill_(50.0)
    agent.critic_target.q2[-1].bias.fill_(100.0)
    losses = []
    for discount in (0.0, 0.9):
        batch["discounts"][:] = discount
        losses.append(copy.deepcopy(agent).update(batch)["critic_loss"].item())
    assert losses[0] < 10 and losses[1] == pytest.approx(2 * (0.9 * 50) ** 2, rel=0.3)  # the smaller target counts


@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_n_step_returns_are_the_sums_within_an_episode(n):
    rng, (T, N, G), gamma = np.random.default_rng(n), (12, 3, 2), 0.9
    rewards, next_states = rng.normal(size=(T, N, G)).astype(np.float32), rng.normal(size=(T, N, 4)).astype(np.float32)
    ended = rng.random((T, N)) < 0.2
    terminated = ended & (rng.random((T, N)) < 0.5)
    returns, reached, discounts = sac_vlmrm.n_step_returns(rewards, next_states, terminated, ended, gamma, n)
    for t, e in np.ndindex(T, N):
        last = next((k for k in range(t, T) if ended[k, e]), T - 1)  # of its episode, or of the phase
        last = min(last, t + n - 1)
        expected = sum(gamma ** (k - t) * rewards[k, e] for k in range(t, last + 1))
        np.testing.assert_allclose(returns[t, e], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(reached[t, e], next_states[last, e])
        expected = 0.0 if terminated[last, e] else gamma ** (last + 1 - t)
        assert discounts[t, e] == pytest.approx(expected, rel=1e-6), (t, e)


def test_actions_are_the_squashed_mean_when_deterministic():
    agent, batch = make_agent()
    states, goals = batch["states"].numpy(), np.zeros(16, int)
    a, b = (agent.act(states, goals, deterministic=True) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert (np.abs(agent.act(states, goals)) < 1).all() and (agent.act(states, goals) != agent.act(states, goals)).any()


# ---- whole runs


def test_same_seed_same_numbers(tmp_path):
    runs = [sac_vlmrm.train(Args(**TINY_RUN, seed=seed, run_dir=tmp_path / str(i))) for i, seed in enumerate((1, 1, 2))]
    a, b, c = (load(r)["agent"] for r in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["actor.net.0.weight"], c["actor.net.0.weight"])
    logs = [scalars(r) for r in runs]
    for tag in logs[0]:
        assert tag.startswith("time/") or tag == "charts/SPS" or logs[0][tag] == logs[1][tag], tag
    assert {"charts/clip_return", "losses/critic_loss", "eval/clip_return"} <= set(logs[0])


def test_an_update_may_be_owed_over_several_phases(tmp_path):
    flags = {**TINY_RUN, "reward": "env", "total_timesteps": 200, "learning_starts": 20, "updates_per_frame": 0.02}
    logged = scalars(sac_vlmrm.train(Args(**flags, run_dir=tmp_path / "run")))["losses/critic_loss"]
    assert [step for step, _ in logged] == [60, 100, 160, 200]  # of 0.4 updates a phase; what is not new is not logged


def test_the_learning_rate_falls_linearly_towards_0(tmp_path):
    flags = dict(TINY_RUN, reward="env", total_timesteps=100, learning_starts=20, anneal_lr=True)
    optimizers = load(sac_vlmrm.train(Args(**flags, run_dir=tmp_path / "run")))["optimizers"]
    rates = {name: state["param_groups"][0]["lr"] for name, state in optimizers.items()}
    assert rates == pytest.approx(dict.fromkeys(("actor", "critic", "ent_coef"), 6e-4 * 0.2))  # the last of five phases


def test_command_line_run_leaves_checkpoint_events_video_and_rollout(tmp_path, clip, render):
    run_dir = tmp_path / "run"
    result = run(
        "sac_vlmrm",
        "--goal",
        KNEELING,
        "--clip",
        TINY_CLIP,
        "--num-envs",
        2,
        "--episode-length",
        20,
        "--total-timesteps",
        200,
        "--learning-starts",
        80,
        "--updates-per-frame",
        0.25,
        "--eval-every",
        100,
        "--eval-episodes",
        3,
        "--batch-size",
        32,
        "--checkpoint-every",
        100,
        "--device",
        "cpu",  # as the frames below are scored again
        "--run-dir",
        run_dir,
    )
    assert result.returncode == 0, result.stderr
    assert str(run_dir) in result.stdout
    for name in ("checkpoint.pt", "best.pt"):
        saved = torch.load(run_dir / name, weights_only=True)
        agent = SAC(Args(), saved["agent"]["normalizer.mean"].numel(), gym.spaces.Box(-1, 1, (17,)))
        agent.load_state_dict(saved["agent"])
        assert agent.act(np.zeros((1, 348), np.float32), [0]).shape == (1, 17)
    assert load(run_dir)["global_step"] == 200
    assert json.loads((run_dir / "args.json").read_text())["goal"] == ["a humanoid robot kneeling"]
    logged = scalars(run_dir)
    for tag in (
        "charts/clip_return",
        "charts/env_return",
        "charts/SPS",
        "charts/episodic_length",
        "losses/critic_loss",
        "losses/actor_loss",
        "eval/clip_return",
        "time/collect",
        "time/label",
        "time/update",
    ):
        assert logged[tag], tag
    assert [step for step, _ in logged["eval/clip_return"]] == [120, 200]  # phases are 40 frames
    video = imageio.mimread(run_dir / "videos" / "200.mp4", memtest=False)
    assert len(video) == 20 and video[0].shape == (480, 480, 3) and np.asarray(video[-1]).std() > 10
    rollout = np.load(run_dir / "rollouts" / "200.npz")
    assert rollout["qpos"].shape == (3, 20, 24) and rollout["clip_rewards"].shape == (3, 20)
    assert logged["eval/clip_return"][-1][1] == pytest.approx(rollout["clip_rewards"].sum(1).mean(), rel=1e-4)
    # a saved state, rendered and scored again, has the reward it had in training
    goal, baseline = clip.encode_text(["a humanoid robot kneeling", "a humanoid robot"]).split(1)
    frames = render("Humanoid-v5", list(rollout["qpos"][1]))
    again = regularized_reward(clip.encode_images(frames), goal, baseline[0], 0.0)
    np.testing.assert_allclose(again[:, 0], rollout["clip_rewards"][1], atol=1e-4)


def test_learning_from_a_sentence_beats_the_random_policy(tmp_path, monkeypatch):
    """A pendulum is balanced within 4,000 frames; nobody told it that this is what is wanted but the prompt.

    The rewards are in the range of a pretrained CLIP's cosines.
    """
    scale, offset = 0.05, 0.22
    monkeypatch.setattr(sac_vlmrm, "regularized_reward", lambda *args: offset + scale * regularized_reward(*args))
    args = Args(
        env_id="InvertedPendulum-v5",
        goal=("pole vertically upright on top of the cart",),
        baseline="pole and cart",
        alpha=0.5,
        clip=TINY_CLIP,
        camera_azimuth=90.0,
        camera_distance=3.0,
        camera_lookat=(0.0, 0.0, 0.3),
        episode_length=50,
        num_envs=4,
        total_timesteps=4000,
        learning_starts=1000,
        updates_per_frame=0.5,
        batch_size=128,
        learning_rate=1e-3,
        ent_coef=0.1,
        video=False,
        run_dir=tmp_path / "run",
    )
    logged = values(sac_vlmrm.train(args))
    clip_returns = (np.array(logged["charts/clip_return"]) - 50 * offset) / scale
    balanced = logged["charts/env_return"]
    random, learned = np.mean(clip_returns[:5]), np.mean(clip_returns[-5:])  # the first five phases act at random
    assert learned > random + 5 * np.std(clip_returns[:5]) and learned > 1.25 * random, clip_returns
    assert np.mean(balanced[-5:]) > 3 * np.mean(balanced[:5]), balanced  # and the environment agrees


def test_an_environment_that_is_not_mujoco_is_rendered_by_itself_and_resized(tmp_path):
    (tmp_path / "slider.py").write_text(
        "import gymnasium as gym, numpy as np\n"
        "class Slider(gym.Env):\n"
        "    metadata = {'render_modes': ['rgb_array']}\n"
        "    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)\n"
        "    spaces = {'x': gym.spaces.Box(-9, 9, (1,)), 'goal': gym.spaces.Box(-9, 9, (2,))}\n"
        "    observation_space = gym.spaces.Dict(spaces)\n"
        "    def __init__(self, render_mode=None): self.render_mode = render_mode\n"
        "    def look(self): return {'x': np.array([self.x], np.float32), 'goal': np.zeros(2, np.float32)}\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        self.x = 0.0\n"
        "        return self.look(), {}\n"
        "    def step(self, action):\n"
        "        self.x = float(np.clip(self.x + action[0], -9, 9))\n"
        "        return self.look(), self.x, False, False, {}\n"
        "    def render(self): return np.full((100, 150, 3), 128 + int(10 * self.x), np.uint8)\n"
        "gym.register('Slider-v0', Slider)\n"
    )
    flags = {**TINY_RUN, "env_id": "slider:Slider-v0", "run_dir": tmp_path / "run"}
    words = [
        str(word) for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value) if name != "video"
    ]
    result = run("sac_vlmrm", *words, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    rollout = np.load(tmp_path / "run" / "rollouts" / "80.npz")
    assert load(tmp_path / "run")["global_step"] == 80 and "qpos" not in rollout
    assert imageio.mimread(next((tmp_path / "run" / "videos").iterdir()))[0].shape == (100, 150, 3)


def test_what_qpos_does_not_tell_of_is_drawn_by_the_environment_itself(tmp_path):
    """A render() of its own, or mocap bodies; and a first body that can't move is nothing for the camera to follow."""
    pole = type(gym.make("InvertedPendulum-v5").unwrapped)
    xml = Path(gym.make("InvertedPendulum-v5").unwrapped.fullpath).read_text()
    target = '<body name="target" pos="1 2 1" {}><geom type="sphere" size="0.1"/></body>'
    for name, words in (("mocap", 'mocap="true"'), ("fixed", "")):
        (tmp_path / f"{name}.xml").write_text(xml.replace("<worldbody>", f"<worldbody>{target.format(words)}"))

    class Own(pole):
        def render(self):
            return np.full((32, 32, 3), 200, np.uint8)

    gym.register("Own-v0", Own)
    gym.register("Mocap-v0", pole, kwargs={"xml_file": str(tmp_path / "mocap.xml")})
    flags = 10, False, SCENE, (32, 32), (32, 32), None
    own = sac_vlmrm.RenderedEnv("Own-v0", *flags)
    observation = own.reset(seed=0)[0]
    assert "qpos" not in observation and (observation["pixels"] == 200).all()
    assert sac_vlmrm.RenderedEnv("Mocap-v0", *flags).renderer is None
    assert sac_vlmrm.RenderedEnv("InvertedPendulum-v5", *flags).renderer

    for path, x in ((tmp_path / "fixed.xml", 0.0), (own.unwrapped.fullpath, 0.5)):
        draw = sac_vlmrm.SceneRenderer(path, (32, 32), **SCENE)
        draw.renderer = SimpleNamespace(update_scene=lambda *_: None, render=lambda: None)  # no OpenGL in this process
        draw(np.array([0.5, 0.0]))
        np.testing.assert_allclose(draw.camera.lookat, (x, 0, 1))


def test_workers_draw_their_first_frames_one_after_the_other_on_the_gpu_asked_for(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import gymnasium as gym, numpy as np, os, time\n"
        "class Slow(gym.Env):\n"
        "    metadata = {'render_modes': ['rgb_array']}\n"
        "    action_space = observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)\n"
        "    def __init__(self, render_mode=None): self.first = True\n"
        "    def reset(self, *, seed=None, options=None): return np.zeros(1, np.float32), {}\n"
        "    def render(self):\n"
        "        if self.first:\n"
        f"            os.mkdir({str(tmp_path / 'drawing')!r})  # which fails if it is there\n"
        "            time.sleep(0.2)\n"
        f"            os.rmdir({str(tmp_path / 'drawing')!r})\n"
        "        self.first = False\n"
        "        return np.full((4, 4, 3), int(os.environ.get('MUJOCO_EGL_DEVICE_ID', 0)), np.uint8)\n"
        "gym.register('Slow-v0', Slow)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sac_vlmrm.SceneRenderer, "opened_by", None)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    for device, number in (("cpu", 0), ("cuda:0", 0), ("cuda:3", 3)):
        args = Args(env_id="slow:Slow-v0", num_envs=4, device=device)
        with sac_vlmrm.make_envs(args, sac_vlmrm.PreprocessCfg(size=4)) as envs:
            assert (envs.reset()[0]["pixels"] == number).all()
        os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)  # it stays in this process


def test_the_lines_at_the_start_name_the_run_and_the_renderer_and_warn_of_a_cpus(capsys):
    for name, device, words in (
        ("NVIDIA H100", "cuda", ["by NVIDIA H100"]),
        ("llvmpipe (LLVM 15)", "cpu", ["by llvmpipe"]),
        ("llvmpipe (LLVM 15)", "cuda", ["warning:", "llvmpipe", "NVIDIA_DRIVER_CAPABILITIES"]),
        (None, "cpu", []),
    ):
        envs = SimpleNamespace(call=lambda method, name=name: (name,) if method == "drawn_by" else None)
        run = SimpleNamespace(envs=envs, device=torch.device(device), dir="runs/a", reward=True)
        sac_vlmrm.tell_start(Args(goal=("a pole", "a cart"), clip="RN50"), run)
        first, *lines = capsys.readouterr().err.splitlines()
        assert first == 'runs/a trains on "a pole", "a cart" by RN50'
        assert len(lines) == (len(words) > 0) and all(word in lines[0] for word in words)
        assert ("warning" in "".join(lines)) == ("warning:" in words)


class Bounded(gym.Env):
    """Insists on its bounds, which float32 does not keep when -1 and 1 are scaled to them."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(np.float32(0.1), np.float32(0.4), (1,), np.float32)

    def __init__(self, render_mode=None, frame=None, fault=None):
        self.render_mode, self.fault = render_mode, fault
        self.frame = np.full((32, 32, 3), 7, np.uint8) if frame is None else frame

    def reset(self, *, seed=None, options=None):
        if self.fault == "reset":
            raise FloatingPointError("the joints came off")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.zeros(2, np.float32), None if self.fault == "reward" else 0.0, False, False, {}

    def render(self):
        return self.frame


def test_what_an_environment_does_is_checked(monkeypatch):
    rendered = functools.partial(sac_vlmrm.RenderedEnv, "Bounded-v0", 5, False, SCENE, (32, 32), (32, 32), None)

    def registered(**kwargs):
        monkeypatch.setitem(
            gym.registry, "Bounded-v0", gym.envs.registration.EnvSpec("Bounded-v0", Bounded, kwargs=kwargs)
        )
        return rendered()

    env = registered()
    env.reset()
    for end in (-1, 1):
        assert env.step(np.array([end], np.float32))[0]["pixels"].max() == 7
    for frame in (np.zeros((32, 32, 3)), np.zeros((32, 32), np.uint8), [[0]]):
        with pytest.raises(ChildProcessError, match="uint8"):
            registered(frame=frame).reset()
    with pytest.raises(ChildProcessError, match="joints"):
        registered(fault="reset").reset()
    env = registered(fault="reward")
    env.reset()
    with pytest.raises(ChildProcessError, match="float"):
        env.step(np.zeros(1, np.float32))
    bad = [gym.spaces.Box(-1, 1, (1, 3)), gym.spaces.Box(-1, 1, ()), gym.spaces.Box(-2, 2, (1,), np.int64)]
    bad += [gym.spaces.Box(0, 0, (2,)), gym.spaces.Box(-np.inf, 1, (2,))]
    for space in bad:
        monkeypatch.setattr(Bounded, "action_space", space)
        with pytest.raises(ValueError, match="vector of floats"):
            registered()


def test_what_is_invisible_stays_so(tmp_path):
    (tmp_path / "ghosts.xml").write_text(
        """<mujoco><asset><material name="faint" rgba="1 0 0 0.3"/><material name="gone" rgba="1 0 0 0"/></asset>
        <worldbody><geom type="plane" size="1 1 1" rgba="1 1 1 0"/><geom size="1" material="gone"/>
        <geom size="1" material="faint"/><geom size="1" material="faint" rgba="1 0 0 0.6"/><geom size="1"/>
        <geom type="plane" size="1 1 1"/></worldbody></mujoco>"""
    )
    model = sac_vlmrm.build_scene(tmp_path / "ghosts.xml", restyle=True)
    opacities = np.where(model.geom_matid == model.material("gone").id, 0, model.geom_rgba[:, 3])
    np.testing.assert_allclose(opacities, [0, 0, 0.3, 0.6, 1, 1], atol=1e-6)


def test_a_gpu_that_egl_does_not_list_leaves_the_drawing_to_another_device():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import numpy as np, sac_vlmrm as s\n"
        "env = s.gym.make('InvertedPendulum-v5').unwrapped\n"
        "frame = s.SceneRenderer(env.fullpath, (64, 64), **s.scene_of(s.Args()))(env.init_qpos)\n"
        "assert frame.shape == (64, 64, 3) and np.std(frame) > 10\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_scoring_ahead_gives_the_same_rewards_from_the_same_chunks(render):
    start = gym.make("Humanoid-v5").unwrapped.init_qpos
    frames = render("Humanoid-v5", start + np.arange(11)[:, None] / 50)
    clip = make_clip()
    clip.batch_size, encoded = 2, []
    reward = sac_vlmrm.ClipReward(Args(goal=("a humanoid robot kneeling", "a robot")), clip)
    expected = reward(frames, range(2))
    encode_images = clip.encode_images
    clip.encode_images = lambda images: encoded.append(len(images)) or encode_images(images)
    reward.score_ahead(frames, 8)
    assert encoded == []  # on a CPU it would only take the cores from the environments
    reward.ahead = True
    for n, chunks in ((1, []), (3, [2]), (4, [2, 2]), (9, [2, 2, 2, 2]), (11, [2] * 5)):
        reward.score_ahead(frames, n)
        assert encoded == chunks
    np.testing.assert_array_equal(reward(frames, range(2)), expected)
    assert encoded == [2, 2, 2, 2, 2, 1] and np.ptp(expected, 0).min() > 0.01
    np.testing.assert_array_equal(reward(frames[:2], [1]), expected[:2, 1:])  # nothing is left of the phase before
    clip.batch_size = reward.chunk_size = 256
    del encoded[:]
    reward.score_ahead(frames, 10)
    assert encoded == [2] * 5  # more than a quarter of the phase would be waited for at its end
    np.testing.assert_allclose(reward(frames, range(2)), expected, atol=1e-6)


BAD_INPUT = {
    "template": (["--template", "a photo"], "--template"),
    "goal is baseline": (["--goal", "x", "--baseline", "x", "--alpha", "0.5"], "--baseline"),
    "architecture": (["--clip", "RN50x63"], "RN50x64"),
    "weights tag": (["--clip", "ViT-B-32", "--clip-pretrained", "nobody"], "laion2b_s34b_b79k"),
    "weights of a directory": (["--clip", TINY_CLIP, "--clip-pretrained", "openai"], "--clip-pretrained"),
    "not cached": (["--clip", "ViT-B-32"], "laion2b_s34b_b79k"),
    "long prompt": (["--clip", TINY_CLIP, "--goal", "a humanoid robot " + "that is kneeling " * 20], "too long"),
    "run folder": (["--clip", TINY_CLIP, "--run-dir", "/dev/null/run"], "/dev/null/run"),
    "resume": (["--resume", str(ROOT / "docs")], "docs: no run"),
    "play": (["--play", str(ROOT / "docs")], "docs: no run"),
    "clip directory": (["--clip", str(ROOT / "docs")], "open_clip_config.json"),
    "environment": (["--clip", TINY_CLIP, "--env-id", "Humanoid-v55"], "`v5`"),
    "discrete actions": (["--clip", TINY_CLIP, "--env-id", "CartPole-v1"], "ppo_vlmrm.py"),
    "device": (["--clip", TINY_CLIP, "--device", "cuda"], "NVIDIA"),
}


@pytest.mark.parametrize("flags,named", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_status_2(flags, named, tmp_path, monkeypatch, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    where = [] if {"--run-dir", "--resume", "--play"} & set(flags) else ["--run-dir", tmp_path / "run"]
    if "ViT-B-32" in flags:  # an empty cache, and a hub that does not answer
        offline = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://localhost:9", "XDG_CACHE_HOME": str(tmp_path)}
        result = run("sac_vlmrm", *where, *flags, env=offline)
        if "--clip-pretrained" not in flags:  # this is not known to be a mistake
            note, result.stderr = result.stderr.split("\n", 1)
            assert "no answer from http://localhost:9" in note
        assert named in one_line(result)
        return
    monkeypatch.setattr("sys.argv", ["sac_vlmrm.py", *map(str, where), *flags])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:  # as the command would, without the seconds that its imports take
        runpy.run_path(str(ROOT / "sac_vlmrm.py"), run_name="__main__")
    assert named in one_line(SimpleNamespace(returncode=stopped.value.code, stderr=capsys.readouterr().err))
    assert signal.getsignal(signal.SIGTERM) is handler  # also where the workers did not start


def test_a_signal_while_clip_loads_ends_a_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sac_vlmrm, "CLIP", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    args = Args(clip=TINY_CLIP, num_envs=1, run_dir=tmp_path / "run")
    others = {process.pid for process in multiprocessing.active_children()}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), sac_vlmrm.start_run(args):
            pass
    finally:
        signal.signal(signal.SIGINT, handler)
    assert {process.pid for process in multiprocessing.active_children()} <= others
    assert not args.run_dir.exists()  # there was nothing to save


def test_traceback_shows_the_whole_error(tmp_path):
    result = run("sac_vlmrm", "--goal", " ", "--traceback", "--run-dir", tmp_path / "run")
    assert result.returncode == 1 and "Traceback" in result.stderr and "--goal is empty" in result.stderr


def test_weights_of_another_model_are_one_line(tmp_path):
    config = json.loads((Path(TINY_CLIP) / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 64
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").symlink_to(Path(TINY_CLIP) / "open_clip_model.safetensors")
    line = one_line(run("sac_vlmrm", clip=tmp_path, num_envs=1, run_dir=tmp_path / "run"))
    assert "size mismatch" in line


def test_weights_know_their_activation_and_a_default_is_never_a_surprise(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no note of a hub that does not answer
    for name, tag, quick_gelu in (
        ("ViT-L-14", "laion2b_s32b_b82k", False),
        ("ViT-L-14-quickgelu", "openai", True),
        ("ViT-H-14-quickgelu", "dfn5b", True),
        ("ViT-bigG-14-quickgelu", "metaclip_fullcc", True),
        ("RN50", "openai", True),
        ("RN101-quickgelu", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-g-14", "laion2b_s34b_b88k", False),
    ):
        model = find_clip(name).model
        assert (model["pretrained"], model["force_quick_gelu"]) == (tag, quick_gelu), name
    assert find_clip("ViT-L-14", "openai").model["force_quick_gelu"]
    assert capsys.readouterr().err == ""
    find_clip("ViT-L-14", f"{TINY_CLIP}/open_clip_model.safetensors")
    assert "pixel mean" in capsys.readouterr().err  # of a file of weights nothing is known


def test_an_environment_without_frames_is_one_line(tmp_path):
    (tmp_path / "blind.py").write_text(
        "import gymnasium as gym\n"
        "class Blind(gym.Env):\n"
        "    action_space = observation_space = gym.spaces.Box(-1, 1, (2,))\n"
        "    def __init__(self, render_mode=None): pass\n"
        "gym.register('Blind-v0', Blind)\n"
    )
    flags = dict(env_id="blind:Blind-v0", clip=TINY_CLIP, run_dir=tmp_path / "run")
    assert "rgb_array" in one_line(run("sac_vlmrm", env={"PYTHONPATH": str(tmp_path)}, **flags))


def test_without_egl_one_line_names_the_package(tmp_path):
    (tmp_path / "mujoco.py").write_text("raise AttributeError(\"'NoneType' object has no attribute 'eglQueryString'\")")
    assert "apt-get install" in one_line(run("sac_vlmrm", "--help", env={"PYTHONPATH": str(tmp_path)}))


def test_weights_that_do_not_load_are_never_used(tmp_path):
    config = json.loads((Path(TINY_CLIP) / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))  # a config without weights
    with pytest.raises(RuntimeError, match="Required pretrained weights"):
        make_clip(tmp_path)
