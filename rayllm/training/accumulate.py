"""The gradient of one optimizer step, in as many pieces as memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_MicroBatch = TypeVar("_MicroBatch")


def accumulate_gradient(
    replica: torch.nn.Module,
    micro_batches: Sequence[_MicroBatch],
    summed_loss: Callable[[torch.nn.Module, _MicroBatch], Tensor],
    *,
    num_loss_tokens: float,
    world_size: int = 1,
) -> Tensor:
    """Add up the gradients of `summed_loss` over this worker's micro-batches, over those of all workers (DDP), and
    divide by the step's number of loss tokens: any split gives the same gradient. Workers synchronize once.

    Every worker must bring as many micro-batches as the others. Returns this worker's share of the mean loss (a
    scalar tensor; the shares of all add up to it).
    """
    shares = []
    for i, micro_batch in enumerate(micro_batches):
        waits = isinstance(replica, DistributedDataParallel) and i < len(micro_batches) - 1
        with replica.no_sync() if waits else nullcontext():  # type: ignore[operator]
            loss = summed_loss(replica, micro_batch) / max(num_loss_tokens, 1.0)
            # DDP averages over the workers what has to be added up.
            (loss * world_size).backward()
        shares.append(loss.detach())
    return torch.stack(shares).sum()
