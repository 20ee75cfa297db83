"""What decoding remembers: keys and values of every layer, row by row.

A layer with a window of w looks back w tokens, so it keeps the last w + chunk_len and no more: position p lies in slot
p modulo its capacity. The cache does not know how long a row is; whoever drives it says where tokens stand.

Shapes: B rows, T tokens, N tokens to store, S slots, K kv heads, E head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rayllm.model.config import GPTConfig


class CacheView(Protocol):
    """One forward's place in a cache, and all that the model sees of it.

    `positions_BT` are those of its tokens; `before_B` are the tokens before its first ones (-1: none), for smear.
    """

    positions_BT: Tensor
    before_B: Tensor

    def attend(self, layer_idx: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        """Store one layer's keys and values and attend to all that its window holds; returns (B, T, H, E)."""
        ...


class KVCache:
    """Keys and values of `num_rows` sequences of up to `max_len` tokens, fed at most `chunk_len` (None: all) at once.
    Without `rings` every layer keeps all of them, position p in slot p.

    Raises ValueError where `max_len` is more positions than the model has.
    """

    def __init__(
        self,
        config: GPTConfig,
        num_rows: int,
        max_len: int,
        *,
        chunk_len: int | None = None,
        rings: bool = True,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        if max_len > config.max_positions:
            raise ValueError(
                f"a KV cache of {max_len} tokens is longer than the {config.max_positions} positions this model has: "
                "give a smaller max_len"
            )
        self.config, self.num_rows, self.max_len = config, num_rows, max_len
        self.chunk_len = min(chunk_len or max_len, max_len)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for window in config.windows:
            capacity = min(max_len, window + self.chunk_len) if rings else max_len
            shape = (num_rows, config.num_kv_heads, capacity, config.head_dim)  # a head's keys lie side by side
            keys, values = (torch.zeros(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
            self.layers.append((keys, values))

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    def capacity(self, layer_idx: int) -> int:
        """Slots of a row."""
        return self.layers[layer_idx][0].size(1)

    def store(self, layer_idx: int, rows_N: Tensor, positions_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Put tokens where they belong; what stood there long before is gone."""
        slots_N = positions_N % self.capacity(layer_idx)
        for stored, new_NKE in zip(self.layers[layer_idx], (k_NKE, v_NKE), strict=True):
            stored[rows_N, slots_N] = new_NKE

    def read(self, layer_idx: int, rows: slice | Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, K, E) of up to `num_keys` slots: a slice of rows where it lies, others copied."""
        keys, values = self.layers[layer_idx]
        return keys[rows, :num_keys], values[rows, :num_keys]

    def copy_row(self, to_idx: int, from_idx: int, length: int) -> None:
        """Copy what a row of `length` tokens holds."""
        for layer in self.layers:
            for stored in layer:
                stored[to_idx, :length] = stored[from_idx, :length]

    def append_row(self, to_idx: int, to_length: int, source: KVCache, from_idx: int, length: int) -> None:
        """Put the `length` tokens of another cache's row behind the `to_length` of a row here."""
        for own, its in zip(self.layers, source.layers, strict=True):
            for mine, theirs in zip(own, its, strict=True):
                first = max(0, length - min(mine.size(1), theirs.size(1)))  # of those that both hold
                position_N = torch.arange(first, length, device=self.device)
                mine[to_idx, (to_length + position_N) % mine.size(1)] = theirs[from_idx, position_N % theirs.size(1)]

    def clear_row(self, row_idx: int) -> None:
        """Forget a row's numbers: those that are none would outlive any mask."""
        for layer in self.layers:
            for stored in layer:
                stored[row_idx] = 0

    def shortest_cut(self, length: int) -> int:
        """The least a row of `length` tokens can be cut to and still hold all that is looked back to from there."""
        cuts = (
            length - self.capacity(layer_idx) + window
            for layer_idx, window in enumerate(self.config.windows)
            if length > self.capacity(layer_idx)
        )
        return max(cuts, default=0)


def held_positions(length_xx1: Tensor, num_keys: int, capacity: int) -> Tensor:
    """The position that lies in each of the first slots of a row of some length; < 0: none yet. (..., S)."""
    slot_S = torch.arange(num_keys, device=length_xx1.device)
    last_xx1 = length_xx1 - 1
    return last_xx1 - (last_xx1 - slot_S) % capacity
