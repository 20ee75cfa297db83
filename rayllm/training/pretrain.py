"""One worker's part of pretraining: build everything from the recipe, resume where the run stands, train."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from rayllm.config.load import to_dict
from rayllm.config.schema import PretrainConfig, SamplingConfig
from rayllm.data.loader import DataPosition, step_batches, validation_batches
from rayllm.data.shards import TokenShards
from rayllm.engine.sample import continue_text
from rayllm.evals.bpb import evaluate_bpb
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.optimizer import MuonAdamW
from rayllm.optim.scaling import PretrainPlan, plan
from rayllm.optim.schedule import PretrainSchedule
from rayllm.runs.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from rayllm.runs.load import load_weights, model_config
from rayllm.runs.tracking import Tracker, build_tracker
from rayllm.runtime import Runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.loop import Callbacks, Intervals, Metrics, fit

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "Once upon a time there was",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def check_inputs(config: PretrainConfig) -> tuple[TokenShards, Tokenizer, PretrainPlan]:
    """What a run stands on, loaded and checked against each other; the cheap part, before any worker starts.

    Raises ValueError or FileNotFoundError naming what does not fit and the cure.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    shards = TokenShards.load(config.data.shards)
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"data.shards={config.data.shards} were made by another tokenizer than "
            f"data.tokenizer={config.data.tokenizer}: run the tokenize stage again "
            "with this one, or name the one they were made with"
        )
    return shards, tokenizer, plan(config, tokenizer.vocab_size)


def check_resume(run_path: Path, derived: PretrainPlan) -> Checkpoint | None:
    """The checkpoint to go on from; ValueError when it is of another model than the plan's."""
    checkpoint = latest_checkpoint(run_path)
    if checkpoint is not None and model_config(checkpoint) != derived.model:
        raise ValueError(
            f"{checkpoint.path} holds another model ({model_config(checkpoint)}) than this recipe's ({derived.model}): "
            "use another --out"
        )
    return checkpoint


def run_worker(config: PretrainConfig, run_path: Path, runtime: Runtime) -> Metrics:
    """Train as one of the workers of `runtime`; returns the last validation metrics (the same on each)."""
    shards, tokenizer, derived = check_inputs(config)
    checkpoint = check_resume(run_path, derived)
    first_step, position = 0, DataPosition()
    model = GPT(derived.model, compute_dtype=runtime.dtype)
    model.init_weights(config.seed) if checkpoint is None else load_weights(model, checkpoint)
    model.to(runtime.device)
    optimizer = build_optimizer(
        model, config.optim, lr_multiplier=derived.lr_multiplier, matrix_weight_decay=derived.matrix_weight_decay
    )
    if checkpoint is not None:
        optimizer.load_named_state(checkpoint.load_optimizer_state() or {})
        first_step, position = checkpoint.step, DataPosition(**checkpoint.state["position"])  # type: ignore[arg-type]

    batches = step_batches(
        shards,
        rows_per_step=derived.rows_per_step,
        rows_per_micro_batch=derived.rows_per_micro_batch,
        sequence_len=derived.model.sequence_len,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.data.seed,
        long_documents=config.data.long_documents,
        position=position,
    )
    tracker = None
    if runtime.rank == 0:
        tracker = build_tracker(
            run_path, config.tracking, config=to_dict(config), resume_step=first_step if checkpoint else None
        )
    stage = _PretrainStage(config, run_path, runtime, shards, tokenizer, derived, model, optimizer, tracker)
    try:
        fit(
            model,
            optimizer,
            PretrainSchedule(derived.num_steps, config.optim),
            batches,
            runtime,
            Callbacks(report=stage.report, evaluate=stage.evaluate, sample=stage.sample, save=stage.save),
            Intervals(config.log_every, config.eval_every, config.sample_every, config.save_every),
            num_steps=derived.num_steps,
            matrix_weight_decay=derived.matrix_weight_decay,
            flops_per_token=derived.flops_per_token,
            first_step=first_step,
        )
    finally:
        batches.close()
        if tracker is not None:
            tracker.close()
    return stage.last_validation


@dataclass
class _PretrainStage:
    """What the loop calls back: where metrics, samples and checkpoints of a pretraining run go."""

    config: PretrainConfig
    run_path: Path
    runtime: Runtime
    shards: TokenShards
    tokenizer: Tokenizer
    derived: PretrainPlan
    model: GPT
    optimizer: MuonAdamW
    tracker: Tracker | None
    last_validation: Metrics = field(default_factory=dict)

    def report(self, step: int, metrics: Metrics) -> None:
        if self.tracker is not None:
            self.tracker.log(step, metrics)

    def evaluate(self) -> Metrics:
        batches = validation_batches(
            self.shards,
            rows_per_batch=self.derived.rows_per_micro_batch,
            sequence_len=self.derived.model.sequence_len,
            max_tokens=self.config.eval_tokens,
            long_documents=self.config.data.long_documents,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )
        bpb = evaluate_bpb(self.model, batches, self.tokenizer.token_bytes_V(), self.runtime)
        self.last_validation = {"val/bpb": bpb.value, "val/bpb_stderr": bpb.stderr}
        return self.last_validation

    def sample(self, step: int) -> None:
        if self.tracker is None:
            return
        sampling = SamplingConfig(temperature=0, max_tokens=self.config.sample_tokens)
        for prompt in SAMPLE_PROMPTS:
            (text,) = continue_text(self.model, self.tokenizer, prompt, sampling)
            self.tracker.log_text(step, "sample", f"{prompt}|{text}")

    def save(self, step: int, position: DataPosition) -> None:
        if self.runtime.rank != 0:
            return
        save_checkpoint(
            self.run_path / "checkpoints",
            step,
            model_state=self.model.state_dict(),
            optimizer_state=self.optimizer.named_state(),
            state={
                "stage": "base",
                "model": self.derived.model.to_dict(),
                "position": asdict(position),
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "metrics": self.last_validation,
            },
            tokenizer=self.tokenizer,
            keep=self.config.keep_checkpoints,
        )
