from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from rayllm.text.compare import SAMPLES, compare, load_references
from rayllm.text.tokenizer import SPLIT_PATTERN, Tokenizer

BYTES = Tokenizer.byte_level()
PAIRS = Tokenizer({**{bytes([byte]): byte for byte in range(256)}, b"aa": 256}, SPLIT_PATTERN)


@pytest.fixture(scope="module")
def references() -> dict[str, Tokenizer]:
    root = os.environ.get("RAYLLM_DATA_DIR")
    if not root or not Path(root, "tokenizer").is_dir():
        pytest.skip("REAL DATA ABSENT: set RAYLLM_DATA_DIR to a folder with tokenizer/ (rank files) to run this test")
    return load_references()


def test_bytes_per_token_are_counted_in_bytes() -> None:
    compared = compare({"bytes": BYTES, "pairs": PAIRS}, {"a": "aaaa", "korean": "가", "none": ""})
    assert compared.bytes_per_token == {"a": {"bytes": 1.0, "pairs": 2.0}, "korean": {"bytes": 1.0, "pairs": 1.0}}
    assert compared.text_bytes == {"a": 4, "korean": 3}
    assert compared.vocab_sizes == {"bytes": 265, "pairs": 266}


def test_the_table_has_a_line_for_each_text_and_a_column_for_each_tokenizer() -> None:
    table = compare({"bytes": BYTES, "pairs": PAIRS}, {"a": "aaaa"}).table()
    rows = [line.split() for line in table.splitlines()]
    assert rows == [
        ["bytes", "per", "token", "bytes", "bytes", "pairs"],
        ["a", "4", "1.00", "2.00"],
        ["vocabulary", "265", "266"],
    ]


def test_the_comparison_is_json() -> None:
    compared = compare({"bytes": BYTES})
    assert json.loads(json.dumps(compared.as_dict())) == compared.as_dict()
    assert set(compared.bytes_per_token) == set(SAMPLES)


def test_well_known_ids(references: dict[str, Tokenizer]) -> None:
    assert set(references) == {"gpt2", "cl100k", "o200k"}
    assert references["gpt2"].encode("hello world") == [31373, 995]
    assert references["cl100k"].encode("hello world") == [15339, 1917]
    assert references["o200k"].encode("hello world") == [24912, 2375]
    assert [references[name].vocab_size for name in ("gpt2", "cl100k", "o200k")] == [50257, 100257, 199999]


def test_well_known_tokenizers_lose_no_text_and_rank_as_known(references: dict[str, Tokenizer]) -> None:
    for text in SAMPLES.values():
        for tokenizer in references.values():
            assert tokenizer.decode(tokenizer.encode(text)) == text
    ratios = compare(references).bytes_per_token
    assert ratios["korean"]["o200k"] > ratios["korean"]["cl100k"] > ratios["korean"]["gpt2"]
    assert ratios["code"]["cl100k"] > 1.2 * ratios["code"]["gpt2"]
    assert ratios["news"]["gpt2"] > 4


def test_no_data_directory_means_no_references(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAYLLM_DATA_DIR", raising=False)
    assert load_references() == {}
    monkeypatch.setenv("RAYLLM_DATA_DIR", str(tmp_path))
    assert load_references() == {}


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"AA== 0\n"), gzip.compress(b"AA== zero\n"), gzip.compress(b"x" * 99)[:20]]
)
def test_a_damaged_rank_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "cl100k_base.tiktoken.gz").write_bytes(content)
    monkeypatch.setenv("RAYLLM_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"cl100k_base\.tiktoken\.gz is damaged .*remove it to compare without cl100k"):
        load_references()
