"""The words every room shares: conversations, prompts, completions, rollouts, tasks.

Standard library only, so that any room, actor or test can import it for free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Role = Literal["system", "user", "assistant"]
PartKind = Literal["text", "python", "python_output"]
FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Part:
    """One piece of an assistant message: prose, a tool call, or what the tool answered."""

    type: PartKind
    text: str


@dataclass(frozen=True)
class Message:
    """One turn. User and system turns hold a string; assistant turns a string or a tuple of parts."""

    role: Role
    content: str | tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns in order: an optional system message, then user and assistant alternating."""

    messages: tuple[Message, ...]

    @staticmethod
    def from_dict(raw: Mapping) -> Conversation:
        """Read nanochat's JSON shape: ``{"messages": [{"role", "content": str | [{"type", "text"}]}]}``.

        Raises ValueError when a role, a part type or a content type is not one of ours.
        """
        return Conversation(tuple(_message(m) for m in raw["messages"]))


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, with the identity that seeds its samples and finds its verdict."""

    prompt_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """What an engine added to a prompt.

    ``sampled_mask[t]`` is True where the model drew token t and False where a tool wrote it.
    ``logprobs[t]`` is the log-probability under the distribution sampled from (0.0 for tool tokens).
    ``weights_versions`` are runs of (version, num_tokens) that add up to ``len(token_ids)``.
    ``kept_ids[t]`` are the tokens that top-k or top-p left to draw token t from; None where nothing was cut.
    ``error`` says why a completion failed.
    """

    token_ids: tuple[int, ...]
    sampled_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weights_versions: tuple[tuple[int, int], ...] = ()
    kept_ids: tuple[tuple[int, ...], ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Rollout:
    """A completion and its verdict. ``reward`` is None when the verdict could not be had (failed)."""

    completion: Completion
    reward: float | None


@dataclass(frozen=True)
class RolloutGroup:
    """One prompt and its samples: one group, one baseline."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightsVersion:
    """Names one published set of weights: its number, and the digest a receiver checks it against."""

    number: int
    digest: str


class Calculator(Protocol):
    """What a tool block is run by: an expression in, its printed value out, None when it has none."""

    def __call__(self, expression: str) -> str | None: ...


class Task(Protocol):
    """Data and verdicts: conversations to imitate, prompts to answer, and a reward for an answer."""

    name: str

    def __len__(self) -> int: ...

    def conversation(self, example_idx: int) -> Conversation:
        """The example as a conversation that ends with the assistant's reference answer."""
        ...

    def evaluate(self, example_idx: int, answer: str) -> float:
        """Reward of an assistant's answer text; raises when no verdict can be given."""
        ...


def _message(raw: Mapping) -> Message:
    role, content = raw["role"], raw["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"message role must be system, user or assistant, got {role!r}")
    if isinstance(content, str):
        return Message(role, content)
    if role != "assistant" or not isinstance(content, Sequence):
        raise ValueError(f"{role} content must be a string, got {type(content).__name__}")
    return Message(role, tuple(_part(p) for p in content))


def _part(raw: Mapping) -> Part:
    if raw["type"] not in ("text", "python", "python_output"):
        raise ValueError(f"part type must be text, python or python_output, got {raw['type']!r}")
    if not isinstance(raw["text"], str):
        raise ValueError(f"part text must be a string, got {type(raw['text']).__name__}")
    return Part(raw["type"], raw["text"])
