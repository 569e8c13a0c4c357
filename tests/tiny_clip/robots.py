"""What the embedded CLIP sees: robots in poses and in simulated motion, their labels and their frames.

Robots are posed and simulated, a rule reads each state's label off the simulator, and the training scripts' own
renderer draws it. The poses are in poses.toml, the names of postures in vocabulary.toml. train.py trains on the frames
and labels that `make_data` makes of them.

From the top: the tables, the robots with the rule, the states to render, the data.
"""

import copy
import functools
import itertools
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
# The renderer that the scripts train with. mujoco comes from there too: it must be imported after MUJOCO_GL is set.
from sac_vlmrm import SceneRenderer, mujoco  # isort: skip
from success import LYING

from reward_only_eval import TASKS, Body

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- tables


def read_toml(name):
    return SimpleNamespace(**tomllib.loads((HERE / name).read_text(encoding="utf-8")))


WORDS = read_toml("vocabulary.toml")
TABLES = read_toml("poses.toml")
MODEL = json.loads((HERE / "open_clip_config.json").read_text())
SIZE = MODEL["model_cfg"]["vision_cfg"]["image_size"]

# The humanoid's states as (posture, arms): one for each name in the table of poses.
STATES = {state: (state, None) for state in TABLES.poses}
STATES |= {state: ("standing", arms) for state, arms in TABLES.standing_arms.items()}
OTHER_STATES = [state for other in WORDS.others.values() for state in other["states"]]
ALL_STATES = [*STATES, *OTHER_STATES]  # the classes
ALL_POSTURES = [*WORDS.postures, *OTHER_STATES]
ALL_ARMS = list(WORDS.arms)
ROBOT_OF_POSTURE = ["humanoid"] * len(WORDS.postures)
ROBOT_OF_POSTURE += [name for name, other in WORDS.others.items() for _ in other["states"]]
PROMPTS = {s: words if s in OTHER_STATES else f"a humanoid robot {words}" for s, words in WORDS.prompts.items()}
EPISODE_STATES = [state for state, times in TABLES.episode_states.items() for _ in range(times)]
WAYS = TABLES.ways["scored"] + TABLES.ways["others"]

# The states whose sentences get a graded target: VLM-RM's eight tasks and two of lying, by the criteria of success.
CRITERIA = {name.replace("-", " "): criterion for name, (_, criterion) in TASKS.items() if name != "pole"}
CRITERIA |= {"back": LYING["on-its-back"][1], "front": LYING["face-down"][1]}
GRADED = list(CRITERIA)

STRAIGHT = (0, 0, 0, -2)  # a leg
DEFAULT_CAMERA = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0.0, 0.0, 1.0), follow=True)
SHARD = 250  # frames that a process makes at a time


# ---------------------------------------------------------------- robots


def gate(value, threshold, width):
    """0 well below the threshold, 1 well above, one half on it."""
    return 1.0 / (1.0 + np.exp(np.clip((threshold - value) / width, -30, 30)))


def ramp(value, *knots):
    """0 below the first knot, 1 above the last, as much between each two."""
    return np.interp(value, knots, np.linspace(0, 1, len(knots)))


def of_both(left_right):
    """Of a pair: one alone is worth a sixth."""
    return 0.67 * min(left_right) + 0.33 * np.mean(left_right)


def mostly_all(values):
    """Their product, with some of the mean, so that the first of them is worth something too."""
    return 0.4 * np.mean(values) + 0.6 * np.prod(values)


def one_hot(name, names):
    return np.eye(len(names), dtype=np.float32)[names.index(name)]


def two_arms(angles, mirrored=False):
    """Left and right arm: of a pose that is the same on both sides, or of one that has six angles."""
    arms = [angles[:3], angles[-3:]]
    return arms[::-1] if mirrored else arms


class Robot:
    """An environment's own model, and renderers of several sizes."""

    def __init__(self, env_id):
        env = gym.make(env_id).unwrapped
        self.model = env.model
        self.data = mujoco.MjData(env.model)
        self.renderers = {}
        for size in (SIZE, 64, 128, 224):
            self.renderers[size] = SceneRenderer(env.fullpath, (size, size), **DEFAULT_CAMERA, restyle=True)
        env.close()

    def render(self, rng, qpos, camera):
        """The frame of a state at the model's size; a share of them is rendered at another size and resized."""
        size = SIZE if rng.random() < 0.88 else rng.choice([64, 128, 224])
        renderer = self.renderers[size]
        camera = DEFAULT_CAMERA | camera
        renderer.camera.distance = camera["distance"]
        renderer.camera.elevation = camera["elevation"]
        renderer.camera.azimuth = camera["azimuth"]
        renderer.lookat = camera["lookat"]
        renderer.follow = camera["follow"]
        frame = Image.fromarray(renderer(qpos))
        return np.asarray(frame if size == SIZE else frame.resize((SIZE, SIZE), Image.BICUBIC))

    def forward(self, qpos):
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)

    def lowest(self):
        """Height of each geom's lowest point, the floor left out."""
        half = np.where(self.model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE, self.model.geom_size[:, 1], 0)
        return (self.data.geom_xpos[:, 2] - np.abs(self.data.geom_xmat[:, 8]) * half - self.model.geom_size[:, 0])[1:]

    def turn(self, qpos, angle, axis=(0, 0, 1)):
        """Turns the whole robot about an axis of the world through its root."""
        rotation = np.zeros(4)
        turned = np.zeros(4)
        mujoco.mju_axisAngle2Quat(rotation, np.array(axis, float), angle)
        mujoco.mju_mulQuat(turned, rotation, qpos[3:7])
        return np.concatenate([qpos[:3], turned, qpos[7:]])


class Humanoid(Robot):
    """Is put in poses and simulated; a rule reads a state's label off the simulator."""

    def __init__(self):
        super().__init__("Humanoid-v5")
        self.low, self.high = self.model.jnt_range[1:].T + np.array([[0.01], [-0.01]])
        self.joint_of_actuator = self.model.actuator_trnid[:, 0]
        # What is within 1 cm of the floor touches it, as for the criteria of success.
        self.near_model = copy.copy(self.model)
        self.near_model.geom_margin[:] = 0.01
        self.near_data = mujoco.MjData(self.near_model)
        # Each arm pose as the positions of elbows and hands about the torso. Raised arms have a rule of their own.
        self.arm_marks = []
        for name, arm in TABLES.arm_poses.items():
            if name != "raised":
                for mirrored in {False, len(arm) == 6}:
                    self.forward(self.pose(0, 0, STRAIGHT, STRAIGHT, *two_arms(arm, mirrored)))
                    self.arm_marks.append((name, self.arm_positions()))

    def pose(self, pitch, abdomen_y, left_leg, right_leg, left_arm, right_arm):
        """qpos [24] from angles in degrees; right_arm is given mirrored, as the left one is."""
        joints = [0, abdomen_y, 0, *right_leg, *left_leg, -right_arm[0], -right_arm[1], right_arm[2], *left_arm]
        half = np.deg2rad(pitch) / 2
        return np.concatenate([[0, 0, 1.4, np.cos(half), 0, np.sin(half), 0], np.deg2rad(joints)])

    def within_limits(self, qpos):
        return np.concatenate([qpos[:7], np.clip(qpos[7:], self.low, self.high)])

    def to_floor(self, qpos, height=0.0):
        self.forward(qpos)
        qpos[2] += height - self.lowest().min()
        return qpos

    def settle(self, qpos, steps):
        """Lets go of all joints for some environment steps."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        mujoco.mj_step(self.model, self.data, 5 * int(steps))
        return self.data.qpos.copy()

    def arm_positions(self):
        """Elbows and hands about the torso, the right ones mirrored: [2 arms, 6]."""
        torso = self.data.xmat[1].reshape(3, 3)
        points = np.array([self.data.xpos[11], self.data.geom_xpos[14], self.data.xpos[13], self.data.geom_xpos[17]])
        points = (points - self.data.xpos[1]) @ torso
        points[:2, 1] *= -1
        return points.reshape(2, 6)

    def label(self, qpos):
        """Shares of ALL_POSTURES and of ALL_ARMS in a state; between two, both have some.

        Kneeling: both knees within 0.12 m of the floor, the torso's up-axis above 0.7, thighs not on the floor, not in
        the air.
        """
        self.forward(qpos)
        low = self.lowest()
        xpos = self.data.xpos
        chest = xpos[1, 2]
        pelvis = xpos[3, 2]
        knees = xpos[[5, 8], 2]
        highest_knee = knees.max()
        feet = low[[7, 10]]
        hands = low[[13, 16]].max()
        upper_body = low[[0, 1, 2, 11, 12, 13, 14, 15, 16]].min()
        face, side, up = self.data.xmat[1][6:]  # how far the torso's axes point up
        torso_up = gate(up, 0.68, 0.03)
        torso_half_up = gate(up, 0.55, 0.04)
        thighs = [xpos[5] - xpos[4], xpos[8] - xpos[7]]
        thighs = [thigh / np.linalg.norm(thigh) for thigh in thighs]
        spread = np.rad2deg(np.arccos(np.clip(thighs[0] @ thighs[1], -1, 1)))
        bend = np.rad2deg(-qpos[[13, 17]])
        bent = gate(bend.min(), 45, 5)

        # Each rule takes its share of what the rules before it have left, and divides it among postures.
        shares = dict.fromkeys(ALL_POSTURES, 0.0)
        left = 1.0

        def claim(amount, parts):
            nonlocal left
            for posture, part in parts.items():
                shares[posture] += left * amount * part
            left *= 1.0 - amount

        tilted = gate(-up, -0.65, 0.04)
        claim(gate(low.min(), 0.15, 0.025), {"mid-air": 1 - 0.5 * tilted, "falling": 0.5 * tilted})
        knees_down = gate(-highest_knee, -0.13, 0.008)
        claim(knees_down * gate(up, 0.68, 0.02) * gate(pelvis, 0.18, 0.012) * bent, {"kneeling": 1})
        # Knees that sink while the thighs point down: between standing and kneeling, by their height.
        sunk = 0.8 * np.clip((0.4 - highest_knee) / 0.3, 0, 1)
        sinking = torso_up * gate(-max(thighs[0][2], thighs[1][2]), 0.75, 0.04) * gate(-highest_knee, -0.37, 0.015)
        level = sinking * gate(-abs(knees[0] - knees[1]), -0.15, 0.03)
        claim(level * ramp(-abs(highest_knee - 0.2), -0.1, -0.03), {"almost kneeling": 1})
        claim(level, {"kneeling": sunk, "standing": 1 - sunk})
        one_knee = torso_up * gate(-knees.min(), -0.13, 0.01) * gate(highest_knee, 0.2, 0.02)
        claim(one_knee * gate(pelvis, 0.28, 0.02), {"one knee": 0.75, "kneeling": 0.25})
        lifted = gate(feet.max(), 0.14, 0.02) * gate(-feet.min(), -0.1, 0.02)
        barely = (1 - lifted) * gate(feet.max(), 0.05, 0.01) * gate(-feet.min(), -0.03, 0.01)
        parts = {"one leg": lifted, "foot barely up": barely, "standing": 1 - lifted - barely}
        claim(gate(up, 0.78, 0.03) * gate(pelvis, 0.72, 0.03), parts)
        folded = gate(bend.min(), 100, 8) * gate(-highest_knee, -0.34, 0.02) * gate(spread, 45, 6)
        straddle = gate(spread, 85, 6) * gate(-bend.max(), -50, 6) * gate(-highest_knee, -0.25, 0.02)
        seated = {"splits": straddle, "lotus": (1 - straddle) * folded, "sitting": (1 - straddle) * (1 - folded)}
        claim(gate(-min(low[3], low[4]), -0.12, 0.015) * torso_half_up, seated)
        squatting = torso_half_up * gate(pelvis, 0.22, 0.02) * gate(-feet.max(), -0.17, 0.02)
        claim(squatting * gate(knees.min(), 0.17, 0.02) * bent, {"squatting": 1})
        rolled = gate(abs(side), abs(face), 0.12)  # onto its side
        back = (1 - rolled) * gate(face, 0, 0.05)
        front = (1 - rolled) * gate(-face, 0, 0.05)
        lying = gate(-chest, -0.37, 0.02) * gate(-pelvis, -0.36, 0.02)
        claim(lying, {"side": rolled, "back": back, "front": front})
        crawling = gate(-face, 0.55, 0.05) * gate(-highest_knee, -0.25, 0.02) * gate(-hands, -0.25, 0.03)
        claim(crawling * gate(pelvis, 0.25, 0.03), {"crawling": 1})
        claim(torso_up * gate(pelvis, 0.25, 0.02), {"one knee": 0.5, "squatting": 0.5})  # a lunge
        claim(gate(-up, -0.8, 0.04) * gate(chest, 0.42, 0.04) * gate(upper_body, 0.05, 0.02), {"falling": 1})
        claim(1.0, {"tangle": 1})
        return np.array(list(shares.values()), np.float32), self.arms_label()

    def arms_label(self):
        """Shares of ALL_ARMS in the current state: by how near elbows and hands are to those of each arm pose."""
        arms = self.arm_positions()
        near = dict.fromkeys(ALL_ARMS, 0.0)
        for name, mark in self.arm_marks:
            if name == "bent":
                name = "down"
            elif name not in near:
                name = "other"
            near[name] += np.exp(-((arms - mark) ** 2).sum() / (4 * 0.11**2))
        near["other"] += np.exp(-(1.4**2))
        total = sum(near.values())
        raised = sorted(gate(arms[:, 5], 0.27, 0.02))  # hands above the head's middle, the lower one first
        shares = {name: (1 - raised[1]) * value / total for name, value in near.items()}
        shares["raised"] = raised[0]
        shares["one raised"] = raised[1] - raised[0]
        return np.array(list(shares.values()), np.float32)

    def scores(self, qpos):
        """How well a state fits each of GRADED, in 0..1; the criteria of success decide what is above 0.6.

        Outside of a criterion the score is 0.6 times how near the state is to it, inside 0.8 to 1 with the distance
        from its edge. A fifth of it falls with the other joints' distance from a natural pose. Nearness is a product of
        what the criterion asks for, each from 0 far off to 1 at the edge, and a little of their mean: that has a
        slope where a factor is 0, as for who lies on the floor and sits up.
        """
        self.forward(qpos)
        arms = self.arm_positions()
        hanging = [mark for name, mark in self.arm_marks if name in ("down", "bent", "start")]
        arms_off = np.mean([min(np.linalg.norm(arms[i] - mark[i]) for mark in hanging) for i in (0, 1)])
        arms_natural = np.exp(-((arms_off / 0.5) ** 2))
        joints = np.rad2deg(qpos[7:])
        chest_natural = np.exp(-((joints[:3] / 35) ** 2).sum())
        body_natural = chest_natural * np.exp(-(((joints[3:11] - 2 * STRAIGHT) / 45) ** 2).mean())

        data = self.near_data
        data.qpos[:] = qpos
        mujoco.mj_forward(self.near_model, data)
        b = Body(self.near_model, data)
        down = b.soles < max(0.05, b.soles.min() + 0.01)
        offset = np.linalg.norm(b.center - b.feet_at[down, :2].mean(0))  # of the center of mass from what it stands on
        above_head = b.hands_at[:, 2] - b.head_top
        crossed = b.hands[1, 1] - b.hands[0, 1]
        ahead = b.hands[:, 0]
        off_chest = np.abs(b.hands[:, 2]).max()
        sole = b.soles.max()
        balance = np.linalg.norm(b.center - b.feet_at[b.soles.argmin(), :2])
        chest = data.body("torso").xpos[2]
        face = data.body("torso").xmat[6]
        # Turned away from the default camera limbs are hidden, and an agent would be paid for what they might be doing.
        shown = 0.5 + 0.5 * ramp(data.body("torso").xmat[0], 0.3, 0.85)
        high, wide = b.knees.max(), np.abs(b.feet[:, 1]).max()
        far = np.linalg.norm(b.feet, axis=1).max()

        stance = [ramp(b.pelvis, 0.1, 0.7), ramp(b.up, 0, 0.8)]
        stance.append(ramp(-offset, -0.9, -0.3) * ramp(-b.soles.min(), -0.3, -0.05))
        firm = np.mean([ramp(b.pelvis, 0.7, 0.82), ramp(b.up, 0.8, 0.96), ramp(-offset, -0.3, -0.1)])
        hips = of_both([ramp(-distance, -0.7, -0.17, -0.145, -0.12) for distance in b.hands_to_hips])
        before_chest = ramp(ahead.min(), -0.3, 0.05) * ramp(-ahead.max(), -0.7, -0.45) * ramp(-off_chest, -0.7, -0.2)
        cross = ramp(crossed, -0.6, 0.1) * (0.15 + 0.85 * before_chest)
        one_foot = ramp(sole, 0, 0.1) * (0.5 + 0.5 * ramp(-balance, -0.4, -0.2))
        kneels = of_both(ramp(-b.knees, -0.42, -0.12))
        seated = [ramp(-b.seat, -0.8, -0.1), ramp(b.up, 0, 0.7)]
        sunk = ramp(-b.seat, -0.1, -0.03)
        folded = [ramp(b.bend.min(), 10, 90), ramp(b.thighs_out.min(), -0.2, 0.5), ramp(-far, -0.8, -0.4)]
        folded = mostly_all([*folded, ramp(-wide, -0.6, -0.2)])
        straddle = [ramp(b.legs_out.min(), 0, 0.7), ramp(-sole, -0.6, -0.15), ramp(-b.bend.max(), -120, -45)]

        def stands_and(fit):
            return [*stance, 0.15 + 0.85 * fit]

        # What is asked of each, from far off to the edge; how deep inside it is; how natural the other joints are.
        fits = {
            "kneeling": (
                [kneels, ramp(b.up, 0, 0.7), ramp(b.bend.min(), 0, 45)],
                [ramp(-high, -0.12, -0.07), ramp(b.up, 0.7, 0.92), ramp(b.bend.min(), 45, 80)],
                arms_natural * chest_natural,
            ),
            "lotus": (
                [*seated, ramp(-high, -0.6, -0.3), folded],
                [sunk, ramp(b.up, 0.7, 0.92), ramp(b.thighs_out.min(), 0.5, 0.65)],
                arms_natural,
            ),
            "standing": (stance, [firm], arms_natural * body_natural),
            "arms raised": (
                stands_and(of_both(ramp(above_head, -0.8, 0))),
                [firm, ramp(above_head.min(), 0, 0.2)],
                body_natural,
            ),
            "splits": (
                [seated[0], ramp(b.up, 0, 0.5), np.mean(straddle)],
                [sunk, ramp(b.up, 0.5, 0.9), ramp(b.legs_out.min(), 0.7, 0.85)],
                arms_natural,
            ),
            "hands on hips": (stands_and(hips), [firm, ramp(-b.hands_to_hips.max(), -0.12, -0.06)], body_natural),
            "arms crossed": (stands_and(cross), [firm, ramp(crossed, 0.1, 0.15)], body_natural),
            "one leg": (
                stands_and(one_foot),
                [firm, ramp(sole, 0.1, 0.25), ramp(-balance, -0.2, -0.08)],
                arms_natural * chest_natural,
            ),
            "back": ([ramp(-chest, -1.2, -0.3), ramp(face, -0.4, 0.7)], [ramp(face, 0.7, 0.95)], arms_natural),
            "front": ([ramp(-chest, -1.2, -0.3), ramp(-face, -0.4, 0.7)], [ramp(-face, 0.7, 0.95)], arms_natural),
        }
        result = []
        for state in GRADED:
            asked, deep, natural = fits[state]
            near = 0.2 * np.mean(asked) + 0.8 * np.prod(asked)
            met = near > 0.99 and CRITERIA[state](self.near_model, data)
            score = 0.8 + 0.2 * np.mean(deep) if met else 0.6 * near
            if state in ("hands on hips", "arms crossed", "splits") and not met:
                score *= shown
            result.append(score * (0.8 + 0.2 * natural))
        return np.array(result, np.float32)


class Other(Robot):
    """One of the other robots, in random states."""

    def __init__(self, name):
        super().__init__(WORDS.others[name]["env_id"])
        self.name = name

    def camera(self, rng):
        table = TABLES.cameras[self.name]

        def draw(name):
            return rng.choice([*table[name]["usual"], rng.uniform(*table[name]["range"])])

        azimuth = rng.choice(table["azimuth"]["usual"]) + rng.normal(0, table["azimuth"]["noise"])
        return dict(
            azimuth=azimuth, distance=draw("distance"), elevation=draw("elevation"), lookat=(0, 0, draw("height"))
        )

    def sample(self, rng):
        """(qpos, shares of this robot's states, camera)."""
        if self.name == "pendulum":
            angles = [rng.normal(0, 5), rng.uniform(-90, 90), rng.choice([-1, 1]) * rng.uniform(70, 90)]
            angle = np.deg2rad(rng.choice(angles))
            upright = gate(-abs(np.rad2deg(angle)), -14, 3)
            fallen = gate(abs(np.rad2deg(angle)), 68, 4)
            camera = self.camera(rng)
            qpos = np.array([rng.uniform(-0.9, 0.9), angle])
            return qpos, np.array([upright, 1 - upright - fallen, fallen]).clip(0), camera
        on_back = rng.random() < 0.5
        roll = np.pi if on_back else 0
        qpos = self.model.qpos0.copy()
        if self.name == "cheetah":
            low, high = self.model.jnt_range[3:].T
            qpos[3:] = rng.uniform(low, high) * rng.choice([0.4, 1.0])
            qpos[2] = roll + rng.normal(0, 0.25)
        else:
            low, high = self.model.jnt_range[1:].T
            qpos[7:] = rng.uniform(low, high)
            axis = rng.normal(size=3) * [1, 1, 0]
            roll += rng.normal(0, 0.25)
            qpos = self.turn(qpos, rng.uniform(0, 2 * np.pi))
            qpos = self.turn(qpos, roll, axis / np.linalg.norm(axis[:2]))
        camera = self.camera(rng)
        self.forward(qpos)
        above_floor = 0 if rng.random() < 0.8 else rng.uniform(0, 0.3)
        qpos[1 if self.name == "cheetah" else 2] -= self.lowest().min() - above_floor
        return qpos, np.array([0.0, 1.0] if on_back else [1.0, 0.0]), camera


@functools.cache
def open_robot(name):
    return Humanoid() if name == "humanoid" else Other(name)


@functools.cache
def agent_states(*names):
    """States of the humanoid [N, 24] that a search ("search") or agents on earlier rewards ("agents") have found."""
    with np.load(HERE / "agent_states.npz") as states:
        return np.concatenate([states[name] for name in names])


# ---------------------------------------------------------------- states to render


def pick(rng, table):
    return table[rng.integers(len(table))]


def noise(rng, scale, size, held_out):
    """Held-out frames have another noise than the training frames: even instead of normal."""
    if held_out:
        return rng.uniform(-1.6 * scale, 1.6 * scale, size)
    return rng.normal(0, scale, size)


def random_heading(rng):
    """Radians; every heading, but mostly near the camera."""
    kind = rng.random()
    if kind < 0.7:
        return np.deg2rad(rng.normal(0, 15 if kind < 0.45 else 45))
    return np.deg2rad(rng.uniform(-180, 180))


def random_arms(rng, kind, spread, held_out):
    """Left and right."""
    if kind == "random":
        return [rng.uniform((-55, -55, -85), (80, 80, 45)) for _ in range(2)]
    arms = two_arms(TABLES.arm_poses[kind], rng.random() < 0.5)
    return [np.array(arm) + noise(rng, spread, 3, held_out) for arm in arms]


def tangle(h, rng):
    """Every joint random, the body turned any way and settled by physics: qpos."""
    qpos = h.pose(0, 0, STRAIGHT, STRAIGHT, (0, 0, 0), (0, 0, 0))
    qpos[7:] = rng.uniform(h.low, h.high)
    axis = rng.normal(size=3)
    qpos = h.turn(qpos, rng.uniform(0, 2 * np.pi), axis / np.linalg.norm(axis))
    return h.settle(h.to_floor(qpos), rng.integers(20, 60))


def posed(h, rng, state, held_out):
    """A state of the table with noise in the joints, the body's tilt and the heading: qpos."""
    if state == "tangle":
        return tangle(h, rng)
    pitch, abdomen_y, left, right, arms, share = pick(rng, TABLES.poses[state])
    if rng.random() < 0.5:
        left, right = right, left
    kind = pick(rng, [arm for name in arms for arm in TABLES.arm_sets.get(name, [name])])
    spread = 7 if state in TABLES.standing_arms or state == "crawling" else 10  # less where the arms make the state
    left_arm, right_arm = random_arms(rng, kind, spread, held_out)
    legs = rng.uniform(4, 8) * share
    left = left + noise(rng, legs, 4, held_out)
    right = right + noise(rng, legs, 4, held_out)
    qpos = h.pose(pitch, abdomen_y, left, right, left_arm, right_arm)
    qpos[7:10] += np.deg2rad(noise(rng, 5, 3, held_out))
    qpos = h.within_limits(qpos)

    if state == "side":
        qpos = h.turn(qpos, rng.choice([-1, 1]) * np.pi / 2, (1, 0, 0))
    if state == "falling":
        qpos = h.turn(qpos, rng.choice([-1, 1]) * np.deg2rad(rng.uniform(15, 45)), (1, 0, 0))
    if state == "mid-air" and rng.random() < 0.3:
        qpos[10:] = rng.uniform(h.low[3:], h.high[3:])
    tilt = 7 if state in ("back", "front", "side", "mid-air", "falling") else 4.5
    for axis in ((1, 0, 0), (0, 1, 0)):
        qpos = h.turn(qpos, np.deg2rad(noise(rng, tilt, None, held_out)), axis)
    has_heading = -50 <= pitch < 85 and state != "side"  # what lies may lie any way
    qpos = h.turn(qpos, random_heading(rng) if has_heading else rng.uniform(-np.pi, np.pi))
    qpos = h.to_floor(qpos, rng.uniform(0.25, 0.7) if state == "mid-air" else 0)
    if state in ("back", "front", "side") and rng.random() < 0.5:
        qpos = h.settle(qpos, rng.integers(10, 40))
    return qpos


def way_state(h, way, share, noise_joints=0.0, heading=0.0):
    """The state at a share of a way between two poses: qpos."""
    ends = []
    for state, row, arm in (way[:3], way[3:]):
        pitch, abdomen_y, left, right, _, _ = TABLES.poses[state][row]
        arms = two_arms(TABLES.arm_poses[arm])
        ends.append(np.array([pitch, *h.pose(0, abdomen_y, left, right, *arms)[7:]]))
    pitch, *joints = (1 - share) * ends[0] + share * ends[1]
    qpos = h.pose(pitch, 0, STRAIGHT, STRAIGHT, (0, 0, 0), (0, 0, 0))
    qpos[7:] = np.array(joints) + noise_joints
    return h.to_floor(h.turn(h.within_limits(qpos), heading))


def between(h, rng, held_out):
    """A state on a way between two poses, with a soft label: (qpos, shares of postures, shares of arms)."""
    way = pick(rng, WAYS)
    share = rng.random()
    noise_joints = np.deg2rad(noise(rng, 4, 17, held_out))
    qpos = way_state(h, way, share, noise_joints, random_heading(rng))
    label, arms = h.label(qpos)
    linear = np.zeros_like(label)
    linear[ALL_POSTURES.index(STATES[way[0]][0])] += 1 - share
    linear[ALL_POSTURES.index(STATES[way[3]][0])] += share
    return qpos, 0.5 * label + 0.5 * linear, arms


PARTS = [slice(3, 7), slice(7, 10), slice(10, 14), slice(14, 18), slice(18, 21), slice(21, 24)]  # of qpos


def mixed(h, rng, held_out):
    """A state near one of GRADED's: each arm, each leg, the chest and the root are at it, elsewhere or on the way."""
    goal = posed(h, rng, pick(rng, GRADED), held_out)
    other = posed(h, rng, "standing" if rng.random() < 0.4 else pick(rng, EPISODE_STATES), held_out)
    for part in PARTS[1:]:
        if rng.random() < 0.4:
            other[part] = rng.uniform(h.low, h.high)[part.start - 7 : part.stop - 7]
    at_goal = rng.choice([0.4, 0.75, 0.95])
    qpos = goal.copy()
    shares = [1.0 if rng.random() < at_goal else rng.choice([0.0, rng.random(), rng.random()]) for _ in PARTS]
    for right in (2, 4):  # the other leg, the other arm
        if rng.random() < 0.5:
            shares[right + 1] = shares[right]
    for part, share in zip(PARTS, shares, strict=True):
        far_side = -1 if part == PARTS[0] and goal[part] @ other[part] < 0 else 1  # of two quaternions
        qpos[part] = share * goal[part] + (1 - share) * far_side * other[part]
    qpos[3:7] /= np.linalg.norm(qpos[3:7])
    return mutated(h, rng, qpos, 0.15, 4)


def mutated(h, rng, qpos, chance, degrees):
    """A state with noise in its joints, some of them turned, the chest twisted, the body tilted, or above the floor."""
    qpos = qpos.copy()
    qpos[7:] += np.deg2rad(rng.normal(0, degrees, 17)) * (rng.random(17) < 0.5)
    if rng.random() < chance:
        qpos[7] = rng.uniform(h.low[0], h.high[0])
    if rng.random() < chance:
        joint = rng.integers(17)
        qpos[7 + joint] = rng.uniform(h.low[joint], h.high[joint])
    if rng.random() < 2 * chance:
        for axis in ((1, 0, 0), (0, 1, 0)):
            qpos = h.turn(qpos, np.deg2rad(rng.normal(0, 3 * degrees)), axis)
    return h.to_floor(h.within_limits(qpos), abs(rng.normal(0, 0.1)) if rng.random() < chance else 0.0)


def rollout(h, rng, held_out):
    """Some states of a simulated episode: random actions, held poses, kicks, or motion from one pose to another."""
    model = h.model
    data = h.data
    kind = rng.choice(["start", "kick", "hold", "move"], p=[0.25, 0.25, 0.3, 0.2])
    steps = rng.integers(15, 70)
    if kind == "start":  # as the environment resets, then acted on
        qpos = h.turn(model.qpos0 + rng.uniform(-0.01, 0.01, model.nq), random_heading(rng))
    else:
        qpos = posed(h, rng, pick(rng, EPISODE_STATES), held_out)
    start = qpos[7:].copy()
    goal = start
    if kind == "move":
        goal = posed(h, rng, pick(rng, EPISODE_STATES), held_out)[7:]
    mujoco.mj_resetData(model, data)
    data.qpos[:] = qpos
    data.qvel[:] = rng.normal(0, rng.choice([0.1, 0.5, 1.5]) * (1.3 if held_out else 1.0), model.nv)

    scale = rng.choice([0.0, 0.1, 0.25, 0.5, 1.0], p=[0.1, 0.2, 0.2, 0.2, 0.3])
    style = rng.choice(["white", "slow", "constant"])
    action = rng.normal(0, 1, model.nu)
    phase = rng.uniform(0, 2 * np.pi, model.nu)
    speed = rng.uniform(0.05, 0.6, model.nu)
    keep = set(rng.choice(steps, min(6, steps), replace=False))
    joints = h.joint_of_actuator
    states = []
    for step in range(steps):
        if held_out:  # another kind of action: waves
            action = np.sin(phase + speed * step) * 1.5
        elif style == "white":
            action = rng.uniform(-1.7, 1.7, model.nu)
        elif style == "slow":
            action = 0.9 * action + 0.44 * rng.normal(0, 1, model.nu)
        control = scale * np.clip(action, -1, 1)
        if kind in ("hold", "move"):  # springs towards the pose, as an agent that has learned to hold it
            aim = start + (goal - start) * min(1.0, 1.5 * step / steps)
            control = 0.3 * control + 1.5 * (aim[joints - 1] - data.qpos[joints + 6]) - 0.06 * data.qvel[joints + 5]
        data.ctrl[:] = np.clip(control, -1, 1) * 0.4
        mujoco.mj_step(model, data, 5)
        if not np.isfinite(data.qpos).all():
            break
        if step in keep:
            states.append(data.qpos.copy())
    return states


# ---------------------------------------------------------------- data


def random_camera(rng, qpos):
    """Half the training scripts' default; else around it; a tenth does not follow a robot that has wandered off."""
    camera = {}
    if rng.random() < 0.5:
        camera = dict(azimuth=180 + rng.normal(0, 15), elevation=rng.uniform(-25, 0), distance=rng.uniform(3, 4.5))
    if rng.random() < 0.1:
        camera["follow"] = False
        qpos[:2] = rng.uniform(-0.9, 0.9, 2)
    else:
        qpos[:2] = rng.uniform(-5, 5, 2)
    return camera


def humanoid_frames(rng, source, number, held_out):
    """Yields (frame, shares of postures, shares of arms, scores, qpos) without end, from frame `number` on."""
    h = open_robot("humanoid")
    queue = []
    while True:
        if source == "posed":  # the table's in turn
            state = list(STATES)[number % len(STATES)]
            qpos = posed(h, rng, state, held_out)
            label, arms = h.label(qpos)
            if state not in (
                "falling",
                "tangle",
            ):  # the table knows better than the rule, but for what noise has undone
                posture = STATES[state][0]
                if label[ALL_POSTURES.index(posture)] < 0.15:
                    continue
                label = 0.3 * label + 0.7 * one_hot(posture, ALL_POSTURES)
        elif source == "physics":
            queue = queue or rollout(h, rng, held_out)
            if not queue:
                continue
            qpos = queue.pop()
            label, arms = h.label(qpos)
            # Standing, where every episode of random actions starts, need not be kept so often.
            if not held_out and rng.random() < 0.4 * label[ALL_POSTURES.index("standing")]:
                continue
        elif source == "between":
            qpos, label, arms = between(h, rng, held_out)
        elif source == "mixed":
            qpos = mixed(h, rng, held_out)
            label, arms = h.label(qpos)
        else:
            names = ["held_out"] if held_out else [source]
            qpos = pick(rng, agent_states(*names)).astype(np.float64)
            if not held_out and rng.random() < 0.5:  # a little off, to both sides of each boundary
                qpos[2] += rng.normal(0, 0.03)
                qpos[7:] += np.deg2rad(rng.normal(0, 4, len(qpos) - 7))
            label, arms = h.label(qpos)
        camera = random_camera(rng, qpos)
        if source in ("mixed", "agents") and (held_out or rng.random() < 0.7):
            camera = {}
        yield h.render(rng, qpos, camera), label, arms, h.scores(qpos), qpos
        number += 1


def other_frames(rng, name):
    """Yields what `humanoid_frames` does; arms, scores and qpos are the humanoid's alone."""
    other = open_robot(name)
    while True:
        qpos, shares, camera = other.sample(rng)
        label = np.zeros(len(ALL_POSTURES), np.float32)
        label[[ALL_POSTURES.index(state) for state in WORDS.others[name]["states"]]] = shares
        scores = np.zeros(len(GRADED), np.float32)
        yield other.render(rng, qpos, camera), label, one_hot("other", ALL_ARMS), scores, np.zeros(24)


COLUMNS = ("frames", "postures", "arms", "scores", "qpos")


def mutate(job):
    """Mutated states and how the training scripts see them, as `make_data` has it."""
    states, seed = job
    h = open_robot("humanoid")
    rng = np.random.default_rng(seed)
    rows = []
    for qpos in states:
        strength = rng.choice([0.4, 1.0])  # small steps near a peak, larger ones to get to others
        qpos = mutated(h, rng, qpos.astype(np.float64), 0.15 * strength, 8 * strength)
        rows.append((h.renderers[SIZE](qpos), *h.label(qpos), h.scores(qpos), qpos.astype(np.float32)))
    return dict(zip(COLUMNS, map(np.stack, zip(*rows, strict=True)), strict=True))


def make_shard(job):
    """Some frames of one source, the same for the same job in any process."""
    source, index, count, seed, held_out = job
    rng = np.random.default_rng([seed, index, list(TABLES.frames).index(source), int(held_out)])
    if source in WORDS.others:
        rows = other_frames(rng, source)
    else:
        rows = humanoid_frames(rng, source, index * SHARD, held_out)
    columns = map(np.stack, zip(*itertools.islice(rows, count), strict=True))
    return dict(zip(COLUMNS, columns, strict=True)) | {"source": np.full(count, source, "U8")}


def make_data(pool, seed, column, scale=1.0):
    """All frames of a column of the table. `pool` must be forked before this process opens OpenGL."""
    jobs = []
    for source, counts in TABLES.frames.items():
        total = int(counts[column] * scale)
        for first in range(0, total, SHARD):
            jobs.append((source, first // SHARD, min(SHARD, total - first), seed, column == "held_out"))
    data = {}
    filled = 0
    for shard in pool.imap(make_shard, jobs):  # into arrays of the whole size: they are too large to be held twice
        count = len(shard["source"])
        for name, values in shard.items():
            if name not in data:
                dtype = np.float32 if name == "qpos" else values.dtype
                data[name] = np.empty((sum(job[2] for job in jobs), *values.shape[1:]), dtype)
            data[name][filled : filled + count] = values
        filled += count
    return data
