"""Training tokens per second, memory, and where a step's time goes: the product beside plain PyTorch.

    python tests/bench/bench_train.py [--quick] [--device=cuda --depths 12 --sequence-len 2048]

(a) plain PyTorch: eager, float32, whole rows against whole rows under a mask, all logits at once, 16,384 tokens to a
    micro-batch (nanochat's 32 rows of 512);
(b) the product as its recipes run it by default: its dtype, attention kernel, chunked head, micro-batches.
Same weights, same 32,768 tokens a step (T 512, vocabulary 8192, width 64 x depth, head 64), the same optimizer. Each
run is a process of its own, so that its peak memory is its own; runs alternate and the best of each counts, as others
share the machine. Every run first warms up on one micro-batch, then takes whole steps.

`limit_share` is the rate of forward and backward, in the model's nominal FLOPs, over the best rate of a large matrix
product measured in the same process and dtype.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm.config.schema import OptimConfig, WorkersConfig
from rayllm.data.loader import DataPosition, StepBatch, TokenBatch
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.model.segments import Segments
from rayllm.optim.groups import build_optimizer
from rayllm.optim.scaling import flops_per_token, split_worker_rows
from rayllm.runtime import Runtime, build_runtime
from rayllm.training.loop import forward_backward
from rayllm.training.replica import prepare_model

VOCAB_SIZE, HEAD_DIM, TOKENS_PER_STEP, PLAIN_TOKENS = 8192, 64, 32_768, 16_384


def attend_whole_rows(q: Tensor, k: Tensor, v: Tensor, window: int, segments: Segments | None = None) -> Tensor:
    """Every query against every key of its row."""
    position_T = torch.arange(q.size(1), device=q.device)
    ago_TT = position_T[:, None] - position_T
    is_full = window >= q.size(1) - 1
    mask_TT = None if is_full else (ago_TT >= 0) & (ago_TT <= window)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask_TT, is_causal=is_full
    )
    return y.transpose(1, 2)


def plain_step(model: GPT, batch: StepBatch, runtime: Runtime) -> None:
    for rows in batch.micro_batches:
        logits_BTV = model(rows.inputs_BT.to(runtime.device))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), rows.targets_BT.to(runtime.device).flatten(), reduction="sum")
        (loss / batch.num_tokens).backward()


def run_variant(name: str, depth: int, args: argparse.Namespace) -> dict[str, float]:
    """Take steps in this process; seconds by part, peak memory in bytes, FLOP/s of forward and backward, and of a
    product."""
    runtime = build_runtime(args.device, "auto" if name == "product" else "float32")
    config = GPTConfig(args.sequence_len, VOCAB_SIZE, depth, depth, depth, HEAD_DIM * depth)
    is_plain = name == "plain"
    model = GPT(config, compute_dtype=runtime.dtype)
    model.init_weights(0)
    model.to(runtime.device)
    if is_plain:
        model.attend = attend_whole_rows
    else:
        prepare_model(model, WorkersConfig(), runtime)
    optimizer = build_optimizer(model, OptimConfig())
    num_rows = args.tokens_per_step // args.sequence_len
    at_once = PLAIN_TOKENS // args.sequence_len if is_plain else "auto"
    at_once = split_worker_rows(at_once, num_rows, args.sequence_len, runtime.device.type)
    tokens = torch.randint(VOCAB_SIZE, (num_rows, args.sequence_len + 1), generator=torch.Generator().manual_seed(0))
    batches = [TokenBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens.split(at_once)]

    step: Callable[[GPT, StepBatch, Runtime], object] = plain_step if is_plain else forward_backward
    step(model, StepBatch(tuple(batches[:1]), DataPosition()), runtime)
    optimizer.step()
    optimizer.zero_grad()
    whole, best = StepBatch(tuple(batches), DataPosition()), {}
    for _ in range(args.steps):
        seconds = {
            "compute": timed(lambda: step(model, whole, runtime), runtime),
            "optimizer": timed(optimizer.step, runtime),
            "other": timed(optimizer.zero_grad, runtime),
        }
        best = min(best or seconds, seconds, key=lambda s: sum(s.values()))
    on_gpu = runtime.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = flops_per_token(config) * args.tokens_per_step / best["compute"]
    return {**best, "memory": memory, "flops": rate, "product_flops": product_flops_per_s(runtime, 64 * depth)}


def timed(work: Callable[[], object], runtime: Runtime) -> float:
    """Seconds that some work takes on the device."""
    runtime.synchronize()
    start = time.perf_counter()
    work()
    runtime.synchronize()
    return time.perf_counter() - start


def product_flops_per_s(runtime: Runtime, width: int) -> float:
    """Best rate of a product as large as a layer's: 4,096 tokens times (width, 4 width), or 2,048 squares."""
    best = 0.0
    for m, k, n in ((4096, width, 4 * width), (4096, 4 * width, width), (2048, 2048, 2048)):
        a = torch.randn(m, k, device=runtime.device, dtype=runtime.dtype)
        b = torch.randn(n, k, device=runtime.device, dtype=runtime.dtype)
        for _ in range(6):
            best = max(best, 2 * m * k * n / timed(lambda a=a, b=b: F.linear(a, b), runtime))  # type: ignore[misc]
    return best


def in_own_process(name: str, depth: int, args: argparse.Namespace) -> dict[str, float]:
    options = {key: value for key, value in vars(args).items() if key in ("device", "steps")}
    command = [sys.executable, __file__, f"--variant={name}", f"--depths={depth}"]
    command += [f"--{key}={value}" for key, value in options.items()]
    command += [f"--sequence-len={args.sequence_len}", f"--tokens-per-step={args.tokens_per_step}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="depth 2, 4,096 tokens, once: shows that it works")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequence-len", type=int, default=512)
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--steps", type=int, default=1, help="whole steps of a run, of which the fastest counts")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--variant", choices=["plain", "product", "product32"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run_variant(args.variant, args.depths[0], args)))
        return
    if args.quick:
        args.depths, args.tokens_per_step, args.repeats = [2], 4096, 1
    runtime = build_runtime(args.device)
    print(
        f"{runtime.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; default dtype {runtime.dtype}"
    )
    names = ["plain", "product"] + (["product32"] if runtime.dtype != torch.float32 else [])
    result: dict[str, float] = {}
    for depth in args.depths:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                runs[name].append(in_own_process(name, depth, args))
        result |= tell(depth, runs, args.tokens_per_step)
    print(json.dumps({key: round(value, 3) for key, value in sorted(result.items())}))


def tell(depth: int, runs: dict[str, list[dict[str, float]]], num_tokens: int) -> dict[str, float]:
    """Print a depth's table; the ratios."""

    def seconds(run: dict[str, float]) -> float:
        return run["compute"] + run["optimizer"] + run["other"]

    best = {name: min(tries, key=seconds) for name, tries in runs.items()}
    rates = {name: num_tokens / seconds(run) for name, run in best.items()}
    limit = {name: max(run["product_flops"] for run in tries) for name, tries in runs.items()}
    print(f"\ndepth {depth}, width {HEAD_DIM * depth}")
    print("            tokens/s  times (a)  fwd+bwd  optimizer  other  peak GiB  of product rate")
    for name, run in best.items():
        parts = [run[part] / seconds(run) for part in ("compute", "optimizer", "other")]
        print(
            f"{name:<10}{rates[name]:>10,.0f}{rates[name] / rates['plain']:>11.2f}{parts[0]:>9.0%}{parts[1]:>11.0%}"
            f"{parts[2]:>7.1%}{run['memory'] / 2**30:>10.2f}{run['flops'] / limit[name]:>8.0%} of "
            f"{limit[name] / 1e9:,.0f} GFLOP/s",
            flush=True,
        )
    same_dtype = "product32" if "product32" in best else "product"
    return {
        f"speedup.d{depth}": rates["product"] / rates["plain"],
        f"speedup_same_dtype.d{depth}": rates[same_dtype] / rates["plain"],
        f"limit_share.d{depth}": best["product"]["flops"] / limit["product"],
        f"memory_ratio.d{depth}": best["product"]["memory"] / best["plain"]["memory"],
    }


if __name__ == "__main__":
    main()
