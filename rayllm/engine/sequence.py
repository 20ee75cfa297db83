"""One sequence in the making: what was sampled, what a tool wrote, what of it the cache holds. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rayllm.config.schema import SamplingConfig
from rayllm.text.stream import AnswerStream
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Completion, FinishReason

if TYPE_CHECKING:
    from rayllm.engine.prefixes import Prefix
    from rayllm.engine.request import Handle


@dataclass(frozen=True)
class Dialect:
    """The special tokens that steer generation."""

    stop_ids: frozenset[int]
    python_start: int
    python_end: int

    @staticmethod
    def of(tokenizer: Tokenizer) -> Dialect:
        return Dialect(
            stop_ids=frozenset([tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>")]),
            python_start=tokenizer.special_id("<|python_start|>"),
            python_end=tokenizer.special_id("<|python_end|>"),
        )


@dataclass(eq=False, slots=True)
class SequenceState:
    """A prompt's sample: `seed` gives its draws, `max_tokens` bounds sampled and tool tokens together.

    `num_cached` of its tokens, the prompt's first, lie in the cache; the rest are due to go there.
    """

    handle: Handle
    prompt_ids: tuple[int, ...]
    sample_idx: int
    sampling: SamplingConfig
    seed: int
    max_tokens: int
    dialect: Dialect
    answer: AnswerStream | None = None
    """Looks out for stop texts, where the request has any."""

    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept_ids: list[tuple[int, ...]] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    """Runs of [version, number of tokens]."""
    finish_reason: FinishReason | None = None
    error: str | None = None

    num_cached: int = 0
    prefix: Prefix | None = None
    """Where its prompt is, or will be."""
    is_calling: bool = False
    """Whether it waits for a tool before its next token is drawn."""
    _block_start: int | None = None

    @property
    def num_due(self) -> int:
        """Tokens that the cache does not hold yet. With none, what follows can be drawn."""
        return len(self.prompt_ids) + len(self.token_ids) - self.num_cached

    @property
    def num_own(self) -> int:
        """Tokens behind the prompt that the cache holds."""
        return self.num_cached - len(self.prompt_ids)

    @property
    def ended_in_a_draw(self) -> bool:
        """Whether its last token was drawn and ended it; else a tool's output, a failure or a cancellation did."""
        return self.finish_reason in ("stop", "length") and self.sampled[-1]

    def leave_prefix(self) -> None:
        """Use it no more."""
        if self.prefix is not None:
            self.prefix.num_users -= 1
            self.prefix = None

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Prompt and completion from one position up to another."""
        n = len(self.prompt_ids)
        return (*self.prompt_ids[start:end], *self.token_ids[max(0, start - n) : max(0, end - n)])

    def token(self, position: int) -> int:
        """The token at a position; -1 in front of the first."""
        n = len(self.prompt_ids)
        if position < n:
            return self.prompt_ids[position] if position >= 0 else -1
        return self.token_ids[position - n]

    def run_next(self) -> tuple[int, int, int, int, int]:
        """The next due token, or where none is due the last one again, as run and cached from now on: the token, the
        one before it, its position, the length of the prompt, and the prompt's row."""
        assert self.prefix is not None
        num_prompt, ids = len(self.prompt_ids), self.token_ids
        position = min(self.num_cached, num_prompt + len(ids) - 1)
        self.num_cached = position + 1
        own = position - num_prompt
        if own > 0:
            return ids[own], ids[own - 1], position, num_prompt, self.prefix.row_idx
        return self.token(position), self.token(position - 1), position, num_prompt, self.prefix.row_idx

    def add(self, token_id: int, logprob: float, kept_ids: tuple[int, ...], version: int) -> tuple[int, ...] | None:
        """Take the drawn token; returns the code of the tool block that it closes, if it closes one."""
        self._append(token_id, True, logprob, kept_ids, version)
        if token_id in self.dialect.stop_ids or self.answer is not None and self._ends_in_stop_text(token_id):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        elif token_id == self.dialect.python_start:
            self._block_start = len(self.token_ids)
        elif token_id == self.dialect.python_end and self._block_start is not None:
            code_ids = tuple(self.token_ids[self._block_start : -1])
            self._block_start = None
            return code_ids
        return None

    def insert(self, tool_ids: Sequence[int], version: int) -> tuple[int, ...]:
        """Take what a tool wrote, as far as there is room; returns the tokens taken."""
        taken = tuple(tool_ids[: self.max_tokens - len(self.token_ids)])
        for token_id in taken:
            self._append(token_id, False, 0.0, (), version)
        if self.answer is not None:
            self.answer.push(taken)
        if len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        return taken

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End where it stands; nothing happens where it has ended."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "a sequence in the making has no completion"
        return Completion(
            token_ids=tuple(self.token_ids),
            sampled_mask=tuple(self.sampled),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            weights_versions=tuple((version, count) for version, count in self.versions),
            kept_ids=tuple(self.kept_ids) if any(self.kept_ids) else None,
            error=self.error,
        )

    def _append(self, token_id: int, sampled: bool, logprob: float, kept_ids: tuple[int, ...], version: int) -> None:
        self.token_ids.append(token_id)
        self.sampled.append(sampled)
        self.logprobs.append(logprob)
        self.kept_ids.append(kept_ids)
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append([version, 0])
        self.versions[-1][1] += 1

    def _ends_in_stop_text(self, token_id: int) -> bool:
        assert self.answer is not None
        self.answer.push([token_id])
        return self.answer.is_stopped
