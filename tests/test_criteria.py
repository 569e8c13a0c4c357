"""The criteria of the tasks of reward_only_eval.py, on posed states, and the sweeps that lead to the goal states."""

import math

import gymnasium as gym
import numpy as np
import pytest
from poses import HUMANOID, POSED, WRONG_FOR_ALL

from reward_only_eval import TASKS, make_sweep, meets, mujoco


@pytest.mark.parametrize("task", POSED)
def test_a_criterion_tells_the_states_that_meet_it_from_those_that_miss_it(task):
    meeting, missing = POSED[task]
    missing = missing | {f"wrong for all: {name}": state for name, state in WRONG_FOR_ALL.items()}
    assert len(meeting) >= 10 and len(missing) >= 10
    for states, expected in ((meeting, 1.0), (missing, 0.0)):
        judged = meets(TASKS[task][1], HUMANOID.model, np.stack(list(states.values())))
        wrong = [name for name, met in zip(states, judged, strict=True) if met != expected]
        assert not wrong, f"{'missed' if expected else 'met'}: {wrong}"


def test_the_sweeps_end_in_the_goal_state_and_start_outside():
    for task in POSED:
        sweep = make_sweep(task, 11, HUMANOID)
        labels = meets(TASKS[task][1], HUMANOID.model, sweep.qpos)
        assert labels[-1] == 1 and labels[0] == 0, task


def test_sweeps_move_what_they_name():
    pendulum = gym.make("InvertedPendulum-v5").unwrapped
    sweep = make_sweep("pole", 21, pendulum)
    np.testing.assert_allclose(sweep.qpos[:, 1], np.linspace(-math.pi / 2, math.pi / 2, 21))
    assert (sweep.qpos[:, 0] == 0).all() and sweep.table["progress"].argmax() == 10 and "rad" in sweep.axis
    labels = meets(TASKS["pole"][1], pendulum.model, sweep.qpos)
    np.testing.assert_array_equal(labels == 1, np.abs(sweep.table["position"]) <= 0.2)
    sweep = make_sweep("slider:-0.5:1", 4, pendulum)
    np.testing.assert_allclose(sweep.qpos[:, 0], [-0.5, 0, 0.5, 1])
    assert sweep.axis == "slider, m"
    sweep = make_sweep("root_z:1:2", 3, HUMANOID)
    np.testing.assert_allclose(sweep.qpos[:, 2], [1, 1.5, 2])
    np.testing.assert_allclose(
        sweep.qpos[:, [0, 1, *range(3, 24)]], HUMANOID.init_qpos[[0, 1, *range(3, 24)]][None].repeat(3, 0)
    )
    sweep = make_sweep("root_pitch:0:1.5707963", 3, HUMANOID)
    data = mujoco.MjData(HUMANOID.model)
    data.qpos[:] = sweep.qpos[-1]
    mujoco.mj_forward(HUMANOID.model, data)
    np.testing.assert_allclose(data.body("torso").xmat[[2, 5, 8]], [1, 0, 0], atol=1e-6)  # it lies on its front
    sweep = make_sweep("left_knee:-2:0", 3, HUMANOID)
    address = HUMANOID.model.joint("left_knee").qposadr[0]
    assert (sweep.qpos[:, address] == [-2, -1, 0]).all() and "rad" in sweep.axis
