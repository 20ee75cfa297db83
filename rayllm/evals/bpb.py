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

    The standard error is that of a ratio of sums over rows (delta method), since tokens of a row are not
    independent. Raises ValueError when there is no byte to predict.
    """
    was_training = model.training
    model.eval()
    token_bytes_V = torch.from_numpy(token_bytes).to(runtime.device)
    # Sums over rows of: 1, tokens, bits x, bytes y, x^2, x y, y^2. They add up over workers.
    sums = torch.zeros(7, dtype=torch.float64)
    for batch in batches:
        inputs_BT, targets_BT = batch.inputs_BT.to(runtime.device), batch.targets_BT.to(runtime.device)
        nll_BT = model(inputs_BT, targets_BT, reduction="none").double().cpu()
        bytes_BT = torch.where(targets_BT == IGNORE_INDEX, 0, token_bytes_V[targets_BT.clamp_min(0)]).double().cpu()
        counted_BT = bytes_BT > 0
        x_B = (nll_BT * counted_BT).sum(dim=1) / math.log(2)
        y_B = bytes_BT.sum(dim=1)
        sums += torch.stack(
            [torch.tensor(float(len(x_B))), counted_BT.sum().double(), x_B.sum(), y_B.sum(),
             x_B.square().sum(), (x_B * y_B).sum(), y_B.square().sum()]
        ).double()  # fmt: skip
    model.train(was_training)
    n, num_tokens, x, y, xx, xy, yy = runtime.sum_over_workers(sums).tolist()
    if y == 0:
        raise ValueError("validation text holds no bytes to predict: give the validation split more text")
    ratio = x / y
    residual = max(0.0, xx - 2 * ratio * xy + ratio**2 * yy)
    stderr = math.sqrt(residual * n / (n - 1)) / y if n > 1 else math.nan
    return BitsPerByte(ratio, stderr, int(n), int(num_tokens), int(y))
