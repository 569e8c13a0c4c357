"""Measures the parts of a run and the whole, each beside its plain counterpart in one go; prints a markdown table.

    python tests/tools/benchmark.py --out speed.md
    python tests/tools/benchmark.py --only collect --processes 1 2 4 8 16
    python tests/tools/benchmark.py --only label --clip ViT-bigG-14 --random-weights

The two sides of a row take turns; a figure is the median of its turns. All depend on the machine and its other load:
read the ratios. The whole is compared with Stable-Baselines3, installed by hand: `pip install stable-baselines3`.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts do, which must happen before torch is imported
import gymnasium as gym
import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal

sys.path.insert(0, str(Path(__file__).parents[2]))
import ppo_vlmrm
import sac_vlmrm

ROOT = Path(__file__).parents[2]
GOAL = "a humanoid robot kneeling"


@dataclass
class Args:
    only: tuple[Literal["collect", "label", "update", "whole", "scaling"], ...] = (
        "collect",
        "label",
        "update",
        "whole",
    )
    """parts to measure; scaling is the whole in 1 and 2 processes of torchrun, or in as many as --torchrun says"""
    torchrun: tuple[int, ...] = (1, 2)
    """numbers of processes for --only scaling"""
    clip: str = str(ROOT / "tests" / "tiny_clip")
    """as sac_vlmrm.py's --clip"""
    random_weights: bool = False
    """build the architecture --clip with random weights instead of those to be downloaded: for its speed only"""
    env_id: str = "Humanoid-v5"
    """a MuJoCo environment"""
    num_envs: int = 8
    """environments of each kind"""
    processes: tuple[int, ...] = ()
    """numbers of environments to compare with what the cores can do (default: --num-envs)"""
    device: str = "auto"
    """as sac_vlmrm.py's --device"""
    rounds: int = 3
    """turns of each side, after one that is not timed"""
    steps: int = 100
    """vector steps of a turn; plain Gymnasium's are a tenth"""
    label_frames: int = 512
    """frames of a turn"""
    batch_size: int = 256
    """transitions an update of SAC"""
    whole_frames: int = 14_400
    """frames of the whole run; those before the first update and the last phase are not timed"""
    out: Path | None = None
    """write the table here as well"""


def rates(rounds, *works):
    """The median units/s of each function, which returns how many units it has done. They take turns."""
    measured = []
    for _ in range(rounds + 1):
        for work in works:
            start = time.perf_counter()
            measured.append(work() / (time.perf_counter() - start))
    return np.median(np.reshape(measured, (-1, len(works)))[1:], axis=0)  # the first turn warms up


def add_row(table, what, ours, unit, counterpart, theirs, aim=""):
    """Adds a row to the table and prints it."""
    figures = [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (ours, theirs, ours / theirs)]
    table.append((what, unit, figures[0], counterpart, *figures[1:], aim))
    print(" | ".join(table[-1]), flush=True)


# ---- collect


class RenderedEnv(sac_vlmrm.RenderedEnv):
    def step_alone(self, steps):
        """Called in a worker: steps and draws without an answer at each step. Returns how many cores it kept busy."""
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step(self.action_space.sample())
        return (time.process_time() - cpu_start) / (time.perf_counter() - start)


sac_vlmrm.RenderedEnv = RenderedEnv  # for make_envs


def our_envs(args, size, num_envs):
    settings = sac_vlmrm.Args(env_id=args.env_id, num_envs=num_envs, episode_length=10**6)
    return sac_vlmrm.make_envs(settings, sac_vlmrm.PreprocessCfg(size=size))


def plain_envs(args, size):
    """Gymnasium's environments in their own look. Episodes end where ours go on: a reset takes the place of a step."""
    flags = {"render_mode": "rgb_array", "max_episode_steps": -1, "width": size, "height": size}
    envs = gym.vector.AsyncVectorEnv([partial(gym.make, args.env_id, **flags)] * args.num_envs, context="fork")
    envs.reset(seed=0)
    envs.call_async("render")
    envs.call_wait(timeout=120)  # on some drivers processes hang that draw their first frames at the same time
    return contextlib.closing(envs)


def step_ours(envs, steps):
    frames = np.empty(envs.observation_space["pixels"].shape, np.uint8)
    for _ in range(steps):
        frames[:] = envs.step(envs.action_space.sample())[0]["pixels"]  # copied, as train() does
    return steps * envs.num_envs


def step_plain(envs, steps):
    for _ in range(steps):
        envs.step(envs.action_space.sample())
        envs.render()
    return steps * envs.num_envs


def step_alone(envs, steps):
    envs.call("step_alone", steps)
    return steps * envs.num_envs


def collect(args, table, size):
    """Adds its rows to the table; returns what draws."""
    for pixels in dict.fromkeys((480, 224, size)):
        with plain_envs(args, pixels) as plain, our_envs(args, pixels, args.num_envs) as envs:
            plain_work = partial(step_plain, plain, max(args.steps // 10, 3))
            ours, theirs = rates(args.rounds, partial(step_ours, envs, args.steps), plain_work)
        what = f"step and draw in {args.num_envs} processes, {pixels} x {pixels}"
        add_row(table, what, ours, "frames/s", "plain Gymnasium, the same size", theirs)
        if pixels == 480:
            at_480 = theirs
        else:
            add_row(table, what, ours, "frames/s", "plain Gymnasium, its 480 x 480", at_480)
    for n in args.processes or (args.num_envs,):
        with our_envs(args, size, n) as envs, our_envs(args, size, 1) as one:
            works = partial(step_ours, envs, args.steps), partial(step_alone, envs, args.steps)
            ours, free, single = rates(args.rounds, *works, partial(step_alone, one, n * args.steps))
            busy, drawn_by = one.call("step_alone", args.steps)[0], one.call("drawn_by")[0]
        what, cores = f"step and draw in {n} processes, {size} x {size}", min(n, os.cpu_count())
        alone = f"{cores} cores x one process alone (which keeps {busy:.2f} busy)"
        add_row(table, what, ours, "frames/s", alone, cores * single, ">= 0.8")
        add_row(table, what, ours, "frames/s", "these processes, none waits for another", free)
    return drawn_by


# ---- label


def label(args, table, source, device):
    clip = sac_vlmrm.CLIP(source, device)
    clip.encode_text([GOAL])
    sac_vlmrm.drop_text_tower(clip.model)  # as a run does
    n = args.label_frames
    frames = torch.empty((n, *clip.size, 3), dtype=torch.uint8, pin_memory=device.type == "cuda").random_(256)
    images = clip.preprocess(frames[: clip.batch_size])

    def ours():
        return len(clip.encode_images(frames).cpu())

    @torch.no_grad()
    def bare():
        with clip.autocast():
            for start in range(0, n, len(images)):
                embeddings = clip.model.encode_image(images[: n - start])
        embeddings.cpu()  # waits for the device
        return n

    what = f"CLIP in {clip.precision}, encode_images of uint8 frames"
    fast, bare_rate = rates(args.rounds, ours, bare)
    if device.type == "cuda":
        what += f" ({torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most)"
    add_row(table, what, fast, "frames/s", "bare encode_image of ready tensors", bare_rate, ">= 0.95")


# ---- update: what CleanRL's sac_continuous_action.py and ppo_continuous_action.py compute, written anew


class PlainActor(nn.Module):
    def __init__(self, state_dim, action_dim):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(state_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.mean, self.log_std = nn.Linear(256, action_dim), nn.Linear(256, action_dim)
        self.register_buffer("scale", torch.ones(action_dim))
        self.register_buffer("bias", torch.zeros(action_dim))

    def forward(self, states):
        hidden = self.body(states)
        mean, log_std = self.mean(hidden), torch.tanh(self.log_std(hidden))
        normal = Normal(mean, (-5.0 + 3.5 * (log_std + 1.0)).exp())
        x = normal.rsample()
        y = torch.tanh(x)
        log_prob = normal.log_prob(x) - torch.log(self.scale * (1.0 - y.pow(2)) + 1e-6)
        deterministic = torch.tanh(mean) * self.scale + self.bias  # computed with each sample there, too
        return y * self.scale + self.bias, log_prob.sum(1, keepdim=True), deterministic


class PlainSAC:
    """CleanRL's update, from Stable-Baselines3's replay buffer: numpy arrays [steps, envs, ...]."""

    def __init__(self, settings, fields, state_dim, action_dim, device):
        self.settings, self.fields, self.action_dim, self.device = settings, fields, action_dim, device
        self.actor = PlainActor(state_dim, action_dim).to(device)
        self.critics = [sac_vlmrm.mlp(state_dim + action_dim, 1).to(device) for _ in range(2)]
        self.targets = [sac_vlmrm.mlp(state_dim + action_dim, 1).to(device) for _ in range(2)]
        self.log_alpha, self.alpha = torch.zeros(1, requires_grad=True, device=device), 1.0
        q_parameters = [parameter for critic in self.critics for parameter in critic.parameters()]
        self.q_adam = torch.optim.Adam(q_parameters, lr=settings.learning_rate)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=settings.learning_rate)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=settings.learning_rate)

    def sample(self, batch_size):
        steps, envs = self.fields[0].shape[:2]
        step, env = np.random.randint(0, steps, batch_size), np.random.randint(0, envs, batch_size)
        return [torch.tensor(field[step, env], device=self.device) for field in self.fields]

    def update(self, batch_size):
        def values(critics, states, actions):
            return [critic(torch.cat([states, actions], 1)) for critic in critics]

        def gradient_step(adam, loss):
            adam.zero_grad()
            loss.backward()
            adam.step()

        states, actions, next_states, dones, rewards = self.sample(batch_size)
        with torch.no_grad():
            next_actions, next_log_prob, _ = self.actor(next_states)
            next_q = torch.min(*values(self.targets, next_states, next_actions)) - self.alpha * next_log_prob
            target = rewards.flatten() + (1.0 - dones.flatten()) * self.settings.gamma * next_q.view(-1)
        q1, q2 = values(self.critics, states, actions)
        gradient_step(self.q_adam, F.mse_loss(q1.view(-1), target) + F.mse_loss(q2.view(-1), target))
        # CleanRL takes the next two steps twice after every second update of the critics: as often.
        new_actions, log_prob, _ = self.actor(states)
        least = torch.min(*values(self.critics, states, new_actions))
        gradient_step(self.actor_adam, (self.alpha * log_prob - least).mean())
        with torch.no_grad():
            log_prob = self.actor(states)[1]
        gradient_step(self.alpha_adam, (-self.log_alpha.exp() * (log_prob - self.action_dim)).mean())
        self.alpha = self.log_alpha.exp().item()
        for critic, target_critic in zip(self.critics, self.targets, strict=True):
            for fast, slow in zip(critic.parameters(), target_critic.parameters(), strict=True):
                slow.data.copy_(self.settings.tau * fast.data + (1.0 - self.settings.tau) * slow.data)


def transitions(n, state_dim, action_dim):
    """Random rows for a replay buffer."""
    rows = {"states": torch.randn(n, state_dim), "actions": 2.0 * torch.rand(n, action_dim) - 1.0}
    rows |= {"next_states": torch.randn(n, state_dim), "rewards": torch.randn(n, 1)}
    return rows | {"discounts": torch.full((n, 1), 0.98), "goal_ids": torch.zeros(n, 1)}


def update_sac(args, table, device, state_dim, action_dim):
    settings, n = sac_vlmrm.Args(), 10_000
    agent = sac_vlmrm.SAC(settings, state_dim, gym.spaces.Box(-1, 1, (action_dim,))).to(device)
    agent.make_optimizers()
    update = sac_vlmrm.RecordedUpdate(agent) if device.type == "cuda" else agent.update
    buffer = sac_vlmrm.ReplayBuffer(settings.buffer_size, state_dim, action_dim, device)
    rows = transitions(n, state_dim, action_dim)
    buffer.add(**rows)
    fields = rows["states"], rows["actions"], rows["next_states"], torch.zeros(n, 1), rows["rewards"]
    fields = [field.reshape(n // 8, 8, -1).numpy() for field in fields]  # of 8 environments
    plain = PlainSAC(settings, fields, state_dim, action_dim, device)

    def ours():
        for batch in buffer.batches(50, args.batch_size, settings.relabel):
            losses = update(batch)
        losses["q_values"].item()  # waits for the device
        return 50

    def theirs():
        for _ in range(50):
            plain.update(args.batch_size)  # which waits for the device
        return 50

    what, counterpart = f"updates of SAC, batches of {args.batch_size}", "CleanRL's way, buffer as SB3's"
    fast, slow = rates(args.rounds, ours, theirs)
    add_row(table, what, fast, "updates/s", counterpart, slow, ">= 1.3 (CPU)")


def ppo_step(agent, adam, loss, settings):
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), settings.max_grad_norm)
    adam.step()


def our_ppo(agent, adam, rollout, settings):
    """The epochs as they are in ppo_vlmrm.train()."""
    n, device = len(rollout["returns"]), rollout["returns"].device
    for _ in range(settings.update_epochs):
        for index in torch.randperm(n, device=device).tensor_split(settings.num_minibatches):
            loss, losses = agent.loss({name: value[index] for name, value in rollout.items()})
            ppo_step(agent, adam, loss, settings)
    losses["clipfrac"].item()  # waits for the device
    return settings.update_epochs * settings.num_minibatches


def plain_ppo(agent, adam, rollout, settings):
    indices, clip, clipfracs = np.arange(len(rollout["returns"])), settings.clip_coef, []
    for _ in range(settings.update_epochs):
        np.random.shuffle(indices)
        for index in np.split(indices, settings.num_minibatches):
            states, actions, old_log_prob, old_values, advantages, returns = (x[index] for x in rollout.values())
            mean, values = agent.actor(states), agent.critic(states).view(-1)
            normal = Normal(mean, agent.log_std.expand_as(mean).exp())
            log_prob, entropy = normal.log_prob(actions).sum(1), normal.entropy().sum(1)
            log_ratio = log_prob - old_log_prob
            ratio = log_ratio.exp()
            with torch.no_grad():  # to log; two estimates of the KL divergence
                _ = (-log_ratio).mean(), ((ratio - 1.0) - log_ratio).mean()
                clipfracs.append(((ratio - 1.0).abs() > clip).float().mean().item())
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            clipped = torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
            policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
            clipped = old_values + torch.clamp(values - old_values, -clip, clip)
            value_loss = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()
            loss = policy_loss - settings.ent_coef * entropy.mean() + settings.vf_coef * value_loss
            ppo_step(agent, adam, loss, settings)
    return settings.update_epochs * settings.num_minibatches


def update_ppo(args, table, device, state_dim, action_space):
    settings = ppo_vlmrm.Args()
    n = settings.num_steps * settings.num_envs
    rollout = {"inputs": torch.randn(n, state_dim), "actions": torch.randn(n, *action_space.shape)}
    rollout["log_probs"] = Normal(0.0, 1.0).log_prob(rollout["actions"]).sum(1)
    rollout |= {name: torch.randn(n) for name in ("values", "advantages", "returns")}
    rollout = {name: value.to(device) for name, value in rollout.items()}
    ours, plain = (ppo_vlmrm.PPO(settings, state_dim, action_space).to(device) for _ in range(2))
    ours.make_optimizers()
    adam = torch.optim.Adam(plain.parameters(), lr=settings.learning_rate, eps=1e-5)
    works = partial(our_ppo, ours, ours.optimizers["ppo"]), partial(plain_ppo, plain, adam)
    what = f"updates of PPO, minibatches of {n // settings.num_minibatches}"
    fast, slow = rates(args.rounds, *(partial(work, rollout, settings) for work in works))
    add_row(table, what, fast, "updates/s", "CleanRL's way", slow)


# ---- whole

# What one writes first: a wrapper that asks CLIP about Gymnasium's own frame at each step, as open_clip's README does,
# and Stable-Baselines3 with the vector of environments that it makes by default. Episodes and settings are ours.
FIRST_SCRIPT = """
import json, os, sys, time
os.environ.setdefault("MUJOCO_GL", "egl")
import gymnasium as gym
import open_clip
import torch
from PIL import Image
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env

clip, goal, device, env_id, num_envs, episode_length, updates_per_frame, sac = json.loads(sys.argv[1])
model, _, transform = open_clip.create_model_and_transforms(**clip, device=device)
model.eval()
tokens = open_clip.get_tokenizer(clip["model_name"])([goal]).to(device)
with torch.no_grad():
    goal = model.encode_text(tokens, normalize=True)[0]

class ClipReward(gym.Wrapper):
    def step(self, action):
        state, _, _, truncated, info = self.env.step(action)
        image = transform(Image.fromarray(self.env.render())).unsqueeze(0).to(device)
        with torch.no_grad():
            reward = (model.encode_image(image, normalize=True)[0] @ goal).item()
        return state, reward, False, truncated, info

def make_env():
    return ClipReward(gym.make(env_id, render_mode="rgb_array", max_episode_steps=episode_length))

envs = make_vec_env(make_env, n_envs=num_envs)
frames = 10 * num_envs  # between its updates
agent = SAC("MlpPolicy", envs, train_freq=10, gradient_steps=round(frames * updates_per_frame), learning_starts=frames,
            buffer_size=100_000, device=device, **sac)
agent.learn(3 * frames)  # with updates after the second
start = time.perf_counter()
agent.learn(4 * frames, reset_num_timesteps=False)
print(4 * frames / (time.perf_counter() - start))
"""


def first_script(args, source, device):
    """Frames/s of FIRST_SCRIPT while it learns."""
    settings = sac_vlmrm.Args()
    sac = {name: getattr(settings, name) for name in ("learning_rate", "batch_size", "gamma", "tau")}
    words = [source.model, GOAL, str(device), args.env_id, args.num_envs, settings.episode_length]
    line = [sys.executable, "-c", FIRST_SCRIPT, json.dumps([*words, settings.updates_per_frame, sac])]
    environment = dict(os.environ)
    if environment["OMP_WAIT_POLICY"] == "PASSIVE":  # set above; by default threads spin, which suits a single process
        del environment["OMP_WAIT_POLICY"]
    output = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def run_whole(args, device, processes=None):
    """Runs the README's first command for --whole-frames frames, by torchrun if `processes` is given.

    Returns frames/s, the seconds of each part of a phase, and the frames from and to which they were measured: from the
    end of the first phase with updates to the last phase but one, as the last one's evaluation is seldom in a long run.
    """
    names = ("collect", "label", "update", "evaluate")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, *launcher, str(ROOT / "sac_vlmrm.py"), "--goal", GOAL, "--clip", args.clip]
        line += ["--env-id", args.env_id, "--num-envs", str(args.num_envs), "--device", device.type]
        line += ["--total-timesteps", str(args.whole_frames), "--run-dir", folder]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        log = EventAccumulator(folder).Reload()
    times = [event for event in log.Scalars("time/update") if event.step >= sac_vlmrm.Args.learning_starts][:-1]
    seconds = np.diff([event.wall_time for event in times])
    shares = [[event.value for event in log.Scalars(f"time/{name}")][-len(seconds) - 1 : -1] for name in names]
    parts = dict(zip(names, np.average(shares, axis=1, weights=seconds) * seconds.mean(), strict=True))
    return (times[-1].step - times[0].step) / seconds.sum(), parts, times[0].step, times[-1].step


def whole(args, table, source, device, state_dim, action_dim):
    settings, turns, counterpart = sac_vlmrm.Args(), 1, "a first script with Stable-Baselines3, 480 x 480"
    if not importlib.util.find_spec("stable_baselines3"):
        turns, counterpart = 0, f"{counterpart}: pip install stable-baselines3 to measure"
    first = [first_script(args, source, device) for _ in range(turns)]  # one turn before and one after
    rate, parts, start, end = run_whole(args, device)
    first += [first_script(args, source, device) for _ in range(turns)]
    what = f"sac_vlmrm.py as the README starts it, frames {start} to {end}"
    add_row(table, what, rate, "frames/s", counterpart, max(first, default=np.nan), ">= 15")
    shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
    buffer = sac_vlmrm.ReplayBuffer(settings.buffer_size, state_dim, action_dim, device)
    buffer.add(**transitions(settings.checkpoint_every, state_dim, action_dim))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        sac_vlmrm.save_rows(buffer, Path(folder) / "rows.bin")
        saving = settings.checkpoint_every / (time.perf_counter() - start)
    what = f"writing {settings.checkpoint_every} new transitions to a checkpoint"
    add_row(table, what, saving, "frames/s", f"the run itself: {shares}", rate)


def scaling(args, table, device):
    """A row for each number of processes, beside the first one's."""
    results = [run_whole(args, device, processes) for processes in args.torchrun]
    for processes, (rate, parts, start, end) in zip(args.torchrun, results, strict=True):
        seconds = ", ".join(f"{name} {value:.2f} s" for name, value in parts.items())
        what = f"{processes} processes of torchrun, frames {start} to {end}: a phase has {seconds}"
        add_row(table, what, rate, "frames/s", f"{args.torchrun[0]} of them", results[0][0])


def random_clip(name, folder):
    """Saves an architecture with random weights in open_clip's layout of a directory. Returns the folder."""
    source, config = sac_vlmrm.find_clip(name), open_clip.get_model_config(name)
    if config is None:
        sys.exit(f"error: --random-weights needs --clip to name an architecture, such as ViT-L-14, not {name}")
    quick_gelu = source.model["force_quick_gelu"]
    config = {"model_cfg": config | {"quick_gelu": quick_gelu}, "preprocess_cfg": asdict(source.config)}
    Path(folder, "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(name, precision="fp16", force_quick_gelu=quick_gelu)  # half the disk
    save_file(model.state_dict(), Path(folder, "open_clip_model.safetensors"))
    return folder


def main(args):
    device, table, drawn_by, clip = sac_vlmrm.device_of(args), [], "-", Path(args.clip).name
    env = gym.make(args.env_id)
    state_dim, action_space = env.observation_space.shape[0], env.action_space
    with tempfile.TemporaryDirectory() as folder:
        if args.random_weights:
            args, clip = replace(args, clip=random_clip(args.clip, folder)), f"{clip} (random weights: speed only)"
        source = sac_vlmrm.find_clip(args.clip)
        if "collect" in args.only:  # first: its workers are forked, which must happen before CUDA starts
            drawn_by = collect(args, table, source.config.input_size[1])
        if "label" in args.only:
            label(args, table, source, device)
        if "update" in args.only:
            update_sac(args, table, device, state_dim, action_space.shape[0])
            update_ppo(args, table, device, state_dim, action_space)
        if "whole" in args.only:
            whole(args, table, source, device, state_dim, action_space.shape[0])
        if "scaling" in args.only:
            scaling(args, table, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    facts = f"{args.env_id}, CLIP {clip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch "
    facts += f"(OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}), device {name}, drawn by {drawn_by}"
    head = [("what", "unit", "here", "counterpart", "its figure", "ratio", "aim"), ("---",) * 7]
    text = f"{facts}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in head + table)
    print(f"\n{text}")
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
