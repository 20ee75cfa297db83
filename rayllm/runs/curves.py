"""Which curves of which run the report draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rayllm.runs.history import RunHistory, Series
from rayllm.runs.plots import Curve, Plot

_MAX_POINTS = 400
_WINDOW = 10


def plot_runs(runs: Sequence[RunHistory]) -> Iterator[Plot]:
    """Losses, bits per byte, rewards and pass@k, as far as each run has them."""
    for stage_run in runs:
        name, title = _slug(stage_run.name), stage_run.name
        if stage_run.stage != "rl":  # there the loss is a surrogate, whose height says nothing
            curves = (*_noisy(stage_run.series("train/loss")), *_measured("validation", stage_run.series("val/loss")))
            if curves:
                yield Plot(f"{name}-loss", f"{title}: loss", "nats per token", curves)
        if curves := _measured("held-out text", stage_run.series("val/bpb")):
            yield Plot(f"{name}-bpb", f"{title}: bits per byte, ± one standard error", "bits per byte", curves)
        if curves := _noisy(stage_run.series("train/reward")):
            yield Plot(
                f"{name}-reward", f"{title}: reward of the batch (batches differ in difficulty)", "reward", curves
            )
        passes = stage_run.keys(r"val/pass@\d+")  # the least k and the largest tell sharpening from learning
        keys = [*dict.fromkeys([*passes[:1], *passes[-1:]]), *stage_run.keys("val/greedy")]
        curves = tuple(c for key in keys for c in _measured(key.removeprefix("val/"), stage_run.series(key)))
        if curves:
            yield Plot(f"{name}-pass", f"{title}: held-out problems solved, ± one standard error", "share", curves)


def _noisy(series: Series) -> tuple[Curve, ...]:
    """Every value in the background and, where there are enough, the mean of the latest in front of it."""
    if not series:
        return ()
    stride = math.ceil(len(series.steps) / _MAX_POINTS)
    each = Curve("each record", series.steps[::stride], series.values[::stride], style="faint")
    if len(series.steps) < 2 * _WINDOW:
        return (Curve("training", each.steps, each.values),)
    ends = range(_WINDOW - 1, len(series.steps), stride)
    means = [sum(series.values[end + 1 - _WINDOW : end + 1]) / _WINDOW for end in ends]
    return (each, Curve(f"mean of the last {_WINDOW}", [series.steps[end] for end in ends], means))


def _measured(label: str, series: Series) -> tuple[Curve, ...]:
    return (Curve(label, series.steps, series.values, series.stderrs, style="dots"),) if series else ()


def _slug(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name) or "run"
