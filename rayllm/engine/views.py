"""Where the tokens of a forward stand in the engine's two caches: one of prompts, one of what rows added to theirs.

A prompt's keys are read once for all the rows that go on from it, and nothing is copied when a row starts. In the
second cache a row's first own token has position 0, so that rows that started together are equally long there.

Shapes: B rows, T tokens, P prompts, R rows of a prompt, N tokens to store, S slots, H query heads, K kv heads,
E head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rayllm.engine.scheduler import Chunk
from rayllm.model.attention import (
    FlashFunction,
    attend_to_part,
    attend_with_flash,
    join_parts,
    visibility,
)
from rayllm.model.backends import attend_with_sdpa
from rayllm.model.kv_cache import KVCache, held_positions


class ChunkView:
    """Chunks of prompts, or of rows, in a batch padded on the right. What is padded is not stored."""

    def __init__(self, prompts: KVCache, rows: KVCache, chunks: Sequence[Chunk]) -> None:
        start_B = np.array([chunk.start for chunk in chunks])
        base_B = np.array([chunk.base for chunk in chunks])
        length_B = np.array([len(chunk.token_ids) for chunk in chunks])
        self._is_own = chunks[0].prefix_row is not None
        self._cache = rows if self._is_own else prompts
        self._prompts = prompts
        num_tokens = int(length_B.max())
        assert num_tokens <= self._cache.chunk_len
        position_BT = start_B[:, None] + np.arange(num_tokens)
        is_token_BT = np.arange(num_tokens) < length_B[:, None]
        row_BT = np.broadcast_to(np.array([chunk.row_idx for chunk in chunks])[:, None], position_BT.shape)
        self._is_fresh = not self._is_own and not start_B.any()
        self._num_keys = int((start_B - base_B + length_B).max())
        self._num_prompt_keys = int(base_B.max())
        self.positions_BT = self._send(position_BT.clip(max=prompts.config.max_positions - 1))
        self.before_B = self._send([chunk.before for chunk in chunks])
        self._base_B1 = self._send(base_B[:, None])
        self._end_B1 = self._send((start_B - base_B + length_B)[:, None])
        self._rows_B = self._send([chunk.row_idx for chunk in chunks])
        self._prefix_rows_B = self._send([chunk.prefix_row or 0 for chunk in chunks])
        self._stored_rows_N = self._send(row_BT[is_token_BT])
        self._stored_positions_N = self._send((position_BT - base_B[:, None])[is_token_BT])
        self._stored_tokens_N = None if is_token_BT.all() else self._send(np.flatnonzero(is_token_BT))
        self._masks: dict[tuple[int, bool], Tensor] = {}

    def attend(self, layer_idx: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        k_NKE, v_NKE = k_BTKE.flatten(0, 1), v_BTKE.flatten(0, 1)
        if self._stored_tokens_N is not None:
            k_NKE, v_NKE = k_NKE[self._stored_tokens_N], v_NKE[self._stored_tokens_N]
        self._cache.store(layer_idx, self._stored_rows_N, self._stored_positions_N, k_NKE, v_NKE)
        window = self._cache.config.windows[layer_idx]
        if self._is_fresh:
            return attend_with_sdpa(q_BTHE, k_BTKE, v_BTKE, window)
        own = self._part(layer_idx, q_BTHE, self._cache, self._rows_B, self._end_B1, self._num_keys)
        if not self._is_own:
            return own[0]
        prompt = self._part(layer_idx, q_BTHE, self._prompts, self._prefix_rows_B, self._base_B1, self._num_prompt_keys)
        return join_parts(prompt, own)

    def _part(
        self, layer_idx: int, q_BTHE: Tensor, cache: KVCache, rows_B: Tensor, length_B1: Tensor, num_keys: int
    ) -> tuple[Tensor, Tensor]:
        """Attention to rows of a cache that are of some lengths."""
        window, capacity = cache.config.windows[layer_idx], cache.capacity(layer_idx)
        num_keys = min(num_keys, capacity)
        key = (window, cache is self._cache)
        if key not in self._masks:
            held_BS = held_positions(length_B1, num_keys, capacity)
            base_B1 = self._base_B1 if cache is self._cache else torch.zeros_like(self._base_B1)
            ago_BTS = self.positions_BT[:, :, None] - (held_BS + base_B1)[:, None]
            is_seen_BTS = (held_BS >= 0)[:, None] & (ago_BTS >= 0) & (ago_BTS <= window)
            self._masks[key] = visibility(is_seen_BTS, q_BTHE.dtype)
        return attend_to_part(q_BTHE, *cache.read(layer_idx, rows_B, num_keys), self._masks[key])

    def _send(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(self._prompts.device)


@dataclass
class DecodeInput:
    """One token of each of the first B rows, and which rows go on from which prompt.

    `numbers_5B`: tokens, tokens before, positions, lengths of the rows' prompts, and places in `rows_PR`, flattened.
    `rows_PR` are the rows of the prompts from `first_prompt` on, filled up with others. The longest prompt and the
    longest row's own part have no more than `num_prompt_keys` and `num_keys` tokens; every row's own part has at least
    `shortest`.
    """

    numbers_5B: Tensor
    rows_PR: Tensor
    first_prompt: int
    num_prompt_keys: int
    num_keys: int
    shortest: int

    @property
    def shape(self) -> tuple[int, ...]:
        """All that is no number in a tensor: one CUDA graph is made for each."""
        numbers = (self.first_prompt, self.num_prompt_keys, self.num_keys, self.shortest)
        return (self.numbers_5B.size(1), *self.rows_PR.shape, *numbers)


@dataclass
class DecodeView:
    """One token of each of the first rows; nothing here waits for the device."""

    prompts: KVCache
    rows: KVCache
    input: DecodeInput
    flash: FlashFunction | None = None
    """Attends to what rows added to their prompts, if given; their cache has no rings then."""
    _masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens_B, self.before_B, position_B, self._base_B, self._place_B = self.input.numbers_5B
        self.positions_BT = position_B[:, None]
        self._own_position_B = position_B - self._base_B
        self._rows_B = torch.arange(position_B.size(0), device=position_B.device)

    def attend(self, layer_idx: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        given, window = self.input, self.rows.config.windows[layer_idx]
        num_keys = min(given.num_keys, self.rows.capacity(layer_idx))
        num_prompt_keys = min(given.num_prompt_keys, self.prompts.capacity(layer_idx))
        if window not in self._masks:
            self._masks[window] = self._visible(layer_idx, window, num_keys, num_prompt_keys, q_BTHE.dtype)
        prompt_mask_PRS, mask_BTS = self._masks[window]
        cached = self.rows.read(layer_idx, slice(0, q_BTHE.size(0)), num_keys)
        if self.flash is not None:
            own = attend_with_flash(self.flash, q_BTHE, cached, (k_BTKE, v_BTKE), self._own_position_B, window)
        else:
            self.rows.store(layer_idx, self._rows_B, self._own_position_B, k_BTKE[:, 0], v_BTKE[:, 0])
            own = attend_to_part(q_BTHE, *cached, mask_BTS)
        if given.shortest > window:  # all look back to nothing but their own
            return own[0]
        chosen = slice(given.first_prompt, given.first_prompt + given.rows_PR.size(0))
        q_PRHE = q_BTHE[:, 0][given.rows_PR]
        prompt_keys = self.prompts.read(layer_idx, chosen, num_prompt_keys)
        y_PRHE, share_PRH = attend_to_part(q_PRHE, *prompt_keys, prompt_mask_PRS)
        prompt = (y_PRHE.flatten(0, 1)[self._place_B][:, None], share_PRH.flatten(0, 1)[self._place_B][:, None])
        return join_parts(prompt, own)

    def _visible(
        self, layer_idx: int, window: int, num_keys: int, num_prompt_keys: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        own_BS = held_positions(self._own_position_B[:, None] + 1, num_keys, self.rows.capacity(layer_idx))
        is_own_BS = (own_BS >= 0) & (self._own_position_B[:, None] - own_BS <= window)
        rows_PR = self.input.rows_PR
        held_PRS = held_positions(self._base_B[rows_PR][..., None], num_prompt_keys, self.prompts.capacity(layer_idx))
        is_seen_PRS = (held_PRS >= 0) & (self.positions_BT[:, 0][rows_PR][..., None] - held_PRS <= window)
        return visibility(is_seen_PRS, dtype), visibility(is_own_BS[:, None], dtype)
