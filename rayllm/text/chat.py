"""Conversations <-> token ids with a loss mask: what the assistant says is learned, what it is told is not."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation, Message, Part, PartKind

# Around a part stand these tokens, and it is learned or not: the model writes tool calls, tools write their output.
_PARTS: dict[PartKind, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and a mask of the same length: 1 where the assistant is to learn the token.

    `<|bos|>`, then each turn between its start and end token. A system message is put in front of the first user turn.
    Both lists are cut to `max_tokens` and keep their beginning. Raises ValueError, naming the turn and the rule, for a
    conversation that is not system (or not), user, assistant, user, assistant, ...
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    _check(conversation)
    ids, mask = [tokenizer.bos_id], [0]

    def add_special(name: str, learned: int) -> None:
        ids.append(tokenizer.special_id(name))
        mask.append(learned)

    def add_text(text: str, learned: int) -> None:
        text_ids = tokenizer.encode(text)
        ids.extend(text_ids)
        mask.extend([learned] * len(text_ids))

    for message in _merge_system(conversation.messages):
        add_special(f"<|{message.role}_start|>", 0)
        for part in _parts(message):
            start, end, learned = _PARTS[part.type]
            learned = learned if message.role == "assistant" else 0
            if start is not None:
                add_special(start, learned)
            add_text(part.text, learned)
            if end is not None:
                add_special(end, learned)
        add_special(f"<|{message.role}_end|>", int(message.role == "assistant"))
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048) -> list[int]:
    """Token ids that ask for the last assistant turn: all before it, cut to `max_tokens`, and `<|assistant_start|>`.

    The last turn must be the assistant's; its content is left out. Raises ValueError as `render_conversation` does.
    """
    _check(conversation)
    last_idx = len(conversation.messages) - 1
    if conversation.messages[last_idx].role != "assistant":
        raise ValueError(
            f"turn {last_idx}: the last turn must be the assistant's, the one to complete, "
            f"got {conversation.messages[last_idx].role!r}"
        )
    ids, _ = render_conversation(tokenizer, Conversation(conversation.messages[:-1]), max_tokens)
    return [*ids, tokenizer.special_id("<|assistant_start|>")]


def visualize(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int], with_ids: bool = False) -> str:
    """The tokens on one line for a terminal, `|` between them: green is learned, red is not; `with_ids` adds grey ids.

    Line breaks and control characters are spelled out, so no text can steer the terminal.
    """
    if len(ids) != len(mask):
        raise ValueError(f"ids and mask must be of the same length, got {len(ids)} and {len(mask)}")
    green, red, grey, plain = "\x1b[32m", "\x1b[31m", "\x1b[90m", "\x1b[0m"
    shown = []
    for token_id, learned in zip(ids, mask, strict=True):
        text = "".join(ch if ch.isprintable() else repr(ch)[1:-1] for ch in tokenizer.decode([token_id]))
        shown.append((green if learned else red) + text + plain + (f"{grey}({token_id}){plain}" if with_ids else ""))
    return "|".join(shown)


def _check(conversation: Conversation) -> None:
    """Raise ValueError for the first turn that breaks a rule."""
    messages = conversation.messages
    if not messages:
        raise ValueError("the conversation is empty: expected a user turn first, or a system turn and then a user turn")
    num_system = int(messages[0].role == "system")
    if len(messages) == num_system:
        raise ValueError("turn 1 is missing: a system turn must be followed by a user turn")
    for idx, message in enumerate(messages):
        expected = "system" if idx < num_system else ("user", "assistant")[(idx - num_system) % 2]
        if message.role != expected:
            rule = "user and assistant turns alternate"
            if message.role == "system":
                rule = "a system turn may only come first"
            raise ValueError(f"turn {idx}: {rule}: expected {expected!r}, got {message.role!r}")
        if isinstance(message.content, str):
            continue
        if message.role != "assistant":
            raise ValueError(
                f"turn {idx}: only assistant turns may hold parts; {message.role} content must be a string"
            )
        for part in message.content:
            if part.type not in _PARTS:
                raise ValueError(f"turn {idx}: a part must be one of {', '.join(_PARTS)}, got {part.type!r}")


def _merge_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if messages[0].role != "system":
        return messages
    system, user, *others = messages
    return (Message("user", f"{system.content}\n\n{user.content}"), *others)


def _parts(message: Message) -> tuple[Part, ...]:
    return (Part("text", message.content),) if isinstance(message.content, str) else message.content
