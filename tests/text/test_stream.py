from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm.text.chat import answer_text
from rayllm.text.stream import AnswerStream, StreamDecoder
from rayllm.text.tokenizer import Tokenizer

BYTES = Tokenizer.byte_level()
IDS = st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=60)


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [decoder.push(ids[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)] + [decoder.flush()]


@given(st.text(), st.lists(st.integers(0, 200)))
def test_text_in_pieces_is_the_text(text: str, cuts: list[int]) -> None:
    ids = BYTES.encode(text)
    pieces = stream(BYTES, ids, cuts)
    assert "".join(pieces) == BYTES.decode(ids)
    assert "\ufffd" in text or "\ufffd" not in "".join(pieces)


@given(IDS, st.lists(st.integers(0, 60)))
def test_any_ids_in_pieces_decode_as_at_once(ids: list[int], cuts: list[int]) -> None:
    assert "".join(stream(BYTES, ids, cuts)) == BYTES.decode(ids)
    assert "".join(stream(BYTES, ids, list(range(60)))) == BYTES.decode(ids)


def test_merged_tokens_in_pieces(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("José walks to the café 🙂 and rests")
    assert "".join(stream(small_tokenizer, ids, list(range(len(ids))))) == "José walks to the café 🙂 and rests"


@pytest.mark.parametrize("char", ["é", "€", "🙂"])
def test_a_character_is_held_back_until_it_is_whole(char: str) -> None:
    decoder = StreamDecoder(BYTES)
    *first, last = BYTES.encode(char)
    assert [decoder.push([token_id]) for token_id in first] == [""] * len(first)
    assert decoder.push([last]) == char
    assert decoder.flush() == ""


def test_what_was_never_finished_comes_out_at_the_end_and_is_forgotten() -> None:
    decoder = StreamDecoder(BYTES)
    assert decoder.push([ord("a"), "🙂".encode()[0]]) == "a"
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.push([ord("b")]) == "b"
    assert decoder.push([]) == ""


# --- AnswerStream -----------------------------------------------------------------------------------------------------

ANSWERS = st.lists(st.integers(0, BYTES.vocab_size - 1) | st.sampled_from(BYTES.encode("né 12")), max_size=40)
ENDS = {BYTES.bos_id, BYTES.special_id("<|assistant_end|>")}


@given(ANSWERS)
def test_streamed_prose_is_the_answer_text(token_ids: list[int]) -> None:
    token_ids = [i for i in token_ids if i not in ENDS]  # an engine ends with these
    stream = AnswerStream(BYTES)
    streamed = "".join(stream.push([i]) for i in token_ids) + stream.finish()
    assert streamed == answer_text(BYTES, token_ids, [True] * len(token_ids))


@given(
    text=st.text(alphabet="abé", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    chunk=st.integers(1, 5),
)
def test_a_stop_text_is_found_wherever_it_is_cut(text: str, stop: list[str], chunk: int) -> None:
    found = [text.find(s) for s in stop if s in text]
    ids = BYTES.encode(text)
    stream = AnswerStream(BYTES, stop)
    pieces = [stream.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    # What is found first in time need not begin first in the text: the stop that is complete first counts.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    streamed = "".join(pieces) + stream.finish()
    assert stream.is_stopped == bool(found)
    if not found:
        assert streamed == text
    else:
        assert text.startswith(streamed) and min(found) <= len(streamed) <= min(ends)
        assert not any(s in streamed for s in stop)
