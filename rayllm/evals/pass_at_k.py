"""pass@k over problems, with the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), and its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rayllm.types import RolloutGroup


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its standard error, clustered by problem: the samples of one are not independent."""

    value: float
    stderr: float
    num_problems: int


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Mean and standard error of one value a problem; not a number where there is none."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return Estimate(mean, math.sqrt(variance / n), n)


def pass_at_k(groups: Iterable[RolloutGroup], k: int) -> Estimate:
    """Chance that at least one of k samples is right. A sample is right where its reward is 1.

    Failed samples count neither as right nor as wrong; problems with fewer than k judged samples are left out.
    """
    values = []
    for group in groups:
        rewards = [r.reward for r in group.rollouts if r.reward is not None]
        num_right = sum(reward >= 1.0 for reward in rewards)
        if len(rewards) >= k:
            values.append(1.0 - math.comb(len(rewards) - num_right, k) / math.comb(len(rewards), k))
    return estimate_mean(values)
