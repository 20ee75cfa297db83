"""One directory for one run: its recipe, plan, provenance, metrics and checkpoints, and one process that owns it.

config.yaml        the resolved recipe          run.json           who this run is, over every resume
plan.json          what followed from it        provenance.jsonl   one line for each launch
metrics.jsonl      see tracking.py              checkpoints/       see checkpoint.py (or elsewhere, by recipe)
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayllm.config.load import to_dict, to_yaml
from rayllm.runs.atomic import naming, write_atomic, write_json
from rayllm.runs.places import absolute, of_run, open_store
from rayllm.runs.provenance import describe_launch, timestamp
from rayllm.runs.store import CheckpointStore

_UNSET = object()
_OWN_FILES = ("run.json", "config.yaml", "plan.json", "provenance.jsonl")


@dataclass(frozen=True)
class RunRecord:
    """Who a run is: what `run.json` holds, written once and kept over every resume."""

    run_id: str
    """12 hex characters, drawn when the run was first opened."""
    stage: str
    """The stage that owns the directory."""
    created: str
    """When it was first opened (UTC)."""
    config_fingerprint: str
    """SHA-256 over the part of the recipe that may not change."""
    checkpoints: str | None = None
    """Path or URL of its checkpoints; None: `checkpoints` in the directory."""


@dataclass(frozen=True)
class RunDir:
    """An opened run directory, held until its `with` block ends."""

    path: Path
    run_id: str
    resumed: bool
    """True where the directory already held this run."""
    checkpoints: str
    """Path or URL of the folder of its checkpoints."""

    @property
    def metrics_path(self) -> Path:
        """The JSON lines of the metrics."""
        return self.path / "metrics.jsonl"


@contextmanager
def open_run(
    path: str | Path, *, stage: str, config: Any, plan: Mapping[str, object], may_change: Collection[str] = ()
) -> Iterator[RunDir]:
    """Create the run directory, or join the run that it holds, and keep every other process out meanwhile.

    `config` is the stage's resolved config tree (a dataclass). `may_change` names dotted keys, each with all
    below it, that may differ from the run's earlier launches; `out` always may, since directories move. Where it has
    `checkpoints` (a path or URL), the run takes that place for its own.

    Raises ValueError where the directory or that place is in use, holds a run of another stage or recipe, or is not a
    run's.
    """
    directory = Path(path).expanduser().absolute()
    elsewhere = getattr(config, "checkpoints", None)
    place = None if elsewhere is None else absolute(elsewhere)
    store = None if place is None else open_store(place)
    _create(directory)
    _refuse_foreign(directory)
    with _locked(directory):
        # Once more: what was here before the lock was ours may have been another process's half-written start.
        _refuse_foreign(directory)
        fixed = _without(flatten(to_dict(config)), {"out", *may_change})
        fingerprint = _fingerprint(_without(fixed, {"checkpoints"}))
        record = RunRecord(secrets.token_hex(6), stage, timestamp(), fingerprint, place)
        resumed = (directory / "run.json").exists()
        if resumed:
            record = read_run(directory)
            _refuse_other_run(directory, record, stage, fixed, {"out", *may_change})
        if store is not None:
            _claim(store, record)
        _write_if_changed(directory / "config.yaml", to_yaml(config))
        _write_if_changed(directory / "plan.json", json.dumps(plan, indent=2, default=str) + "\n")
        if not resumed:  # last, since run.json is what makes the directory a run
            write_json(directory / "run.json", dataclasses.asdict(record))
        launches = directory / "provenance.jsonl"
        with naming(launches), open(launches, "a", encoding="utf-8") as file:
            file.write(json.dumps(describe_launch()) + "\n")
        try:
            yield RunDir(directory, record.run_id, resumed, str(of_run(place, directory)))
        except BaseException:
            if not resumed and store is None:
                _forget_empty(directory)
            raise


def read_run(path: str | Path) -> RunRecord:
    """Who the run in a directory is. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    file = Path(path) / "run.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} is no run directory: it holds no run.json (a stage writes one to its --out)")
    try:
        return RunRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); pass --out= another directory, or remove {path}") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted keys; lists stay whole, and so do empty mappings."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def _create(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{error.filename} is a file, not a directory; pass --out= another path") from error


def _refuse_foreign(directory: Path) -> None:
    names = {entry.name for entry in directory.iterdir()}
    if "run.json" in names:
        return
    if ".lock" in names:  # a start that was cut off leaves these; they are ours to write again
        names -= {".lock", "config.yaml", "plan.json"}
        names = {name for name in names if ".tmp-" not in name}
    if names:
        example = sorted(names)[0]
        raise ValueError(
            f"{directory} is not empty and holds no run of ours (it has {example!r} but no run.json); "
            "pass --out= another directory, or empty this one"
        )


def _forget_empty(directory: Path) -> None:
    """A first launch that failed before it had made anything leaves the directory to a recipe that was mended."""
    if {entry.name for entry in directory.iterdir()} <= {*_OWN_FILES, ".lock"}:
        for name in _OWN_FILES:
            (directory / name).unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The kernel drops the lock with its process, however that dies, so no stale lock can stay behind."""
    with open(directory / ".lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise ValueError(
                f"{directory} is in use by {holder}; wait for it to end, or pass --out= another directory"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on host {platform.node()}\n")
        lock.flush()
        yield


def _refuse_other_run(
    directory: Path, record: RunRecord, stage: str, fixed: Mapping[str, object], may_change: Collection[str]
) -> None:
    cure = "pass --out= another directory for a new run, or remove this one"
    if record.stage != stage:
        raise ValueError(f"{directory} holds a run of the stage {record.stage!r}, not {stage!r}; {cure}")
    file = directory / "config.yaml"
    try:
        old = _without(flatten(yaml.safe_load(file.read_text(encoding="utf-8"))), may_change)
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read, so the run's recipe is unknown; {cure}") from error
    changes = [
        f"{key} was {_show(old.get(key, _UNSET))} and is now {_show(fixed.get(key, _UNSET))}"
        for key in sorted(old.keys() | fixed.keys())
        if old.get(key) != fixed.get(key)  # a key that recipes did not have then is as good as null
    ]
    if changes:
        more = f"; and {len(changes) - 8} more" if len(changes) > 8 else ""
        raise ValueError(f"{directory} holds a run of another recipe: {'; '.join(changes[:8])}{more}. To go on, {cure}")


def _claim(store: CheckpointStore, record: RunRecord) -> None:
    """Make a folder of checkpoints this run's, or join it: a run whose directory went with its machine goes on."""
    content = store.read("owner.json")
    if content is None:
        if found := store.find():  # which retention would remove
            raise ValueError(
                f"{store.address('')} holds checkpoints of an unknown run ({found[0].name}, but no owner.json); "
                "pass --checkpoints= another place"
            )
        store.put("owner.json", json.dumps(dataclasses.asdict(record), indent=2) + "\n")
        return
    try:
        owner = RunRecord(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{store.address('owner.json')} is damaged ({error}); pass --checkpoints= another place"
        ) from error
    if (owner.stage, owner.config_fingerprint) != (record.stage, record.config_fingerprint):
        raise ValueError(
            f"{store.address('')} holds the checkpoints of another run (stage {owner.stage}, begun {owner.created}, "
            "with another recipe); pass --checkpoints= another place"
        )


def _show(setting: object) -> str:
    return "unset" if setting is _UNSET else repr(setting)


def _without(flat: Mapping[str, object], dropped: Collection[str]) -> dict[str, object]:
    return {k: v for k, v in flat.items() if not any(k == name or k.startswith(f"{name}.") for name in dropped)}


def _fingerprint(flat: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def _write_if_changed(path: Path, content: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        write_atomic(path, content)
