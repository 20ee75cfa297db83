from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm.text.stream import StreamDecoder
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
