"""pass@k against counting every subset, and errors that know that a problem's samples belong together."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from rayllm.evals.pass_at_k import estimate_mean, pass_at_k
from rayllm.types import Completion, Prompt, Rollout, RolloutGroup


def group(*rewards: float | None) -> RolloutGroup:
    completion = Completion((), (), (), "stop")
    return RolloutGroup(Prompt("", ()), tuple(Rollout(completion, reward) for reward in rewards))


def test_it_is_the_share_of_subsets_with_a_right_answer() -> None:
    draw = random.Random(0)
    for _ in range(50):
        rewards = [float(draw.random() < 0.3) for _ in range(draw.randint(1, 8))]
        for k in range(1, len(rewards) + 1):
            subsets = list(itertools.combinations(rewards, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k([group(*rewards)], k).value == pytest.approx(expected)


def test_failed_samples_are_left_out_and_partial_rewards_are_not_right() -> None:
    estimate = pass_at_k([group(1.0, None, 0.0), group(0.5, 0.9), group(None, None)], 1)
    assert (estimate.value, estimate.num_problems) == (0.25, 2)
    assert pass_at_k([group(1.0, None, 0.0), group(0.5)], 2).num_problems == 1


def test_errors_are_clustered_by_problem() -> None:
    """Sixteen copies of one answer are one answer: the error is that of the problems alone."""
    draw = random.Random(1)
    right = [float(draw.random() < 0.4) for _ in range(200)]
    estimate = pass_at_k([group(*[r] * 16) for r in right], 1)
    assert estimate.stderr == pytest.approx(statistics.stdev(right) / math.sqrt(200))
    assert math.isnan(estimate_mean([]).value) and math.isnan(estimate_mean([1.0]).stderr)
