"""Posed humanoids that meet each task's criterion, and others that miss it; degrees, as in reward_only_eval.py."""

import math

import gymnasium as gym
import numpy as np

from reward_only_eval import humanoid_pose, mujoco, to_floor

HUMANOID = gym.make("Humanoid-v5").unwrapped
ARMS = {
    "down": (-45, 50, -58),
    "raised": (85, -15, -85),
    "hips": (-48, 78, -5),
    "touching": (-60, 24, 30),
    "sideways": (51, 46, -66),
    "forward": (3, -31, -67),
    "lap": (-36, 28, -27),
    "knees": (-22, 9, -57),
    "bent": (-45, 45, -20),
    "start": (0, 0, 0),
    "across": (69, -59, 6),
    "under": (-59, -8, -33),
    "half up": (60, 30, -70),
    "face": (40, -40, -60),
}
STRAIGHT, UPRIGHT_KNEEL, ON_HEELS = (0, 0, 0, -2), (0, 0, 0, -94), (0, 0, -60, -155)
LOTUS, SPLITS, SQUAT = (0, -60, -60, -143), (-25, -60, -65, -9), (-8, 0, -100, -130)


def pose(leg, right=None, arm="down", right_arm=None, pitch=0, abdomen=0, tip=(0, 0), heading=0, lift=0.0):
    """qpos of a posed humanoid; `tip` (roll, pitch) turns the whole body, which is then put `lift` meters up."""
    data = mujoco.MjData(HUMANOID.model)
    arms = [ARMS.get(name, name) for name in (arm, right_arm or arm)]
    angles = np.concatenate([(pitch, abdomen), leg, right or leg, *arms])
    qpos = humanoid_pose(HUMANOID.model, data, angles)
    for angle, axis in zip((*tip, heading), np.eye(3), strict=True):
        turn, turned = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn, axis, math.radians(angle))
        mujoco.mju_mulQuat(turned, turn, qpos[3:7])
        qpos[3:7] = turned
    qpos = to_floor(HUMANOID.model, data, qpos)
    qpos[2] += lift
    return qpos


def joints(rotation, angles):
    """qpos of a humanoid from the root's quaternion and all 17 angles, in the model's order."""
    qpos = np.concatenate([(0, 0, 1.4), rotation, np.deg2rad(angles)])
    return to_floor(HUMANOID.model, mujoco.MjData(HUMANOID.model), qpos)


WRONG_FOR_ALL = {  # no task's goal state
    "face down": pose(STRAIGHT, pitch=90),
    "on its back": pose(STRAIGHT, pitch=-90, arm="sideways"),
    "on its side": pose((-5, 0, -20, -30), tip=(90, 0)),
    "crawling": pose((0, 0, -80, -92), pitch=80, arm=(12, -17, -37)),
    "squatting": pose(SQUAT, pitch=25, arm="forward"),
    "sitting, legs out": pose((0, 0, -80, -3), pitch=-10, arm="lap"),
    "jumping": pose((-18, 0, 0, -10), arm="sideways", lift=0.4),
}
STANDING = {
    "straight": pose(STRAIGHT),
    "bouncing": pose(STRAIGHT, lift=0.008),
    "feet apart": pose((-20, 0, 0, -2)),
    "turned away": pose(STRAIGHT, heading=170, arm="start"),
    "a stride": pose((-4, 0, -25, -12), (-4, 0, 12, -12), arm="bent"),
    "knees a little bent": pose((-4, 0, -12, -25), arm="forward"),
    "knees more bent": pose((-4, 0, -40, -55), pitch=5),
    "leaning forward": pose((0, 0, -10, -2), pitch=10),
    "leaning back": pose(STRAIGHT, tip=(0, -6)),
    "leaning to the side": pose((-8, 0, 0, -2), tip=(8, 0)),
    "arms anyhow": pose(STRAIGHT, arm="raised", right_arm="hips"),
}
NOT_STANDING = {
    "in the air": pose(STRAIGHT, lift=0.1),
    "just above the floor": pose(STRAIGHT, lift=0.03),
    "falling forward": pose(STRAIGHT, tip=(0, 32)),
    "falling back": pose(STRAIGHT, tip=(0, -32)),
    "falling sideways": pose(STRAIGHT, tip=(32, 0)),
    "a half squat": pose((-8, 0, -70, -90), pitch=15, arm="forward"),
    "kneeling": pose(UPRIGHT_KNEEL),
    "on one knee": pose((0, 0, -85, -85), UPRIGHT_KNEEL),
    "bent over": pose((0, 0, -80, -2), pitch=70, arm="forward"),
    "splits": pose(SPLITS, pitch=-3, abdomen=-14, arm="sideways"),
}


def arms_of(good, bad):
    """Standing states with good arms, and the bad: the wrong arms standing, and the right arms not standing."""
    arms = [dict(arm=a, right_arm=b) for a, b in good]
    bodies = [
        dict(leg=STRAIGHT),
        dict(leg=(-10, 0, 0, -2)),
        dict(leg=STRAIGHT, heading=140),
        dict(leg=STRAIGHT, tip=(5, -4)),
        dict(leg=(-4, 0, -12, -25), heading=-60),
        dict(leg=(-4, 0, -25, -12), right=(-4, 0, 12, -12)),
        dict(leg=(0, 0, -10, -2), pitch=10),
        dict(leg=STRAIGHT, abdomen=-8),
        dict(leg=(-20, 0, 0, -2), heading=30),
        dict(leg=(-4, 0, -40, -55), pitch=5),
    ]
    meeting = {f"{i}": pose(**body, **arms[i % len(arms)]) for i, body in enumerate(bodies)}
    missing = {f"arms {a}, {b}": pose(STRAIGHT, arm=a, right_arm=b) for a, b in bad}
    missing |= {
        name: pose(**body, **arms[0])
        for name, body in {
            "kneeling": dict(leg=UPRIGHT_KNEEL),
            "in the air": dict(leg=STRAIGHT, lift=0.1),
            "falling": dict(leg=STRAIGHT, tip=(0, 32)),
            "on its back": dict(leg=STRAIGHT, pitch=-90),
            "squatting": dict(leg=SQUAT, pitch=25),
        }.items()
    }
    return meeting, missing


POSED = {  # task: states that meet its criterion, states that miss it
    "kneeling": (
        {
            "upright": pose(UPRIGHT_KNEEL),
            "bouncing": pose(UPRIGHT_KNEEL, lift=0.008),
            "half down": pose((0, 0, -30, -125)),
            "on the heels": pose(ON_HEELS),
            "wide": pose((-12, 0, -10, -104), arm="lap"),
            "from behind": pose(UPRIGHT_KNEEL, heading=180),
            "arms raised": pose(UPRIGHT_KNEEL, arm="raised"),
            "leaning forward": pose((-4, 0, -5, -90), pitch=20, abdomen=-20),
            "leaning back": pose((-4, 0, 10, -85), pitch=-15, abdomen=10),
            "uneven": pose((0, 0, 5, -94), (0, 0, -20, -115)),
            "sideways lean": pose((-10, 0, -5, -98), heading=90, arm="hips"),
        },
        {
            "in the air": pose(UPRIGHT_KNEEL, lift=0.3),
            "just above the floor": pose(UPRIGHT_KNEEL, lift=0.015),
            "one knee": pose((0, 0, -85, -85), UPRIGHT_KNEEL),
            "other knee": pose(UPRIGHT_KNEEL, (0, 0, -95, -95)),
            "standing": pose(STRAIGHT),
            "half way down": pose((0, 0, -20, -75)),
            "bowing to the floor": pose(ON_HEELS, pitch=60),
            "fallen on its side": pose(UPRIGHT_KNEEL, tip=(80, 0)),
            "lotus": pose(LOTUS, pitch=-8, abdomen=-75, arm="lap"),
            "sitting, knees up": pose((-6, 0, -105, -65), pitch=-15, arm="knees"),
        },
    ),
    "lotus": (
        {
            "hands on the knees": pose(LOTUS, pitch=-8, abdomen=-75, arm="knees"),
            "in the lap": pose(LOTUS, pitch=-8, abdomen=-75, arm="lap"),
            "arms raised": pose(LOTUS, pitch=-8, abdomen=-75, arm="raised"),
            "tighter": pose((0, -60, -60, -155), pitch=-8, abdomen=-75, arm="knees"),
            "knees lower": pose((-25, -60, -40, -143), pitch=-8, abdomen=-75, arm="knees"),
            "knees lowest": pose((-25, -60, -20, -155), pitch=-8, abdomen=-75, arm="knees"),
            "half open": pose((-15, -60, -40, -143), pitch=-8, abdomen=-75, arm="knees"),
            "from the side": pose(LOTUS, pitch=-8, abdomen=-75, arm="lap", heading=80),
            "leaning": pose(LOTUS, pitch=-4, abdomen=-72, tip=(4, 0), arm="knees"),
            "uneven": pose((0, -60, -55, -150), (-5, -58, -60, -143), pitch=-8, abdomen=-75, arm="knees"),
            "an agent's, the pelvis turned below the chest": joints(
                (0.951, -0.212, -0.086, 0.208),
                (-45, -75, -35, -25, -62, 6, -150, -25, -62, -111, -161, -16, -85, -28, -44, 85, 50),
            ),
        },
        {
            "in the air": pose(LOTUS, pitch=-8, abdomen=-75, lift=0.15, arm="knees"),
            "knees up": pose((-6, 0, -105, -65), pitch=-15, arm="knees"),
            "one leg out": pose(LOTUS, (0, 0, -20, -3), pitch=-8, abdomen=-75, arm="knees"),
            "knees together": pose((0, 0, -45, -143), pitch=-8, abdomen=-75, arm="knees"),
            "knees high": pose((0, -30, -80, -120), pitch=-8, abdomen=-40, arm="lap"),
            "splits": pose(SPLITS, pitch=-3, abdomen=-14),
            "feet out": pose((0, -60, -60, -70), pitch=-8, abdomen=-75, arm="knees"),
            "on the heels": pose(ON_HEELS),
            "on its back": pose(LOTUS, pitch=-80, abdomen=-20),
            "standing": pose(STRAIGHT),
            "a straddle": pose((-25, -20, -80, -5), pitch=-3),
            "just above the floor": pose(LOTUS, pitch=-8, abdomen=-75, arm="knees", lift=0.03),
            "only the knees high": pose((-10, -40, -100, -155), pitch=20, abdomen=-75, arm="knees"),
            "only the thighs together": pose((-25, 35, -80, -155), pitch=-30, abdomen=-20, arm="knees"),
            "off its seat": pose((-25, -40, -20, -143), pitch=40, abdomen=-75, arm="knees"),
            "lying back": pose(LOTUS, pitch=-50, abdomen=-33, arm="knees"),
        },
    ),
    "standing": (STANDING, NOT_STANDING),
    "arms-raised": arms_of(
        [("raised", None), ((80, -10, -80), None), ((84, -24, -85), None)],
        [
            ("down", None),
            ("sideways", None),
            ("forward", None),
            ("start", None),
            ("half up", None),
            ("raised", "down"),
            ("raised", "sideways"),
            ("half up", "raised"),
            ("face", None),
            ("hips", None),
        ],
    ),
    "splits": (
        {
            "arms sideways": pose(SPLITS, pitch=-3, abdomen=-14, arm="sideways"),
            "arms down": pose(SPLITS, pitch=-3, abdomen=-14),
            "arms raised": pose(SPLITS, pitch=-3, abdomen=-14, arm="raised"),
            "in the lap": pose(SPLITS, pitch=-3, abdomen=-14, arm="lap"),
            "knees straighter": pose((-25, -60, -65, -3), pitch=-3, abdomen=-14),
            "narrower": pose((-25, -50, -65, -9), pitch=-3, abdomen=-14),
            "leaning forward": pose(SPLITS, pitch=10, abdomen=-25, arm="sideways"),
            "from behind": pose(SPLITS, pitch=-3, abdomen=-14, heading=180),
            "knees a little bent": pose((-25, -60, -72, -20), pitch=-3, abdomen=-14),
            "uneven": pose(SPLITS, (-22, -55, -65, -9), pitch=-3, abdomen=-14),
            "an agent's, the pelvis turned below the chest": joints(
                (0.924, 0.032, -0.115, -0.362),
                (45, 23, -35, -25, 37, 22, -7, -19, -45, -110, 0, 62, 60, 50, 85, 81, -90),
            ),
        },
        {
            "in the air": pose(SPLITS, pitch=-3, abdomen=-14, lift=0.15),
            "narrow": pose((-25, -20, -80, -5), pitch=-3, abdomen=-14),
            "one leg ahead": pose(SPLITS, (0, 0, -80, -3), pitch=-3),
            "knees bent": pose((-25, -60, -65, -80), pitch=-3, abdomen=-14),
            "half way down": pose((-25, -30, -32, -5)),
            "standing, feet apart": pose((-25, 0, 0, -2)),
            "on its back": pose(SPLITS, pitch=-80, abdomen=-14),
            "lotus": pose(LOTUS, pitch=-8, abdomen=-75),
            "legs lifted": pose((-25, -60, -90, -5), pitch=-30, abdomen=0),
            "kneeling wide": pose((-25, 0, -10, -104)),
            "just above the floor": pose(SPLITS, pitch=-3, abdomen=-14, lift=0.03),
            "seat off the floor": pose((-25, -60, -45, -30), pitch=55, abdomen=-60, arm="sideways"),
            "chest to the floor": pose((-25, -60, -80, -30), pitch=62, abdomen=-75, arm="sideways"),
            "only the knees bent": pose((-25, -60, -90, -75), pitch=-3, abdomen=-14, arm="sideways"),
            "only one leg sideways": pose(SPLITS, (0, 0, -70, -40), pitch=-20, abdomen=-20, arm="sideways"),
            "an agent's, along a diagonal": joints(  # of the chest; of the pelvis sideways by 52 and 48 degrees
                (0.906, 0.037, -0.09, -0.412),
                (45, 30, 35, -25, -61, -109, 0, -24, 36, 21, -9, 43, -79, 50, -38, 37, 50),
            ),
        },
    ),
    "hands-on-hips": arms_of(
        [("hips", None), ((-45, 74, -8), None), ((-52, 80, -3), None)],
        [
            ("down", None),
            ("bent", None),
            ("lap", None),
            ("hips", "down"),
            ("bent", "hips"),
            ("knees", None),
            ("raised", None),
            ("forward", None),
            ("touching", None),
            ("sideways", None),
        ],
    ),
    "arms-crossed": arms_of(
        [("across", "under"), ("under", "across"), ((74, -59, 6), (-59, -19, -34))],
        [
            ("touching", None),
            ("forward", None),
            ("down", None),
            ("hips", None),
            ("lap", None),
            ("across", "down"),
            ("down", "across"),
            ("raised", None),
            ("start", None),
            ((-60, -42, -90), None),
        ],
    ),
    "one-leg": (
        {
            "knee up": pose(STRAIGHT, (0, 0, -75, -100)),
            "other knee up": pose((0, 0, -75, -100), STRAIGHT, arm="sideways"),
            "foot behind": pose(STRAIGHT, (0, 0, 0, -110)),
            "other foot behind": pose((0, 0, 0, -110), STRAIGHT, heading=90),
            "knee out": pose(STRAIGHT, (-25, -40, -60, -120)),
            "arms raised": pose(STRAIGHT, (0, 0, -75, -100), arm="raised"),
            "from behind": pose(STRAIGHT, (0, 0, -75, -100), heading=180),
            "leg ahead": pose(STRAIGHT, (0, 0, -60, -5), arm="sideways"),
            "weight over the foot": pose(STRAIGHT, (0, 0, -75, -100), tip=(-4, 0)),
            "knee a little bent": pose((0, 0, -12, -25), (0, 0, -75, -100)),
        },
        {
            "both feet": pose(STRAIGHT),
            "feet apart": pose((-20, 0, 0, -2)),
            "a stride": pose((-4, 0, -25, -12), (-4, 0, 12, -12)),
            "hopping": pose(STRAIGHT, (0, 0, -75, -100), lift=0.1),
            "hardly lifted": pose(STRAIGHT, (0, 0, -15, -32)),
            "tipping over": pose(STRAIGHT, (0, 0, -75, -100), tip=(0, 20)),
            "tipping sideways": pose(STRAIGHT, (0, 0, -75, -100), tip=(14, 0)),
            "on one knee": pose((0, 0, -85, -85), UPRIGHT_KNEEL),
            "squatting on one leg": pose(SQUAT, (0, 0, -100, -3), pitch=25),
            "kneeling": pose(UPRIGHT_KNEEL),
        },
    ),
}
