"""Where one worker computes: its rank, device and dtype, decided inside the worker."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from rayllm.optim.estimate import gpu_peak_flops

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Runtime:
    """One data-parallel worker: `rank` of `world_size`, computing in `dtype` on `device`."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def sum_over_workers(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """The values added up over all workers, in float64 where the device has it; a collective call."""
        precise = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.as_tensor(values, dtype=precise, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def sum_on_host(self, values: Sequence[float]) -> list[float]:
        """Numbers that the host has, added up over all workers in float64; a collective call that waits for the other
        workers and never for this one's device (the process group must have a backend for CPUs)."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def synchronize(self) -> None:
        """Wait for the device's queue, so that the clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_flops_per_s(self) -> float:
        """What MFU is a share of: the card's data sheet, or (CPU, MPS, unknown cards) the best rate of a
        1024-wide matrix product in this dtype, measured now in about 0.1 s."""
        if self.device.type == "cuda" and (peak := gpu_peak_flops(torch.cuda.get_device_name(self.device))):
            return peak
        a = torch.ones(1024, 1024, device=self.device, dtype=self.dtype)
        best_s = float("inf")
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            a @ a
            self.synchronize()
            best_s = min(best_s, time.perf_counter() - start)
        return 2 * 1024**3 / best_s


def build_runtime(device: str = "auto", dtype: str = "auto", *, rank: int = 0, world_size: int = 1) -> Runtime:
    """Resolve "auto" to CUDA, then MPS (one worker), then CPU; bfloat16 on GPUs that have it and on CPUs that multiply
    it faster, else float32.

    Raises ValueError when the named device or dtype is not to be had here.
    """
    chosen = _build_device(device, world_size)
    has_bfloat16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        prefers_bfloat16 = chosen.type == "cpu" and cpu_prefers_bfloat16(_cpuinfo())
        dtype = "bfloat16" if has_bfloat16 or prefers_bfloat16 else "float32"
    if chosen.type == "cpu":
        _keep_freed_memory()
    if dtype == "bfloat16" and chosen.type == "cuda" and not has_bfloat16:
        raise ValueError(f"dtype=bfloat16: {torch.cuda.get_device_name(chosen)} has no bfloat16; use float32")
    return Runtime(rank, world_size, chosen, _DTYPES[dtype])


def cpu_prefers_bfloat16(cpuinfo: str) -> bool:
    """Whether a CPU multiplies bfloat16 faster than float32, by Linux's /proc/cpuinfo: with AMX, or AMD's AVX512-BF16
    (2.5 times, as reported for an EPYC). Intel's AVX512-BF16 alone is half as fast as float32, measured on Emerald
    Rapids."""
    flags = set(cpuinfo.partition("flags")[2].partition("\n")[0].split())
    return "amx_bf16" in flags or ("AuthenticAMD" in cpuinfo and "avx512_bf16" in flags)


@functools.cache
def _cpuinfo() -> str:
    """Empty where the system is not Linux."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep up to 1 GiB of freed memory instead of giving it back at once: tensors of a megabyte come
    and go in every layer, and having their pages mapped anew took longer than computing them."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # glibc's malloc.h; other C libraries know no such numbers
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**30)


def _build_device(device: str, world_size: int) -> torch.device:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and world_size == 1, "cpu": True}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if has[name])
    if not has[device]:
        found = [name for name, ok in has.items() if ok]
        raise ValueError(f"device={device} is not to be had by {world_size} workers here; there is {', '.join(found)}")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
