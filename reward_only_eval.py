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
#     "torch==2.15.0",
#     "torchvision==0.29.2",
#     "open_clip_torch==3.3.0",
#     "huggingface_hub==2.4.0",
#     "gymnasium==1.4.0",
#     "mujoco==4.0.0",
#     "tyro==1.0.17",
#     "imageio==2.37.0",
#     "imageio-ffmpeg==0.6.0",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "tqdm==4.70.1",
#     "scipy==1.17.1",
#     "scikit-learn==1.9.1",
#     "matplotlib==3.11.2",
# ]
# ///
import base64
import copy
import csv
import difflib
import html
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field, replace
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
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot: no window, whatever the backend
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw, ImageOps
from scipy.stats import binomtest, pearsonr, spearmanr
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score
from tqdm import tqdm


@dataclass
class Args:
    # ---- run ----
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; auto is CUDA where there is one"""
    out_dir: Path | None = None
    """folder of the report (default: a new one under runs/)"""
    bootstrap: int = 500
    """resamples of the episodes for the 95% intervals; 0 leaves the intervals out"""

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
    sweep_points: int = 101
    """states of a sweep"""
    task: str | None = None
    """labels states: kneeling, lotus, standing, arms-raised, splits, hands-on-hips, arms-crossed, one-leg, pole"""

    # ---- prompts and rewards: every combination is judged ----
    env_id: str = "Humanoid-v5"
    """Gymnasium id: continuous actions, `rgb_array` rendering"""
    goal: tuple[str, ...] | None = None
    """wordings of the goal, each judged on its own (default: the task's prompt in VLM-RM)"""
    baseline: str = "a humanoid robot"
    """the neutral prompt of the goal-baseline regularisation"""
    alpha: tuple[float, ...] = (0.0,)
    """strengths of the goal-baseline regularisation, 0 (plain cosine, the paper's humanoid setting) to 1"""
    template: tuple[str, ...] = ("{}",)
    """prompt templates, "{}" is the prompt; the embeddings of several are averaged"""
    reward: Literal["regularized", "binary"] = "regularized"
    """VLM-RM's CLIP reward, or VLM-SR's"""
    negatives: tuple[str, ...] = ()
    """prompts that a goal competes with in the binary reward, beside the other goals"""
    temperature: float = 0.01
    """of the binary reward's softmax over cosines; CLIP models are trained with about 0.01"""
    threshold: float = 0.5
    """the binary reward is 1 where the goal's probability is above this"""

    # ---- CLIP ----
    clip: tuple[str, ...] = ("ViT-L-14",)
    """open_clip architectures, `hf-hub:ORG/NAME`, or directories that hold an open_clip_config.json and weights"""
    clip_pretrained: tuple[str, ...] = ()
    """tag of each architecture's weights, `default` for the paper's or one trained on LAION-2B (default: all those)"""
    clip_batch_size: int = 256
    """frames a CLIP forward pass"""
    clip_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """autocast of the encoders; auto is bf16 on CUDA and fp32 on CPU"""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """frames that are not square: shortest crops, longest pads, squash squeezes (default: the model's own setting)"""

    # ---- camera ----
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


# What a run's args.json tells about its reward and camera.
OF_A_RUN = ("baseline", "alpha", "template", "reward", "negatives", "temperature", "threshold", "clip",
            "clip_pretrained", "image_resize_mode", "render_size", "restyle", "camera_distance", "camera_elevation",
            "camera_azimuth", "camera_lookat", "camera_follow")
# The pendulum is seen from the side; --sweep pole and --task pole bring this along.
OF_THE_POLE = dict(env_id="InvertedPendulum-v5", baseline="pole and cart", camera_azimuth=90.0, camera_distance=3.0,
                   camera_lookat=(0.0, 0.0, 0.3))


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


def goal_probability(frames, goals, negatives, temperature):
    """The p(l | o) that `binary_reward` compares with its threshold: [N, G]."""
    logits = frames.double() @ torch.cat([goals, negatives]).double().T / temperature  # [N, G + M]
    return logits.softmax(-1)[:, : len(goals)]


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


# ---------------------------------------------------------------- the rendered states


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


# ---------------------------------------------------------------- the goal states of the tasks
# VLM-RM says in words what a person counted as the goal state. Here it is read off the simulator's state; lengths are
# in meters. For scale: the standing humanoid is 1.57 high, with its pelvis at 0.87 and its knees at 0.42.


class Body:
    """What the criteria look at in a Humanoid's state, from what `meets` makes. Pairs are (left, right)."""

    def __init__(self, model, data):
        floor = model.geom("floor").id
        pairs = data.contact.geom[data.contact.dist < 0.01]  # [n, 2]
        touching = set(pairs[(pairs == floor).any(1)].ravel().tolist()) - {floor}
        feet = [model.geom(f"{side}_foot").id for side in ("left", "right")]
        self.grounded, self.only_on_feet = bool(touching), bool(touching) and touching <= set(feet)
        torso, pelvis = data.body("torso"), data.body("pelvis")
        self.up = torso.xmat[8]  # how far the torso's own up-axis points up, 1 when upright
        self.pelvis = pelvis.xpos[2]
        butt = data.geom("butt")  # a capsule, lying across
        self.seat = butt.xpos[2] - abs(butt.xmat[8]) * model.geom("butt").size[1] - model.geom("butt").size[0]
        self.head_top = data.geom("head").xpos[2] + model.geom("head").size[0]
        self.center = data.subtree_com[1][:2]  # of mass, x and y
        self.feet_at = data.geom_xpos[feet]
        self.feet = self.feet_at[:, 2] - model.geom_size[feet, 0]  # heights of the soles, which are spheres
        shins = np.stack([data.body(f"{side}_shin").xpos for side in ("left", "right")])
        thighs = np.stack([data.body(f"{side}_thigh").xpos for side in ("left", "right")])
        self.knees = shins[:, 2]
        self.bend = -np.rad2deg([data.joint(f"{side}_knee").qpos[0] for side in ("left", "right")])  # 0 is straight
        outwards = np.outer((1, -1), pelvis.xmat[1::3])  # the pelvis's own left, and right
        self.thighs_out, self.legs_out = (  # how far they point to their own side: 0 straight down or ahead, 1 sideways
            (v * outwards).sum(1) / np.linalg.norm(v, axis=1) for v in (shins - thighs, self.feet_at - thighs))
        self.feet_off = np.abs((self.feet_at - pelvis.xpos) @ pelvis.xmat[1::3])  # from the body's middle plane
        self.feet_far = np.linalg.norm(self.feet_at - pelvis.xpos, axis=1)
        self.hands_at = np.stack([data.geom(f"{side}_hand").xpos for side in ("left", "right")])
        self.hands = (self.hands_at - torso.xpos) @ torso.xmat.reshape(3, 3)  # in the torso's axes: ahead, left, up
        hips = np.array([(-0.01, 0.17, 0.08), (-0.01, -0.17, 0.08)])  # on the pelvis's sides, where the hip bones are
        self.hands_to_hips = np.linalg.norm((self.hands_at - pelvis.xpos) @ pelvis.xmat.reshape(3, 3) - hips, axis=1)

    def stands(self):
        down = self.feet < 0.05
        if not (self.only_on_feet and self.up > 0.8 and self.pelvis > 0.7 and down.any()):
            return False
        return bool(np.linalg.norm(self.center - self.feet_at[down, :2].mean(0)) < 0.3)


def kneeling(model, data):
    """Both knees within 0.12 m of the floor and bent by 45 degrees or more, the torso's up-axis above 0.7 (45 degrees).

    And the robot touches the floor. Without the bend, sitting with the legs stretched out would be kneeling.
    """
    body = Body(model, data)
    return bool(body.knees.max() <= 0.12 and body.bend.min() > 45 and body.up > 0.7 and body.grounded)


def lotus(model, data):
    """The seat below 0.1 m, torso up-axis above 0.7, knees below 0.3 m, thighs out by 30 degrees, feet in.

    The joints' limits keep the knees of a folded leg 0.18 to 0.28 m up. Feet in: knees bent by 90 degrees or more, and
    each foot within 0.2 m of the body's middle plane and 0.4 m of the pelvis.
    """
    body = Body(model, data)
    seated = body.grounded and body.seat < 0.1 and body.up > 0.7
    feet_in = body.bend.min() > 90 and body.feet_off.max() < 0.2 and body.feet_far.max() < 0.4
    return bool(seated and feet_in and body.knees.max() < 0.3 and body.thighs_out.min() > 0.5)


def standing(model, data):
    """On its feet alone, pelvis above 0.7 m, torso up-axis above 0.8 (37 degrees), not falling.

    Not falling: the center of mass is within 0.3 m of the feet (the middle of those below 0.05 m), seen from above.
    """
    return Body(model, data).stands()


def arms_raised(model, data):
    """Standing, and both hands above the top of the head."""
    body = Body(model, data)
    return body.stands() and bool(body.hands_at[:, 2].min() > body.head_top)


def splits(model, data):
    """The seat below 0.1 m, torso up-axis above 0.5, legs low, straight and sideways.

    Low: soles below 0.15 m. Straight: knees bent by less than 45 degrees. Sideways: each leg points to its own side
    by 45 degrees or more; 63 is the joints' limit.
    """
    body = Body(model, data)
    seated = body.grounded and body.seat < 0.1 and body.up > 0.5
    sideways = body.legs_out.min() > math.sin(math.pi / 4)
    return bool(seated and body.feet.max() < 0.15 and body.bend.max() < 45 and sideways)


def hands_on_hips(model, data):
    """Standing, and each hand's center within 0.12 m of the side of the pelvis, 0.08 m above its middle."""
    body = Body(model, data)
    return body.stands() and bool(body.hands_to_hips.max() < 0.12)


def arms_crossed(model, data):
    """Standing, and before the chest each hand past the other by 0.1 m or more: not just touching.

    Before the chest: 0.05 to 0.45 m ahead of the torso's middle and within 0.2 m of its height. It is at the limit of
    what the joints allow: the forearms cross, but no hand reaches the other arm's elbow.
    """
    body = Body(model, data)
    ahead, left, up = body.hands.T
    before = 0.05 < ahead.min() and ahead.max() < 0.45 and np.abs(up).max() < 0.2
    return body.stands() and bool(before and left[1] - left[0] >= 0.1)


def one_leg(model, data):
    """Standing on one foot, the other's sole above 0.1 m, the center of mass within 0.2 m of the foot: balanced."""
    body = Body(model, data)
    low, high = np.argsort(body.feet)
    balanced = np.linalg.norm(body.center - body.feet_at[low, :2]) < 0.2
    return body.stands() and bool(body.feet[low] < 0.05 and body.feet[high] > 0.1 and balanced)


def pole(model, data):
    """The pole within 0.2 rad of upright, where the environment itself would end the episode."""
    return bool(abs(data.joint("hinge").qpos[0]) <= 0.2)


TASKS = {"kneeling": ("a humanoid robot kneeling", kneeling),
         "lotus": ("a humanoid robot seated down, meditating in the lotus position", lotus),
         "standing": ("a humanoid robot standing up", standing),
         "arms-raised": ("a humanoid robot standing up, with both arms raised", arms_raised),
         "splits": ("a humanoid robot practicing gymnastics, doing the side splits", splits),
         "hands-on-hips": ("a humanoid robot standing up with hands on hips", hands_on_hips),
         "arms-crossed": ("a humanoid robot standing up, with its arms crossed", arms_crossed),
         "one-leg": ("a humanoid robot standing up on one leg", one_leg),
         "pole": ("pole vertically upright on top of the cart", pole)}

# Poses for the sweeps, degrees: pitch of the root (positive is forward), abdomen_y, left and right leg (hip_x, hip_z,
# hip_y, knee), left and right arm (shoulder1, shoulder2, elbow; the right one mirrored, as if it were the left).
STRAIGHT = (0, 0, 0, -2)
HANGING = (-45, 50, -58)
POSES = {"standing": (0, 0, STRAIGHT, STRAIGHT, HANGING, HANGING),
         "squatting": (25, 0, (-8, 0, -100, -130), (-8, 0, -100, -130), (3, -31, -67), (3, -31, -67)),
         "kneeling": (0, 0, (0, 0, 0, -94), (0, 0, 0, -94), HANGING, HANGING),
         "lotus": (-8, -75, (0, -60, -60, -143), (0, -60, -60, -143), (-22, 9, -57), (-22, 9, -57)),
         "arms-raised": (0, 0, STRAIGHT, STRAIGHT, (85, -15, -85), (85, -15, -85)),
         "splits": (-3, -14, (-25, -60, -65, -9), (-25, -60, -65, -9), (51, 46, -66), (51, 46, -66)),
         "hands-on-hips": (0, 0, STRAIGHT, STRAIGHT, (-48, 78, -5), (-48, 78, -5)),
         "arms-crossed": (0, 0, STRAIGHT, STRAIGHT, (69, -59, 6), (-59, -8, -33)),
         "one-leg": (0, 0, STRAIGHT, (0, 0, -75, -100), HANGING, HANGING)}


def humanoid_pose(model, data, pitch, abdomen_y, left_leg, right_leg, left_arm, right_arm):
    """qpos [24] of a Humanoid in a pose of POSES, on the floor."""
    turn = math.radians(pitch) / 2
    joints = [0, abdomen_y, 0, *right_leg, *left_leg, -right_arm[0], -right_arm[1], right_arm[2], *left_arm]
    return to_floor(model, data, [0, 0, 1.4, math.cos(turn), 0, math.sin(turn), 0, *np.deg2rad(joints)])


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
    data, result = mujoco.MjData(model), np.empty(len(qpos))
    for i, state in enumerate(qpos):
        data.qpos[:] = state
        mujoco.mj_forward(model, data)
        result[i] = criterion(model, data)
    return result


# ---------------------------------------------------------------- states and frames


@dataclass(eq=False)
class Source:
    """Where n frames come from: the states of a rollout or a sweep, or pictures."""

    name: str
    kind: str  # "rollout", "sweep" or "frames"
    labels: np.ndarray  # [n], NaN where there is none
    episodes: np.ndarray  # [n], whole numbers from 0
    steps: np.ndarray  # [n]
    qpos: np.ndarray | None = None  # [n, nq]
    files: list[Path] | None = None  # n images, or one video
    square: bool = True  # whether all pictures are
    goal: str | None = None  # of the rollout
    recorded: np.ndarray | None = None  # [n], the CLIP rewards that training computed
    position: np.ndarray | None = None  # [n], along the sweep
    progress: np.ndarray | None = None  # [n], rises towards the goal
    axis: str = ""

    def chunks(self, render, n=256):
        """Yields all frames in order, uint8 [up to n, H, W, 3]: few at a time, to keep memory flat."""
        chunk, count = [], 0
        for count, frame in enumerate(self.pictures(render, range(len(self.steps))), 1):
            if chunk and (len(chunk) == n or frame.shape != chunk[0].shape):
                yield np.stack(chunk)
                chunk = []
            chunk.append(frame)
        if count != len(self.steps):
            fail(f"--frames: {self.name} ends at frame {count} of {len(self.steps)}")
        yield np.stack(chunk)

    def pictures(self, render, indices):
        """Yields the frames of these indices, uint8 [H, W, 3]."""
        if self.qpos is not None:
            yield from (render(self.qpos[i]) for i in indices)
            return
        try:
            if self.files[0].suffix.lower() in IMAGES:
                yield from (np.array(Image.open(self.files[i]).convert("RGB")) for i in indices)
            else:
                with imageio.get_reader(self.files[0]) as reader:  # in order it decodes every frame once
                    if isinstance(indices, range):
                        yield from itertools.islice(reader.iter_data(), len(indices))
                    else:
                        yield from (reader.get_data(int(i)) for i in indices)
        except Exception as error:
            fail(f"--frames: {self.name} can't be read ({error})")


IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def load_rollout(path, env_id, model):
    """The states of a training script's rollout file; what is after the end of an episode is dropped."""
    try:
        with np.load(path) as file:
            saved = {name: file[name] for name in file}
    except FileNotFoundError:
        fail(f"--rollouts: there is no {path}")
    except Exception as error:
        fail(f"--rollouts {path}: no rollout of the training scripts ({type(error).__name__}: {error})")
    if missing := {"env_id", "lengths"} - set(saved):
        fail(f"--rollouts {path}: no rollout of the training scripts, it lacks {', '.join(sorted(missing))}")
    if str(saved["env_id"]) != env_id:
        fail(f"--rollouts {path}: it is of {saved['env_id']}, not of {env_id}: judge one environment at a time")
    if "qpos" not in saved:
        fail(f"--rollouts {path}: {env_id} is no MuJoCo environment, so no states were saved to be rendered: give its "
             "frames or its video with --frames")
    qpos, lengths = saved["qpos"], saved["lengths"]
    if qpos.ndim != 3 or qpos.shape[2] != model.nq or lengths.shape != qpos.shape[:1]:
        fail(f"--rollouts {path}: its states {qpos.shape} are not [episodes, steps, {model.nq}] as {env_id} has them")
    alive = np.arange(qpos.shape[1]) < lengths[:, None]  # [episodes, T]
    episodes, steps = np.nonzero(alive)
    if not len(steps) or not np.isfinite(qpos[alive]).all():
        fail(f"--rollouts {path}: it holds no states, or some that are not finite")
    recorded = saved["clip_rewards"][alive] if "clip_rewards" in saved else None
    goal = str(saved["goal"]) if "goal" in saved else None
    labels = np.full(len(steps), np.nan)
    return Source(str(path), "rollout", labels, episodes, steps, qpos[alive], goal=goal, recorded=recorded)


def load_frames(path, labels):
    """The images of a folder, in the order of their names, or the frames of a video; labels are a csv or None."""
    if not path.exists():
        fail(f"--frames: there is no {path}")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        if not files:
            fail(f"--frames {path}: the folder holds no images ({' '.join(IMAGES)})")
        sizes = set()
        for file in files:
            try:
                with Image.open(file) as image:
                    sizes.add(image.size)
                    image.verify()
            except Exception as error:
                fail(f"--frames: {file} can't be read ({error})")
        n, index = len(files), {file.name: i for i, file in enumerate(files)}
    else:
        try:
            with imageio.get_reader(path) as reader:
                n, sizes = reader.count_frames(), {reader.get_meta_data()["size"]}
        except Exception as error:
            fail(f"--frames {path}: no video that can be read ({type(error).__name__})")
        files, index = [path], {}
    values, episodes = np.full(n, np.nan), np.zeros(n, int)
    if labels:
        index = {**{str(i): i for i in range(n)}, **index}
        try:
            rows = [row for row in csv.reader(labels.read_text().splitlines()) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            fail(f"--labels {labels}: it can't be read ({error})")
        names = {}
        for number, row in enumerate(rows, 1):
            frame, value, episode = [*map(str.strip, row), "", ""][:3]
            try:
                value = float(value)
            except ValueError:
                value = math.nan
                if number == 1 and frame not in index:
                    continue  # a header
            at = index.get(frame)
            if at is None or not math.isfinite(value) or np.isfinite(values[at]):
                why = (f"no such frame among the {n} of {path}" if at is None else
                       "that label is no number" if not math.isfinite(value) else "that frame has a label already")
                fail(f"--labels {labels}, row {number} ({','.join(row)}): {why}")
            values[at], episodes[at] = value, names.setdefault(episode, len(names))
        if not np.isfinite(values).any():
            fail(f"--labels {labels}: it holds no labels")
    square = all(width == height for width, height in sizes)
    return Source(str(path), "frames", values, episodes, np.arange(n), files=files, square=square)


ROOT = ("root_x", "root_y", "root_z", "root_roll", "root_pitch", "root_yaw")  # of a robot with a free joint


def make_sweep(spec, points, env):
    """States along a line, from what --sweep says: a task's pose, the pole, or a joint between two values."""
    model, data = env.model, mujoco.MjData(env.model)
    label, episodes, steps = np.full(points, np.nan), np.zeros(points, int), np.arange(points)
    if spec in POSES and spec in TASKS:
        share = np.linspace(0, 1, points)
        ends = POSES["squatting" if spec == "standing" else "standing"], POSES[spec]
        lines = [[np.multiply(a, 1 - s) + np.multiply(b, s) for a, b in zip(*ends, strict=True)] for s in share]
        qpos = np.stack([humanoid_pose(model, data, *line) for line in lines])
        axis = f"from {'squatting' if spec == 'standing' else 'standing'} (0) to the pose of {spec} (1)"
        return Source(f"sweep {spec}", "sweep", label, episodes, steps, qpos, position=share, progress=share, axis=axis)
    joint, *ends = ("hinge", -math.pi / 2, math.pi / 2) if spec == "pole" else spec.split(":")
    joints = {model.joint(i).name: model.jnt_qposadr[i] for i in range(model.njnt) if model.jnt_type[i] >= 2}
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
        joints |= dict.fromkeys(ROOT, model.jnt_qposadr[0])
    try:
        start, end = map(float, ends)
    except ValueError:
        fail(f"--sweep {spec}: neither a task ({', '.join(TASKS)}) nor JOINT:FROM:TO, such as hinge:-1:1")
    if joint not in joints:
        fail(f"--sweep {spec}: {env.spec.id} has no joint {joint}; it has {', '.join(joints)}")
    if not math.isfinite(start - end) or start == end:
        fail(f"--sweep {spec}: an empty sweep, from and to must differ")
    values, qpos = np.linspace(start, end, points), np.tile(env.init_qpos, (points, 1))
    if joint in ROOT[3:]:
        turn = np.zeros(4)
        for state, value in zip(qpos, values, strict=True):
            mujoco.mju_axisAngle2Quat(turn, np.eye(3)[ROOT.index(joint) - 3], value)
            mujoco.mju_mulQuat(state[3:7], turn, state[3:7].copy())
    else:
        qpos[:, joints[joint] + (ROOT.index(joint) if joint in ROOT else 0)] = values
    length = joint in ROOT[:3] or joint not in ROOT and model.joint(joint).type[0] == mujoco.mjtJoint.mjJNT_SLIDE
    progress = -np.abs(values) if spec == "pole" else np.arange(points)
    axis = f"{joint}, {'m' if length else 'rad'}"
    return Source(f"sweep {spec}", "sweep", label, episodes, steps, qpos, position=values, progress=progress, axis=axis)


def load_sources(args):
    """All states and frames with their labels, and the xml of the MuJoCo environment or None."""
    if not (args.rollouts or args.frames or args.sweep):
        fail("nothing to judge: give --rollouts, --frames or --sweep")
    if args.labels and not args.frames:
        fail("--labels are for --frames, which is missing")
    sources, env = [], None
    if args.rollouts or args.sweep:
        if args.env_id not in gym.registry and ":" not in args.env_id:
            near = ", ".join(difflib.get_close_matches(args.env_id, gym.registry, 4, 0.3))
            fail(f"--env-id {args.env_id}: no such Gymnasium environment (near: {near})")
        try:
            env = gym.make(args.env_id, disable_env_checker=True).unwrapped
        except Exception as error:
            fail(f"--env-id {args.env_id}: {error}")
        if not isinstance(env, MujocoEnv):
            what = f"--rollouts {args.rollouts[0]}" if args.rollouts else f"--sweep {args.sweep[0]}"
            fail(f"{what}: {args.env_id} is no MuJoCo environment, whose states could be rendered: give --frames")
        names = {env.model.body(i).name for i in range(env.model.nbody)}
        for task in {args.task, *args.sweep} & set(TASKS):
            if not names >= ({"cart", "pole"} if task == "pole" else {"lwaist", "left_shin"}):
                robot = "InvertedPendulum" if task == "pole" else "Humanoid"
                fail(f"{task} is a task of {robot}, not of {args.env_id}")
        sources += [load_rollout(path, args.env_id, env.model) for path in args.rollouts]
        sources += [make_sweep(spec, args.sweep_points, env) for spec in args.sweep]
        if args.task:
            for source in sources:
                source.labels = meets(TASKS[args.task][1], env.model, source.qpos)
    if args.frames:
        sources.append(load_frames(args.frames, args.labels))
    return sources, env and env.fullpath


def places(sources):
    """Yields each source with the slice of its frames among all N."""
    end = 0
    for source in sources:
        yield source, slice(end, end := end + len(source.steps))


def scene_of(args):
    """What SceneRenderer takes."""
    return dict(distance=args.camera_distance, elevation=args.camera_elevation, azimuth=args.camera_azimuth,
                lookat=args.camera_lookat, follow=args.camera_follow, restyle=args.restyle)


def encode(sources, xml_path, models, args):
    """Embeds every frame once with each model: a list of [N, D] float32, one a model.

    Rendered once for each input size; the models of one size see the same frames.
    """
    sizes = [(args.render_size,) * 2 if args.render_size else tuple(model.size) for model in models]
    embeddings = [[] for _ in models]
    with tqdm(total=sum(len(s.steps) for s in sources) * len(set(sizes)), unit=" frames", dynamic_ncols=True,
              desc="encode", mininterval=0.5 if sys.stderr.isatty() else 30) as progress:
        for size in dict.fromkeys(sizes):
            render = SceneRenderer(xml_path, size, **scene_of(args)) if xml_path else None
            for source in sources:
                for frames in source.chunks(render):
                    for i, model in enumerate(models):
                        if sizes[i] == size:
                            embeddings[i].append(model.encode_images(frames).cpu())
                    progress.update(len(frames))
            if render:
                render.close()
    return [torch.cat(parts) for parts in embeddings]


# ---------------------------------------------------------------- the figures


def constant(values):
    """Whether they differ by no more than float32's rounding: a correlation of them would be that of noise."""
    return np.ptp(values) <= 1e-6 * max(1.0, np.abs(values).max())


def epic_distance(rewards, labels):
    """EPIC distance of a reward to a goal task's labels (VLM-RM): sqrt((1 - rho) / 2), rho being Pearson's correlation.

    Rewards of the state after the step alone differ from their canonical form by a constant, so that their correlation
    is EPIC's. 0 is the same up to scale and shift, 0.71 unrelated, 1 the opposite; None where rho is not defined, since
    one of the two is constant.
    """
    if len(rewards) < 2 or constant(rewards) or constant(labels):
        return None
    return math.sqrt(max(0.0, 1.0 - float(pearsonr(rewards, labels).statistic)) / 2)


def figures_of(rewards, scores, labels, positive, cut):
    """The figures of a reward on labelled frames, None where one is not defined.

    Args:
        rewards: what is trained on, [n].
        scores: what ranks the frames, [n]: the reward, or the probability behind a binary one.
        labels: [n], graded ones too.
        positive: goal states, bool [n], or None.
        cut: scores above this are taken for the goal state.
    """
    epic = epic_distance(rewards, labels)
    result = {"pearson": None if epic is None else 1 - 2 * epic**2, "epic": epic}
    if positive is None or positive.all() or not positive.any():
        return result | dict.fromkeys(("roc_auc", "average_precision", "false_positive_rate"))
    (tn, fp), _ = confusion_matrix(positive, scores > cut, labels=[False, True])
    return result | {"roc_auc": float(roc_auc_score(positive, scores)),
                     "average_precision": float(average_precision_score(positive, scores)),
                     "false_positive_rate": float(fp / (tn + fp))}


FIGURES = {"epic": "EPIC distance", "pearson": "Pearson", "roc_auc": "ROC-AUC",
           "average_precision": "average precision", "false_positive_rate": "false positives"}


@dataclass(eq=False)
class Variant:
    """One reward: a model, alpha, wording and template, with its rewards of all N frames and what they are worth."""

    clip: str
    parameters: int  # of the whole model
    alpha: float | None  # None for the binary reward
    goal: str
    template: str
    rewards: np.ndarray
    scores: np.ndarray
    cut: float | None = None
    figures: dict = field(default_factory=dict)
    intervals: dict = field(default_factory=dict)
    monotone: dict = field(default_factory=dict)  # sweep -> rank correlation
    curve: tuple | None = None  # precision [k], recall [k]


def goal_states(labels, used, threshold):
    """Which frames are the goal state, bool [N]; None without labels, or for graded ones without a threshold."""
    if used.any() and np.isin(labels[used], (0, 1)).all():
        return labels == 1
    return None if threshold is None or not used.any() else labels > threshold


def make_variants(models, names, embeddings, args):
    """The rewards of all frames by every combination of model, wording, templates and alpha."""
    templates = [args.template] if len(args.template) == 1 else [args.template, *((t,) for t in args.template)]
    variants = []
    for model, name, frames in zip(models, names, embeddings, strict=True):
        parameters = sum(p.numel() for p in model.model.parameters())
        for goal, template in itertools.product(args.goal, templates):
            negatives = [n for n in args.negatives if n != goal]
            text = model.encode_text([goal, args.baseline, *negatives], template).cpu()
            words = template[0] if len(template) == 1 else f"mean of {len(template)}"
            about = (name, parameters)
            if args.reward == "binary":
                prompts = (text[:1], text[2:], args.temperature)
                rewards = binary_reward(frames, *prompts, args.threshold)[:, 0].numpy()
                scores = goal_probability(frames, *prompts)[:, 0].numpy()
                variants.append(Variant(*about, None, goal, words, rewards, scores, args.threshold))
                continue
            for alpha in args.alpha:
                parts = [regularized_reward(part, text[:1], text[1], alpha)[:, 0] for part in frames.split(4096)]
                rewards = torch.cat(parts).numpy()
                variants.append(Variant(*about, alpha, goal, words, rewards, rewards))
    return variants


def bootstrap(variants, used, labels, positive, episodes, draws):
    """Fills in 95% intervals: percentiles over resamples of whole episodes, since frames of one are much alike.

    `labels`, `positive` and `episodes` are of the frames `used` [n], indices of the variants' frames.
    """
    groups = [np.flatnonzero(episodes == e) for e in np.unique(episodes)]
    rng, samples = np.random.default_rng(0), [[] for _ in variants]
    for _ in tqdm(range(draws), desc="bootstrap", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30):
        index = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        chosen = None if positive is None else positive[index]
        for variant, sample in zip(variants, samples, strict=True):
            rewards, scores = variant.rewards[used[index]], variant.scores[used[index]]
            sample.append(figures_of(rewards, scores, labels[index], chosen, variant.cut))
    for variant, sample in zip(variants, samples, strict=True):
        for name in FIGURES:
            values = [figures[name] for figures in sample if figures[name] is not None]
            if len(values) > 0.9 * draws:  # resamples of one class only have no figure
                variant.intervals[name] = [float(v) for v in np.percentile(values, (2.5, 97.5))]


def judge(variants, sources, args):
    """Fills in the variants' figures. Returns the success rates, the notes, and which frames they are over [N]."""
    notes, labels = [], np.concatenate([s.labels for s in sources])
    swept, episodes, used = np.zeros(len(labels), bool), np.zeros(len(labels), int), np.isfinite(labels)
    for source, here in places(sources):
        swept[here] = source.kind == "sweep"
        if not source.square:
            notes.append(f"Not all frames of {source.name} are square: see --image-resize-mode.")
        episodes[here] = source.episodes + (episodes.max() + 1 if here.start else 0)
        for variant in variants if source.kind == "sweep" else ():
            rewards = variant.rewards[here]
            rho = None if constant(rewards) else float(spearmanr(source.progress, rewards).statistic)
            variant.monotone[source.name] = rho
    if (used & ~swept).any():
        if swept.any():
            notes.append("The figures are over rollouts and frames; a sweep's frames only draw its landscape.")
        used &= ~swept
        if missing := int((~used & ~swept).sum()):
            notes.append(f"{missing} frames without a label count in no figure.")
    success, positive = [], goal_states(labels, used, args.label_threshold)
    if not used.any():
        notes.append("No frame has a label, so there are rewards, landscapes and the contact sheet, but no figures: "
                     "give --task, or --labels for --frames.")
        return success, notes, used
    labels, episodes, positive = labels[used], episodes[used], positive if positive is None else positive[used]
    if graded := not np.isin(labels, (0, 1)).all():
        notes.append("The labels are graded, and so they enter Pearson and EPIC. " + (
            "All other figures need a goal state: give --label-threshold." if positive is None
            else f"In all other figures the goal state is a label above {args.label_threshold:g}."))
    if positive is not None and (positive.all() or not positive.any()):
        notes.append(f"{'All' if positive.all() else 'None'} of the {len(labels)} labelled frames are the goal state: "
                     "there is nothing to tell apart, so figures are missing. Give states of both kinds.")
    elif constant(labels):
        notes.append("All labels are the same: nothing correlates with them.")
    for variant in variants:
        rewards, scores = variant.rewards[used], variant.scores[used]
        if positive is not None and positive.any() and not positive.all():
            precision, recall, cuts = precision_recall_curve(positive, scores)
            variant.curve = precision, recall
            if variant.cut is None:  # nothing cuts a regularised reward in training: take the best there is
                f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
                cut = cuts[np.argmax(f1[:-1])]  # the frames at it count as goal states: go just below
                variant.cut = float(np.nextafter(cut, -np.inf, dtype=scores.dtype))
        variant.figures = figures_of(rewards, scores, labels, positive, variant.cut)
        if constant(rewards):
            notes.append(f"{label_of(variant, variants)}: the reward is the same on all labelled frames, so that no "
                         "correlation with it is defined.")
    if any(v.curve for v in variants):
        notes.append("False positives: the share of non-goal frames above " + (
            "the threshold of the highest F1; training with this reward uses none." if args.reward == "regularized"
            else f"the threshold, p > {args.threshold:g}. The other ranking figures are of the probability p itself."))
    count = len(np.unique(episodes))
    if count < 2:
        notes.append("All labelled frames are of one episode (a sweep is one): there is nothing to resample, so no "
                     "figure has an interval.")
    elif args.bootstrap:
        bootstrap(variants, np.flatnonzero(used), labels, positive, episodes, args.bootstrap)
        if count < 10:
            notes.append(f"The intervals come from only {count} episodes: take them as a rough guide.")
        if any(figure is not None and name not in v.intervals for v in variants for name, figure in v.figures.items()):
            notes.append("Too many resamples of the episodes held one class only: those figures have no interval.")
    for source in sources:
        several = source.kind == "rollout" or source.episodes.any()  # pictures are one episode unless the csv says more
        if source.kind != "sweep" and several and not graded and np.isfinite(source.labels).all():
            shares = np.array([source.labels[source.episodes == e].mean() for e in np.unique(source.episodes)])
            wins = int((shares >= 0.5).sum())
            interval = binomtest(wins, len(shares)).proportion_ci(method="wilson")
            success.append({"source": source.name, "goal": source.goal, "episodes": len(shares), "successes": wins,
                            "interval": [interval.low, interval.high], "goal_states": float(source.labels.mean())})
    return success, notes, used


def compare_with_recorded(variants, sources):
    """Notes on how near the rewards come to those that training recorded for the same states and goal."""
    near, other = {}, []
    for source, here in places(sources):
        same = [v for v in variants if v.goal == source.goal and source.recorded is not None]
        off = {v: float(np.abs(v.rewards[here] - source.recorded).max()) for v in same}
        best = min(off, key=off.get, default=None)
        if best and off[best] < 1e-3:
            near.setdefault(label_of(best, variants), []).append(off[best])
        elif best:
            other.append(source.name)
    notes = [f"The rewards that training recorded in {len(values)} rollout(s) are those of {label} here; the largest "
             f"difference is {max(values):.1g}." for label, values in near.items()]
    if other:
        notes.append(f"No reward here is the one that training recorded in {', '.join(other)}: another model, alpha, "
                     "template, camera or machine made it.")
    return notes


# ---------------------------------------------------------------- the report


def label_of(variant, variants):
    """What tells a variant from the others."""
    parts = [] if variant.alpha is None else [f"alpha {variant.alpha:g}"]
    if len({v.clip for v in variants}) > 1:
        parts.insert(0, variant.clip)
    for name in ("goal", "template"):
        values = list(dict.fromkeys(getattr(v, name) for v in variants))
        if len(values) > 1:
            parts.append(f"{name} {values.index(getattr(variant, name)) + 1}")
    return ", ".join(parts) or variant.clip


def table_of(variants, share):
    """Header and rows of the figures, as text; `share` is that of the goal states, or None."""
    names = [name for name in FIGURES if any(v.figures.get(name) is not None for v in variants)]
    sweeps = list(dict.fromkeys(name for v in variants for name in v.monotone))
    header = ["reward", *(FIGURES[name] for name in names), *(f"rank correlation, {name}" for name in sweeps)]
    if "average_precision" in names:
        header[1 + names.index("average_precision")] += f" (guessing: {share:.3f})"
    rows = []
    for variant in variants:
        row = [label_of(variant, variants)]
        for name in names:
            value, interval = variant.figures[name], variant.intervals.get(name)
            between = " [{:.3f}, {:.3f}]".format(*interval) if interval else ""
            row.append("-" if value is None else f"{value:.3f}{between}")
        rows.append(row + ["constant" if variant.monotone[s] is None else f"{variant.monotone[s]:.3f}" for s in sweeps])
    return header, rows


def as_text(header, rows):
    """A table for the terminal."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in [header, ["-" * width for width in widths], *rows])


def panels(n, width=5.2, height=3.4, columns=2):
    """A figure of n axes, side by side."""
    columns = min(n, columns)
    rows = -(-n // columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[n:]:
        unused.set_visible(False)
    return figure, axes


def color_of(variant, variants):
    """The color of its alpha, the same in all plots."""
    alphas = list(dict.fromkeys(v.alpha for v in variants))
    return colormaps["viridis"](0.9 * alphas.index(variant.alpha) / max(1, len(alphas) - 1))


def plot_landscapes(shown, sources):
    """Reward along each sweep, a panel a model, each curve scaled to 0..1: their heights do not compare."""
    clips = dict.fromkeys(v.clip for v in shown)
    shows = [(source, here, clip) for source, here in places(sources) if source.kind == "sweep" for clip in clips]
    figure, axes = panels(len(shows))
    for (sweep, here, clip), ax in zip(shows, axes, strict=False):
        if (sweep.labels == 1).any():
            ax.fill_between(sweep.position, 0, 1, where=sweep.labels == 1, color="tab:green", alpha=0.18, linewidth=0,
                            label="goal state")
        for variant in (v for v in shown if v.clip == clip):
            rewards = variant.rewards[here].astype(float)
            low, high = rewards.min(), rewards.max()
            scaled = np.full(len(rewards), 0.5) if constant(rewards) else (rewards - low) / (high - low)
            name = "p > threshold" if variant.alpha is None else f"alpha {variant.alpha:g}"
            ax.plot(sweep.position, scaled, color=color_of(variant, shown), label=f"{name} ({low:.4g} to {high:.4g})")
        ax.set(xlabel=sweep.axis, ylabel="reward, lowest to highest", title=clip, ylim=(-0.03, 1.03))
        ax.legend(fontsize=7)
    return figure


def plot_precision_recall(shown, prevalence):
    """Precision against recall as the threshold on the reward varies, a panel a model."""
    clips = list(dict.fromkeys(v.clip for v in shown))
    figure, axes = panels(len(clips))
    for clip, ax in zip(clips, axes, strict=False):
        for variant in (v for v in shown if v.clip == clip):
            name = "p" if variant.alpha is None else f"alpha {variant.alpha:g}"
            precision, recall = variant.curve
            ax.plot(recall, precision, drawstyle="steps-post", color=color_of(variant, shown),
                    label=f"{name}: average precision {variant.figures['average_precision']:.3f}")
        ax.axhline(prevalence, color="gray", linestyle="--", linewidth=1, label=f"guessing: {prevalence:.3f}")
        ax.set(xlabel="recall: share of the goal states found", ylabel="precision", title=clip, ylim=(0, 1.03))
        ax.legend(fontsize=7, loc="lower left")
    return figure


def plot_histograms(shown, used, positive):
    """Standardised reward of goal and non-goal states, a panel a variant: the less they overlap, the better."""
    figure, axes = panels(len(shown), 3.4, 2.5, 3)
    for variant, ax in zip(shown, axes, strict=False):
        rewards = variant.rewards[used].astype(float)
        rewards = (rewards - rewards.mean()) / (1 if constant(rewards) else rewards.std())
        bins = np.linspace(rewards.min() - 1e-3, rewards.max() + 1e-3, 41)
        for chosen, name, color in ((~positive, "not the goal", "tab:gray"), (positive, "goal state", "tab:green")):
            ax.hist(rewards[chosen], bins, density=True, alpha=0.6, color=color, label=f"{name} ({chosen.sum()})")
        ax.set_title(label_of(variant, shown) if len(shown) > 1 else variant.clip, fontsize=9)
        ax.set(xlabel="standardised reward", ylabel="density")
        ax.legend(fontsize=7)
    return figure


def plot_scale(shown):
    """EPIC distance against the size of the model, a line an alpha."""
    figure, (ax,) = panels(1)
    for alpha in dict.fromkeys(v.alpha for v in shown):
        line = [v for v in shown if v.alpha == alpha and v.figures.get("epic") is not None]
        line.sort(key=lambda v: v.parameters)
        sizes, color = [v.parameters for v in line], color_of(line[0], shown) if line else None
        name = "binary reward" if alpha is None else f"alpha {alpha:g}"
        ax.plot(sizes, [v.figures["epic"] for v in line], "o-", color=color, label=name)
        if line and all("epic" in v.intervals for v in line):
            ax.vlines(sizes, *np.transpose([v.intervals["epic"] for v in line]), color=color, alpha=0.5)
    ax.set(xscale="log", xlabel="parameters of the CLIP model", ylabel="EPIC distance (lower is better)")
    ax.legend(fontsize=7)
    return figure


def contact_sheet(variant, sources, labels, positive, xml_path, args, columns=8, tile=144):
    """The best and worst scored frames of a variant, also by label: people see a reward hack sooner than a figure does.

    Frames within 5 steps of one that is shown are left out, since they look the same.
    """
    order = np.argsort(variant.rewards, kind="stable")
    owners = [source for source in sources for _ in source.steps]
    local = np.concatenate([np.arange(len(source.steps)) for source in sources])
    rows = [("highest reward", order[::-1])]
    if positive is not None and positive.any():
        labelled = np.isfinite(labels)
        rows.append(("highest reward, not the goal state", [i for i in order[::-1] if labelled[i] and not positive[i]]))
        rows.append(("lowest reward in the goal state", [i for i in order if positive[i]]))
    rows.append(("lowest reward", order))
    render = SceneRenderer(xml_path, (tile, tile), **scene_of(args)) if xml_path else None
    sheet = Image.new("RGB", (columns * (tile + 6) + 6, len(rows) * (tile + 58) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, candidates) in enumerate(rows):
        y = 6 + row * (tile + 58)
        draw.text((6, y), title, fill="black", font_size=14)
        shown = []
        for i in candidates:
            source = owners[i]
            place = (source, source.episodes[local[i]], source.steps[local[i]])
            if all(place[:2] != other[:2] or abs(place[2] - other[2]) > 5 for other in shown):
                picture = Image.fromarray(next(source.pictures(render, [local[i]])))
                picture = ImageOps.pad(picture, (tile, tile), Image.BICUBIC, "white")
                x = 6 + len(shown) * (tile + 6)
                sheet.paste(picture, (x, y + 20))
                label = f"   label {labels[i]:g}" if np.isfinite(labels[i]) else ""
                place_text = f"episode {place[1]}, step" if source.kind == "rollout" else f"{source.kind},"
                draw.text((x, y + 21 + tile), f"{variant.rewards[i]:+.4f}{label}", fill="black", font_size=11)
                draw.text((x, y + 34 + tile), f"{place_text} {place[2]}", fill=(90, 90, 90), font_size=11)
                shown.append(place)
            if len(shown) == columns:
                break
    if render:
        render.close()
    return sheet


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td:first-child { min-width: 4.5rem } thead { display: table-header-group } .wide { overflow-x: auto }
code { font-size: .85em; overflow-wrap: anywhere }
figure { margin: 1rem 0 } figure img { max-width: 100%; height: auto } figcaption { color: #555; font-size: .85rem }
@page { size: A4; margin: 15mm }
@media print { body { font-size: 10pt; max-width: none; margin: 0; padding: 0 } .wide { overflow: visible }
  table { font-size: 7.5pt } th, td { padding-right: .35rem } figure, tr { break-inside: avoid }
  h2, h2 + p { break-after: avoid } figure img { max-height: 220mm } }
"""
READING = ("EPIC distance: 0 is the label itself up to scale and shift, 0.71 is unrelated to it, 1 its opposite. "
           "ROC-AUC: the chance that a goal state scores above another state, 0.5 is guessing. Average precision: "
           "guessing scores the share of goal states. All of them depend on which states were judged, and on that "
           "share. Brackets are 95% intervals from a bootstrap over episodes.")
SUCCESS = ("A trajectory succeeds when it is in the goal state for at least half of its steps (VLM-RM). Brackets are "
           "95% Wilson intervals.")
CAPTIONS = {
    "landscapes": "Reward along each sweep, each curve scaled from its lowest to its highest value, which the legend "
                  "gives. An agent climbs such a curve: flat stretches and false peaks are where it may get stuck.",
    "precision_recall": "Precision and recall as the threshold on the reward varies.",
    "histograms": "Reward of goal and of other states, standardised; the less they overlap, the better.",
    "scale": "EPIC distance against the size of the model.",
}


def html_table(header, rows):
    def line(tag, cells):
        texts = (html.escape(str(cell)).replace(" [", "<br>[") for cell in cells)  # an interval on a line of its own
        return "".join(f"<{tag}>{text.replace(', ', ',&nbsp;') if '[' in text else text}</{tag}>" for text in texts)

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table></div>"


def write_rewards(path, variants, sources):
    """Writes the csv: one row a frame, one column a reward."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["source", "episode", "step", "position", "label", *(label_of(v, variants) for v in variants)])
        rewards = iter(np.stack([v.rewards for v in variants], axis=1))  # rows of [variants]
        for s in sources:
            for i in range(len(s.steps)):
                name = s.files[i] if s.files and len(s.files) > 1 else s.name
                position = "" if s.position is None else f"{s.position[i]:.6g}"
                label = f"{s.labels[i]:g}" if np.isfinite(s.labels[i]) else ""
                row = (f"{reward:.7g}" for reward in next(rewards))
                table.writerow([name, s.episodes[i], s.steps[i], position, label, *row])


def write_report(out_dir, variants, sources, success, notes, used, xml_path, args):
    """Writes results.json, rewards.csv, the plots and report.html; returns the text for the terminal."""
    labels = np.concatenate([s.labels for s in sources])
    positive = goal_states(labels, used, args.label_threshold)
    judged = [v for v in variants if v.figures.get("epic") is not None]
    by_epic = sorted(judged, key=lambda v: v.figures["epic"])
    verdict = ""
    if judged:
        verdict = f"Lowest EPIC distance: {by_epic[0].figures['epic']:.3f}, {label_of(by_epic[0], variants)}."
    header, rows = table_of(variants, None if positive is None else positive[used].mean())

    # What was judged, in sentences
    balance = ""
    if positive is not None:
        share = positive[used].mean()
        balance = f"; {positive[used].sum()} of {used.sum()} labelled ones are the goal state ({share:.1%})"
    models = {v.clip: f"{v.clip} ({v.parameters / 1e6:,.1f}M parameters)" for v in variants}
    templates = list(dict.fromkeys(v.template for v in variants))
    facts = [f"{len(labels)} frames{balance}."]
    if args.task and xml_path:
        facts.append(f"Goal state of {args.task}: {' '.join(TASKS[args.task][1].__doc__.split())}")
    facts += [f"Goal{f' {i}' if len(args.goal) > 1 else ''}: {goal}" for i, goal in enumerate(args.goal, 1)]
    facts += [f"Template {i}: {template}" for i, template in enumerate(templates, 1) if templates != ["{}"]]
    others = ("Baseline", [args.baseline]) if args.reward == "regularized" else ("Negatives", args.negatives)
    facts.append(f"{others[0]}: {'; '.join(others[1])}")
    facts.append(f"Models: {', '.join(models.values())}")
    states = []
    for s, here in places(sources):
        known = positive is not None and np.isfinite(s.labels).any()
        share = f"{positive[here][np.isfinite(s.labels)].mean():.1%}" if known else "-"
        states.append([s.name, s.kind, s.goal or "", len(s.steps), len(np.unique(s.episodes)), share])
    won_header = ["source", "goal", "episodes", "success rate", "frames in the goal state"]
    won = [[s["source"], s["goal"] or "", str(s["episodes"]), f"{s['goal_states']:.1%}"] for s in success]
    for row, s in zip(won, success, strict=True):
        row.insert(3, "{:.1%} [{:.1%}, {:.1%}]".format(s["successes"] / s["episodes"], *s["interval"]))

    write_rewards(out_dir / "rewards.csv", variants, sources)
    results = {"args": asdict(args), "labelled_frames": int(used.sum()), "notes": notes, "success": success,
               "goal_share": None if positive is None else float(positive[used].mean()),
               "sources": [dict(zip(("name", "kind", "goal", "frames", "episodes"), row[:5], strict=True))
                           for row in states],
               "rewards": [{"name": label_of(v, variants), "clip": v.clip, "parameters": v.parameters, "alpha": v.alpha,
                            "goal": v.goal, "template": v.template, "threshold": v.cut, "figures": v.figures,
                            "intervals": v.intervals, "rank_correlation": v.monotone} for v in variants]}
    (out_dir / "results.json").write_text(json.dumps(results, indent=2, default=str, allow_nan=False))

    # Plots that could not show every combination show the first wording and templates, for every model and alpha.
    shown, pictures = [v for v in variants if v.goal == variants[0].goal and v.template == variants[0].template], {}
    if any(s.kind == "sweep" for s in sources):
        pictures["landscapes"] = plot_landscapes(shown, sources)
    if shown[0].curve:
        pictures["precision_recall"] = plot_precision_recall(shown, positive[used].mean())
        pictures["histograms"] = plot_histograms(shown, used, positive[used])
    if len(models) > 1 and judged:
        pictures["scale"] = plot_scale(shown)
    captions = {name: CAPTIONS[name] for name in pictures}
    for name, figure in pictures.items():
        figure.savefig(out_dir / f"{name}.png")
    for number, clip in enumerate(models, 1):
        best = next((v for v in by_epic if v.clip == clip), next(v for v in variants if v.clip == clip))
        name = f"contact_sheet_{number}" if len(models) > 1 else "contact_sheet"
        contact_sheet(best, sources, labels, positive, xml_path, args).save(out_dir / f"{name}.png")
        about = ", ".join(dict.fromkeys((clip, *label_of(best, variants).split(", "))))
        captions[name] = f"Best and worst scored frames, {about}: look for what scores high and is not meant."

    title, out = f"Is this reward any good? {args.goal[0]}", html.escape
    figures = [f"<figure><img alt='{name}' src='data:image/png;base64,"
               f"{base64.b64encode((out_dir / f'{name}.png').read_bytes()).decode()}'>"
               f"<figcaption>{out(caption)}</figcaption></figure>" for name, caption in captions.items()]
    page = ["<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
            f"<title>{out(title)}</title><style>{STYLE}</style><h1>{out(title)}</h1>",
            *(f"<p>{out(fact)}</p>" for fact in facts)]
    if len(header) > 1:
        page += ["<h2>Figures</h2>", f"<p><strong>{out(verdict)}</strong></p>"]
        page += [html_table(header, rows), f"<p>{READING}</p>"]
    if success:
        page += ["<h2>Success rates</h2>", f"<p>{SUCCESS}</p>", html_table(won_header, won)]
    if notes:
        page += ["<h2>Notes</h2>", "<ul>", *(f"<li>{out(note)}</li>" for note in notes), "</ul>"]
    page += ["<h2>Pictures</h2>", *figures, "<h2>States</h2>",
             html_table(["source", "kind", "goal", "frames", "episodes", "in the goal state"], states),
             f"<p><code>{out(shlex.join(sys.argv))}</code></p></html>"]
    (out_dir / "report.html").write_text("\n".join(page), encoding="utf-8")
    text = [*facts, ""] + ([as_text(header, rows), verdict, ""] if len(header) > 1 else [])
    text += [as_text(won_header, won), SUCCESS, ""] if success else []
    return "\n".join(text + [f"note: {note}" for note in notes])


# ---------------------------------------------------------------- the command line


def check_flags(args):
    """Ends the program over flags that cannot work, before anything slow starts."""
    for name in ("clip_batch_size", "sweep_points"):
        least = 2 if name == "sweep_points" else 1
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.task is not None and args.task not in TASKS:
        fail(f"--task {args.task}: no such task; there are: {', '.join(TASKS)}")
    for name in ("alpha", "clip", "template"):
        if not getattr(args, name):
            fail(f"--{name} is empty: give at least one")
    for alpha in args.alpha:
        if not 0.0 <= alpha <= 1.0:
            fail(f"--alpha must be in [0, 1], not {alpha}")
    if args.reward == "regularized" and max(args.alpha) > 0 and args.baseline in (args.goal or ()):
        fail("--goal equals --baseline, which leaves no direction to regularise along: change one, or use --alpha 0")
    for template in args.template:
        if "{}" not in template:
            fail(f'--template "{template}" has no "{{}}" for the prompt')
    if args.reward == "binary" and not all(set(args.negatives) - {goal} for goal in args.goal or ()):
        fail("--reward binary needs --negatives for the goal to compete with")
    if args.temperature <= 0:
        fail(f"--temperature must be above 0, not {args.temperature}")
    if args.clip_pretrained and len(args.clip_pretrained) != len(args.clip):
        fail("--clip-pretrained must name one tag for each --clip, in the same order; `default` for the default one")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        fail(f"--device {args.device}: use auto, cpu, cuda or cuda:N")
    if args.device.startswith("cuda") and int(args.device[5:] or 0) >= torch.cuda.device_count():
        fail(f"--device {args.device}: PyTorch finds no such CUDA device; use --device cpu")


def evaluate_reward(args):
    """Judges the rewards that the flags describe. Returns the folder of the report."""
    check_flags(args)
    sources, xml_path = load_sources(args)
    if not args.goal or not all(goal.strip() for goal in args.goal):
        fail("--goal is empty: describe the state to reach, or name a --task")
    tags = args.clip_pretrained or ("default",) * len(args.clip)
    found = [resolve_clip(clip, None if tag == "default" else tag) for clip, tag in zip(args.clip, tags, strict=True)]
    prompts = (*args.goal, *(args.negatives if args.reward == "binary" else (args.baseline,)))
    for clip_name, _, _ in found:
        check_prompts(clip_name, [t.replace("{}", p) for p in prompts for t in args.template])
    about = args.env_id.replace("/", "-") if xml_path else args.frames.stem
    name = f"{about}__{Path(__file__).stem}__{int(time.time())}"
    out_dir = args.out_dir or Path("runs") / name
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "results.json").write_text("")
    except OSError as error:
        fail(f"--out-dir {out_dir} can't be written: {error.strerror}")
    if xml_path:
        try:
            probe = SceneRenderer(xml_path, (64, 64), **scene_of(args))
            probe(next(s.qpos[0] for s in sources if s.qpos is not None))
            probe.close()
        except Exception as error:
            fail(f"rendering with MUJOCO_GL={os.environ.get('MUJOCO_GL')} fails ({error}); {EGL_ADVICE}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    models = []
    for clip, (name, tag, _) in zip(args.clip, found, strict=True):
        try:
            models.append(CLIP(name, tag, device, args.clip_precision, args.clip_batch_size,
                            args.image_resize_mode))
        except Exception as error:
            fail(f"--clip {clip}: its weights do not load ({error})")

    embeddings = encode(sources, xml_path, models, args)  # ENCODE: each frame once a model
    variants = make_variants(models, args.clip, embeddings, args)  # REWARD: all that reuses the embeddings
    success, notes, used = judge(variants, sources, args)  # JUDGE
    notes += compare_with_recorded(variants, sources)
    print(write_report(out_dir, variants, sources, success, notes, used, xml_path, args))  # REPORT
    return out_dir


def read_flags():
    """The command line's flags; those left out are the first rollout's run's, and the goal is the task's prompt."""
    args, preset, goals = tyro.cli(Args), {}, []
    if args.rollouts:
        saved = {}
        try:
            preset["env_id"] = str(np.load(args.rollouts[0])["env_id"])
            goals = list(dict.fromkeys(str(np.load(path)["goal"]) for path in args.rollouts))
            saved = json.loads((args.rollouts[0].parent.parent / "args.json").read_text())
        except Exception:  # a file that can't be read is an error later; without its run a rollout has default flags
            pass
        for name in OF_A_RUN:
            value = saved.get(name)
            if value is not None and not (name == "reward" and value == "env"):
                single = name in ("alpha", "clip", "clip_pretrained")
                preset[name] = (value,) if single else tuple(value) if isinstance(value, list) else value
        trained = saved.get("goal", [])
        preset["negatives"] = (*preset.get("negatives", ()), *([trained] if isinstance(trained, str) else trained))
        if args.clip != Args.clip:
            preset.pop("clip_pretrained", None)  # of the run's own model
    elif "pole" in (args.task, *args.sweep):
        preset = OF_THE_POLE
    args = tyro.cli(Args, default=replace(args, **preset))
    if args.task is None:  # the sweep's, or the one whose prompt is the goal
        named = [name for name in args.sweep if name in TASKS]
        named += [name for name, (prompt, _) in TASKS.items() if prompt in (args.goal or goals)]
        args = replace(args, task=named[0] if len(set(named)) == 1 else None)
    if not args.goal:  # a run of many goals is judged by the one that the labels are of
        prompt = TASKS[args.task][0] if args.task in TASKS else None
        args = replace(args, goal=(prompt,) if prompt and (not goals or prompt in goals) else tuple(goals))
    return args


if __name__ == "__main__":
    try:
        print(f"report in {evaluate_reward(read_flags()) / 'report.html'}")
    except KeyboardInterrupt:
        sys.exit(130)
