"""Checkpoints: whole or not there at all, checked when opened, in open formats, on a disk or behind a URL.

    checkpoints/step_000500/
        model.safetensors  optimizer.safetensors  tokenizer/
        checkpoint.json    format, step, state, and the size and SHA-256 of every other file
        COMPLETE           the SHA-256 of that, written last

Tensors are stored whole and by name, so that any number of workers can go on from them. `writer.py` saves while
training goes on.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.runs.manifest import MANIFEST, MARKER, Manifest, parse_manifest, seal
from rayllm.runs.places import Place, absolute, below, is_url, local_path, open_store, split
from rayllm.runs.remote import RemoteStore
from rayllm.runs.run_dir import read_run
from rayllm.runs.store import CheckpointStore, LocalStore

if TYPE_CHECKING:
    from torch import Tensor

    from rayllm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found whole. As text it is its path or URL."""

    path: Path
    """Its folder on this machine: for a URL, in the cache."""
    step: int
    state: Mapping[str, Any]
    """What `save_checkpoint` was given: model config, position in the text, metrics."""
    url: str | None = None
    """Where it was fetched from."""
    run_path: Path | None = None
    """The run directory that it belongs to; None where a URL was addressed itself."""

    def __str__(self) -> str:
        return self.url or str(self.path)

    @property
    def address(self) -> str:
        """What other processes open it by, on any machine that sees the path or URL."""
        return self.url or absolute(self.path)

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

    def report_path(self, kind: str) -> Path:
        """Where an evaluation of it is written: beside its run's checkpoints, one folder for each step.

        Raises ValueError where the run has no directory on this machine.
        """
        if self.run_path is None:
            raise ValueError(f"{self} lies in no run directory, so its report has no place; write --out=DIRECTORY")
        return self.run_path / kind / self.path.name


def open_checkpoint(place: Place) -> Checkpoint:
    """The checkpoint at a path or URL, or the newest whole one of a run directory or of a folder of checkpoints there.

    One behind a URL is fetched into the cache (RAYLLM_CACHE_DIR). A damaged checkpoint is passed over with a warning
    when a run is searched, and a ValueError that names the file and the reason when it is addressed itself, or when no
    other is left. Raises FileNotFoundError where there is none.
    """
    folder, name = split(place)
    store = open_store(folder)
    if store.read(os.path.join(name, MANIFEST)) is not None or any(name == entry.name for entry in store.find()):
        return _open(store, name)
    checkpoint = latest_checkpoint(place)
    if checkpoint is None:
        looked = (below(place, name) for name in (MANIFEST, "checkpoints/step_*", "step_*"))
        raise FileNotFoundError(
            f"no checkpoint at {place} (looked for {', '.join(map(str, looked))}); "
            "`rayllm pretrain --out=DIRECTORY` makes one, `rayllm import-nanochat` imports one"
        )
    return checkpoint


def latest_checkpoint(place: Place) -> Checkpoint | None:
    """The newest whole checkpoint of a run directory, wherever its recipe keeps them, or of a folder of checkpoints;
    None where there is none yet.

    Raises ValueError when there are checkpoints and every one is damaged: starting over would be no cure.
    """
    store, run_path = _find_store(place)
    damages: list[ValueError] = []
    for entry in store.find():
        try:
            return _open(store, entry.name, run_path)
        except ValueError as error:
            if entry not in store.find():  # a training run has just dropped it, and newer ones stand
                return latest_checkpoint(place)
            _log.warning("passing over a checkpoint: %s", error)
            damages.append(error)
    if damages:
        raise ValueError(f"every checkpoint in {store.address('')} is damaged; the newest: {damages[0]}")
    return None


def peek_checkpoint(place: Place) -> tuple[str, Manifest] | None:
    """Address and manifest of the checkpoint that `open_checkpoint` would take if all is whole: nothing of a URL is
    fetched but the manifest, and no file is verified. None where there is none, ValueError where all are damaged."""
    folder, name = split(place)
    store = open_store(folder)
    names = [name]
    if store.read(os.path.join(name, MANIFEST)) is None:
        store, _ = _find_store(place)
        names = [entry.name for entry in store.find()]
    damages: list[ValueError] = []
    for name in names:
        address = store.address(name)
        try:
            content, marker = (store.read(os.path.join(name, file)) for file in (MANIFEST, MARKER))
            return address, parse_manifest(content, marker, address)
        except ValueError as error:
            damages.append(error)
    if damages:
        raise damages[0]
    return None


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
    """`write_checkpoint` to a folder of this machine; returns the checkpoint's own."""
    store = LocalStore(root)
    name = write_checkpoint(
        store,
        step,
        model_state=model_state,
        optimizer_state=optimizer_state,
        state=state,
        tokenizer=tokenizer,
        keep=keep,
    )
    return root / name


def write_checkpoint(
    store: CheckpointStore,
    step: int,
    *,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor] | None,
    state: Mapping[str, object],
    tokenizer: Tokenizer,
    keep: int,
) -> str:
    """Write the checkpoint of a step, replacing one of the same step, then drop all but the newest `keep` up to it.

    `state` must be JSON-able. Tensors may be on any device and may share storage; each is stored whole. Returns the
    checkpoint's name in the store. Raises OSError that says what could not be written (a full disk); earlier
    checkpoints are then as they were.
    """
    from safetensors import SafetensorError

    assert keep >= 1, keep
    part = "its folder"

    def fill(directory: Path) -> None:
        nonlocal part
        part = "model.safetensors"
        _save_tensors(directory / part, model_state)
        if optimizer_state is not None:
            part = "optimizer.safetensors"
            _save_tensors(directory / part, optimizer_state)
        part = "the tokenizer"
        tokenizer.save(directory / "tokenizer")
        part = MANIFEST
        seal(directory, step, state)
        part = "the files"

    try:
        name = store.write(step, fill)
    except (OSError, SafetensorError) as error:
        staged = f" (first in {store.staging.root})" if isinstance(store, RemoteStore) else ""
        raise _explain(error, part, store.address(f"step_{step:06d}") + staged) from error
    older = [entry for entry in store.find() if entry.step <= step]  # newest first, this one at the head
    for entry in older[keep:]:
        store.discard(entry.name)
    return name


def check_tensor_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: object) -> None:
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


def _find_store(place: Place) -> tuple[CheckpointStore, Path | None]:
    """Where the checkpoints of a run are, or those of a folder; and the run's directory, where only it tells that."""
    stores = [open_store(below(place, "checkpoints")), open_store(place)]
    for store in stores:
        if store.find():
            return store, None
    if not is_url(place) and (local_path(place) / "run.json").exists():
        elsewhere = read_run(local_path(place)).checkpoints
        if elsewhere is not None:
            return open_store(elsewhere), local_path(place)
    return stores[0], None


def _open(store: CheckpointStore, name: str, run_path: Path | None = None) -> Checkpoint:
    opened = store.open(name)
    is_local = isinstance(store, LocalStore)
    if run_path is None and is_local:
        run_path = opened.path.parent.parent
    url = None if is_local else store.address(name)
    return Checkpoint(opened.path, opened.manifest.step, opened.manifest.state, url, run_path)


def _explain(error: Exception, part: str, address: str) -> OSError:
    """The OSError of a failed write, with the part's name and the cure; safetensors has an error of its own."""
    code = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
    is_full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = os.strerror(number) if is_full and number else re.sub(r"^\[Errno \d+\] ", "", str(error))
    cure = "make room there" if is_full else "mend that"
    message = (
        f"could not write {part} of the checkpoint {address}: {reason}. Earlier checkpoints are untouched; {cure}, "
        "then run the same command again to go on from the newest of them"
    )
    return OSError(number, message) if number else OSError(message)


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
