from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, read_tokenizer_json

ROOT = Path(__file__).parents[2]
BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}
BYTES = Tokenizer.byte_level()
MERGED = Tokenizer({**BYTE_RANKS, b"th": 256, b"the": 257, b" the": 258, "é".encode(): 259, b"<|": 260}, SPLIT_PATTERN)

# Any text that has a UTF-8 form, with what trips tokenizers over-represented.
TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from(
            ["🙂", "👩‍👩‍👧", "가", "\r\n", "   ", "\x00", "12345", "'LL", "the", "<|bos|>", "<|user_end|>", "\u2028"]
        ),
    )
).map("".join)


@given(TEXT)
def test_any_text_survives_a_round_trip(text: str) -> None:
    for tokenizer in (BYTES, MERGED):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@given(TEXT)
def test_no_text_yields_a_special_token(text: str) -> None:
    assert max(MERGED.encode(text), default=0) < MERGED.bos_id


@given(TEXT)
def test_token_bytes_add_up_to_the_utf8_length(text: str) -> None:
    assert MERGED.token_bytes_V()[MERGED.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_the_name_of_a_special_token_is_plain_text(small_tokenizer: Tokenizer, name: str) -> None:
    ids = small_tokenizer.encode(name)
    assert len(ids) > 1
    assert small_tokenizer.special_id(name) not in ids
    assert small_tokenizer.decode(ids) == small_tokenizer.decode([small_tokenizer.special_id(name)]) == name


def test_special_tokens_are_distinct_and_follow_the_ranks(small_tokenizer: Tokenizer) -> None:
    ids = [small_tokenizer.special_id(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(small_tokenizer.vocab_size - 9, small_tokenizer.vocab_size))
    assert small_tokenizer.bos_id == ids[0]
    with pytest.raises(ValueError, match=r"no special token '<\|pad\|>'; this tokenizer has <\|bos\|>"):
        small_tokenizer.special_id("<|pad|>")


def test_training_compresses_and_repeats(small_tokenizer: Tokenizer, small_documents: list[str]) -> None:
    text = small_documents[0]
    assert small_tokenizer.vocab_size == 320
    assert small_tokenizer.kind == "bpe"
    assert len(small_tokenizer.encode(text)) < len(text.encode()) / 1.5
    assert Tokenizer.train(iter(small_documents), 320).fingerprint == small_tokenizer.fingerprint
    assert Tokenizer.train(small_documents, 319).fingerprint != small_tokenizer.fingerprint


def test_numbers_are_cut_every_two_digits() -> None:
    tokenizer = Tokenizer({**BYTE_RANKS, b"12": 256, b"34": 257, b"1234": 258}, SPLIT_PATTERN)
    assert tokenizer.encode("1234") == [256, 257]


def test_byte_level_ids_are_the_bytes() -> None:
    assert BYTES.vocab_size == 265
    assert BYTES.kind == "byte"
    assert BYTES.encode("é🙂") == list("é🙂".encode())
    assert BYTES.bos_id == 256
    assert Tokenizer.train(["some text"], 265).fingerprint == BYTES.fingerprint


def test_token_bytes_are_zero_for_special_tokens_only() -> None:
    lengths_V = MERGED.token_bytes_V()
    assert lengths_V.dtype == np.int32
    assert lengths_V.shape == (MERGED.vocab_size,)
    assert lengths_V[256:].tolist() == [2, 3, 4, 2, 2] + [0] * 9


def test_batches_encode_as_single_texts_do(small_tokenizer: Tokenizer, small_documents: list[str]) -> None:
    texts = [*small_documents, "", "<|bos|>", "🙂"]
    assert small_tokenizer.encode_batch(texts) == [small_tokenizer.encode(text) for text in texts]
    assert small_tokenizer.encode_batch(iter(texts), num_threads=1) == small_tokenizer.encode_batch(texts)


def test_invalid_bytes_and_halves_of_surrogate_pairs_become_replacement_characters() -> None:
    assert BYTES.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a\ufffdb"
    broken, repaired = ("a\ud800b " * 50, "a\ufffdb " * 50)
    assert Tokenizer.train([broken], 268).fingerprint == Tokenizer.train([repaired], 268).fingerprint


@pytest.mark.parametrize("strange", [-1, 270 + 4, 10**12])
def test_ids_outside_the_vocabulary_are_named(strange: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {strange} is not in the vocabulary \(0 to 269\)"):
        MERGED.decode([0, strange])


@pytest.mark.parametrize("blank", [" ", "\u3000", "\t "])
def test_endless_blanks_are_no_danger(blank: str) -> None:
    text = "a" + blank * 1_200_000 + "b\n"
    assert BYTES.decode_bytes(BYTES.encode(text)) == text.encode()
    assert Tokenizer.train([text], 266).vocab_size == 266


def test_training_without_text_is_refused() -> None:
    for nothing in ([], ["", ""]):
        with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
            Tokenizer.train(nothing, 300)


def test_too_little_text_names_the_size_it_reaches() -> None:
    # Merges: el, hel, lo, hello, " hello".
    with pytest.raises(ValueError, match="vocab_size is 300, but 11 characters of text hold merges for 270 only"):
        Tokenizer.train(["hello hello"], 300)
    assert Tokenizer.train(["hello hello"], 270).vocab_size == 270


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 265, 256 bytes and 9 special tokens, got 264"):
        Tokenizer.train(["text"], 264)


def test_a_failing_source_fails_the_training() -> None:
    def documents():
        yield "some text"
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        Tokenizer.train(documents(), 266)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({**BYTE_RANKS, b"ab": 257}, "ranks must count up from 0: expected 256, got 257 for b'ab'"),
        ({**BYTE_RANKS, b"ab": 255}, "ranks must count up from 0: expected 256, got 255"),
        ({**BYTE_RANKS, b"ab": -1}, "ranks must count up from 0: expected 0, got -1 for b'ab'"),
        ({token: rank for token, rank in BYTE_RANKS.items() if rank < 255}, r"1 are missing, first b'\\xff'"),
        ({**BYTE_RANKS, b"": 256}, "ranks must map non-empty bytes"),
        ({**BYTE_RANKS, "ab": 256}, "ranks must map non-empty bytes"),
    ],
)
def test_ranks_that_are_none_are_refused(ranks: dict[bytes, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(ranks, SPLIT_PATTERN)


def test_special_tokens_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="must differ from each other"):
        Tokenizer(BYTE_RANKS, SPLIT_PATTERN, ["<|bos|>", "<|bos|>"])
    with pytest.raises(ValueError, match="must be non-empty strings"):
        Tokenizer(BYTE_RANKS, SPLIT_PATTERN, ["<|bos|>", ""])


def test_fingerprint_changes_with_every_part() -> None:
    prints = {
        BYTES.fingerprint,
        MERGED.fingerprint,
        Tokenizer(BYTE_RANKS, SPLIT_PATTERN, SPECIAL_TOKENS[::-1]).fingerprint,
        Tokenizer(BYTE_RANKS, SPLIT_PATTERN + r"|\d").fingerprint,
        Tokenizer({**BYTE_RANKS, b"a": 98, b"b": 97}, SPLIT_PATTERN).fingerprint,
    }
    assert len(prints) == 5
    assert all(len(p) == 64 for p in prints)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(small_tokenizer: Tokenizer, small_documents: list[str], tmp_path: Path) -> None:
    small_tokenizer.save(tmp_path / "deep" / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "deep" / "tokenizer")
    assert loaded.fingerprint == small_tokenizer.fingerprint
    assert loaded.special_tokens == small_tokenizer.special_tokens
    for text in [*small_documents, "naïve 🙂 1234\n\n"]:
        assert loaded.encode(text) == small_tokenizer.encode(text)


def test_the_description_needs_no_ranks(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save(tmp_path)
    _ranks_path(tmp_path).unlink()
    described = read_tokenizer_json(tmp_path)
    assert described["vocab_size"] == 320
    assert described["kind"] == "bpe"
    assert described["fingerprint"] == small_tokenizer.fingerprint


def test_reading_the_description_imports_nothing_heavy(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    code = (
        "import sys; from rayllm.text.tokenizer import read_tokenizer_json; read_tokenizer_json(sys.argv[1]);"
        "assert not {'torch', 'tiktoken', 'rustbpe', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)


def test_ranks_are_kept_in_tiktokens_own_format(tmp_path: Path) -> None:
    from tiktoken.load import load_tiktoken_bpe

    MERGED.save(tmp_path)
    assert load_tiktoken_bpe(str(_ranks_path(tmp_path)))[b" the"] == 258


def test_saving_over_another_tokenizer_leaves_the_new_one_alone(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    BYTES.save(tmp_path)
    BYTES.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == BYTES.fingerprint
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", "tokenizer.json", _ranks_path(tmp_path).name}


@pytest.mark.parametrize("room", [100, 5000], ids=["no room for the ranks", "no room for tokenizer.json"])
def test_a_save_that_fails_leaves_the_older_tokenizer(tmp_path: Path, room: int) -> None:
    BYTES.save(tmp_path)
    code = (
        "import resource, sys; from rayllm.text.tokenizer import Tokenizer, SPLIT_PATTERN;"
        "tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, SPLIT_PATTERN, ['<|' + 'x' * 10_000 + '|>']);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); tokenizer.save(sys.argv[1])"
    )
    saving = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert saving.returncode == 1
    assert "could not write" in saving.stderr
    assert Tokenizer.load(tmp_path).fingerprint == BYTES.fingerprint
    MERGED.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_tokenizer_is_told_with_the_cure(tmp_path: Path) -> None:
    for read in (Tokenizer.load, read_tokenizer_json):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing; `rayllm tokenizer --out=.*nowhere`"):
            read(tmp_path / "nowhere")


def test_missing_ranks_are_told(tmp_path: Path) -> None:
    MERGED.save(tmp_path)
    _ranks_path(tmp_path).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"ranks-.*\.tiktoken is missing, and tokenizer\.json beside it needs it"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1].rsplit(b"\n", 1)[0] + b"\n",  # the last line lost
        lambda content: content[: len(content) // 2],  # cut within a line
        lambda content: content.replace(base64.b64encode(b" the"), base64.b64encode(b" thy")),
        lambda content: b"",
        lambda content: b"\x00" * len(content),
        lambda content: content + b"!!! 261\n",
        lambda content: content + b"YQ==\n",
        lambda content: content.replace(b" 258\n", b" 1000\n"),
    ],
)
def test_damaged_ranks_are_told(tmp_path: Path, damage) -> None:
    MERGED.save(tmp_path)
    file = _ranks_path(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        ValueError, match="is damaged .*copy the whole directory again, or train again|is damaged: its files"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", None, "no tokenizer of ours"),
        ("version", 2, "has format version 2, this code reads 1"),
        ("fingerprint", "abc", r"damaged \(fingerprint missing or not of its type\)"),
        ("vocab_size", "many", r"damaged \(vocab_size missing or not of its type\)"),
        ("special_tokens", "<|bos|>", r"damaged \(special_tokens missing or not of its type\)"),
        ("pattern", None, r"damaged \(pattern missing or not of its type\)"),
    ],
)
def test_a_damaged_description_is_told(tmp_path: Path, key: str, value: object, message: str) -> None:
    MERGED.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**described, key: value}))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("pattern", r"\s+|\S+"), ("vocab_size", 999), ("special_tokens", ["<|bos|>"])]
)
def test_a_changed_description_is_told(tmp_path: Path, key: str, value: object) -> None:
    MERGED.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**described, key: value}))
    with pytest.raises(ValueError, match="is damaged: its files give"):
        Tokenizer.load(tmp_path)


def test_foreign_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="is no tokenizer of ours"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"format": "rayllm-tok')
    with pytest.raises(ValueError, match="is damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is damaged"):
        Tokenizer.load(tmp_path)


def _ranks_path(directory: Path) -> Path:
    (file,) = directory.glob("ranks-*.tiktoken")
    return file
