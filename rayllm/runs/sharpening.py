"""Sharpening: a model got surer of what it could already do, and can do no more than before.

pass@1 rises, and pass@k for a large k, the share of problems that any of k tries solves, does not (Yue et al. 2025,
arXiv 2504.13837).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from rayllm.runs.history import number

_PASS = re.compile(r"val/pass@(\d+)")


def describe_sharpening(records: Sequence[Mapping[str, object]]) -> str | None:
    """One sentence where the validations among a run's records, the first beside the last, show sharpening and nothing
    else: pass@1 rose by more than 2 standard errors of the difference, pass@(the largest k) by 1 at most.

    The errors are taken as if the two validations were independent; None where there is nothing to compare.
    """
    validations = [record for record in records if "val/pass@1" in record]
    if len(validations) < 2:
        return None
    first, last = validations[0], validations[-1]
    ks = [int(match[1]) for key in first.keys() & last.keys() if (match := _PASS.fullmatch(key))]
    one, most = _change(first, last, 1), _change(first, last, max(ks, default=1))
    if max(ks, default=1) == 1 or one is None or most is None:
        return None
    (rise, error), (rise_most, error_most) = one, most
    if rise <= 2 * error or rise_most > error_most:
        return None
    return (
        f"sharpening: pass@1 rose by {100 * rise:.1f} +- {100 * error:.1f} points and pass@{max(ks)} by "
        f"{100 * rise_most:.1f} +- {100 * error_most:.1f}, so the model got surer of what it could already do"
    )


def _change(first: Mapping[str, object], last: Mapping[str, object], k: int) -> tuple[float, float] | None:
    """How far pass@k rose, and the standard error of that; None where a number is missing."""
    keys = (f"val/pass@{k}", f"val/pass@{k}_stderr")
    found = [number(record.get(key)) for record in (first, last) for key in keys]
    before, error_before, after, error_after = (math.nan if value is None else value for value in found)
    rise, error = after - before, math.hypot(error_before, error_after)
    return (rise, error) if math.isfinite(rise) and math.isfinite(error) else None
