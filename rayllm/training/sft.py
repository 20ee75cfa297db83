"""One worker's part of supervised fine-tuning: a model, rows of conversations, resume where the run stands, train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayllm.config.chat_schema import SFTConfig
from rayllm.config.load import to_dict
from rayllm.config.schema import SamplingConfig
from rayllm.data.conversation_rows import ConversationRows
from rayllm.data.conversations import Mixture
from rayllm.engine.calculator import calculate
from rayllm.engine.engine import Engine
from rayllm.evals.rows import evaluate_loss
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.scaling import flops_per_token, split_step
from rayllm.optim.schedule import FinetuneSchedule
from rayllm.runs.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint
from rayllm.runs.load import load_tokenizer, load_weights, model_config
from rayllm.runtime import Runtime
from rayllm.text.chat import render_for_reply
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.loop import Metrics
from rayllm.training.stage import Stage, position_of
from rayllm.types import Conversation, Message, Prompt

SAMPLE_PROMPTS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Tom has 3 apples and buys 4 more. How many apples does he have now?",
)
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class SFTStart:
    """What a run stands on: the checkpoint to load, this run's own (`resumes`) or the one to start from."""

    checkpoint: Checkpoint
    resumes: bool
    model: GPTConfig
    tokenizer: Tokenizer
    sequence_len: int
    rows_per_step: int
    rows_per_micro_batch: int

    @property
    def resumes_from(self) -> Checkpoint | None:
        return self.checkpoint if self.resumes else None

    def identify(self, config: SFTConfig, split: str) -> dict[str, Any]:
        """What the rendered conversations of a split depend on."""
        return {
            "tasks": to_dict(config)["tasks" if split == "train" else "validation"],
            "seed": config.seed,
            "max_tokens": self.sequence_len + 1,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
        }


@dataclass(frozen=True)
class SFTPlan:
    """Every number that follows from a recipe, the model to start from, and the conversations."""

    checkpoint: str
    model: GPTConfig
    sequence_len: int
    rows_per_step: int
    tokens_per_step: int
    rows_per_micro_batch: int
    num_rows: int
    num_conversations: int
    padding_share: float
    num_steps: int
    flops_per_token: float
    tasks: list[dict[str, Any]]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def check_start(config: SFTConfig, run_path: Path) -> SFTStart:
    """The checkpoint that the run goes on or starts from, and whether the recipe fits its model; loads no weights.

    Raises ValueError or FileNotFoundError naming what does not fit and the cure.
    """
    own = latest_checkpoint(run_path) if run_path.is_dir() else None
    checkpoint = own or open_checkpoint(config.checkpoint)
    model = model_config(checkpoint)
    sequence_len = config.sequence_len or model.sequence_len
    if sequence_len > (limit := model.max_positions):
        raise ValueError(
            f"sequence_len={sequence_len} is more than the {limit} positions that the model of {checkpoint.path} has; "
            f"write --sequence_len={model.sequence_len}, or at most {limit}"
        )
    rows_per_step, rows_per_worker = split_step(
        config.tokens_per_step, sequence_len, config.workers.num_workers, row_key="sequence_len"
    )
    return SFTStart(
        checkpoint,
        own is not None,
        model,
        load_tokenizer(checkpoint),
        sequence_len,
        rows_per_step,
        min(config.rows_per_micro_batch, rows_per_worker),
    )


def mixture_path(run_path: Path, split: str) -> Path:
    """Where a run keeps its rendered conversations: split "train" or "val"."""
    return run_path / "conversations" / split


def plan_sft(config: SFTConfig, start: SFTStart, rows: ConversationRows) -> SFTPlan:
    """Derive the whole plan from the rows to train on."""
    num_steps = math.ceil(len(rows.rows) / start.rows_per_step)
    return SFTPlan(
        checkpoint=str(start.checkpoint.path),
        model=start.model,
        sequence_len=start.sequence_len,
        rows_per_step=start.rows_per_step,
        tokens_per_step=start.rows_per_step * start.sequence_len,
        rows_per_micro_batch=start.rows_per_micro_batch,
        num_rows=len(rows.rows),
        num_conversations=sum(task.num_conversations for task in rows.mixture.tasks),
        padding_share=rows.padding_share,
        num_steps=min(num_steps, config.max_steps or num_steps),
        flops_per_token=flops_per_token(start.model),
        tasks=[asdict(task) for task in rows.mixture.tasks],
    )


def run_worker(config: SFTConfig, run_path: Path, runtime: Runtime) -> Metrics:
    """Train as one of the workers of `runtime`; returns the last validation metrics (the same on each).

    The conversations must stand rendered in the run directory.
    """
    start = check_start(config, run_path)
    train, held_out = (
        ConversationRows(Mixture.load(mixture_path(run_path, split)), start.sequence_len) for split in ("train", "val")
    )
    derived = plan_sft(config, start, train)
    model = GPT(start.model, compute_dtype=runtime.dtype)
    load_weights(model, start.checkpoint)
    model.to(runtime.device)
    optimizer = build_optimizer(model, config.optim, rank=runtime.rank, world_size=runtime.world_size)
    if config.warm_start_optimizer and not start.resumes:
        moments = start.checkpoint.load_optimizer_state()
        if moments is not None:
            optimizer.load_named_state(moments)
    share = {"rank": runtime.rank, "world_size": runtime.world_size}
    batches = train.step_batches(
        rows_per_step=start.rows_per_step,
        rows_per_micro_batch=start.rows_per_micro_batch,
        position=position_of(start.resumes_from),
        **share,
    )

    def evaluate() -> Metrics:
        loss = evaluate_loss(model, held_out.batches(rows_per_batch=start.rows_per_micro_batch, **share), runtime)
        return {"val/loss": loss.value, "val/loss_stderr": loss.stderr}

    stage = Stage(
        "sft",
        config,
        run_path,
        runtime,
        model,
        optimizer,
        start.tokenizer,
        start.resumes_from,
        evaluate_model=evaluate,
        sample_texts=lambda: _answers(model, start.tokenizer),
    )
    return stage.train(
        FinetuneSchedule(derived.num_steps, config.optim, config.lr_fraction),
        batches,
        num_steps=derived.num_steps,
        matrix_weight_decay=config.optim.weight_decay,
        flops_per_token=derived.flops_per_token,
        sample_every=None,
    )


def _answers(model: GPT, tokenizer: Tokenizer) -> Iterator[str]:
    """What the model answers to a few questions, greedily, tool blocks and all."""
    sampling = SamplingConfig(temperature=0, max_tokens=min(SAMPLE_TOKENS, model.config.sequence_len))
    max_len = model.config.max_positions
    for text in SAMPLE_PROMPTS:
        question = Conversation((Message("user", text),))
        ids = render_for_reply(tokenizer, question, max_len - sampling.max_tokens)
        engine = Engine(model, tokenizer, num_slots=1, max_len=len(ids) + sampling.max_tokens, calculator=calculate)
        ((completion,),) = engine.generate([Prompt(text, tuple(ids))], sampling)
        yield f"{text}|{tokenizer.decode([i for i in completion.token_ids if i < tokenizer.vocab_size])}"
