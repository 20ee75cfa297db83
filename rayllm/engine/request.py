"""What is asked of the engine, and what it gives back. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rayllm.config.schema import SamplingConfig
from rayllm.types import Completion, FinishReason, Prompt

if TYPE_CHECKING:
    from rayllm.engine.sequence import SequenceState


@dataclass(frozen=True)
class Request:
    """`num_samples` completions of a prompt. Sample i is drawn from the seed hashed from (`seed`, or `sampling.seed`
    where that is None; prompt_id; i)."""

    prompt: Prompt
    sampling: SamplingConfig
    num_samples: int = 1
    seed: int | None = None

    def __str__(self) -> str:
        return f"request {self.prompt.prompt_id!r}" if self.prompt.prompt_id else "the request"

    def check(self, vocab_size: int, max_len: int) -> None:
        """Raises ValueError, with the value and the bound, where a model of `vocab_size` tokens cannot run it in
        `max_len` positions."""
        token_ids = self.prompt.token_ids
        if not token_ids:
            raise ValueError(f"{self}: the prompt is empty; give at least one token (the bos token starts a text)")
        if len(token_ids) >= max_len:
            raise ValueError(
                f"{self}: the prompt has {len(token_ids)} tokens and leaves no room for an answer: "
                f"at most {max_len - 1} fit"
            )
        if outside := [token for token in token_ids if not 0 <= token < vocab_size]:
            raise ValueError(f"{self}: token {outside[0]} is outside the vocabulary of {vocab_size}")
        if self.num_samples < 1:
            raise ValueError(f"{self}: num_samples must be at least 1, got {self.num_samples}")


class Handle:
    """A request under way: its samples, until each has ended."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sequences: list[SequenceState] = []

    @property
    def is_done(self) -> bool:
        """Whether all samples have ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def cancel(self, sample_idx: int | None = None) -> None:
        """End one sample, or all, where they stand; their places are free from the engine's next step on."""
        for sequence in self.sequences if sample_idx is None else [self.sequences[sample_idx]]:
            sequence.finish("cancelled")

    def completions(self) -> list[Completion]:
        """The samples, in order, once all have ended."""
        return [sequence.completion() for sequence in self.sequences]


class Batch:
    """Requests under way together, those that could not be run among them."""

    def __init__(self) -> None:
        self._parts: list[Handle | list[Completion]] = []

    def add(self, handle: Handle) -> None:
        self._parts.append(handle)

    def add_failed(self, request: Request, error: str) -> None:
        """A request that was refused: all its samples have failed."""
        self._parts.append([Completion((), (), (), "failed", error=error)] * request.num_samples)

    @property
    def is_done(self) -> bool:
        """Whether all samples of all requests have ended."""
        return all(part.is_done for part in self._parts if isinstance(part, Handle))

    def cancel(self) -> None:
        """End all where they stand."""
        for part in self._parts:
            if isinstance(part, Handle):
                part.cancel()

    def completions(self) -> list[list[Completion]]:
        """The samples of each request, in order, once all have ended."""
        return [part.completions() if isinstance(part, Handle) else part for part in self._parts]


class Delta(NamedTuple):
    """What one step added to a sample: tokens (those a tool wrote are not `sampled`), or only an end."""

    handle: Handle
    sample_idx: int
    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    finish_reason: FinishReason | None
