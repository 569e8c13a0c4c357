"""Behaviour of ppo_vlmrm.py's own parts: advantages, the clipped objective, statistics, discrete actions, resuming."""

import os
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import KNEELING, LYING, TINY_CLIP, assert_same_checkpoint, finish, load, one_line, run, scalars, start

import ppo_vlmrm
from ppo_vlmrm import PPO, Args, gae

FLAGS = dict(
    env_id="InvertedPendulum-v5",
    reward="env",
    num_envs=2,
    episode_length=10,
    num_steps=20,
    num_minibatches=2,
    update_epochs=2,
    checkpoint_every=80,
    eval_every=80,
    eval_episodes=2,
    video=False,
    device="cpu",
    total_timesteps=400,
)
# Which of its two actions is rewarded changes with a state that is seen; episodes are cut after 8 steps.
SWITCH = """
import gymnasium as gym, numpy as np

class Switch(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Discrete(2, start=5)
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None): self.render_mode = render_mode
    def look(self): return np.array([self.side], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.side = self.np_random.choice([-1, 1])
        return self.look(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = float((action == 6) == (self.side > 0))
        self.side = self.np_random.choice([-1, 1])
        return self.look(), reward, False, False, {}

    def render(self): return np.full((64, 64, 3), 128, np.uint8)

gym.register("Switch-v0", Switch)
"""


# ---- the algorithm


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_gae_is_the_brute_force_sum_and_truncation_bootstraps(gae_lambda):
    rng, (T, N), gamma = np.random.default_rng(0), (12, 3), 0.9
    rewards, values, next_values = rng.normal(size=(3, T, N))
    ended = rng.random((T, N)) < 0.3
    ended[-1] = True
    terminated = ended & (rng.random((T, N)) < 0.5)
    assert terminated.any() and (ended & ~terminated).any()
    for n in range(N):  # inside an episode the next state's value is the one that follows
        for t in range(T - 1):
            if not ended[t, n]:
                next_values[t, n] = values[t + 1, n]
    expected = np.empty((T, N))
    for n in range(N):
        for t in range(T):
            last = next(k for k in range(t, T) if ended[k, n])
            # the lambda-weighted mean of the k-step advantages, the longest taking what weight is left
            steps = []
            for k in range(t, last + 1):
                total = sum(gamma ** (i - t) * rewards[i, n] for i in range(t, k + 1))
                future = 0.0 if terminated[k, n] else gamma ** (k + 1 - t) * next_values[k, n]
                steps.append(total + future - values[t, n])
            weights = [(1 - gae_lambda) * gae_lambda**i for i in range(len(steps))]
            weights[-1] = gae_lambda ** (len(steps) - 1)
            expected[t, n] = np.dot(weights, steps)
    tensors = [torch.from_numpy(np.asarray(x, float)) for x in (rewards, values, next_values, terminated, ended)]
    np.testing.assert_allclose(gae(*tensors, gamma, gae_lambda).numpy(), expected, atol=1e-12)


def test_an_endless_reward_of_one_is_worth_the_same_however_the_time_limit_cuts_it():
    ones, gamma = torch.ones(6, 1), 0.9
    value = ones / (1 - gamma)  # what a reward of 1 forever is worth
    ended = torch.tensor([[0.0], [0.0], [1.0], [0.0], [0.0], [1.0]])
    advantages = gae(ones, value, value, 0 * ended, ended, gamma, 0.95)
    torch.testing.assert_close(advantages, 0 * ones, atol=1e-5, rtol=0)  # truncated: as expected
    assert (gae(ones, value, value, ended, ended, gamma, 0.95) < -1).all()  # terminated: much worse


@pytest.mark.parametrize("norm_adv,clip_vloss,vf_coef", [(True, True, 0.5), (False, False, 0.3)])
@pytest.mark.parametrize("discrete", [False, True])
def test_loss_matches_the_clipped_objective_written_out(discrete, norm_adv, clip_vloss, vf_coef):
    torch.manual_seed(0)
    space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (2,))
    args = Args(ent_coef=0.02, clip_coef=0.1, norm_adv=norm_adv, clip_vloss=clip_vloss, vf_coef=vf_coef)
    agent, rng = PPO(args, 4, space), np.random.default_rng(0)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100.0)
    inputs = torch.from_numpy(rng.normal(size=(16, 4))).float()
    actions = (
        torch.from_numpy(rng.integers(0, 3, 16)) if discrete else torch.from_numpy(rng.normal(size=(16, 2))).float()
    )
    old = {k: torch.from_numpy(rng.normal(size=16)).float() for k in ("log_probs", "values", "advantages", "returns")}
    old["log_probs"] = agent.policy(inputs).log_prob(actions).detach() + 0.2 * old["log_probs"]
    loss, parts = agent.loss({"inputs": inputs, "actions": actions, **old})

    out, values = agent.actor(inputs).detach().double().numpy(), agent.critic(inputs)[:, 0].detach().double().numpy()
    a, (log_old, v_old, adv, ret) = actions.numpy(), (x.double().numpy() for x in old.values())
    if discrete:
        probs = np.exp(out) / np.exp(out).sum(1, keepdims=True)
        log_new, entropy = np.log(probs[np.arange(16), a]), -(probs * np.log(probs)).sum(1).mean()
    else:
        log_new = (-0.5 * (a - out) ** 2 - 0.5 * np.log(2 * np.pi)).sum(1)  # the standard deviation starts at 1
        entropy = 2 * 0.5 * np.log(2 * np.pi * np.e)
    if norm_adv:
        adv = (adv - adv.mean()) / adv.std(ddof=1)
    ratio = np.exp(log_new - log_old)
    policy_loss = np.maximum(-adv * ratio, -adv * np.clip(ratio, 0.9, 1.1)).mean()
    clipped = v_old + np.clip(values - v_old, -0.1, 0.1) if clip_vloss else values
    value_loss = 0.5 * np.maximum((values - ret) ** 2, (clipped - ret) ** 2).mean()
    assert loss.item() == pytest.approx(policy_loss - 0.02 * entropy + vf_coef * value_loss, rel=1e-4)
    assert parts["clipfrac"].item() == pytest.approx((np.abs(ratio - 1) > 0.1).mean()) and 0 < parts["clipfrac"] < 1


def scale(agent, rewards, ended):
    return agent.scale_rewards(rewards[..., None], torch.zeros(rewards.shape, dtype=torch.int64), ended)


def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return():
    agent = PPO(Args(gamma=0.5, early_termination=True), 3, gym.spaces.Box(-1, 1, (1,)))
    rewards = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    ended = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    scaled = scale(agent, rewards, ended)
    returns = np.array([1.0, 2.5, 3.0, 5.5])  # it starts anew after the second step
    np.testing.assert_allclose(scaled.numpy(), rewards.numpy() / returns.std(), rtol=1e-5)
    spike = 1e6 * torch.eye(1000)[:, :1]
    assert scale(agent, spike, torch.ones_like(spike)).max() == 10.0


def test_rewards_are_shifted_by_their_goals_mean_of_all_rollouts():
    agent, zeros = PPO(Args(), 3, gym.spaces.Box(-1, 1, (1,))), torch.zeros(20, 4)
    scale(agent, zeros, zeros)
    assert (scale(agent, zeros + 1.0, zeros) > 0.0).all()
    agent = PPO(Args(goal=("a", "b")), 3, gym.spaces.Box(-1, 1, (1,)), torch.zeros(2, 5))
    goal_ids = torch.randint(2, (20, 4))
    rewards = torch.tensor([0.2, 0.8]) + 0.01 * torch.randn(20, 4, 2)
    scaled = agent.scale_rewards(rewards, goal_ids, zeros)
    assert scaled[goal_ids == 0].mean().item() == pytest.approx(scaled[goal_ids == 1].mean().item(), abs=0.1)


@pytest.mark.parametrize("reward,differs", [("regularized", False), ("binary", True), ("env", True)])
def test_scaled_rewards_do_not_depend_on_the_scale_and_the_offset_of_a_clip_reward(reward, differs):
    rng, ended = np.random.default_rng(0), torch.zeros(20, 4)
    ended[9::10] = 1.0
    agents = [PPO(Args(gamma=0.9, reward=reward), 3, gym.spaces.Box(-1, 1, (1,))) for _ in range(2)]
    for _ in range(3):
        rewards = torch.from_numpy(rng.normal(0.3, 0.2, (20, 4)).astype(np.float32))
        one, other = (scale(agent, r, ended) for agent, r in zip(agents, (rewards, 0.05 * rewards + 0.22), strict=True))
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4) != differs


def test_actions_stay_in_bounds_and_are_the_mode_when_deterministic():
    torch.manual_seed(0)
    states, goals = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32), np.zeros(200, int)
    agent = PPO(Args(), 3, gym.spaces.Box(-1, 1, (2,)))
    actions = agent.act(states, goals)
    assert np.abs(actions).max() == 1.0  # a standard deviation of 1 is often beyond
    np.testing.assert_allclose(agent.act(states, goals, True), agent.act(states, goals, True))
    assert np.abs(agent.act(states, goals, True)).max() < 0.2
    agent = PPO(Args(), 3, gym.spaces.Discrete(4, start=-1))
    assert set(agent.act(states, goals).tolist()) == {-1, 0, 1, 2}
    modes = agent.policy(agent.inputs(torch.from_numpy(states), goals)).probs.argmax(-1).numpy() - 1
    np.testing.assert_array_equal(agent.act(states, goals, True), modes)


# ---- whole runs


def test_statistics_are_of_the_collected_states_and_frozen_in_evaluation(tmp_path):
    run_dir = ppo_vlmrm.train(Args(**FLAGS | dict(eval_every=40, run_dir=tmp_path / "a")))
    agent = load(run_dir)["agent"]
    assert agent["normalizer.count"] == 400  # ten evaluations of 20 frames have left no trace
    seldom = ppo_vlmrm.train(Args(**FLAGS | dict(eval_every=10**9, run_dir=tmp_path / "b")))
    other = load(seldom)["agent"]
    torch.testing.assert_close(agent, other, rtol=0, atol=0)


def test_what_would_go_unnoticed_is_said(tmp_path, capsys):
    """Frames whose sides CLIP does not see, and rollouts that never come to the end of an episode."""
    code = SWITCH.replace("(64, 64, 3)", "(40, 60, 3)").replace("Switch-v0", "Wide-v0")
    exec(code, {})
    flags = FLAGS | dict(env_id="Wide-v0", reward="regularized", clip=TINY_CLIP, num_steps=8, total_timesteps=16)
    ppo_vlmrm.train(Args(**flags, run_dir=tmp_path / "run"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2 and "--num-steps 8" in warnings[0] and "40 pixels high and 60 wide" in warnings[1]


def test_discrete_actions_are_learned(tmp_path):
    (tmp_path / "switch.py").write_text(SWITCH)
    flags = FLAGS | dict(
        env_id="switch:Switch-v0",
        episode_length=8,
        num_steps=64,
        total_timesteps=2560,
        update_epochs=10,
        eval_every=10**9,
        learning_rate=3e-3,
        run_dir=tmp_path / "run",
    )
    result = run("ppo_vlmrm", env={"PYTHONPATH": str(tmp_path)}, **flags)
    assert result.returncode == 0, result.stderr
    logged = scalars(tmp_path / "run")
    returns = [value for _, value in logged["charts/env_return"]]
    assert 2.5 < returns[0] < 5.5 and returns[-1] > 7.5, returns  # of 8, half of it by chance
    assert logged["eval/env_return"][-1][1] == 8.0
    assert set(v for _, v in logged["charts/episodic_length"]) == {8.0}


def test_learning_the_pendulum_from_the_environments_reward(tmp_path):
    flags = FLAGS | dict(
        episode_length=100,
        early_termination=True,
        num_envs=4,
        num_steps=256,
        total_timesteps=20480,
        update_epochs=10,
        num_minibatches=16,
        learning_rate=1e-3,
        eval_every=10**9,
    )
    run_dir = ppo_vlmrm.train(Args(**flags, run_dir=tmp_path / "run"))
    returns = [value for _, value in scalars(run_dir)["charts/env_return"]]
    assert returns[0] < 15 and returns[-1] > 50, returns


def assert_same_end(run_dir, reference):
    assert_same_checkpoint(run_dir, reference)
    one, other = (
        {tag: points for tag, points in scalars(folder).items() if not tag.startswith("time/") and tag != "charts/SPS"}
        for folder in (run_dir, reference)
    )
    assert one == other


def test_resuming_is_exact_also_with_clip_and_several_goals(tmp_path):
    flags = FLAGS | dict(
        env_id="Humanoid-v5", reward="regularized", clip=TINY_CLIP, goal=(KNEELING, LYING), anneal_lr=False
    )
    whole = ppo_vlmrm.train(Args(**flags | dict(total_timesteps=160, run_dir=tmp_path / "whole")))
    part = ppo_vlmrm.train(Args(**flags | dict(total_timesteps=80, run_dir=tmp_path / "part")))
    assert ppo_vlmrm.train(Args(**flags | dict(total_timesteps=160, resume=part))) == part
    assert_same_end(part, whole)


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint_to_resume_from(tmp_path, number, status):
    flags = FLAGS | dict(total_timesteps=4000, checkpoint_every=4000)  # none is due before the end
    process, output = start("ppo_vlmrm", **flags, run_dir=tmp_path / "run")
    while not (tmp_path / "run" / "best.pt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    result = finish(process, output, timeout=30)
    errors = result.stderr
    assert result.returncode == status and "--resume" in errors and "Traceback" not in errors, errors
    assert 80 <= load(tmp_path / "run")["global_step"] < 4000


def test_flags_that_would_change_the_numbers_are_refused_on_resume(tmp_path):
    run_dir = ppo_vlmrm.train(Args(**FLAGS | dict(total_timesteps=40, run_dir=tmp_path / "run")))
    line = one_line(run("ppo_vlmrm", resume=run_dir, clip_coef=0.3, eval_every=7))
    assert "--clip-coef 0.3 (was 0.2)" in line and "--eval-every" not in line
    assert "--num-minibatches" in one_line(run("ppo_vlmrm", num_minibatches=100, num_steps=2, num_envs=2))


def test_a_nan_loss_stops_before_it_is_saved(tmp_path, monkeypatch):
    loss, calls = PPO.loss, []

    def poisoned(self, batch):
        calls.append(1)
        batch["advantages"] = batch["advantages"] * (float("nan") if len(calls) > 30 else 1.0)
        return loss(self, batch)

    monkeypatch.setattr(PPO, "loss", poisoned)
    with pytest.raises(FloatingPointError, match="loss"):
        ppo_vlmrm.train(Args(**FLAGS, run_dir=tmp_path / "run"))
    saved = load(tmp_path / "run")
    assert saved["global_step"] == 240 and all(value.isfinite().all() for value in saved["agent"].values())
