"""Drawing tokens: each draw is a pure function of (seed, t), whatever else is in the batch.

The one thing that may change it is rounding: logits differ in their last bits with the shape of the batch, the dtype
and the machine, so a draw that falls that close to the border between two tokens may go either way.

Shapes: B rows, V vocab, N blocks of the vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Tokens whose probabilities are added up first, so that only one such block is walked through."""


class Draws(NamedTuple):
    """The token of each row and its log-probability under the distribution drawn from, both of shape (B,)."""

    tokens: list[int]
    logprobs: list[float]
    kept_ids: list[tuple[int, ...]] | None
    """The tokens that top_k and top_p left to each row; None where nothing was cut."""
    is_finite: list[bool]
    """False where logits are no numbers, and the draw means nothing."""


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


@torch.inference_mode()
def draw_tokens(
    logits_BV: Tensor,
    seeds: np.ndarray,
    t: int | np.ndarray,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Draws:
    """Next token of each row. Overwrites the logits.

    Temperature 0 takes the likeliest token (log-probability then under temperature 1).
    """
    if logits_BV.device.type == "mps":  # which has no float64
        logits_BV = logits_BV.cpu()
    logits_BV = logits_BV.sub_(logits_BV.amax(dim=-1, keepdim=True))
    if temperature not in (0, 1):
        logits_BV = logits_BV.div_(max(temperature, torch.finfo(logits_BV.dtype).tiny))
    kept_ids = None
    if temperature != 0 and ((top_k is not None and top_k < logits_BV.size(-1)) or (top_p is not None and top_p < 1)):
        logits_BV = _cut(logits_BV, top_k, top_p)
        kept_ids = [tuple(row.nonzero()[:, 0].tolist()) for row in logits_BV > -torch.inf]
    tokens_B = logits_BV.argmax(dim=-1) if temperature == 0 else None
    weights_BV = logits_BV.exp_()
    if tokens_B is not None:
        total_B = weights_BV.sum(dim=-1).double()
    else:
        tokens_B, total_B = _invert(weights_BV, uniform_draws(seeds, t))
    weight_B = weights_BV.gather(1, tokens_B[:, None])[:, 0].double()
    logprobs_B = weight_B.log() - total_B.log()
    on_host = torch.stack([tokens_B.double(), logprobs_B, total_B.isfinite().double()]).tolist()  # one transfer
    return Draws([int(token) for token in on_host[0]], on_host[1], kept_ids, [bool(ok) for ok in on_host[2]])


def _cut(logits_BV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf for all but the `top_k` likeliest tokens, and of these for all but the fewest that have a share `top_p`."""
    if top_k is not None and top_k < logits_BV.size(-1):
        kept = logits_BV.topk(top_k, dim=-1).indices
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter_(1, kept, logits_BV.gather(1, kept))
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        share_BV = sorted_BV.softmax(dim=-1)
        is_cut_BV = share_BV.cumsum(dim=-1) - share_BV >= top_p  # those before it have the share already
        logits_BV = logits_BV.masked_fill(torch.zeros_like(is_cut_BV).scatter_(1, order_BV, is_cut_BV), -torch.inf)
    return logits_BV


def _invert(weights_BV: Tensor, uniform_B: np.ndarray) -> tuple[Tensor, Tensor]:
    """The token at which the running sum of the weights passes a share of their total, and that total, in float64."""
    vocab_size = weights_BV.size(1)
    if excess := -vocab_size % BLOCK:
        weights_BV = F.pad(weights_BV, (0, excess))
    weights_BNb = weights_BV.view(weights_BV.size(0), -1, BLOCK)
    sums_BN = weights_BNb.sum(dim=-1).double().cumsum(dim=-1)
    total_B1 = sums_BN[:, -1:]
    target_B1 = _below(torch.from_numpy(uniform_B).to(total_B1.device)[:, None] * total_B1, total_B1)
    block_B1 = torch.searchsorted(sums_BN, target_B1, right=True).clamp_(max=sums_BN.size(1) - 1)
    passed_B1 = F.pad(sums_BN, (1, 0)).gather(1, block_B1)
    chosen_Bb = weights_BNb.gather(1, block_B1[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(dim=-1)
    rest_B1 = _below(target_B1 - passed_B1, chosen_Bb[:, -1:])
    within_B1 = torch.searchsorted(chosen_Bb, rest_B1, right=True).clamp_(max=BLOCK - 1)
    tokens_B1 = (block_B1 * BLOCK + within_B1).clamp_(max=vocab_size - 1)  # beyond it only where nothing is a number
    return tokens_B1[:, 0], total_B1[:, 0]


def _below(value_B1: Tensor, bound_B1: Tensor) -> Tensor:
    """No more than what comes just before the bound: rounding must not pick a token that was cut."""
    return torch.minimum(value_B1, bound_B1.nextafter(torch.zeros_like(bound_B1)))
