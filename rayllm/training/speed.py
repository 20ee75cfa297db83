"""How fast a run goes, pauses not counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rayllm.data.loader import StepBatch
from rayllm.runtime import Runtime


class Speed:
    """Tokens per second over all workers, and the share of what their devices could compute (MFU)."""

    def __init__(self, runtime: Runtime, flops_per_token: float) -> None:
        self._world_size, self._flops_per_token = runtime.world_size, flops_per_token
        self._peak_flops_per_s = runtime.peak_flops_per_s() * runtime.world_size
        self._num_tokens, self._since = 0.0, time.perf_counter()

    def add(self, batch: StepBatch) -> None:
        """Count a step: this worker's batch, and as many rows on every other."""
        self._num_tokens += batch.num_tokens * self._world_size

    def measure(self) -> dict[str, float]:
        """Of the time since the last measurement. The device's queue must be empty: read the loss first."""
        tokens_per_s = self._num_tokens / (time.perf_counter() - self._since)
        self._num_tokens, self._since = 0.0, time.perf_counter()
        mfu = tokens_per_s * self._flops_per_token / self._peak_flops_per_s
        return {"train/tokens_per_s": tokens_per_s, "train/mfu": mfu}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is no training."""
        paused = time.perf_counter()
        yield
        self._since += time.perf_counter() - paused
