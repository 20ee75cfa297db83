"""What an RL run writes down as it goes: metrics, samples, pass@k on problems held out, checkpoints; and its guard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from actors.evaluate import evaluate_task
from actors.learner import LearnerGroup
from actors.rollout import RolloutPool
from actors.stream import GroupSource
from rayllm.config.chat_schema import TaskConfig
from rayllm.config.rl_schema import RLConfig
from rayllm.runs.atomic import write_atomic
from rayllm.runs.checkpoint import Checkpoint, latest_checkpoint
from rayllm.runs.load import load_tokenizer
from rayllm.runs.places import below
from rayllm.runs.run_dir import RunDir
from rayllm.runs.tracking import Tracker
from rayllm.training.guard import CollapseGuard
from rayllm.training.loop import Metrics, is_due
from rayllm.training.phases import PhaseClock
from rayllm.training.saved_rollouts import render_samples, save_groups
from rayllm.types import RolloutGroup


class Journal:
    """`validation` holds the newest validation's metrics, also after a resume. Without a pool nothing is validated,
    without learners nothing is saved."""

    def __init__(
        self,
        config: RLConfig,
        run_dir: RunDir,
        pool: RolloutPool | None,
        learners: LearnerGroup | None,
        source: GroupSource,
        tracker: Tracker,
        checkpoint: Checkpoint,
        first_step: int,
    ) -> None:
        self._config, self._run_dir = config, run_dir
        self._pool, self._learners, self._source, self._tracker = pool, learners, source, tracker
        self._tokenizer = load_tokenizer(checkpoint)
        metrics = checkpoint.state.get("metrics")
        self.validation: Metrics = dict(metrics) if isinstance(metrics, dict) else {}
        self._best_place = str(below(run_dir.checkpoints, "best"))
        best = latest_checkpoint(self._best_place)
        is_of_past = best is not None and best.step <= first_step  # else the run was killed later than it goes on from
        self._guard = CollapseGuard(config.guard, best.state["metrics"] if best and is_of_past else None)  # type: ignore[arg-type]
        self._clock = PhaseClock()
        self._counters = {} if pool is None else pool.read_counters()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time spent within is of this phase of the step."""
        return self._clock.phase(name)

    def record(self, step: int, metrics: Metrics, groups: Sequence[RolloutGroup]) -> None:
        """After a step (counted from 1): log it; validate, show and save where that is due; go back to the best
        weights where the policy has left them."""
        config, is_last = self._config, step == self._config.num_steps
        self._tracker.log(step, metrics | self._times(metrics, groups))
        reason = self._guard.look_at_step(metrics)
        if is_due(step, config.eval_every, is_last):
            with self.phase("evaluate"):
                reason = self.validate(step) or reason
        if is_due(step, config.samples_every, is_last) and config.samples_every is not None:
            self._show(step, groups)
        if reason is not None:
            self._roll_back(step, reason)
        if self._learners is not None and is_due(step, config.save_every, is_last):
            with self.phase("checkpoint"):
                self._learners.save(
                    self._run_dir.checkpoints, config.keep_checkpoints, step, self.validation, self._source.num_prompts
                )

    def validate(self, step: int) -> str | None:
        """pass@k on the validation problems, the same draws every time. Returns why the policy is to go back, if it
        is; the best one so far is saved."""
        if self._pool is None:
            return None
        self._source.settle()
        self.validation = self._evaluate(self._config.validation, "val")
        self._tracker.log(step, self.validation)
        reason = self._guard.look_at_validation(self.validation)
        if self._guard.is_best(self.validation) and self._learners is not None:
            self._learners.save(self._best_place, 1, step, self.validation, self._source.num_prompts)
        return reason

    def finish(self) -> None:
        """After the last step: the test split, once, and what the validations say together."""
        if self._pool is not None and self._config.test_at_end:
            self._source.settle()
            test = replace(self._config.validation, split="test")
            self._tracker.log(self._config.num_steps, self._evaluate(test, "test"))
        if self._learners is not None:
            self._learners.flush()

    def _evaluate(self, task: TaskConfig, prefix: str) -> Metrics:
        config = self._config
        assert self._pool is not None
        report = evaluate_task(self._pool, task, config.eval_samples, config.max_tokens, config.seed)
        metrics = {f"{prefix}/pass@{k}": estimate.value for k, estimate in report.pass_at_k.items()}
        metrics |= {f"{prefix}/pass@{k}_stderr": estimate.stderr for k, estimate in report.pass_at_k.items()}
        metrics |= {f"{prefix}/greedy": report.greedy.value, f"{prefix}/greedy_stderr": report.greedy.stderr}
        return metrics | {f"{prefix}/num_failed": float(report.num_failed)}

    def _roll_back(self, step: int, reason: str) -> None:
        """To the best weights, and on from there at half the rates; what was sampled ahead is given up."""
        if self._learners is None or self._guard.best is None:  # no best of this run's past
            return
        self._learners.flush()
        best = latest_checkpoint(self._best_place)
        if best is None:
            return
        print(f"rl: step {step}: {reason}; back to step {best.step}, rates halved", file=sys.stderr)
        self._source.settle()
        self._learners.roll_back(best.address)
        self._source.restart()
        self._source.publish(self._learners, step)
        self.validation = dict(self._guard.best)
        self._tracker.log(step, {"guard/rolled_back_to": float(best.step)})
        self._tracker.log_text(step, "guard", reason)

    def _times(self, metrics: Metrics, groups: Sequence[RolloutGroup]) -> Metrics:
        """Where the step's time went, how long rollouts and learners had nothing to do, and how fast each was."""
        wall_s, phases = self._clock.read()
        times = {f"time/{name}_s": seconds for name, seconds in phases.items()}
        times |= {f"time/{name}_share": seconds / wall_s for name, seconds in phases.items()}
        times |= {"time/step_s": wall_s, "time/learners_idle_share": 1 - phases.get("learn", 0.0) / wall_s}
        if self._pool is None:
            return times
        before, self._counters = self._counters, self._pool.read_counters()
        counted = {name: number - before.get(name, 0.0) for name, number in self._counters.items()}
        busy_s = counted.pop("busy_s") / self._config.rollouts.num_actors
        num_tokens = sum(len(r.completion.token_ids) for group in groups for r in group.rollouts)
        times |= {f"rollout/{name}": number for name, number in counted.items()}
        times |= {"time/rollouts_idle_share": max(0.0, 1 - busy_s / wall_s)}
        return times | {
            "rollout/tokens_per_s": num_tokens / busy_s if busy_s else 0.0,
            "train/tokens_per_s": metrics.get("train/num_tokens", 0.0) / wall_s,
        }

    def _show(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Samples to be read, and the groups with what the learners made of each token."""
        text = render_samples(groups, self._tokenizer, step)
        run_path: Path = self._run_dir.path
        (run_path / "samples").mkdir(exist_ok=True)
        write_atomic(run_path / "samples" / f"step_{step:06d}.md", text.encode())
        terms = None if self._learners is None else self._learners.read_terms()
        save_groups(run_path / "rollouts" / f"step_{step:06d}.jsonl.gz", groups, terms)
        for group, rollout in [(group, group.rollouts[0]) for group in groups[:1]]:
            sample = self._tokenizer.decode([*group.prompt.token_ids, *rollout.completion.token_ids])
            self._tracker.log_text(step, "sample", f"reward {rollout.reward}: {sample}")
