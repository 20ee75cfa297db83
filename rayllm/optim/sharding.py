"""How the work and the state of a step are shared out among data-parallel workers, and brought together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Its name since torch 2.13, where the older one warns.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Workers:
    """This worker among those of the default process group; one alone needs no group."""

    rank: int = 0
    world_size: int = 1

    def start_all_gather(self, shares: Tensor) -> dist.Work | None:
        """Fill `shares` (world_size, ...), whose part `rank` is this worker's, from all workers; wait for the work
        before reading. A collective call."""
        if self.world_size == 1 or not shares.numel():
            return None
        work: dist.Work | None = _all_gather(shares.view(-1), shares[self.rank].view(-1), async_op=True)
        return work

    def gather_to_first(self, share: Tensor) -> list[Tensor]:
        """The shares of all workers, of one shape, in order, on worker 0; nothing elsewhere. A collective call."""
        if self.world_size == 1 or not share.numel():
            return [share] * self.world_size if self.rank == 0 else []
        shares = [torch.empty_like(share) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(share, shares)
        return shares or []

    def sum_(self, values: Tensor) -> Tensor:
        """Add up `values` over the workers, in place. A collective call."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


def assign_by_cost(costs: Sequence[float], world_size: int) -> list[int]:
    """The worker of each item: the costliest first, each to the worker with the least to do (the first of equals).

    The same on every worker; the costliest share exceeds the average by at most one item.
    """
    loads = [0.0] * world_size
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
