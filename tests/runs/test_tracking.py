"""Metrics: one valid line a record, curves that never double, sinks that may fail and never take the run along."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from rayllm.config.load import to_dict
from rayllm.config.schema import PretrainConfig, TrackingConfig
from rayllm.runs.run_dir import open_run, read_run
from rayllm.runs.tracking import Tracker, build_tracker, check_sinks, read_metrics

CONFIG = PretrainConfig(depth=4)

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="MLFLOW ABSENT: pip install mlflow-skinny")


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    with open_run(tmp_path / "run", stage="pretrain", config=CONFIG, plan={}) as run:
        return run.path


@pytest.fixture(autouse=True)
def _nothing_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    # Set by the MLflow sink for its process; monkeypatch takes them back.
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def track(run_path: Path, *sinks: str, resume_step: int | None = None, extra: tuple = ()) -> Tracker:
    tracking = TrackingConfig(sinks=sinks)  # type: ignore[arg-type]
    return build_tracker(run_path, tracking, config=to_dict(CONFIG), resume_step=resume_step, extra_sinks=extra)


class Recorder:
    """A sink that keeps what it is told, and fails from the nth call on."""

    def __init__(self, fails_at: int = 10**9):
        self.calls: list[tuple] = []
        self._fails_at = fails_at

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, dict(metrics))

    def log_text(self, step: int, name: str, text: str) -> None:
        self._add(step, name, text)

    def close(self) -> None:
        self._add("closed")

    def _add(self, *call: object) -> None:
        if len(self.calls) >= self._fails_at:
            raise ConnectionError("the network is gone")
        self.calls.append(call)


def test_records_are_on_disk_as_they_are_logged(run_path):
    tracker = track(run_path)
    tracker.log(1, {"train/loss": 5.5, "train/rows": 8})
    tracker.log_text(1, "sample", "Once\nupon \u2028 a time")
    first, second = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert (first["step"], first["train/loss"], first["train/rows"]) == (1, 5.5, 8) and first["time_s"] > 1e9
    assert (second["step"], second["name"], second["text"]) == (1, "sample", "Once\nupon \u2028 a time")
    assert read_metrics(run_path / "metrics.jsonl") == [first, second]
    tracker.close()


def test_numbers_that_json_lacks_survive(run_path):
    tracker = track(run_path)
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    tracker.log_text(1, "sample", "NaN")
    tracker.close()
    line = (run_path / "metrics.jsonl").read_text().splitlines()[0]
    raw = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (raw["a"], raw["b"], raw["c"]) == ("NaN", "Infinity", "-Infinity")
    metrics, sample = read_metrics(run_path / "metrics.jsonl")
    assert math.isnan(metrics["a"]) and (metrics["b"], metrics["c"], metrics["d"]) == (math.inf, -math.inf, 0.1)
    assert sample["text"] == "NaN"


@pytest.mark.parametrize(
    ("resume_step", "expected"), [(None, [3, 4]), (0, [3, 4]), (2, [1, 2, 3, 4]), (9, [1, 2, 3, 3, 4])]
)
def test_a_resumed_curve_never_doubles(run_path, resume_step, expected):
    tracker = track(run_path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    with open(run_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [record["step"] for record in read_metrics(run_path / "metrics.jsonl")] == [1, 2, 3]
    tracker = track(run_path, resume_step=resume_step)
    for step in (3, 4):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert [record["step"] for record in read_metrics(run_path / "metrics.jsonl")] == expected


def test_every_sink_gets_every_record(run_path):
    one, two = Recorder(), Recorder()
    tracker = track(run_path, extra=(one, two))
    tracker.log(1, {"loss": 2.0})
    tracker.log_text(1, "sample", "text")
    tracker.close()
    tracker.close()
    assert one.calls == two.calls == [(1, {"loss": 2.0}), (1, "sample", "text"), ("closed",)]


def test_a_failing_sink_is_named_once_and_left_out(run_path, caplog):
    broken, sound = Recorder(fails_at=1), Recorder()
    tracker = track(run_path, extra=(broken, sound))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 2.0})
    tracker.close()
    assert len(broken.calls) == 1 and len(sound.calls) == 4 and len(read_metrics(run_path / "metrics.jsonl")) == 3
    (warning,) = caplog.messages
    assert "Recorder" in warning and "the network is gone" in warning


@needs_mlflow
def test_a_sink_that_cannot_start_is_named_and_left_out(run_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    with caplog.at_level(logging.WARNING):
        tracker = track(run_path, "mlflow")
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert any("mlflow could not start" in message for message in caplog.messages)
    assert len(read_metrics(run_path / "metrics.jsonl")) == 1


def test_a_package_that_is_not_installed_is_said_at_the_start(run_path):
    # Without the site's packages wandb cannot be found; check_sinks itself needs only the configuration's.
    code = (
        "import importlib.util, sys\n"
        "from rayllm.config.schema import TrackingConfig\n"
        "from rayllm.runs.tracking import check_sinks\n"
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        "check_sinks(TrackingConfig(sinks=('wandb',)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ValueError: tracking.sinks has wandb" in done.stderr and "pip install wandb" in done.stderr
    check_sinks(TrackingConfig(sinks=("wandb", "tensorboard")))


def test_importing_the_module_loads_no_sink():
    code = "import sys, rayllm.runs.tracking; print({'wandb', 'mlflow', 'tensorboardX', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def read_events(directory: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for file in sorted(directory.glob("events.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):  # length, its checksum, the event, its checksum
            length = int.from_bytes(content[at : at + 8], "little")
            event = content[at + 12 : at + 12 + length]
            assert int.from_bytes(content[at + 12 + length : at + 16 + length], "little") == masked_crc32c(event)
            events.append(Event.FromString(event))
            at += 16 + length
    return events


def test_tensorboard_events_are_readable_and_purged_on_a_resume(run_path):
    tracker = track(run_path, "tensorboard")
    tracker.log(3, {"train/loss": 2.5})
    tracker.log_text(3, "sample", "Once upon")
    tracker.close()
    events = read_events(run_path / "tensorboard")
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value if v.HasField("simple_value")]
    assert (3, "train/loss", 2.5) in scalars
    assert any(b"Once upon" in text for e in events for v in e.summary.value for text in v.tensor.string_val)
    track(run_path, "tensorboard", resume_step=2).close()
    starts = [e.step for e in read_events(run_path / "tensorboard") if e.HasField("session_log")]
    assert starts[-1] == 3  # steps from here on are hidden


def test_wandb_keeps_its_id_over_a_resume(run_path, caplog):
    for resume_step in (None, 1):
        tracker = track(run_path, "wandb", "tensorboard", resume_step=resume_step)
        tracker.log(2, {"train/loss": 2.5})
        for text in ("one", "two"):
            tracker.log_text(2, "sample", text)
        tracker.close()
    assert "going on without" not in caplog.text
    run_id = read_run(run_path).run_id
    sessions = list((run_path / "wandb").glob("offline-run-*"))
    assert sessions and all(session.name.endswith(f"-{run_id}") for session in sessions)
    assert list((run_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert list((run_path / "tensorboard").glob("events.*"))
    assert [record["step"] for record in read_metrics(run_path / "metrics.jsonl")] == [2, 2, 2]


@needs_mlflow
def test_mlflow_keeps_one_run_and_one_value_a_step(run_path, caplog):
    from mlflow.tracking import MlflowClient

    for resume_step, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        tracker = track(run_path, "mlflow", resume_step=resume_step)
        for step in steps:
            tracker.log(step, {"val/bpb": 1.0 / step})
        for text in ("one", "two"):
            tracker.log_text(3, "sample", text)
        tracker.close()
    assert "going on without" not in caplog.text
    client = MlflowClient(tracking_uri=(run_path / "mlflow").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "rayllm"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "val/bpb")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert (run.info.status, run.info.run_name, run.data.params["depth"]) == ("FINISHED", "run", "4")
    assert run.data.params["tracking.project"] == "rayllm" and run.data.tags["rayllm"] == read_run(run_path).run_id
    texts = sorted((run_path / "mlflow").glob("**/sample/step_000003_*.txt"))
    assert [text.read_text() for text in texts] == ["one", "two"]


def test_a_full_disk_is_said_with_the_file(run_path):
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from rayllm.runs.tracking import JsonLines\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (80, resource.RLIM_INFINITY))\n"
        "records = JsonLines(Path(sys.argv[1]), None)\n"
        "for step in range(9): records.log(step, {'loss': 1.0})\n"
    )
    path = run_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"could not write: File too large: '{path}'" in done.stderr
    assert [record["step"] for record in read_metrics(path)] == [0]
