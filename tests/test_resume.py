"""Nothing is lost: resuming is exact; kills, signals, broken environments and broken files end in one clear line."""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CLIP, assert_same_checkpoint, command, finish, load, one_line, run, scalars, start
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import ppo_vlmrm
import sac_vlmrm
from sac_vlmrm import Args

# Two phases of 20 frames between checkpoints; without CLIP, so that a run starts in seconds.
FLAGS = dict(
    env_id="InvertedPendulum-v5",
    reward="env",
    num_envs=2,
    episode_length=10,
    learning_starts=40,
    batch_size=16,
    updates_per_frame=0.5,
    checkpoint_every=40,
    eval_every=40,
    eval_episodes=2,
    video=False,
    device="cpu",
    anneal_lr=False,
    buffer_size=100,
)


def for_ppo(flags):
    """The same for PPO, without what is SAC's."""
    return {name: flags[name] for name in flags.keys() & vars(ppo_vlmrm.Args())} | dict(num_steps=10, num_minibatches=4)


def session_members(session):
    """pids of the processes in a session, zombies included."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            members.append(int(stat.parent.name))
    return members


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited too long"
        time.sleep(0.02)


def final_state(run_dir):
    saved = load(run_dir)
    state_dim, action_dim = saved["agent"]["actor.net.0.weight"].shape[1], len(saved["agent"]["actor.net.4.bias"]) // 2
    buffer = sac_vlmrm.ReplayBuffer(100, state_dim, action_dim, "cpu")
    sac_vlmrm.load_rows(buffer, run_dir / "replay.bin", saved["buffer_total"])
    logged = {tag: points for tag, points in scalars(run_dir).items() if not tag.startswith("time/")}
    logged.pop("charts/SPS")
    return buffer.rows, logged


def assert_same_end(run_dir, reference):
    assert_same_checkpoint(run_dir, reference)
    rows, logged = final_state(run_dir)
    expected_rows, expected_logged = final_state(reference)
    torch.testing.assert_close(rows, expected_rows, rtol=0, atol=0)
    assert logged == expected_logged


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of 400 frames in one go."""
    return sac_vlmrm.train(Args(**FLAGS, total_timesteps=400, run_dir=tmp_path_factory.mktemp("reference") / "run"))


def test_resuming_is_exact(tmp_path):
    flags = {**FLAGS, "reward": "regularized", "env_id": "Humanoid-v5", "clip": TINY_CLIP}
    whole = sac_vlmrm.train(Args(**flags, total_timesteps=160, run_dir=tmp_path / "whole"))
    part = sac_vlmrm.train(Args(**flags, total_timesteps=80, run_dir=tmp_path / "part"))
    again = sac_vlmrm.train(Args(**flags, total_timesteps=160, resume=part))
    assert again == part
    assert_same_end(part, whole)


def kill_run(process, output):
    """Kills the main process of a run alone, and waits until none that it started is left."""
    process.kill()
    finish(process, output)
    wait_for(lambda: not session_members(process.pid), 10)


def kill_is_due(process, path, before, while_writing):
    newer = path.exists() and path.stat().st_mtime_ns != before
    writing = while_writing and path.with_suffix(".tmp").exists()
    return newer or writing or not process.is_alive()


def test_ten_kills_at_random_moments_leave_a_run_that_ends_the_same(tmp_path, reference):
    run_dir, rng = tmp_path / "run", random.Random(0)
    for kill in range(10):
        where = {"resume": run_dir} if (run_dir / "checkpoint.pt").exists() else {"run_dir": run_dir}
        flags = {} if "resume" in where else FLAGS
        process, output = start("sac_vlmrm", **flags, **where, total_timesteps=400)
        path = run_dir / "checkpoint.pt"
        before = path.stat().st_mtime_ns if path.exists() else None

        # Half of the kills come right as files are written, the others a random moment after a checkpoint.
        wait_for(partial(kill_is_due, process, path, before, while_writing=kill % 2 == 1))
        time.sleep(rng.choice((0.0, rng.uniform(0.0, 0.1))))
        kill_run(process, output)
        assert load(run_dir)["global_step"] % 20 == 0
    result = run("sac_vlmrm", resume=run_dir)
    assert result.returncode == 0, result.stderr
    assert_same_end(run_dir, reference)


class StopAfter(list):
    """What a run takes for its received signals: a SIGTERM is among them once it was asked `n` times."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __bool__(self):
        self.left -= 1
        if self.left == 0:
            self.append(signal.SIGTERM)
        return len(self) > 0


@pytest.mark.parametrize("script", [sac_vlmrm, ppo_vlmrm])
def test_ten_stops_at_random_frames_leave_a_run_that_ends_the_same(tmp_path, script, monkeypatch):
    flags = {**FLAGS, "anneal_lr": True, "checkpoint_every": 10**6, "total_timesteps": 400}
    if script is ppo_vlmrm:
        flags = for_ppo(flags)
    whole, run_dir, rng = (
        script.train(script.Args(**flags, run_dir=tmp_path / "whole")),
        tmp_path / "run",
        random.Random(1),
    )
    frames = []
    for stop in range(10):
        where = {"resume": run_dir} if stop else {"run_dir": run_dir}
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(script, "stop_signals", partial(contextlib.nullcontext, StopAfter(rng.randint(2, 30))))
            script.train(script.Args(**flags, **where))
        frames.append(load(run_dir)["global_step"])
    assert 0 < frames[-1] < 400 and len(set(frames)) > 5, frames
    script.train(script.Args(**flags, resume=run_dir))
    if script is sac_vlmrm:
        assert_same_end(run_dir, whole)
    else:
        assert_same_checkpoint(run_dir, whole)


def test_resuming_with_other_versions_warns_in_one_line(tmp_path, reference, capsys):
    shutil.copytree(reference, tmp_path / "run")
    saved = load(tmp_path / "run")
    torch.save({**saved, "versions": saved["versions"] | {"mujoco": "3.0.0"}}, tmp_path / "run" / "checkpoint.pt")
    sac_vlmrm.train(Args(**FLAGS, resume=tmp_path / "run", total_timesteps=420))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "'mujoco': '3.0.0'" in line
    sac_vlmrm.train(Args(**FLAGS, resume=tmp_path / "run", total_timesteps=440))
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "run" / "sac_vlmrm.py").write_text("another one")
    sac_vlmrm.train(Args(**FLAGS, resume=tmp_path / "run", total_timesteps=460))
    errors = capsys.readouterr().err
    assert "is not as it was when the run was started" in errors
    assert f"{tmp_path / 'run'} trains on" in errors and "evaluation at frame 460: " in errors


def test_resume_auto_starts_a_run_and_goes_on_with_it(tmp_path, reference):
    run_dir = tmp_path / "run"
    flags = dict(**FLAGS, resume="auto", run_dir=run_dir, total_timesteps=400)
    started = start("sac_vlmrm", **flags)
    wait_for(lambda: (run_dir / "args.json").exists())  # before there is a checkpoint
    kill_run(*started)
    (run_dir / "checkpoint.pt").unlink(missing_ok=True)
    started = start("sac_vlmrm", **flags)
    wait_for(lambda: (run_dir / "checkpoint.pt").exists())
    kill_run(*started)
    for _ in range(2):  # the second time there is nothing left to do
        result = run("sac_vlmrm", **flags)
        assert result.returncode == 0, result.stderr
        assert_same_end(run_dir, reference)
    assert "--run-dir" in one_line(run("sac_vlmrm", resume="auto"))
    assert "--gamma" in one_line(run("sac_vlmrm", **flags, gamma=0.5))
    assert "already holds a run" in one_line(run("sac_vlmrm", run_dir=run_dir))


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_no_process_left(tmp_path, reference, number, status):
    run_dir = tmp_path / "run"
    process, output = start("sac_vlmrm", **FLAGS, run_dir=run_dir, total_timesteps=10**6)
    wait_for(lambda: (run_dir / "checkpoint.pt").exists())
    os.killpg(process.pid, number)  # a terminal's Ctrl-C and a scheduler's SIGTERM reach the workers as well
    result = finish(process, output, timeout=30)
    errors = result.stderr
    assert result.returncode == status and "--resume" in errors and "Traceback" not in errors, errors
    wait_for(lambda: not session_members(process.pid), 5)
    frame = load(run_dir)["global_step"]
    if frame < 400:
        result = run("sac_vlmrm", resume=run_dir, total_timesteps=400)
        assert result.returncode == 0, result.stderr
        assert_same_end(run_dir, reference)


def test_a_later_signal_ends_a_run_at_once_but_not_one_that_comes_with_the_first():
    code = (
        "import os, time, sac_vlmrm\nwith sac_vlmrm.stop_signals() as received:\n"
        "    for _ in range(2):\n        os.kill(os.getpid(), 2)\n        print(received, flush=True)\n"
        "    time.sleep(3.1)\n    os.kill(os.getpid(), 2)\n    print('late')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 130 and result.stdout == "[2]\n[2]\n", result.stderr


def test_a_signal_is_not_lost_with_the_tee_that_the_words_go_to():
    code = (
        "import os, sys, sac_vlmrm\nread, write = os.pipe()\nos.dup2(write, 2)\nos.close(read)\n"
        "with sac_vlmrm.stop_signals() as received:\n    os.kill(os.getpid(), 2)\n    print(received)\n"
        "    print('the checkpoint is written', file=sys.stderr, flush=True)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0 and result.stdout == "[2]\n"


def test_a_worker_that_dies_ends_the_run_with_one_line(tmp_path):
    run_dir = tmp_path / "run"
    process, output = start("sac_vlmrm", **FLAGS, run_dir=run_dir, total_timesteps=10**6)
    wait_for(lambda: (run_dir / "checkpoint.pt").exists())
    workers = [pid for pid in session_members(process.pid) if pid != process.pid]
    os.kill(max(workers), signal.SIGKILL)
    result = finish(process, output, timeout=30)
    errors = result.stderr
    assert result.returncode == 1 and "died (exit code -9)" in errors and "Traceback" not in errors, errors
    wait_for(lambda: not session_members(process.pid), 5)
    load(run_dir)


BROKEN = """
import os
import gymnasium as gym, numpy as np

class Broken(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, render_mode=None, fault=None):
        self.render_mode, self.fault, self.steps = render_mode, fault, 0

    def reset(self, *, seed=None, options=None):
        self.steps += -self.steps % 7 if self.fault == "strict" else 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        late = self.steps > 60
        if self.fault == "strict":
            assert self.steps % 7, "stepped after its end"
            ends = self.steps % 7 == 6
            return np.zeros(2, np.float32), 1.0, ends, False, {}
        if late and self.fault == "raise":
            raise FloatingPointError("the joints came off")
        return np.full(2, np.nan if late and self.fault == "nan" else 0.0, np.float32), 0.0, False, False, {}

    def render(self):
        return np.zeros((64, 64 + self.steps % 2, 3), np.uint8)

    def close(self):
        print("closed")

for fault in ("nan", "raise", "strict"):
    gym.register(f"Broken-{fault}-v0", Broken, kwargs={"fault": fault})
"""


@pytest.mark.parametrize("fault,said", [("nan", "diverged"), ("raise", "the joints came off")])
def test_a_broken_environment_ends_the_run_with_one_line(tmp_path, fault, said):
    (tmp_path / "broken_environments.py").write_text(BROKEN)
    flags = {**FLAGS, "env_id": f"broken_environments:Broken-{fault}-v0", "checkpoint_every": 20}
    flags |= dict(run_dir=tmp_path / "run", total_timesteps=1000)
    process, output = start("sac_vlmrm", **flags, env={"PYTHONPATH": str(tmp_path)})
    result = finish(process, output, timeout=60)
    errors = result.stderr
    assert result.returncode == 1 and said in errors and errors.count("error:") == 1, errors
    assert load(tmp_path / "run")["global_step"] >= 20
    wait_for(lambda: not session_members(process.pid), 5)


def test_an_environment_that_breaks_in_a_spawned_process_ends_the_run(tmp_path):
    (tmp_path / "broken_environments.py").write_text(BROKEN)
    source = (ROOT / "sac_vlmrm.py").read_text()
    spawns = source.replace("opened_by = None", "opened_by = os.getpid()")  # as after OpenGL's start, or on a Mac
    assert spawns != source
    (tmp_path / "script.py").write_text(spawns)
    flags = {**FLAGS, "env_id": "broken_environments:Broken-raise-v0", "num_envs": 1, "run_dir": tmp_path / "run"}
    words = [sys.executable, tmp_path / "script.py", *command("sac_vlmrm", **flags)[2:]]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "error: the environment raised FloatingPointError" in result.stderr, result.stderr


@pytest.mark.parametrize("script", ["sac_vlmrm", "ppo_vlmrm"])
def test_an_episode_that_has_ended_is_not_stepped_on(tmp_path, script):
    (tmp_path / "broken_environments.py").write_text(BROKEN)
    flags = {**FLAGS, "env_id": "broken_environments:Broken-strict-v0", "early_termination": True, "video": True}
    if script == "ppo_vlmrm":
        flags = for_ppo(flags)
    result = run(script, **flags, run_dir=tmp_path / "run", total_timesteps=80, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert {value for _, value in scalars(tmp_path / "run")["eval/episodic_length"]} == {6.0}
    assert list((tmp_path / "run/videos").iterdir())  # of frames that differ in size
    assert result.stdout.count("closed") == 3  # a third one was made for its spaces


def test_a_nan_reward_or_loss_stops_before_it_is_saved(tmp_path, monkeypatch):
    flags = {**FLAGS, "reward": "regularized", "clip": TINY_CLIP, "total_timesteps": 200}
    with monkeypatch.context() as patch:
        patch.setattr(sac_vlmrm, "regularized_reward", lambda s, g, b, a: torch.full((len(s), 1), float("nan")))
        with pytest.raises(FloatingPointError, match="reward"):
            sac_vlmrm.train(Args(**flags, run_dir=tmp_path / "reward"))
    evaluate = sac_vlmrm.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(sac_vlmrm, "evaluate", lambda *a: evaluate(*a) | {"clip_rewards": np.full((2, 10), np.nan)})
        with pytest.raises(FloatingPointError, match="a reward in evaluation"):
            sac_vlmrm.train(Args(**flags, run_dir=tmp_path / "evaluation"))
    update, calls = sac_vlmrm.SAC.update, []

    def poisoned(self, batch):
        calls.append(1)
        batch["rewards"] *= float("nan") if len(calls) > 35 else 1.0
        return update(self, batch)

    monkeypatch.setattr(sac_vlmrm.SAC, "update", poisoned)
    with pytest.raises(FloatingPointError, match="loss"):
        sac_vlmrm.train(Args(**{**FLAGS, "total_timesteps": 200}, run_dir=tmp_path / "loss"))
    saved = load(tmp_path / "loss")
    assert saved["global_step"] == 80 and all(value.isfinite().all() for value in saved["agent"].values())


WRITES = {  # what a run writes next once it has a checkpoint
    "checkpoint": dict(checkpoint_every=20, eval_every=10**6),
    "rollouts": dict(checkpoint_every=40, eval_every=20),
    "video": dict(checkpoint_every=40, eval_every=20, video=True, save_rollouts=False),
    "log": dict(checkpoint_every=40, eval_every=10**6),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, what):
    run_dir = tmp_path / "run"
    process, output = start("sac_vlmrm", **{**FLAGS, **WRITES[what]}, run_dir=run_dir, total_timesteps=10**6)
    wait_for(lambda: (run_dir / "checkpoint.pt").exists())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, 2000))  # room for an error, not for files
    result = finish(process, output, timeout=60)
    errors = result.stderr
    assert result.returncode == 1 and errors.count("error: [Errno") == 1 and "Traceback" not in errors, errors
    wait_for(lambda: not session_members(process.pid), 5)
    frame = load(run_dir)["global_step"]
    if what != "checkpoint":
        json.loads((run_dir / "args.json").read_text())
        sac_vlmrm.load_rows(sac_vlmrm.ReplayBuffer(100, 4, 1, "cpu"), run_dir / "replay.bin", frame)
    sac_vlmrm.train(Args(**FLAGS, resume=run_dir, total_timesteps=frame + 40))
    assert load(run_dir)["global_step"] == frame + 40


def test_args_json_is_whole_whenever_the_disk_fills(tmp_path, reference, monkeypatch):
    shutil.copytree(reference, tmp_path / "run")
    before = (tmp_path / "run" / "args.json").read_bytes()
    line = command("sac_vlmrm", resume=tmp_path / "run", total_timesteps=440)
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, 100))
    result = subprocess.run(line, preexec_fn=small, capture_output=True, text=True)
    assert "File too large" in one_line(result)
    assert (tmp_path / "run" / "args.json").read_bytes() == before


def test_a_buffer_that_memory_or_the_disk_has_no_room_for_is_one_line(tmp_path, monkeypatch, capsys):
    line = one_line(run("sac_vlmrm", **{**FLAGS, "buffer_size": 10**13}, total_timesteps=100, run_dir=tmp_path / "a"))
    assert "can't allocate memory" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=48 * 199))
    with pytest.raises(SystemExit) as stopped:
        sac_vlmrm.train(Args(**FLAGS, total_timesteps=201, run_dir=tmp_path / "b"))
    assert stopped.value.code == 2 and "--buffer-size" in capsys.readouterr().err
    sac_vlmrm.train(Args(**FLAGS, total_timesteps=199, run_dir=tmp_path / "c"))


def test_two_processes_never_share_a_run(tmp_path, reference):
    """Those of one seed that start in the same second get two folders; a run in progress can't be resumed."""
    flags = FLAGS | dict(env_id="gymnasium:InvertedPendulum-v5")
    runs = [start("sac_vlmrm", **flags, total_timesteps=10**6, cwd=tmp_path) for _ in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 2)
    folder = next(tmp_path.glob("runs/*"))
    assert folder.name.startswith("gymnasium-InvertedPendulum-v5__sac_vlmrm__1__")  # a colon is not for every path
    assert "another process runs in" in one_line(run("sac_vlmrm", resume=folder))
    for started in runs:
        kill_run(*started)
    sac_vlmrm.train(Args(**flags, resume=folder, total_timesteps=load(folder)["global_step"] + 20))


def test_a_run_whose_clip_has_moved_is_resumed_but_not_one_whose_clip_has_changed(tmp_path, capsys, monkeypatch):
    clip = shutil.copytree(TINY_CLIP, tmp_path / "clip")
    flags = dict(FLAGS, reward="regularized", clip=str(clip), run_dir=tmp_path / "run")
    sac_vlmrm.train(Args(**flags, total_timesteps=40))
    clip = clip.rename(tmp_path / "moved")
    words = ["--resume", tmp_path / "run", "--clip", clip, "--total-timesteps", 60]
    monkeypatch.setattr(sys, "argv", ["sac_vlmrm.py", *map(str, words)])
    sac_vlmrm.train(sac_vlmrm.parse_args())
    assert load(tmp_path / "run")["global_step"] == 60
    flags["clip"] = str(clip)
    weights = load_file(clip / "open_clip_model.safetensors")
    save_file({name: weight.flip(0) for name, weight in weights.items()}, clip / "open_clip_model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        sac_vlmrm.train(Args(**flags, resume=tmp_path / "run", total_timesteps=80))
    assert stopped.value.code == 2 and "has changed since" in capsys.readouterr().err


def test_a_run_of_many_goals_is_not_resumed_with_one_of_their_images_changed(tmp_path, capsys):
    image = shutil.copy(Path(TINY_CLIP) / "kneeling.png", tmp_path / "goal.png")
    goals = (str(image), *(f"robot number {i}" for i in range(40)))
    flags = dict(FLAGS, reward="regularized", clip=TINY_CLIP, goal=goals)
    sac_vlmrm.train(Args(**flags, run_dir=tmp_path / "run", total_timesteps=20))
    ImageOps.flip(Image.open(image)).save(image)
    with pytest.raises(SystemExit):
        sac_vlmrm.train(Args(**flags, resume=tmp_path / "run", total_timesteps=40))
    assert "has changed since" in capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_broken_checkpoints_are_one_line_and_run_nothing(tmp_path, reference, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (reference / "checkpoint.pt").read_bytes()
    contents = {"pickle": pickle.dumps(Payload()), "cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}
    for name, content in contents.items():
        Path(name).write_bytes(content)
    for name in contents:
        with pytest.raises(ValueError, match=f"^{name} is truncated or no checkpoint"):
            sac_vlmrm.load_checkpoint(Path(name))
    assert not Path("pwned").exists()


def test_a_broken_checkpoint_or_buffer_is_one_line_and_status_2(tmp_path, reference):
    shutil.copytree(reference, tmp_path / "run")
    checkpoint, rows = (tmp_path / "run" / name for name in ("checkpoint.pt", "replay.bin"))
    flags = dict(resume=tmp_path / "run", total_timesteps=440)
    rows.write_bytes(rows.read_bytes()[:-100])
    assert "replay.bin is truncated" in one_line(run("sac_vlmrm", **flags))
    checkpoint.write_bytes(b"hello")
    assert "checkpoint.pt is truncated" in one_line(run("sac_vlmrm", **flags))


def test_flags_that_would_change_the_numbers_are_refused_on_resume(reference, tmp_path):
    line = one_line(run("sac_vlmrm", resume=reference, gamma=0.5, seed=7, eval_every=10))
    assert "--gamma 0.5 (was 0.98)" in line and "--seed 7" in line and "--eval-every" not in line
    assert "args.json" in one_line(run("sac_vlmrm", resume=tmp_path))
    (tmp_path / "args.json").write_text(json.dumps({"goal": ["a humanoid robot kneeling"]}))
    assert "checkpoint.pt" in one_line(run("sac_vlmrm", resume=tmp_path))
