"""Thousands of requests of all kinds on one engine: each is answered rightly, and nothing of them stays."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from rayllm.config.schema import SamplingConfig
from rayllm.engine.request import Handle, Request
from rayllm.engine.sampling import stable_seed
from rayllm.types import Prompt

NUM_REQUESTS = 2000
MAX_HANGING = 6
HANG_LIMIT_S = 150.0
SHAPE = {"num_layers": 2, "d_model": 24, "window_pattern": "SL"}


class MoodyTool:
    """Answers, is silent, fails, is slow, and now and then hangs until the end."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.num_calls = self.num_hanging = 0

    def __call__(self, code: str) -> str | None:
        self.num_calls += 1
        if self.num_calls % 20 == 7 and self.num_hanging < MAX_HANGING:
            self.num_hanging += 1
            self.is_over.wait(HANG_LIMIT_S)
        if self.num_calls % 5 == 1:
            raise RuntimeError("a bad day")
        if self.num_calls % 5 == 2:
            time.sleep(0.002)
        return None if self.num_calls % 5 == 3 else f"{len(code)} characters"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def random_sampling(rng: random.Random) -> SamplingConfig:
    return SamplingConfig(
        temperature=rng.choice([0.0, 0.8, 1.0, 1.0]),
        top_k=rng.choice([None, None, 7]),
        top_p=rng.choice([None, None, 0.9]),
        max_tokens=rng.choice([1, 5, 20, 20, 60]),
        stop=rng.choice([(), (), ("ab", "e")]),
        seed=rng.randrange(100),
    )


def random_prompt(rng: random.Random, texts: list[tuple[int, ...]], prompt_id: str) -> Prompt:
    """Often the beginning of an earlier dialogue, which may be one that still runs."""
    text = rng.choice(texts)
    own = [rng.randrange(97, 123) for _ in range(rng.choice([1, 1, 3, 40]))]
    return Prompt(prompt_id, (*text[: rng.choice([0, 20, len(text)])], *own)[:200])


@pytest.mark.slow
def test_thousands_of_requests_are_answered_and_nothing_of_them_stays(lab) -> None:
    rng, tool, threads_before = random.Random(1), MoodyTool(), set(threading.enumerate())
    models = [lab.model(seed, torch.float64, **SHAPE) for seed in (5, 7)]
    engine = lab.engine(
        lab.model(5, torch.float64, **SHAPE),
        chunk_len=24,
        row_chunk_len=8,
        token_budget=100,
        num_slots=12,
        num_prompts=10,
        calculator=tool,
        tool_timeout_s=0.05,
    )
    texts: list[tuple[int, ...]] = [tuple(rng.randrange(97, 123) for _ in range(100)) for _ in range(4)]
    live: dict[int, Handle] = {}
    gone: list[weakref.ref[Handle]] = []
    streamed: dict[tuple[int, int], list[int]] = {}
    reasons: dict[str, int] = {}
    num_submitted = num_checked = version = memory = 0
    deadline = time.monotonic() + HANG_LIMIT_S
    while num_submitted < NUM_REQUESTS or live:
        assert time.monotonic() < deadline, f"{len(live)} requests are not done"
        while num_submitted < NUM_REQUESTS and len(live) < 40 and rng.random() < 0.7:
            request = Request(
                random_prompt(rng, texts, f"{num_submitted}"), random_sampling(rng), rng.choice([1, 1, 3])
            )
            live[num_submitted] = engine.submit(request)
            num_submitted += 1
        if rng.random() < 0.02 and live:
            handle = rng.choice(list(live.values()))
            handle.cancel(rng.choice([None, 0]))
        if rng.random() < 0.01:
            version += 1
            engine.load(models[version % 2].state_dict(), version, drain=rng.random() < 0.5)
        numbers = {id(handle): number for number, handle in live.items()}
        for delta in engine.step():
            streamed.setdefault((numbers[id(delta.handle)], delta.sample_idx), []).extend(delta.token_ids)
            del delta
        for number in [number for number, handle in live.items() if handle.is_done]:
            handle = live[number]
            if any(s.finish_reason == "cancelled" for s in handle.sequences) and rng.random() < 0.5:
                continue  # its end is told with the next step
            del live[number]
            for i, completion in enumerate(handle.completions()):
                reasons[completion.finish_reason] = reasons.get(completion.finish_reason, 0) + 1
                assert tuple(streamed.pop((number, i), [])) == completion.token_ids
                if (number + i) % 20 == 0:
                    num_checked += len(completion.token_ids)
                    seed = stable_seed(handle.request.sampling.seed, handle.request.prompt.prompt_id, i)
                    by_version = {v: models[v % 2] for v, _ in completion.weights_versions}
                    lab.check(completion, handle.request.prompt.token_ids, handle.request.sampling, seed, by_version)
                    texts[rng.randrange(len(texts))] = (*handle.request.prompt.token_ids, *completion.token_ids)
            gone.append(weakref.ref(handle))
            del handle
        if num_submitted >= NUM_REQUESTS // 4 and not memory:
            gc.collect()
            memory = resident_bytes()
    lab.run(engine)
    assert set(reasons) == {"stop", "length", "cancelled"} and min(reasons.values()) >= 10, reasons
    assert tool.num_calls >= 150 and tool.num_hanging == MAX_HANGING and version >= 5 and num_checked >= 500
    assert len(gone) == NUM_REQUESTS

    tool.is_over.set()
    scheduler = engine._scheduler
    assert not scheduler.running and not scheduler.waiting and not engine._calling
    assert len(scheduler.prefixes) <= 10
    scheduler.prefixes.clear()  # asserts that none has users
    gc.collect()
    assert sum(handle() is not None for handle in gone) == 0, "the engine holds on to what is done"
    assert resident_bytes() - memory < 20 * 2**20
    del engine
    gc.collect()
    for thread in set(threading.enumerate()) - threads_before:
        thread.join(HANG_LIMIT_S)
        assert not thread.is_alive(), thread
