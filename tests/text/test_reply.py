"""Prompts that ask for a reply, and reading back what came."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm.text.chat import (
    answer_text,
    render_conversation,
    render_for_completion,
    render_for_reply,
    split_completion,
)
from rayllm.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from rayllm.types import Conversation, Message, Part, PartKind
from tasks.answers import extract_answer
from tasks.word_problems import WordProblems

BYTES = Tokenizer.byte_level()
TOKENS = {name.strip("<|>"): BYTES.special_id(name) for name in SPECIAL_TOKENS}


def talk(*turns: str, system: str | None = None) -> Conversation:
    messages = [Message(("user", "assistant")[idx % 2], turn) for idx, turn in enumerate(turns)]  # type: ignore[arg-type]
    return Conversation(tuple([Message("system", system)] * (system is not None) + messages))


def ids_of(*pieces: str) -> list[int]:
    """Tokens of texts and, by name, of special tokens."""
    return [i for piece in pieces for i in ([TOKENS[piece]] if piece in TOKENS else BYTES.encode(piece))]


def sampled(ids: list[int]) -> list[bool]:
    return [True] * len(ids)


# --- render_for_reply -------------------------------------------------------------------------------------------------


def test_a_reply_is_asked_for_as_a_completion_is() -> None:
    for conversation in (talk("hi"), talk("hi", "hello", "and?"), talk("hi", "hello", "and?", system="be kind")):
        with_answer = Conversation((*conversation.messages, Message("assistant", "x")))
        assert render_for_reply(BYTES, conversation) == render_for_completion(BYTES, with_answer)


def test_the_oldest_pairs_are_dropped_when_it_is_too_long() -> None:
    whole = talk("one", "1", "two", "2", "three")
    num_tokens = len(render_for_reply(BYTES, whole))
    assert render_for_reply(BYTES, whole, num_tokens) == render_for_reply(BYTES, whole)
    shorter = talk("two", "2", "three")
    assert render_for_reply(BYTES, whole, num_tokens - 1) == render_for_reply(BYTES, shorter)
    num_shorter = len(render_for_reply(BYTES, shorter))
    assert render_for_reply(BYTES, whole, num_shorter) == render_for_reply(BYTES, shorter)
    assert render_for_reply(BYTES, whole, num_shorter - 1) == render_for_reply(BYTES, talk("three"))


def test_the_system_message_stays() -> None:
    whole, shorter = talk("one", "1", "two", system="be kind"), talk("two", system="be kind")
    room = len(render_for_reply(BYTES, whole)) - 1
    assert render_for_reply(BYTES, whole, room) == render_for_reply(BYTES, shorter)
    assert "be kind\n\ntwo" in BYTES.decode(render_for_reply(BYTES, whole, room))


def test_a_last_turn_that_does_not_fit_is_refused() -> None:
    room = len(render_for_reply(BYTES, talk("a long turn")))
    with pytest.raises(ValueError, match=rf"takes {room} tokens, more than the {room - 1} there is room for"):
        render_for_reply(BYTES, talk("hi", "hello", "a long turn"), room - 1)
    with pytest.raises(ValueError, match="tokens with the system message, more than the 9"):
        render_for_reply(BYTES, talk("hi", system="be kind"), 9)


def test_only_a_user_turn_is_replied_to() -> None:
    with pytest.raises(ValueError, match=r"turn 1: the last turn must be the user's, .* got 'assistant'"):
        render_for_reply(BYTES, talk("hi", "hello"))
    with pytest.raises(ValueError, match="turn 1: user and assistant turns alternate"):
        render_for_reply(BYTES, Conversation((Message("user", "a"), Message("user", "b"))))
    with pytest.raises(ValueError, match="empty"):
        render_for_reply(BYTES, Conversation(()))


@given(st.lists(st.text(max_size=12), min_size=1, max_size=7).filter(lambda turns: len(turns) % 2), st.integers(5, 120))
def test_it_never_is_longer_than_asked_and_keeps_as_much_as_fits(turns: list[str], max_tokens: int) -> None:
    fitting = [
        start for start in range(0, len(turns), 2) if len(render_for_reply(BYTES, talk(*turns[start:]))) <= max_tokens
    ]
    if not fitting:
        with pytest.raises(ValueError, match="room for"):
            render_for_reply(BYTES, talk(*turns), max_tokens)
    else:
        expected = render_for_reply(BYTES, talk(*turns[fitting[0] :]))
        assert render_for_reply(BYTES, talk(*turns), max_tokens) == expected


# --- split_completion, answer_text ------------------------------------------------------------------------------------

PARTS = st.lists(st.builds(Part, st.sampled_from(["text", "python", "python_output"]), st.text(min_size=1)), max_size=6)


def completion_of(parts: tuple[Part, ...]) -> tuple[list[int], list[bool]]:
    """What an engine would have added, had the model written these parts and tools their output."""
    question = Message("user", "?")
    ids, mask = render_conversation(BYTES, Conversation((question, Message("assistant", parts))), 10**6)
    num_prompt = len(render_for_reply(BYTES, Conversation((question,))))
    return ids[num_prompt:], [bool(learned) for learned in mask[num_prompt:]]


@given(PARTS)
def test_parts_come_back_as_they_were_rendered(parts: list[Part]) -> None:
    expected: list[Part] = []
    for part in parts:
        text = BYTES.decode(BYTES.encode(part.text))
        if expected and part.type == expected[-1].type == "text":  # nothing stands between two texts
            text = expected.pop().text + text
        expected.append(Part(part.type, text))
    ids, mask = completion_of(tuple(parts))
    assert split_completion(BYTES, ids, mask) == tuple(expected)
    assert answer_text(BYTES, ids, mask) == "".join(part.text for part in expected if part.type == "text")


def test_reference_solutions_come_back_and_are_right() -> None:
    task = WordProblems()
    for idx in range(100):
        parts = task.conversation(idx).messages[-1].content
        assert isinstance(parts, tuple)
        ids, mask = completion_of(parts)
        assert split_completion(BYTES, ids, mask) == parts
        assert task.evaluate(idx, answer_text(BYTES, ids, mask)) == 1.0


BLOCKS: list[tuple[list[str], list[tuple[PartKind, str]]]] = [
    (["a", "python_start", "1+1"], [("text", "a"), ("python", "1+1")]),  # never closed
    (["python_start", "1", "python_start", "2", "python_end", "b"], [("python", "1"), ("python", "2"), ("text", "b")]),
    (["python_start", "1", "output_end", "2", "python_end", "b"], [("python", "12"), ("text", "b")]),  # not its end
    (["a", "python_end", "output_end", "user_start", "b"], [("text", "ab")]),  # tokens with no place there
    (["python_start", "python_end", "b"], [("text", "b")]),  # nothing in it
    (["a", "assistant_end", "b"], [("text", "a")]),  # nothing counts after the end
    (["a", "bos", "b"], [("text", "a")]),
    (["python_start", "1", "assistant_end", "b"], [("python", "1")]),
    (["assistant_end"], []),
    ([], []),
]


@pytest.mark.parametrize(("pieces", "parts"), BLOCKS)
def test_blocks_that_are_not_well_formed(pieces: list[str], parts: list[tuple[PartKind, str]]) -> None:
    ids = ids_of(*pieces)
    assert split_completion(BYTES, ids, sampled(ids)) == tuple(Part(kind, text) for kind, text in parts)


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        (["#### 18", "assistant_end"], "18"),
        (["#### 1", "#### 18", "assistant_end"], "18"),
        (["#### 17\n", "#### 18"], "18"),
        (["python_start", "#### 18", "python_end"], None),
        (["python_start", "#### 18"], None),
        (["#### 17", "python_start", "#### 18"], "17"),
        (["output_start", "#### 18", "output_end"], None),
        (["output_start", "#### 18"], None),
        (["#### 17", "output_start", "#### 18", "output_end"], "17"),
        (["#### ", "python_start", "9*2", "python_end", "18"], "18"),
        (["assistant_end", "#### 18"], None),
        (["<|python_start|>#### 18"], "18"),  # text that spells a special token is text
    ],
)
def test_what_counts_as_the_answer(pieces: list[str], answer: str | None) -> None:
    ids = ids_of(*pieces)
    assert extract_answer(answer_text(BYTES, ids, sampled(ids))) == answer


def test_what_a_tool_wrote_is_no_answer() -> None:
    """A model that gets the calculator to print the answer has not said it."""
    said, written = ids_of("#### ", "python_start", "9*2", "python_end"), ids_of("output_start", "18", "output_end")
    mask = [True] * len(said) + [False] * len(written)
    assert answer_text(BYTES, said + written, mask) == "#### "
    forced = ids_of("#### 18")
    assert answer_text(BYTES, forced, [False] * len(forced)) == ""


def test_output_that_the_model_made_up_is_no_tool_output() -> None:
    ids = ids_of("python_start", "2*2", "python_end", "output_start", "5", "output_end", "5")
    assert split_completion(BYTES, ids, sampled(ids)) == (Part("python", "2*2"), Part("text", "5"))


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="same length, got 1 and 0"):
        answer_text(BYTES, [65], [])
    with pytest.raises(ValueError, match="same length, got 1 and 2"):
        split_completion(BYTES, [65], [True, True])


@given(st.lists(st.tuples(st.integers(0, BYTES.vocab_size - 1), st.booleans()), max_size=60))
def test_any_tokens_can_be_read(tokens: list[tuple[int, bool]]) -> None:
    ids, mask = [token_id for token_id, _ in tokens], [is_sampled for _, is_sampled in tokens]
    parts = split_completion(BYTES, ids, mask)
    assert all(part.text for part in parts)
    answer_text(BYTES, ids, mask)
