"""What an RL run writes down as it goes: metrics, samples, pass@k on problems held out, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from actors.evaluate import evaluate_task
from actors.learner import LearnerGroup
from actors.rollout import RolloutPool
from rayllm.config.chat_schema import RLConfig
from rayllm.runs.checkpoint import Checkpoint
from rayllm.runs.load import load_tokenizer
from rayllm.runs.tracking import Tracker
from rayllm.training.loop import Metrics, is_due
from rayllm.types import RolloutGroup


class Journal:
    """`validation` holds the newest validation's metrics, also after a resume."""

    def __init__(
        self,
        config: RLConfig,
        checkpoints: str,
        pool: RolloutPool,
        learners: LearnerGroup,
        tracker: Tracker,
        checkpoint: Checkpoint,
    ) -> None:
        self._config, self._checkpoints = config, checkpoints
        self._pool, self._learners, self._tracker = pool, learners, tracker
        self._tokenizer = load_tokenizer(checkpoint)
        metrics = checkpoint.state.get("metrics")
        self.validation: Metrics = dict(metrics) if isinstance(metrics, dict) else {}

    def record(self, step: int, metrics: Metrics, groups: Sequence[RolloutGroup]) -> None:
        """After a step (counted from 1): log it, and validate and save where that is due."""
        config = self._config
        self._tracker.log(step, metrics)
        is_last = step == config.num_steps
        if is_due(step, config.eval_every, is_last):
            self.validate(step)
            self._show(step, groups)
        if is_due(step, config.save_every, is_last):
            self._learners.save(self._checkpoints, step, self.validation)

    def validate(self, step: int) -> None:
        """pass@k on the validation problems, the same draws every time."""
        config = self._config
        report = evaluate_task(self._pool, config.validation, config.eval_samples, config.max_tokens, config.seed)
        metrics = {f"val/pass@{k}": estimate.value for k, estimate in report.pass_at_k.items()}
        metrics |= {f"val/pass@{k}_stderr": estimate.stderr for k, estimate in report.pass_at_k.items()}
        metrics |= {"val/greedy": report.greedy.value, "val/greedy_stderr": report.greedy.stderr}
        self.validation = metrics | {"val/num_failed": float(report.num_failed)}
        self._tracker.log(step, self.validation)

    def _show(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """The first problem's first answer and its reward."""
        group = groups[0]
        for rollout in group.rollouts[:1]:
            text = self._tokenizer.decode([*group.prompt.token_ids, *rollout.completion.token_ids])
            self._tracker.log_text(step, "sample", f"reward {rollout.reward}: {text}")
