"""The shapes in which conversations lie in files, told apart by their keys, and how each becomes turns.

| keys                                  | what it is                        | turns                                   |
|---------------------------------------|-----------------------------------|-----------------------------------------|
| a bare list of {role, content}        | nanochat's identity conversations | as they stand                           |
| messages: [{role, content}]           | nanochat, SmolTalk, OpenAI        | as they stand                           |
| conversations: [{from, value}]        | ShareGPT                          | human or user, gpt or assistant, system |
| conversation: [str]                   | ChatterBot corpus                 | user first, then by turns               |
| turns: [{speaker, utterance}]         | Schema-Guided Dialogue            | USER and SYSTEM, which is the assistant |
| content: [{agent, message}]           | Topical-Chat                      | whoever speaks first is the user        |
| Best Generated Conversation: str      | Synthetic-Persona-Chat            | lines `User 1: ...` and `User 2: ...`   |
| question, answer, and maybe rationale | Flan chains of thought            | the rationale, then `The answer is ...` |
| instruction, instances: [{...}]       | Self-Instruct                     | instruction and the first input; output |

The converters trust the shape: whatever they meet in a damaged row (a missing key, a number for a list) is a KeyError,
TypeError, ValueError, IndexError or AttributeError, which the reader of the file counts as a line of unknown shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rayllm.types import Conversation, Message, Role

_SHARE_GPT: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_SGD: dict[str, Role] = {"USER": "user", "SYSTEM": "assistant"}
_PERSONA_LINE = re.compile(r"User ([12]):(.*)")


def read_shape(row: Any) -> Conversation:
    """The conversation in a row of JSON. Raises one of the errors above where its shape is none of these."""
    if isinstance(row, list):
        return Conversation.from_dict({"messages": row})
    for keys, convert in _SHAPES.items():
        if all(key in row for key in keys):
            return convert(row)
    raise ValueError(f"no known shape of conversation has the keys {', '.join(map(str, row)) or '(none)'}")


def _turns(turns: Iterable[tuple[Role, str]]) -> Conversation:
    return Conversation(tuple(Message(role, _text(text).strip()) for role, text in turns))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _by_turns(texts: Iterable[str]) -> Conversation:
    if isinstance(texts, str):  # else its letters would take turns
        raise TypeError("expected a list of turns, got one text")
    roles: tuple[Role, Role] = ("user", "assistant")
    return _turns((roles[idx % 2], text) for idx, text in enumerate(texts))


def _two_speakers(lines: Iterable[tuple[str, str]]) -> Conversation:
    """Of (speaker, text); the first to speak is the user."""
    spoken = list(lines)
    return _turns(("user" if speaker == spoken[0][0] else "assistant", text) for speaker, text in spoken)


def _persona_chat(row: Mapping[str, Any]) -> Conversation:
    """Blank lines and stage directions between the turns are left out."""
    lines = (_PERSONA_LINE.fullmatch(line) for line in row["Best Generated Conversation"].split("\n"))
    return _two_speakers((line[1], line[2]) for line in lines if line)


def _chain_of_thought(row: Mapping[str, Any]) -> Conversation:
    answer = _text(row["answer"])
    if "rationale" in row:
        answer = f"{_text(row['rationale'])}\nThe answer is {answer}."
    return _by_turns([row["question"], answer])


def _self_instruct(row: Mapping[str, Any]) -> Conversation:
    first = row["instances"][0]
    request = "\n\n".join(text for text in (row["instruction"], first["input"]) if text)
    return _by_turns([request, first["output"]])


_SHAPES: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Conversation]] = {
    ("messages",): Conversation.from_dict,
    ("conversations",): lambda row: _turns((_SHARE_GPT[turn["from"]], turn["value"]) for turn in row["conversations"]),
    ("conversation",): lambda row: _by_turns(row["conversation"]),
    ("turns",): lambda row: _turns((_SGD[turn["speaker"]], turn["utterance"]) for turn in row["turns"]),
    ("content",): lambda row: _two_speakers((turn["agent"], turn["message"]) for turn in row["content"]),
    ("Best Generated Conversation",): _persona_chat,
    ("question", "answer"): _chain_of_thought,
    ("instruction", "instances"): _self_instruct,
}
