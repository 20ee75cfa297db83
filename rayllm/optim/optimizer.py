"""MuonAdamW: one optimizer, each parameter group stepped by its own rule, the work shared out among the workers.

Gradients arrive averaged over the workers (DDP, while the backward runs), the same on each. Every worker then steps
its share, whole matrices of Muon's and blocks of rows of AdamW's, keeps the state of that share alone, and sends the
outcome to the others while it computes on: all replicas are equal, bit for bit, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rayllm.optim.matrices import MatrixShare
from rayllm.optim.muon import muon_flops, muon_update_
from rayllm.optim.sharding import Workers, assign_by_cost
from rayllm.optim.tables import TableShare


class MuonAdamW(torch.optim.Optimizer):
    """Groups are dicts with `kind` ("muon" or "adamw"), `name`, `names` beside `params`, `lr`, and the rule's settings.

    A Muon group holds matrices of one shape and steps them as one stack. State is saved and loaded by parameter name,
    so it fits any number of workers and any order of groups. With `world_size` workers all must do the same calls in
    the same order; `compiles` has torch.compile fuse Muon's step.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, rank: int = 0, world_size: int = 1, compiles: bool = False
    ) -> None:
        super().__init__(groups, defaults={})
        self._workers = Workers(rank, world_size)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
        muon = [group for group in self.param_groups if group["kind"] == "muon"]
        # The costliest group first: nothing is left to hide the last one's exchange.
        muon.sort(key=lambda group: -sum(_costs(group)))
        owners = iter(assign_by_cost([cost for group in muon for cost in _costs(group)], world_size))
        update = torch.compile(muon_update_, fullgraph=True, dynamic=False) if compiles else muon_update_
        self._matrices = [MatrixShare(g, [next(owners) for _ in g["params"]], self._workers, update) for g in muon]
        self._tables = [TableShare(g, self._workers) for g in self.param_groups if g["kind"] == "adamw"]
        self._update_rms: dict[str, Tensor] = {}
        self.grad_norm = torch.zeros(())
        """Euclidean norm of all gradients of the last step together, on the device."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, track_update_rms: bool = False) -> None:  # type: ignore[override]
        """Update all parameters. A step whose gradients are all zero changes nothing, not even the moments.

        The host waits for nothing here. NaN in a gradient goes into the weights: the training loop names it, this
        class does not hide it. `track_update_rms` makes ready what `update_rms` gives. A collective call.
        """
        assert closure is None, "MuonAdamW takes no closure"
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        self.grad_norm = torch.stack(torch._foreach_norm(grads)).norm()
        signal = self.grad_norm != 0
        if signal.device.type == "mps" and not signal:  # its fused AdamW does not look at the signal
            return
        before = [[p.clone() for p in share.own()] for share in self._shares] if track_update_rms else []
        for table in self._tables:  # the tables travel while the matrices are computed
            table.step_(signal)
            table.start_exchange()
        for i, share in enumerate(self._matrices):
            share.step_(signal)
            if i > 0:  # one stack of matrices at a time is on its way: they take memory
                self._matrices[i - 1].finish_exchange()
            share.start_exchange()
        for unfinished in self._shares:
            unfinished.finish_exchange()
        if track_update_rms:
            self._update_rms = self._measure_update(before)

    def update_rms(self) -> dict[str, Tensor]:
        """Root mean square of the last tracked update by group name, over all its elements: scalars on the device,
        the same on every worker. Empty before the first step that tracked one."""
        return self._update_rms

    def _measure_update(self, before: list[list[Tensor]]) -> dict[str, Tensor]:
        squares = self.grad_norm.new_zeros(len(self._shares))
        for i, (share, olds) in enumerate(zip(self._shares, before, strict=True)):
            if olds:
                norms = torch._foreach_norm(torch._foreach_sub(share.own(), olds))
                squares[i] = torch.stack(norms).square().sum()
        self._workers.sum_(squares)
        sizes = [sum(p.numel() for p in share.group["params"]) for share in self._shares]
        names = [share.group["name"] for share in self._shares]
        return {name: (square / n).sqrt() for name, square, n in zip(names, squares, sizes, strict=True)}

    def named_state(self) -> dict[str, Tensor]:
        """Moments and step counts by `PARAMETER/BUFFER`, as references; the schedule is not in it. Of one worker alone:
        among others use `gather_named_state`."""
        return {name: buffer for share in self._shares for name, buffer in share.buffers().items()}

    @torch.no_grad()
    def gather_named_state(self) -> dict[str, Tensor]:
        """The state of all workers together, named as by `named_state`: copies on the CPU, on worker 0; an empty dict
        elsewhere. The same for any number of workers. A collective call."""
        return {name: buffer for share in self._shares for name, buffer in share.gather_state()}

    @torch.no_grad()
    def load_named_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take this worker's share of a whole state, as either of the above gave it; every worker must be given all.

        Raises ValueError when names or shapes do not fit.
        """
        shapes = {name: shape for share in self._shares for name, shape in share.shapes().items()}
        if shapes.keys() != saved.keys():
            differing = sorted(shapes.keys() ^ saved.keys())
            raise ValueError(
                f"optimizer state is of another model: {len(differing)} entries differ, e.g. {', '.join(differing[:3])}"
            )
        for name, shape in shapes.items():
            if saved[name].shape != shape:
                raise ValueError(
                    f"optimizer state {name} has shape {tuple(saved[name].shape)}, this model needs {tuple(shape)}"
                )
        for share in self._shares:
            share.load_state(saved)

    @property
    def state_bytes(self) -> int:
        """Size of the state that this worker keeps."""
        return sum(tensor.nbytes for share in self._shares for tensor in share.held())

    @property
    def _shares(self) -> list[TableShare | MatrixShare]:
        return [*self._tables, *self._matrices]


def _costs(group: dict[str, Any]) -> list[int]:
    return [muon_flops(p.shape, group["orthogonalize_dtype"]) for p in group["params"]]
