"""Each script is whole in itself, so what several of them do the same way must be the same, to the byte."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
PAIRS = list(itertools.combinations(SCRIPTS, 2))

# What has the same name but is a script's own: its flags, its networks, its loop.
OWN = {"Args", "PRESETS", "ACTION_SPACES", "mlp", "train", "make_agent", "check_algorithm", "main"}
# Hyperparameters of each algorithm, and how many frames it needs.
OWN_FLAGS = {"learning_rate", "anneal_lr", "gamma", "ent_coef", "total_timesteps", "eval_every", "normalize_reward"}
OF_THE_EVALUATION = {"goal", "alpha", "clip", "clip_pretrained", "reward"}  # takes several of each, and no --reward env


def blocks(source):
    """Source of every top-level function, class and constant, with its decorators and the comments inside."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def flags(source):
    """Type, default and docstring of every flag, as source."""
    fields = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    return {
        field.target.id: (ast.unparse(field.annotation), ast.unparse(field), ast.unparse(text))
        for field, text in itertools.pairwise(fields)
        if isinstance(field, ast.AnnAssign)
    }


@pytest.mark.parametrize("a,b", PAIRS)
def test_blocks_of_the_same_name_are_the_same(a, b):
    one, other = blocks(SCRIPTS[a]), blocks(SCRIPTS[b])
    shared = (one.keys() & other.keys()) - OWN
    assert len(shared) >= 10
    assert [name for name in sorted(shared) if one[name] != other[name]] == []


@pytest.mark.parametrize("a,b", PAIRS)
def test_flags_of_the_same_name_are_the_same(a, b):
    one, other = flags(SCRIPTS[a]), flags(SCRIPTS[b])
    shared = (one.keys() & other.keys()) - OWN_FLAGS
    if "reward_only_eval.py" in (a, b):
        shared -= OF_THE_EVALUATION
    assert len(shared) >= 15
    assert [name for name in sorted(shared) if one[name] != other[name]] == []


def test_the_training_scripts_share_all_but_the_algorithm():
    sac, ppo = blocks(SCRIPTS["sac_vlmrm.py"]), blocks(SCRIPTS["ppo_vlmrm.py"])
    own = {"Actor", "Critic", "SAC", "RecordedUpdate", "ReplayBuffer", "n_step_returns"}
    own |= {"make_buffer", "save_rows", "load_rows"}
    assert sac.keys() - ppo.keys() <= own
    assert ppo.keys() - sac.keys() <= {"PPO", "gae"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_pins_what_requirements_pin(name):
    pins = set(re.findall('"(.+?)"', SCRIPTS[name].split("# dependencies = [")[1].split("# ]")[0]))
    required = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert len(pins) >= 10 and pins <= required, pins - required


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_docstring(name):
    assert all(text.startswith(("'", '"')) for *_, text in flags(SCRIPTS[name]).values())
