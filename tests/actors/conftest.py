"""A tiny corpus and a recipe that trains on it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayllm.config.schema import (
    Horizon,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    WorkersConfig,
)
from rayllm.data.shards import Manifest, ShardEntry, ShardWriter
from rayllm.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer/` (bytes) and `shards/` of a few hundred short sums, train and validation."""
    root = tmp_path_factory.mktemp("corpus")
    tokenizer = Tokenizer.byte_level()
    tokenizer.save(root / "tokenizer")
    entries: list[ShardEntry] = []
    for split, num_documents in (("train", 400), ("val", 40)):
        writer = ShardWriter(
            root / "shards", split, piece_idx=0, piece="sums", vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id
        )  # type: ignore[arg-type]
        for i in range(num_documents):
            writer.add(tokenizer.encode(f"{i} plus {7 * i % 50} is {i + 7 * i % 50}. " * (1 + i % 3)))
        entries += writer.close()
    Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        validation={"kind": "sources"},
        pieces=(),
        shards=tuple(entries),
    ).save(root / "shards")
    return root


@pytest.fixture(scope="session")
def tiny_recipe(corpus: Path) -> Callable[..., PretrainConfig]:
    """Twenty steps of 512 tokens of a two-layer model; keyword arguments change fields."""

    def build(out: Path, *, num_workers: int = 1, num_steps: int = 20, **changes: Any) -> PretrainConfig:
        settings: dict[str, Any] = {
            "depth": 2,
            "model": ModelConfig(aspect_ratio=16, head_dim=16, sequence_len=64),
            "horizon": Horizon(kind="steps", value=num_steps),
            "tokens_per_step": 512,
            "rows_per_micro_batch": 2,
            "data": PretrainDataConfig(shards=str(corpus / "shards"), tokenizer=str(corpus / "tokenizer")),
            "workers": WorkersConfig(num_workers=num_workers, device="cpu", dtype="float32"),
            "optim": OptimConfig(warmup_steps=2),
            "eval_every": 10,
            "eval_tokens": 1024,
            "sample_every": None,
            "sample_tokens": 4,
            "save_every": 4,
        }
        return PretrainConfig(out=str(out), **{**settings, **changes})

    return build
