"""What a GPU must do as a CPU does; skipped where there is none, as on the machine of the continuous integration."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_CLIP, assert_same_checkpoint, load, make_clip, run, scalars

from sac_vlmrm import CLIP, SAC, Args, ClipReward, RecordedUpdate, ReplayBuffer, find_clip, gym

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

FLAGS = dict(clip=TINY_CLIP, goal=("a humanoid robot kneeling", "a humanoid robot lying on its back"), device="cuda")
FLAGS |= dict(env_id="Humanoid-v5", num_envs=4, episode_length=20, checkpoint_every=80, eval_every=160, eval_episodes=2)
FLAGS |= dict(clip_batch_size=32, video=False, anneal_lr=False)  # chunks that do not divide a phase
SCRIPTS = {
    "sac_vlmrm": dict(learning_starts=80, batch_size=64, buffer_size=500),
    "ppo_vlmrm": dict(num_steps=20, num_minibatches=4),
}


# On an H100 the largest of fp16's errors on these frames was 0.0021; fp32's convolutions are TF32.
@pytest.mark.parametrize("precision,error", [("fp32", 2e-3), ("auto", 5e-3)])
def test_embeddings_and_rewards_are_the_cpus(precision, error):
    frames = np.random.default_rng(0).integers(256, size=(70, 96, 96, 3)).astype(np.uint8)
    expected, clip = make_clip(), CLIP(find_clip(TINY_CLIP), "cuda", precision, batch_size=32)
    assert clip.precision == {"auto": "fp16"}.get(precision, precision)
    prompts = ["a humanoid robot kneeling", "a humanoid robot"]
    torch.testing.assert_close(clip.encode_text(prompts).cpu(), expected.encode_text(prompts), rtol=0, atol=error)
    torch.testing.assert_close(clip.encode_images(frames).cpu(), expected.encode_images(frames), rtol=0, atol=error)
    args = Args(goal=tuple(prompts[:1]), alpha=0.5)
    rewards, ours = (ClipReward(args, model)(frames, [0]) for model in (expected, clip))
    np.testing.assert_allclose(ours, rewards, rtol=0, atol=error)


def test_scoring_ahead_beside_other_kernels_gives_the_same_rewards():
    clip = CLIP(find_clip(TINY_CLIP), "cuda", batch_size=32)
    reward, busy = ClipReward(Args(), clip), torch.randn(2048, 2048, device="cuda")
    frames = torch.empty(500, 96, 96, 3, dtype=torch.uint8, pin_memory=True).random_(256).numpy()
    expected = reward(frames, [0])
    for _ in range(3):
        for n in range(10, 500, 10):
            busy = (busy @ busy).tanh()
            reward.score_ahead(frames, n)
        np.testing.assert_array_equal(reward(frames, [0]), expected)


def test_updates_are_the_cpus(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # the devices draw other noise
    rng, agents = torch.Generator().manual_seed(0), {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        agents[device] = SAC(Args(goal=("a", "b")), 5, gym.spaces.Box(-1, 1, (3,)), torch.randn(2, 4)).to(device)
        agents[device].make_optimizers()
    buffer = ReplayBuffer(1000, 5, 3, "cpu", n_goals=2)
    row = dict(states=5, actions=3, next_states=5, rewards=2, discounts=1)
    rows = {name: torch.rand(1000, width, generator=rng) for name, width in row.items()}
    buffer.add(**rows, goal_ids=torch.arange(1000) % 2)
    for batch in buffer.batches(20, 256, relabel=0.5):
        expected, losses = (agent.update({k: v.to(d) for k, v in batch.items()}) for d, agent in agents.items())
        for name, loss in expected.items():
            torch.testing.assert_close(losses[name].cpu(), loss, rtol=1e-3, atol=1e-4)


def test_recorded_updates_are_the_same_to_the_bit():
    buffer, agents = ReplayBuffer(1000, 5, 3, "cuda", n_goals=2), []
    row = dict(states=5, actions=3, next_states=5, rewards=2, discounts=1)
    buffer.add(**{name: torch.rand(1000, width) for name, width in row.items()}, goal_ids=torch.arange(1000) % 2)
    for recorded in (False, True):
        torch.manual_seed(0)
        agent = SAC(Args(goal=("a", "b")), 5, gym.spaces.Box(-1, 1, (3,)), torch.randn(2, 4)).cuda()
        agent.make_optimizers()
        update = RecordedUpdate(agent) if recorded else agent.update
        for phase in range(3):  # the learning rate, statistics and parameters change between replays, too
            torch.manual_seed(phase)
            agent.normalizer.update(torch.rand(10, 5, device="cuda"))
            agent.reward_stats.update(torch.rand(10, 2, device="cuda"))
            for i, optimizer in enumerate(agent.optimizers.values(), 1):
                optimizer.param_groups[0]["lr"] = 1e-3 / (phase + i)
            for batch in buffer.batches(10, 64, relabel=0.5):
                losses = update(batch)
        optimizers = {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()}
        losses = {name: float(loss) for name, loss in losses.items()}
        agents.append({"losses": losses, "agent": agent.state_dict(), "optimizers": optimizers})
    torch.testing.assert_close(*agents, rtol=0, atol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_draws_on_the_gpu_learns_there_and_resumes_exactly(script, tmp_path):
    flags, whole, part = FLAGS | SCRIPTS[script], tmp_path / "whole", tmp_path / "part"
    result = run(script, **flags, total_timesteps=320, run_dir=whole)
    assert result.returncode == 0, result.stderr
    assert "frames are drawn by NVIDIA" in result.stderr
    assert json.loads((whole / "args.json").read_text())["clip_precision"] == "fp16"
    assert {value.device.type for value in load(whole)["agent"].values()} == {"cuda"}
    for where in (dict(flags, total_timesteps=160, run_dir=part), dict(total_timesteps=320, resume=part)):
        result = run(script, **where)
        assert result.returncode == 0, result.stderr
    assert_same_checkpoint(part, whole)
    logs = scalars(part), scalars(whole)
    assert logs[0].keys() == logs[1].keys()
    for tag in logs[0].keys() - {"charts/SPS"}:
        assert tag.startswith("time/") or logs[0][tag] == logs[1][tag]
