"""What decoding remembers: keys and values of every layer, and the last embedding (for smear).

Shapes: B rows, S positions, K kv heads, E head dim, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.model.config import GPTConfig


class KVCache:
    """Keys and values of `num_rows` sequences that advance together, up to `capacity` positions.

    `GPT.forward` appends to it and advances it; `position` is how many tokens it holds.
    """

    def __init__(
        self, config: GPTConfig, num_rows: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, num_rows, capacity, config.num_kv_heads, config.head_dim)
        self._k_LBSKE = torch.zeros(shape, device=device, dtype=dtype)
        self._v_LBSKE = torch.zeros(shape, device=device, dtype=dtype)
        self.position = 0
        self.last_embed_BD: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self._k_LBSKE.size(2)

    def require_room(self, num_tokens: int) -> None:
        """Raises ValueError when `num_tokens` more do not fit."""
        if self.position + num_tokens > self.capacity:
            raise ValueError(
                f"KV cache holds {self.position} of {self.capacity} tokens, no room for {num_tokens} more: "
                "build it with a larger capacity or generate fewer tokens"
            )

    def append(self, layer_idx: int, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all it holds, the new ones included (views)."""
        end = self.position + k_BTKE.size(1)
        self._k_LBSKE[layer_idx, :, self.position : end] = k_BTKE
        self._v_LBSKE[layer_idx, :, self.position : end] = v_BTKE
        return self._k_LBSKE[layer_idx, :, :end], self._v_LBSKE[layer_idx, :, :end]

    def advance(self, num_tokens: int, last_embed_BD: Tensor) -> None:
        """Called once per forward, after every layer has appended."""
        self.position += num_tokens
        self.last_embed_BD = last_embed_BD

    def repeat(self, num_samples: int) -> KVCache:
        """A cache in which every row stands `num_samples` times: prefill a prompt once, sample it often."""
        copy = object.__new__(KVCache)
        copy._k_LBSKE = self._k_LBSKE.repeat_interleave(num_samples, dim=1)
        copy._v_LBSKE = self._v_LBSKE.repeat_interleave(num_samples, dim=1)
        copy.position = self.position
        copy.last_embed_BD = (
            None if self.last_embed_BD is None else self.last_embed_BD.repeat_interleave(num_samples, dim=0)
        )
        return copy
