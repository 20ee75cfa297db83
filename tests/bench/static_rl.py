"""nanochat's RL step, re-created for `bench_rl`: sample a prompt's answers in static batches, learn from them pass by
pass, and step the optimizer after the last prompt."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from bench_engine import StaticCache, Work
from bench_train import attend_whole_rows

from rayllm.config.rl_schema import RLConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.text.chat import answer_text
from rayllm.text.tokenizer import Tokenizer

PASS_ROWS = 8


@torch.inference_mode()
def sample_static(model: GPT, prompt: tuple[int, ...], lengths: list[int], draw: torch.Generator) -> list[list[int]]:
    """Completions of one prompt that decode in lock-step until the longest has ended."""
    prompt_cache = StaticCache(model, 1, len(prompt))
    tokens = model(torch.tensor([prompt]), cache=prompt_cache.stand(len(prompt), torch.tensor([-1])))
    logits_BV = tokens[:, -1].expand(len(lengths), -1)
    cache = StaticCache(model, len(lengths), len(prompt) + max(lengths))
    cache.expand(prompt_cache)
    before_B = torch.full((len(lengths),), prompt[-1])
    columns: list[list[int]] = []
    while True:
        tokens_B1 = torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=draw)
        columns.append(tokens_B1[:, 0].tolist())
        if len(columns) == max(lengths):
            return [[column[b] for column in columns[:length]] for b, length in enumerate(lengths)]
        logits_BV = model(tokens_B1, cache=cache.stand(1, before_B))[:, -1]
        before_B = tokens_B1[:, 0]


def backward_padded(model: GPT, prompt: tuple[int, ...], rows: list[list[int]], advantages: list[float]) -> None:
    """One pass: padded rows, all logits, the mean over the pass's own tokens."""
    tokens_BT = torch.zeros(len(rows), len(prompt) + max(map(len, rows)), dtype=torch.int64)
    targets_BT = torch.full_like(tokens_BT, -1)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(prompt) + len(row)] = torch.tensor([*prompt, *row])
        targets_BT[b, len(prompt) : len(prompt) + len(row)] = torch.tensor(row)
    logits_NV = model(tokens_BT[:, :-1]).flatten(0, 1)
    nll_N = F.cross_entropy(logits_NV, targets_BT[:, 1:].flatten(), ignore_index=-1, reduction="none")
    loss = (nll_N.view(len(rows), -1) * torch.tensor(advantages)[:, None]).sum() / sum(map(len, rows))
    loss.backward()


class StaticScheme:
    """The scheme for one model and one `judge` of (problem, answer)."""

    def __init__(
        self, model: GPT, config: RLConfig, work: Work, tokenizer: Tokenizer, judge: Callable[[int, str], float]
    ) -> None:
        self._model, self._work, self._tokenizer, self._judge = model, work, tokenizer, judge
        model.attend = attend_whole_rows  # type: ignore[assignment]
        self._optimizer = build_optimizer(model, config.optim, lr_multiplier=config.lr_fraction)
        self._draw = torch.Generator().manual_seed(0)
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def step(self, num_prompts: int) -> dict[str, float]:
        """Seconds of the step and of its phases."""
        self._seconds, start = defaultdict(float), time.perf_counter()
        for i, (prompt, lengths) in enumerate(zip(self._work.prompts[:num_prompts], self._work.lengths, strict=False)):
            with self._phase("wait_for_rollouts"):
                passes = [lengths[first : first + PASS_ROWS] for first in range(0, len(lengths), PASS_ROWS)]
                sampled = [sample_static(self._model, prompt, some, self._draw) for some in passes]
                texts = [answer_text(self._tokenizer, row, [True] * len(row)) for rows in sampled for row in rows]
            with self._phase("learn"):
                rewards = [self._judge(i, text) for text in texts]
                advantages = [reward - sum(rewards) / len(rewards) for reward in rewards]
                for n, rows in enumerate(sampled):
                    share = advantages[n * PASS_ROWS : (n + 1) * PASS_ROWS]
                    backward_padded(self._model, prompt, rows, [a / (len(sampled) * num_prompts) for a in share])
        with self._phase("learn"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        return {**self._seconds, "step": time.perf_counter() - start}
