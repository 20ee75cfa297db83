"""Text documents from local files and Hugging Face data sets.

A source names a file, a folder or a glob, looked up as given and then under ``$RAYLLM_DATA_DIR``, or a data set as
``hub:ORG/NAME[:SUBSET[:SPLIT]]``, looked up as the folder ``$RAYLLM_DATA_DIR/ORG/NAME`` and then on the hub. It is
resolved into pieces, each of which one task reads:

- ``.txt`` (``.gz``): one document, or several with ``<|endoftext|>`` between them. Blank lines do not split.
- ``.jsonl``, ``.ndjson``, ``.json`` (``.gz``): one JSON object a line, its text under `text_column`. Lines end in "\\n"
  only. Folders are searched for the first two, since a ``.json`` in them is mostly something else.
- ``.parquet``: column `text_column`; a piece is a range of row groups.

Documents that cannot be used are counted in SkipCounts; files that cannot be used raise ValueError with their name.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from rayllm.data.documents import SkipCounts, TextPiece, check_column, holds_text, open_parquet, read_documents
from rayllm.data.hub import HubName, list_shards

__all__ = ["SkipCounts", "TextPiece", "read_documents", "resolve_sources"]

_KINDS: dict[str, Literal["txt", "jsonl", "parquet"]] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_EXPECTED = "expected .txt, .jsonl (each also .gz) or .parquet"


def resolve_sources(sources: Sequence[str], *, text_column: str, row_groups_per_piece: int = 8) -> list[TextPiece]:
    """Find the text and cut it into pieces: sources in the order given, files in the order of their names.

    A file that several sources reach is read once. Opens every file just enough to refuse what cannot be read: raises
    FileNotFoundError that says where it looked, ValueError for a source without text, a binary or damaged file, or a
    missing column or key.
    """
    if not sources:
        raise ValueError("sources is empty: name at least one text file, folder, glob or hub:ORG/NAME data set")
    pieces: dict[tuple[object, ...], TextPiece] = {}
    for source in sources:
        if source.startswith("hub:"):
            found = _resolve_hub(source, text_column, row_groups_per_piece)
        else:
            found = _cut(_find_files(source), text_column, row_groups_per_piece)
        if not found:
            raise ValueError(f"source {source!r} is empty: its files hold no text; leave it out or fill it")
        for piece in found:
            pieces.setdefault(piece.place, piece)
    return list(pieces.values())


def _data_dir() -> Path | None:
    data_dir = os.environ.get("RAYLLM_DATA_DIR")
    return Path(data_dir).expanduser() if data_dir else None


def _find_files(source: str) -> list[tuple[str, Path]]:
    """(name, path) of every text file of a local source."""
    given = Path(source).expanduser()
    data_dir = _data_dir()
    roots = [Path()] if given.is_absolute() or data_dir is None else [Path(), data_dir]
    for root in roots:
        matches = _match(root / given)
        if matches is None:
            continue
        if not matches:
            raise ValueError(f"source {source!r} is empty: no text files in {root / given}; {_EXPECTED}")
        return [(os.path.relpath(path, root) if root != Path() else str(path), path.absolute()) for path in matches]
    looked_at = " and ".join(str((root / given).absolute()) for root in roots)
    hint = "" if data_dir or given.is_absolute() else "; RAYLLM_DATA_DIR, where sources are looked up too, is not set"
    raise FileNotFoundError(f"source {source!r} not found; looked at {looked_at}{hint}")


def _match(path: Path) -> list[Path] | None:
    """The text files that a path or glob means, or None where there is nothing of that name."""
    if path.is_dir():
        return _walk(path)
    if path.exists():
        if _kind(path) is None:
            raise ValueError(f"{path}: cannot tell what this file holds; {_EXPECTED}")
        return [path]
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
    return [Path(match) for match in found if _kind(Path(match)) and Path(match).is_file()] or None


def _walk(folder: Path) -> list[Path]:
    """Text files below a folder, hidden ones left out, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and _suffix(path) != ".json"
        and _kind(path)
        and path.is_file()
    )


def _suffix(path: Path) -> str:
    """The suffix that tells what a file holds: the one before .gz, except for parquet, which is packed by itself."""
    inner = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    return ".gz" if inner == ".parquet" and path.suffix.lower() == ".gz" else inner


def _kind(path: Path) -> Literal["txt", "jsonl", "parquet"] | None:
    return _KINDS.get(_suffix(path))


def _resolve_hub(source: str, text_column: str, row_groups_per_piece: int) -> list[TextPiece]:
    name = HubName.parse(source)
    data_dir = _data_dir()
    folder = data_dir / name.repo if data_dir else None
    if folder is not None and folder.is_dir():
        files = _files_of_split(folder, name)
        if files:
            named = [(f"{source}/{path.relative_to(folder)}", path.absolute()) for path in files]
            return _cut(named, text_column, row_groups_per_piece)
    where = f"looked at {folder}" if folder is not None else "RAYLLM_DATA_DIR is not set"
    try:
        shards = list_shards(name)
    except Exception as error:  # the hub's client raises a dozen kinds, from no route to no such split
        first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
        reason = f"{type(error).__name__}: {first_line}"
        raise ValueError(f"{source} is not at hand ({where}) and the hub did not give it: {reason}") from error
    return [
        TextPiece(
            name=f"{source}@{shard.revision[:12]}[{shard.shard_idx}/{shard.num_shards}]",
            kind="hub",
            text_column=text_column,
            hub=shard,
        )
        for shard in shards
    ]


def _files_of_split(folder: Path, name: HubName) -> list[Path]:
    """Files of a local copy of a data set: below SUBSET where there is such a folder, named after the split.

    With no split asked for: those named after "train", or all of them where none is.
    """
    if name.subset is not None:
        subset = folder / name.subset
        if subset.is_dir():
            folder = subset
        elif name.subset != "default":
            return []
    files = _walk(folder)
    wanted = name.split or "train"
    of_split = [
        path
        for path in files
        if wanted in path.relative_to(folder).parts[:-1] or re.split("[-_.]", path.name)[0] == wanted
    ]
    return of_split or ([] if name.split else files)


def _cut(files: Iterable[tuple[str, Path]], text_column: str, row_groups_per_piece: int) -> list[TextPiece]:
    pieces: list[TextPiece] = []
    for name, path in files:
        kind = _kind(path)
        assert kind is not None, path
        if kind == "parquet":
            pieces.extend(_cut_parquet(name, path, text_column, row_groups_per_piece))
        elif holds_text(path, kind, text_column):
            pieces.append(TextPiece(name, kind, text_column, path=str(path), num_bytes=path.stat().st_size))
    return pieces


def _cut_parquet(name: str, path: Path, text_column: str, row_groups_per_piece: int) -> list[TextPiece]:
    import pyarrow as pa

    with open_parquet(path) as file:
        check_column(text_column, file.schema_arrow.names, path)
        kind = file.schema_arrow.field(text_column).type
        value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        if not any(check(value_kind) for check in checks):
            raise ValueError(f"{path}: column {text_column!r} (text_column) holds {kind}, not text")
        metadata = file.metadata
        pieces = []
        for first in range(0, metadata.num_row_groups, row_groups_per_piece):
            end = min(first + row_groups_per_piece, metadata.num_row_groups)
            groups = [metadata.row_group(idx) for idx in range(first, end)]
            if not sum(group.num_rows for group in groups):
                continue
            size = sum(group.column(at).total_compressed_size for group in groups for at in range(group.num_columns))
            pieces.append(
                TextPiece(f"{name}[{first}:{end}]", "parquet", text_column, str(path), (first, end), num_bytes=size)
            )
    return pieces
