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
from rayllm.runs.stop_request import StopRequest, sigterm_came
from rayllm.runs.tracking import Tracker, build_tracker
from rayllm.runs.writer import CheckpointWriter
from rayllm.runtime import Runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.health import DivergedError
from rayllm.training.loop import Callbacks, Intervals, Metrics, fit
from rayllm.training.replay import save_batch
from rayllm.training.replica import prepare_model


@dataclass(frozen=True)
class Outcome:
    """What a worker's run came to: the steps done, and the last validation metrics (the same on each worker)."""

    step: int
    metrics: Metrics


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
    _stop_request: StopRequest = field(init=False)

    def __post_init__(self) -> None:
        root = of_run(self.config.checkpoints, self.run_path)
        self._writer = CheckpointWriter(root, self.tokenizer, self.config.keep_checkpoints)
        self._stop_request = StopRequest(self.run_path)

    def train(
        self,
        schedule: Schedule,
        batches: Generator[StepBatch, None, None],
        *,
        num_steps: int,
        matrix_weight_decay: float,
        flops_per_token: float,
        sample_every: int | None,
    ) -> Outcome:
        """Run the loop to the end, or until a stop is asked for, then close `batches`.

        Where the run is resumed, the optimizer's state is that of its checkpoint, and what was reported later is
        dropped. Raises FloatingPointError, after saving the batch for replay, where the run diverged.
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
            step = fit(
                self.model,
                self.optimizer,
                schedule,
                batches,
                self.runtime,
                Callbacks(self.report, self.evaluate, self.sample, self.save, self.wants_stop),
                Intervals(config.log_every, config.eval_every, sample_every, config.save_every),
                num_steps=num_steps,
                matrix_weight_decay=matrix_weight_decay,
                flops_per_token=flops_per_token,
                first_step=0 if checkpoint is None else checkpoint.step,
            )
        except DivergedError as error:
            raise FloatingPointError(self._explain(error)) from error
        finally:
            batches.close()
            if self._tracker is not None:
                self._tracker.close()
            self._writer.close()  # last: it waits for the disk, and may raise
        return Outcome(step, self.last_validation)

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

    def wants_stop(self) -> bool:
        """SIGTERM came to this worker, or someone asked the run."""
        return sigterm_came() or (self.runtime.rank == 0 and self._stop_request.is_asked())

    def _explain(self, error: DivergedError) -> str:
        """Save the batch of each worker and say where; returns once all have."""
        runtime = self.runtime
        try:
            told = f"its batch is in {save_batch(self.run_path, error, runtime.rank, runtime.world_size)}"
        except OSError as failure:
            told = f"its batch could not be saved ({failure})"
        runtime.sum_on_host([1.0])  # who raises first ends the others
        return (
            f"{error.reason} at step {error.step}: lower the learning rates (optim.*_lr) and start anew with another "
            f"--out. Checkpoints of earlier steps are untouched; {told}; to see it once more: "
            f"python -m rayllm.training.replay {self.run_path}"
        )

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
