"""How fast a run goes, pauses not counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rayllm.data.loader import StepBatch
from rayllm.runtime import Runtime


class Utilization:
    """The share of what the devices of all workers could compute (MFU)."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._peak_flops_per_s = runtime, 0.0

    def of(self, flops_per_s: float) -> float:
        """Of a rate over all workers. The peak is measured at first use, when a run's start no longer keeps the
        machine busy, and again where a run goes faster than that: something else ran beside the measurement."""
        if not self._peak_flops_per_s or flops_per_s > self._peak_flops_per_s:
            measured = self._runtime.peak_flops_per_s() * self._runtime.world_size
            self._peak_flops_per_s = max(measured, self._peak_flops_per_s)
        return flops_per_s / self._peak_flops_per_s


class Speed:
    """Tokens per second over all workers, and MFU."""

    def __init__(self, runtime: Runtime, flops_per_token: float) -> None:
        self._world_size, self._flops_per_token = runtime.world_size, flops_per_token
        self._utilization = Utilization(runtime)
        self._num_tokens, self._since = 0.0, time.perf_counter()

    def add(self, batch: StepBatch) -> None:
        """Count a step: this worker's batch, and as many rows on every other."""
        self._num_tokens += batch.num_tokens * self._world_size

    def measure(self) -> dict[str, float]:
        """Of the time since the last measurement. The device's queue must be empty: read the loss first."""
        tokens_per_s = self._num_tokens / (time.perf_counter() - self._since)
        mfu = self._utilization.of(tokens_per_s * self._flops_per_token)
        self._num_tokens, self._since = 0.0, time.perf_counter()
        return {"train/tokens_per_s": tokens_per_s, "train/mfu": mfu}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is no training."""
        paused = time.perf_counter()
        yield
        self._since += time.perf_counter() - paused
