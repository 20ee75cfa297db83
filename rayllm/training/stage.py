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
from rayllm.runs.checkpoint import Checkpoint
from rayllm.runs.places import of_run
from rayllm.runs.tracking import Tracker, build_tracker
from rayllm.runs.writer import CheckpointWriter
from rayllm.runtime import Runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.loop import Callbacks, Intervals, Metrics, fit
from rayllm.training.replica import prepare_model


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
    _writer: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        root = of_run(self.config.checkpoints, self.run_path)
        self._writer = CheckpointWriter(root, self.tokenizer, self.config.keep_checkpoints)

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
        prepare_model(self.model, config.workers, self.runtime)
        self._agree(0 if checkpoint is None else checkpoint.step)
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
            self._writer.close()  # last: it waits for the disk, and may raise
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
        """Begin to write a checkpoint, and train on meanwhile; called on every worker, as the first writes what all
        hold."""
        optimizer_state = self.optimizer.gather_named_state()
        if self.runtime.rank != 0:
            return
        self._writer.save(
            step,
            model_state=self.model.state_dict(),
            optimizer_state=optimizer_state,
            state={
                "stage": self.name,
                "model": self.model.config.to_dict(),
                "position": asdict(position),
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "metrics": dict(self.last_validation),
            },
        )

    def _agree(self, first_step: int) -> None:
        """Raise RuntimeError where workers found different checkpoints: one was just being finished as they started."""
        total = int(self.runtime.sum_over_workers([first_step])[0])
        if total != first_step * self.runtime.world_size:
            raise RuntimeError(f"worker {self.runtime.rank} found the checkpoint of step {first_step}, others another")


def position_of(checkpoint: Checkpoint | None) -> DataPosition:
    """Where a run reads on: behind what its checkpoint has seen."""
    return DataPosition() if checkpoint is None else DataPosition(**checkpoint.state["position"])
