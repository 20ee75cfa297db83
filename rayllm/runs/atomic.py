"""Files that are there whole or not at all: written beside their name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Writes within raise an OSError that names `path`: a full disk says nothing of where by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"could not write: {error.strerror}", str(path)) from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write or replace `path`; a reader, or a crash at any moment, sees the old content or the new, never a part.

    Raises OSError that names the path.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """`write_atomic` for a value that JSON can hold, indented for people."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def fsync_file(path: Path) -> None:
    """Flush a file that some library has written."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Make the names in a directory (a rename, a new file) survive a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
