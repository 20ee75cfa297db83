"""The engine: prompts in, completions out, for RL, evaluation, chat and serving alike.

A prompt is prefilled once for all its samples; sequences decode together in the rows of one cache, and a row that
ends goes to the next that waits. When a sequence closes a python block, the calculator runs and its output enters
the sequence in place of what would be sampled. The draw for token t is a function of (seed, t) alone, so a sequence
comes out the same whatever runs beside it, up to floating-point ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rayllm.config.schema import SamplingConfig
from rayllm.engine.runner import ModelRunner, Prefilled
from rayllm.engine.sampling import sample_tokens, stable_seed
from rayllm.engine.scheduler import Scheduler
from rayllm.engine.sequence import Dialect, SequenceState
from rayllm.model.gpt import GPT
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Calculator, Completion, FinishReason, Prompt


@dataclass(frozen=True)
class Delta:
    """What one step added to a sequence: a token, or only an end."""

    seq_id: int
    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    finish_reason: FinishReason | None


class Engine:
    """Driven by one thread: `submit`, then `step` until the sequence's delta has a finish reason.

    `max_len` bounds a prompt and its completion together. Greedy where `sampling.temperature` is 0.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        num_slots: int,
        max_len: int,
        calculator: Calculator | None = None,
        weights_version: int = 0,
    ) -> None:
        self.weights_version = weights_version
        self._vocab_size = model.config.vocab_size
        self._max_len = max_len
        self._dialect = Dialect.of(tokenizer, calculator)
        self._runner = ModelRunner(model, num_slots, max_len)
        self._scheduler = Scheduler(num_slots)
        self._sequences: dict[int, SequenceState] = {}
        self._last_prefilled: tuple[Prompt, Prefilled] | None = None
        self._num_submitted = 0

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    def submit(
        self, prompt: Prompt, sampling: SamplingConfig, *, num_samples: int = 1, seed: int | None = None
    ) -> list[int]:
        """Queue `num_samples` completions of a prompt; returns their sequence ids.

        Sample i is drawn from the seed hashed from (`seed`, or `sampling.seed`; prompt_id; i). Raises ValueError for an
        empty prompt, one that leaves no room in `max_len`, or a token outside the vocabulary.
        """
        self._check(prompt)
        max_tokens = min(sampling.max_tokens, self._max_len - len(prompt.token_ids))
        run_seed = sampling.seed if seed is None else seed
        sequences = [
            SequenceState(
                seq_id=self._num_submitted + i,
                prompt=prompt,
                sampling=sampling,
                seed=stable_seed(run_seed, prompt.prompt_id, i),
                max_tokens=max_tokens,
                dialect=self._dialect,
            )
            for i in range(num_samples)
        ]
        self._num_submitted += num_samples
        self._sequences |= {s.seq_id: s for s in sequences}
        self._scheduler.submit(sequences)
        return [s.seq_id for s in sequences]

    def step(self) -> list[Delta]:
        """Admit what there is room for, give each running sequence one token, and tell what was added."""
        for row_idx, sequence in self._scheduler.admit():
            self._runner.place(self._prefill(sequence.prompt), row_idx)
        deltas = self._draw()
        for row_idx, from_idx in self._scheduler.remove_finished():
            self._runner.free(row_idx, from_idx)
        if self._scheduler.running:
            self._runner.decode([s.token_ids[-1] for s in self._scheduler.running])
        return deltas

    def cancel(self, seq_id: int) -> None:
        """End a sequence where it stands; its place is free from the next step on."""
        sequence = self._sequences[seq_id]
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            if sequence in self._scheduler.waiting:
                self._scheduler.waiting.remove(sequence)

    def completion(self, seq_id: int) -> Completion:
        """Take a finished sequence out."""
        return self._sequences.pop(seq_id).completion()

    def generate(
        self, prompts: Iterable[Prompt], sampling: SamplingConfig, *, num_samples: int = 1
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, in the order of the prompts."""
        seq_ids = [self.submit(prompt, sampling, num_samples=num_samples) for prompt in prompts]
        while not self.is_idle:
            self.step()
        return [[self.completion(seq_id) for seq_id in group] for group in seq_ids]

    def load(self, state: Mapping[str, Tensor], version: int) -> None:
        """Replace the weights; nothing may be under way. Raises ValueError when they are of another model."""
        assert self.is_idle, "weights change between sequences"
        own = self._runner.model.state_dict()
        wrong = sorted(n for n in own.keys() | state.keys() if _shape(own.get(n)) != _shape(state.get(n)))
        if wrong:
            raise ValueError(f"weights of another model: {len(wrong)} tensors differ, e.g. {', '.join(wrong[:3])}")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(state[name])
        self._last_prefilled = None
        self.weights_version = version

    def _check(self, prompt: Prompt) -> None:
        token_ids, where = prompt.token_ids, f"prompt {prompt.prompt_id!r}" if prompt.prompt_id else "the prompt"
        if not token_ids:
            raise ValueError(f"{where} is empty: give at least one token (the bos token starts a text)")
        if len(token_ids) >= self._max_len:
            raise ValueError(
                f"{where} has {len(token_ids)} tokens and leaves no room for an answer: at most {self._max_len - 1} fit"
            )
        outside = [token for token in token_ids if not 0 <= token < self._vocab_size]
        if outside:
            raise ValueError(f"{where}: token {outside[0]} is outside the vocabulary of {self._vocab_size}")

    def _prefill(self, prompt: Prompt) -> Prefilled:
        """Run a prompt, or what is kept of it: the samples of a prompt are admitted one after the other."""
        if self._last_prefilled is None or self._last_prefilled[0] is not prompt:
            self._last_prefilled = (prompt, self._runner.prefill(prompt.token_ids))
        return self._last_prefilled[1]

    def _draw(self) -> list[Delta]:
        """One token for each running sequence; one whose logits are not numbers has failed."""
        running = self._scheduler.running
        logits_BV = self._runner.logits_BV(len(running))
        is_finite_B = logits_BV.isfinite().all(dim=-1).tolist()
        deltas = []
        for sequence, is_finite in zip(running, is_finite_B, strict=True):
            if sequence.finish_reason is None and not is_finite:
                sequence.finish_reason = "failed"
            if sequence.finish_reason is not None:
                deltas.append(Delta(sequence.seq_id, (), (), sequence.finish_reason))
        for kind, rows in _by_kind(running).items():
            seeds = np.array([running[row].seed for row in rows], dtype=np.uint64)
            t = np.array([len(running[row].token_ids) for row in rows], dtype=np.uint64)
            chosen_BV = logits_BV if len(rows) == len(running) else logits_BV[rows]
            tokens_B, logprobs_B = sample_tokens(chosen_BV, seeds, t, **kind._asdict())
            for row, token_id, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
                sequence = running[row]
                token_id = sequence.add(token_id, logprob, self.weights_version)
                deltas.append(Delta(sequence.seq_id, (token_id,), (sequence.sampled[-1],), sequence.finish_reason))
        return deltas


class _Kind(NamedTuple):
    """How a token is drawn: rows of one kind are drawn together."""

    temperature: float
    top_k: int | None
    top_p: float | None


def _by_kind(running: Sequence[SequenceState]) -> dict[_Kind, list[int]]:
    """Rows to draw for."""
    rows: dict[_Kind, list[int]] = {}
    for row_idx, sequence in enumerate(running):
        if sequence.finish_reason is None:
            sampling = sequence.sampling
            rows.setdefault(_Kind(sampling.temperature, sampling.top_k, sampling.top_p), []).append(row_idx)
    return rows


def _shape(weight: Tensor | None) -> torch.Size | None:
    return None if weight is None else weight.shape
