"""Ratios over rows, such as the mean loss of a token, with errors that know that a row's tokens hang together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.data.loader import TokenBatch
from rayllm.model.gpt import GPT
from rayllm.runtime import Runtime


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sums over rows and its standard error (NaN for a single row)."""

    value: float
    stderr: float
    num_rows: int
    denominator: float


class RowRatio:
    """Adds up what each row brings to a numerator x and a denominator y.

    The standard error is that of a ratio of sums over rows (delta method), since tokens of a row are not independent.
    """

    def __init__(self) -> None:
        # Sums over rows of: 1, x, y, x^2, x y, y^2. They add up over workers.
        self._sums = torch.zeros(6, dtype=torch.float64)

    def add(self, x_B: Tensor, y_B: Tensor) -> None:
        """Take in the rows of a batch."""
        x_B, y_B = x_B.double().cpu(), y_B.double().cpu()
        ones_B = torch.ones_like(x_B)
        self._sums += torch.stack([t.sum() for t in (ones_B, x_B, y_B, x_B.square(), x_B * y_B, y_B.square())])

    def over_workers(self, runtime: Runtime) -> Ratio:
        """The ratio over the rows of all workers (NaN for an empty denominator). A collective call."""
        n, x, y, xx, xy, yy = runtime.sum_over_workers(self._sums).tolist()
        if y == 0:
            return Ratio(math.nan, math.nan, int(n), 0.0)
        ratio = x / y
        residual = max(0.0, xx - 2 * ratio * xy + ratio**2 * yy)
        stderr = math.sqrt(residual * n / (n - 1)) / y if n > 1 else math.nan
        return Ratio(ratio, stderr, int(n), y)


@torch.no_grad()
def token_losses(model: GPT, batches: Iterable[TokenBatch], runtime: Runtime) -> Iterator[tuple[Tensor, Tensor]]:
    """(nll_BT on the CPU in float64, 0 where there is no target; targets_BT on the device) of each batch."""
    was_training = model.training
    model.eval()
    for batch in batches:
        here = batch.to(runtime.device)
        nll_BT = model(here.inputs_BT, here.targets_BT, reduction="none", segments=here.segments)
        yield nll_BT.double().cpu(), here.targets_BT
    model.train(was_training)


def evaluate_loss(model: GPT, batches: Iterable[TokenBatch], runtime: Runtime) -> Ratio:
    """Mean negative log-likelihood, in nats, of a target over all workers' batches. A collective call."""
    loss = RowRatio()
    for nll_BT, targets_BT in token_losses(model, batches, runtime):
        loss.add(nll_BT.sum(dim=1), (targets_BT >= 0).sum(dim=1))
    return loss.over_workers(runtime)
