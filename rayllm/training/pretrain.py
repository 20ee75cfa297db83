"""One worker's part of pretraining: build everything from the recipe, resume where the run stands, train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rayllm.config.schema import PretrainConfig, SamplingConfig
from rayllm.data.loader import split_with_rows, step_batches, validation_batches
from rayllm.data.shards import TokenShards
from rayllm.engine.sample import continue_text
from rayllm.evals.bpb import evaluate_bpb
from rayllm.model.gpt import GPT
from rayllm.optim.estimate import assumed_device
from rayllm.optim.groups import build_optimizer
from rayllm.optim.scaling import PretrainPlan, plan
from rayllm.optim.schedule import PretrainSchedule
from rayllm.runs.checkpoint import Checkpoint, latest_checkpoint
from rayllm.runs.load import load_weights, model_config
from rayllm.runs.places import Place, of_run
from rayllm.runtime import Runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.loop import Metrics
from rayllm.training.stage import Outcome, Stage, position_of

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "Once upon a time there was",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def check_inputs(config: PretrainConfig, device_type: str | None = None) -> tuple[TokenShards, Tokenizer, PretrainPlan]:
    """What a run stands on, loaded and checked against each other; the cheap part, before any worker starts. The plan
    is for workers on `device_type` (None: on what is assumed).

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
    derived = plan(config, tokenizer.vocab_size, device_type or assumed_device(config.workers))
    for split in ("train", "val"):
        split_with_rows(shards, split, derived.model.sequence_len)
    return shards, tokenizer, derived


def check_resume(checkpoints: Place, derived: PretrainPlan) -> Checkpoint | None:
    """The checkpoint to go on from; ValueError when it is of another model than the plan's."""
    checkpoint = latest_checkpoint(checkpoints)
    if checkpoint is not None and model_config(checkpoint) != derived.model:
        raise ValueError(
            f"{checkpoint} holds another model ({model_config(checkpoint)}) than this recipe's ({derived.model}): "
            "use another --out"
        )
    return checkpoint


def run_worker(config: PretrainConfig, run_path: Path, runtime: Runtime) -> Outcome:
    """Train as one of the workers of `runtime`."""
    shards, tokenizer, derived = check_inputs(config, runtime.device.type)
    checkpoint = check_resume(of_run(config.checkpoints, run_path), derived)
    model = GPT(derived.model, compute_dtype=runtime.dtype)
    model.init_weights(config.seed) if checkpoint is None else load_weights(model, checkpoint)
    model.to(runtime.device)
    optimizer = build_optimizer(
        model,
        config.optim,
        lr_multiplier=derived.lr_multiplier,
        matrix_weight_decay=derived.matrix_weight_decay,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    batches = step_batches(
        shards,
        rows_per_step=derived.rows_per_step,
        rows_per_micro_batch=derived.rows_per_micro_batch,
        sequence_len=derived.model.sequence_len,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.data.seed,
        long_documents=config.data.long_documents,
        isolate=config.data.isolate,
        position=position_of(checkpoint),
    )

    def evaluate() -> Metrics:
        held_out = validation_batches(
            shards,
            rows_per_batch=derived.rows_per_micro_batch,
            sequence_len=derived.model.sequence_len,
            max_tokens=config.eval_tokens,
            long_documents=config.data.long_documents,
            isolate=config.data.isolate,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        bpb = evaluate_bpb(model, held_out, tokenizer.token_bytes_V(), runtime)
        return {"val/bpb": bpb.value, "val/bpb_stderr": bpb.stderr}

    def sample() -> Iterator[str]:
        sampling = SamplingConfig(temperature=0, max_tokens=config.sample_tokens)
        for prompt in SAMPLE_PROMPTS:
            (text,) = continue_text(model, tokenizer, prompt, sampling)
            yield f"{prompt}|{text}"

    stage = Stage(
        "base",
        config,
        run_path,
        runtime,
        model,
        optimizer,
        tokenizer,
        checkpoint,
        evaluate_model=evaluate,
        sample_texts=sample,
    )
    return stage.train(
        PretrainSchedule(derived.num_steps, config.optim),
        batches,
        num_steps=derived.num_steps,
        matrix_weight_decay=derived.matrix_weight_decay,
        flops_per_token=derived.flops_per_token,
        sample_every=config.sample_every,
    )
