"""What a person sees of a run, drawn from a file that others write."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayllm.runs.progress import (
    MetricsTail,
    Pace,
    ProgressFollower,
    only_progress,
    render_duration,
    render_validation,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Records:
    """Writes a metrics file as a worker would, with a clock of its own."""

    def __init__(self, path: Path, s_per_step: float = 0.5):
        self.path = path
        self._s_per_step = s_per_step
        self._now_s = 1000.0

    def train(self, *steps: int, **more: float) -> None:
        for step in steps:
            self._now_s += self._s_per_step
            metrics = {
                "train/loss": 4.8123,
                "train/lr_multiplier": 0.71,
                "train/tokens_per_s": 3410.2,
                "train/mfu": 0.31,
            }
            self.write({"step": step, "time_s": self._now_s, **metrics, **more})

    def validation(self, step: int) -> None:
        self._now_s += self._s_per_step
        self.write({"step": step, "time_s": self._now_s, "val/bpb": 1.23456, "val/bpb_stderr": 0.0051})

    def write(self, record: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def resume_after(self, step: int) -> None:
        kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(beside, self.path)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "metrics.jsonl")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "nothing came in 10 s"
        time.sleep(0.005)


def follow(records: Records, stream: io.StringIO, line_every_s: float = 0.0) -> ProgressFollower:
    return ProgressFollower(records.path, 732, stream, poll_every_s=0.01, line_every_s=line_every_s)


def test_lines_say_where_the_run_is(records):
    stream = io.StringIO()
    with follow(records, stream):  # the file does not exist yet
        records.train(119, 120)
    expected = "step 120/732  loss 4.812  lr 0.71  3,410 tok/s  mfu 31%  eta 5m06s"
    assert stream.getvalue().splitlines()[-1] == expected


def test_few_lines_and_the_last(records):
    stream = io.StringIO()
    with follow(records, stream, line_every_s=60):
        records.train(1)
        wait_for(lambda: "step 1/" in stream.getvalue())
        for step in range(2, 30):
            records.train(step)
            time.sleep(0.002)
        assert len(stream.getvalue().splitlines()) == 1
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["step 1/732", "step 29/732"]


def test_validation_and_samples_are_always_said(records):
    stream = io.StringIO()
    with follow(records, stream, line_every_s=60):
        records.train(1)
        records.validation(1)
        records.write({"step": 1, "time_s": 1.0, "name": "sample", "text": "Once\nupon \x1b[31m"})
        records.write({"step": 1, "time_s": 1.0, "name": "another", "text": "not shown"})
    validation, sample, last = stream.getvalue().splitlines()
    assert validation == "step 1/732  val bpb 1.2346 +- 0.0051"
    assert sample == "step 1/732  sample: Once\\nupon \\x1b[31m"
    assert last.startswith("step 1/732  loss")


def test_history_gives_the_step_and_nothing_else(records):
    records.train(*range(1, 50))
    records.validation(49)
    stream = io.StringIO()
    with follow(records, stream):
        time.sleep(0.05)
        assert stream.getvalue() == ""
        records.train(50)
    (line,) = stream.getvalue().splitlines()
    assert line == "step 50/732  loss 4.812  lr 0.71  3,410 tok/s  mfu 31%"  # one new record: no speed, no end


def test_a_resume_goes_back_and_repeats_nothing_that_was_kept(records):
    stream = io.StringIO()
    with follow(records, stream):
        records.train(*range(1, 11))
        records.validation(10)
        wait_for(lambda: "val bpb" in stream.getvalue())
        records.train(*range(11, 21))
        wait_for(lambda: "step 20/" in stream.getvalue())
        records.resume_after(10)
        records.train(11)
        wait_for(lambda: stream.getvalue().splitlines()[-1].startswith("step 11/"))
        records.train(12, **{"train/loss": 2.0})
    assert stream.getvalue().count("val bpb") == 1
    assert stream.getvalue().splitlines()[-1].startswith("step 12/732  loss 2.000")


def test_a_file_that_shrinks_in_place_is_read_anew(records):
    records.train(*range(1, 11))
    tail = MetricsTail(records.path)
    assert [record["step"] for record in tail.poll()] == list(range(1, 11)) and not tail.was_replaced
    first = records.path.read_text().splitlines()[0]
    records.path.write_text(f"{first}\n")
    assert tail.poll() == [] and tail.was_replaced and tail.last_step == 1
    records.train(2)
    assert [record["step"] for record in tail.poll()] == [2] and not tail.was_replaced


def test_a_line_counts_when_it_is_whole(records):
    tail = MetricsTail(records.path)
    with open(records.path, "a") as file:
        for part in ('{"step": 7, ', '"train/loss": "NaN"', "}"):
            file.write(part)
            file.flush()
            assert tail.poll() == []
        file.write("\nrubbish\n")
    (record,) = tail.poll()
    assert record["step"] == 7 and record["train/loss"] != record["train/loss"]


def test_a_terminal_gets_a_bar_with_lines_above_it(records):
    stream = Terminal()
    with follow(records, stream):
        records.train(365, 366)
        records.validation(366)
        wait_for(lambda: "val bpb" in stream.getvalue() and "366/732" in stream.getvalue())
    shown = stream.getvalue()
    assert "50%" in shown and "loss 4.812" in shown and "3,410 tok/s" in shown and "mfu 31%" in shown and "eta" in shown
    assert "step 366/732  val bpb 1.2346 +- 0.0051\n" in shown


def test_ends_promptly_and_without_records_says_nothing(records):
    stream = io.StringIO()
    follower = ProgressFollower(records.path, 732, stream, poll_every_s=30)
    with follower:
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 1 and stream.getvalue() == ""


def test_a_stream_that_goes_away_does_not_disturb_the_run(records):
    stream = io.StringIO()
    with follow(records, stream):
        records.train(1)
        wait_for(lambda: "step 1/" in stream.getvalue())
        stream.close()
        records.train(2)


def test_text_that_a_stream_cannot_encode_is_replaced(records):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with follow(records, stream):
        records.write({"step": 1, "time_s": 1.0, "name": "sample", "text": "d\u00e9j\u00e0 vu"})
    assert raw.getvalue() == b"step 1/732  sample: d?j? vu\n"


def test_missing_metrics_are_left_out():
    pace = Pace(10)
    pace.add({"step": 1, "time_s": 1.0, "train/loss": 3.0, "train/mfu": None})
    assert pace.render_metrics() == ["loss 3.000"]
    pace.add({"step": 3, "time_s": 2.0, "train/loss": 3.0, "train/mfu": 0.0123})
    assert pace.render_metrics() == ["loss 3.000", "mfu 1.2%", "eta 4s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (750, "12m30s"), (3599.7, "1h00m"), (11100, "3h05m")],
)
def test_durations(seconds, text):
    assert render_duration(seconds) == text


def test_validation_in_whatever_a_stage_measures() -> None:
    assert render_validation({"step": 4, "val/loss": 2.5, "val/loss_stderr": 0.01}) == "val loss 2.5000 +- 0.0100"
    record = {"step": 4, "val/pass@1": 0.5, "val/pass@1_stderr": 0.02, "val/greedy": 0.625}
    assert render_validation(record) == "val pass@1 0.5000 +- 0.0200, greedy 0.6250"


def test_only_progress_on_the_screen_and_the_rest_in_a_log(records):
    lines, terminal, log = io.StringIO(), Terminal(), io.StringIO()
    for stream in (lines, terminal):
        with (
            only_progress(stream, "rl", log),
            ProgressFollower(records.path, 732, poll_every_s=0.01, line_every_s=60),
        ):
            records.train(120)
            records.validation(120)
            wait_for(lambda: log.getvalue().endswith("val bpb 1.2346 +- 0.0051\n"))
            log.truncate(log.seek(0))
    assert lines.getvalue().splitlines()[0].startswith("rl  step 120/732  loss 4.812")
    assert "\rrl  16% |" in terminal.getvalue()
    assert "val bpb" not in lines.getvalue() + terminal.getvalue()
    assert terminal.getvalue().endswith(" \r"), "the bar is wiped off"
