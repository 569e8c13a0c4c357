"""VLM-RM and VLM-SR in one file: PPO learns tasks from sentences, with a CLIP model as the reward function.

Rollouts are collected in parallel rendered environments, one batched CLIP pass scores every frame by how well it
matches `--goal`, and PPO (Schulman et al. 2017, arXiv 1707.06347) learns from them. The rewards are those of Rocamonde
et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning" (ICLR 2024, arXiv 2310.12921),
cited below as VLM-RM, and of Baumli et al., "Vision-Language Models as a Source of Rewards" (2023, arXiv 2312.09187),
cited as VLM-SR, whose agent is conditioned on its goal's text.

    python ppo_vlmrm.py --goal "a humanoid robot kneeling" --clip tests/tiny_clip
    python ppo_vlmrm.py --goal "a humanoid robot kneeling" "a humanoid robot lying on its back" --clip ViT-bigG-14
    python ppo_vlmrm.py --play runs/NAME
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.15.0", "torchvision==0.29.2", "open_clip_torch==3.3.0", "huggingface_hub==2.4.0",
#     "transformers==5.24.0", "sentencepiece==0.2.3",
#     "gymnasium==1.4.0", "mujoco==4.0.0", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1",
#     "imageio==2.37.0", "imageio-ffmpeg==0.6.0", "filelock==4.2.12", "numpy==2.4.6", "pillow==13.0.0",
# ]
# ///
from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads would spin on cores that environments need
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported: render without a window
try:
    import mujoco
except AttributeError as error:  # what PyOpenGL raises where there is no libEGL
    print(f"error: no OpenGL without a display ({error}): apt-get install libegl1 libgl1-mesa-dri", file=sys.stderr)
    sys.exit(2)
import gymnasium as gym
import huggingface_hub
import imageio
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from gymnasium.envs.mujoco import MujocoEnv
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from OpenGL import GL
from PIL import Image, ImageDraw, ImageOps
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import Compose
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

# torchrun tells each process that it starts which one it is. All collect and label; the one of rank 0 learns.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:  # Natural, Count, Positive and Share are numbers in ranges, defined at the end
    # ---- run ----
    preset: Literal["paper"] | None = None
    """settings to start from, in PRESETS below: `paper` is VLM-RM's humanoid; single flags override it"""
    seed: Natural = 1
    """seed of the networks, the exploration and the episodes' starts"""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; auto is CUDA where there is one"""
    run_dir: Path | None = None
    """folder of this run (default: a new one under runs/)"""
    resume: Path | None = None
    """go on with the run in this folder, with its flags; only how long, how often, where and in what CLIP precision it
    runs, and the path of its CLIP, may be changed; `auto` goes on in --run-dir if a checkpoint is there and else starts
    there, as a cluster's requeued job needs it"""
    play: Path | None = None
    """play --eval-episodes of the agent in this run's folder, without training; --goal may then be any new sentence, if
    it was trained on several"""
    checkpoint: str = "best.pt"
    """what --play plays: best.pt (highest return in evaluation) or checkpoint.pt (the latest)"""
    total_timesteps: Count = 400_000
    """environment frames to train for, counted over all environments"""
    eval_every: Count = 20_000
    """frames between evaluations"""
    eval_episodes: Count = 16
    """deterministic episodes of an evaluation"""
    checkpoint_every: Count = 20_000
    """frames between checkpoints"""
    video: bool = True
    """record an episode of each evaluation and goal"""
    save_rollouts: bool = True
    """save the states and rewards of each evaluation's episodes, to be rendered and judged again"""
    track: bool = False
    """mirror the TensorBoard logs to Weights & Biases (needs `pip install wandb`)"""
    traceback: bool = False
    """show errors before the first frame with their traceback, instead of in one line"""

    # ---- task and prompts ----
    env_id: str = "Humanoid-v5"
    """Gymnasium id (MODULE:ID imports your own module first) of an environment with `rgb_array` rendering"""
    goal: tuple[str, ...] = ("a humanoid robot kneeling",)
    """the task, in words that describe the state to reach, or the file of an image of it, .png or .jpg (beyond both
    papers); several make the policy language-conditioned (VLM-SR)"""
    eval_goal: tuple[str, ...] = ()
    """goals that are only evaluated, or for a regularized reward other words for a trained one; needs several --goal"""
    baseline: str = "a humanoid robot"
    """the neutral prompt of the goal-baseline regularisation"""
    alpha: Share = 0.0
    """strength of the goal-baseline regularisation, 0 (plain cosine, the paper's humanoid setting) to 1"""
    template: tuple[str, ...] = ("{}",)
    """prompt templates, "{}" is the prompt; the embeddings of several are averaged"""
    reward: Literal["regularized", "binary", "env"] = "regularized"
    """what is trained on: VLM-RM's CLIP reward, VLM-SR's, or the environment's own (no CLIP, renders only videos)"""
    negatives: tuple[str, ...] = ()
    """prompts that a goal competes with in the binary reward; in training the other goals are, too"""
    temperature: Positive | None = None
    """of the binary reward's softmax over cosines (default: the one that the model was trained with, about 0.01)"""
    threshold: Share = 0.5
    """the binary reward is 1 where the goal's probability is above this"""
    terminate_on_success: bool = False
    """end an episode where the binary reward is 1 (VLM-SR); frames are then labelled at each step, which is slower"""

    # ---- CLIP ----
    clip: str = "ViT-L-14"
    """open_clip architecture, `hf-hub:ORG/NAME`, or a directory that holds an open_clip_config.json and weights; in
    VLM-RM the humanoid knelt (alpha 0) in 0% with RN50, ViT-L-14 and ViT-H-14, in 100% with ViT-bigG-14"""
    clip_pretrained: str | None = None
    """tag of an architecture's weights, or their file (default: DEFAULT_WEIGHTS below, else open_clip's first tag)"""
    clip_batch_size: Count = 256
    """frames a CLIP forward pass"""
    clip_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the weights and the encoders' autocast; auto is fp32 on CPU and on CUDA fp16, as in VLM-RM, or where that
    overflows bf16; bf16 moves rewards more"""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """frames that are not square: shortest crops, longest pads, squash squeezes (default: the model's own setting)"""

    # ---- environment and camera ----
    num_envs: Count = 8
    """environments stepped in parallel, each in a process of its own; those of all processes of torchrun together"""
    episode_length: Count = 100
    """steps of an episode"""
    early_termination: bool = False
    """end an episode where the environment says so; off, since termination leaks the task (VLM-RM)"""
    render_size: Count | None = None
    """pixels, height and width of a MuJoCo frame (default: the CLIP model's input size, so that nothing is resized)"""
    restyle: bool = True
    """draw MuJoCo with a sky, a tiled floor and a light robot instead of in the environment's own look"""
    camera_distance: Positive = 3.5
    """meters from the camera to the point it looks at"""
    camera_elevation: float = -10.0
    """degrees; negative looks down"""
    camera_azimuth: float = 180.0
    """degrees; at 180 a robot facing +x is seen from the front"""
    camera_lookat: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """meters, the point that the camera looks at"""
    camera_follow: bool = True
    """move the look-at's x and y with the robot, never its height; --no-camera-follow is the paper's fixed camera"""

    # ---- PPO: CleanRL's settings for continuous actions, but for the rollout's length and gamma ----
    num_steps: Count = 400
    """steps of each environment in a rollout; each starts new episodes, so make it a multiple of --episode-length"""
    learning_rate: Positive = 3e-4
    """of Adam, for the actor and the critic"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 at --total-timesteps"""
    gamma: Share = 0.98
    """discount factor"""
    gae_lambda: Share = 0.95
    """lambda of the generalised advantage estimation"""
    num_minibatches: Count = 32
    """parts into which each epoch divides a rollout, one gradient step each"""
    update_epochs: Count = 10
    """passes over a rollout"""
    norm_adv: bool = True
    """scale the advantages of a minibatch to mean 0 and standard deviation 1"""
    clip_coef: Positive = 0.2
    """how far a step may move the probability ratio, and the value, from what the rollout was collected with"""
    clip_vloss: bool = True
    """clip the change of the value as well"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: Positive = 0.5
    """the gradient is scaled down to this norm"""
    normalize_obs: bool = True
    """scale observations by their running mean and standard deviation, clipped to +-10; frozen in evaluation"""
    normalize_reward: bool = True
    """scale rewards by the running standard deviation of the discounted return, clipped to +-10; a regularized reward's
    mean is taken out first, where no episode ends early"""


# VLM-RM's humanoid, which it trained with SAC: those of its settings that are not SAC's, else CleanRL's. The defaults
# above learn in 400,000 frames instead.
PRESETS = {
    "paper": dict(
        clip="ViT-bigG-14",  # its humanoid's model; ours is the one to type first
        camera_follow=False,  # its camera is fixed; ours follows, so that a robot that walks off is still seen
        total_timesteps=10_000_000,  # its table of hyperparameters; ours 400,000
        eval_every=128_000,  # its interval between checkpoints, the best of which it judges; ours 20,000
        num_steps=200,  # two of its episodes; CleanRL has 2048 steps of one environment; ours 400
        gamma=0.99,  # CleanRL; ours 0.98
    )
}


# ---------------------------------------------------------------- the CLIP reward


def regularized_reward(frames, goals, baseline, alpha):
    """Goal-baseline regularised reward (VLM-RM), L being the line through baseline b and goal g:

        R(s) = 1 - 1/2 || alpha proj_L(s) + (1 - alpha) s - g ||^2

    Takes embeddings of frames s [N, D], goals g [G, D] and the baseline b [D], L2-normalised but for the mean over
    several templates, and alpha in [0, 1]: 0 is the cosine of s and g (of a mean, scaled and shifted), 1 keeps only
    what lies along g - b. Returns the reward of every frame for every goal, [N, G].
    """
    # As g is on L, proj_L(s) - g is the part of s - g along L; so what is squared is alpha along + (1 - alpha) offsets.
    directions = F.normalize(goals - baseline, dim=-1)  # [G, D]
    offsets = frames[:, None, :] - goals  # s - g, [N, G, D]
    along = (offsets * directions).sum(-1, keepdim=True) * directions  # proj_L(s) - g, [N, G, D]
    return 1.0 - 0.5 * (alpha * along + (1.0 - alpha) * offsets).square().sum(-1)


def binary_reward(frames, goals, negatives, temperature, threshold):
    """Thresholded softmax reward of VLM-SR, T being the goals and the negatives:

        p(l | o) = exp(f(o).g(l) / temperature) / sum over l' in T of exp(f(o).g(l') / temperature)
        r = 1[p(l | o) > threshold]

    Takes L2-normalised embeddings of frames f(o) [N, D], goals [G, D] and negatives [M, D], M may be 0: each goal is a
    negative of the others. Returns 0 or 1 for every frame and goal, [N, G]. A SigLIP model's bias, the same for all
    prompts, cancels.
    """
    # In float64: at a low temperature float32's rounding of a cosine would decide between two close prompts.
    logits = frames.double() @ torch.cat([goals, negatives]).double().T / temperature  # [N, G + M]
    probabilities = logits.softmax(-1)[:, : len(goals)]
    return torch.where(probabilities.isnan(), torch.nan, probabilities > threshold).float()  # a NaN is no failure


class CLIP:
    """An open_clip model that embeds frames and prompts. `source` comes from `find_clip`.

    Raises RuntimeError if weights were not loaded into the whole model.
    """

    auto = {"cpu": "fp32", "cuda": "fp16"}  # precision on each kind of device; VLM-RM's code ran fp16

    def __init__(self, source, device, precision="auto", batch_size=256):
        self.device, self.batch_size = torch.device(device), batch_size
        self.tokenizer, self.size = source.tokenizer, source.config.input_size[1:]  # (height, width)
        self.transform = image_transform_v2(source.config, is_train=False)
        self.mean = torch.tensor(source.config.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(source.config.std, device=self.device).view(1, 3, 1, 1)
        self.load(source, self.auto.get(self.device.type, "fp32") if precision == "auto" else precision)
        if precision == "auto" and self.precision == "fp16":
            noise = torch.randint(256, (1, *self.size, 3), dtype=torch.uint8)
            if not torch.cat([self.encode_images(noise), self.encode_text(["a robot"])]).isfinite().all():
                self.model = None
                self.load(source, "bf16")  # these weights overflow in fp16
        self.temperature = 1.0 / self.model.logit_scale.float().exp().item()  # of the softmax that it was trained with

    def load(self, source, precision):
        """Loads the model in "fp32", "bf16" or "fp16"."""
        self.precision = precision
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.autocast = functools.partial(torch.autocast, self.device.type, dtype, enabled=dtype is not None)
        # Without require_pretrained missing weights leave a random model; without eval BatchNorm is in training mode.
        model = open_clip.create_model(**source.model, device=self.device, precision=precision, require_pretrained=True)
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode_text(self, prompts, templates=("{}",)):
        """Embeds each prompt as the mean over its templated, normalised embeddings: [prompts, D] float32.

        As in VLM-RM's code, the mean of an ensemble is not normalised again. Beyond both papers, a prompt that names an
        image file is embedded as that image.
        """
        texts = [template.replace("{}", prompt) for prompt in prompts for template in templates]
        with self.autocast():
            embeddings = self.model.encode_text(self.tokenizer(texts).to(self.device))
        embeddings = F.normalize(embeddings.float(), dim=-1)
        embeddings = embeddings.view(len(prompts), len(templates), -1).mean(1)
        for i, prompt in enumerate(prompts):
            if is_image(prompt):
                image = ImageOps.exif_transpose(Image.open(prompt)).convert("RGB")  # as a phone was held
                embeddings[i] = self.encode_images(np.array(image)[None])[0]
        return embeddings

    @torch.no_grad()
    def encode_images(self, frames):
        """Embeds any number of uint8 frames [N, H, W, 3], in chunks: [N, D] float32, L2-normalised."""
        chunks = []
        for chunk in torch.as_tensor(frames).split(self.batch_size):
            images = self.preprocess(chunk)
            with self.autocast():
                embeddings = self.model.encode_image(images)
            chunks.append(F.normalize(embeddings.float(), dim=-1))
        return torch.cat(chunks)

    def preprocess(self, frames):
        """open_clip's evaluation transform: uint8 [N, H, W, 3] to float32 [N, 3, h, w] on the device."""
        if frames.shape[1:3] != self.size:  # frames rendered at the model's size, the usual case, need no resize
            return torch.stack([self.transform(Image.fromarray(frame.numpy())) for frame in frames]).to(self.device)
        images = frames.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # uint8 until it is on the device
        return (images.float() / 255.0 - self.mean) / self.std


class ClipReward:
    """The reward that `args` describe, for the G goals that are trained on and then the E held-out ones."""

    def __init__(self, args, clip):
        self.args, self.clip = args, clip
        prompts = prompts_of(args)
        embeddings = clip.encode_text([*itertools.chain(*prompts)], args.template)
        if args.reward == "binary":  # in a softmax, prompts whose templates agree more would win by their longer mean
            embeddings = F.normalize(embeddings, dim=-1)
        self.goals, self.held_out, self.negatives, self.baseline = embeddings.split([len(part) for part in prompts])
        self.goal_embeddings = torch.cat([self.goals, self.held_out])  # [G + E, D]
        self.chunks, self.chunk_size = [], clip.batch_size  # rewards of what was scored already; frames in each
        self.ahead, self.on_stream = clip.device.type == "cuda", contextlib.nullcontext()
        if self.ahead:
            stream = torch.cuda.Stream(clip.device)
            stream.wait_stream(torch.cuda.current_stream(clip.device))  # for the embeddings above
            self.on_stream = torch.cuda.stream(stream)

    def __call__(self, frames, goal_ids):
        """Rewards [n, len(goal_ids)] of frames uint8 [n, H, W, 3], all from one pass of the image encoder."""
        self.score(frames)
        with self.on_stream:
            rewards = torch.cat(self.chunks)[:, list(goal_ids)].cpu()  # waits for the device
        self.chunks, self.chunk_size = [], self.clip.batch_size
        return rewards.numpy()

    def score_ahead(self, frames, n):
        """On CUDA, scores the first n frames of a phase while the environments go on: the whole chunks that are new."""
        if self.ahead:
            # A quarter of the phase or less: where its frames are shared by several processes, 256 would be all of it.
            self.chunk_size = min(self.chunk_size, max(1, len(frames) // 4))
            self.score(frames[: n // self.chunk_size * self.chunk_size])

    def score(self, frames):
        """Appends to `chunks` the rewards [n, G + E] of those chunks of frames that are not among them yet."""
        with self.on_stream:  # on a GPU beside the policy's kernels, which would else wait for these
            for start in range(self.chunk_size * len(self.chunks), len(frames), self.chunk_size):
                embeddings = self.clip.encode_images(frames[start : start + self.chunk_size])
                self.chunks.append(self.rewards_of(embeddings))

    def rewards_of(self, embeddings):
        """Rewards [n, G + E] of embedded frames [n, D]: the place for a reward of your own."""
        args = self.args
        if args.reward == "regularized":
            return regularized_reward(embeddings, self.goal_embeddings, self.baseline[0], args.alpha)
        if args.reward == "binary":  # goals compete with each other and the negatives, held-out ones with all of these
            others = torch.cat([self.goals, self.negatives])
            limits = args.temperature or self.clip.temperature, args.threshold
            rewards = [binary_reward(embeddings, self.goals, self.negatives, *limits)]
            rewards += [binary_reward(embeddings, goal[None], others, *limits) for goal in self.held_out]
            return torch.cat(rewards, 1)
        raise NotImplementedError(f"--reward {args.reward}")


def goal_inputs(goal_embeddings, n_trained):
    """What a policy sees of G trained and E held-out goals [G + E, D]; no columns where only one is trained.

    Embeddings of sentences about one robot have most in common: they are centred on the mean of the trained goals and
    scaled to a root mean square of 1, so that the networks can tell them apart.
    """
    if n_trained == 1:
        return goal_embeddings[:, :0]
    centred = goal_embeddings - goal_embeddings[:n_trained].mean(0)
    return centred / centred[:n_trained].square().mean().sqrt()


# ---------------------------------------------------------------- the rendered environments


class RenderedEnv(gym.Wrapper):
    """Adds the frame of each state to its observation, which the vector environment's shared memory carries.

    Observations are {"state": float32 [S], "pixels": uint8 [H, W, 3]} and, for MuJoCo, "qpos": float64 [nq]; continuous
    actions are in [-1, 1]. A SceneRenderer with the settings `scene` draws MuJoCo at `render_size` (height, width),
    except environments with a render() or mocap bodies of their own, which qpos does not tell of. Frames of another
    size than `frame_size`, (H, W), are brought to it by `resize`.
    """

    def __init__(self, env_id, episode_length, early_termination, scene, render_size, frame_size, resize):
        env = gym.make(env_id, render_mode="rgb_array", max_episode_steps=episode_length, disable_env_checker=True)
        check_environment(env)
        if isinstance(env.action_space, gym.spaces.Box):  # rounded, what -1 and 1 become may be just outside
            low, high = env.action_space.low, env.action_space.high
            env = gym.wrappers.TransformAction(env, lambda action: np.clip(action, low, high), env.action_space)
            env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        super().__init__(gym.wrappers.FlattenObservation(env))
        self.early_termination, self.resize = early_termination, resize
        self.renderer, self.xml_path = None, None
        self.rendering = True  # set to False where nobody looks
        self.blank = np.zeros((*frame_size, 3), np.uint8)
        spaces = {"state": gym.spaces.Box(-np.inf, np.inf, self.env.observation_space.shape, np.float32)}
        spaces["pixels"] = gym.spaces.Box(0, 255, self.blank.shape, np.uint8)
        mujoco_env = isinstance(self.unwrapped, MujocoEnv) and type(self.unwrapped).render is MujocoEnv.render
        if mujoco_env and not self.unwrapped.model.nmocap:
            self.xml_path = self.unwrapped.fullpath
            self.renderer = SceneRenderer(self.xml_path, render_size, **scene)
            spaces["qpos"] = gym.spaces.Box(-np.inf, np.inf, (self.unwrapped.model.nq,), np.float64)
        self.observation_space = gym.spaces.Dict(spaces)

    def observe(self, state):
        observation = {"state": state.astype(np.float32), "pixels": self.blank}
        if self.renderer:
            observation["qpos"] = self.unwrapped.data.qpos
        if self.rendering:
            frame = self.renderer(self.unwrapped.data.qpos) if self.renderer else self.env.render()
            if getattr(frame, "dtype", None) != np.uint8 or frame.ndim != 3:
                raise TypeError("render() must return uint8 frames [H, W, 3]")
            fits = frame.shape == self.blank.shape
            observation["pixels"] = frame if fits else np.asarray(self.resize(Image.fromarray(frame)))
        return observation

    def reset(self, *, seed=None, options=None):
        with environment_errors():
            state, _ = self.env.reset(seed=seed, options=options)
            return self.observe(state), {}  # infos are dropped: pickling costs time

    def step(self, action):
        with environment_errors():
            state, reward, terminated, truncated, _ = self.env.step(action)
            return self.observe(state), float(reward), bool(terminated and self.early_termination), truncated, {}

    def drawn_by(self):
        """OpenGL's name of what draws MuJoCo's frames, or None."""
        return GL.glGetString(GL.GL_RENDERER).decode() if self.renderer else None


# ---------------------------------------------------------------- the networks and PPO


class RunningNorm(nn.Module):
    """Scales vectors by the mean and standard deviation of all it was updated with, clipped to +-10."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))

    def update(self, x):
        """Merges a batch [N, dim] into the statistics (parallel variance, Chan et al. 1979)."""
        n, total = len(x), self.count + len(x)
        delta = x.double().mean(0) - self.mean
        var = x.double().var(0, correction=0)
        self.var.copy_((self.count * self.var + n * var + delta**2 * self.count * n / total) / total)
        self.mean += delta * n / total
        self.count.copy_(total)

    def forward(self, x):
        return ((x - self.mean.float()) * (self.var.float() + 1e-8).rsqrt()).clamp(-10.0, 10.0)


def mlp(inputs, outputs, scale, hidden=64):
    """Two hidden layers with tanh, orthogonal weights of gain sqrt(2), the last layer's of gain `scale` (CleanRL)."""
    layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2.0), math.sqrt(2.0), scale), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class PPO(nn.Module):
    """An actor and a critic, with the statistics they need; continuous or discrete actions.

    `goals` [G + E, D] is what it sees of each goal beside the state, from `goal_inputs`; None is one goal, unseen.
    """

    def __init__(self, args, state_dim, action_space, goals=None):
        super().__init__()
        self.args = args
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.first_action = int(action_space.start) if self.discrete else 0
        self.normalizer = RunningNorm(state_dim) if args.normalize_obs else nn.Identity()
        self.reward_stats = RunningNorm(len(args.goal))  # of each goal's reward, over all frames, for its mean
        self.return_stats = RunningNorm(1)  # of the discounted return, for its variance
        self.register_buffer("goals", torch.zeros(1, 0) if goals is None else goals)
        input_dim = state_dim + self.goals.shape[1]
        action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        self.critic = mlp(input_dim, 1, 1.0)
        self.actor = mlp(input_dim, action_dim, 0.01)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(action_dim))  # the same in every state

    def make_optimizers(self):
        """Adam for all of it; call it once the agent is on its device."""
        self.optimizers = {"ppo": torch.optim.Adam(self.parameters(), lr=self.args.learning_rate, eps=1e-5, fused=True)}

    def inputs(self, states, goal_ids):
        """What the networks see of raw states [B, S] and the goals of these indices [B]: [B, S + D]."""
        return torch.cat([self.normalizer(states), self.goals[goal_ids]], -1)

    def policy(self, inputs):
        """The distribution of actions: of [B, A] continuous ones, or of [B] indices."""
        if self.discrete:
            return Categorical(logits=self.actor(inputs), validate_args=False)
        return Independent(Normal(self.actor(inputs), self.log_std.exp(), validate_args=False), 1)

    def value(self, inputs):
        """The expected discounted return, in units of scaled rewards: [B]."""
        return self.critic(inputs).squeeze(-1)

    def to_env(self, actions):
        """What the environment takes for actions of the policy: numpy, continuous ones clipped to [-1, 1]."""
        actions = actions.cpu().numpy()
        return actions + self.first_action if self.discrete else actions.clip(-1.0, 1.0)

    @torch.no_grad()
    def act(self, states, goal_ids, deterministic=False):
        """Actions for the environment, for raw states [N, S] and goal indices [N]; all numpy."""
        states = torch.as_tensor(states, device=self.goals.device)
        policy = self.policy(self.inputs(states, torch.as_tensor(goal_ids, device=self.goals.device)))
        if not deterministic:
            return self.to_env(policy.sample())
        return self.to_env(policy.probs.argmax(-1) if self.discrete else policy.mean)

    def scale_rewards(self, rewards, goal_ids, ended):
        """Rewards for the goals pursued [T, N], over the standard deviation of their discounted return.

        Takes the rewards for every goal [T, N, G] and the goals pursued [T, N]; first both join their statistics. A
        CLIP reward also loses its goal's mean: the return of a cosine that moves a little around 0.25 would vary most
        with the time that is left. Not where episodes may end early: ending would be worth more or less than before.
        """
        if self.args.reward not in ("binary", "env") and not self.args.early_termination:
            self.reward_stats.update(rewards.flatten(0, 1))
            rewards = rewards - self.reward_stats.mean.float()
        rewards = rewards.gather(-1, goal_ids[..., None]).squeeze(-1)
        returns, discounted = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
        for t in range(len(rewards)):
            returns[t] = discounted = rewards[t] + self.args.gamma * discounted
            discounted = discounted * (1.0 - ended[t])
        self.return_stats.update(returns.reshape(-1, 1))
        return (rewards * (self.return_stats.var.float() + 1e-8).rsqrt()).clamp(-10.0, 10.0)

    def loss(self, batch):
        """PPO's clipped objective on a minibatch; returns it and, to log, its parts as 0-d tensors."""
        args, advantages, returns = self.args, batch["advantages"], batch["returns"]
        policy, values = self.policy(batch["inputs"]), self.value(batch["inputs"])
        log_ratio = policy.log_prob(batch["actions"]) - batch["log_probs"]
        ratio = log_ratio.exp()
        if args.norm_adv and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        clipped_ratio = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
        policy_loss = -torch.minimum(advantages * ratio, advantages * clipped_ratio).mean()
        value_errors = (values - returns).square()
        if args.clip_vloss:
            clipped = batch["values"] + (values - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
            value_errors = torch.maximum(value_errors, (clipped - returns).square())
        value_loss = 0.5 * value_errors.mean()
        entropy = policy.entropy().mean()
        parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        parts["approx_kl"] = (ratio - 1.0 - log_ratio).mean()  # Schulman's low-variance estimate
        parts["clipfrac"] = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
        total = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
        return total, {name: part.detach() for name, part in parts.items()}


# ---------------------------------------------------------------- the rollout's advantages


def gae(rewards, values, next_values, terminated, ended, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438); everything is [T, N].

    `next_values` are those of the state after each step, the real one also where the episode ended there: it is left
    out only if that state is terminal (`terminated`). What comes after an episode's end (`ended`) never counts.
    """
    deltas = rewards + gamma * next_values * (1.0 - terminated) - values
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = following = deltas[t] + gamma * gae_lambda * (1.0 - ended[t]) * following
    return advantages


# ---------------------------------------------------------------- training


def train(args):
    """PPO on a CLIP reward. Returns the run's folder."""
    with start_run(args) as run:  # its folder, log, rendered environments and CLIP reward
        envs, device, clip_reward, n_goals = run.envs, run.device, run.reward, len(args.goal)
        torch.manual_seed(args.seed)
        agent = make_agent(args, run)
        agent.make_optimizers()
        optimizer = agent.optimizers["ppo"]
        global_step, best_score = 0, (-math.inf, 0.0)
        if run.saved:  # --resume
            agent.load_state_dict(run.saved["agent"])
            optimizer.load_state_dict(run.saved["optimizers"]["ppo"])
            global_step, best_score = run.saved["global_step"], run.saved["best_score"]

        def save(name):
            save_checkpoint(run, name, agent, global_step=global_step, best_score=best_score)

        # A phase is one rollout, of new episodes: so a run can be resumed without the environments' states. Arrays of
        # what the environments give are numpy, of what the networks give torch; all are [T, N, ...]. Of several
        # processes (torchrun) each fills the columns `run.mine`, of its own environments, and rank 0 gets all of them
        # before it learns.
        shape = (args.num_steps, args.num_envs)
        phase_frames = args.num_steps * args.num_envs
        states, next_states = np.empty((2, *shape, run.state_dim), np.float32)
        goal_ids = np.empty(shape, np.int64)
        rewards = np.zeros((*shape, n_goals), np.float32)  # of each frame for every goal
        env_rewards = np.empty(shape, np.float32)
        terminated, ended = np.empty(shape, bool), np.empty(shape, bool)
        if clip_reward:  # frames go to a GPU from pinned memory
            pinned = {"dtype": torch.uint8, "pin_memory": device.type == "cuda"}
            pixels = torch.empty((shape[0], args.num_envs // WORLD, *run.frame_shape), **pinned).numpy()
            frames = pixels.reshape(-1, *run.frame_shape)  # the same memory, [T * N, H, W, 3]
        inputs = torch.empty((*shape, run.state_dim + agent.goals.shape[1]), device=device)
        action_dtype = torch.int64 if agent.discrete else torch.float32
        actions = torch.empty((*shape, *run.action_space.shape), dtype=action_dtype, device=device)
        log_probs, values = torch.empty((2, *shape), device=device)

        tell_start(args, run)
        while global_step < args.total_timesteps:
            clock = [time.perf_counter()]
            # Each phase's random numbers follow from the seed and its first frame alone: there is no state to save.
            first_step = global_step
            *starts, numpy_seed, torch_seed = episode_seeds(args.seed, 0, first_step, n=args.num_envs + 2)
            np_rng = np.random.default_rng(numpy_seed)
            torch.manual_seed(torch_seed)

            # COLLECT: a rollout in every environment
            state = envs.reset(seed=starts)[0]["state"]
            goal_id = np_rng.integers(n_goals, size=args.num_envs)  # each episode draws one
            for t in range(args.num_steps):
                if run.stopped_by:
                    break
                with torch.no_grad():
                    tensor = torch.from_numpy(state).to(device)
                    inputs[t] = agent.inputs(tensor, torch.from_numpy(goal_id).to(device))
                    policy = agent.policy(inputs[t])
                    actions[t] = policy.sample()
                    log_probs[t], values[t] = policy.log_prob(actions[t]), agent.value(inputs[t])
                states[t], goal_ids[t] = state, goal_id
                observation, env_rewards[t], terminated[t], truncated, _ = envs.step(agent.to_env(actions[t]))
                next_states[t] = state = observation["state"]  # a view of shared memory: the next step overwrites it
                if clip_reward:
                    pixels[t] = observation["pixels"]  # of the state after the step, an episode's last one included
                if args.terminate_on_success:
                    rewards[t] = 0.0  # other processes' environments are not of concern here
                    rewards[t, run.mine] = clip_reward(pixels[t], range(n_goals))
                    terminated[t] |= rewards[t, np.arange(args.num_envs), goal_id] > 0
                elif clip_reward:
                    clip_reward.score_ahead(frames, (t + 1) * pixels.shape[1])
                next_goal_id = np_rng.integers(n_goals, size=args.num_envs)  # at every step: all processes draw alike
                ended[t] = terminated[t] | truncated
                if ended[t].any() and t < args.num_steps - 1:  # an episode ended: the next one starts
                    seeds = episode_seeds(args.seed, 0, first_step, t + 1, n=args.num_envs)
                    state = envs.reset(seed=seeds, options={"reset_mask": ended[t]})[0]["state"]
                    goal_id = np.where(ended[t], next_goal_id, goal_id)
            if is_stopped(run):
                break  # the rollout is dropped: nothing has learned from it yet
            check_finite("a state", (states, next_states), global_step)
            global_step += phase_frames
            last = global_step >= args.total_timesteps
            evaluates = last or global_step // args.eval_every > first_step // args.eval_every
            clock.append(time.perf_counter())

            # LABEL: all frames of the phase in one batched CLIP pass, each for every goal
            if not clip_reward:
                rewards = env_rewards[..., None]
            elif not args.terminate_on_success:
                rewards[:, run.mine] = clip_reward(frames, range(n_goals)).reshape(*pixels.shape[:2], n_goals)
            by = f" by CLIP in {clip_reward.clip.precision} (see --clip-precision)" if clip_reward else ""
            check_finite(f"a reward{by}", rewards, first_step)
            gather_columns(run, states, goal_ids, rewards, next_states, env_rewards, terminated, ended)
            gather_columns(run, inputs, actions, log_probs, values)
            if RANK > 0:  # gets rank 0's agent, after its updates
                share_agent(agent)
                if evaluates:
                    evaluate_goals(args, run, agent, global_step)
                continue
            pursued = np.take_along_axis(rewards, goal_ids[..., None], -1)[..., 0]  # for the goals pursued, [T, N]
            clock.append(time.perf_counter())

            # UPDATE: advantages, then epochs of gradient steps on minibatches
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - first_step / args.total_timesteps)
            with torch.no_grad():
                last_steps = ended.copy()
                last_steps[-1] = True  # the end of the rollout cuts the episodes that go on
                cut = torch.from_numpy(last_steps).to(device)
                scaled = torch.from_numpy(pursued).to(device)
                if args.normalize_reward:
                    of_all_goals, pursued_goals = (torch.from_numpy(x).to(device) for x in (rewards, goal_ids))
                    scaled = agent.scale_rewards(of_all_goals, pursued_goals, cut.float())
                next_values = values.roll(-1, 0)  # those of episodes' last steps are replaced
                last_states = torch.from_numpy(next_states[last_steps]).to(device)
                last_goals = torch.from_numpy(goal_ids[last_steps]).to(device)
                next_values[cut] = agent.value(agent.inputs(last_states, last_goals))
                ends = torch.from_numpy(terminated).to(device).float(), cut.float()
                advantages = gae(scaled, values, next_values, *ends, args.gamma, args.gae_lambda)
                returns = advantages + values
                if args.normalize_obs:  # for the next rollout: this one's `inputs` are what the policy saw
                    agent.normalizer.update(torch.from_numpy(states).flatten(0, 1).to(device))
            rollout = {"inputs": inputs, "actions": actions, "log_probs": log_probs, "values": values}
            rollout |= {"advantages": advantages, "returns": returns}
            rollout = {name: value.flatten(0, 1) for name, value in rollout.items()}
            for _ in range(args.update_epochs):
                for index in torch.randperm(phase_frames, device=device).tensor_split(args.num_minibatches):
                    loss, losses = agent.loss({name: value[index] for name, value in rollout.items()})
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
            losses["explained_variance"] = 1.0 - (returns - values).var() / (returns.var() + 1e-8)
            losses = {name: float(loss) for name, loss in losses.items()}  # waits for the device
            check_finite(f"a loss of {losses}", list(losses.values()), global_step)
            share_agent(agent)
            clock.append(time.perf_counter())

            # EVALUATE: deterministic episodes from fixed starts
            charts = episode_charts(args, ended, env_rewards, pursued if clip_reward else None, goal_ids)
            charts["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            if evaluates:
                results, score = evaluate_goals(args, run, agent, global_step)
                charts |= results
                if score >= best_score:  # in evaluation; VLM-RM takes the highest return in training
                    best_score = score  # of equals the later one: a reward that saturates would keep a beginner
                    save("best.pt")
            clock.append(time.perf_counter())
            log_phase(run, charts, losses, clock, global_step)

            # SAVE
            if last or global_step // args.checkpoint_every > first_step // args.checkpoint_every:
                save("checkpoint.pt")
        if run.stopped and RANK == 0:
            save("checkpoint.pt")
    return run.dir


# ---------------------------------------------------------------- not the method: finding weights, the look of MuJoCo,
# worker processes and signals, checkpoints, evaluation and video, checks, the command line


ACTION_SPACES = (gym.spaces.Box, gym.spaces.Discrete)  # that the algorithm can act in


def make_agent(args, run):
    """A new agent for a run's environment and goals, on its device."""
    goals = goal_inputs(run.goal_embeddings, len(args.goal))
    return PPO(args, run.state_dim, run.action_space, goals).to(run.device)


def check_algorithm(args):
    """Raises ValueError over flags of the algorithm that cannot work together; warns where episodes are cut."""
    phase_frames = args.num_steps * args.num_envs
    if args.num_minibatches > phase_frames:
        raise ValueError(f"--num-minibatches must be at most the {phase_frames} frames of a rollout")
    if args.num_steps % args.episode_length and not args.early_termination:
        lengths = f"--num-steps {args.num_steps} is not a multiple of --episode-length {args.episode_length}"
        note(f"warning: {lengths}: each rollout starts new episodes, and the last ones of a rollout are cut")


def note(text):
    """Prints a line on standard error, once of all processes."""
    if RANK == 0:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def environment_errors():
    """Makes a ChildProcessError of whatever an environment raises inside: not every exception can be pickled.

    Nor can a class of this script, where workers are spawned: the queue that it goes to would wait for ever.
    """
    try:
        yield
    except Exception as error:
        raise ChildProcessError(f"the environment raised {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def one_line_errors(traceback):
    """Words whatever is raised inside as one line on standard error and ends with status 2, or shows its traceback."""
    logging.disable(logging.ERROR)  # open_clip logs what it raises as well
    try:
        yield
    except Exception as error:
        if traceback:
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        print(f"{Path(sys.argv[0]).name}: error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        logging.disable(logging.NOTSET)


# ---- finding weights

# Where --clip-pretrained names none: VLM-RM's weights of its four models, and LAION's or DFN's of some others. A model
# that is not here has the first tag that open_clip lists.
DEFAULT_WEIGHTS = {
    "RN50": "openai",  # VLM-RM
    "ViT-L-14": "laion2b_s32b_b82k",  # VLM-RM
    "ViT-H-14": "laion2b_s32b_b79k",  # VLM-RM
    "ViT-bigG-14": "laion2b_s39b_b160k",  # VLM-RM
    "ViT-B-32": "laion2b_s34b_b79k",
    "ViT-B-16": "laion2b_s34b_b88k",
    "ViT-g-14": "laion2b_s34b_b88k",
    "ViT-H-14-quickgelu": "dfn5b",
}


def find_clip(clip, pretrained=None, resize_mode=None):
    """What a CLIP model is made of and how it wants its images, before its weights are downloaded or loaded.

    Takes --clip, --clip-pretrained and --image-resize-mode. Returns `model`, what `open_clip.create_model` takes; its
    `tokenizer`; and its preprocessing, `config`.
    """
    is_dir = Path(clip).is_dir()
    is_hub = clip.startswith("hf-hub:")
    hub = huggingface_hub.constants
    if not (is_dir or is_hub):
        name = clip.replace("/", "-")
        architecture, tags = open_clip.get_model_config(name), open_clip.list_pretrained_tags_by_model(name)
        if architecture is None or not (tags or pretrained):
            near = difflib.get_close_matches(name, {known for known, _ in open_clip.list_pretrained()}, cutoff=0.4)
            known = f"open_clip.list_pretrained() has those with weights, such as {', '.join(near or ['ViT-L-14'])}"
            raise ValueError(f"--clip {clip}: neither a directory nor an open_clip architecture; {known}")
        tag = pretrained or DEFAULT_WEIGHTS.get(name, tags[0])
        if tag not in tags and not Path(tag).is_file():
            raise ValueError(f"--clip-pretrained {tag}: no weights of {name}, which has {', '.join(tags)}")
        preprocess = open_clip.get_pretrained_cfg(name, tag)
        if not preprocess:
            fact = f"a file does not tell: taken to want OpenAI's pixel mean and std, and the activation of {name}"
            advice = "else give a folder with an open_clip_config.json as --clip"
            print(f"note: --clip-pretrained {tag}: {fact}; {advice}", file=sys.stderr)
        # The weights know the activation that they were trained with; open_clip would only warn of another one.
        model = {"model_name": name, "pretrained": tag, "force_quick_gelu": preprocess.get("quick_gelu", False)}
    if not (is_dir or hub.HF_HUB_OFFLINE):
        try:  # without a network the hub's client would try each file that is not cached for half a minute
            huggingface_hub.get_session().head(hub.ENDPOINT, timeout=5)
        except Exception:  # of whichever library it uses
            hub.HF_HUB_OFFLINE = True
            print(f"note: no answer from {hub.ENDPOINT}: only what is on disk is used", file=sys.stderr)
    if is_dir or is_hub:
        if pretrained:
            raise ValueError(f"--clip-pretrained {pretrained}: {clip} has weights of its own, leave the flag out")
        model = {"model_name": clip if is_hub else f"local-dir:{clip}"}
        file = Path(clip) / "open_clip_config.json"
        if is_hub:
            file = huggingface_hub.hf_hub_download(clip.removeprefix("hf-hub:"), file.name)
        config = json.loads(Path(file).read_text())
        architecture, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
    size = architecture["vision_cfg"].get("image_size", 224)
    known = {**preprocess, "size": size if isinstance(size, int) else tuple(size)}  # a file has a list for a tuple
    config = PreprocessCfg(**merge_preprocess_dict(known, {"resize_mode": resize_mode}))
    return SimpleNamespace(model=model, tokenizer=open_clip.get_tokenizer(model["model_name"]), config=config)


def drop_text_tower(model):
    """Frees what an open_clip model needs for text alone; CoCa's captions too."""
    for name in ("text", "text_decoder", "transformer", "token_embedding"):
        if hasattr(model, name):
            delattr(model, name)


IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def is_image(prompt):
    """Whether a prompt names an image file, by its ending."""
    return prompt.lower().endswith(IMAGES)


def prompts_of(args):
    """All that the reward compares frames with: the goals, the held-out ones, the negatives and the baseline."""
    return args.goal, args.eval_goal, args.negatives, (args.baseline,)


def check_prompts(tokenizer, prompts, templates=("{}",)):
    """Raises ValueError over what a CLIP model's context would cut silently, OSError over a missing image."""
    for prompt in filter(is_image, prompts):
        Image.open(prompt).close()  # now, before weights are downloaded
    for prompt in [t.replace("{}", p) for p in prompts if not is_image(p) for t in templates]:
        tokens, longer, shorter = tokenizer([prompt, f"{prompt} robot", prompt.rstrip(" .!?")[:-1]])
        if torch.equal(tokens, longer) and torch.equal(tokens, shorter):  # no room for a word, nor for the last letter
            raise ValueError(f'the prompt "{prompt}" is too long: the model would not see its end')


# ---- the look of MuJoCo


def build_scene(xml_path, restyle):
    """Compiles an environment's XML for rendering, in its own look or in ours: a `mujoco.MjModel` with the same qpos.

    Our look is procedural, and spares what only costs time at a CLIP's resolution: multisampling, shadows, reflections,
    fine meshes.
    """
    spec = mujoco.MjSpec.from_file(str(xml_path))
    if not restyle:
        return spec.compile()
    quality = spec.visual.quality
    quality.offsamples, quality.shadowsize = 0, 0
    quality.numslices, quality.numstacks, quality.numquads = 16, 8, 1
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)
    for texture in list(spec.textures):
        if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            spec.delete(texture)
    kinds, patterns = mujoco.mjtTexture, mujoco.mjtBuiltin
    sky = dict(type=kinds.mjTEXTURE_SKYBOX, builtin=patterns.mjBUILTIN_GRADIENT, width=256, height=256)
    spec.add_texture(name="vlmrm_sky", rgb1=(0.45, 0.55, 0.7), rgb2=(0.15, 0.2, 0.3), **sky)
    tiles = dict(type=kinds.mjTEXTURE_2D, builtin=patterns.mjBUILTIN_CHECKER, width=256, height=256)
    spec.add_texture(name="vlmrm_tiles", rgb1=(0.22, 0.25, 0.28), rgb2=(0.42, 0.45, 0.48), **tiles)
    floor = spec.add_material(name="vlmrm_floor", texuniform=True, texrepeat=(1, 1), reflectance=0.0)
    floor.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "vlmrm_tiles"
    spec.add_material(name="vlmrm_robot", reflectance=0.0, specular=0.3, shininess=0.3)

    def paint(body, depth):
        for geom in body.geoms:
            own = tuple(geom.rgba) != (0.5, 0.5, 0.5, 1.0) or not geom.material  # else the material's color counts
            opacity = geom.rgba[3] if own else spec.material(geom.material).rgba[3]
            if opacity == 0:
                continue  # keep what is invisible invisible
            if geom.type == mujoco.mjtGeom.mjGEOM_PLANE:
                geom.material, geom.rgba = "vlmrm_floor", (1, 1, 1, opacity)
                geom.size[2] = 5.0  # meters a mesh cell: with the Humanoid's 0.125 the floor alone takes 3 ms a frame
            else:
                shade = 0.85 if depth % 2 else 0.7  # two tones, so that a limb stands out from the one behind it
                geom.material, geom.rgba = "vlmrm_robot", (shade, shade, shade + 0.02, opacity)
        for child in body.bodies:
            paint(child, depth + 1)

    paint(spec.worldbody, 0)
    if spec.geom("head") and spec.body("torso") and spec.body("pelvis"):
        # The bare humanoid looks the same from the front and the back: a visor, a chest and a back tell them apart.
        dark, blue, red = (0.08, 0.08, 0.1, 1), (0.15, 0.35, 0.75, 1), (0.75, 0.2, 0.15, 1)
        for body, pos, size, rgba in (
            ("torso", (0.065, 0, 0.2), (0.035, 0.065, 0.025), dark),
            ("torso", (0.045, 0, 0.0), (0.035, 0.08, 0.05), blue),
            ("torso", (-0.045, 0, 0.0), (0.035, 0.08, 0.05), red),
            ("pelvis", (0.04, 0, 0.0), (0.04, 0.07, 0.04), blue),
            ("pelvis", (-0.08, 0, 0.0), (0.04, 0.07, 0.04), red),
        ):
            box = spec.body(body).add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=pos, size=size, rgba=rgba)
            box.material, box.mass, box.contype, box.conaffinity = "vlmrm_robot", 0, 0, 0
    return spec.compile()


class SceneRenderer:
    """Renders MuJoCo states, each given by its qpos alone, to frames of `size` (height, width) in pixels.

    It draws a model of its own, so that the simulation stays Gymnasium's to the bit, and a saved trajectory of qpos can
    be rendered again at any size and from any camera. Distance and look-at are in meters, angles in degrees. `follow`
    moves the look-at's x and y with the robot; not its height, which would hide how high the robot is.
    """

    opened_by = None  # pid of the process that started OpenGL, which must not be forked afterwards: that hangs

    def __init__(self, xml_path, size, *, distance, elevation, azimuth, lookat, follow, restyle):
        self.model = build_scene(xml_path, restyle)
        self.data = mujoco.MjData(self.model)
        self.size, self.lookat, self.follow = size, lookat, follow
        self.camera = mujoco.MjvCamera()
        self.camera.distance, self.camera.elevation, self.camera.azimuth = distance, elevation, azimuth
        self.renderer = None

    def __call__(self, qpos):
        """The frame of one state, uint8 [H, W, 3]. OpenGL starts at the first one."""
        if self.renderer is None:
            SceneRenderer.opened_by = os.getpid()
            self.model.vis.global_.offheight, self.model.vis.global_.offwidth = self.size
            try:
                self.renderer = mujoco.Renderer(self.model, *self.size)
            except (RuntimeError, ImportError):
                if not os.environ.pop("MUJOCO_EGL_DEVICE_ID", None):
                    raise
                self.renderer = mujoco.Renderer(self.model, *self.size)  # EGL does not list that GPU: any device of it
        self.data.qpos[:] = qpos
        mujoco.mj_fwdKinematics(self.model, self.data)  # all that is drawn, lights and tendons too
        follow = self.follow and self.model.body_jntnum[1]  # body 1 is the robot's root, if it can move
        offset = (*self.data.xpos[1][:2], 0.0) if follow else (0.0, 0.0, 0.0)
        self.camera.lookat[:] = np.add(self.lookat, offset)
        self.renderer.update_scene(self.data, self.camera)
        return self.renderer.render()


# ---- worker processes and signals


def scene_of(args):
    """What SceneRenderer takes of the flags."""
    names = ("distance", "elevation", "azimuth", "lookat", "follow")
    return {name: getattr(args, f"camera_{name}") for name in names} | {"restyle": args.restyle}


def check_environment(env):
    """Raises ValueError if the algorithm can't act in an environment, or CLIP can't see it."""
    if not isinstance(env.action_space, ACTION_SPACES):
        raise ValueError(f"{env.spec.id}: actions must be in a Box (ppo_vlmrm.py: or Discrete), not {env.action_space}")
    if isinstance(env.action_space, gym.spaces.Box):
        low, high = env.action_space.low, env.action_space.high
        if low.ndim != 1 or low.dtype.kind != "f" or not np.isfinite([low, high]).all() or not (low < high).all():
            raise ValueError(f"{env.spec.id}: actions must be a vector of floats with bounds, not {env.action_space}")
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise ValueError(f"{env.spec.id} has no rgb_array rendering for CLIP to look at")


def start_workers(args, config):
    """The vector of rendered environments, each in a process of its own, with frames of the size in `config`.

    Observations are views of shared memory that the next step overwrites. Autoreset is disabled: the frame at the end
    of an episode is that of its last state, not of the next one's first.
    """
    frame_size = config.input_size[1:]
    render_size = (args.render_size, args.render_size) if args.render_size else frame_size
    resize = Compose(image_transform_v2(config, is_train=False).transforms[:-2])  # open_clip's, while still an image
    flags = (args.env_id, args.episode_length, args.early_termination, scene_of(args))
    make_env = functools.partial(RenderedEnv, *flags, render_size, frame_size, resize)
    index = device_of(args).index
    if index:  # draw on that GPU as well; MuJoCo finds its EGL device, which is numbered otherwise than CUDA's
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(index))
    # Spawned workers would each import torch again (seconds, 500 MB); forking after OpenGL or CUDA has started hangs.
    forkable = sys.platform == "linux" and SceneRenderer.opened_by != os.getpid() and not torch.cuda.is_initialized()
    settings = {"copy": False, "context": "fork" if forkable else "spawn", "autoreset_mode": "Disabled"}
    with contextlib.ExitStack() as stack:
        # Inherited: a signal to the whole process group (Ctrl-C, Slurm's) is the main process's to answer.
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
        return gym.vector.AsyncVectorEnv([make_env] * (args.num_envs // WORLD), **settings)


@contextlib.contextmanager
def make_envs(args, config):
    """Context of `start_workers`, after its first frames; no process is left when it ends, however it ends."""
    gym.logger.min_level = gym.logger.ERROR + 1  # it would print a worker's traceback, and raises the error as well
    envs = start_workers(args, config)
    try:
        for i in range(envs.num_envs):  # on some drivers processes hang that draw their first frames at the same time
            envs.reset_async(options={"reset_mask": np.arange(envs.num_envs) == i})
            envs.reset_wait(timeout=120)
        envs.set_attr("rendering", args.reward != "env")
        yield envs
        for pipe in envs.parent_pipes:
            pipe.send(("close", None))  # an environment may own processes and files; it has 5 s
        for process in envs.processes:
            process.join(5)
    except multiprocessing.TimeoutError:
        where = f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} in process {i + 1} of {envs.num_envs}"
        raise RuntimeError(f"no frame in 120 s with {where}: use --num-envs 1, or another MUJOCO_GL") from None
    except (EOFError, ConnectionError):
        for i, process in enumerate(envs.processes):
            process.join(0.1)
            if not process.is_alive():
                raise ChildProcessError(f"the process of environment {i} died (exit code {process.exitcode})") from None
        raise
    finally:
        for process in envs.processes:
            process.kill()
            process.join()
        envs.closed = True  # its own close() would wait for answers


def tell_start(args, run):
    """Prints a line that says where and on what is trained, and one that names what draws the frames."""
    reward = f"{args.env_id}'s own reward"
    if run.reward:
        reward = ", ".join(f'"{goal}"' for goal in args.goal) + f" by {args.clip}"
    note(f"{run.dir} trains on {reward}")
    name = run.envs.call("drawn_by")[0]
    if name and "llvmpipe" in name and run.device.type == "cuda":
        advice = "in a container, NVIDIA_DRIVER_CAPABILITIES=all brings the GPU's driver"
        note(f"warning: there is a GPU, but frames are drawn on the CPU, by {name}; {advice}")
    elif name:
        note(f"frames are drawn by {name}")


# ---- several processes: `torchrun --nproc-per-node 4` starts four of this script, one for each GPU


def device_of(args):
    """The torch device of this process. ValueError if there are more processes than GPUs."""
    device = args.device.replace("auto", "cuda" if torch.cuda.device_count() else "cpu")
    if device != "cuda":
        return torch.device(device)
    started = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if started > max(torch.cuda.device_count(), 1):
        raise ValueError(f"torchrun started {started} processes, but there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


class ShardedEnvs:
    """This process's environments behind the interface of all of them: the rows of the others are 0.

    So the policy is computed in the same shape and with the same noise whatever the number of processes. Frames and
    qpos are of this process's environments alone.
    """

    def __init__(self, envs, mine, num_envs):
        self.envs, self.mine, self.num_envs = envs, mine, num_envs

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def spread(self, rows):
        full = np.zeros((self.num_envs, *rows.shape[1:]), rows.dtype)
        full[self.mine] = rows
        return full

    def reset(self, *, seed=None, options=None):
        seed = seed[self.mine] if seed else None
        options = {"reset_mask": options["reset_mask"][self.mine]} if options else None
        observation, infos = self.envs.reset(seed=seed, options=options)
        return {**observation, "state": self.spread(observation["state"])}, infos

    def step(self, actions):
        observation, *outcome, infos = self.envs.step(actions[self.mine])
        return {**observation, "state": self.spread(observation["state"])}, *map(self.spread, outcome), infos


def gather(value):
    """The values of all processes in rank 0, in their order; an empty list in the others."""
    values = [value] * WORLD if RANK == 0 else []
    if WORLD > 1:
        dist.gather_object(value, values or None)
    return values


def gather_columns(run, *arrays):
    """Fills rank 0's arrays [T, N, ...] with the columns of the other processes' environments."""
    if WORLD > 1:
        arrays = [torch.as_tensor(array) for array in arrays]  # which shares a numpy array's memory
        parts = gather([array[:, run.mine].cpu().clone() for array in arrays])  # pickle writes all that a view is of
        for i, array in enumerate(arrays if parts else ()):
            array.copy_(torch.cat([part[i] for part in parts], 1))


def share_agent(agent):
    """Gives rank 0's agent, its networks and statistics, to the other processes."""
    if WORLD > 1:
        for tensor in agent.state_dict().values():
            values = tensor.cpu()
            dist.broadcast(values, 0)
            tensor.copy_(values)


def is_stopped(run):
    """Whether a signal has come, to whichever process; all learn of it at the same place."""
    number = torch.tensor(max(run.stopped_by, default=0))
    if WORLD > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    run.stopped = number.item()  # what has come since, the others do not know of yet: it is for the next phase
    return run.stopped > 0


# ---- a run: its starts, its folder, checkpoints and log


def episode_seeds(*key, n):
    """`n` seeds that depend on `key` alone, so that a run can be repeated from any point of it.

    A key is the run's seed, a number of the purpose (0 training, 1 evaluation, 2 play), and in training frame and step.
    """
    return np.random.SeedSequence(key).generate_state(n).tolist()


@contextlib.contextmanager
def stop_signals():
    """Context of a list for the first SIGINT or SIGTERM, to end with a checkpoint; a later one ends the run at once."""
    received, first = [], 0.0

    def receive(number, _):
        nonlocal first
        if not received:
            received.append(number)
            first = time.monotonic()
            text = b"\nstopping after what is being computed; one more, after 3 s, stops without a checkpoint\n"
            try:
                os.write(2, text)
            except OSError:  # Ctrl-C has ended the `tee` that it went to
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        elif time.monotonic() - first > 3.0:  # sooner, it may be the same one: torchrun passes on what it gets itself
            os._exit(128 + number)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, receive))
        yield received


@contextlib.contextmanager
def start_run(args):
    """Context of all that a run needs beside its algorithm; a mistake found on the way is one line and status 2.

    Yields `dir`, for a new run in rank 0 alone; `mine`, the slice of the environments that this process steps; `saved`,
    the checkpoint of --resume or --play, or None; `first_step`, its frame, or 0; `device`; `envs`, with their
    `state_dim`, `action_space` and `frame_shape`; `reward`, a ClipReward or None; `goal_embeddings` [G + E, D];
    `writer` and `progress`, to log with; `stopped_by`, the signals received, and `stopped`, that which ends it, or 0.
    """
    run = SimpleNamespace(saved=None, reward=None, goal_embeddings=torch.zeros(1, 0), stopped=0)
    with contextlib.ExitStack() as stack:
        with one_line_errors(args.traceback):
            check_args(args)
            if not args.play:
                check_algorithm(args)
            run.dir = args.play or args.resume
            run.mine = slice(RANK * args.num_envs // WORLD, (RANK + 1) * args.num_envs // WORLD)
            if args.resume and RANK == 0:
                stack.enter_context(lock_run_dir(run.dir))
            if run.dir:
                name = args.checkpoint if args.play else "checkpoint.pt"
                if name == "best.pt" and not (run.dir / name).exists() and (run.dir / "checkpoint.pt").exists():
                    note(f"there is no {name}, as before the first evaluation: checkpoint.pt is played")
                    name = "checkpoint.pt"
                run.saved = load_checkpoint(run.dir / name)
            if args.resume and run.saved["versions"] != VERSIONS:
                note(f"warning: resumed with {VERSIONS}, saved with {run.saved['versions']}")
            run.first_step = run.saved["global_step"] if run.saved else 0
            config = PreprocessCfg(size=32)  # without CLIP nobody looks at the frames
            if args.reward != "env":
                source = find_clip(args.clip, args.clip_pretrained, args.image_resize_mode)
                prompts = [*itertools.chain(*prompts_of(args))]
                check_prompts(source.tokenizer, prompts, args.template)
                config = source.config
            # Workers start before CUDA or a model is up, so that they can be forked.
            run.envs = stack.enter_context(make_envs(args, config))
            if WORLD > 1:
                dist.init_process_group("gloo", timeout=timedelta(days=30))  # the others wait while rank 0 updates
                run.envs = ShardedEnvs(run.envs, run.mine, args.num_envs)
            run.device = device_of(args)
            if run.device.type == "cuda":
                torch.cuda.set_device(run.device)  # or pinned memory would be the first GPU's
            run.state_dim = run.envs.single_observation_space["state"].shape[0]
            run.frame_shape = run.envs.single_observation_space["pixels"].shape
            run.action_space = run.envs.single_action_space
            if args.reward != "env":
                warn_of_rewards(args, config, run.envs)
                run.reward = ClipReward(args, CLIP(source, run.device, args.clip_precision, args.clip_batch_size))
                run.goal_embeddings = run.reward.goal_embeddings
                if args.resume or (args.play and len(args.goal) > 1):  # the agent of one goal does not see it
                    now, then = run.reward.goals.cpu(), run.saved["goal_embeddings"][: len(args.goal)]
                    # Of the embedded CLIP bf16 changes 1e-5, another training 0.26.
                    if now.shape != then.shape or (now - then).square().sum(1).max() > 0.01:
                        raise ValueError("--clip, --template or an image of a goal has changed since this run began")
                drop_text_tower(run.reward.clip.model)
                args.clip_precision = run.reward.clip.precision  # goes into args.json: a resume keeps what auto became
            run.stopped_by = [] if args.play else stack.enter_context(stop_signals())  # nothing to save before
            if RANK == 0:
                if not run.dir:
                    about = (re.sub("[/:]", "-", args.env_id), Path(__file__).stem, args.seed, time.time_ns() // 10**6)
                    run.dir = args.run_dir or Path("runs") / "__".join(map(str, about))
                    run.dir.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock_run_dir(run.dir))
                for name in ("videos", "rollouts"):
                    (run.dir / name).mkdir(exist_ok=True)
                if not args.play:
                    stack.enter_context(open_log(args, run))
        yield run
    if WORLD > 1:
        dist.barrier()  # none ends before rank 0 has saved and closed its log
        dist.destroy_process_group()
    if run.stopped:
        note(f"stopped; go on with --resume {run.dir}")
        sys.exit(128 + run.stopped)


def lock_run_dir(folder):
    """Context that keeps other processes out of a run's folder; ValueError if one is there. A kill ends it too."""
    try:
        return FileLock(folder / "lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process runs in {folder}: wait for its end, or choose another --run-dir") from None


@contextlib.contextmanager
def open_log(args, run):
    """Context of a run's log in TensorBoard and its progress bar; its flags and its script are kept beside it."""
    replace_file(run.dir / "args.json", json.dumps(asdict(args), indent=2, default=str).encode())
    script, first = Path(__file__), run.dir / Path(__file__).name
    if args.resume and not (first.exists() and first.read_text() == script.read_text()):
        note(f"warning: {script} is not as it was when the run was started, see {first}")
    name = f"{script.stem}_resumed_at_{run.first_step}.py" if args.resume else script.name
    (run.dir / name).write_text(script.read_text())
    if args.track:
        import wandb

        wandb.init(project="vlmrm", name=run.dir.name, config=asdict(args), sync_tensorboard=True)
    threading.excepthook = lambda _: None  # what TensorBoard's thread raises is raised here as well
    run.start_time = time.time()
    rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
    bar = {"unit": " frames", "dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 30}
    with (
        SummaryWriter(run.dir, purge_step=run.first_step + 1) as run.writer,  # drops what came after the checkpoint
        tqdm(total=args.total_timesteps, initial=run.first_step, smoothing=0.05, delay=0.1, **bar) as run.progress,
    ):
        run.writer.add_text("args", "\n".join(["|flag|value|", "|-|-|", *rows]))
        yield


# With others, a resumed run ends in other bits.
VERSIONS = {package.__name__: str(package.__version__) for package in (torch, mujoco, gym, open_clip)}


def save_checkpoint(run, name, agent, **progress):
    """Writes best.pt or checkpoint.pt; the log is on disk before it."""
    run.writer.flush()
    optimizers = {key: optimizer.state_dict() for key, optimizer in agent.optimizers.items()}
    content = io.BytesIO()
    made_with = {"versions": VERSIONS, "goal_embeddings": run.goal_embeddings.cpu()}
    torch.save({**progress, **made_with, "agent": agent.state_dict(), "optimizers": optimizers}, content)
    replace_file(run.dir / name, content.getbuffer())


def replace_file(path, content):
    """Replaces a file's bytes such that a kill at any instant, or a full disk, leaves the old ones or the new ones."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_checkpoint(path):
    """A checkpoint's dict; loading it runs nothing that a crafted file could hold. ValueError if it is none."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is truncated or no checkpoint ({type(error).__name__})") from error


def check_finite(what, values, global_step):
    """Raises FloatingPointError if a value is not finite, before a checkpoint holds what comes of it."""
    if not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise FloatingPointError(f"it diverged: {what} is not finite after frame {global_step}, first at {place}")


def log_phase(run, charts, losses, clock, global_step):
    """Writes a phase's scalars to TensorBoard and moves the progress bar. `clock` has the times between its parts."""
    charts |= {f"losses/{name}": loss for name, loss in losses.items()}
    for name, seconds in zip(("collect", "label", "update", "evaluate"), np.diff(clock), strict=True):
        charts[f"time/{name}"] = seconds / (clock[-1] - clock[0])
    charts["charts/SPS"] = (global_step - run.first_step) / (time.time() - run.start_time)
    for name, value in charts.items():
        run.writer.add_scalar(name, value, global_step)
    headline = "clip_return" if run.reward else "env_return"
    run.progress.set_postfix_str(f"{headline}={charts[f'charts/{headline}']:.2f}", refresh=False)
    run.progress.update(global_step - run.progress.n)
    evaluated = [f"{name.removeprefix('eval/')} {value:.2f}" for name, value in charts.items() if "eval/" in name]
    if evaluated:
        tqdm.write(f"evaluation at frame {global_step}: {', '.join(evaluated)}", file=sys.stderr)


# ---- evaluation and video


def evaluate(args, run, agent, goal_id, seeds):
    """Plays --eval-episodes deterministic episodes for one goal, from starts of these seeds, and scores their frames.

    Returns a dict of arrays, in which t is the state after step t: "clip_rewards" (if CLIP is used) and "env_rewards"
    [episodes, T], 0 after an episode's end; "lengths" [episodes]; "qpos" [episodes, T, nq] for MuJoCo; and of the
    first episode "pixels" [T, H, W, 3], what CLIP saw, and "film", larger frames, for --video. In rank 0; else None.
    """
    envs, rounds, film = run.envs, [], []
    for first in range(0, args.eval_episodes, args.num_envs):
        state = envs.reset(seed=seeds[first : first + args.num_envs])[0]["state"]
        steps = []
        for _ in range(args.episode_length):
            actions = agent.act(state, np.full(args.num_envs, goal_id), deterministic=True)
            observation, rewards, terminated, truncated, _ = envs.step(actions)
            step = {name: value.copy() for name, value in observation.items()}
            state, ended = step.pop("state"), terminated | truncated
            steps.append({**step, "env_rewards": rewards[run.mine], "ended": ended[run.mine]})
            if args.video and first == 0 and "qpos" not in step:
                film.append(envs.call("render")[0])
            if ended.any() and len(steps) < args.episode_length:  # stepping on is undefined; what follows is masked
                state = envs.reset(options={"reset_mask": ended})[0]["state"]
        steps = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}  # [N, T, ...]
        pixels, ended = steps.pop("pixels"), steps.pop("ended")
        if run.reward:
            steps["clip_rewards"] = run.reward(pixels.reshape(-1, *run.frame_shape), [goal_id]).reshape(ended.shape)
            if args.terminate_on_success:
                ended |= steps["clip_rewards"] > 0
        steps["alive"] = ended.cumsum(1) - ended == 0  # at no earlier step it has ended
        for name in steps.keys() & {"clip_rewards", "env_rewards"}:
            steps[name] = steps[name] * steps["alive"]
        rounds += gather(steps)
        if first == 0:
            shown = pixels[0]
    if RANK > 0:
        return None
    result = {name: np.concatenate([part[name] for part in rounds])[: args.eval_episodes] for name in steps}
    result["lengths"] = result.pop("alive").sum(1)
    if args.video and "qpos" in result:
        render = SceneRenderer(envs.get_attr("xml_path")[0], (480, 480), **scene_of(args))
        film = [render(qpos) for qpos in result["qpos"][0, : result["lengths"][0]]]
    return {**result, "pixels": shown, "film": film}


def evaluate_goals(args, run, agent, global_step, goal_ids=None):
    """Evaluates the agent on goals (default: all, the held-out ones too); writes videos, image strips and rollouts.

    Returns the scalars to log and a score that orders agents, of the goals that are trained on: their mean return (the
    CLIP return, or with `--reward env` the environment's), and with --terminate-on-success how fast they are, minus the
    mean length.
    """
    charts, returns, lengths, goals = {}, [], [], [*args.goal, *args.eval_goal]
    seeds = episode_seeds(args.seed, 2 if args.play else 1, n=args.eval_episodes + args.num_envs)
    for goal_id in range(len(goals)) if goal_ids is None else goal_ids:
        result = evaluate(args, run, agent, goal_id, seeds)
        if RANK > 0:
            continue
        pixels, film, length = result.pop("pixels"), result.pop("film"), result["lengths"][0]
        curve = f"/{slug(goals[goal_id])}" if len(goals) > 1 else ""
        file = f"{'play-' if args.play else ''}{global_step}{curve.replace('/', '-')}"
        for name in [name for name in ("clip_rewards", "env_rewards") if name in result]:
            charts[f"eval/{name.replace('rewards', 'return')}{curve}"] = result[name].sum(1).mean()
        if args.reward == "binary":  # VLM-SR's measure: was the goal reached at all
            charts[f"eval/success_rate{curve}"] = result["clip_rewards"].any(1).mean()
        charts[f"eval/episodic_length{curve}"] = result["lengths"].mean()
        rewards = result.get("clip_rewards", result["env_rewards"])
        check_finite("a reward in evaluation", rewards, global_step)
        returns.append(float(rewards.sum(1).mean()))
        lengths.append(float(result["lengths"].mean()))
        if run.reward and not args.play:
            strip = np.concatenate(list(pixels[np.linspace(0, length - 1, 8).astype(int)]), axis=1)
            run.writer.add_image(f"eval/strip{curve}", strip, global_step, dataformats="HWC")
        if args.video:
            write_video(run.dir / "videos" / f"{file}.mp4", film[:length], rewards[0, :length])
        if args.save_rollouts:
            path = run.dir / "rollouts" / f"{file}.npz"
            np.savez_compressed(path, env_id=args.env_id, goal=goals[goal_id], **result)
    if RANK > 0:
        return {}, None
    mean_return = float(np.mean(returns[: len(args.goal)]))
    if len(goals) > 1 and goal_ids is None:
        charts["eval/clip_return"] = mean_return
    return charts, (mean_return, -float(np.mean(lengths[: len(args.goal)])) if args.terminate_on_success else 0.0)


def write_video(path, frames, rewards):
    """Writes frames [T, H, W, 3] as an mp4 with the step and its reward on each."""
    low, high = float(np.min(rewards)), float(np.max(rewards))
    with imageio.get_writer(path, fps=30, macro_block_size=2, output_params=["-loglevel", "error"]) as writer:
        for t, (frame, reward) in enumerate(zip(frames, rewards, strict=True)):
            image = Image.fromarray(frame).convert("RGB").resize(frames[0].shape[1::-1])  # its size may change
            draw = ImageDraw.Draw(image)
            width = (reward - low) / max(high - low, 1e-8) * (image.width - 16)  # the bar spans this episode's rewards
            draw.rectangle((8, image.height - 14, 8 + width, image.height - 8), fill=(255, 200, 0))
            draw.text((8, 6), f"step {t + 1}   reward {reward:+.4f}", fill=(255, 255, 255), font_size=22)
            writer.append_data(np.asarray(image))


def slug(text):
    """A sentence, or an image's name, as a part of a file's or a curve's name."""
    text = Path(text).name if is_image(text) else text
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:70]  # a file's name may have 255 bytes, a Chinese letter has 3


def episode_charts(args, ended, env_rewards, clip_rewards, goal_ids):
    """Mean return and length of the episodes that ended in a phase, for the log; of their parts, if none ended.

    Everything is [T, N]: `ended` is true at an episode's last step; `clip_rewards` may be None. Where episodes may end
    early, this favours short ones, since the phase's end cuts the others: judge by `eval/*`.
    """
    last = ended.copy()
    last[-1] = True  # the end of the phase cuts the episodes that go on
    stops = np.flatnonzero(last.T)  # in [N, T], where an episode's steps are neighbours
    starts = np.append(0, stops[:-1] + 1)
    counted = ended.T.ravel()[stops] if ended.any() else np.ones(len(stops), bool)
    charts = {"charts/episodic_length": (stops - starts + 1)[counted].mean()}
    charts["charts/env_return"] = np.add.reduceat(env_rewards.T.ravel(), starts)[counted].mean()
    if clip_rewards is not None:
        returns = np.add.reduceat(clip_rewards.T.ravel(), starts)
        charts["charts/clip_return"] = returns[counted].mean()
        goal_ids = goal_ids.T.ravel()[stops]
        for i in np.unique(goal_ids[counted]) if len(args.goal) > 1 else ():
            charts[f"charts/clip_return/{slug(args.goal[i])}"] = returns[counted & (goal_ids == i)].mean()
    return charts


def play(args):
    """Plays deterministic episodes of a trained agent, for its own goals or new ones. Returns where they are."""
    trained = tuple(json.loads((args.play / "args.json").read_text())["goal"])
    asked = (*args.goal, *args.eval_goal)
    goals = (*trained, *(goal for goal in asked if goal not in trained))
    args = replace(args, goal=trained, eval_goal=goals[len(trained) :])
    with start_run(args) as run:
        agent = make_agent(args, run)
        with one_line_errors(args.traceback):
            agent.load_state_dict(run.saved["agent"] | {"goals": agent.goals})  # which has the new ones as well
        charts, _ = evaluate_goals(args, run, agent, run.first_step, [goals.index(goal) for goal in asked])
    for name, value in charts.items():
        print(f"{name.removeprefix('eval/')}: {value:.2f}")
    return f"{run.dir}/videos and {run.dir}/rollouts, play-{run.first_step}*"


# ---- checks and the command line


def check_args(args):
    """Raises ValueError over flags that would go wrong silently, or late."""
    goals = (*args.goal, *args.eval_goal)
    if args.num_envs % WORLD:
        raise ValueError(f"--num-envs {args.num_envs} is not a multiple of the {WORLD} processes that torchrun started")
    if args.play and WORLD > 1:
        raise ValueError("--play needs one process: start it without torchrun")
    if args.track:
        __import__("wandb")  # a missing one is an error now
    if not args.goal or not all(goal.strip() for goal in goals):
        raise ValueError("--goal is empty: describe the state to reach")
    if len({slug(goal) for goal in goals}) < len(goals):
        raise ValueError("--goal and --eval-goal: two have the same first 70 letters, which files are named by")
    if len(goals) > 1 and args.reward == "env":
        raise ValueError("--reward env has no goals: name one --goal or none")
    if args.eval_goal and len(args.goal) == 1:
        raise ValueError("an agent of one goal does not see its goal: --eval-goal, or a new one to play, needs several")
    if args.reward == "binary" and len(args.goal) + len(args.negatives) < 2:
        raise ValueError("--reward binary compares prompts: give --negatives, or several --goal")
    if set(args.negatives) & set(goals):
        raise ValueError("--negatives holds a goal, which can't compete with itself")
    if (args.terminate_on_success or args.negatives) and args.reward != "binary":
        raise ValueError("--terminate-on-success and --negatives need --reward binary")
    if args.alpha > 0 and args.reward != "regularized":
        raise ValueError("--alpha needs --reward regularized")
    rivals = args.negatives if args.reward == "binary" else (args.baseline,)
    compares = args.reward == "binary" or args.alpha > 0
    # The modality gap (Liang et al., 2022): images lie near images, whatever they show, and apart from sentences.
    if compares and len({is_image(prompt) for prompt in (*goals, *rivals)}) > 1:
        raise ValueError("goals, --negatives and the --baseline of an --alpha: give sentences or images, not both")
    if args.alpha > 0 and args.baseline in goals:
        raise ValueError("--goal equals --baseline, which leaves no direction to regularise along: use --alpha 0")
    for template in args.template:
        if "{}" not in template:
            raise ValueError(f'--template "{template}" has no "{{}}" for the prompt')


def warn_of_rewards(args, config, envs):
    """Prints a line if the CLIP taught VLM-RM's humanoid nothing, and one if it would not see the sides of frames."""
    if args.env_id.startswith("Humanoid") and args.clip in ("RN50", "ViT-L-14", "ViT-H-14") and not args.play:
        fact = f"{args.clip} taught VLM-RM's humanoid to kneel in 0% of the episodes, ViT-bigG-14 in 100% (alpha 0)"
        note(f"note: {fact}; reward_only_eval.py judges a reward before you spend GPU hours on it")
    if config.resize_mode == "shortest" and not envs.get_attr("xml_path")[0]:  # MuJoCo's frames are rendered square
        height, width, _ = envs.call("render")[0].shape
        if height != width:
            size = f"{height} pixels high and {width} wide"
            advice = "CLIP sees the square in the middle only; --image-resize-mode longest shows all of it"
            note(f"warning: frames of {args.env_id} are {size}; {advice}")


# What may differ when a run is resumed: it changes nothing that is trained on, but that the learning rate follows
# --total-timesteps (with --anneal-lr), that another batch size or precision of CLIP rounds otherwise, and that another
# device draws other noise. --clip is for a folder that has moved: start_run compares the goals' embeddings.
CHANGEABLE = """resume run_dir play checkpoint device total_timesteps eval_every eval_episodes checkpoint_every video
    clip clip_pretrained save_rollouts track traceback clip_batch_size clip_precision""".split()


def with_absolute_paths(args):
    """Flags with absolute paths of the CLIP model and the prompts' images: the run can be played from anywhere."""

    def absolute(prompt):
        return os.path.abspath(prompt) if is_image(prompt) else prompt

    paths = {name: tuple(map(absolute, getattr(args, name))) for name in ("goal", "eval_goal", "negatives")}
    if Path(args.clip).is_dir():
        paths["clip"] = os.path.abspath(args.clip)
    if args.clip_pretrained and Path(args.clip_pretrained).is_file():
        paths["clip_pretrained"] = os.path.abspath(args.clip_pretrained)
    return replace(args, baseline=absolute(args.baseline), **paths)


def parse_args():
    """The command line's flags. With --resume or --play they start from the run's own, with --preset from its table."""
    with one_line_errors("--traceback" in sys.argv):
        named = [word.partition("=")[0].replace("_", "-") for word in sys.argv]
        for flag in ("--goal", "--eval-goal", "--negatives", "--template"):
            if named.count(flag) > 1:
                raise ValueError(f"{flag} is given twice, and only the last would count: name all after one {flag}")
        args = tyro.cli(Args)
        if len(args.goal) > 1 and {"a", "an", "the"} & set(args.goal):
            raise ValueError(f"--goal {' '.join(args.goal)}: that is {len(args.goal)} goals, put a sentence in quotes")
        resume, run_dir = args.resume, args.run_dir
        if resume == Path("auto"):
            if not run_dir:
                raise ValueError("--resume auto needs --run-dir, the folder to go on in, or to start in")
            resume = run_dir if (run_dir / "checkpoint.pt").exists() else None
        elif resume and run_dir not in (None, resume):
            raise ValueError("--resume goes on in its own folder: leave --run-dir out")
        elif run_dir and not resume and (run_dir / "checkpoint.pt").exists():
            raise ValueError(f"--run-dir {run_dir} already holds a run: choose another folder, or add --resume auto")
        folder = args.play or resume
        if not folder:
            args = replace(tyro.cli(Args, default=replace(Args(), **PRESETS.get(args.preset, {}))), resume=None)
            return with_absolute_paths(args)
        if not (folder / "args.json").exists():
            raise ValueError(f"{'--play' if args.play else '--resume'} {folder}: no run is there, it has no args.json")
        saved = json.loads((folder / "args.json").read_text())
        if unknown := saved.keys() - asdict(args).keys():
            raise ValueError(f"{folder}: a run of another script or version, with --{min(unknown).replace('_', '-')}")
        saved = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
        saved = with_absolute_paths(replace(saved, resume=resume, play=args.play, run_dir=None))
        if args.play:
            known = (*saved.goal, *saved.eval_goal)
            here = dict(goal=known, eval_goal=(), clip_precision="auto", track=False)
            return with_absolute_paths(tyro.cli(Args, default=replace(saved, **here)))
        args = with_absolute_paths(replace(tyro.cli(Args, default=saved), resume=resume))
        changed = []
        for name, value in asdict(args).items():
            if name not in CHANGEABLE and value != getattr(saved, name):
                changed.append(f"--{name.replace('_', '-')} {value} (was {getattr(saved, name)})")
        if changed:
            raise ValueError(f"--resume {folder}: a run can't go on with other flags: {', '.join(changed)}")
        return args


def bounded(kind, text, fits):
    """The type of a flag: an int or float that `fits`; of any other tyro says that it must be as in `text`."""

    def parse(words):
        value = kind(words[0])
        if not fits(value):
            raise ValueError(f"must be {text}")
        return value

    metavar, is_given = f"{kind.__name__.upper()} {text}", lambda value: value is not None
    return Annotated[kind, PrimitiveConstructorSpec(1, metavar, parse, is_given, lambda value: [str(value)])]


Count = bounded(int, ">=1", lambda value: value >= 1)
Natural = bounded(int, ">=0", lambda value: value >= 0)
Positive = bounded(float, ">0", lambda value: value > 0)
Share = bounded(float, ">=0, <=1", lambda value: 0 <= value <= 1)


if __name__ == "__main__":
    arguments = parse_args()
    try:
        results = play(arguments) if arguments.play else train(arguments)
        if RANK == 0:
            print(f"results in {results}")
    except (FloatingPointError, OSError) as error:  # OSError: a full disk, a dead process, what an environment raised
        advice = "; the last checkpoint, if one was due, is intact: go on from it with --resume"
        sys.exit(f"error: {error}{'' if arguments.play else advice}")
    except KeyboardInterrupt:  # before the first frame, or of --play
        sys.exit(130)
