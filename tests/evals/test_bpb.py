"""Bits per byte against its definition, special tokens apart, and its standard error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayllm.data.loader import TokenBatch
from rayllm.evals.bpb import evaluate_bpb
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.runtime import build_runtime

TOKEN_BYTES = np.array([0] + [1 + i % 4 for i in range(39)], dtype=np.int32)  # token 0 is special


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(sequence_len=16, vocab_size=40, num_layers=1, num_heads=1, num_kv_heads=1, d_model=24))
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    return model


def batch(num_rows: int, seed: int) -> TokenBatch:
    tokens_BT = torch.randint(40, (num_rows, 16), generator=torch.Generator().manual_seed(seed))
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[:, -1] = -1
    return TokenBatch(tokens_BT, targets_BT)


def test_bits_per_byte_is_the_ratio_of_sums(model) -> None:
    one = batch(3, seed=1)
    measured = evaluate_bpb(model, [one], TOKEN_BYTES, build_runtime("cpu"))
    bits = num_bytes = num_tokens = 0.0
    with torch.no_grad():
        logprobs_BTV = model(one.inputs_BT).log_softmax(-1)
    for b, t in np.ndindex(3, 16):
        target = int(one.targets_BT[b, t])
        if target > 0:
            bits -= float(logprobs_BTV[b, t, target]) / math.log(2)
            num_bytes += TOKEN_BYTES[target]
            num_tokens += 1
    assert measured.value == pytest.approx(bits / num_bytes, rel=1e-6)
    assert (measured.num_rows, measured.num_tokens, measured.num_bytes) == (3, num_tokens, num_bytes)


def test_batching_changes_nothing(model) -> None:
    rows = batch(6, seed=2)
    split = [TokenBatch(rows.inputs_BT[i : i + 2], rows.targets_BT[i : i + 2]) for i in (0, 2, 4)]
    whole, parts = (evaluate_bpb(model, b, TOKEN_BYTES, build_runtime("cpu")) for b in ([rows], split))
    assert parts.value == pytest.approx(whole.value, rel=1e-6)
    assert parts.stderr == pytest.approx(whole.stderr, rel=1e-4)


def test_standard_error_is_the_spread_over_repeated_draws(model) -> None:
    repeats = [evaluate_bpb(model, [batch(40, seed)], TOKEN_BYTES, build_runtime("cpu")) for seed in range(100, 160)]
    spread = np.std([r.value for r in repeats])
    assert np.mean([r.stderr for r in repeats]) == pytest.approx(spread, rel=0.3)


def test_text_without_bytes_is_refused(model) -> None:
    empty = TokenBatch(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="no bytes to predict"):
        evaluate_bpb(model, [empty], TOKEN_BYTES, build_runtime("cpu"))
