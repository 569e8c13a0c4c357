"""VLM-RM in one file: SAC learns tasks from sentences, with a CLIP model as the reward function.

Episodes are collected in parallel rendered environments, one batched CLIP pass scores every frame by how well it
matches `--goal`, the labelled transitions go to a replay buffer, and SAC learns from it. This is algorithm 1 of
Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning" (ICLR 2024, arXiv
2310.12921), cited below as VLM-RM. The defaults are its humanoid settings. Several goals make one language-conditioned
policy, and `--reward binary` is the reward of Baumli et al., "Vision-Language Models as a Source of Rewards" (2023,
arXiv 2312.09187), cited as VLM-SR.

    python sac_vlmrm.py --goal "a humanoid robot kneeling" --clip ViT-L-14
    python sac_vlmrm.py --goal "a humanoid robot kneeling" "a humanoid robot lying on its back" --clip ViT-bigG-14
    python sac_vlmrm.py --reward env --env-id Hopper-v5 --early-termination --episode-length 1000 --num-envs 1
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.15.0",
#     "torchvision==0.29.2",
#     "open_clip_torch==3.3.0",
#     "huggingface_hub==2.4.0",
#     "gymnasium==1.4.0",
#     "mujoco==4.0.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "imageio==2.37.0",
#     "imageio-ffmpeg==0.6.0",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "tqdm==4.70.1",
# ]
# ///
import contextlib
import copy
import difflib
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported: render without a window

EGL_ADVICE = "install OpenGL without a display: apt-get install libegl1 libgl1-mesa-dri, or the GPU driver's EGL"
try:
    import mujoco
except (ImportError, AttributeError, OSError) as error:  # what PyOpenGL raises where there is no libEGL
    print(f"error: MUJOCO_GL={os.environ.get('MUJOCO_GL')} does not work here ({error}); {EGL_ADVICE}", file=sys.stderr)
    sys.exit(2)
import gymnasium as gym
import huggingface_hub
import imageio
import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ---- run ----
    seed: int = 1
    """seed of the networks, the exploration and the episodes' starts"""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; auto is CUDA where there is one"""
    run_dir: Path | None = None
    """folder of this run (default: a new one under runs/)"""
    resume: Path | None = None
    """go on with the run in this folder, with its flags; only how long, how often and where it runs may be changed"""
    total_timesteps: int = 10_000_000
    """environment frames to train for, counted over all environments"""
    eval_every: int = 128_000
    """frames between evaluations"""
    eval_episodes: int = 8
    """deterministic episodes of an evaluation"""
    checkpoint_every: int = 20_000
    """frames between checkpoints"""
    video: bool = True
    """record an episode of each evaluation and goal"""
    save_rollouts: bool = True
    """save the states and rewards of each evaluation's episodes, to be rendered and judged again"""
    track: bool = False
    """mirror the TensorBoard logs to Weights & Biases (needs `pip install wandb`)"""

    # ---- task and prompts ----
    env_id: str = "Humanoid-v5"
    """Gymnasium id: continuous actions, `rgb_array` rendering"""
    goal: tuple[str, ...] = ("a humanoid robot kneeling",)
    """the task, in words that describe the state to reach; several make the policy language-conditioned (VLM-SR)"""
    eval_goal: tuple[str, ...] = ()
    """goals, or other words for one, that are never trained on but evaluated; with several goals only"""
    baseline: str = "a humanoid robot"
    """the neutral prompt of the goal-baseline regularisation"""
    alpha: float = 0.0
    """strength of the goal-baseline regularisation, 0 (plain cosine, the paper's humanoid setting) to 1"""
    template: tuple[str, ...] = ("{}",)
    """prompt templates, "{}" is the prompt; the embeddings of several are averaged"""
    reward: Literal["regularized", "binary", "env"] = "regularized"
    """what is trained on: VLM-RM's CLIP reward, VLM-SR's, or the environment's own (no CLIP, renders only videos)"""
    negatives: tuple[str, ...] = ()
    """prompts that a goal competes with in the binary reward, beside the other goals"""
    temperature: float = 0.01
    """of the binary reward's softmax over cosines; CLIP models are trained with about 0.01"""
    threshold: float = 0.5
    """the binary reward is 1 where the goal's probability is above this"""
    terminate_on_success: bool = False
    """end an episode where the binary reward is 1 (VLM-SR); frames are then labelled at each step, which is slower"""

    # ---- CLIP ----
    clip: str = "ViT-L-14"
    """open_clip architecture, `hf-hub:ORG/NAME`, or a directory that holds an open_clip_config.json and weights"""
    clip_pretrained: str | None = None
    """tag of an architecture's weights (default: the paper's for its models, else one trained on LAION-2B)"""
    clip_batch_size: int = 256
    """frames a CLIP forward pass"""
    clip_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """autocast of the encoders; auto is bf16 on CUDA and fp32 on CPU"""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """frames that are not square: shortest crops, longest pads, squash squeezes (default: the model's own setting)"""

    # ---- environment and camera ----
    num_envs: int = 8
    """environments stepped in parallel, each in a process of its own"""
    episode_length: int = 100
    """steps of an episode"""
    early_termination: bool = False
    """end an episode where the environment says so; off, since termination leaks the task (VLM-RM)"""
    render_size: int | None = None
    """pixels, height and width of a MuJoCo frame (default: the CLIP model's input size, so that nothing is resized)"""
    restyle: bool = True
    """draw MuJoCo with a sky, a tiled floor and a light robot instead of in the environment's own look"""
    camera_distance: float = 3.5
    """meters from the camera to the point it looks at"""
    camera_elevation: float = -10.0
    """degrees; negative looks down"""
    camera_azimuth: float = 180.0
    """degrees; at 180 a robot facing +x is seen from the front"""
    camera_lookat: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """meters, the point that the camera looks at"""
    camera_follow: bool = True
    """move the look-at's x and y with the robot, never its height; --no-camera-follow is the paper's fixed camera"""

    # ---- SAC: VLM-RM's humanoid settings ----
    learning_starts: int = 50_000
    """frames of uniformly random actions before learning"""
    updates_per_frame: float = 1 / 32
    """gradient updates per environment frame; the paper's "100 every 100 steps" counts steps of 32 environments"""
    batch_size: int = 512
    """transitions an update"""
    learning_rate: float = 6e-4
    """of Adam, for the actor, the critics and the entropy coefficient"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0 at --total-timesteps, so that a short run ends in a steady policy"""
    gamma: float = 0.95
    """discount factor"""
    n_step: int = 1
    """steps of reward before the critics' own estimate; several let a fast simulation's slow mistakes be seen sooner"""
    tau: float = 0.005
    """share of the critics that moves into their targets at each update"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer"""
    autotune: bool = True
    """tune the entropy coefficient towards an entropy of minus the number of action dimensions"""
    ent_coef: float = 1.0
    """the entropy coefficient, or where its tuning starts"""
    normalize_obs: bool = True
    """scale observations by their running mean and standard deviation, clipped to +-10; frozen in evaluation"""
    relabel: float = 0.5
    """with several goals, share of a batch whose goal is swapped for another one, with that goal's reward"""


# What may differ when a run is resumed: nothing that is trained on depends on it, but for rounding (and the learning
# rate, with --anneal-lr, on --total-timesteps).
CHANGEABLE = ("resume", "run_dir", "device", "total_timesteps", "eval_every", "eval_episodes", "checkpoint_every",
              "video", "save_rollouts", "track", "clip_batch_size")
MAY_BE_0 = ("seed", "learning_starts")  # whole numbers that need not be positive
POSITIVE = ("learning_rate", "updates_per_frame", "ent_coef", "temperature")
SHARES = ("alpha", "gamma", "tau", "relabel")  # in [0, 1]
ACTION_SPACES = (gym.spaces.Box,)  # that the algorithm can act in
# The keys of a checkpoint.
CHECKPOINT = ("global_step", "best_return", "owed_updates", "buffer_total", "agent", "optimizers")


class RunError(Exception):
    """What ends a run without being a bug here: a dead worker, a diverged simulation, a NaN."""


def fail(message):
    """Ends the program over a mistake that the user can mend: one line, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- the CLIP reward


def regularized_reward(frames, goals, baseline, alpha):
    """Goal-baseline regularised reward (VLM-RM), L being the line through baseline b and goal g:

        R(s) = 1 - 1/2 || alpha proj_L(s) + (1 - alpha) s - g ||^2

    Takes L2-normalised embeddings of frames s [N, D], goals g [G, D] and the baseline b [D], and alpha in [0, 1]: 0 is
    the cosine of s and g, 1 keeps only what lies along g - b. Returns the reward of every frame for every goal, [N, G].
    """
    directions = F.normalize(goals - baseline, dim=-1)  # [G, D]
    offsets = frames[:, None, :] - goals  # s - g, [N, G, D]
    along = (offsets * directions).sum(-1, keepdim=True) * directions  # proj_L(s) - g, as g is on L: no D x D matrix
    return 1.0 - 0.5 * (alpha * along + (1.0 - alpha) * offsets).square().sum(-1)


def binary_reward(frames, goals, negatives, temperature, threshold):
    """Thresholded softmax reward of VLM-SR, T being the goals and the negatives:

        p(l | o) = exp(f(o).g(l) / temperature) / sum over l' in T of exp(f(o).g(l') / temperature)
        r = 1[p(l | o) > threshold]

    Takes L2-normalised embeddings of frames f(o) [N, D], goals [G, D] and negatives [M, D], M may be 0: each goal is a
    negative of the others. Returns 0 or 1 for every frame and goal, [N, G].
    """
    # In float64: at a low temperature float32's rounding of a cosine would decide between two close prompts.
    logits = frames.double() @ torch.cat([goals, negatives]).double().T / temperature  # [N, G + M]
    return (logits.softmax(-1)[:, : len(goals)] > threshold).float()


PAPER_WEIGHTS = {"RN50": "openai", "ViT-L-14": "laion2b_s32b_b82k", "ViT-H-14": "laion2b_s32b_b79k",
                 "ViT-bigG-14": "laion2b_s39b_b160k"}  # the models that VLM-RM compares


def resolve_clip(clip, pretrained):
    """Finds a CLIP model's weights, downloading what is not cached, without loading them.

    Returns the name and tag that `open_clip.create_model` takes, and the input size in pixels. Ends the program where
    open_clip would only warn: over missing weights (it makes random ones) and over a wrong activation.
    """
    if Path(clip).is_dir():
        files = {path.name for path in Path(clip).iterdir()}
        if "open_clip_config.json" not in files or not any(f.endswith((".safetensors", ".bin", ".pth")) for f in files):
            fail(f"--clip {clip}: the directory needs an open_clip_config.json and an open_clip_model.safetensors")
        name, tag = f"local-dir:{clip}", None
    elif clip.startswith("hf-hub:"):
        name, tag = clip, None
    else:
        name = clip.replace("/", "-")
        if name not in open_clip.list_models():
            near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 4, 0.3))
            fail(f"--clip {clip}: neither a directory nor an open_clip architecture (near: {near})")
        tags = open_clip.list_pretrained_tags_by_model(name)
        tag = pretrained or PAPER_WEIGHTS.get(name.removesuffix("-quickgelu"))
        tag = tag or next((t for t in tags if "laion2b" in t), (tags or [None])[-1])
        if tag not in tags:
            fail(f"--clip-pretrained {tag}: no such weights of {name}; there are: {', '.join(tags) or 'none'}")
        quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        if quick != open_clip.get_model_config(name).get("quick_gelu", False):
            other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
            fail(f"--clip {clip}: the {tag} weights were trained with another activation: use --clip {other} "
                 f"--clip-pretrained {tag}")
    if pretrained and not tag:
        fail(f"--clip-pretrained {pretrained}: {clip} has weights of its own, leave the flag out")
    try:  # without a network, do not let the hub retry for a minute before it looks into its cache
        if not name.startswith("local-dir:"):
            urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=3)
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        if tag:
            open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
        elif name == clip:
            download_pretrained_from_hf(clip.removeprefix("hf-hub:"))
        size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    except Exception as error:
        fail(f"--clip {clip}: neither cached nor to be downloaded ({type(error).__name__}): connect to the network, or "
             "name a directory, such as --clip tests/tiny_clip")
    return name, tag, size if isinstance(size, int) else size[0]


def check_prompts(name, prompts):
    """Ends the program over prompts that are longer than a CLIP model's context, whose tokenizer would cut them."""
    tokenizer = open_clip.get_tokenizer(name)
    for prompt in prompts:
        words = prompt.split()
        while len(words) > 1 and torch.equal(tokenizer([" ".join(words[:-1])]), tokenizer([prompt])):
            words.pop()
        if len(words) < len(prompt.split()):
            fail(f'the prompt "{prompt}" is too long for the model, which would not see anything after "{words[-1]}"')


class CLIP:
    """An open_clip model that embeds frames and prompts; `name` and `pretrained` as from `resolve_clip`.

    `resize_mode` is open_clip's, for frames that do not have the model's input size; None is the model's own.

    Raises RuntimeError if weights were not loaded into the whole model.
    """

    def __init__(self, name, pretrained, device, precision="auto", batch_size=256, resize_mode=None):
        self.device, self.batch_size = torch.device(device), batch_size
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.autocast_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        # Without require_pretrained missing weights leave a random model; without eval BatchNorm is in training mode.
        self.model = open_clip.create_model(name, pretrained, device=self.device, require_pretrained=True)
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.model))
        config.resize_mode = resize_mode or config.resize_mode
        self.transform, self.size = image_transform_v2(config, is_train=False), config.input_size[1:]  # (h, w)
        self.mean = torch.tensor(config.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(config.std, device=self.device).view(1, 3, 1, 1)

    def autocast(self):
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    @torch.no_grad()
    def encode_text(self, prompts, templates=("{}",)):
        """Embeds each prompt as the mean over its templated, normalised embeddings: [prompts, D] float32.

        As in VLM-RM's code, the mean of an ensemble is not normalised again.
        """
        tokens = self.tokenizer([t.replace("{}", p) for p in prompts for t in templates]).to(self.device)
        with self.autocast():
            embeddings = self.model.encode_text(tokens)
        embeddings = F.normalize(embeddings.float(), dim=-1)
        return embeddings.view(len(prompts), len(templates), -1).mean(1)

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
        if tuple(frames.shape[1:3]) != self.size:  # frames rendered at the model's size, the usual case, need no resize
            return torch.stack([self.transform(Image.fromarray(frame.numpy())) for frame in frames]).to(self.device)
        images = frames.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # uint8 until it is on the device
        return (images.float() / 255.0 - self.mean) / self.std


def make_score(args, clip):
    """Embeds the prompts and returns the reward function of `args`, with the embeddings of the goals, [G + E, D].

    The function takes frames uint8 [n, H, W, 3] to rewards [n, G + E], for the G goals and then the E held-out ones,
    all from one pass of the image encoder. Among binary rewards the goals compete with each other and the negatives,
    and a held-out goal also with the goals that are trained on.
    """
    n, m = len(args.goal), len(args.goal) + len(args.eval_goal)
    text = clip.encode_text([*args.goal, *args.eval_goal, *args.negatives, args.baseline], args.template)
    goals, negatives, baseline = text[:m], text[m:-1], text[-1]

    def score(frames):
        embeddings = clip.encode_images(frames)
        if args.reward == "regularized":
            return regularized_reward(embeddings, goals, baseline, args.alpha).cpu().numpy()
        sets = ((goals[:n], negatives), (goals[n:], torch.cat([goals[:n], negatives])))
        rewards = [binary_reward(embeddings, *prompts, args.temperature, args.threshold) for prompts in sets]
        return torch.cat(rewards, 1).cpu().numpy()

    return score, goals


def goal_inputs(goals, trained):
    """What a policy sees of goals [G, D], the first `trained` of which it learns: [G, D], or [G, 0] if that is one.

    Embeddings of sentences about one robot have most in common: they are centred on the mean of the trained goals and
    scaled to a root mean square of 1, so that the networks can tell them apart.
    """
    if trained == 1:
        return goals[:, :0]
    centred = goals - goals[:trained].mean(0)
    return centred / centred[:trained].square().mean().sqrt()


# ---------------------------------------------------------------- the rendered environments


def build_scene(xml_path, restyle):
    """Compiles an environment's XML for rendering, in its own look or in ours: a `mujoco.MjModel` with the same qpos.

    Our look is procedural, and spares what only costs time at a CLIP's resolution: multisampling, shadows, reflections,
    fine meshes.
    """
    spec = mujoco.MjSpec.from_file(str(xml_path))
    if not restyle:
        return spec.compile()
    quality = spec.visual.quality
    quality.offsamples, quality.shadowsize, quality.numslices, quality.numstacks, quality.numquads = 0, 0, 16, 8, 1
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)
    for texture in list(spec.textures):
        if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            spec.delete(texture)
    spec.add_texture(name="vlmrm_sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=256, height=256,
                     builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT, rgb1=(0.45, 0.55, 0.7), rgb2=(0.15, 0.2, 0.3))
    spec.add_texture(name="vlmrm_tiles", type=mujoco.mjtTexture.mjTEXTURE_2D, width=256, height=256,
                     builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER, rgb1=(0.22, 0.25, 0.28), rgb2=(0.42, 0.45, 0.48))
    floor = spec.add_material(name="vlmrm_floor", texuniform=True, texrepeat=(1, 1), reflectance=0.0)
    floor.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "vlmrm_tiles"
    spec.add_material(name="vlmrm_robot", reflectance=0.0, specular=0.3, shininess=0.3)

    def paint(body, depth):
        for geom in body.geoms:
            if geom.type == mujoco.mjtGeom.mjGEOM_PLANE:
                geom.material, geom.rgba = "vlmrm_floor", (1, 1, 1, 1)
                geom.size[2] = 5.0  # meters a mesh cell: with the Humanoid's 0.125 the floor alone takes 3 ms a frame
            elif geom.rgba[3] > 0:  # keep what is invisible invisible
                shade = 0.85 if depth % 2 else 0.7  # two tones, so that a limb stands out from the one behind it
                geom.material, geom.rgba = "vlmrm_robot", (shade, shade, shade + 0.02, geom.rgba[3])
        for child in body.bodies:
            paint(child, depth + 1)

    paint(spec.worldbody, 0)
    if spec.geom("head") and spec.body("torso") and spec.body("pelvis"):
        # The bare humanoid looks the same from the front and the back: a visor, a chest and a back tell them apart.
        marks = [("torso", (0.065, 0, 0.2), (0.035, 0.065, 0.025), (0.08, 0.08, 0.1)),
                 ("torso", (0.045, 0, 0.0), (0.035, 0.08, 0.05), (0.15, 0.35, 0.75)),
                 ("torso", (-0.045, 0, 0.0), (0.035, 0.08, 0.05), (0.75, 0.2, 0.15)),
                 ("pelvis", (0.04, 0, 0.0), (0.04, 0.07, 0.04), (0.15, 0.35, 0.75)),
                 ("pelvis", (-0.08, 0, 0.0), (0.04, 0.07, 0.04), (0.75, 0.2, 0.15))]
        for body, pos, size, rgb in marks:
            spec.body(body).add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=pos, size=size, rgba=(*rgb, 1), mass=0,
                                     material="vlmrm_robot", contype=0, conaffinity=0)
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
        self.size, self.lookat, self.follow = size, tuple(lookat), follow
        self.camera = mujoco.MjvCamera()
        self.camera.distance, self.camera.elevation, self.camera.azimuth = distance, elevation, azimuth
        self.renderer = None

    def __call__(self, qpos):
        """The frame of one state, uint8 [H, W, 3]. OpenGL starts at the first one."""
        if self.renderer is None:
            SceneRenderer.opened_by = os.getpid()
            self.model.vis.global_.offheight, self.model.vis.global_.offwidth = self.size
            self.renderer = mujoco.Renderer(self.model, *self.size)
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        offset = (*self.data.xpos[1][:2], 0.0) if self.follow else (0.0, 0.0, 0.0)  # body 1 is the robot's root
        self.camera.lookat[:] = np.add(self.lookat, offset)
        self.renderer.update_scene(self.data, self.camera)
        return self.renderer.render()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


class RenderedEnv(gym.Wrapper):
    """Adds the frame of each state to its observation, which the vector environment's shared memory carries.

    Observations are {"state": float32 [S], "pixels": uint8 [H, W, 3]} and, for MuJoCo, "qpos": float64 [nq]; continuous
    actions are in [-1, 1]. MuJoCo is rendered at `frame_shape`, any other environment has it already. `scene` is what
    SceneRenderer takes.
    """

    def __init__(self, env_id, episode_length, early_termination, frame_shape, scene):
        env = gym.make(env_id, render_mode="rgb_array", max_episode_steps=episode_length, disable_env_checker=True)
        if isinstance(env.action_space, gym.spaces.Box):
            env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        super().__init__(gym.wrappers.FlattenObservation(env))
        self.early_termination = early_termination
        self.rendering = True  # set to False where nobody looks
        self.blank = np.zeros(frame_shape, np.uint8)
        spaces = {"state": gym.spaces.Box(-np.inf, np.inf, self.env.observation_space.shape, np.float32),
                  "pixels": gym.spaces.Box(0, 255, frame_shape, np.uint8)}
        self.renderer = None
        if isinstance(self.unwrapped, MujocoEnv):
            self.renderer = SceneRenderer(self.unwrapped.fullpath, frame_shape[:2], **scene)
            spaces["qpos"] = gym.spaces.Box(-np.inf, np.inf, (self.unwrapped.model.nq,), np.float64)
        self.observation_space = gym.spaces.Dict(spaces)

    def observe(self, state):
        observation = {"state": state.astype(np.float32), "pixels": self.blank}
        if self.renderer:
            observation["qpos"] = self.unwrapped.data.qpos
        if self.rendering:
            observation["pixels"] = self.renderer(self.unwrapped.data.qpos) if self.renderer else self.env.render()
        return observation

    def reset(self, *, seed=None, options=None):
        state, _ = self.env.reset(seed=seed, options=options)
        return self.observe(state), {}

    def step(self, action):
        try:
            state, reward, terminated, truncated, _ = self.env.step(action)  # infos are dropped: pickling costs time
        except Exception as error:
            raise RunError(f"the environment raised {type(error).__name__}: {error}") from error
        return self.observe(state), float(reward), bool(terminated and self.early_termination), truncated, {}

    def close(self):
        if self.renderer:
            self.renderer.close()
        super().close()


def probe_environment(env_id, scene):
    """Makes and renders an environment once: the shape of its frames, or None for MuJoCo, which can have any.

    Raises ValueError if its actions are none of ACTION_SPACES or have no bounds, or it has no rgb_array rendering.
    """
    env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
    if not isinstance(env.action_space, ACTION_SPACES):
        needed = " or ".join(space.__name__ for space in ACTION_SPACES)
        raise ValueError(f"this script needs actions in a {needed}, not {env.action_space}: choose another environment")
    if isinstance(env.action_space, gym.spaces.Box) and not env.action_space.is_bounded():
        raise ValueError("its actions have no bounds: choose another environment")
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise ValueError("it has no rgb_array rendering for CLIP to look at: choose another environment")
    env.reset(seed=0)
    if not isinstance(env.unwrapped, MujocoEnv):
        shape = env.render().shape
        env.close()  # pygame catches SIGTERM while it is open, and the pool could not end this process
        return shape
    SceneRenderer(env.unwrapped.fullpath, (64, 64), **scene)(env.unwrapped.data.qpos)


@contextlib.contextmanager
def make_envs(args, frame_size):
    """Context of the vector of rendered environments; MuJoCo's frames are `frame_size` pixels high and wide.

    The workers are gone when it ends, however it ends.
    Autoreset is disabled: the frame at the end of an episode is that of its last state, not of the next one's first.
    Observations are views of shared memory that the next step overwrites.
    """
    scene = dict(distance=args.camera_distance, elevation=args.camera_elevation, azimuth=args.camera_azimuth,
                 lookat=args.camera_lookat, follow=args.camera_follow, restyle=args.restyle)
    # Spawned workers would each import torch again (seconds, 500 MB); forking after OpenGL or CUDA has started hangs.
    forkable = sys.platform == "linux" and SceneRenderer.opened_by != os.getpid() and not torch.cuda.is_initialized()
    context = multiprocessing.get_context("fork" if forkable else "spawn")
    rendering = f"rendering with MUJOCO_GL={os.environ.get('MUJOCO_GL')}"
    try:
        with context.Pool(1) as pool:  # OpenGL starts in a process of its own, not in this one
            shape = pool.apply_async(probe_environment, (args.env_id, scene)).get(timeout=60)
    except multiprocessing.TimeoutError:
        fail(f"{rendering} gives no frame within 60 seconds; {EGL_ADVICE}")
    except ImportError as error:
        fail(f"{rendering} fails ({error}); {EGL_ADVICE}")
    except Exception as error:
        fail(f"--env-id {args.env_id}: {error}")
    if shape and shape[0] != shape[1] and args.reward != "env" and not args.image_resize_mode:
        print(f"warning: frames of {args.env_id} are {shape[0]} pixels high and {shape[1]} wide; most CLIP models see "
              "the square in the middle only; --image-resize-mode longest shows them all", file=sys.stderr)
    make = functools.partial(RenderedEnv, args.env_id, args.episode_length, args.early_termination,
                             shape or (frame_size, frame_size, 3), scene)
    # Inherited: a signal to the whole process group (Ctrl-C, Slurm's) is the main process's to answer.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    envs = gym.vector.AsyncVectorEnv([make] * args.num_envs, copy=False, context=context.get_start_method(),
                                     autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        envs.reset_async()
        envs.reset_wait(timeout=120)
        yield envs
    except multiprocessing.TimeoutError:
        fail(f"{rendering} hangs with {args.num_envs} processes: use --num-envs 1, or another MUJOCO_GL")
    except (EOFError, ConnectionError):
        for index, process in enumerate(envs.processes):
            process.join(0.1)
            if not process.is_alive():
                raise RunError(f"the process of environment {index} died (exit code {process.exitcode})") from None
        raise
    finally:
        for process in envs.processes:
            process.kill()
            process.join()
        envs.closed = True  # its own close() would wait for answers


def episode_seeds(*key, n):
    """Seeds of `n` episodes that depend on `key` alone, so that a run can be repeated from any point of it."""
    return [int(seed) for seed in np.random.SeedSequence(key).generate_state(n)]


# ---------------------------------------------------------------- the networks


class RunningNorm(nn.Module):
    """Scales vectors by the mean and standard deviation of all it was updated with, clipped to +-10."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))

    def update(self, x):
        """Merges a batch [N, dim] into the statistics (parallel variance, Chan et al. 1979)."""
        n, total, delta = len(x), self.count + len(x), x.double().mean(0) - self.mean
        var = x.double().var(0, correction=0)
        self.var.copy_((self.count * self.var + n * var + delta**2 * self.count * n / total) / total)
        self.mean += delta * n / total
        self.count.copy_(total)

    def forward(self, x):
        return ((x - self.mean.float()) * (self.var.float() + 1e-8).rsqrt()).clamp(-10.0, 10.0)


def mlp(inputs, outputs, hidden=256):
    """Two hidden layers of 256 with ReLU, as VLM-RM has them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs))


class Actor(nn.Module):
    """A Gaussian squashed to (-1, 1) by tanh (Haarnoja et al. 2018, appendix C)."""

    def __init__(self, input_dim, action_dim):
        super().__init__()
        self.net = mlp(input_dim, 2 * action_dim)

    def forward(self, inputs):
        """Mean and log standard deviation before the tanh, each [B, A], for states with their goals [B, S + D]."""
        mean, log_std = self.net(inputs).chunk(2, -1)
        return mean, -5.0 + 3.5 * (torch.tanh(log_std) + 1.0)  # in [-5, 2], as CleanRL has it

    def sample(self, inputs):
        """Actions [B, A] and their log-probabilities [B]."""
        mean, log_std = self(inputs)
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        log_prob = log_prob - 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))  # log(1 - tanh(x)^2) without underflow
        return torch.tanh(x), log_prob.sum(-1)


class Critic(nn.Module):
    """Two independent soft Q-functions; the smaller one counters overestimation (Fujimoto et al. 2018)."""

    def __init__(self, input_dim, action_dim):
        super().__init__()
        self.q1, self.q2 = mlp(input_dim + action_dim, 1), mlp(input_dim + action_dim, 1)

    def forward(self, inputs, actions):
        """Both values of each pair, [2, B]."""
        x = torch.cat([inputs, actions], -1)
        return torch.stack([self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)])


class SAC(nn.Module):
    """Soft actor-critic with two critics and a tuned entropy coefficient (Haarnoja et al. 2018, arXiv 1812.05905).

    `goals` [G, D] is what it sees of each goal beside the state, from `goal_inputs`; None is one goal, unseen.
    """

    def __init__(self, args, state_dim, action_dim, goals=None):
        super().__init__()
        self.args, self.target_entropy = args, -float(action_dim)
        self.normalizer = RunningNorm(state_dim) if args.normalize_obs else nn.Identity()
        self.register_buffer("goals", torch.zeros(1, 0) if goals is None else goals)
        input_dim = state_dim + self.goals.shape[1]
        self.actor, self.critic = Actor(input_dim, action_dim), Critic(input_dim, action_dim)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_ent_coef = nn.Parameter(torch.tensor(math.log(args.ent_coef)))

    def make_optimizers(self):
        """Adam for the actor, the critic and the entropy coefficient; call it once the agent is on its device."""
        adam = functools.partial(torch.optim.Adam, lr=self.args.learning_rate, fused=True)
        self.optimizers = {"actor": adam(self.actor.parameters()), "critic": adam(self.critic.parameters()),
                           "ent_coef": adam([self.log_ent_coef])}

    def inputs(self, states, goals):
        """What the networks see of raw states [B, S] and indices of goals [B]: [B, S + D]."""
        return torch.cat([self.normalizer(states), self.goals[goals]], -1)

    @torch.no_grad()
    def act(self, states, goals, deterministic=False):
        """Actions in [-1, 1] for raw states [N, S] and goals [N] (indices): numpy to numpy [N, A]."""
        inputs = self.inputs(*(torch.as_tensor(x, device=self.goals.device) for x in (states, goals)))
        actions = torch.tanh(self.actor(inputs)[0]) if deterministic else self.actor.sample(inputs)[0]
        return actions.cpu().numpy()

    def update(self, batch):
        """One gradient step of the critics, the actor and the entropy coefficient; returns losses as 0-d tensors."""
        states, next_states = (self.inputs(batch[name], batch["goals"]) for name in ("states", "next_states"))
        ent_coef = self.log_ent_coef.detach().exp()

        with torch.no_grad():
            next_actions, next_log_prob = self.actor.sample(next_states)
            next_q = self.critic_target(next_states, next_actions).min(0).values - ent_coef * next_log_prob
            discounts = batch["discounts"]
            if self.args.terminate_on_success:
                discounts = discounts * (1.0 - batch["rewards"])  # success at the batch's goal, swapped or not
            target = batch["rewards"] + discounts * next_q  # [B]
        q = self.critic(states, batch["actions"])  # [2, B]
        critic_loss = (q - target).square().mean(1).sum()
        self.step("critic", critic_loss)

        actions, log_prob = self.actor.sample(states)
        self.critic.requires_grad_(False)  # the actor's loss needs gradients of the actions only
        actor_loss = (ent_coef * log_prob - self.critic(states, actions).min(0).values).mean()
        self.step("actor", actor_loss)
        self.critic.requires_grad_(True)

        if self.args.autotune:
            self.step("ent_coef", -self.log_ent_coef * (log_prob.detach() + self.target_entropy).mean())

        with torch.no_grad():
            for parameter, slow in zip(self.critic.parameters(), self.critic_target.parameters(), strict=True):
                slow.lerp_(parameter, self.args.tau)
        return {"critic_loss": critic_loss.detach(), "actor_loss": actor_loss.detach(), "q_values": q.detach().mean(),
                "ent_coef": ent_coef, "entropy": -log_prob.detach().mean()}

    def step(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()


# ---------------------------------------------------------------- the replay buffer


def n_step_returns(rewards, next_states, terminated, ended, gamma, n):
    """Looks n steps ahead from each step of a phase, or to its episode's end; arrays are [T, N, ...].

    Returns the discounted sums of rewards [T, N, G], the states they lead to [T, N, S], and what the value of those
    counts [T, N]: gamma to the number of steps, or 0 if the state is terminal. It is not 0 at a time limit: a truncated
    episode is bootstrapped from its real last state.
    """
    returns, reached, discounts = rewards.copy(), next_states.copy(), gamma * (1.0 - terminated)
    goes_on = ~ended
    for k in range(1, min(n, len(ended))):
        here = goes_on[:-k]  # the episode of step t has a step t + k
        returns[:-k][here] += gamma**k * rewards[k:][here]
        reached[:-k][here] = next_states[k:][here]
        discounts[:-k][here] = gamma ** (k + 1) * (1.0 - terminated[k:][here])
        goes_on[:-k] &= ~ended[k:]
    return returns, reached, discounts.astype(np.float32)


class ReplayBuffer:
    """The last `capacity` labelled transitions, one row each, on the training device: sampling needs no transfer.

    A row holds the transition's reward for every goal, so that what was collected for one goal can serve all others.
    """

    def __init__(self, capacity, state_dim, action_dim, device, goals=1):
        self.capacity, self.total, self.saved = capacity, 0, 0  # rows it holds, was ever given, has on disk
        self.names = ("states", "actions", "rewards", "next_states", "discounts", "goals")
        self.widths = (state_dim, action_dim, goals, state_dim, 1, 1)
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # memory is taken as it fills

    def add(self, **transitions):
        """Stores N <= capacity transitions, each value [N, ...] and the rewards [N, goals], over the oldest ones."""
        n = len(transitions["rewards"])
        rows = torch.cat([transitions[name].reshape(n, -1).to(self.rows) for name in self.names], 1)
        self.rows[torch.arange(self.total, self.total + n) % self.capacity] = rows
        self.total += n

    def sample(self, batch_size, relabel=0.0):
        """A uniform batch, with replacement: name -> [B, ...].

        A share `relabel` of it gets another goal than it was collected for; rewards [B] are those for the goals [B].
        """
        index = torch.randint(min(self.total, self.capacity), (batch_size,), device=self.rows.device)
        batch = dict(zip(self.names, self.rows[index].split(self.widths, 1), strict=True))
        goals, n = batch["goals"].long(), batch["rewards"].shape[1]
        if relabel and n > 1:
            other = (goals + torch.randint(1, n, goals.shape, device=goals.device)) % n
            goals = torch.where(torch.rand(goals.shape, device=goals.device) < relabel, other, goals)
        batch |= {"goals": goals, "rewards": batch["rewards"].gather(1, goals)}
        return batch | {name: batch[name].squeeze(1) for name in ("rewards", "discounts", "goals")}

    def save(self, path):
        """Writes the rows that are new since the last call, at most `capacity`, to a ring of twice the capacity.

        So a checkpoint costs what is new, not the buffer, and never overwrites a row that the checkpoint before needs.
        """
        ring = 2 * self.capacity
        with open(path, "r+b" if path.exists() else "wb") as file:
            while self.saved < self.total:
                n = min(self.total - self.saved, ring - self.saved % ring)  # up to the end of the ring
                rows = self.rows[torch.arange(self.saved, self.saved + n) % self.capacity].cpu().numpy()
                file.seek(self.saved % ring * rows[0].nbytes)
                file.write(rows)
                self.saved += n
            file.flush()
            os.fsync(file.fileno())

    def load(self, path, total):
        """Reads the buffer as it was when it had been given `total` rows; ValueError if the file is too short."""
        width, index = sum(self.widths), np.arange(max(0, total - self.capacity), total)
        if total:
            ring = np.memmap(path, np.float32, "r")
            ring = ring[: len(ring) // width * width].reshape(-1, width)
            if (index % (2 * self.capacity)).max() >= len(ring):
                raise ValueError(f"{path} is truncated")
            self.rows[index % self.capacity] = torch.from_numpy(ring[index % (2 * self.capacity)]).to(self.rows)
        self.total = self.saved = total


# ---------------------------------------------------------------- checkpoints, evaluation, video


def save_atomically(checkpoint, path):
    """Replaces a checkpoint such that a kill at any instant, or a full disk, leaves the old one or the new one."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_checkpoint(path):
    """A checkpoint's dict; loading it runs nothing that a crafted file could hold. Ends the program if it is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in CHECKPOINT}
    except FileNotFoundError:
        fail(f"--resume: there is no {path}")
    except Exception as error:
        fail(f"--resume: {path} is truncated or no checkpoint of this script ({type(error).__name__})")


def evaluate(envs, policy, score, episodes, episode_length, seed, end_at_success=False):
    """Plays deterministic episodes, always from the same starts, and scores their frames.

    Args:
        policy: states [N, S] to actions [N, ...].
        score: frames uint8 [n, H, W, 3] to rewards [n], or None.
        end_at_success: whether an episode counts only up to its first reward of 1.
    Returns:
        dict of arrays: "clip_rewards" and "env_rewards" [episodes, T] (0 after an early termination), "lengths"
        [episodes], "qpos" [episodes, T, nq] for MuJoCo, and "frames" [T, H, W, 3] of the first episode. What is at t
        belongs to the state after step t.
    """
    rounds = []
    seeds = episode_seeds(seed, 1, n=episodes + envs.num_envs)
    for start in range(0, episodes, envs.num_envs):
        observation, _ = envs.reset(seed=seeds[start : start + envs.num_envs])
        alive, steps = np.ones(envs.num_envs, bool), []
        for _ in range(episode_length):
            observation, rewards, terminated, _, _ = envs.step(policy(observation["state"]))
            step = {name: value.copy() for name, value in observation.items() if name != "state"}
            steps.append({**step, "env_rewards": rewards, "alive": alive.copy()})
            alive &= ~terminated
        steps = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}  # [N, T, ...]
        pixels = steps.pop("pixels")
        if score:
            clip_rewards = score(pixels.reshape(-1, *pixels.shape[2:])).reshape(steps["alive"].shape)
            if end_at_success:
                steps["alive"] &= np.cumsum(clip_rewards, 1) - clip_rewards == 0
            steps["clip_rewards"] = clip_rewards * steps["alive"]
        steps["env_rewards"] *= steps["alive"]
        if start == 0:
            frames = pixels[0]
        rounds.append(steps)
    result = {name: np.concatenate([steps[name] for steps in rounds])[:episodes] for name in rounds[0]}
    return {**result, "lengths": result.pop("alive").sum(1), "frames": frames}


def write_video(path, frames, rewards, fps=30):
    """Writes frames [T, H, W, 3] as an mp4 with its reward on each frame, enlarged so that it can be read."""
    scale = -(-384 // frames.shape[1])
    low, high = float(np.min(rewards)), float(np.max(rewards))
    with imageio.get_writer(path, fps=fps, macro_block_size=2, output_params=["-loglevel", "error"]) as writer:
        for t, (frame, reward) in enumerate(zip(frames, rewards, strict=True)):
            image = Image.fromarray(frame).resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.NEAREST)
            draw = ImageDraw.Draw(image)
            width = (reward - low) / max(high - low, 1e-8) * (image.width - 16)  # the bar spans this episode's rewards
            draw.rectangle((8, image.height - 14, 8 + width, image.height - 8), fill=(255, 200, 0))
            draw.text((8, 6), f"step {t + 1}   reward {reward:+.4f}", fill=(255, 255, 255), font_size=18)
            writer.append_data(np.asarray(image))


def slug(text):
    """A sentence as a part of a file's or a curve's name."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:80]


def episode_charts(args, ended, env_rewards, clip_rewards, goals):
    """Mean return and length of the episodes that ended in a phase, for the log; of their parts, if none ended.

    Everything is [T, N]: `ended` is true at an episode's last step, `goals` are indices; `clip_rewards` may be None.
    Where episodes may end early, this favours short ones, since the phase's end cuts the others: judge by `eval/*`.
    """
    last = ended.copy()
    last[-1] = True  # the end of the phase cuts the episodes that go on
    stops = np.flatnonzero(last.T)  # in [N, T], where an episode's steps are neighbours
    counted = ended.T.ravel()[stops] if ended.any() else np.ones(len(stops), bool)
    starts, goals = np.append(0, stops[:-1] + 1), goals.T.ravel()[stops]

    def returns(rewards):
        return np.add.reduceat(rewards.T.ravel(), starts)

    charts = {"charts/env_return": returns(env_rewards)[counted].mean(),
              "charts/episodic_length": (stops - starts + 1)[counted].mean()}
    if clip_rewards is not None:
        charts["charts/clip_return"] = returns(clip_rewards)[counted].mean()
        for i in np.unique(goals[counted]) if len(args.goal) > 1 else ():
            charts[f"charts/clip_return/{slug(args.goal[i])}"] = returns(clip_rewards)[counted & (goals == i)].mean()
    return charts


def evaluate_goals(args, envs, agent, score, writer, run_dir, global_step):
    """Evaluates the agent on every goal, the held-out ones too; writes videos, image strips and rollouts.

    Returns the scalars to log and the mean return over the goals that are trained on: the CLIP return, or with
    `--reward env` the environment's.
    """
    charts, returns, goals = {}, [], [*args.goal, *args.eval_goal]
    envs.set_attr("rendering", score is not None or args.video)
    for index, goal in enumerate(goals):

        def policy(states, index=index):
            return agent.act(states, np.full(len(states), index), deterministic=True)

        def goal_score(frames, index=index):
            return score(frames)[:, index]

        result = evaluate(envs, policy, score and goal_score, args.eval_episodes, args.episode_length, args.seed,
                          args.terminate_on_success)
        frames, length = result.pop("frames"), result["lengths"][0]
        curve, file = (f"/{slug(goal)}", f"{global_step}-{slug(goal)}") if len(goals) > 1 else ("", f"{global_step}")
        for name in ("clip_rewards", "env_rewards"):
            if name in result:
                charts[f"eval/{name.replace('rewards', 'return')}{curve}"] = result[name].sum(1).mean()
        if args.reward == "binary":  # VLM-SR's measure: was the goal reached at all
            charts[f"eval/success_rate{curve}"] = result["clip_rewards"].any(1).mean()
        charts[f"eval/episodic_length{curve}"] = result["lengths"].mean()
        shown = result.get("clip_rewards", result["env_rewards"])
        returns.append(float(shown.sum(1).mean()))
        if score or args.video:
            strip = frames[np.linspace(0, length - 1, 8).astype(int)]  # [8, H, W, 3]
            writer.add_image(f"eval/strip{curve}", np.concatenate(list(strip), axis=1), global_step, dataformats="HWC")
        if args.video:
            write_video(run_dir / "videos" / f"{file}.mp4", frames[:length], shown[0, :length])
        if args.save_rollouts:
            np.savez_compressed(run_dir / "rollouts" / f"{file}.npz", env_id=args.env_id, goal=goal, **result)
    mean_return = float(np.mean(returns[: len(args.goal)]))
    if len(goals) > 1:
        charts["eval/clip_return"] = mean_return
    return charts, mean_return


# ---------------------------------------------------------------- training


@contextlib.contextmanager
def stop_signals():
    """Context of a list for the first SIGINT or SIGTERM, to end with a checkpoint; the second ends the run at once."""
    received = []

    def receive(number, _):
        if received:
            os._exit(128 + number)
        received.append(number)
        os.write(2, b"\nstopping after what is being computed; a second signal stops at once, without a checkpoint\n")

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_args(args):
    """Ends the program over flags that cannot work, before anything slow starts."""
    for name, value in asdict(args).items():
        flag, least = f"--{name.replace('_', '-')}", 0 if name in MAY_BE_0 else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            fail(f"{flag} must be at least {least}, not {value}")
        if name in POSITIVE and not value > 0.0:
            fail(f"{flag} must be above 0, not {value}")
        if name in SHARES and not 0.0 <= value <= 1.0:
            fail(f"{flag} must be in [0, 1], not {value}")
    goals = (*args.goal, *args.eval_goal)
    if not args.goal or not all(goal.strip() for goal in goals):
        fail("--goal is empty: describe the state to reach")
    if len({slug(goal) for goal in goals}) < len(goals):
        fail("--goal and --eval-goal name a goal twice: name each once")
    if len(goals) > 1 and args.reward == "env":
        fail("--reward env has no goals: name one --goal or none")
    if args.eval_goal and len(args.goal) == 1:
        fail("--eval-goal needs several --goal: with one, the policy does not see what it is asked for")
    if args.reward == "binary":
        if len(args.goal) + len(args.negatives) < 2:
            fail("--reward binary compares prompts: give --negatives, or several --goal")
        if set(args.negatives) & set(goals):
            fail("--negatives holds a goal, which can't compete with itself")
        if not 0.0 <= args.threshold < 1.0:
            fail(f"--threshold must be in [0, 1), not {args.threshold}")
    elif args.terminate_on_success or args.negatives:
        fail("--terminate-on-success and --negatives need --reward binary")
    if args.alpha > 0 and args.reward != "regularized":
        fail("--alpha needs --reward regularized")
    if args.alpha > 0 and args.baseline in goals:
        fail("--goal equals --baseline, which leaves no direction to regularise along: change one, or use --alpha 0")
    for template in args.template:
        if "{}" not in template:
            fail(f'--template "{template}" has no "{{}}" for the prompt')
    if args.env_id not in gym.registry and ":" not in args.env_id:
        near = ", ".join(difflib.get_close_matches(args.env_id, gym.registry, 4, 0.3))
        fail(f"--env-id {args.env_id}: no such Gymnasium environment (near: {near})")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        fail(f"--device {args.device}: use auto, cpu, cuda or cuda:N")
    if args.device.startswith("cuda") and int(args.device[5:] or 0) >= torch.cuda.device_count():
        fail(f"--device {args.device}: PyTorch finds no such CUDA device; use --device cpu")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights & Biases: pip install wandb")
    if args.run_dir and not args.resume and (args.run_dir / "args.json").exists():
        fail(f"--run-dir {args.run_dir} already holds a run: choose another folder, or --resume it")


def train(args):
    """VLM-RM's algorithm 1 with SAC. Returns the run's folder."""
    check_args(args)
    if args.buffer_size < args.episode_length * args.num_envs:
        fail(f"--buffer-size must hold at least an episode of every environment, {args.episode_length * args.num_envs}")
    if args.learning_starts >= args.total_timesteps:
        print(f"warning: --learning-starts {args.learning_starts} is not below --total-timesteps "
              f"{args.total_timesteps}: nothing will be learned", file=sys.stderr)
    if args.terminate_on_success and args.n_step > 1:
        fail("--terminate-on-success needs --n-step 1: with another goal an episode would have ended elsewhere")
    saved = load_checkpoint(args.resume / "checkpoint.pt") if args.resume else None
    run_name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    run_dir = args.resume or args.run_dir or Path("runs") / run_name
    try:
        for folder in ("videos", "rollouts"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run-dir {run_dir} can't be written: {error.strerror}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.reward != "env":
        clip_name, clip_tag, clip_size = resolve_clip(args.clip, args.clip_pretrained)
        prompts = (*args.goal, *args.eval_goal, *args.negatives, args.baseline)
        check_prompts(clip_name, [t.replace("{}", p) for p in prompts for t in args.template])
    else:
        clip_size = 224
    # Workers start before CUDA or a model is up, so that they can be forked.
    with make_envs(args, args.render_size or clip_size) as envs, stop_signals() as stopped_by:
        state_dim, action_dim = envs.single_observation_space["state"].shape[0], envs.single_action_space.shape[0]

        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str))
        if args.track:
            import wandb

            wandb.init(project="vlmrm", name=run_name, config=asdict(args), sync_tensorboard=True)
        global_step = saved["global_step"] if saved else 0
        writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # drops what was logged after the checkpoint
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()))

        n_goals, score, goals = len(args.goal), None, torch.zeros(1, 0)
        if args.reward != "env":
            try:
                clip = CLIP(clip_name, clip_tag, device, args.clip_precision, args.clip_batch_size,
                            args.image_resize_mode)
            except Exception as error:
                fail(f"--clip {args.clip}: its weights do not load ({error})")
            score, goals = make_score(args, clip)
        torch.manual_seed(args.seed)
        agent = SAC(args, state_dim, action_dim, goal_inputs(goals, n_goals)).to(device)
        agent.make_optimizers()
        buffer = ReplayBuffer(args.buffer_size, state_dim, action_dim, device, n_goals)

        best_return, owed_updates, losses = -math.inf, 0.0, {}
        if saved:
            agent.load_state_dict(saved["agent"])
            for name, optimizer in agent.optimizers.items():
                optimizer.load_state_dict(saved["optimizers"][name])
            try:
                buffer.load(run_dir / "replay.bin", saved["buffer_total"])
            except (OSError, ValueError) as error:
                fail(f"--resume {run_dir}: its replay buffer can't be read: {error}")
            best_return, owed_updates = saved["best_return"], saved["owed_updates"]

        def save(name):
            checkpoint = {"global_step": global_step, "best_return": best_return, "owed_updates": owed_updates,
                          "buffer_total": buffer.total, "agent": agent.state_dict(),
                          "optimizers": {k: optimizer.state_dict() for k, optimizer in agent.optimizers.items()}}
            try:
                if name == "checkpoint.pt":  # what it resumes with is on disk before it
                    writer.flush()
                    buffer.save(run_dir / "replay.bin")
                save_atomically(checkpoint, run_dir / name)
            except OSError as error:
                raise RunError(f"cannot write to {run_dir}: {error.strerror}") from None

        # A phase is one episode of every environment. Arrays are [T, N, ...].
        shape = (args.episode_length, args.num_envs)
        phase_frames = args.episode_length * args.num_envs
        states, next_states = np.empty((2, *shape, state_dim), np.float32)
        actions = np.empty((*shape, action_dim), np.float32)
        goals, rewards = np.empty(shape, np.int64), np.empty((*shape, n_goals), np.float32)
        env_rewards, terminated, ended = np.empty(shape, np.float32), np.empty(shape, bool), np.empty(shape, bool)
        pixels_shape = envs.single_observation_space["pixels"].shape
        pixels = np.empty((*shape, *pixels_shape), np.uint8) if score else None

        first_step, start_time = global_step, time.time()
        progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", dynamic_ncols=True,
                        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30)
        while global_step < args.total_timesteps and not stopped_by:
            previous_step, clock = global_step, [time.perf_counter()]
            # Each phase has random numbers of its own, which follow from the seed and its first frame: nothing to save.
            *starts, numpy_seed, torch_seed = episode_seeds(args.seed, 0, global_step, n=args.num_envs + 2)
            np_rng = np.random.default_rng(numpy_seed)
            torch.manual_seed(torch_seed)

            # COLLECT: one episode in every environment, into an unlabelled batch
            envs.set_attr("rendering", score is not None)
            state = envs.reset(seed=starts)[0]["state"].copy()
            goal = np_rng.integers(n_goals, size=args.num_envs)  # each episode draws one
            for t in range(args.episode_length):
                if stopped_by:
                    break
                if global_step < args.learning_starts:
                    actions[t] = np_rng.uniform(-1.0, 1.0, actions[t].shape)
                else:
                    actions[t] = agent.act(state, goal)
                observation, env_rewards[t], terminated[t], truncated, _ = envs.step(actions[t])
                # The observation is a view of shared memory that the next step or reset overwrites: copy what is kept.
                states[t], next_states[t], goals[t] = state, observation["state"], goal
                state = next_states[t].copy()
                if score:
                    pixels[t] = observation["pixels"]  # of the state after the step, an episode's last one included
                ended[t] = terminated[t] | truncated
                if args.terminate_on_success:
                    rewards[t] = score(pixels[t])[:, :n_goals]
                    ended[t] |= rewards[t, np.arange(args.num_envs), goal] > 0
                if ended[t].any() and t < args.episode_length - 1:  # an episode ended early
                    seeds = episode_seeds(args.seed, 0, global_step, t + 1, n=args.num_envs)
                    state = envs.reset(seed=seeds, options={"reset_mask": ended[t].copy()})[0]["state"].copy()
                    goal = np.where(ended[t], np_rng.integers(n_goals, size=args.num_envs), goal)
            if stopped_by:
                break  # the phase is dropped: nothing has learned from it yet
            if not np.isfinite(next_states).all():
                t, n = np.argwhere(~np.isfinite(next_states))[0, :2]
                raise RunError(f"environment {n} diverged: a state is not finite at step {t} after frame {global_step}")
            global_step += phase_frames
            clock.append(time.perf_counter())

            # LABEL: all frames of the phase in one batched CLIP pass, each for every goal
            if not score:
                rewards = env_rewards[..., None]
            elif not args.terminate_on_success:
                rewards = score(pixels.reshape(-1, *pixels_shape))[:, :n_goals].reshape(rewards.shape)
            if not np.isfinite(rewards).all():
                raise RunError(f"a reward is not finite in the {phase_frames} frames before frame {global_step}")
            clock.append(time.perf_counter())

            # UPDATE: the labelled transitions go to the replay buffer, then SAC as usual
            phase = (rewards, next_states, terminated, ended)
            returns, reached, discounts = n_step_returns(*phase, args.gamma, args.n_step)
            arrays = dict(states=states, actions=actions, rewards=returns, next_states=reached, discounts=discounts,
                          goals=goals)
            labelled = {k: torch.from_numpy(v.reshape(phase_frames, *v.shape[2:])) for k, v in arrays.items()}
            buffer.add(**labelled)
            if args.normalize_obs:
                agent.normalizer.update(labelled["states"].to(device))
            if args.anneal_lr:
                for optimizer in agent.optimizers.values():
                    optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - previous_step / args.total_timesteps)
            if global_step >= args.learning_starts:
                owed_updates += phase_frames * args.updates_per_frame
            while owed_updates >= 1.0:
                owed_updates -= 1.0
                losses = agent.update(buffer.sample(args.batch_size, args.relabel))
            losses = {name: float(loss) for name, loss in losses.items()}  # waits for the device
            if not np.isfinite(list(losses.values())).all():
                raise RunError(f"a loss is not finite at frame {global_step}: {losses}; try a lower --learning-rate")
            clock.append(time.perf_counter())

            collected = np.take_along_axis(rewards, goals[..., None], -1)[..., 0]  # for the goals pursued, [T, N]
            charts = episode_charts(args, ended, env_rewards, collected if score else None, goals)
            if score and previous_step == 0:
                warn_if_slow(args, clock[2] - clock[1], clock[1] - clock[0], phase_frames)

            # EVALUATE: deterministic episodes from fixed starts
            last = global_step >= args.total_timesteps
            if last or global_step // args.eval_every > previous_step // args.eval_every:
                results, mean_return = evaluate_goals(args, envs, agent, score, writer, run_dir, global_step)
                charts |= results
                if mean_return > best_return:  # VLM-RM judges the one with the highest *training* reward
                    best_return = mean_return
                    save("best.pt")
            clock.append(time.perf_counter())

            # LOG
            charts["charts/SPS"] = (global_step - first_step) / (time.time() - start_time)
            charts |= {f"losses/{name}": loss for name, loss in losses.items()}
            for phase, seconds in zip(("collect", "label", "update", "evaluate"), np.diff(clock), strict=True):
                charts[f"time/{phase}"] = seconds / (clock[-1] - clock[0])
            for name, value in charts.items():
                writer.add_scalar(name, value, global_step)
            headline = "clip_return" if score else "env_return"
            each = [f"{value:.1f}" for name, value in charts.items() if name.startswith("charts/clip_return/")]
            progress.set_postfix_str(" ".join([f"{headline}={charts[f'charts/{headline}']:.2f}", *each]), refresh=False)
            progress.update(global_step - previous_step)

            # SAVE
            due = global_step // args.checkpoint_every > previous_step // args.checkpoint_every
            if last or due or buffer.total - buffer.saved + phase_frames > buffer.capacity:
                save("checkpoint.pt")

        progress.close()
        if stopped_by:
            save("checkpoint.pt")
        writer.close()
    if stopped_by:
        print(f"stopped at frame {global_step}; go on with --resume {run_dir}", file=sys.stderr)
        sys.exit(128 + stopped_by[0])
    return run_dir


def warn_if_slow(args, label_seconds, collect_seconds, frames):
    """Prints one line when the first phase shows that the run would take longer than two days."""
    label, collect = (seconds / frames * args.total_timesteps / 86400 for seconds in (label_seconds, collect_seconds))
    if label + collect > 2:
        advice = "a smaller --clip or a GPU" if label > collect else "a smaller --render-size or more --num-envs"
        message = (f"warning: this run will take {label + collect:.0f} days or more, {label:.1f} for CLIP to label"
                   f" frames and {collect:.1f} to collect them: use {advice}, or fewer --total-timesteps")
        tqdm.write(message, file=sys.stderr)


def parse_args():
    """The command line's flags; with --resume the run's own, but for those of CHANGEABLE that are given anew."""
    for flag in ("--goal", "--eval-goal", "--negatives", "--template"):
        if sys.argv.count(flag) > 1:
            fail(f"{flag} is given twice, and only the last would count: name all after one {flag}")
    args = tyro.cli(Args)
    if args.resume is None:
        return args
    if args.run_dir not in (None, args.resume):
        fail("--resume goes on in its own folder: leave --run-dir out")
    try:
        saved = json.loads((args.resume / "args.json").read_text())
        saved = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    except (OSError, ValueError, TypeError) as error:
        fail(f"--resume {args.resume}: no run of this script is there ({error})")
    args = tyro.cli(Args, default=replace(saved, resume=args.resume, run_dir=None))
    changed = [f"--{name.replace('_', '-')} {value} (was {getattr(saved, name)})"
               for name, value in asdict(args).items() if name not in CHANGEABLE and value != getattr(saved, name)]
    if changed:
        fail(f"--resume {args.resume}: a run can't go on with other flags: {', '.join(changed)}")
    return args


if __name__ == "__main__":
    try:
        print(f"results in {train(parse_args())}")
    except RunError as error:
        sys.exit(f"error: {error}; the last checkpoint, if one was due, is intact: go on from it with --resume")
