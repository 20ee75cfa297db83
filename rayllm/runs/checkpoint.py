"""Checkpoints: whole or not there at all, checked when opened, in open formats.

    checkpoints/step_000500/
        model.safetensors  optimizer.safetensors  tokenizer/
        checkpoint.json    format, step, state, and the size and SHA-256 of every other file

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a name `step_*` is always whole;
checksums find what the disk does to it afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.runs.atomic import fsync_directory, fsync_file, sha256_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from rayllm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_FORMAT = 1
_STEP = re.compile(r"(step_(\d{6,}))(\.replaced)?")
_TEMPORARY = re.compile(r"step_\d{6,}\.tmp-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found whole."""

    path: Path
    step: int
    state: Mapping[str, Any]
    """What `save_checkpoint` was given: model config, position in the text, metrics."""

    @property
    def has_optimizer(self) -> bool:
        """Whether training can go on from here (a checkpoint to sample from needs no optimizer)."""
        return (self.path / "optimizer.safetensors").exists()

    def load_model_state(self) -> dict[str, Tensor]:
        """Parameter name -> tensor on the CPU."""
        return _load_tensors(self.path / "model.safetensors")

    def load_optimizer_state(self) -> dict[str, Tensor] | None:
        """Name -> tensor on the CPU; None where the checkpoint has no optimizer."""
        return _load_tensors(self.path / "optimizer.safetensors") if self.has_optimizer else None

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that travels with the weights."""
        from rayllm.text.tokenizer import Tokenizer

        return Tokenizer.load(self.path / "tokenizer")


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor] | None,
    state: Mapping[str, object],
    tokenizer: Tokenizer,
    keep: int,
) -> Path:
    """Write `root/step_NNNNNN`, replacing one of the same step, then drop all but the newest `keep` up to this step.

    `state` must be JSON-able. Tensors may be on any device and may share storage; each is stored whole.
    Raises OSError that says what could not be written (a full disk); earlier checkpoints are then as they were.
    """
    assert keep >= 1, keep
    final = root / f"step_{step:06d}"
    temporary = root / f"{final.name}.tmp-{os.getpid()}"
    with _explaining(final, "its folder"):
        root.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(root)
        temporary.mkdir()
    try:
        with _explaining(final, "model.safetensors"):
            _save_tensors(temporary / "model.safetensors", model_state)
        if optimizer_state is not None:
            with _explaining(final, "optimizer.safetensors"):
                _save_tensors(temporary / "optimizer.safetensors", optimizer_state)
        with _explaining(final, "the tokenizer"):
            tokenizer.save(temporary / "tokenizer")
        with _explaining(final, "checkpoint.json"):
            _seal(temporary, step, state)
            _move_into_place(temporary, final)
    except BaseException:  # Ctrl-C too: half a checkpoint is only in the way
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    older = [entry for at, entry in _found(root) if at <= step]  # newest first, this one at the head
    for entry in older[keep:]:
        _discard(entry)
    return final


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of a run directory or of a folder of checkpoints.

    A damaged checkpoint is passed over with a warning when a run is searched, and a ValueError that names the file
    and the reason when it is addressed itself, or when no other is left. Raises FileNotFoundError where there is none.
    """
    path = Path(path).expanduser()
    if (path / "checkpoint.json").exists() or (path.is_dir() and _STEP.fullmatch(path.name)):
        return _verify(path)
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(
            f"no checkpoint at {path} (looked for {path / 'checkpoint.json'}, {path / 'checkpoints' / 'step_*'} and "
            f"{path / 'step_*'}); `rayllm pretrain --out={path}` makes one, `rayllm import-nanochat` imports one"
        )
    return checkpoint


def latest_checkpoint(run_path: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run directory (or of a folder of checkpoints); None where there is none yet.

    Raises ValueError when there are checkpoints and every one is damaged: starting over would be no cure.
    """
    run_path = Path(run_path).expanduser()
    root = run_path / "checkpoints" if (run_path / "checkpoints").is_dir() else run_path
    damages: list[ValueError] = []
    for _, entry in _found(root):
        try:
            return _verify(entry)
        except ValueError as error:
            if not entry.exists():  # a training run has just dropped it, and newer ones stand
                return latest_checkpoint(run_path)
            _log.warning("passing over a checkpoint: %s", error)
            damages.append(error)
    if damages:
        raise ValueError(f"every checkpoint in {root} is damaged; the newest: {damages[0]}")
    return None


def check_tensor_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise ValueError that names the first tensors of `state` that are missing, unexpected or of another shape."""
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} is {tuple(state[name].shape)} and should be {tuple(shape)}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != tuple(shape)
        ],
    }
    told = [
        f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if told:
        raise ValueError(
            f"{path} does not fit this model: of its tensors, {'; '.join(told)}; "
            "use the recipe that the checkpoint was trained with"
        )


def _found(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first; of one step, the replacing before the replaced."""
    if not root.is_dir():
        return []
    matches = [(match, entry) for entry in root.iterdir() if (match := _STEP.fullmatch(entry.name))]
    matches.sort(key=lambda found: (int(found[0][2]), found[0][3] is None), reverse=True)
    return [(int(match[2]), entry) for match, entry in matches]


def _verify(path: Path) -> Checkpoint:
    """Check that every file is there with the size and digest that it was written with."""
    file = path / "checkpoint.json"
    try:
        manifest = json.loads(file.read_bytes())
        digest, version = manifest.pop("sha256"), manifest["format"]
        if version != _FORMAT:
            raise ValueError(
                f"{path} has checkpoint format {version!r}, this rayllm reads {_FORMAT}: use a newer rayllm"
            )
        files, step, state = manifest["files"], manifest["step"], manifest["state"]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is no whole checkpoint: checkpoint.json is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: it cannot be read ({error!r}); use another checkpoint") from error
    if digest != _digest(manifest):
        raise ValueError(f"{file} is damaged: its checksum differs; use another checkpoint")
    for name, wanted in files.items():
        part = path / name
        if not part.is_file():
            raise ValueError(f"{part} is missing; use another checkpoint")
        if (size := part.stat().st_size) != wanted["size"]:
            raise ValueError(f"{part} is damaged: {size} bytes instead of {wanted['size']}; use another checkpoint")
        if sha256_file(part) != wanted["sha256"]:
            raise ValueError(f"{part} is damaged: its checksum differs; use another checkpoint")
    return Checkpoint(path, step, state)


def _seal(directory: Path, step: int, state: Mapping[str, object]) -> None:
    """Flush every file to the disk and write down what it must look like."""
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
    write_json(directory / "checkpoint.json", {**manifest, "sha256": _digest(manifest)})


def _digest(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _move_into_place(temporary: Path, final: Path) -> None:
    """Two renames where the step exists already; between them its old checkpoint stands under `.replaced`."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    fsync_directory(final.parent)
    if replaced.exists():
        _discard(replaced)


def _clear_leftovers(root: Path) -> None:
    """Finish what died processes left: half-written checkpoints go, a replaced one returns if it has no heir."""
    for entry in list(root.iterdir()):
        step, temporary = _STEP.fullmatch(entry.name), _TEMPORARY.fullmatch(entry.name)
        if temporary and not _is_another_process(int(temporary[1])):
            shutil.rmtree(entry, ignore_errors=True)
        elif step and step[3]:
            heir = root / step[1]
            if heir.exists():
                _discard(entry)
            else:
                entry.rename(heir)


def _discard(entry: Path) -> None:
    """Take the name away first: a checkpoint that is half deleted must not look like one."""
    doomed = entry.with_name(f"{entry.name.removesuffix('.replaced')}.tmp-{os.getpid()}")
    entry.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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


@contextmanager
def _explaining(final: Path, part: str) -> Iterator[None]:
    """Turn a failed write into an OSError with the part's name and the cure; safetensors has an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        reason = os.strerror(number) if number else str(error)
        message = (
            f"could not write {part} of the checkpoint {final}: {reason}. Earlier checkpoints are untouched; "
            "make room there, then run the same command again to go on from the newest of them"
        )
        raise (OSError(number, message) if number else OSError(message)) from error


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    storable: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share storage (tied weights, views of one buffer): each gets its own.
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()
        storages.add(storage)
        storable[name] = tensor
    path.touch()
    mode = path.stat().st_mode  # as the user's umask has it; safetensors makes files that only their owner can read
    save_file(storable, path, metadata={"format": "pt"})
    path.chmod(mode)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
