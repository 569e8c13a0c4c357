"""Trains the embedded CLIP: a small open_clip model that knows renders of a few robots and the words for their poses.

Everything is made here from nothing: robots.py poses, simulates and renders robots, a grammar captions the frames, and
a standard open_clip model is trained on the pairs. The words are in vocabulary.toml, the poses in poses.toml, the size
of the model in open_clip_config.json.

    python tests/tiny_clip/train.py                        # data, weights and scores; the seed repeats it
    python tests/tiny_clip/train.py --eval-only            # the scores of the committed weights, against their bars
    python tests/tiny_clip/train.py --contact-sheet sheets # pictures of the data and of the worst mistakes
"""

import functools
import json
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
    HERE,
    MODEL,
    PROMPTS,
    ROBOT_OF_POSTURE,
    SIZE,
    STATES,
    TABLES,
    WORDS,
    make_data,
    one_hot,
    open_robot,
    pick,
    way_state,
)
from safetensors.torch import load_file, save_file

from sac_vlmrm import CLIP, find_clip, regularized_reward

BATCH = 128  # pairs of a frame and a caption
LEARNING_RATE = 2e-3  # the highest: warmed up, then a cosine to zero
SECOND_SHARE = 0.8  # of the second round's weights in their average with the first's, which is what is saved
CONTEXT = MODEL["model_cfg"]["text_cfg"]["context_length"]


@dataclass
class Args:
    out: Path = HERE
    """the folder of the model"""
    seed: int = 1
    """seed of the data, of the weights' start and of the order of training"""
    rounds: tuple[int, ...] = (1, 2)
    """1 starts from random weights, 2 goes on from those in --out, with states that SAC agents visited"""
    epochs: int = 6
    """passes over the data, in the first round"""
    second_steps: int = 1500
    """batches, in the second round"""
    data_scale: float = 1.0
    """share of the default amount of data"""
    eval_only: bool = False
    """print the scores of the model in --out; exit status 1 if one misses its bar"""
    contact_sheet: Path | None = None
    """write pictures of the data and of the model's worst mistakes into this folder, and stop"""


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
    state = ALL_STATES[named.state]
    if rng.random() < 0.2 and STATES[state] == (posture, named_arm):
        return PROMPTS[state], named
    if rng.random() < alone:
        named = query(robot, None, arm)
        subject = pick(rng, WORDS.subjects) if rng.random() < 0.7 else ""
        template = pick(rng, WORDS.templates)
        pattern = f"{subject} {pick(rng, WORDS.arms[arm])}"
    else:
        pattern = caption_of_posture(rng, posture, named_arm)
        template = pick(rng, WORDS.templates)
    return say(rng, template.replace("{}", pattern)), named


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


def augment(frames, generator, shift):
    """uint8 [N, 3, H, W] to float in 0..1 with another brightness, contrast and noise, half of them mirrored.

    They are shifted by up to `shift` pixels.
    """
    images = frames.float().div_(255)

    def draw(low, high):
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)

    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * draw(0.8, 1.2) + mean * draw(0.85, 1.15)
    images += torch.randn(images.shape, generator=generator) * draw(0, 0.03)
    parts = []
    for part in F.pad(images, (shift,) * 4, mode="replicate").split(16):
        y, x = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
        part = part[..., y : y + SIZE, x : x + SIZE]
        parts.append(part.flip(-1) if len(parts) % 2 else part)  # left and right are said, but never meant
    return torch.cat(parts)


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


def batches(rng, source, second):
    """One pass over the data in random order: indices [batches, BATCH]. In the second round half of each is SAC's."""
    order = rng.permutation(len(source))  # drawn in the second round too: the committed weights come of these numbers
    if second:
        half = BATCH // 2
        old = rng.permutation(np.flatnonzero(source != "sac"))
        new = rng.permutation(np.flatnonzero(source == "sac"))
        count = min(len(old), len(new)) // half * half
        order = np.concatenate([old[:count].reshape(-1, half), new[:count].reshape(-1, half)], axis=1).ravel()
    return order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)


def soft_cross_entropy(logits, targets):
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


class Learner:
    """The model, with a head for each tower that names the states, and the scale of the logits."""

    def __init__(self, weights):
        """`weights` are those to go on from, or None."""
        self.model = open_clip.model.CLIP(**MODEL["model_cfg"])
        if weights:
            self.model.load_state_dict(weights)
        self.model.visual.to(memory_format=torch.channels_last)
        width = MODEL["model_cfg"]["embed_dim"]
        self.image_head = torch.nn.Linear(width, len(ALL_STATES))
        self.text_head = torch.nn.Linear(width, len(ALL_STATES))
        self.scale = torch.nn.Parameter(torch.tensor(2.3))
        if weights:
            self.scale.data = self.model.logit_scale.detach().clone()
            # Heads that know the states already do not disturb the towers.
            with torch.no_grad():
                words = self.model.encode_text(TOKENIZER([PROMPTS[state] for state in ALL_STATES]), normalize=True)
                for head in (self.image_head, self.text_head):
                    head.weight.copy_(words)
                    head.bias.zero_()
        self.parameters = [*self.model.parameters(), *self.image_head.parameters(), *self.text_head.parameters()]
        self.parameters.append(self.scale)

    def optimizer(self):
        words = self.model.token_embedding.weight
        decay = [p for p in self.parameters if p.ndim >= 2 and p is not words]
        keep = [p for p in self.parameters if p.ndim < 2 or p is words]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": keep, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def losses(self, images, tokens, queries, match, states):
        """CLIP's with soft targets, and the cross-entropy over the states of the images and of the captions.

        match [images, captions] is how true a caption is of an image.
        """
        image = F.normalize(self.model.visual(images.contiguous(memory_format=torch.channels_last)), dim=-1)
        text = F.normalize(self.model.encode_text(tokens), dim=-1)
        logits = self.scale.exp().clamp(max=20) * image @ text.T
        weighted = match * torch.tensor([query.weight for query in queries])
        of_images = soft_cross_entropy(logits, weighted / weighted.sum(1, keepdim=True))
        of_captions = soft_cross_entropy(logits.T, (match / match.sum(0, keepdim=True)).T)
        named = [i for i, query in enumerate(queries) if query.state is not None]
        classes = soft_cross_entropy(10 * self.image_head(image), states)
        words = F.cross_entropy(10 * self.text_head(text[named]), torch.tensor([queries[i].state for i in named]))
        return (of_images + of_captions) / 2, classes, words


def save(model, folder, first):
    """Writes a standard open_clip model, after the second round its average with the first's weights."""
    weights = model.state_dict()
    for name, value in weights.items():
        if value.is_floating_point():
            # Robust fine-tuning (Wortsman et al. 2022, arXiv 2109.01903): the average forgets less of the first round.
            if first:
                value.lerp_(first[name].float(), 1.0 - SECOND_SHARE)
            weights[name] = value.half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    save_file(weights, str(folder / "open_clip_model.safetensors"))


def train(args, second):
    """Trains from random weights on all data; the second time from those in --out, half of each batch SAC's states.

    A pixel is 3 cm, and what an agent that kneels gets wrong is a knee 5 cm above the floor: so the second round does
    not shift the frames, and three quarters of SAC's states are seen by the default camera alone, as they are in
    training. A state of SAC's is only labelled kneeling a little inside of the boundary, so that what is nearly
    kneeling does not pay as much.
    """
    started = time.time()
    check_held_out()
    data = make_data(args.seed, "training", args.data_scale)
    if second:
        more = make_data(args.seed, "second_round", args.data_scale)
        data = {name: np.concatenate([data[name], more[name]]) for name in more}
    count = len(data["frames"])
    print(f"{count} frames in {time.time() - started:.0f} s")
    frames = torch.from_numpy(data["frames"]).permute(0, 3, 1, 2).contiguous()
    postures = normalized(data["postures"])
    arms = normalized(data["arms"])
    states = state_shares(postures, arms)
    # rng.choice wants chances whose sum is 1 in float64
    posture_chances = normalized(postures.astype(np.float64))
    arm_chances = normalized(arms.astype(np.float64))
    mean = torch.tensor(MODEL["preprocess_cfg"]["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(MODEL["preprocess_cfg"]["std"]).view(1, 3, 1, 1)

    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    first = load_file(str(args.out / "open_clip_model.safetensors")) if second else None
    learner = Learner(first)
    learner.model.train()
    optimizer = learner.optimizer()
    peak = LEARNING_RATE / 4 if second else LEARNING_RATE
    total = args.second_steps if second else args.epochs * (count // BATCH)
    log = []
    trained = time.time()
    while len(log) < total:
        for batch in batches(rng, data["source"], second)[: total - len(log)]:
            captions = [caption(rng, posture_chances[i], arm_chances[i]) for i in batch]
            queries = [query for _, query in captions]
            tokens = torch.tensor([tokenize(rng, text, query.weight < 0.5) for text, query in captions])
            match = postures[batch] @ np.stack([query.postures for query in queries]).T
            match *= arms[batch] @ np.stack([query.arms for query in queries]).T
            match = torch.from_numpy(match) + 1e-6
            images = (augment(frames[batch], generator, 0 if second else 2) - mean) / std
            losses = learner.losses(images, tokens, queries, match, torch.from_numpy(states[batch]))
            for group in optimizer.param_groups:
                step = len(log)
                group["lr"] = peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + np.cos(np.pi * step / total))
            sum(losses).backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.append([loss.item() for loss in losses])
            if len(log) % 100 == 0:
                means = np.mean(log[-100:], 0).round(3)
                scale = learner.scale.exp().item()
                minutes = (time.time() - trained) / 60
                done = f"step {len(log)}/{total}, pairs, classes, words: {means}"
                print(f"{done}, scale {scale:.1f}, {minutes:.1f} min", flush=True)
    learner.model.logit_scale.data = learner.scale.detach().clone()
    save(learner.model, args.out, first)
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


def truth(data, posture, arms):
    """Which frames a caption is true of: the larger share of the state."""
    named = np.ones(len(data["postures"]), bool)
    if posture:
        named &= data["postures"][:, ALL_POSTURES.index(posture)] > 0.5
    if arms:
        robots = np.array(ROBOT_OF_POSTURE)[data["postures"].argmax(1)]
        named &= (data["arms"][:, ALL_ARMS.index(arms)] > 0.5) & (robots == "humanoid")
    return named


def evaluate(args):
    """Prints the scores of the model in args.out; returns how many miss their bar."""
    data = make_data(args.seed + 1000, "held_out")
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
    right = guess == labels.argmax(1)
    clear = labels.max(1) > 0.6
    physics = data["source"] == "physics"
    posed_frames = data["source"] == "posed"
    humanoid = physics | posed_frames
    print("accuracy over all states, held-out frames")
    row("posed", right[posed_frames].mean(), 0.95)
    row(f"physics, frames in one state ({clear[physics].mean():.0%} of all)", right[physics & clear].mean(), 0.85)
    row("physics, all frames, also between states", right[physics].mean())
    row("other robots", right[~humanoid & clear].mean())

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
        ranks = np.argsort(np.argsort(reward))
        rewards = ", ".join(f"{value:.2f}" for value in reward[::10])
        row(f"{way[0]} to {way[3]} ({rewards})", np.corrcoef(ranks, shares)[0, 1])

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


def contact_sheets(args):
    """Pictures of training frames with captions, and of the held-out frames that the model gets wrong."""
    args.contact_sheet.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    data = make_data(args.seed, "training", 0.02)
    postures = normalized(data["postures"].astype(np.float64))
    arms = normalized(data["arms"].astype(np.float64))
    for source in np.unique(data["source"]):
        chosen = rng.permutation(np.flatnonzero(data["source"] == source))[:56]
        lines = [caption(rng, postures[i], arms[i])[0] for i in chosen]
        save_sheet(args.contact_sheet / f"{source}.png", data["frames"][chosen], lines)

    data = make_data(args.seed + 1000, "held_out")
    clip = load_clip(args)
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
    if args.contact_sheet:
        contact_sheets(args)
        sys.exit()
    if not args.eval_only:
        for number in args.rounds:
            train(args, second=number == 2)
    sys.exit(1 if evaluate(args) else 0)
