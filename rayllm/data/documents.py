"""Pieces of text and the documents in them: txt, JSON lines, parquet, data sets of the hub.

Documents that cannot be used are counted in SkipCounts; files that cannot be used raise ValueError with their name.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from rayllm.data.hub import HubShard, read_rows

DOCUMENT_SEPARATOR = "<|endoftext|>"
_PEEK_BYTES = 65536
_PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True)
class TextPiece:
    """The part of a source that one task reads. Travels to workers; paths are absolute.

    ``name`` is for people and manifests; ``num_bytes`` is its size on disk (0 on the hub).
    """

    name: str
    kind: Literal["txt", "jsonl", "parquet", "hub"]
    text_column: str
    path: str = ""
    row_groups: tuple[int, int] | None = None
    hub: HubShard | None = None
    num_bytes: int = 0

    @property
    def place(self) -> tuple[object, ...]:
        """Where its text is: equal for pieces of the same text, by whatever name they were reached."""
        return self.path, self.row_groups, self.hub


@dataclass
class SkipCounts:
    """How many documents were left out, and why."""

    not_json: int = 0
    """Lines that are no JSON object."""
    not_utf8: int = 0
    """Lines or texts that are not UTF-8 (or hold half a surrogate pair)."""
    no_text: int = 0
    """Rows whose text is missing or no string."""
    empty: int = 0
    """Texts of nothing but white space."""

    def add(self, other: SkipCounts) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    @property
    def total(self) -> int:
        return self.not_json + self.not_utf8 + self.no_text + self.empty


def read_documents(piece: TextPiece, skips: SkipCounts) -> Iterator[str]:
    """Yield the documents of a piece, none of them blank, all of them encodable; count the others in ``skips``."""
    if piece.kind == "txt":
        texts = _split_txt(piece.path)
    elif piece.kind == "parquet":
        texts = _read_parquet(piece, skips)
    elif piece.kind == "jsonl":
        texts = _pick_text(_read_jsonl(piece.path, skips), piece, skips)
    else:
        assert piece.hub is not None
        texts = _pick_text(_read_hub(piece.name, piece.hub), piece, skips)
    for text in texts:
        if not text.strip():
            skips.empty += 1
        elif not _is_encodable(text):
            skips.not_utf8 += 1
        else:
            yield text


def holds_text(path: str | Path, kind: str, text_column: str) -> bool:
    """Whether the file holds anything; raises ValueError where its first text shows that it cannot be used."""
    for line in _lines(path):
        if kind == "jsonl" and line.strip():
            row = _parse_object(line, SkipCounts())
            if row is not None:
                check_column(text_column, row, path)
        if line.strip():
            return True
    return False


def check_column(text_column: str, columns: Iterable[str], where: object) -> None:
    """Raises ValueError that names the columns there are when ``text_column`` is not among them."""
    if text_column not in (there := list(columns)):
        raise ValueError(
            f"{where}: no column {text_column!r} (text_column); there are {', '.join(map(repr, there)) or 'none'}"
        )


def open_parquet(path: str | Path) -> Any:
    """A pyarrow.parquet.ParquetFile; raises ValueError when the file is no parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); fetch or write it again") from error


def _lines(path: str | Path) -> Iterator[bytes]:
    """Lines of a file (gzip or not), cut at "\\n" alone; refuses binary files."""
    binary = f"{path}: a binary file (or UTF-16), not UTF-8 text: it holds NUL bytes"
    try:
        with cast(
            io.BufferedReader, gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")
        ) as file:
            if b"\0" in file.peek(_PEEK_BYTES):  # before a line of it, which may be as long as the file, is read
                raise ValueError(binary)
            for line in file:
                if b"\0" in line:
                    raise ValueError(binary)
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut gzip file ({error}); fetch or pack it again") from error


def _split_txt(path: str) -> Iterator[str]:
    """Documents of a text file: all of it as it stands, or what is between separators without the blanks around."""
    lines: list[str] = []
    is_split = False
    for number, line in enumerate(_lines(path), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            cure = "convert it, for example with `iconv -f latin1 -t utf-8`"
            raise ValueError(f"{path}: not UTF-8 text (line {number}: {error.reason}); {cure}") from error
        first, *others = text.split(DOCUMENT_SEPARATOR)
        lines.append(first)
        for other in others:
            is_split = True
            yield "".join(lines).strip()
            lines = [other]
    rest = "".join(lines)
    if not is_split:
        yield rest
    elif rest.strip():
        yield rest.strip()


def _read_jsonl(path: str, skips: SkipCounts) -> Iterator[dict[str, Any]]:
    num_lines = num_objects = 0
    for line in _lines(path):
        if not line.strip():
            continue
        num_lines += 1
        row = _parse_object(line, skips)
        if row is not None:
            num_objects += 1
            yield row
    if num_lines and not num_objects:
        raise ValueError(
            f"{path}: none of its {num_lines} lines is a JSON object; expected one object a line (JSON lines)"
        )


def _parse_object(line: bytes, skips: SkipCounts) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        skips.not_utf8 += 1
        return None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        skips.not_json += 1
        return None
    return row


def _read_hub(source: str, shard: HubShard) -> Iterator[dict[str, Any]]:
    try:
        yield from read_rows(shard)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ValueError(f"{source}: the hub stopped giving it: {type(error).__name__}: {error}") from error


def _pick_text(rows: Iterable[dict[str, Any]], piece: TextPiece, skips: SkipCounts) -> Iterator[str]:
    """Text of each row. The first must have the column; later ones without it are counted."""
    for row_idx, row in enumerate(rows):
        if row_idx == 0:
            check_column(piece.text_column, row, piece.path or piece.name)
        text = row.get(piece.text_column)
        if isinstance(text, str):
            yield text
        else:
            skips.no_text += 1


def _read_parquet(piece: TextPiece, skips: SkipCounts) -> Iterator[str]:
    import pyarrow as pa

    assert piece.row_groups is not None
    groups = list(range(*piece.row_groups))
    with open_parquet(piece.path) as file:
        batches = file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=[piece.text_column])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{piece.path}: damaged parquet file ({error}); fetch or write it again") from error
            if batch is None:
                return
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()).to_pylist():  # bytes: Arrow does not promise valid UTF-8
                if value is None:
                    skips.no_text += 1
                    continue
                try:
                    yield value.decode()
                except UnicodeDecodeError:
                    skips.not_utf8 += 1


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return True
