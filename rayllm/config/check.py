"""Combinations that no single field can rule out, as far as they need no cluster and no disk.

Each is yielded as a Conflict whose message names key, value and cure; `load_config` adds where the values came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rayllm.config import check_chat
from rayllm.config.errors import Conflict
from rayllm.config.schema import (
    ImportNanochatConfig,
    PretrainConfig,
    SampleConfig,
    TokenizeConfig,
    TokenizerConfig,
)
from rayllm.model.config import SMEAR_GATE_CHANNELS

# Far beyond any model; without them a slip of the finger has even the plan run out of time, or of memory.
_LIMITS = {
    "depth": 1000,
    "model.aspect_ratio": 4096,
    "model.head_dim": 4096,
    "model.sequence_len": 2**20,
    "rows_per_micro_batch": 2**20,
    "seed": 2**62,  # what torch's generators take, with room for a quickstart's seed on top
}
_PATHS = ("out", "checkpoint", "checkpoints", "shards", "tokenizer", "data.shards", "data.tokenizer")


def find_conflicts(config: Any) -> Iterator[Conflict]:
    """Everything about a valid tree that cannot work, the most basic first."""
    yield from _empty_paths(config)
    if "://" in str(getattr(config, "out", "")):
        cure = f"--out=runs/NAME --checkpoints={config.out}" if hasattr(config, "checkpoints") else "--out=runs/NAME"
        yield Conflict(("out",), f"out={config.out} is a URL, and a run directory must be a path; write {cure}")
    match config:
        case TokenizerConfig():
            yield from _tokenizer(config)
        case TokenizeConfig():
            yield from _tokenize(config)
        case PretrainConfig():
            yield from _limits(config)
            yield from _model(config)
            yield from _batch(config)
        case SampleConfig() if not config.prompts:
            yield Conflict(("prompts",), 'prompts=[] leaves nothing to continue; write --prompts="Once upon a time"')
        case ImportNanochatConfig() if not config.source:
            yield Conflict(("source",), "source is missing; give the directory of the nanochat checkpoint")
        case _:
            yield from check_chat.find_conflicts(config, find_conflicts)


def _value(config: Any, key: str) -> Any:
    """What a dotted key holds; None where the stage has no such key."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def _empty_paths(config: Any) -> Iterator[Conflict]:
    for key in _PATHS:
        value = _value(config, key)
        if isinstance(value, str) and not value.strip():
            yield Conflict((key,), f"{key} is empty; write the path of a directory")


def _limits(config: PretrainConfig) -> Iterator[Conflict]:
    for key, limit in _LIMITS.items():
        value = _value(config, key)
        if isinstance(value, int) and abs(value) > limit:
            nearest = f"{limit} or less" if value > 0 else f"{-limit} or more"
            yield Conflict((key,), f"{key}={value} is beyond the limit; write --{key}={nearest}")


def _tokenizer(config: TokenizerConfig) -> Iterator[Conflict]:
    if config.kind == "bpe" and not config.sources:
        yield Conflict(("sources",), "sources=[] leaves nothing to train on; write --sources=FILE, or --kind=byte")


def _tokenize(config: TokenizeConfig) -> Iterator[Conflict]:
    split = config.validation
    if not config.sources:
        yield Conflict(("sources",), "sources=[] leaves nothing to tokenize; write --sources=FILE")
    if split.kind == "hash" and split.sources:
        yield Conflict(
            ("validation.sources", "validation.kind"),
            f"validation.sources={list(split.sources)} is not read with validation.kind=hash; write "
            "--validation.kind=sources to hold these out, or leave validation.sources empty",
        )
    if split.kind == "hash" and split.fraction == 1:
        yield Conflict(
            ("validation.fraction",), "validation.fraction=1 leaves nothing to train on; write a number below 1"
        )
    if split.kind == "sources" and not split.sources:
        yield Conflict(
            ("validation.kind",),
            "validation.kind=sources needs validation.sources=[...]; name what to hold out, or write kind hash",
        )


def _model(config: PretrainConfig) -> Iterator[Conflict]:
    shape = config.model
    num_heads = math.ceil(config.depth * shape.aspect_ratio / shape.head_dim)
    d_model = num_heads * shape.head_dim
    if shape.head_dim % 2:
        yield Conflict(
            ("model.head_dim",),
            f"model.head_dim={shape.head_dim} is odd, but rotary embeddings turn channels in pairs; "
            f"write an even number, such as {shape.head_dim + 1}",
        )
    if d_model < SMEAR_GATE_CHANNELS:
        yield Conflict(
            ("depth", "model.aspect_ratio", "model.head_dim"),
            f"depth={config.depth} makes a model of width {d_model}, and the least is {SMEAR_GATE_CHANNELS}; "
            "raise depth, model.aspect_ratio or model.head_dim",
        )
    if shape.num_kv_heads and num_heads % shape.num_kv_heads:
        divisors = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0]
        yield Conflict(
            ("model.num_kv_heads", "depth", "model.aspect_ratio", "model.head_dim"),
            f"model.num_kv_heads={shape.num_kv_heads} does not divide the {num_heads} query heads "
            f"(depth {config.depth} * aspect_ratio {shape.aspect_ratio} / head_dim {shape.head_dim}); "
            f"write one of {', '.join(divisors)}, or null",
        )


def _batch(config: PretrainConfig) -> Iterator[Conflict]:
    row = config.model.sequence_len
    if isinstance(config.tokens_per_step, int):
        yield from check_chat.divisible_step(
            config.tokens_per_step, "model.sequence_len", row, config.workers.num_workers
        )
    if config.eval_tokens < row:
        yield Conflict(
            ("eval_tokens", "model.sequence_len"),
            f"eval_tokens={config.eval_tokens} is less than one row of model.sequence_len={row}; write at least {row}",
        )
    if config.horizon.kind == "steps" and config.horizon.value != int(config.horizon.value):
        yield Conflict(
            ("horizon.value", "horizon.kind"),
            f"horizon.value={config.horizon.value:g} is no whole number of steps; write "
            f"--horizon.value={math.ceil(config.horizon.value)}",
        )
    yield from check_chat.one_mps_worker("workers", config.workers)
