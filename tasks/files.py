"""Files of a task: looked up as given, then under $RAYLLM_DATA_DIR, each also with .gz behind it."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path


def find_file(path: str) -> Path:
    """The first of the places that holds the file. Raises FileNotFoundError that names them all."""
    places = _places(path)
    for place in places:
        if place.is_file():
            return place
    for place in places:
        if place.is_dir():
            raise ValueError(f"{place} is a folder: name one .jsonl or .jsonl.gz file in it")
    unset = "" if data_dir() else "; RAYLLM_DATA_DIR, where files are looked up too, is not set"
    raise FileNotFoundError(f"no file {path!r}; looked at {', '.join(str(place) for place in places)}{unset}")


def data_dir() -> Path | None:
    """The folder that RAYLLM_DATA_DIR names, or None where it names none."""
    named = os.environ.get("RAYLLM_DATA_DIR")
    return Path(named).expanduser() if named else None


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every line that is not blank; lines end in "\\n" alone.

    Raises ValueError where a .gz file is damaged.
    """
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged or cut gzip file ({error}); fetch or pack it again") from error


def _places(path: str) -> list[Path]:
    given = Path(path).expanduser()
    root = data_dir()
    roots = [given] if given.is_absolute() or root is None else [given, root / given]
    return [place for at in roots for place in (at, at.with_name(at.name + ".gz"))]
