"""An AdamW group, shared out among the workers by rows: its update looks at every element alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rayllm.optim.adamw import adamw_update_
from rayllm.optim.sharding import Workers

SMALL = 1024
"""Parameters of fewer elements are stepped by every worker alike, which is quicker than to exchange them."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """Rows of a parameter that this worker steps, and their state."""

    name: str
    param: Tensor
    rows: slice
    is_everyones: bool
    """Whether every worker steps these rows alike."""
    buffers: dict[str, Tensor]

    def view(self) -> Tensor:
        return self.param[self.rows]

    def grad(self, noise: float) -> Tensor:
        """Its gradient; zero where there is none, and where it is below `noise`."""
        if self.param.grad is None:
            return torch.zeros_like(self.view())
        grad = self.param.grad[self.rows]
        return F.hardshrink(grad, noise) if noise else grad


class TableShare:
    """This worker's rows of an AdamW group, their state, and the exchange that brings the others' back.

    Of each parameter every worker steps a block of rows, all blocks of one size; the fewer rows than workers that are
    left behind the blocks are stepped by all, as is the whole of a small parameter. `group` is read at each step.
    """

    def __init__(self, group: dict[str, Any], workers: Workers) -> None:
        self.group, self._workers = group, workers
        self._blocks: dict[str, int] = {}
        self._pieces: list[_Piece] = []
        for name, param in zip(group["names"], group["params"], strict=True):
            block = 0 if param.numel() < SMALL else param.size(0) // workers.world_size
            self._blocks[name] = block
            mine = slice(workers.rank * block, (workers.rank + 1) * block)
            rest = slice(workers.world_size * block, param.size(0))
            for rows, is_everyones in ((mine, False), (rest, True)):
                if rows.start < rows.stop:
                    self._pieces.append(_Piece(name, param, rows, is_everyones, _fresh_buffers(param, rows)))
        self._works: list[dist.Work] = []

    def own(self) -> list[Tensor]:
        """The rows that this worker steps; of those that all step, worker 0 calls them its own."""
        return [p.view() for p in self._pieces if self._workers.rank == 0 or not p.is_everyones]

    def step_(self, signal: Tensor) -> None:
        """Update this worker's rows, in place."""
        adamw_update_(
            [p.view() for p in self._pieces],
            [p.grad(self.group["noise"]) for p in self._pieces],
            *([p.buffers[key] for p in self._pieces] for key in (*MOMENTS, "num_steps")),
            **{key: self.group[key] for key in ("lr", "betas", "eps", "weight_decay")},
            signal=signal,
        )

    def start_exchange(self) -> None:
        """Send this worker's rows to the others, in place, while it computes on. A collective call."""
        for name, param in zip(self.group["names"], self.group["params"], strict=True):
            blocks_WRD = self._blocked(name, param)
            if work := self._workers.start_all_gather(blocks_WRD):
                self._works.append(work)

    def finish_exchange(self) -> None:
        """Wait until what the other workers sent is here."""
        while self._works:
            self._works.pop().wait()

    def held(self) -> list[Tensor]:
        """All state that this worker keeps."""
        return [buffer for p in self._pieces for buffer in p.buffers.values()]

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every buffer of the whole group, by `PARAMETER/BUFFER`."""
        named = zip(self.group["names"], self.group["params"], strict=True)
        return {
            f"{name}/{key}": torch.Size() if key == "num_steps" else param.shape
            for name, param in named
            for key in (*MOMENTS, "num_steps")
        }

    def buffers(self) -> dict[str, Tensor]:
        """The state by `PARAMETER/BUFFER`, as references; of one worker alone."""
        assert self._workers.world_size == 1, "a worker among others holds parts of buffers"
        return {f"{p.name}/{key}": buffer for p in self._pieces for key, buffer in p.buffers.items()}

    def gather_state(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of the whole group's state on the CPU, on worker 0; nothing elsewhere. A collective call, to be run
        to its end."""
        is_first = self._workers.rank == 0
        for name, param in zip(self.group["names"], self.group["params"], strict=True):
            pieces = [p for p in self._pieces if p.name == name]
            for key in MOMENTS:
                whole = torch.empty(param.shape if is_first else (0,), dtype=param.dtype)
                for piece in pieces:
                    if not piece.is_everyones:
                        for rank, sent in enumerate(self._workers.gather_to_first(piece.buffers[key])):
                            self._blocked(name, whole)[rank] = sent
                    elif is_first:
                        whole[piece.rows] = piece.buffers[key]
                if is_first:
                    yield f"{name}/{key}", whole
            if is_first:
                yield f"{name}/num_steps", pieces[0].buffers["num_steps"].to("cpu", copy=True)

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take this worker's share of the whole state."""
        for piece in self._pieces:
            for key in MOMENTS:
                piece.buffers[key].copy_(saved[f"{piece.name}/{key}"][piece.rows])
            piece.buffers["num_steps"].copy_(saved[f"{piece.name}/num_steps"])

    def _blocked(self, name: str, whole: Tensor) -> Tensor:
        """The rows that are shared out, as (workers, rows of each, ...)."""
        num_workers, block = self._workers.world_size, self._blocks[name]
        return whole[: num_workers * block].view(num_workers, block, *whole.shape[1:])


def _fresh_buffers(param: Tensor, rows: slice) -> dict[str, Tensor]:
    moments = {key: torch.zeros_like(param[rows]) for key in MOMENTS}
    return {**moments, "num_steps": torch.zeros((), dtype=torch.float32, device=param.device)}
