"""What a pretraining run will take: memory, time, and the plan in words, for `--dry-run`.

Torch-free: the machine is asked by nvidia-smi and a numpy matrix product.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from rayllm.config.schema import PretrainConfig
from rayllm.optim.scaling import PretrainPlan, plan
from rayllm.runs.progress import render_duration
from rayllm.text.tokenizer import read_tokenizer_json

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
ASSUMED_UTILISATION = 0.4


def describe_plan(config: PretrainConfig) -> dict[str, object]:
    """The plan in words, for `--dry-run`: label -> value with its unit."""
    vocab_size, origin = _vocab_size(config)
    derived = plan(config, vocab_size)
    counts, model = derived.parameters, derived.model
    flops = derived.flops_per_token * derived.num_tokens
    rate, rate_origin = assumed_flops_per_s(config)
    num_bytes = training_bytes_per_worker(
        derived, config.workers.num_workers, 4 if config.workers.dtype in ("auto", "float32") else 2
    )
    return {
        "model": f"{model.num_layers} layers, width {model.d_model}, {model.num_heads} heads of {model.head_dim} "
        f"({model.num_kv_heads} kv), windows {'/'.join(map(str, model.windows))}",
        "vocabulary": f"{vocab_size:,} ({origin})",
        "parameters": f"{counts.total:,} (matrices {counts.matrices:,}, lm_head {counts.lm_head:,}, "
        f"wte {counts.wte:,}, value embeddings {counts.value_embeds:,}, scalars {counts.scalars:,})",
        "flops_per_token": f"{derived.flops_per_token:.3e}",
        "training_flops": f"{flops:.3e}",
        "tokens_per_step": f"{derived.tokens_per_step:,} = {derived.num_micro_batches} micro-batches x up to "
        f"{derived.rows_per_micro_batch} rows x {model.sequence_len} tokens x {config.workers.num_workers} worker(s)",
        "steps": f"{derived.num_steps:,}",
        "tokens": f"{derived.num_tokens:,} ({derived.num_tokens / counts.scaling:.2f} per scaling parameter)",
        "lr_multiplier": f"{derived.lr_multiplier:.4f} (square root of tokens_per_step / 2^19)",
        "matrix_weight_decay": f"{derived.matrix_weight_decay:.4f}",
        "estimated_memory": f"{num_bytes / 2**30:.2f} GiB per worker",
        "estimated_time": f"{render_duration(flops / rate)} at {rate / 1e9:,.0f} GFLOP/s ({rate_origin})",
    }


def _vocab_size(config: PretrainConfig) -> tuple[int, str]:
    if Path(config.data.tokenizer).exists():
        return int(read_tokenizer_json(config.data.tokenizer)["vocab_size"]), config.data.tokenizer
    return 32768, f"assumed, as there is no tokenizer at {config.data.tokenizer} yet"


def gpu_peak_flops(name: str) -> float | None:
    """bfloat16 peak of a card by its name; None when it is not in the table."""
    return next((peak for key, peak in GPU_PEAK_FLOPS.items() if key in name), None)


def assumed_flops_per_s(config: PretrainConfig) -> tuple[float, str]:
    """What a run like this may reach over all workers, for the estimate of time, and where the number is from."""
    gpu = visible_gpu_name() if config.workers.device in ("auto", "cuda") else None
    if gpu is not None and (peak := gpu_peak_flops(gpu)):
        rate = peak * config.workers.num_workers
        return ASSUMED_UTILISATION * rate, f"{ASSUMED_UTILISATION:.0%} of {config.workers.num_workers} x {gpu}"
    peak = measure_cpu_flops_per_s()
    return ASSUMED_UTILISATION * peak, f"{ASSUMED_UTILISATION:.0%} of the float32 matrix product measured here"


def training_bytes_per_worker(plan: PretrainPlan, num_workers: int, bytes_per_activation: int) -> int:
    """Estimated peak memory of one worker: float32 weights and gradients, its share of the optimizer's state, what a
    step needs beside them, activations, logits."""
    counts, model = plan.parameters, plan.model
    # Muon keeps one buffer for a matrix, AdamW two for the rest; shared out among the workers.
    state = (counts.matrices + 2 * (counts.total - counts.matrices)) / num_workers
    # Muon works on copies of weights, gradient and update of one shape at a time, a third of all matrices; of two such
    # thirds the outcome may be on its way between workers.
    third = counts.matrices / 3
    step = 3 * third / num_workers + (2 * third if num_workers > 1 else 0)
    parameters = int(4 * (2 * counts.total + state + step))
    tokens = plan.rows_per_micro_batch * model.sequence_len
    # Kept for backward per layer: stream, normed inputs, q, k, v, attention output (about 10 d), MLP (about 12 d).
    activations = tokens * model.num_layers * 22 * model.d_model * bytes_per_activation
    logits = tokens * model.vocab_size * 4 * 3
    return parameters + activations + logits


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


def measure_cpu_flops_per_s(size: int = 1024, num_repeats: int = 4) -> float:
    """Best float32 matrix-product rate of a few tries on all cores, in FLOP/s; takes about 0.1 s."""
    a = np.ones((size, size), dtype=np.float32)
    best_s = float("inf")
    for _ in range(num_repeats):
        start = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s
