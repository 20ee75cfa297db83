"""One sequence in the making: what was sampled, what a tool wrote, and why it ended. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rayllm.config.schema import SamplingConfig
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Calculator, Completion, FinishReason, Prompt


@dataclass(frozen=True)
class Dialect:
    """The special tokens that steer generation, and what runs a tool block."""

    stop_ids: frozenset[int]
    python_start: int
    python_end: int
    run_block: Callable[[Sequence[int]], list[int]]
    """Token ids of a block's code -> those of its output, output tokens around it; none where it has none."""

    @staticmethod
    def of(tokenizer: Tokenizer, calculator: Calculator | None) -> Dialect:
        """A tokenizer's; without a calculator tool blocks get no output."""

        def run_block(code_ids: Sequence[int]) -> list[int]:
            output = None if calculator is None else calculator(tokenizer.decode(list(code_ids)))
            if output is None:
                return []
            start, end = (tokenizer.special_id(name) for name in ("<|output_start|>", "<|output_end|>"))
            return [start, *tokenizer.encode(output), end]

        return Dialect(
            stop_ids=frozenset([tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>")]),
            python_start=tokenizer.special_id("<|python_start|>"),
            python_end=tokenizer.special_id("<|python_end|>"),
            run_block=run_block,
        )


@dataclass(eq=False)
class SequenceState:
    """A prompt's sample: `seed` gives its draws, `max_tokens` bounds sampled and tool tokens together."""

    seq_id: int
    prompt: Prompt
    sampling: SamplingConfig
    seed: int
    max_tokens: int
    dialect: Dialect
    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _forced: deque[int] = field(default_factory=deque)
    _block_start: int | None = None

    def add(self, drawn_id: int, logprob: float, weights_version: int) -> int:
        """Take the drawn token, or the tool token that is due in its place; returns the one taken."""
        is_sampled = not self._forced
        token_id = drawn_id if is_sampled else self._forced.popleft()
        self.token_ids.append(token_id)
        self.sampled.append(is_sampled)
        self.logprobs.append(logprob if is_sampled else 0.0)
        if self.versions and self.versions[-1][0] == weights_version:
            self.versions[-1] = (weights_version, self.versions[-1][1] + 1)
        else:
            self.versions.append((weights_version, 1))
        if is_sampled and token_id in self.dialect.stop_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        elif is_sampled:
            self._follow_block(token_id)
        return token_id

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "a sequence in the making has no completion"
        return Completion(
            token_ids=tuple(self.token_ids),
            sampled_mask=tuple(self.sampled),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            weights_versions=tuple(self.versions),
        )

    def _follow_block(self, token_id: int) -> None:
        if token_id == self.dialect.python_start:
            self._block_start = len(self.token_ids)
        elif token_id == self.dialect.python_end and self._block_start is not None:
            code_ids = self.token_ids[self._block_start : -1]
            self._block_start = None
            self._forced.extend(self.dialect.run_block(code_ids))
