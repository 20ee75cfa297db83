"""Where checkpoints may be kept: a folder of this machine, or a URL that fsspec has a driver for."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from rayllm.runs.remote import RemoteStore
from rayllm.runs.store import CheckpointStore, LocalStore

Place = str | os.PathLike[str]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")


def is_url(place: Place) -> bool:
    """Whether a place is a URL, as s3://bucket/run, that is not this machine's (file://)."""
    match = _URL.match(os.fspath(place))
    return match is not None and match[1] not in ("file", "local")


def local_path(place: Place) -> Path:
    """The path of a place that is no URL but a file:// one."""
    match = _URL.match(os.fspath(place))
    return Path("/", match[2]) if match else Path(place).expanduser()


def absolute(place: Place) -> str:
    """The place as other processes find it, whatever folder they run in."""
    return os.fspath(place) if is_url(place) else str(local_path(place).absolute())


def of_run(checkpoints: Place | None, run_path: Path) -> Place:
    """Where a run's checkpoints are: where its recipe says (`checkpoints`), else in its directory."""
    return checkpoints or run_path / "checkpoints"


def below(place: Place, name: str) -> Place:
    """What `name` is called within a place."""
    return posixpath.join(os.fspath(place), name) if is_url(place) else local_path(place) / name


def split(place: Place) -> tuple[Place, str]:
    """The folder that a place lies in, and its name there."""
    if is_url(place):
        protocol, _, path = os.fspath(place).rstrip("/").partition("://")
        folder, _, name = path.rpartition("/")
        return (f"{protocol}://{folder}", name) if folder else (place, "")
    local = local_path(place)
    return local.parent, local.name


def open_store(place: Place) -> CheckpointStore:
    """The folder of checkpoints at a place, which need not exist yet. Raises ValueError where no driver knows a URL."""
    return RemoteStore(os.fspath(place)) if is_url(place) else LocalStore(local_path(place))
