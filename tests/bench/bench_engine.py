"""Useful tokens per second of the engine beside nanochat's scheme, on prompts and response lengths of GSM8K.

    python tests/bench/bench_engine.py [--quick] [--processes=2] [--device=cuda --depths=12]

(a) one prompt at a time, in static batches of 8 rows that decode until the slowest has ended, eager, float32;
(b) the engine: 16 prompts x 16 samples together, in the dtype that is the product's default on this device.
Same weights, prompts, response lengths; both draw at temperature 1 and stop at the same tokens. Sample j of prompt i is
as long as GSM8K's reference answer to problem 16 i + j, so that lengths differ within a prompt as they do in the data.
A useful token is one that belongs to a completion; rows that wait for the slowest make none. The weights are random:
what a token costs does not depend on them. Runs alternate; the best of each counts, as others share the machine.

With --processes both schemes share prompts, slots and cores out among so many processes, as a recipe with so many
rollout actors does; a run ends when the last of them has.

The limit is what the machine could do if it did nothing but the matrix products of useful tokens, or nothing but read
weights, keys and values, whichever takes longer, at rates measured in the same run; `limit_share` is that time's share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.engine.request import Request
from rayllm.model.backends import attend_with_sdpa
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.runtime import build_runtime
from rayllm.text.chat import render_conversation, render_for_completion
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Prompt
from tasks.build import build_task

NUM_PROMPTS, NUM_SAMPLES, BATCH_ROWS = 16, 16, 8
CONTEXT_LEN, VOCAB_SIZE, HEAD_DIM = 512, 8192, 64


@dataclass(frozen=True)
class Work:
    """Prompts, and how long each of their samples gets at most."""

    prompts: list[tuple[int, ...]]
    lengths: list[list[int]]
    stop_ids: frozenset[int]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    def share(self, rank: int, world_size: int) -> Work:
        """Every `world_size`-th prompt, from `rank` on."""
        return Work(self.prompts[rank::world_size], self.lengths[rank::world_size], self.stop_ids)


def build_work(num_prompts: int) -> tuple[Work, Tokenizer]:
    """From GSM8K's training split, with a tokenizer trained on it."""
    task = build_task("gsm8k", split="train", path=None, num_examples=None, max_level=1, seed=0)
    conversations = [task.conversation(i) for i in range(len(task))]
    texts = ["\n".join(str(message.content) for message in c.messages) for c in conversations]
    tokenizer = Tokenizer.train(texts, VOCAB_SIZE)
    prompts = [tuple(render_for_completion(tokenizer, c)) for c in conversations[:num_prompts]]
    lengths = [
        [
            len(render_conversation(tokenizer, c)[0]) - len(render_for_completion(tokenizer, c))
            for c in conversations[NUM_SAMPLES * i : NUM_SAMPLES * (i + 1)]
        ]
        for i in range(num_prompts)
    ]
    stop_ids = frozenset([tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>")])
    return Work(prompts, lengths, stop_ids), tokenizer


def build_model(depth: int, device: torch.device, dtype: torch.dtype) -> GPT:
    width = HEAD_DIM * depth
    config = GPTConfig(CONTEXT_LEN, VOCAB_SIZE, depth, depth, depth, width)
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:  # blocks start as the identity; let them take part
            for proj in (block.attn.c_proj, block.mlp.c_proj):
                proj.weight.normal_(0, width**-0.5, generator=generator)
    return model.to(device=device, dtype=dtype).eval()


class StaticCache:
    """Keys and values of rows that all stand at the same position: slices, no masks."""

    def __init__(self, model: GPT, num_rows: int, max_len: int) -> None:
        config, like = model.config, model.lm_head.weight
        self._windows = config.windows
        shape = (num_rows, max_len, config.num_kv_heads, config.head_dim)
        self._layers = [[like.new_zeros(shape) for _ in range(2)] for _ in config.windows]
        self.length = 0
        self.positions_BT = torch.empty(0)
        self.before_B = torch.empty(0)

    def stand(self, num_tokens: int, before_B: Tensor) -> StaticCache:
        """The next tokens come here."""
        rows = before_B.size(0)
        self.positions_BT = torch.arange(self.length, self.length + num_tokens, device=before_B.device).expand(rows, -1)
        self.before_B = before_B
        self.length += num_tokens
        return self

    def attend(self, layer_idx: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        k, v = self._layers[layer_idx]
        start = self.length - q_BTHE.size(1)
        k[:, start : self.length], v[:, start : self.length] = k_BTKE, v_BTKE
        window = self._windows[layer_idx]
        if start == 0:
            return attend_with_sdpa(q_BTHE, k_BTKE, v_BTKE, window)
        assert q_BTHE.size(1) == 1, "behind its prompt a row goes on token by token"
        seen = slice(max(0, start - window), self.length)
        rows = (x.transpose(1, 2) for x in (q_BTHE, k[:, seen], v[:, seen]))
        return F.scaled_dot_product_attention(*rows).transpose(1, 2)

    def expand(self, prompt: StaticCache) -> None:
        """Start all rows from a prompt's one."""
        self.length = prompt.length
        for own, its in zip(self._layers, prompt._layers, strict=True):
            for mine, theirs in zip(own, its, strict=True):
                mine[:, : self.length] = theirs[:, : self.length]


@torch.inference_mode()
def run_static(model: GPT, work: Work) -> int:
    """Scheme (a); returns the number of useful tokens."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(0)
    num_useful = 0
    for prompt, lengths in zip(work.prompts, work.lengths, strict=True):
        for first in range(0, len(lengths), BATCH_ROWS):
            rows = lengths[first : first + BATCH_ROWS]
            prompt_cache = StaticCache(model, 1, len(prompt))
            tokens_BT = torch.tensor([prompt], device=device)
            at = prompt_cache.stand(len(prompt), torch.tensor([-1], device=device))
            logits_BV = model(tokens_BT, cache=at)[:, -1].expand(len(rows), -1)
            cache = StaticCache(model, len(rows), len(prompt) + max(rows))
            cache.expand(prompt_cache)
            before_B = torch.full((len(rows),), prompt[-1], device=device)
            completions: list[list[int]] = [[] for _ in rows]
            is_done = [False] * len(rows)
            while True:
                tokens_B1 = torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)
                for b, token in enumerate(tokens_B1[:, 0].tolist()):
                    if not is_done[b]:
                        completions[b].append(token)
                        is_done[b] = token in work.stop_ids or len(completions[b]) == rows[b]
                if all(is_done):
                    break
                logits_BV = model(tokens_B1, cache=cache.stand(1, before_B))[:, -1]
                before_B = tokens_B1[:, 0]
            num_useful += sum(map(len, completions))
    return num_useful


def run_engine(engine: Engine, work: Work) -> int:
    """Scheme (b); returns the number of useful tokens."""
    handles = []
    for i, (prompt, lengths) in enumerate(zip(work.prompts, work.lengths, strict=True)):
        for j, length in enumerate(lengths):
            handles.append(engine.submit(Request(Prompt(f"{i}/{j}", prompt), SamplingConfig(max_tokens=length))))
    while not engine.is_idle:
        engine.step()
    completions = [c for handle in handles for c in handle.completions()]
    assert all(c.finish_reason in ("stop", "length") for c in completions)
    return sum(len(c.token_ids) for c in completions)


def measure(run: Callable[[], int], device: torch.device) -> float:
    """Useful tokens per second of all processes together."""
    over_processes([0.0], dist.ReduceOp.MAX)  # they start together
    start = time.perf_counter()
    num_tokens = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    (seconds,) = over_processes([time.perf_counter() - start], dist.ReduceOp.MAX)
    return over_processes([num_tokens], dist.ReduceOp.SUM)[0] / seconds


def over_processes(values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    """The values of all processes as one, in each of them; waits for the others."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, how)
    reduced: list[float] = total.tolist()
    return reduced


def best_rate(run: Callable[[], object], amount: float, device: torch.device, seconds: float = 1.0) -> float:
    """Of one process, while the others do the same."""
    over_processes([0.0], dist.ReduceOp.MAX)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return amount / best


def limit_tokens_per_s(model: GPT, work: Work, num_rows: int) -> tuple[float, float]:
    """What products alone, and reads alone, would allow with `num_rows` rows a step: tokens per second of each."""
    config, weight = model.config, model.lm_head.weight
    device, width = weight.device, config.d_model
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(weight.dtype)
    flops_per_s = best_rate(lambda: a @ a, 2 * size**3, device)
    big = torch.zeros(2**28 // weight.element_size(), device=device, dtype=weight.dtype)
    bytes_per_s = best_rate(lambda: big.sum(dtype=torch.float32), big.nbytes, device)
    num_weights = config.num_layers * 12 * width**2 + VOCAB_SIZE * width
    steps = [
        (len(p) + t) for p, lengths in zip(work.prompts, work.lengths, strict=True) for n in lengths for t in range(n)
    ]
    keys = sum(min(at + 1, window + 1) for at in steps for window in config.windows) / len(steps)
    flops = 2 * num_weights + 4 * keys * width
    read = (num_weights / num_rows + 2 * keys * width) * weight.element_size()
    return flops_per_s / flops, bytes_per_s / read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="depth 2, 2 prompts, one run each: shows that it works")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-slots", type=int, default=256, help="of all processes together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.depths, args.repeats = [2], 1
    with tempfile.TemporaryDirectory() as folder:
        if args.processes == 1:
            run_as_one_of(0, args, folder)
        else:
            mp.spawn(run_as_one_of, (args, folder), nprocs=args.processes)


def run_as_one_of(rank: int, args: argparse.Namespace, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.processes)
    torch.set_num_threads(max(1, torch.get_num_threads() // args.processes))
    runtime = build_runtime(args.device)
    device = runtime.device
    work, tokenizer = build_work(2 if args.quick else NUM_PROMPTS)
    lengths = sum(work.lengths, [])
    tell = print if rank == 0 else lambda *_, **__: None
    tell(
        f"{len(work.prompts)} prompts of {min(map(len, work.prompts))}-{max(map(len, work.prompts))} tokens x "
        f"{NUM_SAMPLES} samples of {min(lengths)}-{max(lengths)}, mean {work.num_tokens / len(lengths):.0f}; "
        f"{device}, {args.processes} x {torch.get_num_threads()} threads, torch {torch.__version__}",
    )
    work = work.share(rank, args.processes)
    result: dict[str, float] = {}
    for depth in args.depths:
        table, keys = bench_depth(depth, work, tokenizer, device, runtime.dtype, args)
        tell(table, flush=True)
        result |= keys
    tell(json.dumps({key: round(value, 3) for key, value in sorted(result.items())}))
    dist.destroy_process_group()


def bench_depth(
    depth: int, work: Work, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[str, dict[str, float]]:
    """A table to print, and the keys of the last line."""
    baseline = build_model(depth, device, torch.float32)
    dtypes = list(dict.fromkeys([dtype, torch.float32]))
    num_slots = args.num_slots // args.processes

    def build_engine(model: GPT) -> Engine:
        return Engine(model.lay_out_for_inference(), tokenizer, num_slots=num_slots, max_len=CONTEXT_LEN, repeats=True)

    models = {d: build_model(depth, device, d) for d in dtypes}
    engines = {d: build_engine(model) for d, model in models.items()}
    rates: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        rates.setdefault("static", []).append(measure(lambda: run_static(baseline, work), device))
        for d, engine in engines.items():
            rates.setdefault(str(d), []).append(measure(lambda engine=engine: run_engine(engine, work), device))  # type: ignore[misc]
    best = {name: max(values) for name, values in rates.items()}
    by_products, by_reads = over_processes(limit_tokens_per_s(models[dtype], work, num_slots), dist.ReduceOp.SUM)
    limit = min(by_products, by_reads)
    share = best[str(dtype)] / limit
    engines_are = f"(b) engine, {num_slots} slots" if args.processes == 1 else f"(b) {args.processes} engines"
    kind = "products" if limit == by_products else "reads"
    table = [
        f"\ndepth {depth}, width {HEAD_DIM * depth}            useful tokens/s   times (a)     runs",
        _row("(a) static, 8 rows, float32", best["static"], best["static"], rates["static"]),
        *(_row(f"{engines_are}, {str(d)[6:]}", best[str(d)], best["static"], rates[str(d)]) for d in dtypes),
        f"limit ({kind}; products {by_products:,.0f}, reads {by_reads:,.0f}): the engine reaches {share:.0%}; "
        f"the limit itself is {limit / best['static']:.1f} times (a)",
    ]
    return "\n".join(table), {
        f"speedup.d{depth}": best[str(dtype)] / best["static"],
        f"speedup_same_dtype.d{depth}": best[str(torch.float32)] / best["static"],
        f"limit_share.d{depth}": share,
    }


def _row(name: str, rate: float, baseline: float, rates: Sequence[float]) -> str:
    return f"{name:<36}{rate:>12,.0f}{rate / baseline:>12.1f}     {', '.join(f'{r:,.0f}' for r in rates)}"


if __name__ == "__main__":
    main()
