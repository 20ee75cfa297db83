"""What the terminal and the server share: a chat model's checkpoint, the prompt of a reply, where it is cut."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rayllm.config.schema import SamplingConfig
from rayllm.runs.checkpoint import Checkpoint, open_checkpoint
from rayllm.text.chat import render_for_reply
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation

CHAT_STAGES = ("sft", "rl")
# The least share of the context that a prompt leaves to its answer, however long an answer is allowed.
_ANSWER_SHARE = 4


def open_chat_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at a path, or the newest of a run, of a model that was taught to chat.

    Raises FileNotFoundError where there is none and ValueError for a base model's: it only continues text.
    """
    try:
        checkpoint = open_checkpoint(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no chat model at {path}: give --checkpoint=DIR, a run directory of `rayllm sft` or `rayllm rl`"
        ) from error
    stage = checkpoint.state.get("stage")
    if stage == "imported":
        stage = checkpoint.state.get("source_stage")
        if stage is None:
            print(f"{path}: imported; assuming that it was taught to chat", file=sys.stderr)
            return checkpoint
    if stage not in CHAT_STAGES:
        raise ValueError(
            f"{checkpoint} is a checkpoint of the stage {stage!r}: it continues text and cannot chat yet; "
            "teach it with `rayllm sft` and give that run as --checkpoint"
        )
    return checkpoint


def render_reply_prompt(
    tokenizer: Tokenizer, conversation: Conversation, sampling: SamplingConfig, context_len: int
) -> tuple[list[int], SamplingConfig]:
    """Token ids that ask for the next assistant turn, and `sampling` with `max_tokens` cut to the room they leave.

    The prompt leaves room for `sampling.max_tokens`, or for a quarter of the context where that is less; the oldest
    turns go to make it. Raises ValueError when the conversation breaks a rule or its last turn alone is too long.
    """
    reserved = min(sampling.max_tokens, max(1, context_len // _ANSWER_SHARE))
    ids = render_for_reply(tokenizer, conversation, context_len - reserved)
    return ids, replace(sampling, max_tokens=min(sampling.max_tokens, context_len - len(ids)))


def cut_at_stop(text: str, stop: Iterable[str]) -> str:
    """What comes before the first of the stop texts."""
    return text[: min((text.find(s) for s in stop if s in text), default=None)]
