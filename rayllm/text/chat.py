"""Conversations <-> token ids with a loss mask: what the assistant says is learned, what it is told is not.

The way there: `render_conversation` to learn from, `render_for_completion` and `render_for_reply` to be answered. The
way back: `split_completion` and `answer_text` read what an engine added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation, Message, Part, PartKind

# Around a part stand these tokens, and it is learned or not: the model writes tool calls, tools write their output.
_PARTS: dict[PartKind, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}
_TEXT: PartKind = "text"
_OPENS: dict[str, PartKind] = {start: kind for kind, (start, _, _) in _PARTS.items() if start is not None}
_CLOSES: dict[str, PartKind] = {end: kind for kind, (_, end, _) in _PARTS.items() if end is not None}
_STOPS = ("<|assistant_end|>", "<|bos|>")


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
    ids, mask = _render_turns(tokenizer, _merge_system(conversation.messages))
    return [tokenizer.bos_id, *ids][:max_tokens], [0, *mask][:max_tokens]


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


def render_for_reply(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048) -> list[int]:
    """Token ids that ask for a reply to the last user turn, at most `max_tokens` with `<|assistant_start|>` at the end.

    A conversation that is too long loses its oldest user and assistant turns, pair by pair; the system message stays,
    in front of the oldest user turn kept. Raises ValueError where the last turn is not the user's, where the last user
    turn (and the system message) alone is too long, and as `render_conversation` does.
    """
    _check(conversation)
    messages = conversation.messages
    if messages[-1].role != "user":
        raise ValueError(
            f"turn {len(messages) - 1}: the last turn must be the user's, to be replied to, got {messages[-1].role!r}"
        )
    num_system = int(messages[0].role == "system")
    ids: list[int] = []
    newer = [tokenizer.special_id("<|assistant_start|>")]
    for first in range(len(messages) - 1, num_system - 1, -2):
        oldest, _ = _render_turns(tokenizer, _merge_system(messages[:num_system] + messages[first : first + 1]))
        if 1 + len(oldest) + len(newer) > max_tokens:
            break
        ids = [tokenizer.bos_id, *oldest, *newer]
        if first > num_system:
            newer = _render_turns(tokenizer, messages[first - 1 : first + 1])[0] + newer
    if not ids:
        raise ValueError(
            f"the last user turn takes {1 + len(oldest) + len(newer)} tokens"
            f"{' with the system message' * num_system}, more than the {max_tokens} there is room for; shorten it"
        )
    return ids


def split_completion(tokenizer: Tokenizer, token_ids: Sequence[int], sampled_mask: Sequence[bool]) -> tuple[Part, ...]:
    """The parts of an assistant's turn, read back from the tokens that follow `<|assistant_start|>`.

    `sampled_mask`, of the same length, is True where the model drew the token. A python block counts whether it was
    closed or not; a python_output part is what a tool wrote, so output that the model made up itself is left out.
    """
    parts = []
    for (_, kind), steps in groupby(_walk(tokenizer, token_ids, sampled_mask), key=lambda step: step[:2]):
        ids = [token_id for _, _, token_id, is_sampled in steps if kind != "python_output" or not is_sampled]
        if ids:
            parts.append(Part(kind, tokenizer.decode(ids)))
    return tuple(parts)


def answer_text(tokenizer: Tokenizer, token_ids: Sequence[int], sampled_mask: Sequence[bool]) -> str:
    """What a verdict is given on: the prose that the model drew itself, without tool blocks and without special tokens.

    Neither a tool's output nor anything within a python or output block, closed or not, can be an answer.
    """
    walk = _walk(tokenizer, token_ids, sampled_mask)
    return tokenizer.decode([token_id for _, kind, token_id, is_sampled in walk if kind == "text" and is_sampled])


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


def _walk(
    tokenizer: Tokenizer, token_ids: Sequence[int], sampled_mask: Sequence[bool]
) -> Iterator[tuple[int, PartKind, int, bool]]:
    """(number of the block, its kind, token id, whether it was sampled) of every token that stands for text.

    A start token opens its block wherever it comes, only the end token of the open block closes it, a stop token ends
    the turn; a special token that has no place where it stands is passed over.
    """
    if len(token_ids) != len(sampled_mask):
        raise ValueError(
            f"token_ids and sampled_mask must be of the same length, got {len(token_ids)} and {len(sampled_mask)}"
        )
    names = {tokenizer.special_id(name): name for name in tokenizer.special_tokens}
    block_idx, kind = 0, _TEXT
    for token_id, is_sampled in zip(token_ids, sampled_mask, strict=True):
        name = names.get(token_id)
        if name is None:
            yield block_idx, kind, token_id, bool(is_sampled)
        elif name in _STOPS:
            return
        elif name in _OPENS:
            block_idx, kind = block_idx + 1, _OPENS[name]
        elif _CLOSES.get(name) == kind:
            block_idx, kind = block_idx + 1, _TEXT


def _render_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and mask of user and assistant turns, each between its start and end token."""
    ids: list[int] = []
    mask: list[int] = []

    def add_special(name: str, learned: int) -> None:
        ids.append(tokenizer.special_id(name))
        mask.append(learned)

    for message in messages:
        add_special(f"<|{message.role}_start|>", 0)
        for part in _parts(message):
            start, end, learned = _PARTS[part.type]
            learned = learned if message.role == "assistant" else 0
            if start is not None:
                add_special(start, learned)
            text_ids = tokenizer.encode(part.text)
            ids.extend(text_ids)
            mask.extend([learned] * len(text_ids))
            if end is not None:
                add_special(end, learned)
        add_special(f"<|{message.role}_end|>", int(message.role == "assistant"))
    return ids, mask


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
