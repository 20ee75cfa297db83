"""The tensors of the engine: prompts are prefilled once, rows decode together.

Shapes: B rows, T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.model.gpt import GPT
from rayllm.model.kv_cache import KVCache

ROWS_PER_BUCKET = 8
"""Decode steps work on a multiple of so many rows, so that shapes are few."""


@dataclass(frozen=True)
class Prefilled:
    """A prompt's keys and values, and the logits (V,) of what follows it."""

    cache: KVCache
    logits_V: Tensor


class ModelRunner:
    """A model and a cache of `num_slots` rows of up to `max_len` tokens."""

    def __init__(self, model: GPT, num_slots: int, max_len: int) -> None:
        self.model = model
        self._cache = self._build_cache(num_slots, max_len)
        self._logits_BV = torch.zeros(num_slots, model.config.vocab_size, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int]) -> Prefilled:
        """Run a prompt."""
        cache = self._build_cache(1, len(token_ids))
        logits_BTV = self.model(torch.tensor([list(token_ids)], device=self.device), cache=cache)
        return Prefilled(cache, logits_BTV[0, -1].float())

    def place(self, prefilled: Prefilled, row_idx: int) -> None:
        """Start a row from a prompt."""
        self._cache.copy_row(row_idx, prefilled.cache, 0)
        self._logits_BV[row_idx] = prefilled.logits_V

    def free(self, row_idx: int, from_idx: int | None) -> None:
        """Give up a row; what stands in row `from_idx` moves there."""
        self._cache.clear_row(row_idx)
        if from_idx is not None:
            self._cache.copy_row(row_idx, self._cache, from_idx)
            self._logits_BV[row_idx] = self._logits_BV[from_idx]
            self._cache.clear_row(from_idx)

    def logits_BV(self, num_rows: int) -> Tensor:
        """What the first rows would say next (a view)."""
        return self._logits_BV[:num_rows]

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int]) -> None:
        """Append one token to each of the first rows and compute what follows."""
        num_rows = len(token_ids)
        bucket = min(-(-num_rows // ROWS_PER_BUCKET) * ROWS_PER_BUCKET, self._cache.num_rows)
        tokens_B1 = torch.tensor([*token_ids, *[0] * (bucket - num_rows)], device=self.device)[:, None]
        self._logits_BV[:bucket] = self.model(tokens_B1, cache=self._cache.first(bucket))[:, -1]
        for row_idx in range(num_rows, bucket):
            self._cache.clear_row(row_idx)

    def _build_cache(self, num_rows: int, capacity: int) -> KVCache:
        dtype = self.model.compute_dtype or self.model.lm_head.weight.dtype
        return KVCache(self.model.config, num_rows, capacity, device=self.device, dtype=dtype)
