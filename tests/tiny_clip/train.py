"""Trains the embedded CLIP: a small open_clip model that knows MuJoCo renders of a few robots and the words for their poses.

Everything is made here from nothing: robots are posed and simulated, rendered through the training scripts' own renderer,
captioned by a grammar, and a standard open_clip model (a small ModifiedResNet and a small transformer) is trained on the pairs.

    python tests/tiny_clip/train.py                        # data, weights and scores; the seed repeats it
    python tests/tiny_clip/train.py --eval-only            # the scores of the committed weights, against their bars
    python tests/tiny_clip/train.py --contact-sheet sheets # pictures of the data and of the worst mistakes

From the top: the vocabulary (tables), the poses (tables), a rule that reads a state's label off the simulator, the data, the
training loop, the scores.
"""

import functools
import json
import multiprocessing
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from sac_vlmrm import CLIP, SceneRenderer, regularized_reward  # noqa: E402  (the renderer that the scripts train with)

import gymnasium as gym  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import tyro  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@dataclass
class Args:
    out: Path = HERE
    """the folder of the model"""
    seed: int = 1
    """seed of the data, of the weights' start and of the order of training"""
    minutes: float = 0.0
    """stop the training at this many minutes of its own (0: at --epochs; only --epochs is repeatable)"""
    epochs: int = 6
    """passes over the data"""
    batch_size: int = 128
    """pairs in a batch"""
    second_round: bool = True
    """after the training, go on with the states that SAC agents visited while they learned from its and a later version's reward"""
    second_round_only: bool = False
    """go on from the weights in --out, as the second round does"""
    second_steps: int = 1500
    """batches of the second round"""
    second_share: float = 0.8
    """share of the second round's weights in their average with the first's, which is what is saved"""
    lr: float = 2e-3
    """AdamW's highest learning rate; warmed up, then a cosine to zero"""
    data_scale: float = 1.0
    """share of the default amount of data"""
    cache: Path | None = None
    """a file to keep the data in between runs, while working on the training"""
    eval_only: bool = False
    """print the scores of the model in --out; exit status 1 if one misses its bar"""
    contact_sheet: Path | None = None
    """write pictures of the data and of the model's worst mistakes into this folder, and stop"""


# ---------------------------------------------------------------- held-out wording
# Written before the grammar, never trained on, and `check_held_out` proves that the grammar cannot say them.
# (posture or None, arms or None, wording)
HELD_OUT = [
    ("kneeling", None, "a robotic someone on their knees upon the checkered floor"),
    ("kneeling", None, "a machine that has dropped to its knees"),
    ("kneeling", None, "genuflecting robot, both knees touching the ground"),
    ("kneeling", None, "the android begs on bended knees"),
    ("kneeling", None, "robot in a kneel, back straight"),
    ("kneeling", None, "resting its weight on its two knees, shins flat against the ground"),
    ("kneeling", None, "the humanoid has gone down on its knees to pray"),
    ("standing", None, "the humanoid remains upright on both of its feet"),
    ("standing", None, "upright on its feet"),
    ("standing", None, "a robot that is just standing there, doing nothing"),
    ("standing", None, "an erect humanoid, legs straight, feet planted"),
    ("standing", None, "android waiting on its feet"),
    (None, "raised", "both hands up"),
    (None, "raised", "stick them up: a robot with its hands in the air"),
    (None, "raised", "humanoid reaching for the sky with both of its hands"),
    ("standing", "raised", "robot celebrating a win, arms high above its head"),
    ("standing", "raised", "the android throws both arms upwards while standing"),
    ("splits", None, "gymnast robot whose legs point in opposite directions on the ground"),
    ("splits", None, "legs spread to the left and right until the hips touch the floor"),
    ("splits", None, "a full straddle split"),
    ("splits", None, "the robot shows off its flexibility with a wide split"),
    ("back", None, "flat on its back, staring at the sky"),
    ("back", None, "the machine has toppled over and rests on its spine"),
    ("back", None, "face up on the ground"),
    ("back", None, "a humanoid asleep on its back"),
    ("front", None, "face in the dirt, chest against the floor"),
    ("front", None, "a prone machine with its belly on the ground"),
    ("front", None, "the robot fell on its face and lies there"),
    ("front", None, "stretched out on its tummy"),
    ("crawling", None, "moving around on hands and knees like a baby"),
    ("crawling", None, "the android goes about on all fours"),
    ("squatting", None, "crouched down low with bent knees, feet flat"),
    ("squatting", None, "the robot is doing a deep squat exercise"),
    ("sitting", None, "seated on the ground, both legs stretched to the front"),
    ("sitting", None, "robot sits on its bottom"),
    ("lotus", None, "a zen robot with folded legs, calm and seated"),
    ("lotus", None, "cross-legged yoga pose on the floor"),
    ("one leg", None, "balancing like a flamingo on a single foot"),
    ("one leg", None, "one foot lifted, the other carries the whole body"),
    ("mid-air", None, "the robot jumps and neither foot touches the floor"),
    ("mid-air", None, "hovering above the ground"),
    ("standing", "hips", "the android puts its hands on its waist as it stands"),
    ("standing", "crossed", "robot with folded arms in front of its chest, on its feet"),
    ("falling", None, "the robot loses its balance and tips over"),
]

# ---------------------------------------------------------------- the grammar
# "(a|b|)" is a choice, also of nothing. Each posture has phrases that follow a subject ("a robot ..."), whole verbs
# ("the robot kneels"), and adjectives ("a kneeling robot"). What a caption names decides what it matches: see `Query`.

SUBJECTS = [
    "a humanoid robot", "a humanoid robot", "a humanoid robot", "a humanoid robot",
    "(a|the|one|this|) (white|light|grey|metal|simulated|) robot",
    "(a|the|one|this|) (simulated|white|mujoco|robotic|) humanoid", "(an|the|this|) android",
    "(a|the|this|) (white|mechanical|simulated|bipedal|walking|two-legged|) machine",
    "(a|the|) (mechanical|robotic|artificial|simulated) (person|human|man|figure|character|being)",
    "(a|the|) (stick figure|mannequin|dummy|puppet|figure|character|person|human|agent|body)",
    "(a|the|) (bipedal|humanoid|human-like|human-shaped|two-legged) (robot|machine|figure)", "someone", "it",
]
TEMPLATES = ["{}"] * 8 + [
    "(a|the|) (photo|picture|render|rendering|image|frame|screenshot|view|snapshot|video frame|still) (of|showing) {}",
    "{} (in|inside) (a|the) (simulator|simulation|physics simulation|virtual world|computer simulation|physics engine)",
    "{} (rendered|shown|simulated) (in|by|with) (mujoco|a simulator|a physics engine)", "(a simulation|an animation|footage) of {}",
    "(there is|we see|here is|this is|you can see|the camera shows) {}",
    "{}, (seen|viewed|pictured) from (the front|the side|afar|behind|a distance|above)",
    "{} (on|over) (a|the) (checkered|tiled|grey|chequered|dark) (floor|ground|plane)",
    "{} (under|against|below) (a|the) (blue|clear|dark) sky",
    "{}, (3d render|cgi|low resolution|full body|realistic|digital art)",
]
LINKS = ["{s} {p}"] * 5 + ["{s} (is|that is|which is|who is|seen|shown|) {p}", "{s}, {p}", "{p}", "{p}", "(a scene with|) {s}: {p}",
    "{s} (currently|now|calmly|still|simply|just) {p}"]
FLOOR = "(floor|ground|earth)"

# posture: (phrases that follow a subject, finite verbs, adjectives)
POSTURES = {
    "standing": (
        ["standing", "standing up", "standing up", "standing (upright|straight|tall|still|erect|there|around)", "(upright|erect|vertical)",
         "(standing|) on (its|both|both its|two|their) (feet|legs)",
         f"upright (on|over) the {FLOOR}", "in (a|an) (upright|standing|vertical|straight) (position|pose|posture|stance)",
         "(idle|waiting|balanced|resting), standing", "standing with (straight|extended|stretched|unbent) (legs|knees)",
         "balanced (upright|on both feet|on both legs)",
         "with (both|its|the) feet (flat |planted |)on the floor and (straight legs|an upright body|legs extended)",
         "(stands|standing) (on|with) straight legs", "at attention", "(doing nothing but|simply|just) standing"],
        ["stands", "stands up", "stands (upright|straight|tall|still|there)", "(stays|keeps|is) (upright|erect|on its feet|on both feet)",
         "(waits|rests) (standing|upright)", "(is balancing|balances) on (both|two) (feet|legs)", "has (stood|gotten|got) up",
         "(rises|rose) to its feet", "(holds|keeps) its legs straight"],
        ["standing", "upright", "erect", "vertical"]),
    "kneeling": (
        ["kneeling", "kneeling", "kneeling down", "kneeling (upright|on the floor|on the ground|still|low|tall)",
         "(down|resting|) on (its|both|both its|two|their|bent) knees", f"kneeling with (both|its|two) knees on the {FLOOR}",
         f"with (both|its|the|two) knees (on|touching|against|resting on|down on|pressed to) the {FLOOR}",
         "in (a|the) (kneeling|praying) (position|pose|posture)", "praying on (its|both) knees",
         "(kneeling|sitting|resting) (back on|on) its heels",
         "on bent knees", "kneeling (in prayer|to pray|in worship|to beg|to propose)", "begging on (its|both) knees",
         "bowed on (its|both) knees", f"with (its|the|both) (shins|lower legs) (flat |)on the {FLOOR} and (an upright torso|a straight back|its back straight)",
         "standing on its knees", "kneeling with (a straight back|its back straight|an upright torso|its torso upright)",
         f"both knees (on|down on|touching) the {FLOOR}", "(seiza|doing seiza|in seiza)"],
        ["kneels", "kneels down", "kneels on the floor",
         "(drops|falls|sinks|goes down|gets down|went down|sank) (to|on|onto) (its|both) knees",
         "(rests|stays|is|stands|balances|prays) on (its|both) knees", "(is|has been) brought to its knees", "(has knelt|knelt) (down|)",
         "(puts|has) both knees on the floor"],
        ["kneeling", "kneeled", "praying"]),
    "one knee": (
        ["(down|kneeling|resting) on one knee", "on one knee", "with one knee on the floor", "half kneeling",
         "with one knee down and one (foot|leg) up", "kneeling with a single knee", "proposing on one knee", "lunging (low|forward|)",
         "(taking|in) a low lunge"],
        ["kneels on one knee", "goes down on one knee", "drops to one knee", "(lunges|takes a knee)"], ["half kneeling", "lunging"]),
    "splits": (
        ["(doing|performing|practicing|in|holding|showing) (the|a|) (side|) splits", "practicing gymnastics, doing the side splits",
         "doing (the|) side splits", "doing the (box|straddle|center|middle|sideways) (split|splits)",
         "in a (wide|full|) (side|straddle|) split",
         "with (its|the|both) legs (spread|stretched|extended|split|opened) (wide|sideways|to the sides|apart|to both sides)",
         "(sitting|) in a (wide|) straddle", "practicing (gymnastics|flexibility), (legs apart|legs spread|the splits)", "doing gymnastics",
         "legs (stretched|spread|split|going|pointing) (out|) (sideways|to either side|left and right|to both sides)",
         "with (its|) legs (in opposite directions|wide apart) on the floor", "(a gymnast|flexible), legs wide apart on the floor",
         "stretching its legs sideways"],
        ["does the (side|) splits", "(performs|holds|shows|practices) (the|a) (side|full|wide|straddle|) (split|splits)",
         "(spreads|stretches|splits|opens) its legs (wide|sideways|apart|to the sides)", "sits with its legs spread (wide|sideways|apart)",
         "is (very|) flexible, in the splits"],
        ["flexible", "gymnastic", "splitting"]),
    "lotus": (
        ["seated down, meditating in the lotus position", "(meditating|sitting|seated) in (the|a) (lotus|half lotus) (position|pose)",
         "in (the|a) lotus (position|pose)", "(meditating|in meditation)", "(sitting|seated) cross-legged (on the floor|)", "cross-legged",
         "(sitting|seated) with (crossed|folded|its|both) legs (crossed|folded|tucked in|)", "doing yoga", "in a yoga pose (on the floor|)",
         "meditating on the floor", "with (crossed|folded) legs", "(calm|peaceful|quiet), (sitting|seated) cross-legged",
         "like a (buddha|yogi|monk)", "sitting with its (feet tucked in|knees out|knees apart)"],
        ["meditates", "meditates (cross-legged|on the floor|in the lotus position)",
         "sits (cross-legged|with crossed legs|with folded legs|in the lotus position)", "(does|practices) (yoga|zen|meditation)",
         "(folds|crosses) its legs"],
        ["meditating", "cross-legged", "zen", "calm"]),
    "sitting": (
        ["sitting", "sitting down", f"(sitting|seated) on (the|a) {FLOOR}", "seated",
         "(sitting|seated) with (its|both|) legs (out|straight|stretched out|extended|in front|forward|stretched forward)",
         "sitting on its (butt|bottom|behind|backside|rear)", "sitting (upright|up)",
         "in a (sitting|seated) (position|pose|posture)", "on its (butt|bottom|backside)", "(sitting|seated) with (bent|raised) knees",
         "with its (bottom|butt|hips|backside) on the floor",
         "legs (stretched|extended|straight) (in front|forward|to the front), sitting"],
        ["sits", "sits down", f"sits on the {FLOOR}", "(is|stays|has) (seated|sat down)",
         "sits with its legs (out|stretched|forward|extended|in front)", "(takes|took) a seat", "(rests|is) on its (bottom|butt|backside)"],
        ["sitting", "seated"]),
    "back": (
        ["lying on its back", "lying on its back", "(lying|laying|flat|resting|sleeping|down) on (its|the) back",
         "(lying|laying) (flat|) (face up|faceup|supine|facing up)", "supine",
         "(lying|down) on the (floor|ground), (face up|facing the sky|looking up|chest up)",
         "face up", f"with (its|the) (back|spine) (on|against|to|flat on) the {FLOOR}", "(fallen|knocked|thrown) (on|onto) its back",
         "facing (up|the sky|upwards), lying down", "(looking|staring) (up|at the sky|upwards) from the (floor|ground)",
         "on its (back|spine)", "(belly|chest|front|face|visor) (up|to the sky|upwards|facing up)"],
        ["lies on its back", "(lies|rests|sleeps|is) (flat|) on its back", "lies (face up|supine|facing the sky)",
         "(has fallen|fell|falls|rolled|toppled) (on|onto|over on) its back", "(looks|stares|gazes) (up|at the sky) (lying|from the floor)",
         "(rests|lies) on its spine"],
        ["supine", "face-up"]),
    "front": (
        ["lying face down", "lying face down", "lying (on its|on the) (belly|stomach|front|chest|face|tummy)",
         "(flat|resting|sleeping|asleep|down|stretched out) on its (belly|stomach|front|chest|face)", "prone", "lying prone",
         "(face|belly|chest|stomach|front) (down|to the ground|to the floor|downwards)",
         f"with its (face|chest|belly|stomach|front) (on|against|to|touching|pressed to) the {FLOOR}",
         "(fallen|knocked|thrown) (on|onto|flat on) its (face|front|belly)", "facing (down|the floor|downwards|the ground), lying down",
         "planking on the floor", "(dirt|floor) in its face"],
        ["lies face down", "(lies|rests|sleeps|is) (flat|) on its (belly|stomach|front|chest|face)", "lies (prone|facing the floor)",
         "(has fallen|fell|falls|toppled) (on|onto|flat on) its (face|front|belly)", "(is|stays) face down"],
        ["prone", "face-down"]),
    "side": (
        ["lying on its side", "(lying|resting|down|sleeping|curled up) on (its|one) side", "on its (left|right|) side", "lying sideways",
         "(collapsed|fallen) on its side", "in (the|a) recovery position"],
        ["lies on its side", "(sleeps|rests|lies) on (one|its) side", "(has fallen|fell) on its side"], ["sideways"]),
    "crawling": (
        ["crawling", "crawling", f"crawling (on|over|along|across) the {FLOOR}", "on (all fours|its hands and knees|hands and knees)",
         "(crawling|down|walking|moving) on all fours", "(crawling|moving|creeping) like (a baby|an animal|a dog|an infant)",
         "with (its|both) hands and knees on the floor",
         "in a (crawling|quadruped|tabletop|table) (position|pose)", "on four limbs", "creeping (around|along|forward)"],
        ["crawls", f"crawls (on|over|along|across) the {FLOOR}", "(is|goes|gets|moves|walks) (down |)on (all fours|hands and knees)",
         "creeps (forward|along|around)"], ["crawling", "creeping", "four-legged"]),
    "squatting": (
        ["squatting", "squatting", "squatting (down|low|deep|deeply)", "crouching", "crouching (down|low)", "crouched",
         "in (a|the) (deep|low|) (squat|crouch)", "doing (a|) (deep|) (squat|squats)", "in a (squatting|crouching) (position|pose|posture)",
         "with (deeply|) bent (knees|legs), (feet|both feet) (on|flat on) the floor",
         "(down|low) on its haunches", "hunkering down", "(exercising|training), doing squats", "ducking",
         "hunched down with bent (legs|knees)"],
        ["squats", "squats (down|low|deep)", "crouches", "crouches (down|low)", "(does|holds) a (deep|low|) squat",
         "(bends|has bent) its knees (deeply|low)", "(ducks|hunkers) down"], ["squatting", "crouching", "crouched"]),
    "one leg": (
        ["standing up on one leg", "standing on (one|a single|just one) (leg|foot)",
         "(balancing|balanced|upright|poised) on (one|a single) (leg|foot)", "on (one|a single) (leg|foot)",
         "with one (leg|foot|knee) (lifted|raised|up|in the air|off the floor)", "(lifting|raising|holding up) one (leg|foot|knee)",
         "like a (flamingo|stork|crane)", "(hopping|dancing) on one leg", "one (leg|foot|knee) (lifted|raised|up|off the ground)"],
        ["stands on (one|a single) (leg|foot)", "(balances|hops|dances) on (one|a single) (leg|foot)",
         "(lifts|raises|holds up) (one|a) (leg|foot|knee)", "keeps one foot (up|lifted|off the floor)"], ["one-legged", "hopping"]),
    "mid-air": (
        ["in mid-air", "in the air", "jumping", "jumping (up|high|in the air|off the floor)",
         "(floating|flying|hovering|leaping|hanging|suspended|levitating) (in the air|above the floor|over the floor|in mid-air|)",
         "with (both feet|its feet|no foot) (off|above|touching|not on) the (floor|ground)",
         "(airborne|off the ground|off the floor|above the floor)", "leaping"],
        ["jumps", "jumps (up|high)", "(floats|flies|hovers|leaps|hangs|levitates) (in the air|above the ground|in mid-air|)",
         "(has left|left|leaves) the (floor|ground)", "(is|stays) (airborne|in mid-air|off the floor)"],
        ["jumping", "flying", "floating", "airborne", "leaping", "hovering"]),
    "falling": (
        ["falling", "falling (down|over|forward|backward|sideways)", "(tipping|toppling|tumbling|keeling) over",
         "tilted (and falling|over|to one side)", "(losing|out of) balance", "off balance", "(stumbling|tripping|tumbling|staggering)",
         "leaning (over|far over|too far|dangerously)", "about to (fall|hit the floor|crash)", "in (the middle of|) a fall", "unbalanced"],
        ["falls", "falls (down|over|forward|backward)", "(tips|topples|tumbles|leans) over", "(loses|lost|has lost) (its|) balance",
         "(stumbles|trips|staggers)", "is (about to fall|falling over|off balance)"],
        ["falling", "toppling", "stumbling", "tilted", "unbalanced"]),
    "tangle": (
        ["in a tangle", "(tangled|crumpled|twisted|contorted|collapsed) (up|on the floor|in a heap|)",
         "in (a|some) (strange|weird|random|awkward|twisted|contorted|odd) (pose|position|posture)", "in a heap",
         "with limbs (everywhere|in a mess|in all directions)", "(collapsed|slumped|curled up) on the floor",
         "rolling (around|) on the floor"],
        ["(has collapsed|collapses|crumples|slumps)", "lies in a (heap|tangle|mess)", "(twists|contorts) itself"],
        ["tangled", "twisted", "contorted", "collapsed", "crumpled"]),
}
ARMS = {
    "raised": ["with both arms raised", "with (both|its|the|two) (arms|hands) (raised|up|lifted|in the air|held up|held high|overhead|above its head|above the head|high|upwards|stretched up)", "(raising|lifting|holding up|throwing up|stretching up) (both|its) (arms|hands)", "(arms|hands) (up|raised|in the air|overhead|high)", "(both|two) (arms|hands) (raised|lifted) (high|in the air|)", "both arms up",
               "(reaching|stretching) (up|for the sky|upwards|to the sky|high) (with both hands|with its arms|)",
               "(surrendering|cheering|celebrating|in victory)", "hands (up|above the head|over its head)",
               "(celebrating|cheering), (arms|hands) (up|high|raised)"],
    "hips": ["with hands on hips", "with (its|both|the) hands on (its|the) (hips|waist|sides)",
        "hands on (hips|its hips|the hips|waist|its waist)", "with (its|both) (arms|hands) akimbo",
        "(holding|placing|putting|resting) (its|both) hands on (its|the) (hips|waist)", "arms akimbo", "hands at (the|its) waist"],
    "crossed": ["with its arms crossed", "with (its|the|both) arms (crossed|folded) (in front of its chest|over the chest|)",
        "(arms|its arms) (crossed|folded)", "(crossing|folding) (its|both) arms", "with (crossed|folded) arms", "hugging itself",
        "arms (folded|crossed) (over|in front of|across) (its|the) (chest|body)"],
    "sideways": ["with (its|both) arms (out|outstretched|stretched|extended|spread|held out) (sideways|to the sides|)",
        "arms (wide|spread|out|to the sides|outstretched)", "(in|holding|making) a t pose", "with open arms",
        "(spreading|stretching out) its arms"],
    "down": ["with (its|both|the) arms (down|at its sides|hanging|lowered|by its sides|hanging down)",
        "arms (down|hanging|lowered|at its sides|by its side)", "(lowering|resting) its arms", "hands (down|by its sides|below the waist)"],
    "forward": ["with (its|both|the) arms (forward|in front|stretched forward|extended forward|straight ahead)",
        "(reaching|stretching|pointing) (forward|ahead) (with both arms|)", "arms (forward|out front|held in front)",
        "(hands|arms) in front"],
    "other": ["with (its|the|) arms (bent|anywhere|in some position|somewhere)", "moving its arms", "with (bent|loose) arms"],
}
# Other robots: (the bare subject, then phrases for each state), whole captions.
OTHERS = {
    "pendulum": ("InvertedPendulum-v5", ["pole and cart", "pole and cart", "(a|the|) (pole|rod|stick|pendulum) (and|on|with) (a|the|) cart",
        "(a|the|) (cartpole|cart-pole|inverted pendulum)", "(a|the) cart with (a|its) (pole|rod|stick)"], {
        "pole upright": ["pole vertically upright on top of the cart",
            "(a|the|) (pole|rod|stick|pendulum) (is |standing |balanced |pointing |)(vertically upright|upright|vertical|straight up|vertically) on (top of|) (the|a) cart", "(a|the|) cart (balancing|holding up|with) (a|the|its) (upright|vertical|balanced|straight) (pole|rod|stick)", "(a|the) (balanced|upright|vertical) (pendulum|inverted pendulum|cartpole|pole)"],
        "pole leaning": ["(a|the|) (pole|rod|stick|pendulum) (leaning|tilted|tilting|tipping|slanted|falling) (over|to one side|sideways|to the left|to the right|) (on|on top of) (the|a) cart", "(a|the) cart with (a|its) (leaning|tilted|slanted|tipping) (pole|rod|stick)", "(a|the) (leaning|tilted|slanted|falling) (pendulum|pole|cartpole)"],
        "pole fallen": ["(a|the|) (pole|rod|stick|pendulum) (has fallen|fallen|lying|hanging|horizontal|down|dropped) (over|down|flat|sideways|) (beside|next to|off|at|on) (the|a) cart", "(a|the) cart with (a|its) (fallen|horizontal|flat|dropped) (pole|rod|stick)", "(a|the) (fallen|collapsed|horizontal) (pendulum|pole|cartpole)"]}),
    "cheetah": ("HalfCheetah-v5", ["a half cheetah",
        "(a|the|) (half cheetah|cheetah robot|robot cheetah|robotic cheetah|cheetah|robot dog|four-legged robot|robotic animal)"], {
        "cheetah upright": ["{s} (standing|on its feet|upright|running|walking|the right way up|on its legs)",
            "{s} (that is |)(standing|running|on its feet)", "(a|the|) (standing|running|upright) (cheetah|cheetah robot|half cheetah)"],
        "cheetah on its back": ["{s} (on its back|upside down|flipped over|turned over|lying on its back|with its legs in the air|fallen on its back|belly up)", "(an|the) (upside down|overturned|flipped) (cheetah|cheetah robot|half cheetah)"]}),
    "ant": ("Ant-v5", ["an ant robot", "(an|the|) (ant robot|robot ant|ant|robotic ant|robot spider|spider robot|quadruped robot|insect robot)"], {
        "ant upright": ["{s} (standing|on its feet|upright|walking|the right way up|on its legs)",
            "{s} (that is |)(standing|walking|on its legs)", "(a|the|) (standing|walking|upright) (ant|ant robot|spider robot)"],
        "ant on its back": ["{s} (on its back|upside down|flipped over|turned over|lying on its back|with its legs in the air|belly up)",
            "(an|the) (upside down|overturned|flipped) (ant|ant robot|spider robot)"]}),
}

# ---------------------------------------------------------------- the poses of the humanoid, degrees
# Legs are (hip_x, hip_z, hip_y, knee); arms are the left (shoulder1, shoulder2, elbow), the right one mirrored. Pitch is positive
# forward. Then the root is lowered until the lowest geom touches the floor. Everything is within the joints' limits.

ARM_POSES = {
    "down": (-45, 50, -58), "bent": (-45, 45, -20), "start": (0, 0, 0), "raised": (85, -15, -85), "hips": (-48, 78, -5),
        "crossed": (-60, 24, 30),
    "sideways": (51, 46, -66), "forward": (3, -31, -67), "crawl": (12, -17, -37), "lap": (-36, 28, -27), "knees": (-22, 9, -57),
}
NEUTRAL, ANY = ("down", "down", "bent", "start", "random"), ("down", "down", "bent", "start", "lap", "sideways", "forward", "raised",
    "hips", "crossed", "random", "random", "random")
STRAIGHT = (0, 0, 0, -2)
# posture: [(pitch, abdomen_y, left leg, right leg, arms to draw from, share of the noise in the legs)]
POSES = {
    "standing": [(0, 0, STRAIGHT, STRAIGHT, NEUTRAL, 1), (0, 0, (-8, 0, 0, -2), (-8, 0, 0, -2), NEUTRAL, 1),
        (0, 0, (-4, 0, -12, -25), (-4, 0, -12, -25), NEUTRAL, 1),
                 (0, 0, (-4, 0, -25, -12), (-4, 0, 12, -12), NEUTRAL, 0.7)],
    "arms raised": [(0, 0, STRAIGHT, STRAIGHT, ("raised",), 1), (0, 0, (-10, 0, 0, -2), (-10, 0, 0, -2), ("raised",), 1)],
    "hands on hips": [(0, 0, STRAIGHT, STRAIGHT, ("hips",), 1), (0, 0, (-8, 0, 0, -2), (-8, 0, 0, -2), ("hips",), 1)],
    "arms crossed": [(0, 0, STRAIGHT, STRAIGHT, ("crossed",), 1), (0, 0, (-8, 0, 0, -2), (-8, 0, 0, -2), ("crossed",), 1)],
    "kneeling": [(0, 0, (0, 0, 0, -94), (0, 0, 0, -94), ANY, 0.7), (0, 0, (0, 0, -15, -108), (0, 0, -15, -108), ANY, 0.7),
        (0, 0, (0, 0, -30, -125), (0, 0, -30, -125), ANY, 0.7),
                 (0, 0, (0, 0, -60, -155), (0, 0, -60, -155), ANY, 0.5), (0, 0, (-12, 0, -10, -104), (-12, 0, -10, -104), ANY, 0.7),
                  (20, -20, (-4, 0, -5, -90), (-4, 0, -5, -90), ANY, 0.7),
                 (-15, 10, (-4, 0, 10, -85), (-4, 0, 10, -85), ANY, 0.7)],
    "one knee": [(0, 0, (0, 0, -85, -85), (0, 0, 0, -94), ANY, 0.5), (5, 0, (-8, 0, -95, -95), (-4, 0, 5, -90), ANY, 0.5)],
    "splits": [(-3, -14, (-25, -60, -65, -9), (-25, -60, -65, -9), ("down", "sideways", "lap", "raised", "random"), 0.7)],
    "lotus": [(-8, -75, (0, -60, -60, -143), (0, -60, -60, -143), ("knees", "lap", "random"), 0.7)],
    "sitting": [(-10, 0, (0, 0, -80, -3), (0, 0, -80, -3), ("lap", "down", "random"), 1),
        (-15, 0, (-6, 0, -105, -65), (-6, 0, -105, -65), ("knees", "lap", "random"), 1)],
    "back": [(-90, 0, STRAIGHT, STRAIGHT, ("down", "sideways", "bent", "random"), 1.5),
        (-90, 0, (0, 0, -30, -60), (0, 0, -30, -60), ("down", "sideways", "bent", "random"), 1.5),
             (-90, 0, (-15, -20, -10, -20), (-15, -20, -40, -70), ("random", "raised"), 1.5)],
    "front": [(90, 0, STRAIGHT, STRAIGHT, ("down", "sideways", "random"), 1.5),
        (90, 0, (-15, -10, -10, -30), (-15, -10, 0, -10), ("random", "raised"), 1.5)],
    "side": [(0, 0, (-5, 0, -20, -30), (-5, 0, -30, -50), ("down", "start", "random"), 1.5),
        (0, 0, (-5, 0, 0, -5), (-5, 0, 0, -5), ("down", "bent", "random"), 1.5)],
    "crawling": [(80, 0, (0, 0, -80, -92), (0, 0, -80, -92), ("crawl",), 0.7),
        (75, 0, (0, 0, -60, -85), (0, 0, -95, -100), ("crawl",), 0.7)],
    "squatting": [(25, 0, (-8, 0, -100, -130), (-8, 0, -100, -130), ("forward", "random"), 0.7),
        (20, 0, (-12, -20, -90, -115), (-12, -20, -90, -115), ("knees", "random"), 0.7),
                  (15, 0, (-8, 0, -70, -90), (-8, 0, -70, -90), ("forward", "down", "random"), 0.7)],
    "one leg": [(0, 0, STRAIGHT, (0, 0, -75, -100), ("down", "sideways", "random"), 0.7),
        (0, 0, STRAIGHT, (0, 0, 0, -110), ("down", "sideways", "random"), 0.7),
                (0, 0, STRAIGHT, (-25, -40, -60, -120), ("down", "sideways", "random"), 0.7)],
    "mid-air": [(0, 0, (-18, 0, 0, -10), (-18, 0, 0, -10), ("raised", "sideways", "random"), 1),
        (0, 0, (0, 0, -50, -80), (0, 0, -50, -80), ("raised", "sideways", "random"), 1),
                (0, 0, (-22, 0, 0, -2), (-22, 0, 0, -2), ("raised", "sideways", "random"), 1),
                 (0, 0, STRAIGHT, (0, 0, -30, -60), ("random", "down"), 1)],
    "falling": [(45, 0, (-4, 0, -10, -20), (-4, 0, 0, -20), ("random",), 1.5),
        (-45, 0, (-4, 0, -10, -20), (-4, 0, 0, -20), ("random",), 1.5), (0, 0, (-4, 0, -10, -20), (-4, 0, 0, -20), ("random",), 1.5)],
    "tangle": [(0, 0, None, None, ("random",), 0)],  # every joint random, the body turned any way and settled by physics
}
# The states of the table above as (posture, arms): "arms raised" is a standing posture with raised arms.
STATES = {name: (name, None) for name in POSES} | {"arms raised": ("standing", "raised"), "hands on hips": ("standing", "hips"),
    "arms crossed": ("standing", "crossed")}
OTHER_STATES = [state for _, _, phrases in OTHERS.values() for state in phrases]
ALL_STATES = list(STATES) + OTHER_STATES  # the classes
ALL_POSTURES = list(POSTURES) + OTHER_STATES
ALL_ARMS = list(ARMS)
# Ways from one pose to another, for rewards that change evenly: (from, its row, its arms, to, its row, its arms)
PATHS = [("standing", 0, "down", "kneeling", 0, "down"), ("standing", 0, "down", "kneeling", 2, "down"),
    ("standing", 0, "start", "kneeling", 4, "start"), ("squatting", 0, "forward", "kneeling", 2, "down"),
         ("front", 0, "down", "kneeling", 0, "down"), ("back", 1, "down", "kneeling", 3, "down"),
          ("crawling", 0, "crawl", "kneeling", 1, "forward"), ("sitting", 1, "knees", "kneeling", 3, "knees"),
         ("standing", 0, "down", "squatting", 0, "forward"), ("standing", 0, "down", "arms raised", 0, "raised"),
          ("standing", 1, "start", "arms raised", 1, "raised"), ("standing", 1, "down", "splits", 0, "sideways"),
         ("sitting", 0, "lap", "splits", 0, "sideways"), ("sitting", 0, "lap", "back", 0, "down"),
          ("sitting", 1, "knees", "lotus", 0, "knees"), ("crawling", 0, "crawl", "front", 0, "sideways"),
         ("one knee", 0, "down", "kneeling", 0, "down"), ("standing", 0, "down", "hands on hips", 0, "hips"),
          ("squatting", 1, "knees", "sitting", 1, "knees"), ("kneeling", 2, "down", "splits", 0, "down")]


# ---------------------------------------------------------------- a state's label, read off the simulator


def gate(value, threshold, width):
    """0 well below the threshold, 1 well above, one half on it."""
    return 1.0 / (1.0 + np.exp(np.clip((threshold - value) / width, -30, 30)))


class Humanoid:
    """The environment's own model: puts it in poses, simulates it, and labels its states."""

    def __init__(self):
        env = gym.make("Humanoid-v5").unwrapped
        self.xml, self.model, self.data = env.fullpath, env.model, mujoco.MjData(env.model)
        self.low, self.high = self.model.jnt_range[1:].T + np.array([[0.01], [-0.01]])
        self.joint_of_actuator = self.model.actuator_trnid[:, 0]
        env.close()
        self.arm_marks = {}  # each arm pose as the positions of elbows and hands about the torso
        for name in ("down", "bent", "hips", "crossed", "sideways", "forward", "start", "crawl", "lap", "knees"):
            self.forward(self.pose(0, 0, STRAIGHT, STRAIGHT, ARM_POSES[name], ARM_POSES[name]))
            self.arm_marks[name] = self.arm_positions()

    def pose(self, pitch, abdomen_y, left_leg, right_leg, left_arm, right_arm):
        """qpos [24] from angles in degrees; right_arm is given mirrored, as the left one is."""
        joints = [0, abdomen_y, 0, *right_leg, *left_leg, -right_arm[0], -right_arm[1], right_arm[2], *left_arm]
        half = np.deg2rad(pitch) / 2
        return np.concatenate([[0, 0, 1.4, np.cos(half), 0, np.sin(half), 0], np.deg2rad(joints)])

    def clip(self, qpos):
        qpos[7:] = np.clip(qpos[7:], self.low, self.high)
        return qpos

    def forward(self, qpos):
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)

    def lowest(self):
        """Height of each geom's lowest point, the floor left out: [17]."""
        half = np.where(self.model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE, self.model.geom_size[:, 1], 0)
        return (self.data.geom_xpos[:, 2] - np.abs(self.data.geom_xmat[:, 8]) * half - self.model.geom_size[:, 0])[1:]

    def to_floor(self, qpos, height=0.0):
        self.forward(qpos)
        qpos[2] += height - self.lowest().min()
        return qpos

    def turn(self, qpos, heading, axis=(0, 0, 1)):
        """Turns the whole robot about an axis of the world through its root."""
        turn, result = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn, np.array(axis, float), heading)
        mujoco.mju_mulQuat(result, turn, qpos[3:7])
        qpos[3:7] = result
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

        Kneeling: both knees within 0.12 m of the floor, the torso's up-axis above 0.7, thighs not on the floor, not in the air.
        `knee` and `upright` are where kneeling is as true as not.
        """
        self.forward(qpos)
        low, xpos, torso = self.lowest(), self.data.xpos, self.data.xmat[1]
        up, face, side = torso[8], torso[6], abs(torso[7])  # how far the torso's axes point up
        knees, feet, pelvis = xpos[[5, 8], 2], low[[7, 10]], xpos[3, 2]
        thighs = [(xpos[s] - xpos[t]) / np.linalg.norm(xpos[s] - xpos[t]) for t, s in ((4, 5), (7, 8))]
        bend = np.rad2deg(-qpos[[13, 17]])
        spread = np.rad2deg(np.arccos(np.clip(thighs[0] @ thighs[1], -1, 1)))
        upper = low[[0, 1, 2, 11, 12, 13, 14, 15, 16]].min()
        hands = low[[13, 16]].max()
        shares, left = dict.fromkeys(ALL_POSTURES, 0.0), 1.0

        def claim(amount, **parts):
            nonlocal left
            for name, part in parts.items():
                shares[name.replace("_", " ") if name != "mid_air" else "mid-air"] += left * amount * part
            left *= 1.0 - amount

        tilted = gate(-up, -0.65, 0.04)
        claim(gate(low.min(), 0.15, 0.025), mid_air=1 - 0.5 * tilted, falling=0.5 * tilted)
        claim(gate(-knees.max(), -knee, 0.008) * gate(up, upright, 0.02) * gate(pelvis, 0.18, 0.012) * gate(bend.min(), 45, 5), kneeling=1)
        # knees that sink while the thighs point down: between standing and kneeling, by their height
        down = gate(-max(thighs[0][2], thighs[1][2]), 0.75, 0.04)
        share = np.clip((0.4 - knees.max()) / 0.3, 0, 1)
        claim(gate(up, 0.68, 0.03) * down * gate(-knees.max(), -0.37, 0.015) * gate(-abs(knees[0] - knees[1]), -0.15, 0.03),
            kneeling=0.8 * share, standing=1 - 0.8 * share)
        claim(gate(up, 0.68, 0.03) * gate(-knees.min(), -0.13, 0.01) * gate(knees.max(), 0.2, 0.02) * gate(pelvis, 0.28, 0.02),
            one_knee=0.75, kneeling=0.25)
        lifted = gate(feet.max(), 0.17, 0.02) * gate(-feet.min(), -0.1, 0.02)
        claim(gate(up, 0.78, 0.03) * gate(pelvis, 0.72, 0.03), one_leg=lifted, standing=1 - lifted)
        folded = gate(bend.min(), 100, 8) * gate(-knees.max(), -0.34, 0.02) * gate(spread, 45, 6)
        straddle = gate(spread, 85, 6) * gate(-bend.max(), -50, 6) * gate(-knees.max(), -0.25, 0.02)
        claim(gate(-min(low[3], low[4]), -0.12, 0.015) * gate(up, 0.55, 0.04), splits=straddle, lotus=(1 - straddle) * folded,
            sitting=(1 - straddle) * (1 - folded))
        claim(gate(up, 0.55, 0.04) * gate(pelvis, 0.22, 0.02) * gate(-feet.max(), -0.17, 0.02) * gate(knees.min(), 0.17,
            0.02) * gate(bend.min(), 45, 5), squatting=1)
        flat = gate(-xpos[1, 2], -0.37, 0.02) * gate(-pelvis, -0.36, 0.02)
        rolled = gate(side, abs(face), 0.12)  # onto its side
        claim(flat, side=rolled, back=(1 - rolled) * gate(face, 0, 0.05), front=(1 - rolled) * gate(-face, 0, 0.05))
        claim(gate(-face, 0.55, 0.05) * gate(-knees.max(), -0.25, 0.02) * gate(-hands, -0.25, 0.03) * gate(pelvis, 0.25, 0.03), crawling=1)
        claim(gate(up, 0.68, 0.03) * gate(pelvis, 0.25, 0.02), one_knee=0.5, squatting=0.5)  # a lunge
        claim(gate(-up, -0.8, 0.04) * gate(xpos[1, 2], 0.42, 0.04) * gate(upper, 0.05, 0.02), falling=1)
        claim(1.0, tangle=1)

        arms = self.arm_positions()
        raised = gate(arms[:, 5].min(), 0.27, 0.02)  # both hands above the head's middle
        nearness = {name: np.exp(-((arms - mark) ** 2).sum() / (4 * 0.11**2)) for name, mark in self.arm_marks.items()}
        nearness["other"] = np.exp(-(1.4**2))
        near = dict.fromkeys(ALL_ARMS, 0.0)
        for name, value in nearness.items():
            near[name if name in near else "down" if name == "bent" else "other"] += value
        total = sum(near.values())
        arms_shares = [raised if name == "raised" else (1 - raised) * value / total for name, value in near.items()]
        return np.array(list(shares.values()), np.float32), np.array(arms_shares, np.float32)


# ---------------------------------------------------------------- states to render


def random_arm(rng):
    return rng.uniform((-55, -55, -85), (80, 80, 45))


def noise(rng, scale, size, held_out):
    """Held-out frames have another noise than the training frames: even instead of normal."""
    return rng.uniform(-1.6 * scale, 1.6 * scale, size) if held_out else rng.normal(0, scale, size)


def random_heading(rng):
    """Radians; every heading, but mostly near the camera."""
    kind = rng.random()
    return np.deg2rad(rng.normal(0, 15) if kind < 0.45 else rng.normal(0, 45) if kind < 0.7 else rng.uniform(-180, 180))


def posed(h, rng, state, held_out, row=None):
    """A state of the table with noise in the joints, the body's tilt and the heading: qpos."""
    pitch, abdomen_y, left, right, arms, share = POSES[state][rng.integers(len(POSES[state])) if row is None else row]
    if left is None:  # a tangle
        qpos = h.pose(0, 0, STRAIGHT, STRAIGHT, (0, 0, 0), (0, 0, 0))
        qpos[7:] = rng.uniform(h.low, h.high)
        axis = rng.normal(size=3)
        qpos = h.to_floor(h.turn(qpos, rng.uniform(0, 2 * np.pi), axis / np.linalg.norm(axis)))
        return h.settle(qpos, rng.integers(20, 60))
    if rng.random() < 0.5:
        left, right = right, left
    kind = arms[rng.integers(len(arms))]
    if kind == "random":
        left_arm, right_arm = random_arm(rng), random_arm(rng)
    else:
        spread = 7 if state in ("arms raised", "hands on hips", "arms crossed", "crawling") else 10
        left_arm, right_arm = (np.array(ARM_POSES[kind]) + noise(rng, spread, 3, held_out) for _ in range(2))
    legs = rng.uniform(4, 8) * share
    qpos = h.pose(pitch, abdomen_y, left + noise(rng, legs, 4, held_out), right + noise(rng, legs, 4, held_out), left_arm, right_arm)
    qpos[7:10] += np.deg2rad(noise(rng, 5, 3, held_out))
    qpos = h.clip(qpos)
    if state == "side":
        qpos = h.turn(qpos, rng.choice([-1, 1]) * np.pi / 2, (1, 0, 0))
    if state == "falling":
        qpos = h.turn(qpos, rng.choice([-1, 1]) * np.deg2rad(rng.uniform(15, 45)), (1, 0, 0))
    if state == "mid-air" and rng.random() < 0.3:
        qpos[10:] = rng.uniform(h.low[3:], h.high[3:])
    tilt = 7 if state in ("back", "front", "side", "mid-air", "falling") else 4.5
    for axis in ((1, 0, 0), (0, 1, 0)):
        qpos = h.turn(qpos, np.deg2rad(noise(rng, tilt, None, held_out)), axis)
    qpos = h.turn(qpos, random_heading(rng) if pitch in range(-50, 85) and state != "side" else rng.uniform(-np.pi, np.pi))
    qpos = h.to_floor(qpos, rng.uniform(0.25, 0.7) if state == "mid-air" else 0)
    if state in ("back", "front", "side") and rng.random() < 0.5:
        qpos = h.settle(qpos, rng.integers(10, 40))
    return qpos


def between(h, rng, held_out):
    """A state on a way between two poses, and its soft label."""
    start, row_a, arm_a, end, row_b, arm_b = PATHS[rng.integers(len(PATHS))]
    share = rng.random()
    noise_joints, heading = np.deg2rad(noise(rng, 4, 17, held_out)), random_heading(rng)
    qpos = path_state(h, start, row_a, arm_a, end, row_b, arm_b, share, noise_joints, heading)
    label, arms = h.label(qpos)
    linear = np.zeros_like(label)
    linear[ALL_POSTURES.index(STATES[start][0])] += 1 - share
    linear[ALL_POSTURES.index(STATES[end][0])] += share
    return qpos, 0.5 * label + 0.5 * linear, arms


def path_state(h, start, row_a, arm_a, end, row_b, arm_b, share, noise_joints=0.0, heading=0.0):
    ends = []
    for state, row, arm in ((start, row_a, arm_a), (end, row_b, arm_b)):
        pitch, abdomen_y, left, right, _, _ = POSES[state][row]
        ends.append(np.array([pitch, *h.pose(0, abdomen_y, left, right, ARM_POSES[arm], ARM_POSES[arm])[7:]]))
    pitch, *joints = (1 - share) * ends[0] + share * ends[1]
    qpos = h.pose(pitch, 0, STRAIGHT, STRAIGHT, (0, 0, 0), (0, 0, 0))
    qpos[7:] = np.array(joints) + noise_joints
    return h.to_floor(h.turn(h.clip(qpos), heading))


START_STATES = ["kneeling"] * 6 + ["standing"] * 2 + ["arms raised"] * 3 + ["splits"] * 3 + ["lotus"] * 2 + ["hands on hips",
    "arms crossed", "sitting", "sitting", "back", "back", "front", "side", "crawling", "crawling", "squatting", "squatting",
                "one leg", "one leg", "one knee", "one knee", "mid-air", "mid-air", "falling", "tangle"]


def rollout(h, rng, held_out):
    """Some states of a simulated episode: random actions, held poses, kicks, or motion from one pose to another."""
    model, data = h.model, h.data
    mujoco.mj_resetData(model, data)
    kind, steps = rng.choice(["start", "kick", "hold", "move"], p=[0.25, 0.25, 0.3, 0.2]), rng.integers(15, 70)
    target = None
    if kind == "start":  # as the environment resets, then acted on
        data.qpos[:] = model.qpos0 + rng.uniform(-0.01, 0.01, model.nq)
        qpos = h.turn(data.qpos.copy(), random_heading(rng))
    else:
        qpos = posed(h, rng, START_STATES[rng.integers(len(START_STATES))], held_out)
        target = qpos[7:].copy()
        if kind == "move":
            goal = posed(h, rng, START_STATES[rng.integers(len(START_STATES))], held_out)[7:]
    mujoco.mj_resetData(model, data)
    data.qpos[:] = qpos
    data.qvel[:] = rng.normal(0, rng.choice([0.1, 0.5, 1.5]) * (1.3 if held_out else 1.0), model.nv)
    scale, style = rng.choice([0.0, 0.1, 0.25, 0.5, 1.0], p=[0.1, 0.2, 0.2, 0.2, 0.3]), rng.choice(["white", "slow", "constant"])
    action, phase, speed = rng.normal(0, 1, model.nu), rng.uniform(0, 2 * np.pi, model.nu), rng.uniform(0.05, 0.6, model.nu)
    keep, states = set(rng.choice(steps, min(6, steps), replace=False)), []
    for step in range(steps):
        if held_out:  # another kind of action: waves
            action = np.sin(phase + speed * step) * 1.5
        elif style == "white":
            action = rng.uniform(-1.7, 1.7, model.nu)
        elif style == "slow":
            action = 0.9 * action + 0.44 * rng.normal(0, 1, model.nu)
        control = scale * np.clip(action, -1, 1)
        if kind in ("hold", "move"):  # springs towards the pose, as an agent that has learned to hold it
            aim = target if kind == "hold" else target + (goal - target) * min(1.0, 1.5 * step / steps)
            joints = h.joint_of_actuator
            control = 0.3 * control + 1.5 * (aim[joints - 1] - data.qpos[joints + 6]) - 0.06 * data.qvel[joints + 5]
        data.ctrl[:] = np.clip(control, -1, 1) * 0.4
        mujoco.mj_step(model, data, 5)
        if not np.isfinite(data.qpos).all():
            break
        if step in keep:
            states.append(data.qpos.copy())
    return states


class Other:
    """The other robots: a state and its label."""

    def __init__(self, name):
        self.name, self.states = name, list(OTHERS[name][2])
        env = gym.make(OTHERS[name][0]).unwrapped
        self.xml, self.model, self.data = env.fullpath, env.model, mujoco.MjData(env.model)
        env.close()

    def sample(self, rng):
        """(qpos, shares of this robot's states, camera)."""
        low, high = self.model.jnt_range.T
        if self.name == "pendulum":
            angle = np.deg2rad(rng.choice([rng.normal(0, 5), rng.uniform(-90, 90), rng.choice([-1, 1]) * rng.uniform(70, 90)]))
            upright, fallen = gate(-abs(np.rad2deg(angle)), -14, 3), gate(abs(np.rad2deg(angle)), 68, 4)
            camera = dict(azimuth=rng.choice([90, 90, 90, -90]) + rng.normal(0, 3), distance=rng.choice([3, rng.uniform(2.2, 4)]),
                elevation=rng.choice([-10, rng.uniform(-25, 0)]), lookat=(0, 0, rng.choice([0.3, rng.uniform(0, 1)])))
            return np.array([rng.uniform(-0.9, 0.9), angle]), np.array([upright, 1 - upright - fallen, fallen]).clip(0), camera
        on_back = rng.random() < 0.5
        qpos = self.model.qpos0.copy()
        if self.name == "cheetah":
            qpos[3:] = rng.uniform(low[3:], high[3:]) * rng.choice([0.4, 1.0])
            qpos[2] = (np.pi if on_back else 0) + rng.normal(0, 0.25)
            camera = dict(azimuth=90 + rng.normal(0, 8), distance=rng.choice([3.5, rng.uniform(2.5, 4.5)]),
                elevation=rng.choice([-10, rng.uniform(-25, 0)]), lookat=(0, 0, rng.choice([0.5, 1, rng.uniform(0.3, 1)])))
        else:
            qpos[7:] = rng.uniform(low[1:], high[1:])
            axis, turn = rng.normal(size=3), np.zeros(4)
            mujoco.mju_axisAngle2Quat(turn, axis * [1, 1, 0] / np.linalg.norm(axis[:2]), (np.pi if on_back else 0) + rng.normal(0, 0.25))
            mujoco.mju_axisAngle2Quat(qpos[3:7], np.array([0.0, 0.0, 1.0]), rng.uniform(0, 2 * np.pi))
            mujoco.mju_mulQuat(qpos[3:7], turn, qpos[3:7].copy())
            camera = dict(azimuth=180 + rng.normal(0, 20), distance=rng.choice([3.5, rng.uniform(2.5, 4.5)]),
                elevation=rng.choice([-10, rng.uniform(-30, -5)]), lookat=(0, 0, rng.choice([0.5, 1, rng.uniform(0.3, 1)])))
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        height = Humanoid.lowest(self).min() - (0 if rng.random() < 0.8 else rng.uniform(0, 0.3))
        qpos[1 if self.name == "cheetah" else 2] -= height
        return qpos, np.array([0.0, 1.0] if on_back else [1.0, 0.0]), camera


DEFAULT_CAMERA = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0.0, 0.0, 1.0), follow=True)


class Studio:
    """Renders states at the model's size, a share of them at another size and resized."""

    def __init__(self, xml):
        self.renderers = {size: SceneRenderer(xml, (size, size), **DEFAULT_CAMERA, restyle=True) for size in (SIZE, 64, 128, 224)}

    def __call__(self, rng, qpos, camera):
        size = SIZE if rng.random() < 0.88 else rng.choice([64, 128, 224])
        renderer = self.renderers[size]
        camera = DEFAULT_CAMERA | camera
        renderer.camera.distance, renderer.camera.elevation, renderer.camera.azimuth = camera["distance"], camera["elevation"], camera["azimuth"]
        renderer.lookat, renderer.follow = camera["lookat"], camera["follow"]
        frame = renderer(qpos)
        return frame if size == SIZE else np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.BICUBIC))


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


SIZE = 96
# source of frames: (frames in the training set, in the held-out set)
SOURCES = {"posed": (22000, 1900), "physics": (28000, 3000), "between": (6000, 0), "agent": (8000, 0), "sac": (0, 0), "pendulum": (2400, 300),
    "cheetah": (1600, 200), "ant": (1600, 200)}
SECOND_ROUND = {"sac": (52000, 0)}
# States of the humanoid [N, 24]: "qpos" by a search that climbed the reward of an earlier version, "qpos_sac" by SAC agents in the
# deterministic episodes of their training, all the way from random to kneeling: two that were trained on the reward of the first
# round, and four on that of an earlier second round (of these every fourth state, and late ones that are not kneeling).
AGENT_STATES = HERE / "agent_states.npz"


def make_shard(job):
    """A few hundred frames of one source, the same for the same job in any process."""
    source, index, count, seed, held_out = job
    rng = np.random.default_rng([seed, index, list(SOURCES).index(source), held_out])
    frames, labels, arm_labels, states = [], [], [], []
    if source in OTHERS:
        robot = _robot(source)
        studio = _studio(robot.xml)
        for _ in range(count):
            qpos, shares, camera = robot.sample(rng)
            label = np.zeros(len(ALL_POSTURES), np.float32)
            label[[ALL_POSTURES.index(s) for s in robot.states]] = shares
            frames.append(studio(rng, qpos, camera))
            labels.append(label), arm_labels.append(np.eye(len(ALL_ARMS), dtype=np.float32)[-1]), states.append(np.zeros(24, np.float32))
    else:
        h = _robot("humanoid")
        studio = _studio(h.xml)
        queue = []
        while len(frames) < count:
            if source == "posed":
                state = list(STATES)[(index * count + len(frames)) % len(STATES)]
                qpos = posed(h, rng, state, held_out)
                label, arms = h.label(qpos)
                if state not in ("falling", "tangle"):  # the table knows better than the rule, but for what noise may have undone
                    name = STATES[state][0]
                    if label[ALL_POSTURES.index(name)] < 0.15:
                        continue
                    label = 0.3 * label + 0.7 * np.eye(len(ALL_POSTURES), dtype=np.float32)[ALL_POSTURES.index(name)]
            elif source == "physics":
                queue = queue or rollout(h, rng, held_out)
                if not queue:
                    continue
                qpos = queue.pop()
                label, arms = h.label(qpos)
                # standing, where every episode of random actions starts, need not be kept so often
                if not held_out and rng.random() < 0.4 * label[ALL_POSTURES.index("standing")]:
                    continue
            elif source == "agent":
                qpos = _agent_states("qpos")[rng.integers(len(_agent_states("qpos")))].astype(np.float64)
                label, arms = h.label(qpos)
            elif source == "sac":
                states_visited = _agent_states("qpos_sac")
                qpos = states_visited[(index * 250 + len(frames)) % len(states_visited)].astype(np.float64)
                if index * 250 >= len(states_visited):  # the second time round a little off, to both sides of each boundary
                    qpos[2] += rng.normal(0, 0.03)
                    qpos[7:] += np.deg2rad(rng.normal(0, 4, len(qpos) - 7))
                label, arms = h.label(qpos, knee=0.115, upright=0.73)  # on the safe side of what counts as kneeling
            else:
                qpos, label, arms = between(h, rng, held_out)
            camera = random_camera(rng, qpos)
            if source == "sac" and rng.random() < 0.75:
                camera = {}
            frames.append(studio(rng, qpos, camera))
            labels.append(label), arm_labels.append(arms), states.append(qpos)
    return np.stack(frames), np.stack(labels), np.stack(arm_labels), np.array(states, np.float32), source


@functools.cache
def _robot(name):
    return Humanoid() if name == "humanoid" else Other(name)


@functools.cache
def _studio(xml):
    return Studio(xml)


@functools.cache
def _agent_states(key):
    return np.load(AGENT_STATES)[key]


def make_data(seed, held_out, scale=1.0, sources=SOURCES):
    """All frames with their labels, from two processes that are forked before this one opens OpenGL."""
    jobs = []
    for source, counts in sources.items():
        total = int(counts[held_out] * scale) if source != "agent" or AGENT_STATES.exists() else 0
        jobs += [(source, i, min(250, total - 250 * i), seed, held_out) for i in range(-(-total // 250))]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        parts = list(pool.imap(make_shard, jobs))
    return {"frames": np.concatenate([p[0] for p in parts]), "postures": np.concatenate([p[1] for p in parts]),
        "arms": np.concatenate([p[2] for p in parts]),
            "qpos": np.concatenate([p[3] for p in parts]), "source": np.concatenate([np.full(len(p[0]), p[4]) for p in parts])}


# ---------------------------------------------------------------- captions

CHOICE = re.compile(r"\(([^()]*)\)")
CANONICAL = {  # the wording of VLM-RM's prompts, and of the states that it does not name
    "standing": "standing up", "arms raised": "standing up, with both arms raised", "hands on hips": "standing up with hands on hips",
        "arms crossed": "standing up, with its arms crossed", "kneeling": "kneeling", "one knee": "on one knee",
    "splits": "practicing gymnastics, doing the side splits", "lotus": "seated down, meditating in the lotus position",
        "sitting": "sitting on the floor", "back": "lying on its back", "front": "lying face down", "side": "lying on its side",
    "crawling": "crawling", "squatting": "squatting", "one leg": "standing up on one leg", "mid-air": "in mid-air", "falling": "falling",
        "tangle": "in a tangle",
    "pole upright": "pole vertically upright on top of the cart", "pole leaning": "pole leaning to one side on top of the cart",
        "pole fallen": "pole fallen down beside the cart", "cheetah upright": "a half cheetah standing on its feet",
    "cheetah on its back": "a half cheetah on its back", "ant upright": "an ant robot standing on its feet",
        "ant on its back": "an ant robot on its back",
}
PROMPTS = {state: words if state in OTHER_STATES else f"a humanoid robot {words}" for state, words in CANONICAL.items()}
BARE = {"humanoid": "a humanoid robot"} | {name: captions[0] for name, (_, captions, _) in OTHERS.items()}
ROBOT_OF_POSTURE = ["humanoid"] * len(POSTURES) + [name for name, (_, _, states) in OTHERS.items() for _ in states]


def say(rng, pattern):
    """One wording of a pattern."""
    while match := CHOICE.search(pattern):
        choices = match[1].split("|")
        pattern = pattern[: match.start()] + choices[rng.integers(len(choices))] + pattern[match.end() :]
    return " ".join(pattern.split()).replace(" ,", ",")


def pick(rng, table):
    return table[rng.integers(len(table))]


class Query:
    """What a caption names: how much each posture and each arm position matches it, and how much it says."""

    def __init__(self, robot, posture=None, arms=None):
        self.state = None  # the class that the caption names
        if posture is None:
            self.postures = np.array([float(name == robot) for name in ROBOT_OF_POSTURE], np.float32)
        else:
            self.postures = np.eye(len(ALL_POSTURES), dtype=np.float32)[ALL_POSTURES.index(posture)]
            named = next((s for s, pair in STATES.items() if pair == (posture, arms)), posture)
            self.state = ALL_STATES.index(named)
        self.arms = np.ones(len(ALL_ARMS), np.float32)
        if arms is not None:
            self.arms = np.eye(len(ALL_ARMS), dtype=np.float32)[ALL_ARMS.index(arms)]
        elif posture == "standing":  # true of those too, but there are better words for them
            self.arms = np.array([0.6 if a in ("raised", "hips", "crossed") else 1.0 for a in ALL_ARMS], np.float32)
        self.weight = (0.3 if posture is None and arms is None else 0.7 if posture is None else 1.0 if arms is None else 2.0)


@functools.cache
def query(robot, posture=None, arms=None):
    return Query(robot, posture, arms)


def caption(rng, postures, arms):
    """A random caption that is true of a frame with these shares of postures and arms, and its Query."""
    posture = ALL_POSTURES[rng.choice(len(postures), p=postures)]
    robot = ROBOT_OF_POSTURE[ALL_POSTURES.index(posture)]
    if rng.random() < 0.1:
        if robot == "humanoid":
            return (BARE[robot] if rng.random() < 0.6 else say(rng, pick(rng, SUBJECTS[:-1]))), query(robot)
        return (BARE[robot] if rng.random() < 0.5 else say(rng, pick(rng, OTHERS[robot][1]))), query(robot)
    if robot != "humanoid":
        _, subjects, states = OTHERS[robot]
        words = say(rng, pick(rng, states[posture]).replace("{s}", pick(rng, subjects)))
        words = PROMPTS[posture] if rng.random() < 0.2 else words
        return (say(rng, pick(rng, TEMPLATES).replace("{}", words)) if rng.random() < 0.5 else words), query(robot, posture)
    arm = ALL_ARMS[rng.choice(len(arms), p=arms)]
    distinct = posture == "standing" and arm in ("raised", "hips", "crossed")
    named_arms = arm if rng.random() < (0.6 if distinct else 0.05 if arm == "other" else 0.3) else None
    state = ALL_STATES[query("humanoid", posture, named_arms).state]
    if rng.random() < 0.2 and STATES[state] in ((posture, named_arms), (posture, None)) and (named_arms is None or state != posture):
        return PROMPTS[state], query("humanoid", posture, named_arms)
    if rng.random() < (0.35 if distinct or arm == "raised" else 0.03 if arm == "other" else 0.1):
        subject = pick(rng, SUBJECTS) if rng.random() < 0.7 else ""
        return say(rng, pick(rng, TEMPLATES).replace("{}", f"{subject} {pick(rng, ARMS[arm])}")), query("humanoid", None, arm)
    phrases, verbs, adjectives = POSTURES[posture]
    subject, kind = pick(rng, SUBJECTS), rng.random()
    if kind < 0.6:
        words = pick(rng, LINKS).replace("{s}", subject).replace("{p}", pick(rng, phrases))
    elif kind < 0.83:
        words = f"{subject} {pick(rng, verbs)}"
    else:
        words = f"(a|the|one|) {pick(rng, adjectives)} (humanoid robot|robot|robot|android|humanoid|machine|figure|person|mechanical person)"
    if named_arms:
        words = say(rng, words + pick(rng, [" ", ", ", " and ", ", "]) + pick(rng, ARMS[arm])) if rng.random() < 0.8 else say(rng,
            pick(rng, ARMS[arm]) + ", " + words)
    return say(rng, pick(rng, TEMPLATES).replace("{}", words)), query("humanoid", posture, named_arms)


def check_held_out():
    """The grammar can say none of the held-out wordings: no part of it, as a regular expression, covers one of them whole."""
    def regex(pattern):
        text = re.escape(pattern).replace(r"\(", "(").replace(r"\)", ")").replace(r"\|", "|").replace(r"\ ", " ")
        return text
    subjects = "(?:" + "|".join(regex(s) for s in SUBJECTS) + ")"
    heads = "(?:" + "|".join(regex(p) for ps, vs, _ in POSTURES.values() for p in ps + vs) + ")"
    arms = "(?:" + "|".join(regex(p) for ps in ARMS.values() for p in ps) + ")"
    links = [regex(link).replace(r"\{s\}", subjects).replace(r"\{p\}", heads) for link in LINKS]
    nouns = "(?:" + "|".join(regex(a) for _, _,
        adj in POSTURES.values() for a in adj) + ") (?:humanoid robot|robot|android|humanoid|machine|figure|person|mechanical person)"
    core = "(?:" + "|".join([*links, f"{subjects}? ?{heads}", f"(?:a |the |one |){nouns}", f"{subjects}? ?{arms}", subjects]) + ")"
    core = f"(?:{arms}, )?{core}(?:(?:,? | and ){arms})?"
    shells = [re.compile("^(?:" + regex(t).replace(r"\{\}", core).replace(" ", " *") + ")$") for t in dict.fromkeys(TEMPLATES)]
    said = [words for _, _, words in HELD_OUT if any(shell.match(words) for shell in shells)]
    assert not said, f"the grammar can say {said}"


# ---------------------------------------------------------------- training

MODEL = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
    },
    "preprocess_cfg": {"mean": [0.36, 0.41, 0.49], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic", "resize_mode": "shortest"},
}
TOKENIZER = open_clip.SimpleTokenizer(context_length=32)
CONTEXT = 32
NEVER_SAID = {"", *(words for _, _, words in HELD_OUT)}


@functools.lru_cache(100_000)
def word_tokens(word):
    return TOKENIZER.encode(word)


def tokenize(rng, text, bare):
    """As the model's tokenizer, with a share of words dropped or strange: words never seen must not mean anything."""
    words = text.split()
    if not bare and len(words) > 3 and rng.random() < 0.25:
        fewer = [w for w in words if rng.random() > 0.12]
        words = words if " ".join(fewer) in NEVER_SAID else fewer
    words = [word_tokens(w) for w in words]
    if not bare and rng.random() < 0.35:
        for _ in range(rng.integers(1, 4)):
            words.insert(rng.integers(len(words) + 1), [int(t) for t in rng.integers(256, 49000, rng.integers(1, 3))])
    tokens = [TOKENIZER.sot_token_id, *[t for w in words for t in w][: CONTEXT - 2], TOKENIZER.eot_token_id]
    return tokens + [0] * (CONTEXT - len(tokens))


def augment(frames, generator, shift=2):
    """uint8 [N, 3, H, W] to float in 0..1 with another brightness, contrast and noise, shifted by up to `shift` pixels, half of them mirrored."""
    images = frames.float().div_(255)
    n = len(images)
    draw = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)  # noqa: E731
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * draw(0.8, 1.2) + mean * draw(0.85, 1.15)
    images += torch.randn(images.shape, generator=generator) * draw(0, 0.03)
    images = F.pad(images, (shift,) * 4, mode="replicate")
    parts = []
    for part in images.split(16):
        dy, dx = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
        part = part[..., dy : dy + SIZE, dx : dx + SIZE]
        parts.append(part.flip(-1) if len(parts) % 2 else part)  # left and right are said, but never meant
    return torch.cat(parts)


def soft_cross_entropy(logits, targets):
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def train(args, second=False):
    """Trains from random weights on all data, or, the second time, from the weights in --out with SAC's states as half of each batch.

    A pixel is 3 cm, and what an agent that kneels gets wrong is a knee 5 cm above the floor: so the second round does not shift
    the frames, and three quarters of SAC's states are seen by the default camera alone, as they are in training. A state of SAC's
    is only labelled kneeling a little inside of the boundary, so that what is nearly kneeling does not pay as much.
    """
    started = time.time()
    check_held_out()
    if args.cache and args.cache.exists():
        data = dict(np.load(args.cache))
    else:
        data = make_data(args.seed, False, args.data_scale)
        if args.cache:
            np.savez(args.cache, **data)
    if second:
        more = make_data(args.seed, False, args.data_scale, SECOND_ROUND)
        data = {name: np.concatenate([data[name], more[name]]) for name in more}
    count = len(data["frames"])
    print(f"{count} frames in {time.time() - started:.0f} s")
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    frames = torch.from_numpy(data["frames"]).permute(0, 3, 1, 2).contiguous()
    postures, arms = data["postures"] / data["postures"].sum(1, keepdims=True), data["arms"] / data["arms"].sum(1, keepdims=True)
    postures64, arms64 = postures.astype(np.float64), arms.astype(np.float64)
    postures64 /= postures64.sum(1, keepdims=True)
    arms64 /= arms64.sum(1, keepdims=True)
    states = state_shares(postures, arms)

    model = open_clip.model.CLIP(**MODEL["model_cfg"])
    if second:
        first = load_file(str(args.out / "open_clip_model.safetensors"))
        model.load_state_dict(first)
    model.visual.to(memory_format=torch.channels_last)
    image_head, text_head = torch.nn.Linear(128, len(ALL_STATES)), torch.nn.Linear(128, len(ALL_STATES))
    if second:  # heads that know the states already do not disturb the towers
        with torch.no_grad():
            words = model.encode_text(TOKENIZER([PROMPTS[s] for s in ALL_STATES]), normalize=True)
            for head in (image_head, text_head):
                head.weight.copy_(words)
                head.bias.zero_()
    scale = torch.nn.Parameter(model.logit_scale.detach().clone() if second else torch.tensor(2.3))
    parameters = [*model.parameters(), *image_head.parameters(), *text_head.parameters(), scale]
    decay = [p for p in parameters if p.ndim >= 2 and p is not model.token_embedding.weight]
    keep = [p for p in parameters if p.ndim < 2 or p is model.token_embedding.weight]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": keep, "weight_decay": 0.0}], lr=args.lr,
        betas=(0.9, 0.98), fused=True)
    mean, std = (torch.tensor(MODEL["preprocess_cfg"][k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    per_epoch, trained = count // args.batch_size, time.time()
    step, total, losses = 0, args.second_steps if second else args.epochs * per_epoch, []
    peak = args.lr / 4 if second else args.lr
    model.train()
    while step < total:
        order = rng.permutation(count)
        if second:
            old, new = rng.permutation(np.flatnonzero(data["source"] != "sac")), rng.permutation(np.flatnonzero(data["source"] == "sac"))
            half = min(len(old), len(new)) // 64 * 64
            order = np.concatenate([old[:half].reshape(-1, 64), new[:half].reshape(-1, 64)], axis=1).ravel()
            per_epoch = len(order) // args.batch_size
        for batch in order[: per_epoch * args.batch_size].reshape(per_epoch, args.batch_size):
            progress = (time.time() - trained) / (60 * args.minutes) if args.minutes else step / total
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 200) * max(0.0, 0.5 * (1 + np.cos(np.pi * min(progress, 1.0))))
            captions = [caption(rng, postures64[i], arms64[i]) for i in batch]
            queries = [q for _, q in captions]
            tokens = torch.tensor([tokenize(rng, text, q.weight < 0.5) for text, q in captions])
            # how true caption t is of image i: [images, captions]
            match = (postures[batch] @ np.stack([q.postures for q in queries]).T) * (arms[batch] @ np.stack([q.arms for q in queries]).T)
            match = torch.from_numpy(match.astype(np.float32)) + 1e-6
            images = (augment(frames[batch], generator, 0 if second else 2) - mean) / std
            image = F.normalize(model.visual(images.contiguous(memory_format=torch.channels_last)), dim=-1)
            text = F.normalize(model.encode_text(tokens), dim=-1)
            logits = scale.exp().clamp(max=20) * image @ text.T
            weighted = match * torch.tensor([q.weight for q in queries])
            loss = soft_cross_entropy(logits, weighted / weighted.sum(1, keepdim=True)) + soft_cross_entropy(logits.T,
                (match / match.sum(0, keepdim=True)).T)
            named = [i for i, q in enumerate(queries) if q.state is not None]
            loss_classes = soft_cross_entropy(10 * image_head(image), torch.from_numpy(states[batch]))
            loss_words = F.cross_entropy(10 * text_head(text[named]), torch.tensor([queries[i].state for i in named]))
            (loss / 2 + loss_classes + loss_words).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((loss.item() / 2, loss_classes.item(), loss_words.item()))
            step += 1
            if step % 100 == 0:
                print(f"step {step}/{total}, pairs, classes, words: {np.mean(losses[-100:], 0).round(3)}, scale {scale.exp().item():.1f}, {(time.time() - trained) / 60:.1f} min", flush=True)
            if step == total or args.minutes and progress >= 1:
                step = total
                break
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "open_clip_config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    model.logit_scale.data = scale.detach().clone()
    if second:
        # Robust fine-tuning (Wortsman et al. 2022, arXiv 2109.01903): the average forgets less of the first round.
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(first[name].float(), 1.0 - args.second_share)
    save_file({k: v.detach().half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        str(args.out / "open_clip_model.safetensors"))
    print(f"trained in {(time.time() - started) / 60:.1f} minutes, data included")


def state_shares(postures, arms):
    """Shares of ALL_STATES: standing is split by the arms."""
    shares = np.zeros((len(postures), len(ALL_STATES)), np.float32)
    standing = postures[:, ALL_POSTURES.index("standing")]
    for i, state in enumerate(ALL_STATES):
        posture, arm = STATES.get(state, (state, None))
        shares[:, i] = standing * arms[:, ALL_ARMS.index(arm)] if arm else postures[:, ALL_POSTURES.index(posture)]
    index = ALL_STATES.index("standing")
    shares[:, index] -= sum(shares[:, ALL_STATES.index(s)] for s in ("arms raised", "hands on hips", "arms crossed"))
    return shares.clip(0)


# ---------------------------------------------------------------- scores


def roc_auc(scores, positive):
    """The chance that a positive ranks above a negative."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    p, n = positive.sum(), (~positive).sum()
    return (ranks[positive].sum() - p * (p + 1) / 2) / (p * n)


def truth(data, posture, arms):
    """Which frames a caption is true of: the larger share of the state."""
    named = np.ones(len(data["postures"]), bool)
    if posture:
        named &= data["postures"][:, ALL_POSTURES.index(posture)] > 0.5
    if arms:
        named &= (data["arms"][:, ALL_ARMS.index(arms)] > 0.5) & (np.array(ROBOT_OF_POSTURE)[data["postures"].argmax(1)] == "humanoid")
    return named


def evaluate(args):
    """Prints the scores of the model in args.out and whether each reaches its bar."""
    data = make_data(args.seed + 1000, True)
    torch.set_num_threads(2)
    clip = CLIP(f"local-dir:{args.out}", None, "cpu", batch_size=64)
    images = clip.encode_images(data["frames"])
    labels = state_shares(data["postures"], data["arms"])
    state_text = clip.encode_text([PROMPTS[s] for s in ALL_STATES])
    guess = (images @ state_text.T).argmax(1).numpy()
    rows, missed = [], 0

    def row(name, value, bar=None):
        nonlocal missed
        missed += bar is not None and value < bar
        rows.append((name, value, bar))
        print(f"  {name:62s} {value:9.3f}" + (f"   bar {bar:g} {'ok' if value >= bar else 'MISSED'}" if bar is not None else ""))

    source = data["source"]
    humanoid, physics, robots = np.isin(source, ["posed", "physics"]), source == "physics", ~np.isin(source, ["posed", "physics"])
    clear = labels.max(1) > 0.6
    right = guess == labels.argmax(1)
    print("accuracy over all states, held-out frames")
    row("posed", right[source == "posed"].mean(), 0.95)
    row(f"physics, frames in one state ({clear[physics].mean():.0%} of all)", right[physics & clear].mean(), 0.85)
    row("physics, all frames, also between states", right[physics].mean())
    row("other robots", right[robots & clear].mean())
    print("ROC-AUC of the reward, physics frames")
    baseline = clip.encode_text(["a humanoid robot"])[0]
    for state in ("kneeling", "standing", "arms raised", "splits", "back", "front", "lotus", "crawling", "squatting", "sitting", "one leg",
        "hands on hips", "mid-air"):
        goal = clip.encode_text([PROMPTS[state]])
        positive = truth(data, *STATES[state])[physics]
        for alpha in (0.0, 0.5):
            reward = regularized_reward(images[physics], goal, baseline, alpha)[:, 0].numpy()
            row(f"{PROMPTS[state]} (alpha {alpha}, {positive.sum()} frames)", roc_auc(reward, positive),
                0.97 if state in ("kneeling", "standing", "arms raised", "splits", "back", "front") else None)
    print("ROC-AUC of wording that the grammar cannot produce, humanoid frames")
    scores = []
    for posture, arms, words in HELD_OUT:
        cosine = (images[humanoid] @ clip.encode_text([words])[0]).numpy()
        scores.append(roc_auc(cosine, truth(data, posture, arms)[humanoid]))
        row(f'"{words}"'[:62], scores[-1])
    row(f"wordings of {len(HELD_OUT)} with at least 0.9", sum(s >= 0.9 for s in scores), 25)
    print("rank correlation of the reward with the way travelled, default camera")
    h = _robot("humanoid")
    studio = SceneRenderer(h.xml, (SIZE, SIZE), **DEFAULT_CAMERA, restyle=True)
    for way in PATHS[:10]:
        shares = np.linspace(0, 1, 41)
        frames = np.stack([studio(path_state(h, *way, share)) for share in shares])
        reward = regularized_reward(clip.encode_images(frames), clip.encode_text([PROMPTS[way[3]]]), baseline, 0.0)[:, 0].numpy()
        ranks = np.argsort(np.argsort(reward))
        row(f"{way[0]} to {way[3]} ({reward[0]:.2f}, {reward[10]:.2f}, {reward[20]:.2f}, {reward[30]:.2f}, {reward[40]:.2f})",
            np.corrcoef(ranks, shares)[0, 1])
    print("speed")
    clip.encode_images(data["frames"][:256])
    start = time.time()
    clip.encode_images(data["frames"][:2048])
    row("frames/s encoded, float32, batch 64, 2 threads", 2048 / (time.time() - start), 800)
    row("megabytes of weights", (args.out / "open_clip_model.safetensors").stat().st_size / 1e6)
    print("all bars reached" if not missed else f"{missed} bars missed")
    return missed


def contact_sheets(args):
    """Pictures of training frames with captions, and of the held-out frames that the model gets wrong."""
    args.contact_sheet.mkdir(parents=True, exist_ok=True)

    def sheet(name, frames, lines):
        picture = Image.new("RGB", (8 * 200, -(-len(frames) // 8) * 140), "white")
        draw = ImageDraw.Draw(picture)
        for i, (frame, text) in enumerate(zip(frames, lines)):
            x, y = i % 8 * 200, i // 8 * 140
            picture.paste(Image.fromarray(frame), (x + 4, y + 4))
            for j in range(0, min(len(text), 99), 33):
                draw.text((x + 4, y + 102 + j // 33 * 11), text[j : j + 33], fill="black")
        picture.save(args.contact_sheet / f"{name}.png")

    rng = np.random.default_rng(args.seed)
    data = make_data(args.seed, False, 0.02)
    for source in np.unique(data["source"]):
        index = rng.permutation(np.flatnonzero(data["source"] == source))[:56]
        words = [caption(rng, *(v[i].astype(np.float64) / v[i].astype(np.float64).sum() for v in (data["postures"],
            data["arms"])))[0] for i in index]
        sheet(source, data["frames"][index], words)
    data = make_data(args.seed + 1000, True)
    clip = CLIP(f"local-dir:{args.out}", None, "cpu")
    labels = state_shares(data["postures"], data["arms"])
    chances = (20 * clip.encode_images(data["frames"]) @ clip.encode_text([PROMPTS[s] for s in ALL_STATES]).T).softmax(1).numpy()
    worst = np.argsort(chances[np.arange(len(labels)), labels.argmax(1)] + (labels.max(1) < 0.6))[:112]
    sheet("mistakes", data["frames"][worst],
        [f"{data['source'][i]}: is {ALL_STATES[labels[i].argmax()]} {labels[i].max():.1f}, taken for {ALL_STATES[chances[i].argmax()]}" for i in worst])


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.contact_sheet:
        contact_sheets(args)
    else:
        if not args.eval_only:
            if not args.second_round_only:
                train(args)
            if args.second_round:
                train(args, second=True)
        sys.exit(1 if evaluate(args) else 0)
