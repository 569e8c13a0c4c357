"""Several processes of torchrun make the same run as one, and end together; on a CPU, through the command line."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_CLIP, command, finish, load, one_line, scalars, start

import ppo_vlmrm
import sac_vlmrm

KNEELING, LYING = "a humanoid robot kneeling", "a humanoid robot lying on its back"
COMMON = dict(clip=TINY_CLIP, num_envs=4, episode_length=10, eval_episodes=6, eval_every=80, video=False)
POLE = dict(env_id="InvertedPendulum-v5", goal=("a pole that is upright", "a pole that has fallen"))
RUNS = {
    "sac": ("sac_vlmrm", dict(goal=(KNEELING, LYING), learning_starts=80, batch_size=32, total_timesteps=200)),
    "ppo": ("ppo_vlmrm", POLE | dict(num_steps=20, early_termination=True, total_timesteps=240)),
}
ENDS = POLE | dict(reward="binary", temperature=0.07, terminate_on_success=True, total_timesteps=160)
RUNS["success"] = ("sac_vlmrm", ENDS | dict(n_step=1, learning_starts=160, save_rollouts=False))


def run_ranks(processes, script, **flags):
    """Runs this many processes of a script to their end, with the variables that torchrun sets for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    ranks = []
    for rank in range(processes):
        env = common | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start(script, env=env, **flags))
    results = [finish(*rank, timeout=300) for rank in ranks]
    assert [result.returncode for result in results] == [0] * processes, results
    assert not any(result.stdout or result.stderr for result in results[1:])  # rank 0 speaks for all


def torchrun(processes, script, *words, **flags):
    """Starts this many processes of a script by the command `torchrun`."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    line += command(script, *words, **flags)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def failure_of(process):
    """What a run of torchrun wrote until it failed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0, errors
    return output + errors


def processes_below(pid):
    """A process's children, and then theirs."""
    tree = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    parents = [tuple(map(int, line.split())) for line in tree.splitlines()[1:]]
    own = [child for child, parent in parents if parent == pid]
    return own + [grandchild for child in own for grandchild in processes_below(child)]


def running(pids, seconds):
    """Those processes that have not ended after so many seconds; a dead one that nobody waits for counts as ended."""
    end, alive = time.monotonic() + seconds, True
    while alive and time.monotonic() < end:
        time.sleep(0.1)
        states = subprocess.run(
            ["ps", "-o", "pid=,stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True
        )
        alive = [line for line in states.stdout.splitlines() if line.split()[1][0] != "Z"]
    return alive


def wait_for(path, process):
    """Waits until a run has written a file."""
    end = time.monotonic() + 120
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[1])
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of one process."""
    folders = {name: tmp_path_factory.mktemp("alone") / name for name in RUNS}
    for name, (script, flags) in RUNS.items():
        run_ranks(1, script, **COMMON, **flags, run_dir=folders[name])
    return folders


@pytest.mark.parametrize("name,processes", [("sac", 4), ("ppo", 4), ("success", 2)])
def test_the_number_of_processes_does_not_change_the_run(alone, tmp_path, name, processes):
    """States to the bit and rewards to 1e-6; what is learned from those is then a little different."""
    script, flags = RUNS[name]
    run_dir, same_until = tmp_path / "run", 80  # frames: SAC's random actions, PPO's first rollout
    run_ranks(processes, script, **COMMON, **flags, run_dir=run_dir)
    logged, expected = scalars(run_dir), scalars(alone[name])
    assert logged.keys() == expected.keys()
    for tag, points in expected.items():
        if not tag.startswith(("time/", "charts/SPS")):
            assert [step for step, _ in logged[tag]] == [step for step, _ in points]
            if tag.startswith("charts/"):
                exact = [value for step, value in points if step <= same_until]
                np.testing.assert_allclose([value for _, value in logged[tag]][: len(exact)], exact, rtol=1e-5)
            np.testing.assert_allclose(logged[tag], points, rtol=0.05, atol=0.05, err_msg=tag)
    if name == "success":  # episodes end at other times, and the next ones start
        lengths = [value for _, value in logged["charts/episodic_length"]]
        assert max(lengths) < 9
    for rollout in alone[name].glob("rollouts/*.npz"):
        ours, theirs = np.load(run_dir / "rollouts" / rollout.name), np.load(rollout)
        assert ours["qpos"].shape == theirs["qpos"].shape and len(theirs["qpos"]) == 6
        np.testing.assert_allclose(ours["qpos"][:, 0], theirs["qpos"][:, 0], atol=0.05)  # the starts, in their order
    if name == "sac":
        rows, expected = (np.fromfile(path / "replay.bin", np.float32) for path in (run_dir, alone[name]))
        rows, expected = rows.reshape(200, -1), expected.reshape(200, -1)
        rewards = slice(348 + 17, 348 + 17 + 2)
        np.testing.assert_allclose(rows[:80, rewards], expected[:80, rewards], rtol=0, atol=1e-6)
        rows[:, rewards] = expected[:, rewards] = 0
        np.testing.assert_array_equal(rows[:80], expected[:80])


@pytest.mark.parametrize("name", ["sac", "ppo"])
def test_a_checkpoint_of_one_process_goes_on_in_two_and_theirs_in_one(tmp_path, name):
    script, flags = RUNS[name]
    run_dir, flags = tmp_path / "run", COMMON | flags | dict(anneal_lr=False)
    run_ranks(1, script, **flags, run_dir=tmp_path / "reference")
    run_ranks(2, script, **(flags | dict(total_timesteps=80)), run_dir=run_dir)
    run_ranks(1, script, resume=run_dir, total_timesteps=160)
    run_ranks(2, script, resume=run_dir, total_timesteps=flags["total_timesteps"])
    saved, expected = load(run_dir), load(tmp_path / "reference")
    torch.testing.assert_close(saved["agent"], expected["agent"], rtol=0.01, atol=0.01)
    assert saved["global_step"] == expected["global_step"]


@pytest.mark.parametrize("script", [sac_vlmrm, ppo_vlmrm])
def test_a_signal_that_comes_while_the_processes_agree_waits_for_the_next_phase(script, monkeypatch):
    """The others do not know of it: one that stopped alone would leave them waiting for ever."""
    run, late = SimpleNamespace(stopped_by=[]), [signal.SIGTERM]

    def all_reduce(number, _):
        run.stopped_by += late  # Python runs a signal's handler once the call returns
        late.clear()

    monkeypatch.setattr(script, "WORLD", 2)
    monkeypatch.setattr(script.dist, "all_reduce", all_reduce)
    assert not script.is_stopped(run) and run.stopped == 0
    assert script.is_stopped(run) and run.stopped == signal.SIGTERM


@pytest.mark.parametrize("whom", ["one process", "torchrun", "all"])
def test_a_signal_stops_all_processes_with_one_checkpoint(tmp_path, whom):
    script, flags = RUNS["sac"]
    run_dir, endless = tmp_path / "run", dict(total_timesteps=10**6, checkpoint_every=40, anneal_lr=False)
    process = torchrun(2, script, **(COMMON | flags | endless), run_dir=run_dir)
    wait_for(run_dir / "checkpoint.pt", process)
    everyone = processes_below(process.pid)
    whose = {"one process": everyone[1:2], "torchrun": [process.pid], "all": [process.pid, *everyone]}
    for pid in whose[whom]:  # one process: the second of torchrun's own children
        os.kill(pid, signal.SIGTERM)
    assert f"--resume {run_dir}" in failure_of(process)
    assert not running(everyone, seconds=10)
    saved = load(run_dir)
    assert saved["global_step"] % 40 == 0 and saved["buffer_total"] == saved["global_step"]
    run_ranks(1, script, resume=run_dir, total_timesteps=saved["global_step"] + 40)


def test_a_process_that_dies_ends_all(tmp_path):
    script, flags = RUNS["ppo"]
    run_dir, endless = tmp_path / "run", dict(total_timesteps=10**6, checkpoint_every=80)
    process = torchrun(2, script, **(COMMON | flags | endless), run_dir=run_dir)
    wait_for(run_dir / "checkpoint.pt", process)
    everyone, killed_at = processes_below(process.pid), time.monotonic()
    os.kill(everyone[1], signal.SIGKILL)
    output = failure_of(process)
    assert "SIGKILL" in output and not running(everyone, seconds=killed_at + 60 - time.monotonic())
    assert load(run_dir)["global_step"] > 0


def test_what_the_processes_cannot_share_is_one_line(tmp_path):
    flags = dict(clip=TINY_CLIP, num_envs=4, run_dir=tmp_path / "run")
    of_three = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    assert "--num-envs 4 is not a multiple of the 3" in one_line(finish(*start("sac_vlmrm", env=of_three, **flags)))
    flags |= dict(num_envs=3, device="cuda")
    if torch.cuda.device_count() < 3:
        assert "torchrun started 3 processes, but" in one_line(finish(*start("ppo_vlmrm", env=of_three, **flags)))
    assert not (tmp_path / "run").exists()
