"""Draws are pure functions of (seed, t), from the right distribution, with its log-probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayllm.engine.sampling import sample_tokens, stable_seed, uniform_draws


def many_seeds(count: int) -> np.ndarray:
    return np.array([stable_seed("test", i) for i in range(count)], dtype=np.uint64)


def test_seeds_and_draws_never_change() -> None:
    """Golden numbers: a rollout of last year must repeat today, on any machine."""
    assert stable_seed(1, 2, "p", 3) == stable_seed(1, 2, "p", 3) != stable_seed(1, 2, "p", 4)
    assert stable_seed(42, 0, "gsm8k-7", 3) == 6877560407357103475
    # SplitMix64 seeded with 0 gives 0xE220A8397B1DCDAF first (Vigna's reference code).
    assert uniform_draws(np.array([0], dtype=np.uint64), 0)[0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def test_draws_follow_the_distribution() -> None:
    logits_BV = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf]).nan_to_num(neginf=-30).expand(40_000, 5)
    tokens_B, logprobs_B = sample_tokens(logits_BV, many_seeds(40_000), 7, temperature=1.0, top_k=None)
    frequency = torch.bincount(tokens_B, minlength=5) / 40_000
    expected = logits_BV[0].softmax(0)
    # Four standard errors of a frequency.
    assert (frequency - expected).abs().max() < 4 * 0.5 / 200
    torch.testing.assert_close(logprobs_B, logits_BV[0].log_softmax(0)[tokens_B])


def test_top_k_and_temperature_give_the_logprob_of_the_cut_distribution() -> None:
    logits_BV = torch.tensor([3.0, 1.0, 2.0, 0.0]).expand(500, 4)
    tokens_B, logprobs_B = sample_tokens(logits_BV, many_seeds(500), 0, temperature=2.0, top_k=2)
    assert set(tokens_B.tolist()) == {0, 2}
    expected = torch.tensor([3.0, 2.0]).div(2).log_softmax(0)
    torch.testing.assert_close(logprobs_B[tokens_B == 0], expected[0].expand((tokens_B == 0).sum()))
    torch.testing.assert_close(logprobs_B[tokens_B == 2], expected[1].expand((tokens_B == 2).sum()))


def test_top_p_keeps_the_likeliest_that_have_the_share() -> None:
    """Probabilities .4 .3 .2 .1: three tokens are the fewest that have 0.75, and one always stays."""
    logits_BV = torch.tensor([0.3, 0.1, 0.4, 0.2]).log().expand(3000, 4)
    for top_p, kept in ((0.75, [2, 0, 3]), (0.7, [2, 0]), (0.01, [2]), (1.0, [2, 0, 3, 1])):
        tokens_B, logprobs_B = sample_tokens(logits_BV, many_seeds(3000), 1, temperature=1.0, top_p=top_p)
        assert set(tokens_B.tolist()) == set(kept)
        expected_V = torch.full((4,), -torch.inf)
        expected_V[kept] = logits_BV[0, kept].log_softmax(0)
        torch.testing.assert_close(logprobs_B, expected_V[tokens_B])
    tokens_B, _ = sample_tokens(logits_BV, many_seeds(3000), 1, temperature=1.0, top_k=2, top_p=0.99)
    assert set(tokens_B.tolist()) == {2, 0}, "top_k cuts first"


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        sample_tokens(torch.tensor([[0.0, float("nan")]]), many_seeds(1), 0, temperature=1.0, top_k=None)


def test_each_row_may_stand_at_its_own_token() -> None:
    seeds, t = many_seeds(6), np.array([0, 1, 2, 3, 4, 2**40], dtype=np.uint64)
    apart = [uniform_draws(seeds[i : i + 1], int(t[i]))[0] for i in range(6)]
    assert uniform_draws(seeds, t).tolist() == apart and len(set(apart)) == 6
