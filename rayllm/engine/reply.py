"""What the terminal and the server share: a chat model's checkpoint, the prompt of a reply, its text as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rayllm.config.schema import SamplingConfig
from rayllm.runs.checkpoint import Checkpoint, open_checkpoint
from rayllm.text.chat import render_for_reply
from rayllm.text.stream import StreamDecoder
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
            f"{checkpoint.path} is a checkpoint of the stage {stage!r}: it continues text and cannot chat yet; "
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


class AnswerStream:
    """The text of one answer as its tokens come: prose outside tool blocks, cut before the first of the `stop` texts.

    A text that may be the beginning of a stop text is held back until that is known; so are half characters.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        """Whether a stop text has come; nothing follows it."""
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self._vocab_size = tokenizer.vocab_size
        self._special_ids = {tokenizer.special_id(name) for name in tokenizer.special_tokens}
        self._closes = {
            tokenizer.special_id(f"<|{block}_start|>"): tokenizer.special_id(f"<|{block}_end|>")
            for block in ("python", "output")
        }
        self._awaited_end: int | None = None  # of the block we are in

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; returns the text that is now certain."""
        return self._release(self._decoder.push(self._prose(token_ids)), keep_back=True)

    def finish(self) -> str:
        """The text held back to the end."""
        return self._release(self._decoder.flush(), keep_back=False)

    def _prose(self, token_ids: Iterable[int]) -> list[int]:
        """As `answer_text` tells prose from the rest; ids that the tokenizer has no text for are left out, too."""
        prose = []
        for token_id in token_ids:
            if token_id in self._closes:
                self._awaited_end = self._closes[token_id]
            elif token_id == self._awaited_end:
                self._awaited_end = None
            elif self._awaited_end is None and token_id < self._vocab_size and token_id not in self._special_ids:
                prose.append(token_id)
        return prose

    def _release(self, text: str, *, keep_back: bool) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        found = [idx for stop in self._stop if (idx := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            released, self._held = self._held[: min(found)], ""
            return released
        num_kept = self._num_undecided() if keep_back else 0
        num_released = len(self._held) - num_kept
        released, self._held = self._held[:num_released], self._held[num_released:]
        return released

    def _num_undecided(self) -> int:
        """Characters at the end that a stop text may begin with."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
