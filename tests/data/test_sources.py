from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayllm.data.sources import SkipCounts, TextPiece, read_documents, resolve_sources


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no RAYLLM_DATA_DIR."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("RAYLLM_DATA_DIR", raising=False)
    return work


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("RAYLLM_DATA_DIR", str(root))
    return root


def put(path: str | Path, content: str | bytes) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def resolve(*sources: str, text_column: str = "text", row_groups_per_piece: int = 8) -> list[TextPiece]:
    return resolve_sources(sources, text_column=text_column, row_groups_per_piece=row_groups_per_piece)


def read(*sources: str, text_column: str = "text") -> tuple[list[str], dict[str, int]]:
    """Documents of all pieces, and the counts of skips that are not zero."""
    skips = SkipCounts()
    texts = [text for piece in resolve(*sources, text_column=text_column) for text in read_documents(piece, skips)]
    return texts, {reason: count for reason, count in asdict(skips).items() if count}


# Text files


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_a_text_file_is_one_document_as_it_stands(name: str) -> None:
    text = " \n = Title = \n\n First paragraph. \r\n\r\n\u2028Second\x0b one. \n"
    put(name, text)
    assert read(name) == ([text], {})


def test_a_text_file_is_split_at_separators() -> None:
    put(
        "a.txt",
        "One.\nStill one.\n<|endoftext|>\n\nTwo.<|endoftext|>Three.<|endoftext|> \n<|endoftext|>Four\n<|endoftext|>\n",
    )
    assert read("a.txt") == (["One.\nStill one.", "Two.", "Three.", "Four"], {"empty": 1})


def test_a_byte_order_mark_is_no_text() -> None:
    put("a.txt", b"\xef\xbb\xbfHello")
    put("b.jsonl", b"\xef\xbb\xbf" + b'{"text": "there"}\n')
    assert read("a.txt", "b.jsonl") == (["Hello", "there"], {})


def test_text_that_is_not_utf8_is_refused_by_name_and_line() -> None:
    put("a.txt", b"fine\nna\xefve\n")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text \(line 2: .*iconv"):
        read("a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
@pytest.mark.parametrize("content", [b"\x7fELF\x02\0\0\0", "UTF-16".encode("utf-16")])
def test_binary_files_are_refused_when_sources_are_resolved(name: str, content: bytes) -> None:
    put(name, content)
    with pytest.raises(ValueError, match=rf"{name}: a binary file \(or UTF-16\)"):
        resolve(name)


def test_binary_content_deep_in_a_file_is_refused_too() -> None:
    put("a.txt", b"text\n" * 100_000 + b"\0")
    with pytest.raises(ValueError, match="a binary file"):
        read("a.txt")


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: b"no gzip", lambda packed: packed[:40]])
def test_damaged_gzip_is_refused_by_name(damage: Callable[[bytes], bytes]) -> None:
    text = "".join(f"{number * number}\n" for number in range(50_000))
    Path("a.txt.gz").write_bytes(damage(gzip.compress(text.encode())))
    with pytest.raises(ValueError, match=r"a\.txt\.gz: damaged or cut gzip file"):
        read("a.txt.gz")


# JSON lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json"])
def test_json_lines_end_in_newlines_only(name: str) -> None:
    texts = ["one\u2028still one", "two\u0085still two", "three\x0b\x0c\x1c", "four\r\n"]
    put(name, lines(*({"text": text, "id": idx} for idx, text in enumerate(texts))))
    assert read(name) == (texts, {})


def test_lines_that_cannot_be_used_are_counted() -> None:
    good = {"text": "good"}
    bad = [{"text": None}, {"text": 3}, {"title": "no text"}, {"text": " \n"}, [1], "string", 5]
    raw = lines(good, *bad).encode()
    raw += b"{not json\n" + b'{"text": "\xff"}\n' + b"\n  \n" + b'{"text": "\\ud800"}\n' + b'{"text": "last"}'
    put("a.jsonl", raw + b"\n" + b"[" * 100_000 + b"\n" + b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n")
    texts, skips = read("a.jsonl")
    assert texts == ["good", "last"]
    assert skips == {"no_text": 3, "empty": 1, "not_json": 6, "not_utf8": 2}


def test_a_file_without_one_json_object_is_refused() -> None:
    put("a.jsonl", "not\njson\nat all\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: none of its 3 lines is a JSON object"):
        read("a.jsonl")
    put("b.json", json.dumps([{"text": "one"}], indent=1))
    with pytest.raises(ValueError, match=r"b\.json: none of its 5 lines is a JSON object"):
        read("b.json")


def test_a_missing_key_is_refused_with_the_keys_there_are() -> None:
    put("a.jsonl", lines({"content": "x", "id": 1}))
    with pytest.raises(ValueError, match=r"a\.jsonl: no column 'text' \(text_column\); there are 'content', 'id'"):
        resolve("a.jsonl")
    assert read("a.jsonl", text_column="content") == (["x"], {})


# Parquet


def write_parquet(path: str, column: pa.Array | list, *, rows_per_group: int = 2, **more: list) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": column, **more}), path, row_group_size=rows_per_group)


def test_parquet_is_cut_into_ranges_of_row_groups() -> None:
    texts = [f"document {idx}" for idx in range(11)]
    write_parquet("a.parquet", texts, id=list(range(11)))
    pieces = resolve("a.parquet", row_groups_per_piece=2)
    assert [piece.row_groups for piece in pieces] == [(0, 2), (2, 4), (4, 6)]
    assert [piece.name for piece in pieces] == ["a.parquet[0:2]", "a.parquet[2:4]", "a.parquet[4:6]"]
    assert all(piece.num_bytes > 0 for piece in pieces)
    read_apart = [list(read_documents(piece, SkipCounts())) for piece in pieces]
    assert read_apart == [texts[:4], texts[4:8], texts[8:]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_of_every_type(kind: pa.DataType) -> None:
    texts = ["one", None, "", "naïve", "one"]
    column = pa.array([t and t.encode() for t in texts], kind) if kind == pa.binary() else pa.array(texts).cast(kind)
    write_parquet("a.parquet", column)
    assert read("a.parquet") == (["one", "naïve", "one"], {"no_text": 1, "empty": 1})


def test_parquet_text_that_is_not_utf8_is_counted() -> None:
    buffers = pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers()
    write_parquet("a.parquet", pa.StringArray.from_buffers(2, buffers[1], buffers[2]))
    assert read("a.parquet") == (["ok"], {"not_utf8": 1})


def test_parquet_without_the_column_or_of_another_type_is_refused() -> None:
    write_parquet("a.parquet", ["x"], title=["y"])
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body' .*; there are 'text', 'title'"):
        resolve("a.parquet", text_column="body")
    write_parquet("b.parquet", [1, 2])
    with pytest.raises(ValueError, match=r"b\.parquet: column 'text' .* holds int64, not text"):
        resolve("b.parquet")


def test_damaged_parquet_is_refused_by_name() -> None:
    write_parquet("a.parquet", [f"{number}" * 50 for number in range(1000)], rows_per_group=1000)
    raw = Path("a.parquet").read_bytes()
    Path("b.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"b\.parquet: not a readable parquet file"):
        resolve("b.parquet")
    Path("c.parquet").write_bytes(raw[:4] + bytes(len(raw) // 2) + raw[4 + len(raw) // 2 :])
    with pytest.raises(ValueError, match=r"c\.parquet: damaged parquet file"):
        read("c.parquet")


# Finding files


def test_folders_are_searched_in_the_order_of_names() -> None:
    put("books/b.txt", "b")
    put("books/a.txt.gz", "a")
    put("books/deep/er/c.jsonl", lines({"text": "c"}))
    write_parquet("books/d.parquet", ["d"])
    for ignored in ("manifest.json", "README.md", ".hidden.txt", ".cache/x.txt", "e.parquet.gz"):
        put(f"books/{ignored}", "ignored")
    assert [piece.name for piece in resolve("books")] == [
        "books/a.txt.gz", "books/b.txt", "books/d.parquet[0:1]", "books/deep/er/c.jsonl",
    ]  # fmt: skip
    assert read("books") == (["a", "b", "d", "c"], {})


def test_globs_and_absolute_paths(here: Path) -> None:
    for name in ("x1.txt", "x2.txt", "y1.txt", "deep/x3.txt", "x.md"):
        put(name, name)
    assert [piece.name for piece in resolve("x*")] == ["x1.txt", "x2.txt"]
    assert [piece.name for piece in resolve("**/x[13].txt")] == ["deep/x3.txt", "x1.txt"]
    assert [piece.path for piece in resolve(f"{here}/x?.txt")] == [f"{here}/x1.txt", f"{here}/x2.txt"]
    put("odd[1].txt", "odd")
    assert read("odd[1].txt") == (["odd"], {}), "a name that exists is no glob"


def test_sources_are_looked_up_as_given_and_then_under_the_data_directory(data_dir: Path) -> None:
    put(data_dir / "a.txt", "shared a")
    put(data_dir / "b.txt", "shared b")
    put("a.txt", "own a")
    assert read("a.txt", "b.txt") == (["own a", "shared b"], {})
    assert [piece.name for piece in resolve("[ab].txt")] == ["a.txt"], (
        "a glob that matches as given is not looked up on"
    )
    assert [piece.name for piece in resolve("b*")] == ["b.txt"]


def test_a_file_reached_twice_is_read_once(here: Path) -> None:
    put("d/a.txt", "a")
    put("d/b.txt", "b")
    assert read("d/b.txt", "d", f"{here}/d/a.txt", "d/*.txt") == (["b", "a"], {})


def test_a_missing_source_says_where_it_was_looked_up(here: Path, data_dir: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        resolve("nope/*.txt")
    assert f"'nope/*.txt' not found; looked at {here}/nope/*.txt and {data_dir}/nope/*.txt" in str(refusal.value)


def test_a_missing_source_says_that_the_data_directory_is_not_set() -> None:
    with pytest.raises(FileNotFoundError, match="RAYLLM_DATA_DIR.* is not set"):
        resolve("nope.txt")


def test_empty_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="sources is empty"):
        resolve()
    Path("folder").mkdir()
    with pytest.raises(ValueError, match="source 'folder' is empty: no text files in folder"):
        resolve("folder")
    put("empty.txt", "")
    put("blank.jsonl", "\n \n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), "none.parquet")
    for name in ("empty.txt", "blank.jsonl", "none.parquet"):
        with pytest.raises(ValueError, match=f"source '{name}' is empty: its files hold no text"):
            resolve(name)


def test_a_file_of_another_kind_is_refused() -> None:
    put("a.docx", "x")
    with pytest.raises(ValueError, match=r"a\.docx: cannot tell what this file holds; expected \.txt"):
        resolve("a.docx")


# Data sets kept under RAYLLM_DATA_DIR (what the hub gives is in test_hub.py)


def test_a_data_set_is_found_under_the_data_directory(data_dir: Path) -> None:
    root = data_dir / "org/stories"
    put(root / "data/train-00000.jsonl", lines({"text": "train 0"}))
    put(root / "data/train-00001.jsonl", lines({"text": "train 1"}))
    put(root / "data/training_notes.txt", "no split of that name")
    put(root / "test.txt", "test")
    put(root / "french/validation/x.txt", "validation, french")
    assert read("hub:org/stories") == (["train 0", "train 1"], {})
    assert read("hub:org/stories:default:test") == (["test"], {})
    assert read("hub:org/stories:french:validation") == (["validation, french"], {})
    assert read("hub:org/stories:french") == (["validation, french"], {}), "no split asked for, and none called train"
    assert resolve("hub:org/stories::test")[0].name == "hub:org/stories::test/test.txt"
