"""The wiring of both scripts' `train()`: short runs are recorded, and what must follow from the records is recomputed.

A run's environments, agent, replay buffer, evaluations, log and checkpoints are spied on, and every number is computed
again from what the environments returned, in loops of this file's own. `tests/tools/mutate.py` changes single lines of
the scripts, and each change must fail here or in the unit tests.
"""

import contextlib
import functools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from open_clip.transform import PreprocessCfg
from torch.func import functional_call

import ppo_vlmrm
import sac_vlmrm

SAC = dict(learning_starts=30, updates_per_frame=0.3, batch_size=16, total_timesteps=110)  # phases of 3 x 8 frames
PPO = dict(num_steps=20, num_minibatches=4, update_epochs=3, max_grad_norm=0.05, total_timesteps=200)  # of 3 x 20
PPO |= dict(eval_every=100, checkpoint_every=110)
SCRIPTS = {"sac": (sac_vlmrm, SAC), "ppo": (ppo_vlmrm, PPO)}
COMMON = dict(
    env_id=f"{__name__}:Probe-v0",
    seed=4,
    num_envs=3,
    episode_length=8,
    early_termination=True,
    eval_episodes=4,
    eval_every=50,
    checkpoint_every=70,
    clip="fake",
    baseline="robot",
    temperature=0.2,
    threshold=0.4,
    video=False,
    device="cpu",
)
CASES = {
    "goals": dict(goal=("east", "north", "west"), eval_goal=("south",), gamma=0.9),
    "success": dict(
        goal=("east", "north"),
        eval_goal=("west", "south"),
        negatives=("middle",),
        reward="binary",
        terminate_on_success=True,
        gamma=0.8,
        anneal_lr=False,
    ),
    "env": dict(goal=("east",), reward="env", normalize_obs=False, early_termination=False, gamma=0.95),
}
SAC_CASES = {
    "goals": dict(n_step=3, relabel=0.3, tau=0.1, ent_coef=0.02),
    "success": dict(n_step=1, relabel=0.0, updates_per_frame=0.1, learning_starts=48),
    "env": dict(n_step=2, learning_starts=1, updates_per_frame=0.27, buffer_size=60, autotune=False, ent_coef=0.05),
}
PPO_CASES = {
    "goals": dict(gae_lambda=0.8),
    "success": dict(normalize_reward=False, gae_lambda=0.7, max_grad_norm=1e6),
    "env": dict(gae_lambda=1.0, ent_coef=0.01, num_minibatches=7),
}
TEXTS = {"east": (3, 0, 1), "north": (0, 3, 1), "west": (-3, 0, 1), "south": (0, -3, 1)}
TEXTS |= {"middle": (0, 0, 1), "robot": (1, 1, 1)}


class Probe(gym.Env):
    """A point that is pushed about, and falls off a disc or leaves it; its frames show where it is."""

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def look(self):
        return np.array([*self.x, 5.0 + 3.0 * self.x[0] * self.x[1]])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.7, 0.7, 2)
        return self.look(), {}

    def step(self, action):
        self.x = self.x + 0.25 * action
        far, left = bool(np.hypot(*self.x) > 1.2), bool(self.x[0] < -0.8)
        return self.look(), 1.0 + self.x[0] - 0.1 * float(action[1]), far, left, {}

    def render(self):
        return np.full((4, 4, 3), (*np.clip(128 + 80 * self.x, 0, 255), 200), np.uint8)


gym.register("Probe-v0", Probe)


# ---- the recording


def embed(frames):
    """Where the point is in frames [n, 4, 4, 3], as unit vectors [n, 3]."""
    x = (frames[:, 0, 0, :2].astype(float) - 128.0) / 80.0
    return unit(np.concatenate([x, np.full((len(x), 1), 0.3)], 1))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embed_text(prompts):
    return unit(np.array([TEXTS[prompt] for prompt in prompts], float))


class FakeCLIP:
    """Stands in for the scripts' CLIP."""

    def __init__(self, *_):
        self.model, self.precision, self.batch_size = torch.nn.Module(), "fp32", 5
        self.device = torch.device("cpu")

    def encode_text(self, prompts, _):
        return torch.from_numpy(embed_text(prompts)).float()

    def encode_images(self, frames):
        return torch.from_numpy(embed(frames)).float()


class SpiedEnvs:
    """A run's vector environment; its resets and steps are recorded."""

    def __init__(self, envs, note):
        self.envs, self.note = envs, note

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self, *, seed=None, options=None):
        mask = options["reset_mask"].copy() if options else None  # before the vector environment takes it out
        result = self.envs.reset(seed=seed, options=options)
        self.note("reset", seeds=seed and list(seed), mask=mask, states=result[0]["state"].copy())
        return result

    def step(self, actions):
        actions = actions.copy()
        result = self.envs.step(actions)
        observation, rewards, terminated, truncated, _ = result
        seen = dict(states=observation["state"].copy(), pixels=observation["pixels"].copy())
        outcome = dict(rewards=rewards.copy(), terminated=terminated.copy(), truncated=truncated.copy())
        self.note("step", actions=actions, **seen, **outcome)
        return result


def clone(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


class Recording:
    """A run of a script: its `args`, `dir`, `agent`, `buffer` and all that was recorded of it, in order.

    An event has a `kind`, the number of its `phase`, the goal that is `evaluated`, or None, and what it is about.
    """

    def __init__(self, script, args):
        self.script, self.args, self.events = script, args, []
        self.phase, self.evaluated, self.buffer = -1, None, None
        self.sac = script is sac_vlmrm
        self.steps = args.episode_length if self.sac else args.num_steps  # of a phase
        self.frames = self.steps * args.num_envs
        self.phases = math.ceil(args.total_timesteps / self.frames)
        with pytest.MonkeyPatch.context() as patch:
            self.spy_on(patch)
            self.dir = script.train(args)

    def of(self, *kinds, phase, evaluated=None):
        """The events of these kinds in a phase."""
        events = [e for e in self.events if e.kind in kinds and e.phase == phase]
        return [e for e in events if e.evaluated == evaluated]

    def note(self, kind, **what):
        if kind == "reset" and self.evaluated is None and what["mask"] is None:
            self.phase += 1
            what |= {"weights": clone(self.agent.state_dict()), "torch_seed": torch.initial_seed()}
        event = SimpleNamespace(kind=kind, phase=self.phase, evaluated=self.evaluated, **what)
        self.events.append(event)
        return event

    def spy_on(self, patch):
        script, note = self.script, self.note
        agent_class = script.SAC if self.sac else script.PPO
        learn = agent_class.update if self.sac else agent_class.loss

        @contextlib.contextmanager
        def make_envs(args, config, make_envs=script.make_envs):
            with make_envs(args, config) as envs:
                yield SpiedEnvs(envs, note)

        def make_optimizers(agent, make_optimizers=agent_class.make_optimizers):
            make_optimizers(agent)
            self.agent, self.first_seed = agent, torch.initial_seed()
            for name, optimizer in agent.optimizers.items():
                optimizer.register_step_pre_hook(functools.partial(gradient_step, name))

        def gradient_step(name, optimizer, *_):
            (group,) = optimizer.param_groups
            gradient = torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None])
            note("gradient_step", name=name, lr=group["lr"], gradient=gradient.clone())

        def act(agent, states, goal_ids, deterministic=False, act=agent_class.act):
            actions = act(agent, states, goal_ids, deterministic)
            seen = dict(states=np.array(states), goal_ids=np.array(goal_ids), deterministic=deterministic)
            note("act", **seen, actions=actions.copy())
            return actions

        def update(agent, batch):
            before = clone(agent.state_dict())
            losses = learn(agent, batch)
            note("update", batch=batch, before=before, after=clone(agent.state_dict()), losses=clone(losses))
            return losses

        def loss(agent, batch):
            total, parts = learn(agent, batch)
            gradients = torch.autograd.grad(total, list(agent.parameters()), retain_graph=True)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            note("loss", batch=clone(batch), parts=clone(parts), norm=norm.item())
            return total, parts

        def add(buffer, add=sac_vlmrm.ReplayBuffer.add, **transitions):
            self.buffer = buffer
            add(buffer, **transitions)

        def batches(buffer, n, batch_size, relabel=0.0, batches=sac_vlmrm.ReplayBuffer.batches):
            for batch in batches(buffer, n, batch_size, relabel):
                note("sample", batch_size=batch_size, relabel=relabel, batch=batch)
                yield batch

        def evaluate(args, run, agent, goal_id, seeds, evaluate=script.evaluate):
            self.evaluated = goal_id
            result = evaluate(args, run, agent, goal_id, seeds)
            note("result", **result)
            self.evaluated = None
            return result

        def evaluate_goals(args, run, agent, global_step, evaluate_goals=script.evaluate_goals):
            event = note("evaluation", global_step=global_step, before=clone(agent.state_dict()))
            results = evaluate_goals(args, run, agent, global_step)
            event.after, (event.charts, event.score) = clone(agent.state_dict()), results
            return results

        def episode_charts(*arguments, episode_charts=script.episode_charts):
            note("weights", weights=clone(self.agent.state_dict()))  # after the updates, before an evaluation
            return episode_charts(*arguments)

        def log_phase(run, charts, losses, clock, global_step, log_phase=script.log_phase):
            note("log", charts=dict(charts), losses=dict(losses), global_step=global_step)
            log_phase(run, charts, losses, clock, global_step)

        def save_checkpoint(run, name, agent, save_checkpoint=script.save_checkpoint, **progress):
            note("save", name=name, weights=clone(agent.state_dict()), progress=progress)
            save_checkpoint(run, name, agent, **progress)

        def score_ahead(reward, frames, n, score_ahead=script.ClipReward.score_ahead):
            reward.ahead = True  # as on a GPU
            score_ahead(reward, frames, n)
            note("scored", chunks=len(reward.chunks), frames=n)

        allow_forks(script, patch)
        patch.setattr(script.ClipReward, "score_ahead", score_ahead)
        patch.setattr(script, "CLIP", FakeCLIP)
        patch.setattr(script, "find_clip", fake_clip)
        for spy in (make_envs, evaluate, evaluate_goals, episode_charts, log_phase, save_checkpoint):
            patch.setattr(script, spy.__name__, spy)
        for spy in (make_optimizers, act, update if self.sac else loss):
            patch.setattr(agent_class, spy.__name__, spy)
        for spy in (add, batches):
            patch.setattr(sac_vlmrm.ReplayBuffer, spy.__name__, spy)


def allow_forks(script, patch):
    """Lets a run fork its workers, which is fast, though an earlier test started OpenGL: a Probe does not use it."""
    patch.setattr(script.SceneRenderer, "opened_by", None)


def fake_clip(*_):
    """What `find_clip` returns, of a model that sees 4 x 4 pixels."""

    def tokenizer(texts):
        return torch.tensor([[len(text)] for text in texts])

    return SimpleNamespace(model={}, tokenizer=tokenizer, config=PreprocessCfg(size=4))


def flags_of(name, case):
    """The script of this name and its flags in a case."""
    script, flags = SCRIPTS[name]
    return script, COMMON | CASES[case] | flags | {"sac": SAC_CASES, "ppo": PPO_CASES}[name][case]


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """Function of a script's name and a case: a `Recording`, made when it is first asked for."""

    @functools.cache
    def record(name, case):
        script, flags = flags_of(name, case)
        return Recording(script, script.Args(**flags, run_dir=tmp_path_factory.mktemp("runs") / "run"))

    return record


BOTH = pytest.mark.parametrize("name", SCRIPTS)
EACH = pytest.mark.parametrize("case", CASES)


# ---- what must follow


def seeds_of(*key, n):
    return np.random.SeedSequence(key).generate_state(n).tolist()


def rewards_of(args, step):
    """The reward of every goal, held-out ones last, for what a step of the environments returned: [N, G + E]."""
    if args.reward == "env":
        return step.rewards[:, None]
    cosines = embed(step.pixels) @ embed_text([*args.goal, *args.eval_goal]).T
    if args.reward == "regularized":
        return cosines  # alpha is 0
    rewards = np.zeros_like(cosines)
    competing = embed(step.pixels) @ embed_text([*args.goal, *args.negatives]).T
    for g in range(cosines.shape[1]):
        rivals = np.exp(competing / args.temperature).sum(1)
        if g >= len(args.goal):
            rivals += np.exp(cosines[:, g] / args.temperature)
        rewards[:, g] = np.exp(cosines[:, g] / args.temperature) / rivals > args.threshold
    return rewards


@functools.cache
def follow(run, phase):
    """Follows a phase's environments from its resets and steps alone, and checks the resets.

    Returns arrays [T, N, ...]: `states`, `actions` as the environments got them, `next_states`, `env_rewards`,
    `rewards` of the goals that are trained on, `goal_ids`, `pursued`, the rewards for those, `terminated`, `success`
    and `ended`; `random`, the actions that the phase's own generator draws; and `weights` at its start.
    """
    args, events = run.args, iter(run.of("reset", "step", phase=phase))
    first_step, n_goals = phase * run.frames, len(args.goal)
    *starts, numpy_seed, torch_seed = seeds_of(args.seed, 0, first_step, n=args.num_envs + 2)
    rng = np.random.default_rng(numpy_seed)
    reset, rows = next(events), []
    assert (reset.kind, reset.seeds, reset.mask, reset.torch_seed) == ("reset", starts, None, torch_seed)
    states, goal_ids = reset.states, rng.integers(n_goals, size=args.num_envs)
    for t in range(run.steps):
        draws = rng.uniform(-1, 1, (args.num_envs, 2)) if explores(run, phase) else np.zeros((args.num_envs, 2))
        step = next(events)
        assert step.kind == "step"
        rewards = rewards_of(args, step)[:, :n_goals]
        pursued = rewards[np.arange(args.num_envs), goal_ids]
        success = (pursued > 0) & args.terminate_on_success
        ended = step.terminated | step.truncated | success
        row = dict(states=states, actions=step.actions, next_states=step.states, env_rewards=step.rewards)
        row |= dict(rewards=rewards, goal_ids=goal_ids, pursued=pursued, random=draws, success=success)
        rows.append(row | dict(terminated=step.terminated, ended=ended, pixels=step.pixels))
        states, next_goal_ids = step.states, rng.integers(n_goals, size=args.num_envs)
        if ended.any() and t < run.steps - 1:
            again = next(events)
            assert again.kind == "reset" and again.mask.tolist() == ended.tolist()
            assert again.seeds == seeds_of(args.seed, 0, first_step, t + 1, n=args.num_envs)
            states = np.where(ended[:, None], again.states, states)
            goal_ids = np.where(ended, next_goal_ids, goal_ids)
    assert next(events, None) is None
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return SimpleNamespace(**arrays, weights=reset.weights)


def is_due(run, phase, every):
    """Whether what is due every so many frames is due at a phase's end, as it is at the last one's."""
    start, end = phase * run.frames, (phase + 1) * run.frames
    return phase + 1 == run.phases or any(frames % every == 0 for frames in range(start + 1, end + 1))


def explores(run, phase):
    """Whether a phase's actions are drawn uniformly."""
    return run.sac and phase * run.frames < run.args.learning_starts


def collected(run, phases):
    """All states that actions were chosen in, in these many phases: [n, S]."""
    states = [follow(run, phase).states.reshape(-1, 3) for phase in range(phases)]
    return np.concatenate([np.empty((0, 3)), *states]).astype(np.float64)


def inputs_of(args, states, goal_ids, seen):
    """What the networks see of states [n, S] with the statistics of the states `seen`: float32 [n, S + D]."""
    x = np.asarray(states, np.float64)
    if args.normalize_obs and len(seen):
        x = ((x - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)).clip(-10, 10)
    goals = embed_text([*args.goal, *args.eval_goal])
    if len(args.goal) == 1:
        goals = goals[:, :0]
    else:
        centre = sum(goals[: len(args.goal)]) / len(args.goal)
        goals = (goals - centre) / np.sqrt(np.mean((goals[: len(args.goal)] - centre) ** 2))
    return torch.from_numpy(np.concatenate([x, goals[goal_ids]], 1)).float()


def network(run, weights, name, inputs):
    """A network of the agent as it was when it had these weights."""
    own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    return functional_call(getattr(run.agent, name), own, (inputs,))


def assert_close(actual, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **({"rtol": 2e-4, "atol": 2e-4} | tolerance))


def assert_same(weights, expected):
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def returns_of(run, phase, t, n, steps):
    """The discounted return of every goal over this many steps, or to the episode's or the phase's end; its last t."""
    seen, last = follow(run, phase), t
    total = seen.rewards[t, n].copy()
    while last + 1 < min(t + steps, run.steps) and not seen.ended[last, n]:
        last += 1
        total = total + run.args.gamma ** (last - t) * seen.rewards[last, n]
    return total, last


# ---- collecting, of both scripts


@BOTH
@EACH
def test_each_episode_has_a_start_and_a_goal_of_its_own(recording, name, case):
    """Resets and goals are checked in `follow`; here, that the runs hold what the other tests are about."""
    run = recording(name, case)
    phases = [follow(run, phase) for phase in range(run.phases)]
    assert run.phase + 1 == run.phases and run.first_seed == run.args.seed
    ended, terminated, success = (
        np.stack([getattr(phase, key) for phase in phases]) for key in ("ended", "terminated", "success")
    )
    assert (ended & ~terminated & ~success).any() and (name == "sac" or not ended[:, -1].all())
    assert terminated.any() == run.args.early_termination and success.any() == run.args.terminate_on_success
    pixels = np.stack([phase.pixels for phase in phases])
    assert pixels.any() == (run.args.reward != "env")  # nothing is rendered where nobody looks
    goal_ids = np.concatenate([phase.goal_ids.ravel() for phase in phases])
    assert set(goal_ids) == set(range(len(run.args.goal)))


@BOTH
@EACH
def test_the_log_is_of_the_goals_pursued_and_of_the_last_update(recording, name, case):
    """Steps, returns and lengths of the episodes that ended in a phase, each for its goal, and the losses."""
    run = recording(name, case)
    for phase in range(run.phases):
        (log,), seen = run.of("log", phase=phase), follow(run, phase)
        assert log.global_step == (phase + 1) * run.frames
        episodes = []
        for n in range(run.args.num_envs):
            start = 0
            for t in range(run.steps):
                if seen.ended[t, n] or t == run.steps - 1:
                    part = slice(start, t + 1)
                    env_return, clip_return = seen.env_rewards[part, n].sum(), seen.pursued[part, n].sum()
                    row = (bool(seen.ended[t, n]), seen.goal_ids[t, n], t + 1 - start, env_return, clip_return)
                    episodes.append(row)
                    start = t + 1
        episodes = [e for e in episodes if e[0]] or episodes
        charts = log.charts
        assert_close(charts["charts/episodic_length"], np.mean([e[2] for e in episodes]))
        assert_close(charts["charts/env_return"], np.mean([e[3] for e in episodes]))
        assert ("charts/clip_return" in charts) == (run.args.reward != "env")
        if run.args.reward != "env":
            assert_close(charts["charts/clip_return"], np.mean([e[4] for e in episodes]))
            for g, goal in enumerate(run.args.goal):
                of_goal = [e[4] for e in episodes if e[1] == g]
                assert (f"charts/clip_return/{goal}" in charts) == bool(of_goal)
                if of_goal:
                    assert_close(charts[f"charts/clip_return/{goal}"], np.mean(of_goal))
        updates = run.of("update", "loss", phase=phase)
        expected = {} if not updates else updates[-1].losses if run.sac else updates[-1].parts
        assert log.losses.keys() - {"explained_variance"} == expected.keys()
        for key, loss in expected.items():
            assert_close(log.losses[key], loss)


@BOTH
@EACH
def test_whole_chunks_are_scored_as_soon_as_their_frames_are_there(recording, name, case):
    run = recording(name, case)
    for phase in range(run.phases):
        scored = [(e.frames, e.chunks) for e in run.of("scored", phase=phase)]
        counts = range(run.args.num_envs, run.frames + 1, run.args.num_envs)
        assert scored == ([(n, n // 5) for n in counts] if case == "goals" else [])  # the others at each step, or never


@BOTH
@EACH
def test_the_learning_rate_falls_with_the_frames_or_stays(recording, name, case):
    run = recording(name, case)
    steps = [e for phase in range(run.phases) for e in run.of("gradient_step", phase=phase)]
    names = {"ppo"} if name == "ppo" else {"critic", "actor", "ent_coef"} if run.args.autotune else {"critic", "actor"}
    assert {e.name for e in steps} == names
    for phase in range(run.phases):
        share = 1.0 - phase * run.frames / run.args.total_timesteps if run.args.anneal_lr else 1.0
        rates = {e.lr for e in steps if e.phase == phase} | {
            run.of("log", phase=phase)[0].charts["charts/learning_rate"]
        }
        assert list(rates) == [pytest.approx(run.args.learning_rate * share)]


# ---- evaluation and checkpoints, of both scripts


@BOTH
@EACH
def test_evaluations_are_due_of_every_goal_and_leave_the_agent_as_it_is(recording, name, case):
    run = recording(name, case)
    n_goals = len(run.args.goal) + len(run.args.eval_goal)
    for phase in range(run.phases):
        evaluations, due = run.of("evaluation", phase=phase), is_due(run, phase, run.args.eval_every)
        assert [e.global_step for e in evaluations] == [(phase + 1) * run.frames] * due
        results = [e for e in run.events if e.kind == "result" and e.phase == phase]
        assert [e.evaluated for e in results] == list(range(n_goals)) * due
        for evaluation in evaluations:
            assert_same(evaluation.after, evaluation.before)
            assert_same(evaluation.before, run.of("weights", phase=phase)[0].weights)


def played(run, evaluation, goal):
    """Follows an evaluation's episodes for a goal by its resets and steps alone, and checks its actions.

    Returns the goal's rewards and the environment's, [episodes, T], 0 after an episode's end, and the lengths.
    """
    args, phase = run.args, evaluation.phase
    seeds, seen = seeds_of(args.seed, 1, n=args.eval_episodes + args.num_envs), collected(run, phase + 1)
    events, rows = run.of("reset", "act", "step", phase=phase, evaluated=goal), []
    starts = [i for i, e in enumerate(events) if e.kind == "reset" and e.mask is None]
    assert [events[i].seeds for i in starts] == [seeds[:3], seeds[3:6]]  # four episodes in three environments
    for part in (events[: starts[1]], events[starts[1] :]):
        states, alive, steps = part[0].states, np.ones(args.num_envs, bool), []
        for event in part[1:]:
            if event.kind == "reset":  # of environments whose episode is over, should they be played on
                states = np.where(event.mask[:, None], event.states, states)
            elif event.kind == "act":
                assert event.deterministic and set(event.goal_ids) == {goal}
                np.testing.assert_array_equal(event.states, states)
                output = network(run, evaluation.before, "actor", inputs_of(args, states, event.goal_ids, seen))
                assert_close(event.actions, torch.tanh(output[0]) if run.sac else output.clip(-1, 1), atol=1e-3)
                actions = event.actions
            else:
                np.testing.assert_array_equal(event.actions, actions)
                reward = rewards_of(args, event)[:, goal]
                steps.append((reward * alive, event.rewards * alive, alive))
                alive = alive & ~event.terminated & ~event.truncated & ~((reward > 0) & args.terminate_on_success)
                states = event.states
        assert len(steps) == args.episode_length
        rows.append(np.array(steps))  # [T, 3, N]
    goal_rewards, env_rewards, alive = np.concatenate(rows, 2).transpose(1, 2, 0)[:, : args.eval_episodes]
    return goal_rewards, env_rewards, alive.sum(1)


@BOTH
@EACH
def test_evaluation_plays_the_mode_for_each_goal_and_scores_that_goals_reward(recording, name, case):
    """From the same starts each time: its results, what is logged and saved of them, and the mean for best.pt."""
    run = recording(name, case)
    for evaluation in (e for e in run.events if e.kind == "evaluation"):
        returns, all_lengths, goals = [], [], [*run.args.goal, *run.args.eval_goal]
        for i, goal in enumerate(goals):
            goal_rewards, env_rewards, lengths = played(run, evaluation, i)
            (result,) = run.of("result", phase=evaluation.phase, evaluated=i)
            np.testing.assert_array_equal(result.lengths, lengths)
            assert_close(result.env_rewards, env_rewards)
            curve = f"/{goal}" if len(goals) > 1 else ""
            assert_close(evaluation.charts[f"eval/env_return{curve}"], env_rewards.sum(1).mean())
            assert_close(evaluation.charts[f"eval/episodic_length{curve}"], lengths.mean())
            returns.append(goal_rewards.sum(1).mean())
            all_lengths.append(lengths.mean())
            if run.args.reward != "env":
                assert_close(result.clip_rewards, goal_rewards)
                assert_close(evaluation.charts[f"eval/clip_return{curve}"], returns[-1])
                rollout = np.load(run.dir / "rollouts" / f"{evaluation.global_step}-{goal}.npz")
                assert_close(rollout["clip_rewards"], goal_rewards)
            if run.args.reward == "binary":
                reached = np.mean([rewards.any() for rewards in goal_rewards])
                assert_close(evaluation.charts[f"eval/success_rate{curve}"], reached)
        mean_return, mean_length = (np.mean(x[: len(run.args.goal)]) for x in (returns, all_lengths))
        pace = -mean_length if run.args.terminate_on_success else 0.0
        assert evaluation.score == pytest.approx((mean_return, pace), abs=1e-3)
        (log,) = run.of("log", phase=evaluation.phase)
        assert evaluation.charts.items() <= log.charts.items()


@BOTH
@EACH
def test_checkpoints_are_due_and_hold_what_the_run_was_at(recording, name, case):
    run, saved_rows = recording(name, case), 0
    for phase in range(run.phases):
        frames, due = (phase + 1) * run.frames, is_due(run, phase, run.args.checkpoint_every)
        if run.sac and frames - saved_rows + run.frames > run.args.buffer_size:  # or the buffer would lose rows
            due = True
        saves = [e for e in run.of("save", phase=phase) if e.name == "checkpoint.pt"]
        assert len(saves) == due
        saved_rows = frames if due else saved_rows
        for save in saves:
            assert_same(save.weights, run.of("weights", phase=phase)[0].weights)
            scores = [e.score for e in run.events if e.kind == "evaluation" and e.phase <= phase]
            expected = dict(global_step=frames, best_score=max(scores, default=(-math.inf, 0.0)))
            if run.sac:
                owed = frames_to_learn_from(run, phase) * run.args.updates_per_frame
                expected |= dict(buffer_total=frames, owed_updates=pytest.approx(owed - math.floor(owed + 1e-6)))
            assert save.progress == expected
    content = load(run.dir)
    assert_same(content.pop("agent"), save.weights)
    optimizers = content.pop("optimizers")
    goals = np.zeros((1, 0)) if case == "env" else embed_text([*run.args.goal, *run.args.eval_goal])
    assert_close(content.pop("goal_embeddings").numpy(), goals)
    versions = content.pop("versions")
    assert versions["torch"] == torch.__version__ and len(versions) == 4
    assert content == save.progress
    assert optimizers.keys() == run.agent.optimizers.keys()
    for key, optimizer in optimizers.items():
        steps = [e for e in run.events if e.kind == "gradient_step" and e.name == key]
        assert {state["step"].item() for state in optimizer["state"].values()} == ({len(steps)} if steps else set())


def frames_to_learn_from(run, phase):
    """The frames up to this phase's end for which updates are owed."""
    ends = [(k + 1) * run.frames for k in range(phase + 1)]
    return run.frames * sum(end >= run.args.learning_starts for end in ends)


@BOTH
def test_best_pt_is_the_agent_of_the_highest_score_and_of_equals_the_later_also_of_a_resumed_run(
    name, tmp_path, monkeypatch
):
    script, flags = flags_of(name, "env")
    phase = 24 if name == "sac" else 60
    scores = [(-5, 0), (-1, 0), (-1, -9), (3, -9), (2.5, 0), (2.9, 0), (2, 0), (3, -8), (3, -8), (3, -9)]
    seen, scores = [], iter(scores)

    def evaluate_goals(args, run, agent, global_step):
        seen.append((next(scores), global_step, clone(agent.state_dict())))
        return {"eval/env_return": seen[-1][0][0]}, seen[-1][0]

    def check(best, n):
        assert len(seen) == n
        saved, latest = load(tmp_path / "run", "best.pt"), load(tmp_path / "run")
        assert saved["best_score"] == latest["best_score"] == seen[best][0]
        assert saved["global_step"] == seen[best][1] == (best + 1) * phase and latest["global_step"] == n * phase
        assert_same(saved["agent"], seen[best][2])
        assert_same(latest["agent"], seen[-1][2])
        if name == "sac":
            assert latest["owed_updates"] == pytest.approx(n * phase * 0.27 % 1)

    allow_forks(script, monkeypatch)
    monkeypatch.setattr(script, "evaluate_goals", evaluate_goals)
    flags |= dict(eval_every=1)
    script.train(script.Args(**flags | dict(run_dir=tmp_path / "run", total_timesteps=5 * phase)))
    check(best=3, n=5)
    assert any(not torch.equal(seen[3][2][key], seen[4][2][key]) for key in seen[3][2])
    for best, n in ((3, 7), (8, 10)):
        script.train(script.Args(**flags | dict(resume=tmp_path / "run", total_timesteps=n * phase)))
        check(best, n)


# ---- SAC


SAC_EACH = pytest.mark.parametrize("case", CASES, ids=[f"sac-{case}" for case in CASES])


@SAC_EACH
def test_actions_are_uniform_before_learning_starts_and_the_agents_afterwards(recording, case):
    run = recording("sac", case)
    for phase in range(run.phases):
        seen, acts = follow(run, phase), run.of("act", phase=phase)
        if phase * run.frames < run.args.learning_starts:
            assert not acts and phase <= 1
            assert_close(seen.actions, seen.random, rtol=1e-6, atol=1e-7)
            continue
        assert len(acts) == run.steps and not any(e.deterministic for e in acts)
        np.testing.assert_array_equal(seen.actions, [e.actions for e in acts])
        np.testing.assert_array_equal(seen.states, [e.states for e in acts])
        np.testing.assert_array_equal(seen.goal_ids, [e.goal_ids for e in acts])
        inputs = inputs_of(run.args, seen.states.reshape(-1, 3), seen.goal_ids.ravel(), collected(run, phase))
        mean, log_std = network(run, seen.weights, "actor", inputs)
        noise = (torch.from_numpy(seen.actions).reshape(-1, 2).clip(-0.9999, 0.9999).atanh() - mean) / log_std.exp()
        assert noise.mean().abs() < 0.5 < noise.std() < 1.5  # a sample of the policy, not its mode


@SAC_EACH
def test_the_buffer_holds_what_n_steps_lead_to_for_every_goal(recording, case):
    """The last rows: state, action, every goal's reward, the state reached, what that one's value counts, the goal."""
    run = recording("sac", case)
    args, buffer = run.args, run.buffer
    assert buffer.total == run.phases * run.frames and buffer.capacity == args.buffer_size
    kinds = set()
    for row in range(max(0, buffer.total - buffer.capacity), buffer.total):
        phase, (t, n) = row // run.frames, divmod(row % run.frames, args.num_envs)
        seen = follow(run, phase)
        rewards, last = returns_of(run, phase, t, n, args.n_step)
        discount = 0.0 if seen.terminated[last, n] else args.gamma ** (last + 1 - t)
        expected = [*seen.states[t, n], *seen.actions[t, n], *rewards]
        expected += [*seen.next_states[last, n], discount, seen.goal_ids[t, n]]
        assert_close(buffer.rows[row % buffer.capacity], expected, rtol=1e-5, atol=1e-5)
        kinds.add((last - t, bool(seen.terminated[last, n])))
    terminates = {True, False} if args.early_termination else {False}
    assert kinds == {(k, terminal) for k in range(args.n_step) for terminal in terminates}


@SAC_EACH
def test_statistics_are_those_of_the_collected_states(recording, case):
    run = recording("sac", case)
    for phase in range(run.phases):
        before, after = follow(run, phase).weights, run.of("weights", phase=phase)[0].weights
        updates = run.of("update", phase=phase)
        rewards = np.concatenate([follow(run, k).rewards.reshape(-1, len(run.args.goal)) for k in range(phase + 1)])
        assert after["reward_stats.count"] == len(rewards)
        assert_close(after["reward_stats.mean"], rewards.mean(0), rtol=1e-5, atol=1e-6)
        assert_close(after["reward_stats.var"], rewards.var(0), rtol=1e-5, atol=1e-6)
        for weights, phases in ((before, phase), (after, phase + 1), *((e.before, phase + 1) for e in updates)):
            if not run.args.normalize_obs:
                assert not any(key.startswith("normalizer") for key in weights)
                continue
            states = collected(run, phases)
            assert weights["normalizer.count"] == len(states)
            if len(states):
                assert_close(weights["normalizer.mean"], states.mean(0), rtol=1e-6, atol=1e-6)
                assert_close(weights["normalizer.var"], states.var(0), rtol=1e-6, atol=1e-6)


@SAC_EACH
def test_updates_are_those_owed_on_batches_of_what_was_asked_for(recording, case):
    """As many as the frames owe; of rows of all phases so far, with the reward of each row's goal, swapped or not."""
    run = recording("sac", case)
    args, owed, swapped, phases_seen = run.args, 0, [], set()
    further = set()  # by how many goals
    row_of = {}
    for phase in range(run.phases):
        seen = follow(run, phase)
        for t, n in np.ndindex(run.steps, args.num_envs):
            row_of[seen.states[t, n].tobytes()] = (phase, t, n)
        samples, updates = run.of("sample", phase=phase), run.of("update", phase=phase)
        total = math.floor(frames_to_learn_from(run, phase) * args.updates_per_frame + 1e-6)
        assert len(updates) == total - owed and [id(e.batch) for e in updates] == [id(e.batch) for e in samples]
        owed = total
        for sample in samples:
            assert (sample.batch_size, sample.relabel) == (args.batch_size, args.relabel)
            batch = {name: value.numpy() for name, value in sample.batch.items()}
            assert len(batch["states"]) == args.batch_size
            for i, state in enumerate(batch["states"]):
                of_phase, t, n = row_of[state.tobytes()]
                there = follow(run, of_phase)
                goal, (rewards, last) = batch["goal_ids"][i], returns_of(run, of_phase, t, n, args.n_step)
                discount = 0.0 if there.terminated[last, n] else args.gamma ** (last + 1 - t)
                assert_close(batch["actions"][i], there.actions[t, n])
                assert_close(batch["rewards"][i], rewards[goal])
                assert_close(batch["next_states"][i], there.next_states[last, n])
                assert_close(batch["discounts"][i], discount)
                swapped.append(goal != there.goal_ids[t, n])
                assert batch["own"][i] != swapped[-1]
                further.add((goal - there.goal_ids[t, n]) % len(args.goal))
                phases_seen.add((phase, of_phase))
    assert owed > 5
    assert np.mean(swapped) == pytest.approx(args.relabel if case == "goals" else 0.0, abs=0.1)
    assert further == set(range(len(args.goal) if args.relabel else 1))
    first = 1 if args.learning_starts > run.frames else 0  # the phase after which the first update is
    held = args.buffer_size // run.frames + (args.buffer_size % run.frames > 0)  # phases that the buffer has rows of
    expected = {(p, q) for p in range(first, run.phases) for q in range(max(0, p + 1 - held), p + 1)}
    assert phases_seen <= expected and {(p, p) for p, _ in phases_seen} <= phases_seen
    assert min(q for _, q in phases_seen) == 0


@SAC_EACH
def test_targets_follow_by_tau_and_the_entropy_coefficient_starts_where_asked(recording, case):
    run = recording("sac", case)
    updates = [e for phase in range(run.phases) for e in run.of("update", phase=phase)]
    assert updates[0].losses["ent_coef"].item() == pytest.approx(run.args.ent_coef)
    assert (updates[-1].losses["ent_coef"] == updates[0].losses["ent_coef"]) == (not run.args.autotune)
    for e in updates:
        for key in (key for key in e.after if key.startswith("critic.")):
            slow = key.replace("critic.", "critic_target.")
            expected = (1 - run.args.tau) * e.before[slow] + run.args.tau * e.after[key]
            assert_close(e.after[slow], expected, rtol=1e-5, atol=1e-6)


# ---- PPO


PPO_EACH = pytest.mark.parametrize("case", CASES, ids=[f"ppo-{case}" for case in CASES])


@functools.cache
def rollout_of(run, phase):
    """What a phase of PPO has to learn from, recomputed: [T, N, ...]."""
    args, seen = run.args, follow(run, phase)
    shape, before = (run.steps, args.num_envs), collected(run, phase)
    goal_ids = seen.goal_ids.ravel()
    inputs = inputs_of(args, seen.states.reshape(-1, 3), goal_ids, before).view(*shape, -1)
    values = network(run, seen.weights, "critic", inputs.flatten(0, 1)).view(shape).numpy().astype(float)
    means = network(run, seen.weights, "actor", inputs.flatten(0, 1)).view(*shape, 2)
    last_inputs = inputs_of(args, seen.next_states.reshape(-1, 3), goal_ids, before)
    last_values = network(run, seen.weights, "critic", last_inputs).view(shape).numpy().astype(float)

    rewards = seen.pursued.astype(float)
    if args.normalize_reward:
        rewards = (rewards / np.sqrt(np.var(discounted_returns(run, phase + 1)) + 1e-8)).clip(-10, 10)
    terminal, cut = seen.terminated | seen.success, seen.ended.copy()
    cut[-1] = True
    advantages = np.zeros(shape)
    for t, n in np.ndindex(shape):
        for k in range(t, run.steps):
            following = last_values[k, n] if cut[k, n] else values[k + 1, n]
            delta = rewards[k, n] - values[k, n] + (0.0 if terminal[k, n] else args.gamma * following)
            advantages[t, n] += (args.gamma * args.gae_lambda) ** (k - t) * delta
            if cut[k, n]:
                break
    learned = dict(values=values, advantages=advantages, returns=advantages + values)
    return SimpleNamespace(inputs=inputs, means=means, **learned)


def discounted_returns(run, phases):
    """The sum of what each step's episode has brought so far, discounted, in these many phases."""
    returns = []
    for seen in (follow(run, phase) for phase in range(phases)):
        for n in range(run.args.num_envs):
            total = 0.0
            for t in range(run.steps):
                total = seen.pursued[t, n] + run.args.gamma * total
                returns.append(total)
                total = 0.0 if seen.ended[t, n] else total
    return np.array(returns)


def rows_of(batch, inputs, actions):
    """The place among these rows of a rollout of each row of a batch."""
    rows = torch.cat([batch["inputs"], batch["actions"].clip(-1, 1)], 1).double()
    nearest = torch.cdist(rows, torch.cat([inputs, actions], 1).double()).min(1)
    assert nearest.values.max() < 1e-3
    return nearest.indices


@PPO_EACH
def test_minibatches_are_the_rollout_once_an_epoch_with_its_advantages(recording, case):
    """Inputs with their goal's embedding, actions, log-probabilities, values, advantages and returns."""
    run = recording("ppo", case)
    args = run.args
    for phase in range(run.phases):
        losses, rollout, seen = run.of("loss", phase=phase), rollout_of(run, phase), follow(run, phase)
        assert len(losses) == args.update_epochs * args.num_minibatches
        orders, noise = [], []
        for epoch in range(args.update_epochs):
            batches = [e.batch for e in losses[epoch * args.num_minibatches :][: args.num_minibatches]]
            sizes = [len(batch["inputs"]) for batch in batches]
            assert max(sizes) - min(sizes) <= 1
            batch = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
            rows = rows_of(batch, rollout.inputs.flatten(0, 1), torch.from_numpy(seen.actions).flatten(0, 1))
            assert sorted(rows.tolist()) == list(range(run.frames))
            orders.append(tuple(rows.tolist()))
            assert_close(batch["inputs"], rollout.inputs.flatten(0, 1)[rows], atol=1e-3)
            for key in ("values", "advantages", "returns"):
                assert_close(batch[key], getattr(rollout, key).ravel()[rows], atol=1e-3)
            assert_close(batch["actions"].clip(-1, 1), seen.actions.reshape(-1, 2)[rows], atol=1e-6)
            normal = torch.distributions.Normal(rollout.means.flatten(0, 1)[rows], seen.weights["log_std"].exp())
            assert_close(batch["log_probs"], normal.log_prob(batch["actions"]).sum(1), atol=1e-3)
            noise.append(((batch["actions"] - normal.mean) / normal.stddev).numpy())
        assert len(set(orders)) == args.update_epochs
        assert abs(np.mean(noise)) < 0.35 and 0.75 < np.std(noise) < 1.25  # a sample of the policy, not its mode
        (log,) = run.of("log", phase=phase)
        explained = 1.0 - rollout.advantages.var() / rollout.returns.var()
        assert_close(log.losses["explained_variance"], explained, atol=0.01 * (1 + abs(explained)))


@PPO_EACH
def test_gradients_are_clipped_to_their_norm(recording, case):
    run = recording("ppo", case)
    losses, steps = ([e for e in run.events if e.kind == kind] for kind in ("loss", "gradient_step"))
    for loss, step in zip(losses, steps, strict=True):
        assert step.gradient.norm().item() == pytest.approx(min(loss.norm, run.args.max_grad_norm), rel=1e-3)
    assert all((e.norm > run.args.max_grad_norm) == (case != "success") for e in losses)


@PPO_EACH
def test_statistics_are_those_of_the_collected_states_and_of_the_discounted_returns(recording, case):
    run = recording("ppo", case)
    for phase in range(run.phases):
        weights = run.of("weights", phase=phase)[0].weights
        states, returns = collected(run, phase + 1), discounted_returns(run, phase + 1)
        assert weights["reward_stats.count"] == 0  # only where episodes never end early
        if run.args.normalize_obs:
            assert weights["normalizer.count"] == len(states)
            assert_close(weights["normalizer.mean"], states.mean(0), rtol=1e-6, atol=1e-6)
            assert_close(weights["normalizer.var"], states.var(0), rtol=1e-6, atol=1e-6)
        else:
            assert not any(key.startswith("normalizer") for key in weights)
        assert weights["return_stats.count"] == (len(returns) if run.args.normalize_reward else 0)
        if run.args.normalize_reward:
            assert_close(weights["return_stats.var"], returns.var(), rtol=1e-4)
