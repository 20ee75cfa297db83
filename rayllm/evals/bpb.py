"""Bits per byte: how well a model predicts text, whatever its tokenizer.

Targets that stand for no bytes (special tokens) count neither as bits nor as bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from rayllm.data.loader import TokenBatch
from rayllm.evals.rows import RowRatio, token_losses
from rayllm.model.gpt import GPT, IGNORE_INDEX
from rayllm.runtime import Runtime


@dataclass(frozen=True)
class BitsPerByte:
    """The ratio, its standard error over rows, and what it was measured on."""

    value: float
    stderr: float
    num_rows: int
    num_tokens: int
    num_bytes: int


@torch.no_grad()
def evaluate_bpb(model: GPT, batches: Iterable[TokenBatch], token_bytes: np.ndarray, runtime: Runtime) -> BitsPerByte:
    """Bits per byte over all workers' batches; `token_bytes` is the byte length of each token. A collective call.

    Raises ValueError when there is no byte to predict.
    """
    token_bytes_V = torch.from_numpy(token_bytes).to(runtime.device)
    bits_over_bytes, num_tokens = RowRatio(), 0
    for nll_BT, targets_BT in token_losses(model, batches, runtime):
        bytes_BT = torch.where(targets_BT == IGNORE_INDEX, 0, token_bytes_V[targets_BT.clamp_min(0)]).double().cpu()
        counted_BT = bytes_BT > 0
        bits_over_bytes.add((nll_BT * counted_BT).sum(dim=1) / math.log(2), bytes_BT.sum(dim=1))
        num_tokens += int(counted_BT.sum())
    ratio = bits_over_bytes.over_workers(runtime)
    if ratio.denominator == 0:
        raise ValueError("validation text holds no bytes to predict: give the validation split more text")
    total = int(runtime.sum_over_workers([num_tokens]))
    return BitsPerByte(ratio.value, ratio.stderr, ratio.num_rows, total, int(ratio.denominator))
