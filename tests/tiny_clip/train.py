"""Trains the embedded CLIP: a small open_clip model that knows renders of a few robots and the words for their poses.

Everything is made here from nothing: robots.py poses, simulates and renders robots, a grammar captions the frames, and
a standard open_clip model is trained on the pairs. Ten sentences, those of VLM-RM's eight tasks among them, have a
graded target besides: the cosine of a frame with such a sentence is to fall with the state's distance from the pose.
The words are in vocabulary.toml, the poses in poses.toml, the size of the model in open_clip_config.json.

    python tests/tiny_clip/train.py                        # data, weights and scores; the seed repeats it
    python tests/tiny_clip/train.py --eval-only            # the scores of the committed weights, against their bars
    python tests/tiny_clip/train.py --contact-sheet sheets # pictures of the data, the mistakes, what is paid too much
"""

import functools
import itertools
import json
import multiprocessing
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw
from robots import (
    ALL_ARMS,
    ALL_POSTURES,
    ALL_STATES,
    COLUMNS,
    GRADED,
    HERE,
    MODEL,
    PROMPTS,
    ROBOT_OF_POSTURE,
    SIZE,
    STATES,
    TABLES,
    WORDS,
    make_data,
    mutate,
    one_hot,
    open_robot,
    pick,
    way_state,
)
from safetensors.torch import save_file

from sac_vlmrm import CLIP, find_clip, regularized_reward

BATCH = 128  # pairs of a frame and a caption
LEARNING_RATE = 2e-3  # the highest: warmed up, then a cosine to zero
HIGHEST = 0.65  # the cosine of a frame with a graded sentence that it fits entirely; with a score of 0 it is 0
GRADED_WEIGHT = 30.0  # of the squared error of those cosines, beside the other losses
SEARCHES = (0.3, 0.42, 0.54, 0.66, 0.76, 0.86)  # of the training, when a search looks for what is overpaid
OVERPAID = 0.08  # by more than this, in cosine, and the state is trained on
MET = 0.62  # no state outside of a criterion has a higher score, and none inside a lower one
CONTEXT = MODEL["model_cfg"]["text_cfg"]["context_length"]
# The state whose sentence is true of a state as well, or the state itself: hands on the hips, and it stands.
GENERAL = dict.fromkeys(TABLES.standing_arms, "standing") | {"lotus": "sitting"}
GENERAL = np.array([ALL_STATES.index(GENERAL.get(state, state)) for state in ALL_STATES])


@dataclass
class Args:
    out: Path = HERE
    """the folder of the model"""
    seed: int = 1
    """seed of the data, of the weights' start and of the order of training"""
    steps: int = 4500
    """batches of the training"""
    data_scale: float = 1.0
    """share of the default amount of data"""
    eval_only: bool = False
    """print the scores of the model in --out; exit status 1 if one misses its bar"""
    contact_sheet: Path | None = None
    """write pictures of the data, of mistakes and of what is paid too much into this folder, and stop"""


# ---------------------------------------------------------------- captions

CHOICE = re.compile(r"\(([^()]*)\)")
# How often arms are named with the posture, and else without it, where it is not the usual.
ARMS_NAMED = {"other": (0.05, 0.03), "raised": (0.3, 0.35)}


def say(rng, pattern):
    """One wording of a pattern."""
    while match := CHOICE.search(pattern):
        choice = pick(rng, match[1].split("|"))
        pattern = pattern[: match.start()] + choice + pattern[match.end() :]
    return " ".join(pattern.split()).replace(" ,", ",")


class Query:
    """What a caption names: how much each posture and each arm position matches it, and how much it says."""

    def __init__(self, robot, posture=None, arms=None):
        self.state = None  # the class that the caption names
        self.arms = np.ones(len(ALL_ARMS), np.float32)
        self.weight = 1.0
        if arms is not None:
            self.arms = one_hot(arms, ALL_ARMS)
            self.weight = 2.0
        elif posture == "standing":  # true of those too, but there are better words for them
            self.arms[[ALL_ARMS.index(arm) for arm in TABLES.standing_arms.values()]] = 0.6
        if posture is None:
            self.postures = np.array([name == robot for name in ROBOT_OF_POSTURE], np.float32)
            self.weight = 0.3 if arms is None else 0.7
        else:
            self.postures = one_hot(posture, ALL_POSTURES)
            named = [state for state, pair in STATES.items() if pair == (posture, arms)]
            if named or posture in ALL_STATES:  # what is between two states is no class
                self.state = ALL_STATES.index(named[0] if named else posture)


query = functools.cache(Query)


def caption_of_posture(rng, posture, arm):
    """A pattern that names a posture and, unless it is None, a position of the arms."""
    words = WORDS.postures[posture]
    subject = pick(rng, WORDS.subjects)
    kind = rng.random()
    if kind < 0.6:
        pattern = pick(rng, WORDS.links).replace("{s}", subject).replace("{p}", pick(rng, words["phrases"]))
    elif kind < 0.83:
        pattern = f"{subject} {pick(rng, words['verbs'])}"
    else:
        pattern = f"(a|the|one|) {pick(rng, words['adjectives'])} {WORDS.nouns}"
    if arm is None:
        return pattern
    if rng.random() < 0.8:
        pattern += pick(rng, [" ", ", ", " and ", ", "]) + pick(rng, WORDS.arms[arm])
    else:
        pattern = f"{pick(rng, WORDS.arms[arm])}, {pattern}"
    return say(rng, pattern)


def caption(rng, postures, arms):
    """A random caption that is true of a frame with these shares of postures and arms, and its Query."""
    posture = ALL_POSTURES[rng.choice(len(postures), p=postures)]
    robot = ROBOT_OF_POSTURE[ALL_POSTURES.index(posture)]
    other = WORDS.others.get(robot)  # None: the humanoid
    if rng.random() < 0.1:  # no more than what robot it is
        names = other["names"] if other else WORDS.subjects[:-1]
        named_first = rng.random() < (0.5 if other else 0.6)
        return names[0] if named_first else say(rng, pick(rng, names)), query(robot)
    if other:
        words = say(rng, pick(rng, other["states"][posture]).replace("{s}", pick(rng, other["names"])))
        if rng.random() < 0.2:
            words = PROMPTS[posture]
        if rng.random() < 0.5:
            words = say(rng, pick(rng, WORDS.templates).replace("{}", words))
        return words, query(robot, posture)

    arm = ALL_ARMS[rng.choice(len(arms), p=arms)]
    with_posture, alone = ARMS_NAMED.get(arm, (0.3, 0.1))
    if posture == "standing" and arm in TABLES.standing_arms.values():
        with_posture = 0.6
        alone = 0.35
    named_arm = arm if rng.random() < with_posture else None
    named = query(robot, posture, named_arm)
    if rng.random() < 0.2 and named.state is not None and STATES[ALL_STATES[named.state]] == (posture, named_arm):
        return PROMPTS[ALL_STATES[named.state]], named
    if rng.random() < alone:
        named = query(robot, None, arm)
        subject = pick(rng, WORDS.subjects) if rng.random() < 0.7 else ""
        template = pick(rng, WORDS.templates)
        pattern = f"{subject} {pick(rng, WORDS.arms[arm])}"
    else:
        pattern = caption_of_posture(rng, posture, named_arm)
        template = pick(rng, WORDS.templates)
    return say(rng, template.replace("{}", pattern)), named


def graded_caption(rng, state):
    """A wording of a graded state; half the time its prompt."""
    if rng.random() < 0.5:
        return PROMPTS[state]
    return say(rng, pick(rng, WORDS.templates).replace("{}", caption_of_posture(rng, *STATES[state])))


def check_held_out():
    """The grammar can say none of the held-out wordings: no regular expression of all that it can say matches one."""

    def regex(pattern):
        return re.sub(r"\\([(|) ])", r"\1", re.escape(pattern))

    def one_of(patterns):
        return "(?:" + "|".join(patterns) + ")"

    postures = WORDS.postures.values()
    subjects = one_of(regex(subject) for subject in WORDS.subjects)
    heads = one_of(regex(words) for posture in postures for words in posture["phrases"] + posture["verbs"])
    adjectives = one_of(regex(words) for posture in postures for words in posture["adjectives"])
    arms = one_of(regex(words) for arm in WORDS.arms.values() for words in arm)
    links = [regex(link).replace(r"\{s\}", subjects).replace(r"\{p\}", heads) for link in WORDS.links]
    nouns = f"(?:a |the |one |){adjectives} {regex(WORDS.nouns)}"
    core = one_of([*links, f"{subjects}? ?{heads}", nouns, f"{subjects}? ?{arms}", subjects])
    core = f"(?:{arms}, )?{core}(?:(?:,? | and ){arms})?"
    for template in WORDS.templates:
        sentence = re.compile(regex(template).replace(r"\{\}", core).replace(" ", " *"))
        for _, _, words in WORDS.held_out:
            assert not sentence.fullmatch(words), f"the grammar can say {words!r}"


# ---------------------------------------------------------------- training

TOKENIZER = open_clip.SimpleTokenizer(context_length=CONTEXT)
NEVER_SAID = {"", *(words for _, _, words in WORDS.held_out)}


@functools.lru_cache(100_000)
def word_tokens(word):
    return TOKENIZER.encode(word)


def tokenize(rng, text, bare):
    """As the model's tokenizer, with a share of words dropped or strange: words never seen must not mean anything."""
    words = text.split()
    if not bare and len(words) > 3 and rng.random() < 0.25:
        fewer = [word for word in words if rng.random() > 0.12]
        if " ".join(fewer) not in NEVER_SAID:
            words = fewer
    words = [word_tokens(word) for word in words]
    if not bare and rng.random() < 0.35:
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(len(words) + 1)
            words.insert(place, rng.integers(256, 49000, rng.integers(1, 3)).tolist())
    tokens = [token for word in words for token in word][: CONTEXT - 2]
    tokens = [TOKENIZER.sot_token_id, *tokens, TOKENIZER.eot_token_id]
    return tokens + [0] * (CONTEXT - len(tokens))


def augment(frames, generator):
    """uint8 [N, H, W, 3] to float [N, 3, H, W] with another brightness, contrast and noise, half of them mirrored.

    They are not shifted: a pixel is 3 cm, and that is much for a knee just above the floor.
    """
    images = frames.permute(0, 3, 1, 2).float().div_(255)

    def draw(low, high):
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)

    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * draw(0.8, 1.2) + mean * draw(0.85, 1.15)
    images += torch.randn(images.shape, generator=generator) * draw(0, 0.03)
    half = len(images) // 2
    return torch.cat([images[:half], images[half:].flip(-1)])  # left and right are said, but never meant


def state_shares(postures, arms):
    """Shares of ALL_STATES: standing is split by the arms."""
    shares = np.zeros((len(postures), len(ALL_STATES)), np.float32)
    for i, state in enumerate(ALL_STATES):
        posture, arm = STATES.get(state, (state, None))
        shares[:, i] = postures[:, ALL_POSTURES.index(posture)]
        if arm is not None:
            shares[:, i] *= arms[:, ALL_ARMS.index(arm)]
    shares[:, ALL_STATES.index("standing")] -= sum(shares[:, ALL_STATES.index(s)] for s in TABLES.standing_arms)
    return shares.clip(0)


def normalized(shares):
    return shares / shares.sum(-1, keepdims=True)


def batches(rng, count):
    """Indices [BATCH] without end, one pass over the data after the other, each in random order."""
    while True:
        order = rng.permutation(count)
        yield from order[: count // BATCH * BATCH].reshape(-1, BATCH)


def soft_cross_entropy(logits, targets):
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


class Learner:
    """The model, with a head for each tower that names the states, and the scale of the logits."""

    def __init__(self):
        self.model = open_clip.model.CLIP(**MODEL["model_cfg"])
        self.model.visual.to(memory_format=torch.channels_last)
        width = MODEL["model_cfg"]["embed_dim"]
        self.image_head = torch.nn.Linear(width, len(ALL_STATES))
        self.text_head = torch.nn.Linear(width, len(ALL_STATES))
        self.scale = torch.nn.Parameter(torch.tensor(2.3))
        self.parameters = [*self.model.parameters(), *self.image_head.parameters(), *self.text_head.parameters()]
        self.parameters.append(self.scale)
        self.mean = torch.tensor(MODEL["preprocess_cfg"]["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(MODEL["preprocess_cfg"]["std"]).view(1, 3, 1, 1)

    def optimizer(self):
        words = self.model.token_embedding.weight
        decay = [p for p in self.parameters if p.ndim >= 2 and p is not words]
        keep = [p for p in self.parameters if p.ndim < 2 or p is words]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": keep, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def encode_images(self, images):
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.model.visual(images), dim=-1)

    def losses(self, images, tokens, queries, match, states, scores):
        """Of a batch; the captions of GRADED follow the frames' own in `tokens`.

        CLIP's with soft targets; the cross-entropies over the states of the images and of the captions; the squared
        error of the cosines with GRADED. match [images, captions] is how true a caption is of an image.
        """
        image = self.encode_images(images)
        text, graded = F.normalize(self.model.encode_text(tokens), dim=-1).split([len(queries), len(GRADED)])
        logits = self.scale.exp().clamp(max=20) * image @ text.T
        weighted = match * torch.tensor([query.weight for query in queries])
        of_images = soft_cross_entropy(logits, weighted / weighted.sum(1, keepdim=True))
        of_captions = soft_cross_entropy(logits.T, (match / match.sum(0, keepdim=True)).T)
        named = [i for i, query in enumerate(queries) if query.state is not None]
        classes = soft_cross_entropy(10 * self.image_head(image), states)
        words = F.cross_entropy(10 * self.text_head(text[named]), torch.tensor([queries[i].state for i in named]))
        cosines = F.mse_loss(image @ graded.T, HIGHEST * scores)
        return (of_images + of_captions) / 2, classes, words, GRADED_WEIGHT * cosines

    @torch.no_grad()
    def rewards(self, frames):
        """Cosines [N, GRADED] of uint8 frames with the graded states' prompts, by the model as it is."""
        self.model.eval()
        text = F.normalize(self.model.encode_text(TOKENIZER([PROMPTS[state] for state in GRADED])), dim=-1)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        rewards = torch.cat([self.encode_images(part.float() / 255) @ text.T for part in frames.split(BATCH)])
        self.model.train()
        return rewards.numpy()


def search(pool, rng, rewards_of, data, chosen, count=60, generations=24):
    """Mutated states that are paid more and more above their scores, as columns of `make_data`.

    For each of GRADED it climbs from `count` states: of the chosen frames a third are the most overpaid, a third the
    best paid outside of the criterion, and a third meet it. What an agent would exploit is among what it finds. Further
    columns are "goal", an index of GRADED, "rewards" [GRADED], and "too_much", what the goal's reward is overpaid by.
    """
    rewards, scores = rewards_of(data["frames"][chosen]), data["scores"][chosen]
    starts = []
    for i in range(len(GRADED)):
        overpaid = np.argsort(HIGHEST * scores[:, i] - rewards[:, i])
        outside = np.argsort(np.where(scores[:, i] < MET, -rewards[:, i], 1))
        inside = rng.permutation(np.flatnonzero(scores[:, i] > MET))
        starts.append(np.resize(np.concatenate([rows[: count // 3] for rows in (overpaid, outside, inside)]), count))
    starts = np.concatenate(starts)
    goals = np.repeat(np.arange(len(GRADED)), count)
    states = data["qpos"][chosen[starts]]
    highest = (rewards - HIGHEST * scores)[starts, goals]
    found = []
    for _ in range(generations):
        jobs = [(part, rng.integers(2**32)) for part in np.array_split(states, 16)]
        parts = pool.map(mutate, jobs, chunksize=1)
        children = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        children |= {"goal": goals, "rewards": rewards_of(children["frames"])}
        too_much = (children["rewards"] - HIGHEST * children["scores"])[np.arange(len(goals)), goals]
        states = np.where((too_much > highest)[:, None], children["qpos"], states)
        highest = np.maximum(too_much, highest)
        found.append(children | {"too_much": too_much})
    return {name: np.concatenate([children[name] for children in found]) for name in found[0]}


def most_overpaid(found, count=500):
    """Rows of what `search` has found: for each goal at most `count`."""
    rows = []
    for i in range(len(GRADED)):
        overpaid = np.flatnonzero((found["goal"] == i) & (found["too_much"] > OVERPAID))
        rows.append(overpaid[np.argsort(-found["too_much"][overpaid])][:count])
    return np.concatenate(rows)


def save(model, folder):
    """Writes a standard open_clip model in float16."""
    weights = model.state_dict()
    for name, value in weights.items():
        if value.is_floating_point():
            weights[name] = value.half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    save_file(weights, str(folder / "open_clip_model.safetensors"))


def train(args, pool):
    """From random weights; what the searches find takes the place of some of the mixed states."""
    started = time.time()
    check_held_out()
    data = make_data(pool, args.seed, "training", args.data_scale)
    count = len(data["frames"])
    print(f"{count} frames in {time.time() - started:.0f} s", flush=True)
    frames = torch.from_numpy(data["frames"])

    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    learner = Learner()
    learner.model.train()
    optimizer = learner.optimizer()
    humanoid = np.flatnonzero(data["qpos"].any(1))
    replaceable = np.flatnonzero(data["source"] == "mixed")
    log = []
    trained = time.time()
    for step, batch in enumerate(itertools.islice(batches(rng, count), args.steps)):
        if step in [int(share * args.steps) for share in SEARCHES]:
            begun = time.time()
            chosen = rng.choice(humanoid, min(8000, len(humanoid)), replace=False)
            found = search(pool, rng, learner.rewards, data, chosen)
            kept = most_overpaid(found)
            rows, replaceable = np.split(replaceable, [len(kept)])
            for name in COLUMNS:
                data[name][rows] = found[name][kept[: len(rows)]]
            print(f"searched in {time.time() - begun:.0f} s, {len(kept)} states are overpaid", flush=True)
        postures = normalized(data["postures"][batch].astype(np.float64))  # rng.choice wants a sum of 1 in float64
        arms = normalized(data["arms"][batch].astype(np.float64))
        captions = [caption(rng, *chances) for chances in zip(postures, arms, strict=True)]
        queries = [query for _, query in captions]
        tokens = [tokenize(rng, text, query.weight < 0.5) for text, query in captions]
        tokens += [tokenize(rng, graded_caption(rng, state), True) for state in GRADED]
        match = postures @ np.stack([query.postures for query in queries]).T
        match *= arms @ np.stack([query.arms for query in queries]).T
        match = torch.from_numpy(match.astype(np.float32)) + 1e-6
        states = torch.from_numpy(state_shares(postures, arms))
        images = augment(frames[batch], generator)
        scores = torch.from_numpy(data["scores"][batch])
        losses = learner.losses(images, torch.tensor(tokens), queries, match, states, scores)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 200) * 0.5 * (1 + np.cos(np.pi * step / args.steps))
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.append([loss.item() for loss in losses])
        if len(log) % 100 == 0:
            means = np.mean(log[-100:], 0).round(3)
            minutes = (time.time() - trained) / 60
            done = f"step {len(log)}/{args.steps}, pairs, classes, words, graded: {means}"
            print(f"{done}, scale {learner.scale.exp().item():.1f}, {minutes:.1f} min", flush=True)
    learner.model.logit_scale.data = learner.scale.detach().clone()
    save(learner.model, args.out)
    print(f"trained in {(time.time() - started) / 60:.1f} minutes, data included")


# ---------------------------------------------------------------- scores


def load_clip(args):
    return CLIP(find_clip(str(args.out)), "cpu", batch_size=64)


def roc_auc(scores, positive):
    """The chance that a positive ranks above a negative."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    p = positive.sum()
    n = (~positive).sum()
    return (ranks[positive].sum() - p * (p + 1) / 2) / (p * n)


def rank_correlation(a, b):
    """Spearman's; what is equal keeps its order, as in the scores' many zeros, which counts against it."""
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b, kind="stable")))[0, 1]


def truth(data, posture, arms):
    """Which frames a caption is true of: the larger share of the state."""
    named = np.ones(len(data["postures"]), bool)
    if posture:
        named &= data["postures"][:, ALL_POSTURES.index(posture)] > 0.5
    if arms:
        robots = np.array(ROBOT_OF_POSTURE)[data["postures"].argmax(1)]
        named &= (data["arms"][:, ALL_ARMS.index(arms)] > 0.5) & (robots == "humanoid")
    return named


def graded_rewards(clip, frames):
    """Cosines [N, GRADED] with the graded states' prompts."""
    text = clip.encode_text([PROMPTS[state] for state in GRADED])
    return (clip.encode_images(frames) @ text.T).numpy()


def top(values):
    """The mean of the highest tenth."""
    return np.sort(values)[-max(1, len(values) // 10) :].mean()


def evaluate(args, pool):
    """Prints the scores of the model in args.out; returns how many miss their bar."""
    data = make_data(pool, args.seed + 1000, "held_out")
    torch.set_num_threads(2)
    clip = load_clip(args)
    images = clip.encode_images(data["frames"])
    missed = []

    def row(name, value, bar=None):
        verdict = ""
        if bar is not None:
            verdict = f"   bar {bar:g} {'ok' if value >= bar else 'MISSED'}"
            if value < bar:
                missed.append(name)
        print(f"  {name:62s} {value:9.3f}{verdict}")

    labels = state_shares(data["postures"], data["arms"])
    guess = (images @ clip.encode_text([PROMPTS[state] for state in ALL_STATES]).T).argmax(1).numpy()
    exact = guess == labels.argmax(1)
    right = exact | (guess == GENERAL[labels.argmax(1)])
    clear = labels.max(1) > 0.6
    physics = data["source"] == "physics"
    posed_frames = data["source"] == "posed"
    humanoid = physics | posed_frames
    all_humanoid = np.flatnonzero(data["qpos"].any(1))
    others = ~data["qpos"].any(1)
    print("accuracy over all states, held-out frames")
    row("posed", right[posed_frames].mean(), 0.95)
    row("posed, the sentence that says most", exact[posed_frames].mean())
    row(f"physics, frames in one state ({clear[physics].mean():.0%} of all)", right[physics & clear].mean(), 0.85)
    row("physics, all frames, also between states", right[physics].mean())
    row("other robots", right[others & clear].mean())

    print("ROC-AUC of the reward, physics frames")
    baseline = clip.encode_text(["a humanoid robot"])[0]
    with_bar = ("kneeling", "standing", "arms raised", "splits", "back", "front")
    without_bar = ("lotus", "crawling", "squatting", "sitting", "one leg", "hands on hips", "mid-air")
    for state in with_bar + without_bar:
        goal = clip.encode_text([PROMPTS[state]])
        positive = truth(data, *STATES[state])[physics]
        for alpha in (0.0, 0.5):
            reward = regularized_reward(images[physics], goal, baseline, alpha)[:, 0].numpy()
            name = f"{PROMPTS[state]} (alpha {alpha}, {positive.sum()} frames)"
            row(name, roc_auc(reward, positive), 0.97 if state in with_bar else None)

    print("reward against the criteria of success, all of the humanoid's held-out frames, agents' among them")
    rewards = (images[all_humanoid] @ clip.encode_text([PROMPTS[state] for state in GRADED]).T).numpy()
    scores = data["scores"][all_humanoid]
    of_agents = data["source"][all_humanoid] == "agents"
    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(all_humanoid)[:4000]
    found = search(pool, rng, functools.partial(graded_rewards, clip), data, chosen)
    for i, state in enumerate(GRADED):
        reward, met = rewards[:, i], scores[:, i] > MET
        print(f" {state}: {met.sum()} frames meet the criterion, {met[of_agents].sum()} of them agents'")
        row("ROC-AUC", roc_auc(reward, met), 0.95 if state != "arms crossed" else None)
        if met[of_agents].sum() >= 20:
            row("ROC-AUC, agents' states alone", roc_auc(reward[of_agents], met[of_agents]))
        row("rank correlation with the graded score", rank_correlation(reward, scores[:, i]), 0.8)
        row("mean reward inside", reward[met].mean())
        row("mean reward inside less that of the best-paid tenth outside", reward[met].mean() - top(reward[~met]))
        outside = (found["goal"] == i) & (found["scores"][:, i] < MET)
        row("the same for the tenth that a search finds", reward[met].mean() - top(found["rewards"][outside, i]))

    print("ROC-AUC of wording that the grammar cannot produce, humanoid frames")
    good = 0
    for posture, arms, words in WORDS.held_out:
        cosine = (images[humanoid] @ clip.encode_text([words])[0]).numpy()
        auc = roc_auc(cosine, truth(data, posture, arms)[humanoid])
        good += int(auc >= 0.9)
        row(f'"{words}"'[:62], auc)
    row(f"wordings of {len(WORDS.held_out)} with at least 0.9", good, 25)

    print("rank correlation of the reward with the way travelled, default camera")
    h = open_robot("humanoid")
    shares = np.linspace(0, 1, 41)
    for way in TABLES.ways["scored"]:
        frames = np.stack([h.renderers[SIZE](way_state(h, way, share)) for share in shares])
        goal = clip.encode_text([PROMPTS[way[3]]])
        reward = regularized_reward(clip.encode_images(frames), goal, baseline, 0.0)[:, 0].numpy()
        some = ", ".join(f"{value:.2f}" for value in reward[::10])
        row(f"{way[0]} to {way[3]} ({some})", rank_correlation(reward, shares))

    print("speed")
    clip.encode_images(data["frames"][:256])
    start = time.time()
    clip.encode_images(data["frames"][:2048])
    row("frames/s encoded, float32, batch 64, 2 threads", 2048 / (time.time() - start), 800)
    row("megabytes of weights", (args.out / "open_clip_model.safetensors").stat().st_size / 1e6)
    print(f"{len(missed)} bars missed" if missed else "all bars reached")
    return len(missed)


def save_sheet(path, frames, lines):
    """A picture of frames in rows of eight, each above its line of text."""
    picture = Image.new("RGB", (8 * 200, (len(frames) + 7) // 8 * 140), "white")
    draw = ImageDraw.Draw(picture)
    for i, (frame, text) in enumerate(zip(frames, lines, strict=True)):
        x = i % 8 * 200 + 4
        y = i // 8 * 140 + 4
        picture.paste(Image.fromarray(frame), (x, y))
        for row in range(3):
            draw.text((x, y + 98 + 11 * row), text[33 * row : 33 * (row + 1)], fill="black")
    picture.save(path)


def contact_sheets(args, pool):
    """Pictures of training frames with captions, and of the held-out frames that the model gets wrong or overpays."""
    args.contact_sheet.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    data = make_data(pool, args.seed, "training", 0.02)
    postures = normalized(data["postures"].astype(np.float64))
    arms = normalized(data["arms"].astype(np.float64))
    for source in np.unique(data["source"]):
        chosen = rng.permutation(np.flatnonzero(data["source"] == source))[:56]
        lines = [caption(rng, postures[i], arms[i])[0] for i in chosen]
        save_sheet(args.contact_sheet / f"{source}.png", data["frames"][chosen], lines)

    data = make_data(pool, args.seed + 1000, "held_out")
    clip = load_clip(args)
    rewards_of = functools.partial(graded_rewards, clip)
    humanoid = np.flatnonzero(data["qpos"].any(1))
    found = search(pool, rng, rewards_of, data, humanoid)
    held_out = {name: data[name][humanoid] for name in COLUMNS} | {"rewards": rewards_of(data["frames"][humanoid])}
    for i, state in enumerate(GRADED):  # paid most outside of the criterion: held out, found; paid least inside
        shown, lines = [], []
        inside = held_out["scores"][:, i] > MET
        outside_found = (found["scores"][:, i] < MET) & (found["goal"] == i)
        rows = [("outside", held_out, ~inside, -1), ("found outside", found, outside_found, -1)]
        for kind, frames, wanted, sign in (*rows, ("inside", held_out, inside, 1)):
            wanted = np.flatnonzero(wanted)
            for k in wanted[np.argsort(sign * frames["rewards"][wanted, i])[:16]]:
                shown.append(frames["frames"][k])
                lines.append(f"{kind}: paid {frames['rewards'][k, i]:.2f}, score {frames['scores'][k, i]:.2f}")
        save_sheet(args.contact_sheet / f"paid-{state.replace(' ', '-')}.png", shown, lines)

    labels = state_shares(data["postures"], data["arms"])
    truths = labels.argmax(1)
    text = clip.encode_text([PROMPTS[state] for state in ALL_STATES])
    chances = (20 * clip.encode_images(data["frames"]) @ text.T).softmax(1).numpy()
    # the least likely true states first; frames between states come after all others
    worst = np.argsort(chances[np.arange(len(truths)), truths] + (labels.max(1) < 0.6))[:112]
    lines = []
    for i in worst:
        taken_for = ALL_STATES[chances[i].argmax()]
        lines.append(f"{data['source'][i]}: is {ALL_STATES[truths[i]]} {labels[i].max():.1f}, taken for {taken_for}")
    save_sheet(args.contact_sheet / "mistakes.png", data["frames"][worst], lines)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    with multiprocessing.get_context("fork").Pool(2) as pool:  # before torch has threads
        if args.contact_sheet:
            contact_sheets(args, pool)
            sys.exit()
        if not args.eval_only:
            train(args, pool)
        sys.exit(1 if evaluate(args, pool) else 0)
