"""What several tests share: the embedded CLIP, renders, command lines, and readers of what a run leaves behind."""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts do, which must happen before torch is imported
import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sac_vlmrm import CLIP, SceneRenderer, find_clip

ROOT = Path(__file__).parent.parent
TINY_CLIP = str(ROOT / "tests" / "tiny_clip")
KNEELING = "a humanoid robot kneeling"
LYING = "a humanoid robot lying on its back"
SCENE = dict(distance=3.5, elevation=-10.0, azimuth=180.0, lookat=(0, 0, 1), follow=True, restyle=True)


def make_clip(path=TINY_CLIP, **flags):
    return CLIP(find_clip(str(path), **flags), "cpu")


@pytest.fixture(scope="session")
def clip():
    return make_clip()


@pytest.fixture(scope="session")
def kneeling_frame():
    """A committed render of the kneeling humanoid, [96, 96, 3]."""
    return np.asarray(Image.open(Path(TINY_CLIP) / "kneeling.png").convert("RGB")).copy()


def render_states(env_id, states, size=96):
    """Frames [n, size, size, 3] of MuJoCo states with the scripts' default camera."""
    render = SceneRenderer(gym.make(env_id).unwrapped.fullpath, (size, size), **SCENE)
    return np.stack([render(qpos) for qpos in states])


@pytest.fixture(scope="session")
def render():
    """`render_states` in a process of its own: one that has started OpenGL can no longer fork its environments."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda *arguments: pool.apply(render_states, arguments)


def command(script, *words, **flags):
    """The command line of a script, `sac_vlmrm` say: values become words, booleans --flag or --no-flag."""
    line = [sys.executable, str(ROOT / f"{script}.py"), *map(str, words)]
    for name, value in flags.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            line += [f"--{name}" if value else f"--no-{name}"]
        else:
            line += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return line


# A script spends 8 seconds on importing its libraries. Processes that are forked from one that has done so spend none.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sac_vlmrm", "ppo_vlmrm", "reward_only_eval"])


def play_command(words, environment, output, cwd):
    """Is `python WORDS`, in a process that has the libraries already; it writes to the files `output`.out and .err."""
    os.setsid()  # so that a test sees the processes that it leaves behind
    os.chdir(cwd)
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))  # "" would be the current folder
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def start(script, *words, env=None, cwd=".", **flags):
    """Starts a script in a session of its own; its libraries do not read `env`. `finish` waits for its end."""
    output = Path(tempfile.mkdtemp()) / "std"
    arguments = (command(script, *words, **flags)[1:], {**os.environ, **(env or {})}, str(output), cwd)
    process = SERVER.Process(target=play_command, args=arguments)
    process.start()
    return process, output


def finish(process, output, timeout=600):
    """Waits for what `start` returned: stdout, stderr and the exit status."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(output.with_suffix(".err").read_text())
    stdout, stderr = (output.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    shutil.rmtree(output.parent)
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


def run(script, *words, env=None, timeout=600, **flags):
    """Runs a script to its end; stdout, stderr and the exit status are in what it returns."""
    if env:  # which libraries may read when they are imported
        line, environment = command(script, *words, **flags), {**os.environ, **env}
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=environment)
    return finish(*start(script, *words, **flags), timeout=timeout)


def scalars(run_dir):
    """What a run logged: tag -> [(step, value), ...]."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def values(run_dir):
    """What a run logged, without the steps: tag -> [value, ...]."""
    return {tag: [value for _, value in points] for tag, points in scalars(run_dir).items()}


def load(run_dir, name="checkpoint.pt"):
    return torch.load(run_dir / name, weights_only=True)


def assert_same_checkpoint(run_dir, reference):
    saved, expected = load(run_dir), load(reference)
    assert saved.pop("versions") == expected.pop("versions")
    torch.testing.assert_close(saved, expected, rtol=0, atol=0)


def unit(rng, *shape):
    """Random unit vectors, float64."""
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def one_line(result):
    """Standard error of a script that ended over a mistake of its user: its only line."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]
