import dataclasses
import difflib
import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported: render without a window

import gymnasium as gym
import mujoco
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from gymnasium.envs.mujoco import MujocoEnv


@dataclass
class Args:
    # ---- CLIP ----
    clip: str = "ViT-L-14"
    """the CLIP model: an open_clip architecture, `hf-hub:ORG/NAME`, or a directory with an open_clip_config.json"""
    clip_pretrained: str | None = None
    """the weights' tag, as `open_clip.list_pretrained()` names it (default: the paper's for its models, else the newest)"""
    clip_batch_size: int = 256
    """frames per CLIP forward pass"""
    clip_precision: str | None = None
    """`fp32`, or `bf16` or `fp16` autocast of the encoders (default: fp32 on CPU, bf16 on CUDA)"""

    # ---- environment and camera ----
    env_id: str = "Humanoid-v5"
    """the Gymnasium id of the environment: continuous actions and `rgb_array` rendering"""
    num_envs: int = 8
    """environments stepped in parallel, each in a process of its own"""
    episode_length: int = 100
    """steps of an episode; episodes never end earlier, since termination leaks the task (VLM-RM, section 3)"""
    render_size: int | None = None
    """pixels, width and height of a rendered MuJoCo frame (default: the CLIP model's input size, so that nothing is resized)"""
    restyle: bool = True
    """render MuJoCo with a sky, a tiled floor and a light robot instead of the environment's own look (VLM-RM, section 4.3)"""
    camera_distance: float = 3.5
    """meters from the camera to the point it looks at"""
    camera_elevation: float = -10.0
    """degrees; negative looks down"""
    camera_azimuth: float = 180.0
    """degrees; 180 shows a robot that faces +x from the front"""
    camera_lookat: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """meters, the point the camera looks at"""
    camera_follow: bool = True
    """move the look-at's x and y with the robot, never its height; --no-camera-follow is the paper's fixed camera"""


# ---------------------------------------------------------------- the CLIP reward


def regularized_reward(frames, goals, baseline, alpha):
    """Goal-baseline regularised reward of each frame for each goal (VLM-RM, equation 3).

        R(s) = 1 - 1/2 || alpha proj_L(s) + (1 - alpha) s - g ||^2,  L the line through b and g

    `alpha = 0` is the cosine of frame and goal, `alpha = 1` keeps only what lies along g - b.

    Args:
        frames: `s`, L2-normalised embeddings, [N, D].
        goals: `g`, L2-normalised embeddings, [G, D].
        baseline: `b`, L2-normalised embedding, [D].
        alpha: regularisation strength in [0, 1].
    Returns:
        Rewards, [N, G].
    """
    if alpha == 0.0:
        return frames @ goals.T  # |s| = |g| = 1; also well-defined where goal and baseline coincide
    directions = F.normalize(goals - baseline, dim=-1)  # [G, D]
    offsets = frames[:, None, :] - goals[None, :, :]  # s - g, [N, G, D]
    along = (offsets * directions).sum(-1, keepdim=True) * directions  # proj_L(s) - g, since g is on L
    return 1.0 - 0.5 * (alpha * along + (1.0 - alpha) * offsets).square().sum(-1)


class CLIP:
    """An open_clip model that embeds frames and prompts.

    Args:
        name: what `open_clip.create_model` takes, as `resolve_clip` returns it.
        pretrained: the weights' tag, or None where `name` is a directory or a hub id.
        device: where the model runs.
        precision: "fp32", "bf16" or "fp16"; None is bf16 on CUDA and fp32 elsewhere.
        batch_size: frames per forward pass.
    Raises:
        RuntimeError: if pretrained weights were not loaded into the whole model.
    """

    def __init__(self, name, pretrained, device, precision=None, batch_size=256):
        self.device = torch.device(device)
        self.batch_size = batch_size
        precision = precision or ("bf16" if self.device.type == "cuda" else "fp32")
        self.autocast_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        # Without require_pretrained open_clip returns a *random* model, with only a warning, when weights are missing.
        self.model = open_clip.create_model(name, pretrained, device=self.device, require_pretrained=True)
        self.model.eval().requires_grad_(False)  # create_model leaves BatchNorm in training mode
        self.tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_preprocess_cfg(self.model)
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)  # (height, width)
        self.resize_mode, self.interpolation = config["resize_mode"], config["interpolation"]
        self.fill_color = config["fill_color"]
        self.mean = torch.tensor(config["mean"], device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(config["std"], device=self.device).view(1, 3, 1, 1)

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
            images = self.preprocess(chunk.to(self.device, non_blocking=True))  # uint8 until on the device
            with self.autocast():
                embeddings = self.model.encode_image(images)
            chunks.append(F.normalize(embeddings.float(), dim=-1))
        return torch.cat(chunks)

    def preprocess(self, frames):
        """open_clip's own evaluation transform, batched on the device: [N, H, W, 3] uint8 to [N, 3, h, w] float32."""
        images = frames.permute(0, 3, 1, 2).float()
        if tuple(images.shape[-2:]) != self.size:
            images = self.resize(images)
        return (images / 255.0 - self.mean) / self.std

    def resize(self, images):
        """Resizes [N, 3, H, W] in 0..255 as PIL does: one pass per axis, antialiased, rounded to 8 bits after each."""
        h, w = images.shape[-2:]
        if self.resize_mode == "squash":
            new_h, new_w = self.size
        else:  # "shortest" covers the input size and is cropped to it, "longest" fits into it and is padded
            pick = max if self.resize_mode == "shortest" else min
            scale = pick(self.size[0] / h, self.size[1] / w)
            new_h, new_w = (int(h * scale), int(w * scale)) if pick is max else (round(h * scale), round(w * scale))
        for shape in ((h, new_w), (new_h, new_w)):
            if tuple(images.shape[-2:]) != shape:
                images = F.interpolate(images, shape, mode=self.interpolation, antialias=True).round_().clamp_(0, 255)
        pad_h, pad_w = max(self.size[0] - new_h, 0), max(self.size[1] - new_w, 0)
        images = F.pad(images, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2), value=self.fill_color)
        top, left = round((images.shape[-2] - self.size[0]) / 2), round((images.shape[-1] - self.size[1]) / 2)
        return images[..., top : top + self.size[0], left : left + self.size[1]]


# ---------------------------------------------------------------- the rendered environments


def build_scene(xml_path, restyle):
    """Compiles an environment's MuJoCo XML for rendering, in its own look or in ours.

    The look is procedural (no image files) and cheap: what only costs time at a CLIP model's resolution (multisampling,
    shadows, reflections, fine meshes) is off. Returns a `mujoco.MjModel` with the same qpos as the environment's.
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
                geom.size[2] = 5.0  # meters between grid lines; at the Humanoid's 0.125 the floor alone takes 3 ms a frame
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
    """Renders MuJoCo states, each given by its qpos alone, to RGB frames.

    It draws a model of its own, so the simulation stays Gymnasium's to the bit whatever the look, and a saved trajectory
    of qpos can be rendered again at any size and from any camera. Its OpenGL context opens at the first frame.

    Args:
        xml_path: the environment's MuJoCo XML.
        size: pixels, (height, width).
        distance, elevation, azimuth, lookat: the free camera; meters, degrees, degrees, meters.
        follow: move the look-at's x and y with the robot's root body. Its height stays: a camera that follows it
            (as MuJoCo's tracking camera does) hides how high the robot is.
        restyle: as in `build_scene`.
    """

    opened_here = None  # pid of the process that started OpenGL: forking it afterwards hangs

    def __init__(self, xml_path, size, *, distance, elevation, azimuth, lookat, follow, restyle):
        self.model = build_scene(xml_path, restyle)
        self.data = mujoco.MjData(self.model)
        self.size, self.lookat, self.follow = size, tuple(lookat), follow
        self.camera = mujoco.MjvCamera()
        self.camera.distance, self.camera.elevation, self.camera.azimuth = distance, elevation, azimuth
        self.renderer = None

    def __call__(self, qpos):
        """The frame of one state, uint8 [H, W, 3]."""
        if self.renderer is None:
            SceneRenderer.opened_here = os.getpid()
            height, width = self.size
            self.model.vis.global_.offheight, self.model.vis.global_.offwidth = height, width
            self.renderer = mujoco.Renderer(self.model, height, width)
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
