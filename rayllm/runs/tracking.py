"""Where metrics go: always `metrics.jsonl`, and besides it wandb, TensorBoard and MLflow, several at once.

One line of the file is one JSON object: ``{"step", "time_s", **metrics}``, or for a text
``{"step", "time_s", "name", "text"}``. JSON has no NaN, so such numbers stand as "NaN", "Infinity" and "-Infinity".
A run keeps its identity in every sink over a resume, and what it replays is never counted twice.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rayllm.config.schema import TrackingConfig
from rayllm.runs.atomic import naming, write_atomic, write_json
from rayllm.runs.run_dir import flatten, read_run

_log = logging.getLogger(__name__)

_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX", "mlflow": "mlflow"}
_TO_INSTALL = {"wandb": "wandb", "tensorboard": "tensorboardX", "mlflow": "mlflow-skinny"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Sink(Protocol):
    """A place that metrics go to. What it raises is reported once, and the run goes on without it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


def check_sinks(tracking: TrackingConfig) -> None:
    """Raise ValueError, with the cure, where a sink is unknown or its package is not installed. Imports none."""
    for name in tracking.sinks:
        if name not in _PACKAGES:
            raise ValueError(f"tracking.sinks: unknown sink {name!r}; choose among {', '.join(_PACKAGES)}")
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ValueError(
                f"tracking.sinks has {name}, whose package is not installed here: "
                f"`pip install {_TO_INSTALL[name]}`, or take {name} out of tracking.sinks"
            )


def build_tracker(
    run_path: Path,
    tracking: TrackingConfig,
    *,
    config: Mapping[str, object],
    resume_step: int | None,
    extra_sinks: Sequence[Sink] = (),
) -> Tracker:
    """Open every sink of an opened run; one process of a run (rank 0) may.

    `config` is shown beside the run where a sink can. Training goes on after `resume_step`: what was recorded later
    is dropped and will be recorded anew; None starts from nothing.
    Raises ValueError where a sink is unknown or not installed; one that cannot start is warned about and left out.
    """
    check_sinks(tracking)
    builders: dict[str, Callable[[], Sink]] = {
        "wandb": lambda: WandbSink(run_path, tracking, config),
        "tensorboard": lambda: TensorBoardSink(run_path / "tensorboard", 0 if resume_step is None else resume_step + 1),
        "mlflow": lambda: MlflowSink(run_path, tracking, config),
    }
    records = JsonLines(run_path / "metrics.jsonl", resume_step)
    sinks: list[tuple[str, Sink]] = [(type(sink).__name__, sink) for sink in extra_sinks]
    for name in tracking.sinks:
        try:
            sinks.append((name, builders[name]()))
        except Exception as error:  # noqa: BLE001 - a third party's service failed: no reason to stop training
            _warn(name, "could not start", error)
    return Tracker(records, sinks)


class Tracker:
    """Hands every record to the file and to all sinks; drops a sink that fails, never the run."""

    def __init__(self, records: JsonLines, sinks: Sequence[tuple[str, Sink]]):
        self._records = records
        self._sinks = list(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step. Raises OSError where `metrics.jsonl` cannot be written (a full disk)."""
        self._records.log(step, metrics)
        self._to_sinks(lambda sink: sink.log(step, metrics))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Record a text of a step, such as a sample."""
        self._records.log_text(step, name, text)
        self._to_sinks(lambda sink: sink.log_text(step, name, text))

    def close(self) -> None:
        """Flush and close all; a second call does nothing."""
        self._records.close()
        self._to_sinks(lambda sink: sink.close())
        self._sinks.clear()

    def _to_sinks(self, tell: Callable[[Sink], None]) -> None:
        for named in list(self._sinks):
            try:
                tell(named[1])
            except Exception as error:  # noqa: BLE001 - as in build_tracker
                self._sinks.remove(named)
                _warn(named[0], "failed", error)


def _warn(name: str, what: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    _log.warning("the metrics sink %s %s (%s: %s); going on without it", name, what, type(error).__name__, reason)


class JsonLines:
    """`metrics.jsonl`: one record a line, each on the disk's side as soon as it is logged."""

    def __init__(self, path: Path, resume_step: int | None):
        self._path = path
        _drop_later_records(path, resume_step)
        with naming(path):
            self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, "time_s": time.time(), **{k: _json_number(v) for k, v in metrics.items()}})

    def log_text(self, step: int, name: str, text: str) -> None:
        self._write({"step": step, "time_s": time.time(), "name": name, "text": text})

    def close(self) -> None:
        with naming(self._path):
            self._file.close()

    def _write(self, record: Mapping[str, object]) -> None:
        with naming(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; numbers that JSON lacks are floats again, torn lines are left out."""
    return [record for _, record in _read_lines(Path(path))]


def parse_record(line: str) -> dict[str, Any] | None:
    """One line of a metrics.jsonl as a record; None where it is torn (its writer was killed) or no record."""
    try:
        raw = json.loads(line)
    except ValueError:
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("step"), int):
        return None
    return raw if "text" in raw else {k: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in raw.items()}


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(line, record) for line in lines if (record := parse_record(line)) is not None]


def _drop_later_records(path: Path, resume_step: int | None) -> None:
    if path.exists():
        kept = [line for line, record in _read_lines(path) if resume_step is not None and record["step"] <= resume_step]
        content = "".join(f"{line}\n" for line in kept).encode()
        if content != path.read_bytes():
            write_atomic(path, content)


def _json_number(value: float) -> float | str:
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else json.dumps(value)


class TensorBoardSink:
    """Event files in `directory`; TensorBoard itself hides what earlier launches wrote at `purge_step` and later."""

    def __init__(self, directory: Path, purge_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases under the run's own id: offline below the run directory unless a key or WANDB_MODE is set.

    It keeps the first value of a step, so a replayed step changes nothing.
    """

    def __init__(self, run_path: Path, tracking: TrackingConfig, config: Mapping[str, object]):
        import wandb

        self._table = wandb.Table
        self._texts: dict[tuple[int, str], list[list[object]]] = {}
        self._run = wandb.init(
            project=tracking.project,
            name=tracking.name or run_path.name,
            id=read_run(run_path).run_id,
            resume="allow",
            dir=str(run_path),
            mode=os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline"),  # type: ignore[arg-type]
            config=dict(config),
            # What workers print belongs to Ray's logs, and an unreachable server must not hold up a run.
            settings=wandb.Settings(
                console="off", quiet=True, init_timeout=30, finish_timeout=60, finish_timeout_raises=False
            ),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        # wandb keeps one value of a name and step: the texts of a step grow one table.
        rows = self._texts.get((step, name), [])
        self._texts = {(step, name): [*rows, [step, text]]}
        self._run.log({name: self._table(columns=["step", "text"], data=self._texts[step, name])}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """One MLflow run, found again by `mlflow.json`; files under `mlflow/` unless MLFLOW_TRACKING_URI names a server.

    MLflow can forget nothing, so values that it already has are not sent again on a replay.
    Its own page opens with `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlflow`.
    """

    def __init__(self, run_path: Path, tracking: TrackingConfig, config: Mapping[str, object]):
        # Its defaults would try a server that is gone for minutes, send usage reports, and refuse plain files.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run_path / "mlflow").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        self._recorded: dict[str, set[int]] = {}
        self._num_texts: Counter[tuple[int, str]] = Counter()
        identity = run_path / "mlflow.json"
        known = json.loads(identity.read_text(encoding="utf-8")) if identity.exists() else {}
        self._resumed = known.get("tracking_uri") == uri
        if self._resumed:
            self._run_id = str(known["run_id"])
            self._client.update_run(self._run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(tracking.project)
        experiment_id = found.experiment_id if found else self._client.create_experiment(tracking.project)
        run_id = read_run(run_path).run_id
        run = self._client.create_run(experiment_id, run_name=tracking.name or run_path.name, tags={"rayllm": run_id})
        self._run_id = run.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flatten(config).items()]
        for start in range(0, len(params), 100):  # as many as MLflow takes at once
            self._client.log_batch(self._run_id, params=params[start : start + 100])
        write_json(identity, {"tracking_uri": uri, "run_id": self._run_id})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        fresh = [self._metric(k, float(v), now_ms, step) for k, v in metrics.items() if step not in self._steps_of(k)]
        if fresh:
            self._client.log_batch(self._run_id, metrics=fresh)

    def _steps_of(self, key: str) -> set[int]:
        """The steps at which earlier launches of this run recorded `key`."""
        if self._resumed and key not in self._recorded:
            history = self._client.get_metric_history(self._run_id, key)
            self._recorded[key] = {metric.step for metric in history}
        return self._recorded.get(key, set())

    def log_text(self, step: int, name: str, text: str) -> None:
        self._num_texts[step, name] += 1
        self._client.log_text(self._run_id, text, f"{name}/step_{step:06d}_{self._num_texts[step, name]}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
