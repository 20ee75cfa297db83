"""Where checkpoints stand, a folder each: here on a disk, in `remote.py` behind a URL."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rayllm.runs.atomic import fsync_directory, write_atomic
from rayllm.runs.manifest import Manifest, verify

_NAME = re.compile(r"(step_(\d{6,}))(\.replaced)?")
_TEMPORARY = re.compile(r"step_\d{6,}\.tmp-(\d+)")

Fill = Callable[[Path], None]
"""Puts the files of a checkpoint into an empty folder and seals it."""


@dataclass(frozen=True)
class Entry:
    """A folder that bears a checkpoint's name, whole or not."""

    step: int
    name: str


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was found whole; `path` is a folder on this machine."""

    path: Path
    manifest: Manifest


class CheckpointStore(Protocol):
    """A folder of checkpoints. Names are relative to it; "" is the folder itself."""

    def address(self, name: str) -> str:
        """Path or URL, for people and for other processes."""
        ...

    def find(self) -> list[Entry]:
        """All entries, newest first."""
        ...

    def open(self, name: str) -> Opened:
        """Verify one. Raises ValueError that names the file and the reason."""
        ...

    def write(self, step: int, fill: Fill) -> str:
        """Add the checkpoint of a step, or replace it; until it is whole, what was there stands. Returns its name."""
        ...

    def discard(self, name: str) -> None: ...

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None where there is none."""
        ...

    def put(self, name: str, content: str) -> None:
        """Write a small file."""
        ...


class LocalStore:
    """On a disk: a checkpoint is written under a temporary name, flushed and renamed, so `step_*` is always whole."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def address(self, name: str) -> str:
        return str(self.root / name)

    def find(self) -> list[Entry]:
        """Newest first; of one step, the replacing before the replaced."""
        if not self.root.is_dir():
            return []
        matches = [match for entry in self.root.iterdir() if (match := _NAME.fullmatch(entry.name))]
        matches.sort(key=lambda match: (int(match[2]), match[3] is None), reverse=True)
        return [Entry(int(match[2]), match[0]) for match in matches]

    def open(self, name: str) -> Opened:
        path = self.root / name
        return Opened(path, verify(path))

    def write(self, step: int, fill: Fill) -> str:
        """Two renames where the step exists already; between them its old checkpoint stands under `.replaced`."""
        final = self.root / f"step_{step:06d}"
        replaced = final.with_name(f"{final.name}.replaced")
        with self.staged(step, fill) as temporary:
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            fsync_directory(self.root)
        if replaced.exists():
            self.discard(replaced.name)
        return final.name

    @contextmanager
    def staged(self, step: int, fill: Fill) -> Iterator[Path]:
        """A filled folder under a temporary name, gone on leaving unless it was renamed."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        temporary = self.root / f"step_{step:06d}.tmp-{os.getpid()}"
        temporary.mkdir()
        try:
            fill(temporary)
            yield temporary
        finally:  # on Ctrl-C too: half a checkpoint is only in the way
            shutil.rmtree(temporary, ignore_errors=True)

    def discard(self, name: str) -> None:
        """Take the name away first: a checkpoint that is half deleted must not look like one."""
        doomed = self.root / f"{name.removesuffix('.replaced')}.tmp-{os.getpid()}"
        (self.root / name).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def put(self, name: str, content: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / name, content)

    def _clear_leftovers(self) -> None:
        """Finish what died processes left: half-written checkpoints go, a replaced one returns if it has no heir."""
        for entry in list(self.root.iterdir()):
            step, temporary = _NAME.fullmatch(entry.name), _TEMPORARY.fullmatch(entry.name)
            if temporary and not _is_another_process(int(temporary[1])):
                shutil.rmtree(entry, ignore_errors=True)
            elif step and step[3]:
                heir = self.root / step[1]
                if heir.exists():
                    self.discard(entry.name)
                else:
                    entry.rename(heir)


def _is_another_process(process_id: int) -> bool:
    if process_id == os.getpid():
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and another user's
        return True
    return True
