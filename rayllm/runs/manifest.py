"""What makes a folder of files a checkpoint: a manifest of every file with its checksum, and a marker written last.

`checkpoint.json` holds format, step, state, and the size and SHA-256 of every other file; `COMPLETE` holds the SHA-256
of that. Without its marker a folder is a checkpoint that was cut off: object stores have no rename that could make a
folder appear whole. Format 1, from before there was a marker, was only ever renamed into place, and needs none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllm.runs.atomic import fsync_directory, fsync_file, sha256_file, write_atomic, write_json

MANIFEST, MARKER = "checkpoint.json", "COMPLETE"
_FORMAT = 2
_WITHOUT_MARKER = 1


@dataclass(frozen=True)
class Manifest:
    """What `checkpoint.json` says."""

    step: int
    state: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    """Name within the checkpoint -> {"size": bytes, "sha256": hex digest}."""
    sha256: str
    """Digest of all the rest: equal ones are equal checkpoints."""


def seal(directory: Path, step: int, state: Mapping[str, object]) -> None:
    """Flush every file of a folder to the disk, write down what it must look like, then that this is all of it."""
    parts = sorted(part for part in directory.rglob("*") if part.is_file())
    for part in parts:
        fsync_file(part)
    for folder in {part.parent for part in parts}:
        fsync_directory(folder)
    files = {
        part.relative_to(directory).as_posix(): {"size": part.stat().st_size, "sha256": sha256_file(part)}
        for part in parts
    }
    # Through JSON once, so that the digest is over what a reader will get (string keys, lists for tuples).
    manifest = json.loads(json.dumps({"format": _FORMAT, "step": step, "state": dict(state), "files": files}))
    digest = _digest(manifest)
    write_json(directory / MANIFEST, {**manifest, "sha256": digest})
    write_atomic(directory / MARKER, f"{digest}\n")


def verify(directory: Path) -> Manifest:
    """Check that a folder is whole: its marker is there, and every file with the size and digest it was written with.

    Raises ValueError that names the file and the reason.
    """
    file, marker = directory / MANIFEST, directory / MARKER
    manifest = parse_manifest(
        file.read_bytes() if file.exists() else None, marker.read_bytes() if marker.exists() else None, str(directory)
    )
    for name, wanted in manifest.files.items():
        part = directory / name
        if not part.is_file():
            raise ValueError(f"{part} is missing; use another checkpoint")
        if (size := part.stat().st_size) != wanted["size"]:
            raise ValueError(f"{part} is damaged: {size} bytes instead of {wanted['size']}; use another checkpoint")
        if sha256_file(part) != wanted["sha256"]:
            raise ValueError(f"{part} is damaged: its checksum differs; use another checkpoint")
    return manifest


def parse_manifest(content: bytes | None, marker: bytes | None, address: str) -> Manifest:
    """The manifest of the checkpoint at `address` from the content of its two files (None: not there).

    Raises ValueError where they do not say that it is whole.
    """
    if content is None:
        raise ValueError(f"{address} is no whole checkpoint: {MANIFEST} is missing; use another checkpoint")
    try:
        fields = json.loads(content)
        digest, version = fields.pop("sha256"), fields["format"]
        if version not in (_WITHOUT_MARKER, _FORMAT):
            raise ValueError(
                f"{address} has checkpoint format {version!r}, this rayllm reads up to {_FORMAT}: use a newer rayllm"
            )
        manifest = Manifest(fields["step"], fields["state"], fields["files"], digest)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{address}/{MANIFEST} is damaged: it cannot be read ({error!r}); use another checkpoint"
        ) from error
    if digest != _digest(fields):
        raise ValueError(f"{address}/{MANIFEST} is damaged: its checksum differs; use another checkpoint")
    if marker is None and version != _WITHOUT_MARKER:
        raise ValueError(f"{address} is no whole checkpoint: its marker {MARKER} is missing; use another checkpoint")
    if marker is not None and marker.strip() != digest.encode():
        raise ValueError(
            f"{address} is no whole checkpoint: its marker {MARKER} is another checkpoint's; use another checkpoint"
        )
    return manifest


def _digest(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
