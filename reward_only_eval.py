"""Judges a CLIP reward without any RL: does it score the states that are meant above those that are not?

Saved rollouts, pictures or sweeps of states are labelled (by the simulator's state for VLM-RM's humanoid tasks, or by a
csv) and scored with every combination of CLIP model, alpha, wording and template: EPIC distance, ROC-AUC, precision and
recall, reward landscapes, the best and worst frames. Rocamonde et al. judge rewards by EPIC ("Vision-Language Models
are Zero-Shot Reward Models for Reinforcement Learning", ICLR 2024, arXiv 2310.12921, cited as VLM-RM), Baumli et al. by
precision and recall ("Vision-Language Models as a Source of Rewards", 2023, arXiv 2312.09187, cited as VLM-SR).

    python reward_only_eval.py --task kneeling --sweep kneeling --clip ViT-L-14 --alpha 0 0.5 1
    python reward_only_eval.py --rollouts runs/*/rollouts/*.npz --task kneeling --goal "a kneeling robot" "it kneels"
    python reward_only_eval.py --frames photos/ --labels labels.csv --goal "an open drawer" --baseline "a drawer"
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.15.0", "torchvision==0.29.2", "open_clip_torch==3.3.0", "huggingface_hub==2.4.0",
#     "transformers==5.24.0", "sentencepiece==0.2.3",
#     "gymnasium==1.4.0", "mujoco==4.0.0", "tyro==1.0.17", "tqdm==4.70.1", "imageio==2.37.0", "imageio-ffmpeg==0.6.0",
#     "numpy==2.4.6", "pillow==13.0.0", "pandas==3.1.1", "scipy==1.17.1", "scikit-learn==1.9.1", "matplotlib==3.11.2",
# ]
# ///
from __future__ import annotations

import base64
import contextlib
import copy
import difflib
import functools
import html
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

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
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from matplotlib.figure import Figure  # without pyplot: no window, whatever the backend
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image, ImageOps
from scipy.spatial.transform import Rotation
from scipy.stats import binomtest, pearsonr, spearmanr
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec


@dataclass
class Args:  # Natural, Count, Positive and Share are numbers in ranges, defined at the end
    # ---- run ----
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; auto is CUDA where there is one"""
    out_dir: Path | None = None
    """folder of the report (default: a new one under runs/)"""
    bootstrap: Natural = 500
    """resamples of the episodes for the 95% intervals, which --task all does without; 0 leaves the intervals out"""
    traceback: bool = False
    """show errors before the first frame with their traceback, instead of in one line"""

    # ---- states and labels ----
    rollouts: tuple[Path, ...] = ()
    """rollouts of the training scripts, RUN_DIR/rollouts/*.npz; flags left out are then those of the first one's run"""
    frames: Path | None = None
    """a folder of images, or a video; resized by the CLIP model's own transform, but for --image-resize-mode"""
    labels: Path | None = None
    """csv for --frames: file name or frame number (from 0), label (0/1 or graded), its episode if there are several"""
    label_threshold: float | None = None
    """graded labels above this are the goal state (default: what needs a goal state is left out for graded labels)"""
    sweep: tuple[str, ...] = ()
    """lines of states: a task's name (standing to its pose), `pole`, or JOINT:FROM:TO of --env-id (radians, meters)"""
    sweep_points: bounded(int, ">=2", lambda value: value >= 2) = 101
    """states of a sweep"""
    task: Literal[*TASKS, "all"] | None = None
    """labels states by a criterion of TASKS; `all` judges each --clip and --alpha by the Humanoid's eight tasks, on
    tests/humanoid_states.npz if no states are given"""

    # ---- prompts and rewards: every combination is judged ----
    env_id: str = "Humanoid-v5"
    """Gymnasium id (MODULE:ID imports your own module first) of an environment with `rgb_array` rendering"""
    goal: tuple[str, ...] | None = None
    """wordings of the goal, each judged on its own, not against each other (default: the task's prompt in VLM-RM)"""
    baseline: str = "a humanoid robot"
    """the neutral prompt of the goal-baseline regularisation"""
    alpha: tuple[Share, ...] = (0.0,)
    """strengths of the goal-baseline regularisation, 0 (plain cosine, the paper's humanoid setting) to 1"""
    template: tuple[str, ...] = ("{}",)
    """prompt templates, "{}" is the prompt; the embeddings of several are averaged"""
    reward: Literal["regularized", "binary"] = "regularized"
    """VLM-RM's CLIP reward, or VLM-SR's"""
    negatives: tuple[str, ...] = ()
    """prompts that a goal competes with in the binary reward; in training the other goals are, too"""
    temperature: Positive | None = None
    """of the binary reward's softmax over cosines (default: the one that the model was trained with, about 0.01)"""
    threshold: Share = 0.5
    """the binary reward is 1 where the goal's probability is above this"""

    # ---- CLIP ----
    clip: tuple[str, ...] = ("ViT-L-14",)
    """open_clip architectures, `hf-hub:ORG/NAME`, or directories that hold an open_clip_config.json and weights"""
    clip_pretrained: tuple[str, ...] = ()
    """tag of each --clip's weights, or their file, in the same order; `default` is as where this flag is left out"""
    clip_batch_size: Count = 256
    """frames a CLIP forward pass"""
    clip_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the weights and the encoders' autocast; auto is fp32 on CPU and on CUDA fp16, as in VLM-RM, or where that
    overflows bf16; bf16 moves rewards more"""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """frames that are not square: shortest crops, longest pads, squash squeezes (default: the model's own setting)"""

    # ---- camera ----
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


def goal_probability(frames, goals, negatives, temperature):
    """What VLM-SR's binary reward compares with its threshold, T being the goals and the negatives:

        p(l | o) = exp(f(o).g(l) / temperature) / sum over l' in T of exp(f(o).g(l') / temperature)

    Takes L2-normalised embeddings of frames f(o) [N, D], goals [G, D] and negatives [M, D]. Returns [N, G]. A SigLIP
    model's bias, the same for all prompts, cancels.
    """
    # In float64: at a low temperature float32's rounding of a cosine would decide between two close prompts.
    logits = frames.double() @ torch.cat([goals, negatives]).double().T / temperature  # [N, G + M]
    return logits.softmax(-1)[:, : len(goals)]


IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def is_image(prompt):
    """Whether a prompt names an image file, by its ending."""
    return prompt.lower().endswith(IMAGES)


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


# ---------------------------------------------------------------- states and their frames


@dataclass(eq=False)
class Source:
    """Where frames come from: the states of a rollout or a sweep, or pictures."""

    name: str
    kind: str  # "rollout", "sweep" or "frames"
    # A row a frame: source, episode and step (whole numbers from 0), label (NaN where there is none). Of a rollout also
    # recorded, the reward that training computed; of a sweep position and progress, which rises towards the goal.
    table: pd.DataFrame
    qpos: np.ndarray | None = None  # [n, nq]
    files: list[Path] | None = None  # n images, or one video
    square: bool = True  # whether all pictures are
    goal: str = ""  # of the rollout
    axis: str = ""  # what a sweep's position is, with its unit
    video: object = None  # its reader, once it is open

    def frame(self, render, row):
        """One frame, uint8 [H, W, 3]."""
        if self.qpos is not None:
            return render(self.qpos[row])
        if is_image(self.files[0].name) and len(self.files) == len(self.table):  # else a video, or an animation
            return np.array(ImageOps.exif_transpose(Image.open(self.files[row])).convert("RGB"))
        if self.video is None:
            self.video = imageio.get_reader(self.files[0])
        frame = Image.fromarray(self.video.get_data(row))  # asked for in order, each frame is decoded once
        return np.array(frame.convert("RGB"))

    def chunks(self, render):
        """Yields all frames in order, uint8 [n, H, W, 3]: few at a time, to keep memory flat."""
        n = 32 if self.files else 256  # pictures may be large
        for start in range(0, len(self.table), n):
            frames = [self.frame(render, row) for row in self.table.index[start : start + n]]
            for _, same_shape in itertools.groupby(frames, key=np.shape):
                yield np.stack(list(same_shape))


ROOT = ("root_x", "root_y", "root_z", "root_roll", "root_pitch", "root_yaw")  # of a robot with a free joint
PROGRESS_BAR = dict(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30)


def natural_key(file):
    """Sorts file names in natural order: 2.png before 10.png."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", file.name))]


def load_frames(path):
    """The images of a folder, in the order of their names, or the frames of a video."""
    try:
        if path.is_dir():
            files = sorted((file for file in path.iterdir() if is_image(file.name)), key=natural_key)
            names = [str(file) for file in files]
            sizes = set()
            for file in files:
                with Image.open(file) as image:
                    sizes.add(image.size)
                    image.verify()
        else:
            files = [path]
            with imageio.get_reader(path) as reader:
                shapes = [frame.shape for frame in reader]
            names, sizes = [str(path)] * len(shapes), {shape[:2] for shape in shapes}
    except Exception as error:  # imageio's words are about formats that nobody meant
        raise ValueError(f"--frames {path}: neither images nor a video that can be read ({error})") from error
    if not names:
        raise ValueError(f"--frames {path}: it holds no images ({' '.join(IMAGES)})")
    table = pd.DataFrame({"source": names, "episode": 0, "step": range(len(names)), "label": np.nan})
    return Source(str(path), "frames", table, files=files, square=all(width == height for width, height in sizes))


def load_rollout(path, env_id, model):
    """The states of a training script's rollout file; what is after the end of an episode is dropped."""
    saved = read_rollout(path)
    if saved["env_id"] != env_id:
        raise ValueError(f"--rollouts {path}: of {saved['env_id']}, not {env_id}: judge one environment at a time")
    if "qpos" not in saved:
        raise ValueError(f"--rollouts {path}: no states were saved of {env_id}, no MuJoCo environment: use --frames")
    alive = np.arange(saved["qpos"].shape[1]) < saved["lengths"][:, None]  # [episodes, T]
    qpos = saved["qpos"][alive]  # [n, nq]
    if qpos.shape[1] != model.nq or len(qpos) == 0 or not np.isfinite(qpos).all():
        raise ValueError(f"--rollouts {path}: its states {qpos.shape} must be finite, [at least 1, {model.nq}]")
    episodes, steps = np.nonzero(alive)
    table = pd.DataFrame({"source": str(path), "episode": episodes, "step": steps, "label": np.nan})
    if "clip_rewards" in saved:
        table["recorded"] = saved["clip_rewards"][alive]
    return Source(str(path), "rollout", table, qpos, goal=saved["goal"])


def make_sweep(spec, points, env):
    """States along a line, from what --sweep says: a task's pose, the pole, or a joint between two values."""
    if spec in POSES and spec in TASKS:
        start = "squatting" if spec == "standing" else "standing"
        axis = f"from {start} (0) to the pose of {spec} (1)"
        position = np.linspace(0, 1, points)
        poses = [(1 - share) * np.array(POSES[start]) + share * np.array(POSES[spec]) for share in position]
        data = mujoco.MjData(env.model)
        qpos = np.stack([humanoid_pose(env.model, data, pose) for pose in poses])
        progress = position
    elif spec == "pole":
        qpos, position, axis = sweep_joint(f"hinge:{-math.pi / 2}:{math.pi / 2}", points, env)
        progress = -np.abs(position)
    else:
        qpos, position, axis = sweep_joint(spec, points, env)
        progress = np.arange(points)
    table = pd.DataFrame({"source": f"sweep {spec}", "episode": 0, "step": range(points), "label": np.nan})
    return Source(f"sweep {spec}", "sweep", table.assign(position=position, progress=progress), qpos, axis=axis)


def sweep_joint(spec, points, env):
    """States [points, nq] that differ in one joint, by JOINT:FROM:TO; ROOT are the directions of a free joint."""
    model = env.model
    if spec.count(":") != 2:
        raise ValueError(f"--sweep {spec}: neither a task ({', '.join(TASKS)}) nor JOINT:FROM:TO, such as hinge:-1:1")
    joint, start, end = spec.split(":")
    joints = [model.joint(i).name for i in range(model.njnt) if model.jnt_type[i] >= 2]  # slides and hinges
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
        joints += ROOT
    if joint not in joints:
        raise ValueError(f"--sweep {spec}: {env.spec.id} has no joint {joint}; it has {', '.join(joints)}")
    values = np.linspace(float(start), float(end), points)
    if not np.ptp(values) > 0:
        raise ValueError(f"--sweep {spec}: an empty sweep, from and to must differ")
    qpos = np.tile(env.init_qpos, (points, 1))
    if joint in ROOT[3:]:
        turns = Rotation.from_euler("xyz"[ROOT.index(joint) - 3], values[:, None])
        start = Rotation.from_quat(env.init_qpos[3:7], scalar_first=True)
        qpos[:, 3:7] = (turns * start).as_quat(scalar_first=True)
        return qpos, values, f"{joint}, rad"
    if joint in ROOT[:3]:
        qpos[:, ROOT.index(joint)] = values
        return qpos, values, f"{joint}, m"
    qpos[:, model.joint(joint).qposadr[0]] = values
    return qpos, values, f"{joint}, {'m' if model.joint(joint).type[0] == mujoco.mjtJoint.mjJNT_SLIDE else 'rad'}"


def encode(sources, xml_path, models, args):
    """Embeds every frame once with each model: a list of [N, D] float32, one a model; and the frames/s of each.

    Rendered once for each input size; the models of one size see the same frames.
    """
    sizes = [(args.render_size, args.render_size) if args.render_size else model.size for model in models]
    embeddings, seconds = [[] for _ in models], np.zeros(len(models))
    total = sum(len(source.table) for source in sources) * len(set(sizes))
    progress = tqdm(total=total, desc="encode", unit=" frames", **PROGRESS_BAR)
    for size in dict.fromkeys(sizes):
        render = SceneRenderer(xml_path, size, **scene_of(args)) if xml_path else None
        for frames in itertools.chain.from_iterable(source.chunks(render) for source in sources):
            for i, model in enumerate(models):
                if sizes[i] == size:
                    start = time.perf_counter()
                    embeddings[i].append(model.encode_images(frames).cpu())
                    seconds[i] += time.perf_counter() - start
            progress.update(len(frames))
    progress.close()
    embeddings = [torch.cat(parts) for parts in embeddings]
    return embeddings, [len(embedded) / spent for embedded, spent in zip(embeddings, seconds, strict=True)]


# ---------------------------------------------------------------- the goal states of the tasks
# VLM-RM says in words what a person counted as the goal state. Here it is read off the simulator's state; lengths are
# in meters. For scale: the standing humanoid is 1.57 high, with its pelvis at 0.87 and its knees at 0.42.


class Body:
    """What the criteria look at in a Humanoid's state, from what `meets` makes. Pairs are (left, right)."""

    def __init__(self, model, data):
        def pair(kind, part):  # where the left and the right one are, [2, 3]
            return np.stack([getattr(data, kind)(f"{side}_{part}").xpos for side in ("left", "right")])

        def seen_from(body, points):  # in its own axes: ahead, left, up
            return (points - body.xpos) @ body.xmat.reshape(3, 3)

        torso = data.body("torso")
        pelvis = data.body("pelvis")
        thighs = pair("body", "thigh")
        shins = pair("body", "shin")
        floor = model.geom("floor").id
        feet = {model.geom("left_foot").id, model.geom("right_foot").id}
        contacts = data.contact.geom[data.contact.dist < 0.01]  # pairs of geoms, [n, 2]
        touching = set(contacts[(contacts == floor).any(1)].ravel().tolist()) - {floor}
        self.grounded = len(touching) > 0
        self.only_on_feet = self.grounded and touching <= feet
        self.up = torso.xmat[8]  # how far the torso's own up-axis points up, 1 when upright
        self.pelvis = pelvis.xpos[2]
        radius, half_length = model.geom("butt").size[:2]  # a capsule, lying across
        self.seat = data.geom("butt").xpos[2] - abs(data.geom("butt").xmat[8]) * half_length - radius
        self.head_top = data.geom("head").xpos[2] + model.geom("head").size[0]
        self.center = data.subtree_com[1][:2]  # of mass, x and y
        self.knees = shins[:, 2]
        self.bend = -np.rad2deg([data.joint("left_knee").qpos[0], data.joint("right_knee").qpos[0]])  # 0 is straight

        self.feet_at = pair("geom", "foot")
        self.soles = self.feet_at[:, 2] - model.geom("left_foot").size[0]  # their heights; a foot is a sphere
        self.feet = seen_from(pelvis, self.feet_at)
        # How far they point to their own side: 0 straight down or ahead, 1 sideways. The side is the chest's, along the
        # floor: a pelvis that rolls or turns below the chest changes its own axes much and the picture little.
        outwards = np.outer((1, -1), torso.xmat[1::3])  # the chest's own left, and right
        outwards[:, 2] = 0.0
        outwards /= np.linalg.norm(outwards, axis=1, keepdims=True)
        self.thighs_out = ((shins - thighs) * outwards).sum(1) / np.linalg.norm(shins - thighs, axis=1)
        self.legs_out = ((self.feet_at - thighs) * outwards).sum(1) / np.linalg.norm(self.feet_at - thighs, axis=1)

        self.hands_at = pair("geom", "hand")
        self.hands = seen_from(torso, self.hands_at)
        hips = np.array([(-0.01, 0.17, 0.08), (-0.01, -0.17, 0.08)])  # on the pelvis's sides, where the hip bones are
        self.hands_to_hips = np.linalg.norm(seen_from(pelvis, self.hands_at) - hips, axis=1)

    def stands(self):
        down = self.soles < 0.05
        if not (self.only_on_feet and self.up > 0.8 and self.pelvis > 0.7 and down.any()):
            return False
        return np.linalg.norm(self.center - self.feet_at[down, :2].mean(0)) < 0.3


def kneeling(model, data):
    """Both knees within 0.12 m of the floor and bent by 45 degrees or more, the torso's up-axis above 0.7 (45 degrees).

    And the robot touches the floor. Without the bend, sitting with the legs stretched out would be kneeling.
    """
    body = Body(model, data)
    return body.knees.max() <= 0.12 and body.bend.min() > 45 and body.up > 0.7 and body.grounded


def lotus(model, data):
    """The seat below 0.1 m, torso up-axis above 0.7, knees below 0.3 m, thighs out by 30 degrees, feet in.

    The joints' limits keep the knees of a folded leg 0.18 to 0.28 m up. Thighs out: to the chest's own sides. Feet in:
    knees bent by 90 degrees or more, and each foot within 0.2 m of the pelvis's middle plane and 0.4 m of the pelvis.
    """
    body = Body(model, data)
    seated = body.grounded and body.seat < 0.1 and body.up > 0.7
    feet_in = np.abs(body.feet[:, 1]).max() < 0.2 and np.linalg.norm(body.feet, axis=1).max() < 0.4
    return seated and feet_in and body.bend.min() > 90 and body.knees.max() < 0.3 and body.thighs_out.min() > 0.5


def standing(model, data):
    """On its feet alone, pelvis above 0.7 m, torso up-axis above 0.8 (37 degrees), not falling.

    Not falling: the center of mass is within 0.3 m of the feet (the middle of those below 0.05 m), seen from above.
    """
    return Body(model, data).stands()


def arms_raised(model, data):
    """Standing, and both hands above the top of the head."""
    body = Body(model, data)
    return body.stands() and body.hands_at[:, 2].min() > body.head_top


def splits(model, data):
    """The seat below 0.1 m, torso up-axis above 0.5, legs low, straight and sideways.

    Low: soles below 0.15 m. Straight: knees bent by less than 45 degrees. Sideways: each leg points to the chest's own
    side by 45 degrees or more; 63 is the joints' limit while the pelvis is level and straight below the chest.
    """
    body = Body(model, data)
    seated = body.grounded and body.seat < 0.1 and body.up > 0.5
    sideways = body.legs_out.min() > math.sin(math.pi / 4)
    return seated and body.soles.max() < 0.15 and body.bend.max() < 45 and sideways


def hands_on_hips(model, data):
    """Standing, and each hand's center within 0.12 m of the side of the pelvis, 0.08 m above its middle."""
    body = Body(model, data)
    return body.stands() and body.hands_to_hips.max() < 0.12


def arms_crossed(model, data):
    """Standing, and before the chest each hand past the other by 0.1 m or more: not just touching.

    Before the chest: 0.05 to 0.45 m ahead of the torso's middle and within 0.2 m of its height. It is at the limit of
    what the joints allow: the forearms cross, but no hand reaches the other arm's elbow.
    """
    body = Body(model, data)
    ahead, left, up = body.hands.T
    before_chest = 0.05 < ahead.min() and ahead.max() < 0.45 and np.abs(up).max() < 0.2
    return body.stands() and before_chest and left[1] - left[0] >= 0.1


def one_leg(model, data):
    """Standing on one foot, the other's sole above 0.1 m, the center of mass within 0.2 m of the foot: balanced."""
    body = Body(model, data)
    low, high = np.argsort(body.soles)
    balanced = np.linalg.norm(body.center - body.feet_at[low, :2]) < 0.2
    return body.stands() and body.soles[low] < 0.05 and body.soles[high] > 0.1 and balanced


def pole(model, data):
    """The pole within 0.2 rad of upright, where the environment itself would end the episode."""
    return abs(data.joint("hinge").qpos[0]) <= 0.2


TASKS = {  # name: VLM-RM's prompt, criterion
    "kneeling": ("a humanoid robot kneeling", kneeling),
    "lotus": ("a humanoid robot seated down, meditating in the lotus position", lotus),
    "standing": ("a humanoid robot standing up", standing),
    "arms-raised": ("a humanoid robot standing up, with both arms raised", arms_raised),
    "splits": ("a humanoid robot practicing gymnastics, doing the side splits", splits),
    "hands-on-hips": ("a humanoid robot standing up with hands on hips", hands_on_hips),
    "arms-crossed": ("a humanoid robot standing up, with its arms crossed", arms_crossed),
    "one-leg": ("a humanoid robot standing up on one leg", one_leg),
    "pole": ("pole vertically upright on top of the cart", pole),
}

EIGHT = [task for task in TASKS if task != "pole"]  # VLM-RM's for the humanoid

# Poses for the sweeps, degrees: pitch of the root (positive is forward), abdomen_y, left and right leg (hip_x, hip_z,
# hip_y, knee), left and right arm (shoulder1, shoulder2, elbow; the right one mirrored, as if it were the left).
STRAIGHT = (0, 0, 0, -2)
HANGING = (-45, 50, -58)
POSES = {
    "standing": (0, 0, *STRAIGHT, *STRAIGHT, *HANGING, *HANGING),
    "squatting": (25, 0, -8, 0, -100, -130, -8, 0, -100, -130, 3, -31, -67, 3, -31, -67),
    "kneeling": (0, 0, 0, 0, 0, -94, 0, 0, 0, -94, *HANGING, *HANGING),
    "lotus": (-8, -75, 0, -60, -60, -143, 0, -60, -60, -143, -22, 9, -57, -22, 9, -57),
    "arms-raised": (0, 0, *STRAIGHT, *STRAIGHT, 85, -15, -85, 85, -15, -85),
    "splits": (-3, -14, -25, -60, -65, -9, -25, -60, -65, -9, 51, 46, -66, 51, 46, -66),
    "hands-on-hips": (0, 0, *STRAIGHT, *STRAIGHT, -48, 78, -5, -48, 78, -5),
    "arms-crossed": (0, 0, *STRAIGHT, *STRAIGHT, 69, -59, 6, -59, -8, -33),
    "one-leg": (0, 0, *STRAIGHT, 0, 0, -75, -100, *HANGING, *HANGING),
}


def humanoid_pose(model, data, pose):
    """qpos [24] of a Humanoid in a pose, 16 numbers as in POSES, on the floor."""
    left_leg, right_leg, left_arm, right_arm = np.split(np.array(pose[2:]), (4, 8, 11))
    right_arm = right_arm * (-1, -1, 1)
    joints = np.deg2rad([0, pose[1], 0, *right_leg, *left_leg, *right_arm, *left_arm])
    half_pitch = math.radians(pose[0]) / 2
    return to_floor(model, data, [0, 0, 1.4, math.cos(half_pitch), 0, math.sin(half_pitch), 0, *joints])


def to_floor(model, data, qpos):
    """A Humanoid's qpos with the root lowered or raised until the lowest geom touches the floor."""
    data.qpos[:] = qpos
    mujoco.mj_kinematics(model, data)
    half = np.where(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE, model.geom_size[:, 1], 0)
    lowest = data.geom_xpos[:, 2] - np.abs(data.geom_xmat[:, 8]) * half - model.geom_size[:, 0]
    qpos = data.qpos.copy()
    qpos[2] -= np.delete(lowest, model.geom("floor").id).min()
    return qpos


def meets(criterion, model, qpos):
    """Which states [n, nq] meet a task's criterion: float 0 or 1, [n].

    What is within 1 cm of the floor touches it: a kneeling robot's knees bounce by a few millimeters.
    """
    model = copy.copy(model)
    model.geom_margin[:] = 0.01  # how near two geoms are when MuJoCo lists their contact; the Humanoid's own is 1 mm
    data = mujoco.MjData(model)
    result = np.empty(len(qpos))
    for i, state in enumerate(qpos):
        data.qpos[:] = state
        mujoco.mj_forward(model, data)
        result[i] = criterion(model, data)
    return result


# ---------------------------------------------------------------- the metrics


METRICS = {
    "epic": "EPIC distance",
    "pearson": "Pearson",
    "roc_auc": "ROC-AUC",
    "average_precision": "average precision",
    "false_positive_rate": "false positives",
}


@dataclass(eq=False)
class Variant:
    """One reward: a model, alpha, wording and template, with its rewards of all N frames and what they are worth."""

    name: str  # what tells it from the others
    formula: str  # "alpha 0.5", say, or "binary reward"
    clip: str
    parameters: int  # of the whole model
    goal: str
    template: str
    alpha: float | None  # None for the binary reward
    threshold: float | None  # scores above this are taken for the goal state
    rewards: np.ndarray  # [N], what is trained on
    scores: np.ndarray  # [N], what ranks the frames: the reward, or the probability behind a binary one
    metrics: dict = field(default_factory=dict)  # name -> value, None where it is not defined
    intervals: dict = field(default_factory=dict)  # name -> 95% interval
    rank_correlation: dict = field(default_factory=dict)  # sweep -> Spearman's with the progress towards the goal


def rewards_of(frames, prompts, alpha, temperature, threshold):
    """The rewards that are trained on, and the scores that rank the frames, [N] each.

    `prompts` are embeddings of the goal, the baseline and the negatives; `alpha` is None for the binary reward. Raises
    FloatingPointError if one is not finite.
    """
    chunks = frames.split(4096)
    if alpha is None:  # in a softmax, prompts whose templates agree more would win by their longer mean
        prompts = F.normalize(prompts, dim=-1)
        scores = [goal_probability(chunk, prompts[:1], prompts[2:], temperature) for chunk in chunks]
    else:
        scores = [regularized_reward(chunk, prompts[:1], prompts[1], alpha) for chunk in chunks]
    scores = torch.cat(scores)[:, 0].numpy()
    if not np.isfinite(scores).all():
        raise FloatingPointError("a reward is not finite: the model overflows, try --clip-precision fp32")
    return (scores > threshold).astype(np.float32) if alpha is None else scores, scores


def make_variants(models, embeddings, args):
    """The rewards of all frames by every combination of model, wording, templates and alpha."""
    templates = {template: (template,) for template in args.template}
    if len(templates) > 1:  # their mean, and each alone
        templates = {f"mean of {len(templates)}": args.template, **templates}
    alphas = args.alpha if args.reward == "regularized" else (None,)
    variants = []
    for clip, model, frames in zip(args.clip, models, embeddings, strict=True):
        parameters = sum(p.numel() for p in model.model.parameters())
        temperature = args.temperature or model.temperature
        for goal, template in itertools.product(args.goal, templates):
            negatives = [prompt for prompt in args.negatives if prompt != goal and args.reward == "binary"]
            prompts = model.encode_text([goal, args.baseline, *negatives], templates[template]).cpu()
            for alpha in alphas:
                formula = "binary reward" if alpha is None else f"alpha {alpha:g}"
                name = f"{clip}, {formula}" if len(args.clip) > 1 else formula
                if len(args.goal) > 1:
                    name += f", goal {args.goal.index(goal) + 1}"
                if len(templates) > 1:
                    name += f", template {list(templates).index(template) + 1}"
                threshold = args.threshold if alpha is None else None
                rewards, scores = rewards_of(frames, prompts, alpha, temperature, args.threshold)
                about = (name, formula, clip, parameters, goal, template, alpha, threshold)
                variants.append(Variant(*about, rewards, scores))
    return variants


def gather_frames(sources, threshold):
    """One table of all N frames: what their sources know, and more columns.

    Those are number and kind of the source, and the row there; group, the episode's number over all sources; counted,
    whether the metrics are over this frame; goal_state, 1 or 0, or NaN: no label, or a graded one and no threshold.
    """
    tables = [s.table.assign(number=i, row=s.table.index, kind=s.kind) for i, s in enumerate(sources)]
    frames = pd.concat(tables, ignore_index=True)
    frames["group"] = frames.groupby(["number", "episode"]).ngroup()
    labelled = frames["label"].notna()
    frames["counted"] = labelled & (frames["kind"] != "sweep")
    if not frames["counted"].any():
        frames["counted"] = labelled  # a sweep's frames only then
    graded = (labelled & ~frames["label"].isin([0, 1])).groupby(frames["number"]).transform("any")
    above = (frames["label"] > (threshold or 0)).astype(float).where(labelled & (threshold is not None))
    frames["goal_state"] = frames["label"].astype(float).where(~graded, above)
    return frames


def is_constant(values):
    """Whether they differ by no more than float32's rounding: a correlation of them would be that of noise."""
    return np.ptp(values) <= 1e-6 * max(1.0, np.abs(values).max())


def epic_distance(rewards, labels):
    """EPIC distance of a reward to a goal task's labels (VLM-RM): sqrt((1 - rho) / 2), rho being Pearson's correlation.

    Rewards of the state after the step alone differ from their canonical form by a constant, so that their correlation
    is EPIC's. 0 is the same up to scale and shift, 0.71 unrelated, 1 the opposite; None where rho is not defined, since
    one of the two is constant.
    """
    if len(rewards) < 2 or is_constant(rewards) or is_constant(labels):
        return None
    return math.sqrt((1.0 - float(pearsonr(rewards, labels).statistic)) / 2)


def metrics_of(variant, labels, positive, chosen):
    """The metrics of a variant over the chosen of all N frames, None where one is not defined.

    EPIC and Pearson compare rewards and labels, graded ones too. The others judge how the scores rank the goal states,
    `positive`, bool [N]; among the chosen frames there must be some, but not all.
    """
    metrics = dict.fromkeys(METRICS)
    metrics["epic"] = epic_distance(variant.rewards[chosen], labels[chosen])
    if metrics["epic"] is not None:
        metrics["pearson"] = 1 - 2 * metrics["epic"] ** 2
    positive = positive[chosen]
    if positive.any() and not positive.all():
        scores = variant.scores[chosen]
        metrics["roc_auc"] = float(roc_auc_score(positive, scores))
        metrics["average_precision"] = float(average_precision_score(positive, scores))
        metrics["false_positive_rate"] = float(np.mean(scores[~positive] > variant.threshold))
    return metrics


def best_threshold(scores, positive):
    """The threshold with the highest F1."""
    precision, recall, thresholds = precision_recall_curve(positive, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = thresholds[np.argmax(f1[:-1])]  # the frames at it count as goal states: go just below
    return float(np.nextafter(best, -np.inf, dtype=scores.dtype))


def judge(variant, frames, draws):
    """Fills in a variant's metrics over the frames that count, and their 95% intervals from so many resamples."""
    labels = frames["label"].to_numpy()
    positive = (frames["goal_state"] == 1).to_numpy()
    counted = np.flatnonzero(frames["counted"])
    if variant.threshold is None and share_of(frames.loc[counted]) not in (None, 0, 1):
        variant.threshold = best_threshold(variant.scores[counted], positive[counted])
    variant.metrics = metrics_of(variant, labels, positive, counted)
    for name, sweep in frames[frames["kind"] == "sweep"].groupby("source", sort=False):
        rewards = variant.rewards[sweep.index]
        rho = None if is_constant(rewards) else float(spearmanr(sweep["progress"], rewards).statistic)
        variant.rank_correlation[name] = rho

    # Whole episodes are resampled, since frames of one are much alike; the threshold stays.
    episodes = [episode.to_numpy() for episode in frames[frames["counted"]].groupby("group").groups.values()]
    if len(episodes) < 2 or not draws:
        return
    rng = np.random.default_rng(0)
    samples = []
    for _ in tqdm(range(draws), desc="bootstrap", leave=False, **PROGRESS_BAR):
        chosen = np.concatenate([episodes[i] for i in rng.integers(len(episodes), size=len(episodes))])
        samples.append(metrics_of(variant, labels, positive, chosen))
    for name, drawn in pd.DataFrame(samples, dtype=float).items():
        if drawn.count() > 0.9 * draws:  # resamples of one class only have no value
            variant.intervals[name] = np.percentile(drawn.dropna(), (2.5, 97.5)).tolist()


def share_of(frames):
    """The share of goal states among these frames, None where labels do not say."""
    share = frames["goal_state"].mean()
    return None if np.isnan(share) else float(share)


def describe_sources(sources, frames, variants):
    """What is known of each source, a dict each: the success rate of its trajectories, and what training recorded."""
    described = []
    for source, (_, part) in zip(sources, frames.groupby("number"), strict=True):
        episodes = part.groupby("episode")["goal_state"]
        about = {"source": source.name, "kind": source.kind, "goal": source.goal}
        about |= {"frames": len(part), "episodes": len(episodes), "goal_share": share_of(part)}
        trajectories = source.kind == "rollout" or (source.kind == "frames" and len(episodes) > 1)
        if trajectories and part["goal_state"].notna().all():
            successes = int((episodes.mean() >= 0.5).sum())
            interval = binomtest(successes, len(episodes)).proportion_ci(method="wilson")
            about |= {"success_rate": successes / len(episodes), "low": interval.low, "high": interval.high}
        same_goal = [variant for variant in variants if variant.goal == source.goal]
        if "recorded" in source.table and same_goal:
            off = [float(np.abs(variant.rewards[part.index] - part["recorded"]).max()) for variant in same_goal]
            about |= {"recorded": same_goal[np.argmin(off)].name, "difference": min(off)}
        described.append(about)
    return described


def evaluate_reward(args):
    """Judges the rewards that the flags describe. Returns the folder of the report."""
    # LOAD
    sources, xml_path, models, out_dir = load(args)

    # ENCODE: each frame once a model
    embeddings, _ = encode(sources, xml_path, models, args)

    # REWARD: every combination of model, wording, template and alpha reuses the embeddings
    variants = make_variants(models, embeddings, args)

    # JUDGE
    frames = gather_frames(sources, args.label_threshold)
    for variant in variants:
        judge(variant, frames, args.bootstrap)
    described = describe_sources(sources, frames, variants)

    # REPORT
    notes = list(notes_on(variants, sources, frames, args))
    write_files(out_dir, variants, described, frames, notes, args)
    captions = draw_plots(out_dir, variants, sources, frames, xml_path, args)
    facts = describe(variants, frames, xml_path, args)
    tables = list(make_tables(variants, described))
    write_page(out_dir, args.goal[0], facts, tables, notes, captions)
    return out_dir


def evaluate_all_tasks(args):
    """Judges every model and alpha by each of the Humanoid's tasks, all on the same states. Returns the folder."""
    sources, xml_path, models, out_dir = load(args)
    embeddings, rates = encode(sources, xml_path, models, args)
    rate_of = dict(zip(args.clip, rates, strict=True))
    humanoid = mujoco.MjModel.from_xml_path(xml_path)
    rows, judged = [], []
    for task in EIGHT:
        prompt, criterion = TASKS[task]
        for source in sources:
            source.table["label"] = meets(criterion, humanoid, source.qpos)
        frames = gather_frames(sources, None)
        for variant in make_variants(models, embeddings, replace(args, goal=(prompt,))):
            judge(variant, frames, 0)
            about = {"reward": variant.name, "task": task, "goal states": f"{share_of(frames[frames['counted']]):.1%}"}
            about |= {"frames/s": rate_of[variant.clip], "parameters": f"{variant.parameters / 1e6:,.1f}M"}
            rows.append(about | {title: variant.metrics[name] for name, title in METRICS.items()})
            judged.append((variant, frames))
    # As floats, so that means leave out what is None, where no state is the goal.
    table = pd.DataFrame(rows).astype(dict.fromkeys(METRICS.values(), float))
    groups = table.groupby(["reward", "frames/s", "parameters"], sort=False)
    means = groups[list(METRICS.values())].mean().assign(tasks=groups["EPIC distance"].count()).reset_index()

    variant, frames = max(judged, key=lambda pair: pair[0].metrics["epic"] or 0.0)  # the worst
    captions = {"heat_map": "ROC-AUC of each reward and task: guessing has 0.5."}
    plot_heat_map(table).savefig(out_dir / "heat_map.png")
    plot_contact_sheet(variant, sources, frames, xml_path, args).savefig(out_dir / "contact_sheet.png")
    captions["contact_sheet"] = f'{plot_contact_sheet.__doc__} The worst: "{variant.goal}", {variant.name}.'
    facts = [f"{len(frames)} states of the Humanoid, labelled by the criteria of {len(EIGHT)} tasks."]
    facts += describe_settings([variant for variant, _ in judged], args)
    each = table.drop(columns=["frames/s", "parameters"])
    explanation = " ".join(text for column, text in EXPLANATIONS.items() if column in means)
    tables = [("Mean over the tasks", means, explanation), ("Each task", each, "")]
    results = {"args": asdict(args)}
    for name, rows in {"mean": means, "tasks": table}.items():
        results[name] = rows.astype(object).where(rows.notna(), None).to_dict("records")
    (out_dir / "results.json").write_text(json.dumps(results, indent=2, default=str, allow_nan=False))
    notes = ["`tasks`: on so many EPIC is defined, with states of both kinds and a reward that is not constant."]
    write_page(out_dir, "eight tasks of the Humanoid", facts, tables, notes, captions)
    return out_dir


# ---------------------------------------------------------------- not the method: finding weights, the look of MuJoCo,
# reading files, the report, checks, the command line. What is above is all that is computed.


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


# ---- finding weights, and the look of MuJoCo

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


def check_prompts(tokenizer, prompts, templates=("{}",)):
    """Raises ValueError over what a CLIP model's context would cut silently, OSError over a missing image."""
    for prompt in filter(is_image, prompts):
        Image.open(prompt).close()  # now, before weights are downloaded
    for prompt in [t.replace("{}", p) for p in prompts if not is_image(p) for t in templates]:
        tokens, longer, shorter = tokenizer([prompt, f"{prompt} robot", prompt.rstrip(" .!?")[:-1]])
        if torch.equal(tokens, longer) and torch.equal(tokens, shorter):  # no room for a word, nor for the last letter
            raise ValueError(f'the prompt "{prompt}" is too long: the model would not see its end')


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


def scene_of(args):
    """What SceneRenderer takes of the flags."""
    names = ("distance", "elevation", "azimuth", "lookat", "follow")
    return {name: getattr(args, f"camera_{name}") for name in names} | {"restyle": args.restyle}


# ---- reading files


def read_rollout(path):
    """All that a training script saved in a rollout file, by name: arrays, and env_id and goal as text."""
    try:
        with np.load(path) as file:
            saved = {name: file[name] for name in file}
        return saved | {"env_id": str(saved["env_id"]), "goal": str(saved["goal"])}
    except Exception as error:  # numpy's words name neither the flag nor, often, the file
        raise ValueError(f"--rollouts {path}: no rollout of the training scripts ({error})") from error


def read_labels(path, table):
    """Fills in the labels and episodes of a table of frames from a csv; a header is allowed."""
    columns = ["frame", "label", "episode"]
    rows = pd.read_csv(path, names=columns, dtype=str, index_col=False, skipinitialspace=True).fillna("")
    row_of = {str(i): i for i in range(len(table))}
    if table["source"].is_unique:  # images, not a video
        row_of |= {Path(name).name: i for i, name in enumerate(table["source"])}
    rows["row"] = rows["frame"].str.strip().map(row_of)
    rows["value"] = pd.to_numeric(rows["label"], errors="coerce")
    if rows.loc[0, ["row", "value"]].isna().all():
        rows = rows[1:]
    if rows.empty:
        raise ValueError(f"--labels {path}: it holds no labels")
    problems = {
        f"no such frame among the {len(table)}": rows["row"].isna(),
        "that label is no number": ~np.isfinite(rows["value"]),
        "that frame has a label already": rows["row"].duplicated(),
    }
    for problem, wrong in problems.items():
        for i, row in rows[wrong].iterrows():
            raise ValueError(f"--labels {path}, row {i + 1} ({','.join(row[columns])}): {problem}")
    table.loc[rows["row"], "label"] = rows["value"].to_numpy()
    table.loc[rows["row"], "episode"] = pd.factorize(rows["episode"].str.strip())[0]


def load_sources(args):
    """All states and frames with their labels, and the xml of the MuJoCo environment or None."""
    sources = []
    xml_path = None
    if args.rollouts or args.sweep:
        env = gym.make(args.env_id, disable_env_checker=True).unwrapped
        if not isinstance(env, MujocoEnv) or type(env).render is not MujocoEnv.render or env.model.nmocap:
            raise ValueError(f"{args.env_id} draws its frames itself, which saved states do not tell of: give --frames")
        xml_path = env.fullpath
        bodies = [env.model.body(i).name for i in range(env.model.nbody)]
        for task in {"standing" if args.task == "all" else args.task, *args.sweep} & set(TASKS):
            robot, body = ("InvertedPendulum", "cart") if task == "pole" else ("Humanoid", "lwaist")
            if body not in bodies:
                raise ValueError(f"{task} is a task of {robot}, not of {args.env_id}")
        sources += [load_rollout(path, args.env_id, env.model) for path in dict.fromkeys(args.rollouts)]
        sources += [make_sweep(spec, args.sweep_points, env) for spec in args.sweep]
        for source in sources if args.task in TASKS else ():
            source.table["label"] = meets(TASKS[args.task][1], env.model, source.qpos)
    if args.frames:
        sources.append(load_frames(args.frames))
        if args.labels:
            read_labels(args.labels, sources[-1].table)
    return sources, xml_path


def load(args):
    """The sources, the xml of the MuJoCo environment or None, the models, and the folder of the report."""
    with one_line_errors(args.traceback):
        check_flags(args)
        sources, xml_path = load_sources(args)
        about = re.sub("[/:]", "-", args.env_id) if xml_path else args.frames.stem
        out_dir = args.out_dir or Path("runs") / f"{about}__{Path(__file__).stem}__{time.time_ns() // 10**6}"
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "results.json").touch()  # a folder that can't be written to is an error now
        if xml_path:  # a missing EGL is an error now, before the models are loaded
            SceneRenderer(xml_path, (64, 64), **scene_of(args))(sources[0].qpos[0])
        return sources, xml_path, load_models(args), out_dir


def load_models(args):
    """The CLIP models, once all are found and the prompts fit; `args.clip` becomes their names, with each tag."""
    if not args.goal or not all(goal.strip() for goal in args.goal):
        raise ValueError("--goal is empty: describe the state to reach, or name a --task")
    tags = [None if tag == "default" else tag for tag in args.clip_pretrained or ["default"] * len(args.clip)]
    found = [find_clip(clip, tag, args.image_resize_mode) for clip, tag in zip(args.clip, tags, strict=True)]
    prompts = [*args.goal, args.baseline, *(args.negatives if args.reward == "binary" else ())]
    for source in found:
        check_prompts(source.tokenizer, prompts, args.template)
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    args.clip = tuple(f"{clip} {tag}" if tag else clip for clip, tag in zip(args.clip, tags, strict=True))
    return [CLIP(source, device, args.clip_precision, args.clip_batch_size) for source in found]


# ---- the report


def notes_on(variants, sources, frames, args):
    """Yields what a reader of the metrics must know beside them."""
    counted = frames[frames["counted"]]
    for source in sources:
        if not source.square:
            yield f"Not all frames of {source.name} are square: see --image-resize-mode."
    if counted.empty:
        yield "No frame has a label, so there are no metrics, only rewards and plots: give --labels, or a --task."
        return
    others = frames["kind"][~frames["counted"]]
    if (others == "sweep").any():
        yield "The metrics are over rollouts and frames; a sweep's frames only draw its landscape."
    if (others != "sweep").any():
        yield f"{(others != 'sweep').sum()} frames without a label count in no metric."
    if not counted["label"].isin([0, 1]).all():
        yield "The labels are graded: EPIC and Pearson take them so, the others the states above --label-threshold."
    if share_of(counted) in (0, 1):
        yield f"{counted['goal_state'].sum():.0f} of {len(counted)} labelled frames are the goal: give some of both."
    elif is_constant(counted["label"]):
        yield "All labels are the same: nothing correlates with them."
    for variant in variants:
        if is_constant(variant.rewards[counted.index]):
            yield f"{variant.name}: the reward is the same on all labelled frames, so nothing correlates with it."
    if variants[0].metrics["false_positive_rate"] is not None and args.reward == "binary":
        yield f"For false positives the threshold on p is {args.threshold:g}; the metrics of ranking are those of p."
    episodes = counted["group"].nunique()
    if args.bootstrap and counted.loc[counted["kind"] == "rollout", "number"].nunique() > 1:
        yield "Episodes of a file share an agent, and a run's files their starts: intervals are for these agents alone."
    if episodes == 1:
        yield "All labelled frames are of one episode (a sweep is one), so that there are no intervals."
    elif args.bootstrap and episodes < 10:
        yield f"The intervals come from only {episodes} episodes: take them as a rough guide."
    unsure = [v for v in variants for name in v.metrics if v.metrics[name] is not None and name not in v.intervals]
    if args.bootstrap and episodes > 1 and unsure:
        yield "Where a metric has no interval, it is not defined on too many of the resamples of the episodes."


def rank_by_epic(variants):
    """Those that have an EPIC distance, the lowest first."""
    judged = [variant for variant in variants if variant.metrics["epic"] is not None]
    return sorted(judged, key=lambda variant: variant.metrics["epic"])


def describe_settings(variants, args):
    """The templates, what goals are compared with, and the models, a sentence each."""
    templates = dict.fromkeys(variant.template for variant in variants)
    facts = [f"Template {i}: {template}" for i, template in enumerate(templates, 1)]
    facts.append(f"Negatives: {'; '.join(args.negatives)}" if args.reward == "binary" else f"Baseline: {args.baseline}")
    models = dict.fromkeys(f"{v.clip} ({v.parameters / 1e6:,.1f}M parameters)" for v in variants)
    return [*facts, f"Models: {', '.join(models)}"]


def describe(variants, frames, xml_path, args):
    """What was judged and what is best, in sentences."""
    counted = frames[frames["counted"]]
    facts = [f"{len(frames)} frames."]
    if share_of(counted) is not None:
        positive = f"{counted['goal_state'].sum():.0f} of {len(counted)} labelled frames"
        facts.append(f"{positive} are the goal state ({share_of(counted):.1%}).")
    if args.task and xml_path:
        facts.append(f"Goal state of {args.task}: {' '.join(TASKS[args.task][1].__doc__.split())}")
    facts += [f"Goal {i}: {goal}" for i, goal in enumerate(args.goal, 1)]
    facts += describe_settings(variants, args)
    for best in rank_by_epic(variants)[:1]:
        facts.append(f"Lowest EPIC distance: {best.metrics['epic']:.3f}, {best.name}.")
    return facts


def make_tables(variants, described):
    """Yields the headings, tables and explanations of the report; columns without any value are left out."""
    rows = []
    for variant in variants:
        row = {"reward": variant.name}
        for name, title in METRICS.items():
            value = variant.metrics[name]
            row[title] = None if value is None else f"{value:.3f}"
            if name in variant.intervals:
                row[title] += " [{:.3f}, {:.3f}]".format(*variant.intervals[name])
        for sweep, rho in variant.rank_correlation.items():
            row[f"rank correlation, {sweep}"] = "constant" if rho is None else f"{rho:.3f}"
        rows.append(row)
    for heading, table in (("Metrics", pd.DataFrame(rows)), ("States", pd.DataFrame(described))):
        table = table.dropna(axis=1, how="all")
        explanation = " ".join(text for column, text in EXPLANATIONS.items() if column in table)
        if len(table.columns) > 1:
            yield heading, table, explanation


def write_files(out_dir, variants, described, frames, notes, args):
    """Writes rewards.csv, a row a frame and a column a reward, and results.json."""
    about = [{k: v for k, v in vars(variant).items() if k not in ("rewards", "scores")} for variant in variants]
    table = frames.reindex(columns=["source", "episode", "step", "position", "label"])
    rewards = [pd.Series(variant.rewards, name=variant.name) for variant in variants]
    pd.concat([table, *rewards], axis=1).to_csv(out_dir / "rewards.csv", index=False, float_format="%.7g")
    results = {
        "args": asdict(args),
        "goal_share": share_of(frames[frames["counted"]]),
        "labelled_frames": int(frames["counted"].sum()),
        "sources": described,
        "notes": notes,
        "rewards": about,
    }
    (out_dir / "results.json").write_text(json.dumps(results, indent=2, default=str, allow_nan=False))


def draw_plots(out_dir, variants, sources, frames, xml_path, args):
    """Saves the plots that the states and labels allow, as png files; returns their captions by name.

    Where not every combination can be shown, it is the first wording and templates, for every model and alpha.
    """
    shown = [v for v in variants if v.goal == variants[0].goal and v.template == variants[0].template]
    plots = []
    if any(source.kind == "sweep" for source in sources):
        plots.append(plot_landscapes)
    if shown[0].metrics["roc_auc"] is not None:
        plots += [plot_precision_recall, plot_histograms]
    if len(args.clip) > 1 and rank_by_epic(shown):
        plots.append(plot_scale)
    captions = {}
    for plot in plots:
        name = plot.__name__.removeprefix("plot_")
        plot(shown, sources, frames).savefig(out_dir / f"{name}.png")
        captions[name] = plot.__doc__
    for number, clip in enumerate(args.clip, 1):
        of_clip = [variant for variant in variants if variant.clip == clip]
        best = (rank_by_epic(of_clip) or of_clip)[0]
        name = f"contact_sheet_{number}" if len(args.clip) > 1 else "contact_sheet"
        plot_contact_sheet(best, sources, frames, xml_path, args).savefig(out_dir / f"{name}.png")
        captions[name] = f"{plot_contact_sheet.__doc__} Scored by {best.name}."
    return captions


def make_panels(n, width=5.2, height=3.4, columns=2):
    """A matplotlib figure, and n axes in it."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def plot_landscapes(shown, sources, frames):
    """Reward along each sweep, each curve scaled from its lowest to its highest value, which the legend gives.

    An agent climbs such a curve: flat stretches and false peaks are where it may get stuck.
    """
    sweeps = [i for i, source in enumerate(sources) if source.kind == "sweep"]
    clips = dict.fromkeys(variant.clip for variant in shown)
    figure, axes = make_panels(len(sweeps) * len(clips))
    for (i, clip), ax in zip(itertools.product(sweeps, clips), axes, strict=False):
        sweep = frames[frames["number"] == i]
        position = sweep["position"]
        met = sweep["label"] == 1
        if met.any():
            ax.fill_between(position, 0, 1, met, color="tab:green", alpha=0.18, linewidth=0, label="goal state")
        for variant in [v for v in shown if v.clip == clip]:
            rewards = variant.rewards[sweep.index].astype(float)
            low = rewards.min()
            high = rewards.max()
            scaled = np.full(len(rewards), 0.5) if is_constant(rewards) else (rewards - low) / (high - low)
            ax.plot(position, scaled, label=f"{variant.formula} ({low:.4g} to {high:.4g})")
        ax.set(xlabel=sources[i].axis, ylabel="reward, lowest to highest", title=clip, ylim=(-0.03, 1.03))
        ax.legend(fontsize=7)
    return figure


def plot_precision_recall(shown, sources, frames):
    """Precision and recall as the threshold on the reward varies; of a binary reward some are marked."""
    counted = frames[frames["counted"]]
    clips = dict.fromkeys(variant.clip for variant in shown)
    figure, axes = make_panels(len(clips))
    for clip, ax in zip(clips, axes, strict=False):
        for variant in [v for v in shown if v.clip == clip]:
            precision, recall, limits = precision_recall_curve(counted["goal_state"], variant.scores[counted.index])
            label = f"{variant.formula}: average precision {variant.metrics['average_precision']:.3f}"
            ax.plot(recall, precision, drawstyle="steps-post", label=label)
            for mark in (0.1, 0.3, 0.5, 0.7, 0.9) if variant.alpha is None else ():
                at = np.searchsorted(limits, mark, "right")  # the reward is 1 above the threshold, not at it
                ax.plot(recall[at], precision[at], "k.")
                ax.annotate(f"{mark:g}", (recall[at], precision[at]), (3, 3), textcoords="offset points", fontsize=7)
        share = share_of(counted)
        ax.axhline(share, color="gray", linestyle="--", linewidth=1, label=f"guessing: {share:.3f}")
        ax.set(xlabel="recall: share of the goal states found", ylabel="precision", title=clip, ylim=(0, 1.03))
        ax.legend(fontsize=7, loc="lower left")
    return figure


def plot_histograms(shown, sources, frames):
    """Reward of goal and of other states, standardised; the less they overlap, the better."""
    counted = frames[frames["counted"]]
    figure, axes = make_panels(len(shown), 3.4, 2.5, 3)
    for variant, ax in zip(shown, axes, strict=False):
        rewards = variant.rewards[counted.index].astype(float)
        rewards = (rewards - rewards.mean()) / (1 if is_constant(rewards) else rewards.std())
        bins = np.linspace(rewards.min() - 1e-3, rewards.max() + 1e-3, 41)
        for state, name, color in ((0, "not the goal", "tab:gray"), (1, "goal state", "tab:green")):
            chosen = rewards[counted["goal_state"] == state]
            ax.hist(chosen, bins, density=True, alpha=0.6, color=color, label=f"{name} ({len(chosen)})")
        ax.set_title(variant.name, fontsize=9)
        ax.set(xlabel="standardised reward", ylabel="density")
        ax.legend(fontsize=7)
    return figure


def plot_heat_map(table):
    """ROC-AUC of each reward, a row, for each task, a column."""
    values = table.pivot(index="reward", columns="task", values=METRICS["roc_auc"]).loc[table["reward"].unique(), EIGHT]
    figure, (ax,) = make_panels(1, 9, 1.5 + 0.3 * len(values))
    image = ax.imshow(values, vmin=0.5, vmax=1.0, cmap="RdYlGn", aspect="auto")
    ax.set_xticks(range(len(EIGHT)), EIGHT, rotation=30, horizontalalignment="right")
    ax.set_yticks(range(len(values)), values.index)
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="ROC-AUC")
    return figure


def plot_scale(shown, sources, frames):
    """EPIC distance against the size of the model."""
    figure, (ax,) = make_panels(1)
    for formula in dict.fromkeys(variant.formula for variant in shown):
        line = sorted(rank_by_epic(v for v in shown if v.formula == formula), key=lambda variant: variant.parameters)
        ax.plot([v.parameters for v in line], [v.metrics["epic"] for v in line], "o-", label=formula)
        for variant in line:
            ax.vlines(variant.parameters, *variant.intervals.get("epic", (np.nan, np.nan)), color="gray", alpha=0.5)
    ax.set(xscale="log", xlabel="parameters of the CLIP model", ylabel="EPIC distance (lower is better)")
    ax.legend(fontsize=7)
    return figure


def plot_contact_sheet(variant, sources, frames, xml_path, args, columns=8):
    """Best and worst scored frames: look for what scores high and is not meant."""
    best_first = frames.assign(reward=variant.rewards, score=variant.scores)
    best_first = best_first.sort_values("score", ascending=False, kind="stable")  # of binary rewards many are the same
    rows = {"highest reward": best_first}
    if (frames["goal_state"] == 1).any():
        rows["highest reward, not the goal state"] = best_first[best_first["goal_state"] == 0]
        rows["lowest reward in the goal state"] = best_first[best_first["goal_state"] == 1][::-1]
    rows["lowest reward"] = best_first[::-1]
    render = SceneRenderer(xml_path, (144, 144), **scene_of(args)) if xml_path else None
    figure = Figure(figsize=(11, 1.9 * len(rows)), dpi=110, layout="constrained")
    for part, (title, candidates) in zip(figure.subfigures(len(rows)), rows.items(), strict=True):
        part.suptitle(title, x=0.005, horizontalalignment="left", fontsize=10)
        chosen = []
        for frame in candidates.itertuples():  # those within 5 steps of one that is shown look the same, but for photos
            apart = 0 if len(sources[frame.number].files or ()) > 1 else 5
            if all(frame.group != other.group or abs(frame.step - other.step) > apart for other in chosen):
                chosen.append(frame)
            if len(chosen) == columns:
                break
        for ax, frame in itertools.zip_longest(part.subplots(1, columns), chosen):
            ax.axis("off")
            if frame:
                ax.imshow(sources[frame.number].frame(render, frame.row))
                label = "" if np.isnan(frame.label) else f"   label {frame.label:g}"
                place = "sweep" if frame.kind == "sweep" else f"episode {frame.episode}"
                ax.set_title(f"{frame.reward:+.4f}{label}\n{place}, step {frame.step}", fontsize=7)
    return figure


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption, .small { color: #555; font-size: .85rem }
code, td:first-child { overflow-wrap: anywhere; min-width: 9rem } @page { size: A4; margin: 15mm }
@media print { body { font-size: 10pt; margin: 0; padding: 0 } .wide { overflow: visible } table { font-size: 7.5pt }
  th, td { padding-right: .35rem } figure, tr { break-inside: avoid } h2 { break-after: avoid } }
"""
AS_TEXT = dict(index=False, na_rep="-", float_format="{:.3f}".format)
EXPLANATIONS = {  # of columns
    "EPIC distance": "EPIC distance: 0 is the label itself up to scale and shift, 0.71 is unrelated, 1 its opposite.",
    "ROC-AUC": "ROC-AUC: the chance that a goal state scores above another state; guessing has 0.5.",
    "average precision": "Average precision: guessing has the share of goal states. All metrics depend on which states "
    "were judged, and on that share. Brackets, where there are some, are 95% intervals from a bootstrap over episodes.",
    "false positives": "False positives: the share of the other states above the threshold. A regularized reward has "
    "no threshold in training; here it gets the one with the highest F1 on these states.",
    "success_rate": "A trajectory succeeds if half of its steps are in the goal state (VLM-RM), that of the labels, "
    "whatever goal its agent had; low and high are the 95% Wilson interval.",
    "recorded": "Recorded is the reward here that is nearest to the one that training recorded: if they differ by more "
    "than 0.001, training had another model, alpha, template, camera or machine.",
}


def write_page(out_dir, goal, facts, tables, notes, captions):
    """Writes report.html, a page with everything in it, the plots too, and prints its text."""
    title = html.escape(f"Is this reward any good? {goal}")
    page = ["<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"]
    page += [f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    page += [f"<p>{'<br>'.join(html.escape(fact) for fact in facts)}</p>"]
    for heading, table, explanation in tables:
        with pd.option_context("display.max_colwidth", None):
            rows = table.to_html(border=0, **AS_TEXT)
        rows = re.sub(r" \[(\S+), (\S+)\]", r"<br>[\1,&nbsp;\2]", rows)  # an interval on a line of its own
        page += [f"<h2>{heading}</h2><div class='wide'>{rows}</div><p class='small'>{explanation}</p>"]
    page += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul><h2>Plots</h2>"]
    for name, caption in captions.items():
        data = base64.b64encode((out_dir / f"{name}.png").read_bytes()).decode()
        image = f"<img alt='{name}' src='data:image/png;base64,{data}'>"
        page += [f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"]
    page += [f"<p><code>{html.escape(shlex.join(sys.argv))}</code></p></html>"]
    (out_dir / "report.html").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(facts))
    for heading, table, explanation in tables:
        print(f"\n{heading}\n{table.to_string(**AS_TEXT)}\n{explanation}")
    print("\nNotes", *notes, f"\nreport in {out_dir / 'report.html'}", sep="\n")


# ---- checks and the command line


def check_flags(args):
    """Raises over flags that would fail late, or silently judge another reward than is meant."""
    if not (args.rollouts or args.frames or args.sweep):
        raise ValueError("nothing to judge: give --rollouts, --frames or --sweep")
    if args.labels and not args.frames:
        raise ValueError("--labels are for --frames, which is missing")
    prompts = {TASKS[task][0] for task in EIGHT}
    if args.task == "all" and (args.frames or args.sweep or set(args.goal or ()) != prompts):
        raise ValueError("--task all judges --rollouts by VLM-RM's prompts: leave --goal, --frames and --sweep out")
    models = tuple(itertools.zip_longest(args.clip, args.clip_pretrained))
    for flag, values in {"alpha": args.alpha, "clip": models, "template": args.template, "goal": args.goal}.items():
        if not values and flag != "goal":
            raise ValueError(f"--{flag} needs at least one value")
        if len(set(values or ())) < len(values or ()):
            raise ValueError(f"--{flag} names one twice: name each once")
    rivals = args.negatives if args.reward == "binary" else (args.baseline,)
    compares = args.reward == "binary" or max(args.alpha) > 0
    if compares and len({is_image(prompt) for prompt in (*(args.goal or ()), *rivals)}) > 1:
        raise ValueError("goals, --negatives and the --baseline of an --alpha: give sentences or images, not both")
    if args.reward == "regularized" and max(args.alpha) > 0 and args.baseline in (args.goal or ()):
        raise ValueError("--goal equals --baseline: no direction to regularise along; change one, or use --alpha 0")
    for template in args.template:
        if "{}" not in template:
            raise ValueError(f'--template "{template}" has no "{{}}" for the prompt')
    if args.reward == "binary" and not all(set(args.negatives) - {goal} for goal in args.goal or ()):
        raise ValueError("--reward binary needs --negatives for the goal to compete with")
    if args.clip_pretrained and len(args.clip_pretrained) != len(args.clip):
        raise ValueError("--clip-pretrained needs a tag for each --clip, in their order; `default` for the default one")


# Flags that a run's args.json brings along.
OF_A_RUN = """baseline alpha template reward negatives temperature threshold clip clip_pretrained image_resize_mode
    render_size restyle camera_distance camera_elevation camera_azimuth camera_lookat camera_follow""".split()
# The pendulum is seen from the side; --sweep pole and --task pole bring this along.
OF_THE_POLE = dict(env_id="InvertedPendulum-v5", baseline="pole and cart", camera_azimuth=90.0)
OF_THE_POLE |= dict(camera_distance=3.0, camera_lookat=(0.0, 0.0, 0.3))


def flags_of_run(rollout):
    """The flags of the training run that a rollout is of, as far as they make its reward and its frames."""
    flags = {"env_id": read_rollout(rollout)["env_id"]}
    path = rollout.absolute().parent.parent / "args.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    for name in OF_A_RUN:
        value = saved.get(name)
        if value is None or value == "env":  # a run on the environment's reward has no CLIP reward
            continue
        if name == "reward" and value not in ("regularized", "binary"):
            raise ValueError(f"{path}: --reward {value} is not one of this script's: add it to Args and make_variants")
        if name in ("alpha", "clip", "clip_pretrained"):  # one there, several here
            value = [value]
        flags[name] = tuple(value) if isinstance(value, list) else value
    if len(saved.get("goal", ())) > 1:  # they compete with each other
        flags["negatives"] = (*flags.get("negatives", ()), *saved["goal"])
    return flags


def read_flags():
    """The command line's flags; those left out are the first rollout's run's, and the goal is the task's prompt."""
    with one_line_errors("--traceback" in sys.argv):
        named = [word.partition("=")[0].replace("_", "-") for word in sys.argv]
        for flag in "--rollouts --sweep --goal --negatives --template --alpha --clip --clip-pretrained".split():
            if named.count(flag) > 1:
                raise ValueError(f"{flag} is given twice, and only the last would count: name all after one {flag}")
        args = tyro.cli(Args)
        if len(args.goal or ()) > 1 and {"a", "an", "the"} & set(args.goal):
            raise ValueError(f"--goal {' '.join(args.goal)}: that is {len(args.goal)} goals, put a sentence in quotes")
    goals = []
    if args.task == "all" and not (args.rollouts or args.frames):
        args.rollouts = (Path(__file__).parent / "tests" / "humanoid_states.npz",)
    defaults = OF_THE_POLE if "pole" in (args.task, *args.sweep) else {}
    if args.rollouts:
        with one_line_errors(args.traceback):
            goals = list(filter(None, dict.fromkeys(read_rollout(path)["goal"] for path in args.rollouts)))
            defaults = defaults | flags_of_run(args.rollouts[0])
        if "--clip" in named:
            defaults.pop("clip_pretrained", None)  # of the run's own model
    args = tyro.cli(Args, default=replace(args, **defaults))
    with one_line_errors(args.traceback):
        for flag, reward in {"--negatives": "binary", "--alpha": "regularized"}.items():
            if flag in named and args.reward != reward:
                raise ValueError(f"{flag} needs --reward {reward}, and these are judged by --reward {args.reward}")
    if args.task is None:  # the sweep's, or the one whose prompt is the goal
        named = {name for name in args.sweep if name in TASKS}
        named |= {name for name, (prompt, _) in TASKS.items() if prompt in (args.goal or goals)}
        if len(named) == 1:
            args.task = named.pop()
    if args.task == "all":
        args.goal = args.goal or tuple(TASKS[task][0] for task in EIGHT)
        args.negatives = args.negatives or args.goal  # of a binary reward: the other tasks
    if not args.goal:  # a run of many goals is judged by the one that the labels are of
        prompt = TASKS[args.task][0] if args.task in TASKS else None
        args.goal = (prompt,) if prompt and (not goals or prompt in goals) else tuple(goals)
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
    try:
        arguments = read_flags()
        evaluate_all_tasks(arguments) if arguments.task == "all" else evaluate_reward(arguments)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
