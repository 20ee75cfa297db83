"""What every stage around THE loop does alike, as one worker: resume, report, save."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rayllm.config.chat_schema import SFTConfig
from rayllm.config.load import to_dict
from rayllm.config.schema import PretrainConfig
from rayllm.data.loader import DataPosition, StepBatch
from rayllm.model.gpt import GPT
from rayllm.optim.optimizer import MuonAdamW
from rayllm.optim.schedule import Schedule
from rayllm.runs.checkpoint import Checkpoint, save_checkpoint
from rayllm.runs.tracking import Tracker, build_tracker
from rayllm.runtime import Runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.loop import Callbacks, Intervals, Metrics, fit


@dataclass
class Stage:
    """A model in training, and what the loop calls back.

    `name` goes into its checkpoints; `resumes_from` is the checkpoint of this run that the model was loaded from.
    `evaluate_model` is called on every worker, `sample_texts` on one.
    """

    name: str
    config: PretrainConfig | SFTConfig
    run_path: Path
    runtime: Runtime
    model: GPT
    optimizer: MuonAdamW
    tokenizer: Tokenizer
    resumes_from: Checkpoint | None
    evaluate_model: Callable[[], Metrics]
    sample_texts: Callable[[], Iterable[str]]
    last_validation: Metrics = field(default_factory=dict, init=False)
    _tracker: Tracker | None = field(default=None, init=False)

    def train(
        self,
        schedule: Schedule,
        batches: Generator[StepBatch, None, None],
        *,
        num_steps: int,
        matrix_weight_decay: float,
        flops_per_token: float,
        sample_every: int | None,
    ) -> Metrics:
        """Run the loop to the end, then close `batches`; returns the last validation metrics (the same on each worker).

        Where the run is resumed, the optimizer's state is that of its checkpoint, and what was reported later is
        dropped.
        """
        config, checkpoint = self.config, self.resumes_from
        if checkpoint is not None:
            self.optimizer.load_named_state(checkpoint.load_optimizer_state() or {})
        if self.runtime.rank == 0:
            self._tracker = build_tracker(
                self.run_path,
                config.tracking,
                config=to_dict(config),
                resume_step=None if checkpoint is None else checkpoint.step,
            )
        try:
            fit(
                self.model,
                self.optimizer,
                schedule,
                batches,
                self.runtime,
                Callbacks(report=self.report, evaluate=self.evaluate, sample=self.sample, save=self.save),
                Intervals(config.log_every, config.eval_every, sample_every, config.save_every),
                num_steps=num_steps,
                matrix_weight_decay=matrix_weight_decay,
                flops_per_token=flops_per_token,
                first_step=0 if checkpoint is None else checkpoint.step,
            )
        finally:
            batches.close()
            if self._tracker is not None:
                self._tracker.close()
        return self.last_validation

    def report(self, step: int, metrics: Metrics) -> None:
        if self._tracker is not None:
            self._tracker.log(step, metrics)

    def evaluate(self) -> Metrics:
        self.last_validation = self.evaluate_model()
        return self.last_validation

    def sample(self, step: int) -> None:
        if self._tracker is not None:
            for text in self.sample_texts():
                self._tracker.log_text(step, "sample", text)

    def save(self, step: int, position: DataPosition) -> None:
        """Write a checkpoint; called on every worker, as they gather what the first writes."""
        optimizer_state = self.optimizer.gather_named_state()
        if self.runtime.rank != 0:
            return
        save_checkpoint(
            self.run_path / "checkpoints",
            step,
            model_state=self.model.state_dict(),
            optimizer_state=optimizer_state,
            state={
                "stage": self.name,
                "model": self.model.config.to_dict(),
                "position": asdict(position),
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "metrics": self.last_validation,
            },
            tokenizer=self.tokenizer,
            keep=self.config.keep_checkpoints,
        )


def position_of(checkpoint: Checkpoint | None) -> DataPosition:
    """Where a run reads on: behind what its checkpoint has seen."""
    return DataPosition() if checkpoint is None else DataPosition(**checkpoint.state["position"])
