"""Conversations from a file of JSON lines (.jsonl, .jsonl.gz), one a line, in any of the shapes of `chat_shapes`.

A line that cannot be used is left out and counted by its reason; a last turn of the user, which nobody answers, is cut
off and counted. The validation part holds the conversations whose content hashes into the first fiftieth, so that a
conversation stays on its side whatever else the file holds; train is what is left.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rayllm.types import Conversation, Message
from tasks.chat_shapes import read_shape
from tasks.files import find_file, read_lines
from tasks.splits import place_of

VALIDATION_SHARE = 1 / 50
SPLITS = ("train", "validation")


class ChatJsonl:
    """Conversations to imitate. They come without a verdict.

    Raises FileNotFoundError that says where it looked, ValueError where no line of the file can be used.
    """

    skipped: Mapping[str, int]
    """What was left out, by reason: lines (not_utf8, not_json, unknown_shape, empty, roles), last_user_turn cut off."""

    def __init__(self, path: str, split: str = "train", num_examples: int | None = None) -> None:
        assert split in SPLITS, split
        file = find_file(path)
        self.name = f"chat_jsonl/{file.name.split('.')[0]}/{split}"
        conversations, self.skipped = _read(file)
        wanted = [c for c in conversations if (place_of(_content(c)) < VALIDATION_SHARE) == (split == "validation")]
        if not wanted:
            raise ValueError(
                f"{file}: its {split} part is empty: {len(conversations)} conversations, of which about one in "
                f"{round(1 / VALIDATION_SHARE)} is held out for validation; give a larger file, or the other part"
            )
        self._conversations = wanted[:num_examples]

    def __len__(self) -> int:
        return len(self._conversations)

    def conversation(self, example_idx: int) -> Conversation:
        """A conversation that alternates between user and assistant and ends with the assistant."""
        return self._conversations[example_idx]

    def evaluate(self, example_idx: int, answer: str) -> float:
        """Raises ValueError: there is no right answer to a chat."""
        raise ValueError(f"{self.name} has no verdicts: learn from it with `sft`; gsm8k and word_problems have some")


def _read(file: Path) -> tuple[list[Conversation], Mapping[str, int]]:
    conversations: list[Conversation] = []
    skipped: Counter[str] = Counter()
    first_fault = ""
    for number, line in read_lines(file):
        try:
            conversation, is_cut = _conversation(line)
        except _Skip as skip:
            skipped[skip.reason] += 1
            first_fault = first_fault or f"line {number}: {skip}"
            continue
        skipped["last_user_turn"] += is_cut
        conversations.append(conversation)
    if not conversations:
        fault = first_fault or "there are none; expected one conversation a line"
        raise ValueError(f"{file}: none of its {skipped.total()} lines can be used; {fault}")
    return conversations, dict(+skipped)


class _Skip(Exception):
    """A line is left out: `reason` is counted, the text is for people."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def _conversation(line: bytes) -> tuple[Conversation, bool]:
    """What a line holds, and whether a last turn of the user was cut off."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Skip("not_utf8", f"not UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise _Skip("not_json", f"no JSON ({error})") from error
    try:
        conversation = read_shape(row)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise _Skip("unknown_shape", f"no conversation ({reason})") from error
    messages = conversation.messages
    num_system = int(bool(messages) and messages[0].role == "system")
    for idx, message in enumerate(messages):
        if not _text_of(message).strip():
            raise _Skip("empty", f"turn {idx} says nothing")
        expected = "system" if idx < num_system else ("user", "assistant")[(idx - num_system) % 2]
        if message.role != expected:
            raise _Skip(
                "roles", f"turn {idx}: expected {expected}, got {message.role}; user and assistant must alternate"
            )
    is_cut = bool(messages) and messages[-1].role == "user"
    messages = messages[: len(messages) - is_cut]
    if len(messages) < num_system + 2:
        raise _Skip("empty", "there is no turn of the assistant")
    return Conversation(messages), is_cut


def _text_of(message: Message) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _content(conversation: Conversation) -> str:
    """All it says, as one text that differs for different conversations."""
    return json.dumps([(message.role, _text_of(message)) for message in conversation.messages])
