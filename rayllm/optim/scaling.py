"""From the depth dial to numbers: model shape, parameters, FLOPs, batch, learning rates, steps.

Pure arithmetic, torch-free. The rules are nanochat's: batch and
learning rates scale from a reference model of depth 12 trained with 2^19 tokens a step; its sources are
"Power Lines" (arXiv:2505.13738) for the batch exponent and the T_epoch rule for weight decay.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from rayllm.config.schema import PretrainConfig
from rayllm.model.config import SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, GPTConfig

REFERENCE_DEPTH = 12
REFERENCE_TOKENS_PER_STEP = 2**19
BATCH_EXPONENT = 0.383
TOKENS_PER_MICRO_BATCH = {"cpu": 2048, "mps": 16_384, "cuda": 65_536}
"""Few on a CPU, whose caches then hold what a layer hands to the next; many on a GPU, to fill it."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by group, the vocabulary's padding rows included."""

    matrices: int
    lm_head: int
    wte: int
    value_embeds: int
    scalars: int

    @property
    def total(self) -> int:
        return self.matrices + self.lm_head + self.wte + self.value_embeds + self.scalars

    @property
    def scaling(self) -> int:
        """Those that scaling laws count: block matrices and unembedding."""
        return self.matrices + self.lm_head


@dataclass(frozen=True)
class PretrainPlan:
    """Every number that follows from a `PretrainConfig` and a vocabulary."""

    model: GPTConfig
    parameters: ParameterCounts
    flops_per_token: float
    tokens_per_step: int
    rows_per_step: int
    rows_per_micro_batch: int
    num_micro_batches: int
    num_steps: int
    lr_multiplier: float
    matrix_weight_decay: float

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.tokens_per_step

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "num_tokens": self.num_tokens}


def plan_model(config: PretrainConfig, vocab_size: int, depth: int | None = None) -> GPTConfig:
    """The architecture of `depth` (default: the recipe's) layers."""
    depth = depth or config.depth
    shape = config.model
    num_heads = math.ceil(depth * shape.aspect_ratio / shape.head_dim)
    return GPTConfig(
        sequence_len=shape.sequence_len,
        vocab_size=vocab_size,
        num_layers=depth,
        num_heads=num_heads,
        num_kv_heads=shape.num_kv_heads or num_heads,
        d_model=num_heads * shape.head_dim,
        window_pattern=shape.window_pattern,
    )


def count_parameters(model: GPTConfig) -> ParameterCounts:
    """Parameters of each group."""
    d, kv_width, num_rows = model.d_model, model.num_kv_heads * model.head_dim, model.padded_vocab_size
    num_gates = len(model.value_embed_layers)
    per_block = 2 * d * d + 2 * d * kv_width + 8 * d * d
    return ParameterCounts(
        matrices=model.num_layers * per_block + num_gates * VE_GATE_CHANNELS * model.num_kv_heads,
        lm_head=num_rows * d,
        wte=num_rows * d,
        value_embeds=num_gates * num_rows * kv_width,
        scalars=2 * model.num_layers + SMEAR_GATE_CHANNELS + 2,
    )


def flops_per_token(model: GPTConfig) -> float:
    """Training FLOPs per token: 6 for each weight in a matrix product, and the attention over each window."""
    counts = count_parameters(model)
    attention = sum(12 * model.d_model * min(w, model.sequence_len) for w in model.windows)
    return 6 * (counts.scaling + SMEAR_GATE_CHANNELS) + attention


def plan(config: PretrainConfig, vocab_size: int, device_type: str = "cpu") -> PretrainPlan:
    """Derive the whole plan for workers on `device_type` ("cpu", "cuda", "mps").

    Raises ValueError naming key, value and cure when the batch cannot be split.
    """
    model = plan_model(config, vocab_size)
    counts = count_parameters(model)
    # Depth 12 of the same recipe is the reference; the horizon cancels in what follows.
    reference = count_parameters(plan_model(config, vocab_size, REFERENCE_DEPTH))
    size = counts.scaling / reference.scaling
    if config.tokens_per_step == "auto":
        tokens_per_step = 2 ** round(math.log2(REFERENCE_TOKENS_PER_STEP * size**BATCH_EXPONENT))
    else:
        tokens_per_step = config.tokens_per_step
    batch = tokens_per_step / REFERENCE_TOKENS_PER_STEP
    flops = flops_per_token(model)
    rows_per_step, rows_per_worker = split_step(
        tokens_per_step, model.sequence_len, config.workers.num_workers, row_key="model.sequence_len"
    )
    rows_at_once = split_worker_rows(config.rows_per_micro_batch, rows_per_worker, model.sequence_len, device_type)
    return PretrainPlan(
        model=model,
        parameters=counts,
        flops_per_token=flops,
        tokens_per_step=tokens_per_step,
        rows_per_step=rows_per_step,
        rows_per_micro_batch=rows_at_once,
        num_micro_batches=math.ceil(rows_per_worker / rows_at_once),
        num_steps=_num_steps(config, counts.scaling, flops, tokens_per_step),
        lr_multiplier=math.sqrt(batch),
        matrix_weight_decay=config.optim.weight_decay * math.sqrt(batch) / size,
    )


def split_step(tokens_per_step: int, sequence_len: int, num_workers: int, *, row_key: str) -> tuple[int, int]:
    """Rows of a step over all workers, and of one worker; ValueError when they are no whole numbers."""
    unit = sequence_len * num_workers
    if tokens_per_step % unit:
        fitting = max(1, round(tokens_per_step / unit)) * unit
        raise ValueError(
            f"tokens_per_step={tokens_per_step} must be a multiple of {row_key} * workers.num_workers = "
            f"{sequence_len} * {num_workers} = {unit}: try --tokens_per_step={fitting}"
        )
    rows_per_step = tokens_per_step // sequence_len
    return rows_per_step, rows_per_step // num_workers


def split_worker_rows(wanted: int | Literal["auto"], rows_per_worker: int, sequence_len: int, device_type: str) -> int:
    """Rows of a micro-batch: what is wanted, or what holds the tokens that suit a device; no more than there are."""
    rows = TOKENS_PER_MICRO_BATCH[device_type] // sequence_len if wanted == "auto" else wanted
    return max(1, min(rows, rows_per_worker))


def _num_steps(config: PretrainConfig, scaling_parameters: int, flops: float, tokens_per_step: int) -> int:
    amount = config.horizon.value
    tokens = {
        "ratio": amount * scaling_parameters,
        "flops": amount / flops,
        "tokens": amount,
        "steps": amount * tokens_per_step,
    }[config.horizon.kind]
    num_steps = round(tokens) // tokens_per_step
    if num_steps < 1:
        raise ValueError(
            f"horizon.value={amount:g} ({config.horizon.kind}) is less than one step of {tokens_per_step} tokens: "
            "raise it or lower tokens_per_step"
        )
    return num_steps
