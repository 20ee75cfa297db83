"""A Muon group, shared out among the workers by whole matrices: the norms of a step need the whole of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayllm.optim.muon import variance_shape
from rayllm.optim.sharding import Workers

CPU_CACHE_ELEMENTS = 2**19
"""A CPU steps as many matrices at once as have about so many elements, a GPU all of one shape."""


class MatrixShare:
    """This worker's matrices of one shape, their state as stacks, and the exchange that brings the others' back.

    `group` is read at each step; `owners` says which worker steps which of its matrices; `update` is `muon_update_`,
    plain or compiled.
    """

    def __init__(
        self, group: dict[str, Any], owners: Sequence[int], workers: Workers, update: Callable[..., None]
    ) -> None:
        self.group, self._workers, self._update = group, workers, update
        self._params: list[Tensor] = group["params"]
        self._owned = [[i for i, owner in enumerate(owners) if owner == r] for r in range(workers.world_size)]
        self._mine = self._owned[workers.rank]
        like, shape = self._params[0], self._params[0].shape
        # Every worker's stacks are as long as the longest, so that one collective call exchanges them.
        self._num_slots = max(len(owned) for owned in self._owned)
        self._momentum_KMN = like.new_zeros(self._num_slots, *shape)
        self._variance = like.new_zeros(self._num_slots, *variance_shape(shape))
        self._exchange: tuple[Tensor, dist.Work | None] | None = None

    def own(self) -> list[Tensor]:
        """The parameters that this worker steps."""
        return [self._params[i] for i in self._mine]

    def step_(self, signal: Tensor) -> None:
        """Update this worker's matrices, in place."""
        settings = self._settings(signal)
        num_at_once = max(self._num_slots, 1)
        if self._momentum_KMN.device.type == "cpu":
            num_at_once = max(CPU_CACHE_ELEMENTS // self._params[0].numel(), 1)
        for first in range(0, len(self._mine), num_at_once):
            slots = slice(first, min(first + num_at_once, len(self._mine)))
            params = self.own()[slots]
            params_KMN, grads_KMN = _stack(params), _stack([_grad(p) for p in params])
            self._update(params_KMN, grads_KMN, self._momentum_KMN[slots], self._variance[slots], **settings)
            if len(params) > 1:
                torch._foreach_copy_(params, list(params_KMN))

    def _settings(self, signal: Tensor) -> dict[str, Any]:
        group, like = self.group, self._momentum_KMN

        def on_device(value: float) -> Tensor:  # by a kernel; torch.tensor would wait for the device
            return torch.full((), value, dtype=like.dtype, device=like.device)

        return {
            **{name: on_device(group[name]) for name in ("lr", "momentum", "weight_decay")},
            "signal": signal.to(like.dtype),
            "beta2": group["beta2"],
            "orthogonalize_dtype": group["orthogonalize_dtype"],
        }

    def start_exchange(self) -> None:
        """Send this worker's matrices to the others, while it computes on. A collective call."""
        if self._workers.world_size == 1:
            return
        like = self._momentum_KMN
        stacks_WKMN = like.new_empty(self._workers.world_size, *like.shape)
        for slot, param in enumerate(self.own()):
            stacks_WKMN[self._workers.rank, slot].copy_(param)
        self._exchange = stacks_WKMN, self._workers.start_all_gather(stacks_WKMN)

    def finish_exchange(self) -> None:
        """Take over what the other workers sent."""
        if self._exchange is None:
            return
        (stacks_WKMN, work), self._exchange = self._exchange, None
        if work is not None:
            work.wait()
        for rank, owned in enumerate(self._owned):
            if rank != self._workers.rank and owned:
                sent_KMN = stacks_WKMN[rank, : len(owned)]
                torch._foreach_copy_([self._params[i] for i in owned], list(sent_KMN))

    def held(self) -> list[Tensor]:
        """All state that this worker keeps."""
        return list(self._stacks().values())

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every buffer of the whole group, by `PARAMETER/BUFFER`."""
        by_key = {key: stack.shape[1:] for key, stack in self._stacks().items()}
        return {f"{name}/{key}": shape for name in self.group["names"] for key, shape in by_key.items()}

    def buffers(self) -> dict[str, Tensor]:
        """This worker's state by `PARAMETER/BUFFER`, as references."""
        return {
            f"{self.group['names'][i]}/{key}": stack[slot]
            for key, stack in self._stacks().items()
            for slot, i in enumerate(self._mine)
        }

    def gather_state(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of the whole group's state on the CPU, on worker 0; nothing elsewhere. A collective call, to be run
        to its end."""
        for key, stack in self._stacks().items():
            for owned, sent in zip(self._owned, self._workers.gather_to_first(stack), strict=False):
                for slot, i in enumerate(owned):
                    yield f"{self.group['names'][i]}/{key}", sent[slot].to("cpu", copy=True)

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take this worker's share of the whole state."""
        for name, buffer in self.buffers().items():
            buffer.copy_(saved[name])

    def _stacks(self) -> dict[str, Tensor]:
        return {"momentum": self._momentum_KMN, "variance": self._variance}


def _grad(param: Tensor) -> Tensor:
    """Its gradient, zero where there is none."""
    return torch.zeros_like(param) if param.grad is None else param.grad


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """All along a new first dimension; a lone one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
