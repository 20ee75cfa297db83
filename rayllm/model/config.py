"""The shape of one model: what a checkpoint stores and everything else is derived from. Torch-free."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

VE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24
# Positions the rotary tables cover, in rows: generation may go well beyond the training length, as windows are finite.
POSITIONS_PER_ROW = 10
MAX_SEQUENCE_LEN = 2**24
"""Beyond it the rotary tables alone would take tens of gigabytes."""
# Logits that training makes at once: as many as stay in a CPU's cache; on a GPU as many as keep it busy.
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**27, "mps": 2**25}


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of one GPT. ``d_model`` is split over ``num_heads``; fewer ``num_kv_heads`` is GQA."""

    sequence_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_model: int
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str) -> None:
            if not ok:
                raise ValueError(f"impossible model: {rule}, got {self}")

        require(min(self.sequence_len, self.vocab_size, self.num_layers, self.num_heads) >= 1, "every size is positive")
        require(self.sequence_len <= MAX_SEQUENCE_LEN, f"sequence_len is at most {MAX_SEQUENCE_LEN:,}")
        require(self.d_model % self.num_heads == 0, "num_heads must divide d_model")
        require(self.head_dim % 2 == 0, "head_dim (d_model / num_heads) must be even for rotary embeddings")
        require(
            self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads"
        )
        require(self.d_model >= SMEAR_GATE_CHANNELS, f"d_model must be at least {SMEAR_GATE_CHANNELS}")
        require(
            bool(self.window_pattern) and set(self.window_pattern) <= {"S", "L"}, "window_pattern is made of S and L"
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding tables: vocab_size rounded up to 64, for aligned matrix products."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def max_positions(self) -> int:
        """Positions the rotary tables cover."""
        return POSITIONS_PER_ROW * self.sequence_len

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens each layer looks back, besides the token itself: L the whole row, S a quarter in steps of 128."""
        sizes = {"L": self.sequence_len, "S": math.ceil(self.sequence_len / 4 / 128) * 128}
        tiled = [sizes[self.window_pattern[i % len(self.window_pattern)]] for i in range(self.num_layers)]
        return (*tiled[:-1], sizes["L"])

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Layers with a value embedding: every other one, always including the last."""
        return tuple(i for i in range(self.num_layers) if i % 2 == (self.num_layers - 1) % 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> GPTConfig:
        """Inverse of `to_dict`; raises ValueError on unknown or missing fields."""
        names = {f.name for f in fields(GPTConfig)}
        if set(raw) != names:
            raise ValueError(f"model config must have exactly the fields {sorted(names)}, got {sorted(raw)}")
        return GPTConfig(**raw)
