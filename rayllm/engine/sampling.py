"""Drawing tokens: each draw is a pure function of (seed, t), whatever else is in the batch.

Shapes: B rows, V vocab.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def stable_seed(*address: object) -> int:
    """A 64-bit seed from an address such as (run_seed, epoch, prompt_id, sample_idx); the same on any machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform_draws(seeds: np.ndarray, t: int | np.ndarray) -> np.ndarray:
    """One number in [0, 1) per seed (uint64) for token `t`, or each for its own (uint64), by SplitMix64 (Steele et
    al. 2014), a counter-based generator."""
    with np.errstate(over="ignore"):
        z = seeds + (np.uint64(1) + np.asarray(t, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(
    logits_BV: Tensor,
    seeds: np.ndarray,
    t: int | np.ndarray,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Next token of each row and its log-probability under the distribution drawn from; both of shape (B,).

    Temperature 0 takes the likeliest token (log-probability then under temperature 1). Raises ValueError when
    a row's logits are not numbers.
    """
    if not torch.isfinite(logits_BV).all():
        raise ValueError("the model's logits are not finite: its weights are damaged or diverged")
    if temperature == 0:
        tokens_B = logits_BV.argmax(dim=-1)
        return tokens_B, logits_BV.log_softmax(dim=-1).gather(1, tokens_B[:, None])[:, 0]
    scaled_BV = logits_BV / temperature
    if top_k is not None and top_k < scaled_BV.size(-1):
        kept = scaled_BV.topk(top_k, dim=-1).indices
        scaled_BV = torch.full_like(scaled_BV, -torch.inf).scatter(1, kept, scaled_BV.gather(1, kept))
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
        share_BV = sorted_BV.softmax(dim=-1)
        is_cut_BV = share_BV.cumsum(dim=-1) - share_BV >= top_p  # those before it have the share already
        scaled_BV = scaled_BV.masked_fill(torch.zeros_like(is_cut_BV).scatter(1, order_BV, is_cut_BV), -torch.inf)
    logprobs_BV = scaled_BV.log_softmax(dim=-1)
    # Inverse CDF in the order of the vocabulary; a draw stays below the total, so that rounding picks no cut token.
    cdf_BV = logprobs_BV.cpu().double().exp().cumsum(dim=-1)
    total_B1 = cdf_BV[:, -1:].contiguous()
    draws_B1 = torch.from_numpy(uniform_draws(seeds, t))[:, None] * total_B1
    draws_B1 = torch.minimum(draws_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    tokens_B = torch.searchsorted(cdf_BV, draws_B1, right=True)[:, 0].to(logits_BV.device)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
