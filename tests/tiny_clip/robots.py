"""What the embedded CLIP sees: robots in poses and in simulated motion, their labels and their frames.

Robots are posed and simulated, a rule reads each state's label off the simulator, and the training scripts' own
renderer draws it. The poses are in poses.toml, the names of postures in vocabulary.toml. train.py trains on the frames
and labels that `make_data` makes of them.

From the top: the tables, the robots with the rule, the states to render, the data.
"""

import functools
import itertools
import json
import multiprocessing
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# The renderer that the scripts train with. mujoco comes from there too: it must be imported after MUJOCO_GL is set.
from sac_vlmrm import SceneRenderer, mujoco

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

STRAIGHT = (0, 0, 0, -2)  # a leg
DEFAULT_CAMERA = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0.0, 0.0, 1.0), follow=True)
SHARD = 250  # frames that a process makes at a time


# ---------------------------------------------------------------- robots


def gate(value, threshold, width):
    """0 well below the threshold, 1 well above, one half on it."""
    return 1.0 / (1.0 + np.exp(np.clip((threshold - value) / width, -30, 30)))


def one_hot(name, names):
    return np.eye(len(names), dtype=np.float32)[names.index(name)]


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
        # Each arm pose as the positions of elbows and hands about the torso. Raised arms have a rule of their own.
        self.arm_marks = {}
        for name, arm in TABLES.arm_poses.items():
            if name != "raised":
                self.forward(self.pose(0, 0, STRAIGHT, STRAIGHT, arm, arm))
                self.arm_marks[name] = self.arm_positions()

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

    def label(self, qpos, knee=0.13, upright=0.68):
        """Shares of ALL_POSTURES and of ALL_ARMS in a state; between two, both have some.

        Kneeling: both knees within 0.12 m of the floor, the torso's up-axis above 0.7, thighs not on the floor, not in
        the air. `knee` and `upright` are where kneeling is as true as not.
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
        knees_down = gate(-highest_knee, -knee, 0.008)
        claim(knees_down * gate(up, upright, 0.02) * gate(pelvis, 0.18, 0.012) * bent, {"kneeling": 1})
        # Knees that sink while the thighs point down: between standing and kneeling, by their height.
        sunk = 0.8 * np.clip((0.4 - highest_knee) / 0.3, 0, 1)
        sinking = torso_up * gate(-max(thighs[0][2], thighs[1][2]), 0.75, 0.04) * gate(-highest_knee, -0.37, 0.015)
        claim(sinking * gate(-abs(knees[0] - knees[1]), -0.15, 0.03), {"kneeling": sunk, "standing": 1 - sunk})
        one_knee = torso_up * gate(-knees.min(), -0.13, 0.01) * gate(highest_knee, 0.2, 0.02)
        claim(one_knee * gate(pelvis, 0.28, 0.02), {"one knee": 0.75, "kneeling": 0.25})
        lifted = gate(feet.max(), 0.17, 0.02) * gate(-feet.min(), -0.1, 0.02)
        claim(gate(up, 0.78, 0.03) * gate(pelvis, 0.72, 0.03), {"one leg": lifted, "standing": 1 - lifted})
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
        for name, mark in self.arm_marks.items():
            if name == "bent":
                name = "down"
            elif name not in near:
                name = "other"
            near[name] += np.exp(-((arms - mark) ** 2).sum() / (4 * 0.11**2))
        near["other"] += np.exp(-(1.4**2))
        total = sum(near.values())
        raised = gate(arms[:, 5].min(), 0.27, 0.02)  # both hands above the head's middle
        shares = {name: (1 - raised) * value / total for name, value in near.items()}
        shares["raised"] = raised
        return np.array(list(shares.values()), np.float32)


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
def agent_states(name):
    """States of the humanoid [N, 24] that a search ("qpos") or SAC agents ("qpos_sac") found.

    The search climbed the reward of an earlier version. The agents visited theirs in the deterministic episodes of
    their training, all the way from random to kneeling: two were trained on the reward of the first round, and four on
    that of an earlier second round (of these every fourth state, and late ones that are not kneeling).
    """
    return np.load(HERE / "agent_states.npz")[name]


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


def random_arm(rng, kind, spread, held_out):
    if kind == "random":
        return rng.uniform((-55, -55, -85), (80, 80, 45))
    return np.array(TABLES.arm_poses[kind]) + noise(rng, spread, 3, held_out)


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
    left_arm = random_arm(rng, kind, spread, held_out)
    right_arm = random_arm(rng, kind, spread, held_out)
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
        arm = TABLES.arm_poses[arm]
        ends.append(np.array([pitch, *h.pose(0, abdomen_y, left, right, arm, arm)[7:]]))
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
    """Yields (frame, shares of postures, shares of arms, qpos) without end, from frame `number` of a source on."""
    h = open_robot("humanoid")
    start = number
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
        elif source == "agent":
            qpos = pick(rng, agent_states("qpos")).astype(np.float64)
            label, arms = h.label(qpos)
        else:
            visited = agent_states("qpos_sac")
            qpos = visited[number % len(visited)].astype(np.float64)
            if start >= len(visited):  # the second time round a little off, to both sides of each boundary
                qpos[2] += rng.normal(0, 0.03)
                qpos[7:] += np.deg2rad(rng.normal(0, 4, len(qpos) - 7))
            label, arms = h.label(qpos, knee=0.115, upright=0.73)  # on the safe side of what counts as kneeling
        camera = random_camera(rng, qpos)
        if source == "sac" and rng.random() < 0.75:
            camera = {}
        yield h.render(rng, qpos, camera), label, arms, qpos
        number += 1


def other_frames(rng, name):
    """Yields (frame, shares of postures, shares of arms, qpos) without end; arms and qpos are the humanoid's alone."""
    other = open_robot(name)
    while True:
        qpos, shares, camera = other.sample(rng)
        label = np.zeros(len(ALL_POSTURES), np.float32)
        label[[ALL_POSTURES.index(state) for state in WORDS.others[name]["states"]]] = shares
        yield other.render(rng, qpos, camera), label, one_hot("other", ALL_ARMS), np.zeros(24)


def make_shard(job):
    """Some frames of one source, the same for the same job in any process."""
    source, index, count, seed, held_out = job
    rng = np.random.default_rng([seed, index, list(TABLES.frames).index(source), int(held_out)])
    if source in WORDS.others:
        rows = other_frames(rng, source)
    else:
        # "posed" counts in shards of this one's size, as it did for the committed weights: the last may be a short one.
        rows = humanoid_frames(rng, source, index * (count if source == "posed" else SHARD), held_out)
    frames, postures, arms, states = map(np.stack, zip(*itertools.islice(rows, count), strict=True))
    states = states.astype(np.float32)
    return dict(frames=frames, postures=postures, arms=arms, qpos=states, source=np.full(count, source))


def make_data(seed, column, scale=1.0):
    """All frames of a column of the table, from two processes that are forked before this one opens OpenGL."""
    jobs = []
    for source, counts in TABLES.frames.items():
        total = int(counts[column] * scale)
        for first in range(0, total, SHARD):
            jobs.append((source, first // SHARD, min(SHARD, total - first), seed, column == "held_out"))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        shards = list(pool.imap(make_shard, jobs))
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
