"""What `bench_rl` samples and judges: GSM8K's prompts, answers of given lengths, and verdicts by a hash."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import ray
from bench_engine import CONTEXT_LEN, NUM_PROMPTS, NUM_SAMPLES, VOCAB_SIZE, Work, build_work

from actors.rollout import RolloutPool, RolloutWorker
from rayllm.config.chat_schema import RolloutConfig, TaskConfig
from rayllm.engine.engine import Engine
from rayllm.engine.request import Batch, Request
from rayllm.engine.sampling import stable_seed
from rayllm.engine.sequence import Dialect
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Prompt

# Ray's workers need not find this module: what is defined here travels by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

MAX_TOKENS = 256
ENDLESS = Dialect(frozenset(), -1, -1)
"""No token ends an answer or opens a tool block."""


def judge(example_idx: int, answer: str) -> float:
    return float(example_idx % 5 < 3 and stable_seed(answer) % 2)


class HashTask:
    """Problems of which `judge` is the judge."""

    name = "hash"

    def evaluate(self, example_idx: int, answer: str) -> float:
        return judge(example_idx, answer)


class MeasuredEngine:
    """An engine whose samples end at the lengths of a list, by prompt and sample, and nowhere else."""

    def __init__(self, engine: Engine, lengths: list[list[int]]) -> None:
        self._engine, self._lengths = engine, lengths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit_all(self, requests: Iterable[Request]) -> Batch:
        batch = Batch()
        for request in requests:
            handle = self._engine.submit(request)
            for sequence in handle.sequences:
                sequence.max_tokens = self._lengths[int(request.prompt.prompt_id)][sequence.sample_idx]
                sequence.dialect = ENDLESS
            batch.add(handle)
        return batch


class WorkWorker(RolloutWorker):
    """Samples the prompts of a `Work`, whatever the task."""

    prompts: ClassVar[list[tuple[int, ...]]]
    lengths: ClassVar[list[list[int]]]

    def __init__(self, checkpoint: str, config: RolloutConfig, weights_version: int = 0, num_threads: int = 0) -> None:
        super().__init__(checkpoint, config, weights_version, num_threads)
        self.engine: Any = MeasuredEngine(self.engine, self.lengths)

    def _task(self, config: TaskConfig) -> Any:
        return HashTask()

    def _prompt(self, config: TaskConfig, task: Any, example_id: int) -> Prompt:
        return Prompt(str(example_id), self.prompts[example_id])


def pool_of(work: Work) -> type[RolloutPool]:
    class Worker(WorkWorker):
        prompts, lengths = work.prompts, work.lengths

    class Pool(RolloutPool):
        @staticmethod
        def actor_class() -> Any:
            return ray.remote(Worker)

    return Pool


def build_rl_work(is_quick: bool) -> tuple[Work, Tokenizer]:
    """Answers are cut at nanochat's 256 tokens; `is_quick`: 4 problems, lengths a quarter."""
    num_prompts = 4 if is_quick else NUM_PROMPTS
    if Path(os.environ.get("RAYLLM_DATA_DIR", ""), "gsm8k").is_dir():
        work, tokenizer = build_work(num_prompts)
    else:
        print("no gsm8k in RAYLLM_DATA_DIR: prompts are random tokens, lengths drawn to be like GSM8K's")
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(20_000)]
        tokenizer = Tokenizer.train([" ".join(words)], VOCAB_SIZE)
        prompts = [tuple(draw.choices(range(8000), k=draw.randint(50, 160))) for _ in range(num_prompts)]
        drawn = [[int(draw.lognormvariate(4.68, 0.4)) for _ in range(NUM_SAMPLES)] for _ in prompts]
        work = Work(prompts, [[min(max(n, 40), 324) for n in lengths] for lengths in drawn], frozenset())
    longest = [min(MAX_TOKENS, CONTEXT_LEN - len(prompt)) for prompt in work.prompts]
    quarter = 4 if is_quick else 1
    cut = [[min(n, most) // quarter for n in lengths] for lengths, most in zip(work.lengths, longest, strict=True)]
    return replace(work, lengths=cut), tokenizer
