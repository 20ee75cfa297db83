"""Sharpening is named where pass@1 rose and the largest pass@k did not, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from rayllm.runs.sharpening import describe_sharpening


def validation(one: float, most: float | None, stderr: float = 0.02) -> dict[str, Any]:
    found: dict[str, Any] = {"step": 0, "val/pass@1": one, "val/pass@1_stderr": stderr, "val/greedy": one}
    if most is not None:
        found |= {"val/pass@4": 0.9, "val/pass@4_stderr": 0.1, "val/pass@16": most, "val/pass@16_stderr": stderr}
    return found


def test_it_is_one_sentence() -> None:
    records = [validation(0.4, 0.8), {"step": 3, "train/reward": 0.5}, validation(0.9, 0.1), validation(0.5, 0.81)]
    assert describe_sharpening(records) == (
        "sharpening: pass@1 rose by 10.0 +- 2.8 points and pass@16 by 1.0 +- 2.8, so the model got surer of what it "
        "could already do"
    )


@pytest.mark.parametrize(
    ("first", "last", "is_sharpening"),
    [
        (validation(0.40, 0.80), validation(0.50, 0.80), True),
        (validation(0.40, 0.80), validation(0.50, 0.70), True),
        (validation(0.40, 1.00, 0.0), validation(0.50, 1.00, 0.0), True),  # there was nothing more to be had
        (validation(0.40, 0.80), validation(0.50, 0.83), False),  # it can do more than before
        (validation(0.40, 0.80), validation(0.45, 0.80), False),  # within chance
        (validation(0.40, 0.80), validation(0.30, 0.80), False),
        (validation(0.40, None), validation(0.50, None), False),  # a single sample of each problem
        (validation(0.40, 0.80), validation(0.50, float("nan")), False),
        (validation(0.40, 0.80, float("nan")), validation(0.50, 0.80), False),
    ],
)
def test_only_beyond_chance(first: dict[str, Any], last: dict[str, Any], is_sharpening: bool) -> None:
    assert (describe_sharpening([first, last]) is not None) == is_sharpening


def test_one_validation_says_nothing() -> None:
    assert describe_sharpening([]) is None and describe_sharpening([validation(0.4, 0.8)]) is None
