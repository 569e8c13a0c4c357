"""Changes single lines of the training scripts, one at a time, and says which changes the tests do not notice.

    python tests/tools/mutate.py [NAME ...]

Each mutant is a copy of the repository in which one text of a script, which must occur there exactly once, is another.
tests/test_wiring.py must fail, or the script's quick unit tests. NAMEs choose mutants by a part of their line below.
What those do not notice is left to tests/test_torchrun.py. The exit status is 1 if a mutant survives or cannot be
made. It takes some 10 s a mutant, or a minute, and is not part of the gate.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNIT_TESTS = {
    "sac": [
        "tests/test_sac_vlmrm.py",
        "-k",
        "update_matches or targets or n_step or wraps or running_norm or squashed or do_not_depend or reward_is_scaled",
    ],
    "ppo": [
        "tests/test_ppo_vlmrm.py",
        "-k",
        "gae or endless or loss_matches or scaled_by or shifted_by or in_bounds or do_not_depend",
    ],
}

# The script, what is broken, the text and what takes its place.
MUTANTS = """
ppo | truncation is not bootstrapped | torch.from_numpy(terminated).to(device).float(), cut => cut.float(), cut
ppo | next_values are not shifted | values.roll(-1, 0) => values.clone()
both | the reward of goal 0 for all goals | rewards, goal_ids[..., None], -1) => rewards, 0 * goal_ids[..., None], -1)
ppo | the policy sees goal 0 | torch.from_numpy(goal_id).to(device)) => torch.from_numpy(0 * goal_id).to(device))
ppo | no gradient clipping | nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm) => pass
ppo | no reward scaling | if args.normalize_reward: => if False:
both | best.pt keeps the worst | score >= best_score => not score >= best_score > (-1e9, 0.0)
sac | n-step bootstraps from the wrong state | "next_states": reached => "next_states": next_states
sac | terminated is always false | next_states, terminated, ended) => next_states, terminated & False, ended)
sac | gamma is hard-coded | (*outcome, args.gamma, => (*outcome, 0.98,
sac | relabel is not passed on | args.batch_size, args.relabel) => args.batch_size)
sac | the normaliser is never updated | agent.normalizer.update(torch => (torch
sac | acts for goal 0 | agent.act(state, goal_id) => agent.act(state, 0 * goal_id)
both | evaluation is not deterministic | goal_id), deterministic=True) => goal_id))
both | best.pt is the latest | best_score = score => best_score = (-math.inf, 0.0)
both | best.pt keeps the earliest of equals | score >= best_score => score > best_score
both | the slower of equals is as good | if args.terminate_on_success else 0.0) => if False else 0.0)
both | versions are not kept | "versions": VERSIONS, => "versions": {},
both | networks of another seed | torch.manual_seed(args.seed) => torch.manual_seed(0)
both | noise depends on what was before | torch.manual_seed(torch_seed) => pass
both | every phase has the same starts | args.seed, 0, first_step, n= => args.seed, 0, 0, n=
both | later episodes have the same starts | first_step, t + 1, n= => first_step, 1, n=
both | goals change within an episode | = np.where(ended[t], next_goal_id => = np.where(True, next_goal_id
both | one episode's end ends all | "reset_mask": ended[t]} => "reset_mask": ended[t] | True}
both | goal 0's success ends an episode | np.arange(args.num_envs), goal_id] > 0 => np.arange(args.num_envs), 0] > 0
both | truncation does not end an episode | ended[t] = terminated[t] | truncated => ended[t] = terminated[t]
both | charts are of goal 0 | env_rewards, pursued if => env_rewards, rewards[..., 0] if
both | nothing is evaluated before the end | = last or global_step // args.eval_every > => = last and global_step >
both | a checkpoint each phase | > first_step // args.checkpoint_every => > 0 * first_step
both | the learning rate stays | (1.0 - first_step / args.total_timesteps) => 1.0
both | the learning rate is annealed unasked | if args.anneal_lr: => if True:
both | the learning rate is the next phase's | (1.0 - first_step / args => (1.0 - global_step / args
both | a resumed run forgets its best return | run.saved["best_score"] => (-math.inf, 0.0)
sac | updates from the first phase on | if global_step >= args.learning_starts: => if True:
sac | learning starts a phase late | if global_step >= args.learning_starts: => if global_step > args.learning_starts:
sac | timid exploration | np_rng.uniform(-1.0, 1.0, => np_rng.uniform(-0.5, 0.5,
sac | fractions of updates are lost | owed_updates += phase_frames => owed_updates = phase_frames
sac | statistics of the states reached | update(torch.from_numpy(states) => update(torch.from_numpy(next_states)
sac | states are those reached | next_states[t] = state = obs => next_states[t] = states[t] = state = obs
sac | one step for n | *outcome, args.gamma, args.n_step) => *outcome, args.gamma, 1)
sac | two of three learning rates stay | in agent.optimizers.values(): => in [agent.optimizers["actor"]]:
sac | rows not on disk are overwritten | buffer.total - buffer.saved + phase_frames => buffer.total - buffer.saved
sac | a resumed run forgets what it owes | run.saved["owed_updates"] => 0.0
sac | statistics of rewards are not kept | agent.reward_stats.update(torch => (torch
sac | goal 0's scale for all goals | x.float()[batch["goal_ids"]] for x => x.float()[0 * batch["goal_ids"]] for x
sac | the mean of n rewards once | returns - mean * steps => returns - mean
sac | the environment's rewards are scaled | args.reward not in ("binary", "env"): => True:
sac | shifted where episodes end early | if not args.early_termination and args.gamma < 1.0: => if args.gamma < 1.0:
sac | goals are swapped for the next one only | torch.randint(1, max(n_goals, 2), => torch.randint(1, 2,
sac | outliers are not clipped | .rsqrt()).clamp(-10.0, 10.0) => .rsqrt())
ppo | shifted by the rollout's own mean | rewards - self.reward_stats.mean.float() => rewards - rewards.mean()
ppo | advantages are normalised unasked | if args.norm_adv and => if
ppo | the value is clipped unasked | if args.clip_vloss: => if True:
ppo | the value's weight is hard-coded | args.vf_coef * value_loss => 0.5 * value_loss
sac | rewards are not scaled | = self.scaled_rewards(batch) + => = batch["rewards"] +
ppo | shifted where episodes end early | "env") and not self.args.early_termination: => "env"):
sac | tau is hard-coded | list(fast), self.args.tau) => list(fast), 0.005)
sac | entropy is a cost | - ent_coef * next_log_prob => + ent_coef * next_log_prob
sac | the coefficient is tuned unasked | if self.args.autotune: => if True:
sac | the coefficient is tuned away | -(self.log_ent_coef * => (self.log_ent_coef *
sac | entropy of swapped goals counts | * batch["own"]  # [B] => * 1.0  # [B]
sac | one entropy for all goals | (of_goal * gaps).mean(1) => gaps.mean()
sac | all rows are their own goal's | "own": goal_ids == pursued => "own": goal_ids >= 0
sac | the coefficient starts at 1 | math.log(args.ent_coef))) => 0.0))
sac | what n steps reach counts too much | gamma ** (k + 1) => gamma**k
sac | n steps run past an episode's end | goes_on[:-k] &= ~ended[k:] => goes_on[:-k] &= True
sac | rows have goal 0's reward | .gather(1, goal_ids[:, None]) => .gather(1, 0 * goal_ids[:, None])
sac | what is not to be swapped is | device=device) < relabel => device=device) > relabel
sac | only half of the buffer is sampled | torch.randint(min(self.total, => torch.randint(min(self.total // 2,
both | frames are scored too early | frames, (t + 1) * pixels.shape[1] => frames, (t + 2) * pixels.shape[1]
both | part of a chunk is scored ahead | // self.chunk_size * self.chunk_size] => // 1]
both | what was scored is scored again | range(self.chunk_size * len(self.chunks), len => range(0, len
both | nothing is scored ahead | clip_reward.score_ahead(frames => (frames
ppo | actions are not sampled | actions[t] = policy.sample() => actions[t] = policy.mean
ppo | statistics of the rollout are not kept | agent.normalizer.update(torch => (torch
ppo | probabilities of clipped actions | policy.log_prob(actions[t]) => policy.log_prob(actions[t].clamp(-1, 1))
ppo | success is bootstrapped | terminated[t] |= rewards => truncated |= rewards
ppo | the rollout's end is not bootstrapped | last_steps[-1] = True => pass
ppo | the next episode's value is bootstrapped | next_values[cut] = agent.value => _ = agent.value
ppo | bootstrapped for goal 0 | torch.from_numpy(goal_ids[last_steps]) => torch.from_numpy(0 * goal_ids[last_steps])
ppo | truncated returns go on | pursued_goals, cut.float()) => pursued_goals, 0 * cut.float())
ppo | scaled by goal 0's rewards | of_all_goals, pursued_goals, cut => of_all_goals, 0 * pursued_goals, cut
ppo | one mean for all goals | rewards - self.reward_stats.mean.float() => rewards - self.reward_stats.mean.mean()
ppo | gamma for lambda | *ends, args.gamma, args.gae_lambda) => *ends, args.gamma, args.gamma)
ppo | returns without the value | returns = advantages + values => returns = advantages
ppo | minibatches are not shuffled | torch.randperm(phase_frames, => torch.arange(phase_frames,
ppo | a minibatch an epoch | tensor_split(args.num_minibatches) => tensor_split(1)
ppo | gradients pile up | optimizer.zero_grad() => pass
ppo | the ratio is not clipped | advantages * clipped_ratio => advantages * ratio
ppo | advantages leak across episodes | gae_lambda * (1.0 - ended[t]) => gae_lambda * (1.0 - terminated[t])
ppo | returns run on across episodes | discounted * (1.0 - ended[t]) => discounted
both | evaluates goal 0 | np.full(args.num_envs, goal_id) => np.full(args.num_envs, 0)
both | scores goal 0 | run.frame_shape), [goal_id]) => run.frame_shape), [0])
both | the same episodes again | seeds[first : first + args.num_envs] => seeds[: args.num_envs]
both | rewards after an episode's end | steps[name] * steps["alive"] => steps[name]
both | success does not end an evaluation | ended |= steps["clip_rewards"] > 0 => pass
both | more episodes than asked for | for part in rounds])[: args.eval_episodes] => for part in rounds])
both | evaluations start elsewhere | episode_seeds(args.seed, 2 if => episode_seeds(global_step, 2 if
both | held-out goals choose best.pt | np.mean(returns[: len(args.goal)]) => np.mean(returns)
both | best.pt by the environment's reward | result.get("clip_rewards", result["env_rewards"]) => result["env_rewards"]
both | other processes' transitions are lost | array.copy_(torch.cat([part[i] for part in parts], 1)) => pass
both | other processes act by an old agent | dist.broadcast(values, 0) => pass
both | other processes' episodes are not evaluated | rounds += gather(steps) => rounds += [gather(steps) and steps]
both | other processes' rewards are lost | rewards[:, run.mine] = clip_reward => _ = clip_reward
"""


def parse(line):
    scripts, what, change = line.split(" | ", 2)
    return [(script, what, *change.split(" => ")) for script in ("sac", "ppo") if scripts in (script, "both")]


def first_failure(folder, *tests):
    """Runs tests in a copy of the repository: the name of the first that fails, or None."""
    line = [sys.executable, "-m", "pytest", "-x", "-q", *tests]
    wide = {**os.environ, "COLUMNS": "300"}  # or pytest cuts off why a test failed
    result = subprocess.run(line, cwd=folder, env=wide, capture_output=True, text=True, timeout=600)
    if result.returncode not in (0, 1):
        sys.exit(f"pytest could not run:\n{result.stdout}{result.stderr}")
    return re.search(r"^FAILED \S+?::(.*)", result.stdout, re.MULTILINE)[1] if result.returncode else None


def main(names):
    lines = [line for line in MUTANTS.splitlines() if line and (not names or any(name in line for name in names))]
    mutants, bad = [mutant for line in lines for mutant in parse(line)], int(not lines)  # none so named is bad as well
    with tempfile.TemporaryDirectory() as folder:
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for script, what, old, new in [(script, "nothing", "", "") for script in UNIT_TESTS] + mutants:
            path = Path(folder) / f"{script}_vlmrm.py"
            source = path.read_text()
            if old and source.count(old) != 1:
                verdict = f"CANNOT BE MADE, its text occurs {source.count(old)} times"
            else:
                path.write_text(source.replace(old, new) if old else source)
                failed = first_failure(folder, "tests/test_wiring.py", "-k", script)
                failed = failed or first_failure(folder, *UNIT_TESTS[script])
                failed = failed or first_failure(folder, "tests/test_torchrun.py", "-k", f"change_the_run and {script}")
                path.write_text(source)
                verdict = f"noticed by {failed}" if failed else "SURVIVES" if old else "the tests pass"
                if failed and not old:
                    sys.exit(f"{script}: the tests fail without a mutant: {failed}")
            bad += verdict.startswith(("SURVIVES", "CANNOT"))
            print(f"{script}: {what}: {verdict}", flush=True)
    print(f"{len(mutants)} mutants, {bad} not noticed")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
