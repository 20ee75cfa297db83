"""Checkpoints behind a URL (s3://, gs://, memory://, ...), through fsspec and the driver package of the protocol.

There is no rename there, and a write may be cut off anywhere: what makes a folder a checkpoint is its marker, written
last. Checkpoints are staged on this machine's disk and sent; to be read they are fetched into a cache and verified
there. Cached folders are named by the digest of what is in them, so none is ever out of date; what was not opened for a
week goes when another is fetched. Credentials and endpoints are the driver's own: its environment variables, or
fsspec's configuration.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayllm.runs.manifest import MANIFEST, MARKER, Manifest, parse_manifest, verify
from rayllm.runs.store import Entry, Fill, LocalStore, Opened

_log = logging.getLogger(__name__)

# A replacement gets a name of its own, so that what it replaces stands until it is whole.
_NAME = re.compile(r"(step_(\d{6,}))(?:\.(\d+))?")
_FETCH_TIMEOUT_S = 3600.0
_KEEP_UNUSED_S = 7 * 24 * 3600.0


def cache_path() -> Path:
    """RAYLLM_CACHE_DIR, else `rayllm` in the user's cache directory."""
    own, user = os.environ.get("RAYLLM_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(user or "~/.cache").expanduser() / "rayllm"


class RemoteStore:
    """A folder of checkpoints behind a URL. Raises ValueError with the cure where no driver knows the protocol."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._fs, root = _connect(self._url)
        self._root = root.rstrip("/")
        key = hashlib.sha256(self._url.encode()).hexdigest()[:16]
        self.staging = LocalStore(cache_path() / "uploads" / key)

    def address(self, name: str) -> str:
        return f"{self._url}/{name}" if name else self._url

    def find(self) -> list[Entry]:
        """Newest first; of one step, the replacing before the replaced."""
        with _telling("could not list", self._url):
            self._fs.invalidate_cache()
            try:
                paths = self._fs.ls(self._root, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        matches = [match for path in paths if (match := _NAME.fullmatch(path.rstrip("/").rpartition("/")[2]))]
        matches.sort(key=lambda match: (int(match[2]), int(match[3] or 0)), reverse=True)
        return [Entry(int(match[2]), match[0]) for match in matches]

    def open(self, name: str) -> Opened:
        """Fetch one into the cache, where it is not there yet, and verify it there."""
        small = {part: self.read(_join(name, part)) for part in (MANIFEST, MARKER)}
        manifest = parse_manifest(small[MANIFEST], small[MARKER], self.address(name))
        folder = cache_path() / "checkpoints"
        cached = folder / manifest.sha256[:32] / f"step_{manifest.step:06d}"
        with _locked(folder / f"{manifest.sha256[:32]}.lock", f"another process to fetch {self.address(name)}"):
            if not _is_whole(cached):
                _forget_unused(folder)
                self._fetch(name, manifest, small, cached)
            os.utime(cached.parent)
        return Opened(cached, manifest)

    def write(self, step: int, fill: Fill) -> str:
        """Stage, send, and mark as complete. What died processes left half sent goes first."""
        same_step = []
        for entry in self.find():
            if self.read(_join(entry.name, MARKER)) is None:
                self.discard(entry.name)
            elif entry.step == step:
                same_step.append(entry.name)
        versions = [int(match[3] or 0) for there in same_step if (match := _NAME.fullmatch(there))]
        name = f"step_{step:06d}" + (f".{max(versions) + 1}" if versions else "")
        with self.staging.staged(step, fill) as directory:
            parts = sorted(part.relative_to(directory).as_posix() for part in directory.rglob("*") if part.is_file())
            for part in parts:
                if part != MARKER:
                    self._send(directory / part, _join(name, part))
            self.put(_join(name, MARKER), (directory / MARKER).read_text())
        for replaced in same_step:
            self.discard(replaced)
        return name

    def discard(self, name: str) -> None:
        """Take the marker away first. What cannot be removed is named and stays: that ends no training."""
        path = self._at(name)
        try:
            with _telling("could not remove", self.address(name)):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(_join(path, MARKER))
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(path, recursive=True)
        except OSError as error:
            _log.warning("%s", error)

    def read(self, name: str) -> bytes | None:
        with _telling("could not read", self.address(name)):
            try:
                return bytes(self._fs.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def put(self, name: str, content: str) -> None:
        path = self._at(name)
        with _telling("could not write", self.address(name)):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, content.encode())

    def _at(self, name: str) -> str:
        return _join(self._root, name) if name else self._root

    def _send(self, part: Path, name: str) -> None:
        path, size = self._at(name), part.stat().st_size
        with _telling("could not write", self.address(name)):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(part), path)
            self._fs.invalidate_cache()
            if (arrived := self._fs.info(path)["size"]) != size:
                raise OSError(errno.EIO, f"{arrived} bytes arrived of {size}")

    def _fetch(self, name: str, manifest: Manifest, small: Mapping[str, bytes | None], cached: Path) -> None:
        """Raises ValueError that names the URL's file where what came is not what was written."""
        shutil.rmtree(cached.parent, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=cached.parent.parent) as temporary:
            directory = Path(temporary) / "all" / cached.name
            directory.mkdir(parents=True)
            for part, content in small.items():
                if content is not None:
                    (directory / part).write_bytes(content)
            for part in manifest.files:
                (directory / part).parent.mkdir(exist_ok=True)
                # A part that is missing is told by `verify`.
                with (
                    contextlib.suppress(FileNotFoundError),
                    _telling("could not read", self.address(_join(name, part))),
                ):
                    self._fs.get_file(self._at(_join(name, part)), str(directory / part))
            try:
                verify(directory)
            except ValueError as error:
                raise ValueError(str(error).replace(str(directory), self.address(name))) from error
            directory.parent.rename(cached.parent)


def _connect(url: str) -> tuple[Any, str]:
    """The driver's file system, and the URL as it calls it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    known = known_implementations.get(protocol, {})
    try:
        fs, path = url_to_fs(url)
        return fs, str(path)
    except ImportError as error:
        package = known.get("class", "fsspec").partition(".")[0]
        cure = f"pip install {package}" if package != "fsspec" else known.get("err", str(error))
        raise ValueError(f"{url}: the driver for {protocol}:// is not installed: {cure}") from error
    except ValueError as error:
        if known:
            raise ValueError(f"{url}: {error}") from error
        raise ValueError(
            f"{url}: there is no driver for {protocol}://; write a path, or a URL of a protocol that fsspec knows, as "
            "s3:// or gs://"
        ) from error


@contextmanager
def _telling(what: str, address: str) -> Iterator[None]:
    """Drivers raise errors of many kinds; all but a missing file become an OSError that says what and where."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) and error.errno else None
        if isinstance(error, PermissionError):
            number = errno.EACCES
        reason = f"{what} {address}: {type(error).__name__}: {error}"
        raise (OSError(number, reason) if number else OSError(reason)) from error


def _is_whole(path: Path) -> bool:
    """Whether a cached checkpoint stands; a damaged one is fetched anew."""
    try:
        verify(path)
    except ValueError:
        return False
    return True


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """One process at a time; the kernel drops the lock with its process. Raises TimeoutError that says for what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _FETCH_TIMEOUT_S
    with open(path, "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited {_FETCH_TIMEOUT_S:g} s for {what}") from None
                time.sleep(0.1)
        yield


def _forget_unused(folder: Path) -> None:
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir() and entry.stat().st_mtime < time.time() - _KEEP_UNUSED_S:
                shutil.rmtree(entry, ignore_errors=True)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
