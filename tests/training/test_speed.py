"""MFU is a share of what the machine can do, also where a run starts on a busy one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rayllm.runtime import Runtime, build_runtime
from rayllm.training.speed import Utilization


def measuring(monkeypatch: pytest.MonkeyPatch, peaks: Iterator[float]) -> Utilization:
    monkeypatch.setattr(Runtime, "peak_flops_per_s", lambda self: next(peaks))
    return Utilization(build_runtime("cpu", "float32"))


def test_the_peak_is_measured_once_while_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    utilization = measuring(monkeypatch, iter([200.0]))
    assert [utilization.of(rate) for rate in (100.0, 50.0, 200.0)] == [0.5, 0.25, 1.0]


def test_a_peak_that_a_run_exceeds_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    utilization = measuring(monkeypatch, iter([80.0, 50.0, 400.0]))
    assert utilization.of(40.0) == 0.5
    assert utilization.of(100.0) == 1.25  # the second measurement was disturbed, too
    assert utilization.of(100.0) == 0.25


def test_nothing_done_is_a_share_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measuring(monkeypatch, iter([80.0])).of(0.0) == 0.0
