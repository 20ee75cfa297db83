"""What run directories tell afterwards, read leniently: damage is counted and noted, and the rest is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rayllm.runs.tracking import parse_record

EVALUATIONS = ("base-eval", "chat-eval")
_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Series:
    """One metric over steps; `stderrs` only where every value has one."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    stderrs: tuple[float, ...] | None = None

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class RunHistory:
    """One run directory, or one evaluation's, as far as it could be read."""

    path: Path
    name: str
    """Path below the folder that the report is about, or the directory's own name."""
    stage: str
    created: str
    plan: Mapping[str, Any]
    results: Mapping[str, Any]
    """Its report.json, where its stage writes one."""
    launches: tuple[Mapping[str, Any], ...]
    """The lines of provenance.jsonl."""
    records: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl, texts among them."""
    checkpoints: str | None = None
    """Where its checkpoints are, when not in the directory."""

    @property
    def num_steps(self) -> int:
        """The last step that was recorded."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def seconds(self) -> float | None:
        """Wall clock from each launch to its last record, or what the stage itself says; None where nothing does."""
        starts = sorted(start for launch in self.launches if (start := _epoch_s(launch.get("time"))) is not None)
        times = sorted(t for record in self.records if (t := number(record.get("time_s"))) is not None)
        spent = 0.0
        for start, next_start in pairwise([*starts, math.inf]):
            during = [t for t in times if start <= t < next_start]
            spent += during[-1] - start if during else 0.0
        # A single record at the end, without a launch to count from, says nothing of how long it took.
        return spent or number(self.results.get("seconds"))

    @property
    def newest_checkpoint(self) -> str | None:
        """Name of the newest checkpoint folder that was finished (not verified here: that reads it whole), or the place
        where they are kept."""
        if self.checkpoints is not None:
            return self.checkpoints
        folder = self.path / "checkpoints"
        whole = [
            file.parent.name for file in folder.glob("step_*/checkpoint.json") if _STEP.fullmatch(file.parent.name)
        ]
        return max(whole, key=lambda name: int(name.removeprefix("step_")), default=None)

    @property
    def texts(self) -> list[tuple[int, str]]:
        """(step, text) of the samples of the last step that has any."""
        texts = [(record["step"], str(record["text"])) for record in self.records if "text" in record]
        return [(step, text) for step, text in texts if step == texts[-1][0]]

    def series(self, key: str) -> Series:
        """All finite values of a metric with their steps, and their standard errors (`KEY_stderr`)."""
        rows = [
            (record["step"], value, number(record.get(f"{key}_stderr")))
            for record in self.records
            if (value := number(record.get(key))) is not None
        ]
        if not rows:
            return Series((), ())
        steps, values, stderrs = zip(*rows, strict=True)
        return Series(steps, values, None if None in stderrs else stderrs)

    def keys(self, pattern: str) -> list[str]:
        """The metrics whose whole name matches a regular expression, in order of the numbers in them."""
        found = {key for record in self.records for key in record if re.fullmatch(pattern, key)}
        return sorted(found, key=lambda key: ([int(digits) for digits in re.findall(r"\d+", key)], key))


@dataclass(frozen=True)
class History:
    """The runs of one model in the order of their stages, their evaluations, and what was wrong with the files."""

    path: Path
    runs: tuple[RunHistory, ...]
    evaluations: tuple[RunHistory, ...]
    summary: Mapping[str, Any]
    notes: tuple[str, ...]


def read_history(path: Path, stages: Sequence[str]) -> History:
    """Read a run directory, or a folder of run directories, whose runs are put in the order of `stages`.

    Raises FileNotFoundError where the path is not there, ValueError where no run is in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}: give a run directory, or the folder that holds those of one model")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give a run directory, or the folder that holds those of one model")
    notes: list[str] = []
    folders = [path] if (path / "run.json").exists() else sorted(entry.parent for entry in path.glob("*/run.json"))
    inside = [file.parent for folder in folders for kind in EVALUATIONS for file in folder.glob(f"{kind}/*/run.json")]
    found = [_read_run(folder, path, notes) for folder in [*folders, *sorted(inside)]]
    if not found:
        raise ValueError(
            f"{path} holds no run: neither it nor a folder in it has a run.json, which every stage writes to its --out"
        )
    rank = {stage: idx for idx, stage in enumerate(stages)}
    found.sort(key=lambda run: (rank.get(run.stage, len(rank)), run.created, run.name))
    return History(
        path,
        tuple(run for run in found if run.stage not in EVALUATIONS),
        tuple(run for run in found if run.stage in EVALUATIONS),
        _read_mapping(path / "summary.json", notes),
        tuple(notes),
    )


def number(value: object) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping as it is, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def _read_run(folder: Path, root: Path, notes: list[str]) -> RunHistory:
    identity = _read_mapping(folder / "run.json", notes)
    launches = [mapping(_parse(line)) for line in _lines(folder / "provenance.jsonl")]
    records = [parse_record(line) for line in _lines(folder / "metrics.jsonl")]
    for file, num_damaged in (
        ("metrics.jsonl", sum(record is None for record in records)),
        ("provenance.jsonl", sum(not launch for launch in launches)),
    ):
        if num_damaged:
            notes.append(f"{folder / file}: {num_damaged} damaged lines were left out")
    return RunHistory(
        path=folder,
        name=folder.name if folder == root else folder.relative_to(root).as_posix(),
        stage=str(identity.get("stage", "unknown")),
        created=str(identity.get("created", "")),
        plan=_read_mapping(folder / "plan.json", notes),
        results=_read_mapping(folder / "report.json", notes),
        launches=tuple(launch for launch in launches if launch),
        records=tuple(record for record in records if record is not None),
        checkpoints=str(identity["checkpoints"]) if identity.get("checkpoints") else None,
    )


def _lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    # Split at newlines alone: JSON strings may hold the other separators that splitlines() knows.
    return [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _read_mapping(file: Path, notes: list[str]) -> Mapping[str, Any]:
    if not file.exists():
        return {}
    found = mapping(_parse(file.read_text(encoding="utf-8", errors="replace")))
    if not found:
        notes.append(f"{file}: could not be read, and was left out")
    return found


def _epoch_s(stamp: object) -> float | None:
    try:
        return datetime.fromisoformat(str(stamp)).timestamp()
    except ValueError:
        return None
