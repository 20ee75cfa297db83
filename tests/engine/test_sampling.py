"""Draws are pure functions of (seed, t), from the right distribution, with its log-probability."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.config.schema import SamplingConfig
from rayllm.engine.sampling import BLOCK, draw_tokens, stable_seed, uniform_draws


def many_seeds(count: int) -> np.ndarray:
    return np.array([stable_seed("test", i) for i in range(count)], dtype=np.uint64)


def test_seeds_and_draws_never_change() -> None:
    """Golden numbers: a rollout of last year must repeat today, on any machine."""
    assert stable_seed(1, 2, "p", 3) == stable_seed(1, 2, "p", 3) != stable_seed(1, 2, "p", 4)
    assert stable_seed(42, 0, "gsm8k-7", 3) == 6877560407357103475
    # SplitMix64 seeded with 0 gives 0xE220A8397B1DCDAF first (Vigna's reference code).
    assert uniform_draws(np.array([0], dtype=np.uint64), 0)[0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def test_each_row_may_stand_at_its_own_token() -> None:
    seeds, t = many_seeds(6), np.array([0, 1, 2, 3, 4, 2**40], dtype=np.uint64)
    apart = [uniform_draws(seeds[i : i + 1], int(t[i]))[0] for i in range(6)]
    assert uniform_draws(seeds, t).tolist() == apart and len(set(apart)) == 6


@pytest.mark.parametrize("num_tokens", [5, BLOCK, 3 * BLOCK + 1])
def test_draws_follow_the_distribution(num_tokens: int) -> None:
    """The tokens that count lie in different blocks of the vocabulary."""
    logits_V = torch.full((num_tokens,), -30.0)
    places = [num_tokens * i // 4 for i in range(4)]
    logits_V[places] = torch.tensor([0.0, 1.0, -1.0, 2.0])
    draws = draw_tokens(logits_V.repeat(40_000, 1), many_seeds(40_000), 7, temperature=1.0)
    frequency = np.bincount(draws.tokens, minlength=num_tokens) / 40_000
    # Four standard errors of a frequency.
    assert np.abs(frequency - logits_V.softmax(0).numpy()).max() < 4 * 0.5 / 200
    torch.testing.assert_close(torch.tensor(draws.logprobs), logits_V.log_softmax(0)[draws.tokens], atol=1e-6, rtol=0)
    assert draws.kept_ids is None and all(draws.is_finite)


@settings(max_examples=60)
@given(
    num_rows=st.integers(1, 6),
    num_tokens=st.integers(1, 300),
    row_seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1.0),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
)
def test_a_draw_is_as_defined_and_knows_nothing_of_its_neighbours(
    num_rows, num_tokens, row_seed, temperature, top_k, top_p, spread
) -> None:
    """Against the definition, one row at a time: the first token whose running share passes the uniform number."""
    generator = torch.Generator().manual_seed(row_seed)
    logits_BV = torch.randn(num_rows, num_tokens, generator=generator, dtype=torch.float64) * spread
    seeds, t = many_seeds(num_rows), np.arange(num_rows, dtype=np.uint64)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    draws = draw_tokens(logits_BV.clone(), seeds, t, **how)
    for i, logits_V in enumerate(logits_BV):
        alone = draw_tokens(logits_V[None].clone(), seeds[i : i + 1], int(t[i]), **how)
        assert alone.tokens == draws.tokens[i : i + 1] and alone.logprobs == pytest.approx(draws.logprobs[i : i + 1])
        if temperature == 0:
            assert draws.tokens[i] == int(logits_V.argmax())
            assert draws.logprobs[i] == pytest.approx(logits_V.log_softmax(0)[draws.tokens[i]].item(), abs=1e-9)
            assert draws.kept_ids is None
            continue
        kept = sorted(range(num_tokens), key=lambda v: -logits_V[v])[: top_k or num_tokens]
        if top_p is not None and top_p < 1:
            share = (logits_V[kept] / temperature).softmax(0)
            kept = kept[: int((share.cumsum(0) - share < top_p).sum())]
        if draws.kept_ids is None:
            assert len(kept) == num_tokens
        elif spread:  # among equals any may be kept
            assert draws.kept_ids[i] == tuple(sorted(kept))
        kept = sorted(kept) if draws.kept_ids is None else list(draws.kept_ids[i])
        share = (logits_V[kept] / temperature).softmax(0)
        expected = int(torch.searchsorted(share.cumsum(0), uniform_draws(seeds[i : i + 1], int(t[i]))[0], right=True))
        assert draws.tokens[i] == kept[min(expected, len(kept) - 1)]
        at = kept.index(draws.tokens[i])
        assert draws.logprobs[i] == pytest.approx(math.log(share[at].item()), abs=1e-9)


def test_top_p_keeps_the_likeliest_that_have_the_share() -> None:
    """Probabilities .4 .3 .2 .1: three tokens are the fewest that have 0.75, and one always stays."""
    logits_BV = torch.tensor([0.3, 0.1, 0.4, 0.2]).log().repeat(1000, 1)
    for top_p, kept in ((0.75, (0, 2, 3)), (0.7, (0, 2)), (0.01, (2,)), (1.0, (0, 1, 2, 3))):
        draws = draw_tokens(logits_BV.clone(), many_seeds(1000), 1, temperature=1.0, top_p=top_p)
        assert set(draws.tokens) == set(kept)
        assert draws.kept_ids == ([kept] * 1000 if len(kept) < 4 else None)
        expected_V = torch.full((4,), -torch.inf)
        expected_V[list(kept)] = logits_BV[0, list(kept)].log_softmax(0)
        torch.testing.assert_close(torch.tensor(draws.logprobs), expected_V[draws.tokens], atol=1e-6, rtol=0)
    draws = draw_tokens(logits_BV.clone(), many_seeds(1000), 1, temperature=1.0, top_k=2, top_p=0.99)
    assert set(draws.tokens) == {2, 0}, "top_k cuts first"


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-300])
def test_however_low_the_temperature_numbers_stay_numbers(temperature: float) -> None:
    logits_BV = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)) * 5
    for cuts in ({}, {"top_k": 7, "top_p": 0.5}):
        draws = draw_tokens(logits_BV.clone(), many_seeds(20), 3, temperature=temperature, **cuts)
        assert draws.tokens == logits_BV.argmax(-1).tolist() and all(draws.is_finite)
        assert draws.logprobs == pytest.approx([0.0] * 20, abs=1e-5)


@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 1}, {"temperature": 0.5, "top_k": 2, "top_p": 0.9}]
)
def test_a_row_that_is_not_a_number_is_told_and_others_are_drawn(how) -> None:
    logits_BV = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    alone = draw_tokens(logits_BV[[0, 2]].clone(), many_seeds(4)[[0, 2]], 3, **how)
    logits_BV[1, 4] = torch.nan
    logits_BV[3, :] = torch.nan
    draws = draw_tokens(logits_BV, many_seeds(4), 3, **how)
    assert draws.is_finite == [True, False, True, False]
    assert [draws.tokens[0], draws.tokens[2]] == alone.tokens
    assert [draws.logprobs[0], draws.logprobs[2]] == alone.logprobs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("max_tokens", 0),
        ("stop", ("",)),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError) as refused:
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
    shown = value[0] if isinstance(value, tuple) else value
    assert field in str(refused.value) and repr(shown) in str(refused.value)
