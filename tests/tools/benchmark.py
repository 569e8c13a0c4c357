"""Measures what a run spends its time on, each beside its plain counterpart, in one process and one go.

    python tests/tools/benchmark.py
    python tests/tools/benchmark.py --clip ViT-L-14 --device cuda

Figures of speed depend on the machine and its other load: read the ratios.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[2]))
import sac_vlmrm

ROOT = Path(__file__).parents[2]


@dataclass
class Args:
    clip: str = str(ROOT / "tests" / "tiny_clip")
    """as sac_vlmrm.py's --clip"""
    env_id: str = "Humanoid-v5"
    """a MuJoCo environment"""
    num_envs: int = 8
    """environments of both kinds"""
    device: str = "auto"
    """as sac_vlmrm.py's --device"""
    steps: int = 60
    """vector steps that are timed"""
    batch_size: int = 256
    """transitions an update"""


def rate(work, n):
    """Units per second of a function that does `n` units, after a first call that is not timed."""
    work()
    start = time.perf_counter()
    work()
    return n / (time.perf_counter() - start)


def plain_gymnasium(args):
    """Steps and renders/s of Gymnasium as it comes: its default look at 480 x 480."""
    make = [lambda: gym.make(args.env_id, render_mode="rgb_array", max_episode_steps=-1)] * args.num_envs
    envs = gym.vector.AsyncVectorEnv(make, context="fork")
    envs.reset(seed=0)
    steps = max(args.steps // 10, 3)

    def work():
        for _ in range(steps):
            envs.step(envs.action_space.sample())
            assert envs.render()[0].shape == (480, 480, 3)

    result = rate(work, steps * args.num_envs)
    envs.close()
    return result


def ours(args, size):
    settings = sac_vlmrm.Args(env_id=args.env_id, num_envs=args.num_envs, episode_length=10**6)
    with sac_vlmrm.make_envs(settings, sac_vlmrm.PreprocessCfg(size=size)) as envs:

        def work():
            for _ in range(args.steps):
                observation = envs.step(envs.action_space.sample())[0]
            assert observation["pixels"].shape == (args.num_envs, size, size, 3)

        return rate(work, args.steps * args.num_envs)


def main(args):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    source = sac_vlmrm.find_clip(args.clip)
    size = source.config.input_size[1]
    print(f"{args.env_id}, {args.num_envs} environments, {torch.get_num_threads()} CPU threads, device {device}")
    plain = plain_gymnasium(args)
    print(f"step and render, plain Gymnasium, 480 x 480     {plain:6.0f} frames/s")
    for pixels in (480, 224, size):
        fast = ours(args, pixels)
        ratio = f"{fast / plain:.1f} x"
        print(f"step and render, this script, {pixels:3d} x {pixels:3d}         {fast:6.0f} frames/s  {ratio}")

    clip = sac_vlmrm.CLIP(source, device, batch_size=64)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (512, *clip.size, 3), np.uint8))
    images = clip.preprocess(frames[:64])

    def bare():
        with torch.no_grad(), clip.autocast():
            for _ in range(8):
                embeddings = clip.model.encode_image(images)
            embeddings.cpu()

    bare_rate, full_rate = rate(bare, 512), rate(lambda: clip.encode_images(frames).cpu(), 512)
    print(f"CLIP, bare encode_image on ready tensors        {bare_rate:6.0f} frames/s")
    print(f"CLIP, encode_images from uint8 frames           {full_rate:6.0f} frames/s  {full_rate / bare_rate:.2f} x")

    env = gym.make(args.env_id)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent = sac_vlmrm.SAC(sac_vlmrm.Args(), *dims).to(device)
    agent.make_optimizers()
    buffer = sac_vlmrm.ReplayBuffer(10_000, *dims, device)
    n = 10_000
    rows = dict(
        states=torch.randn(n, dims[0]),
        actions=torch.rand(n, dims[1]),
        rewards=torch.randn(n),
        next_states=torch.randn(n, dims[0]),
        discounts=torch.zeros(n),
        goal_ids=torch.zeros(n),
    )
    buffer.add(**rows)

    def update():
        for _ in range(100):
            losses = agent.update(buffer.sample(args.batch_size))
        losses["q_values"].item()

    print(f"SAC, batches of {args.batch_size}                             {rate(update, 100):6.0f} updates/s")

    with tempfile.TemporaryDirectory() as folder:
        settings = sac_vlmrm.Args()
        buffer = sac_vlmrm.ReplayBuffer(settings.buffer_size, *dims, device)
        for _ in range(settings.checkpoint_every // n):
            buffer.add(**rows)
        start = time.perf_counter()
        sac_vlmrm.save_rows(buffer, Path(folder) / "replay.bin")
        seconds = time.perf_counter() - start
        print(
            f"writing the {buffer.total} transitions that are new to a checkpoint: {seconds:.1f} s, "
            f"{seconds / (settings.checkpoint_every / fast):.1%} of the time to collect them"
        )
        settings = sac_vlmrm.Args(clip=args.clip, env_id=args.env_id, num_envs=args.num_envs, device=args.device)
        phase = settings.episode_length * args.num_envs
        settings = replace(
            settings,
            run_dir=Path(folder) / "run",
            total_timesteps=8 * phase,
            learning_starts=phase,
            updates_per_frame=0.25,
            batch_size=args.batch_size,
            eval_every=10**9,
            video=False,
        )
        sac_vlmrm.train(settings)
        events = EventAccumulator(str(settings.run_dir)).Reload()
        shares = {
            name: np.mean([event.value for event in events.Scalars(f"time/{name}")[2:-1]])
            for name in ("collect", "label", "update")
        }
    print("a run with 1 update per 4 frames: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


if __name__ == "__main__":
    main(tyro.cli(Args))
