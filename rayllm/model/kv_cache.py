"""What decoding remembers: keys and values of every layer, and the last embedding (for smear).

Shapes: B rows, T tokens, S positions, K kv heads, E head dim, D model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rayllm.model.config import GPTConfig


class KVCache:
    """Keys and values of `num_rows` sequences, each of a length of its own, up to `capacity` positions.

    `GPT.forward` appends to it and advances it; `lengths[b]` is how many tokens row b holds. Slices made by `first`
    share memory with the whole.
    """

    def __init__(
        self, config: GPTConfig, num_rows: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, num_rows, capacity, config.num_kv_heads, config.head_dim)
        self._k_LBSKE = torch.zeros(shape, device=device, dtype=dtype)
        self._v_LBSKE = torch.zeros(shape, device=device, dtype=dtype)
        # Of a row without tokens it is zero: nothing is smeared into a sequence's first token.
        self.last_embed_BD = torch.zeros(num_rows, config.d_model, device=device, dtype=dtype)
        self.lengths = np.zeros(num_rows, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        return self._k_LBSKE.size(1)

    @property
    def capacity(self) -> int:
        return self._k_LBSKE.size(2)

    @property
    def is_even(self) -> bool:
        """Whether all rows are of the same length."""
        return bool((self.lengths == self.lengths[0]).all())

    def require_room(self, num_tokens: int) -> None:
        """Raises ValueError when `num_tokens` more do not fit."""
        longest = int(self.lengths.max())
        if longest + num_tokens > self.capacity:
            raise ValueError(
                f"KV cache holds {longest} of {self.capacity} tokens, no room for {num_tokens} more: "
                "build it with a larger capacity or generate fewer tokens"
            )

    def positions_BT(self, num_tokens: int) -> Tensor:
        """Where the next `num_tokens` of each row stand."""
        positions_BT = torch.from_numpy(self.lengths[:, None] + np.arange(num_tokens))
        return positions_BT.to(self._k_LBSKE.device, non_blocking=True)

    def append(
        self, layer_idx: int, k_BTKE: Tensor, v_BTKE: Tensor, positions_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns what it holds, the new ones included (views).

        With `positions_BT` None all rows are of one length, and so is what is returned. Else keys come up to the
        longest row, rounded up, and those beyond a row's own length are not its.
        """
        start = int(self.lengths[0])
        if positions_BT is None:
            end = start + k_BTKE.size(1)
            self._k_LBSKE[layer_idx, :, start:end] = k_BTKE
            self._v_LBSKE[layer_idx, :, start:end] = v_BTKE
        else:
            end = min(self.capacity, -(-(int(self.lengths.max()) + k_BTKE.size(1)) // 64) * 64)  # few shapes
            rows_B1 = torch.arange(self.num_rows, device=k_BTKE.device)[:, None]
            self._k_LBSKE[layer_idx][rows_B1, positions_BT] = k_BTKE
            self._v_LBSKE[layer_idx][rows_B1, positions_BT] = v_BTKE
        return self._k_LBSKE[layer_idx, :, :end], self._v_LBSKE[layer_idx, :, :end]

    def advance(self, num_tokens: int, last_embed_BD: Tensor) -> None:
        """Called once per forward, after every layer has appended."""
        self.lengths += num_tokens
        self.last_embed_BD.copy_(last_embed_BD)

    def first(self, num_rows: int) -> KVCache:
        """The first rows alone, sharing memory."""
        rows = object.__new__(KVCache)
        rows._k_LBSKE, rows._v_LBSKE = self._k_LBSKE[:, :num_rows], self._v_LBSKE[:, :num_rows]
        rows.last_embed_BD, rows.lengths = self.last_embed_BD[:num_rows], self.lengths[:num_rows]
        return rows

    def copy_row(self, row_idx: int, source: KVCache, source_idx: int) -> None:
        """Make a row equal to one of a cache (this or another of the same model)."""
        length = int(source.lengths[source_idx])
        self._k_LBSKE[:, row_idx, :length] = source._k_LBSKE[:, source_idx, :length]
        self._v_LBSKE[:, row_idx, :length] = source._v_LBSKE[:, source_idx, :length]
        self.last_embed_BD[row_idx] = source.last_embed_BD[source_idx]
        self.lengths[row_idx] = length

    def clear_row(self, row_idx: int) -> None:
        """Forget a row, down to its numbers: one that is no number would outlive a mask."""
        self._k_LBSKE[:, row_idx, : self.lengths[row_idx]] = 0
        self._v_LBSKE[:, row_idx, : self.lengths[row_idx]] = 0
        self.last_embed_BD[row_idx] = 0
        self.lengths[row_idx] = 0
