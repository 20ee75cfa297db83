"""What a run may compute on, and how fast that may be, for `--dry-run`. Torch-free: the machine is asked by nvidia-smi
and a numpy matrix product.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from dataclasses import dataclass

import numpy as np

from rayllm.config.schema import WorkersConfig

# Dense bfloat16 tensor peaks in FLOP/s, by what nvidia-smi calls the card (vendors' data sheets); first match wins.
GPU_PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "5090": 209.5e12,
    "4090": 165.2e12,
    "3090": 71e12,
}
# Bytes per second that a card reads of its memory (vendors' data sheets).
GPU_BANDWIDTH = {
    "B200": 8e12,
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100": 2.0e12,
    "L40S": 864e9,
    "L4": 300e9,
    "5090": 1.79e12,
    "4090": 1.01e12,
    "3090": 936e9,
}
ASSUMED_GPU = "H100"
ASSUMED_UTILISATION = 0.4


@dataclass(frozen=True)
class Rates:
    """The most that `num_devices` alike may do together, and where the numbers are from."""

    flops_per_s: float
    bytes_per_s: float | None
    """Reads of memory; None where that is not known."""
    origin: str


def assumed_rates(device: str, num_devices: int) -> Rates:
    """Of GPUs ("cuda") by their data sheet, else of this machine's cores, which all share."""
    if device != "cuda":
        return Rates(measure_cpu_flops_per_s(), None, "the float32 matrix product measured here")
    name = visible_gpu_name()
    known = name if name and gpu_peak_flops(name) else ASSUMED_GPU
    why = "" if known == name else ", assumed: no GPU here" if name is None else f", assumed for {name}"
    peak, bandwidth = _by_name(GPU_PEAK_FLOPS, known), _by_name(GPU_BANDWIDTH, known)
    assert peak and bandwidth
    return Rates(num_devices * peak, num_devices * bandwidth, f"{num_devices} x {known}{why}")


def assumed_device(workers: WorkersConfig) -> str:
    """What the workers will compute on, as far as this machine can tell: "cuda" or "cpu" (or "mps", by recipe)."""
    if workers.device != "auto":
        return workers.device
    return "cpu" if visible_gpu_name() is None else "cuda"


def gpu_peak_flops(name: str) -> float | None:
    """bfloat16 peak of a card by its name; None when it is not in the table."""
    return _by_name(GPU_PEAK_FLOPS, name)


def _by_name(table: dict[str, float], name: str) -> float | None:
    return next((value for key, value in table.items() if key in name), None)


@functools.cache
def visible_gpu_name() -> str | None:
    """Name of the first NVIDIA card by nvidia-smi; None where there is none or it does not answer in 5 s."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None


@functools.cache
def measure_cpu_flops_per_s(size: int = 1024, num_repeats: int = 4) -> float:
    """Best float32 matrix-product rate of a few tries on all cores, in FLOP/s; takes about 0.1 s."""
    a = np.ones((size, size), dtype=np.float32)
    best_s = float("inf")
    for _ in range(num_repeats):
        start = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s
