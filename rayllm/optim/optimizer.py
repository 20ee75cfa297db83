"""MuonAdamW: one optimizer, each parameter group stepped by its own rule.

Data-parallel training needs nothing more here: gradients arrive averaged over the workers, and equal
gradients give equal steps on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rayllm.optim.adamw import adamw_update_
from rayllm.optim.muon import muon_update_, variance_shape


class MuonAdamW(torch.optim.Optimizer):
    """Groups are dicts with `kind` ("muon" or "adamw"), `names` beside `params`, `lr`, and the rule's settings.

    A Muon group holds matrices of one shape and steps them as one stack. State is saved and loaded by
    parameter name, so it fits any number of workers and any order of groups.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            for param in group["params"]:
                self.state[param] = _fresh_state(group["kind"], param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters. A step whose gradients are all zero changes nothing, not even the moments."""
        assert closure is None, "MuonAdamW takes no closure"
        if not self._has_signal():
            return
        for group in self.param_groups:
            (self._step_muon if group["kind"] == "muon" else self._step_adamw)(group)

    def _has_signal(self) -> bool:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        # NaN counts as signal here: the training loop names it, this class does not hide it.
        return bool(grads) and bool(torch.stack(torch._foreach_norm(grads)).sum() != 0)

    def _step_muon(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = group["params"]
        stacks = [
            torch.stack(tensors)
            for tensors in (
                params,
                [_grad(p) for p in params],
                [self.state[p]["momentum"] for p in params],
                [self.state[p]["variance"] for p in params],
            )
        ]
        muon_update_(
            *stacks,
            lr=group["lr"],
            momentum=group["momentum"],
            beta2=group["beta2"],
            weight_decay=group["weight_decay"],
            orthogonalize_dtype=group["orthogonalize_dtype"],
        )
        params_KMN, _, momentum_KMN, variance_KM1 = stacks
        for i, param in enumerate(params):
            param.copy_(params_KMN[i])
            self.state[param]["momentum"].copy_(momentum_KMN[i])
            self.state[param]["variance"].copy_(variance_KM1[i])

    def _step_adamw(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            state = self.state[param]
            state["num_steps"] += 1
            adamw_update_(
                param,
                _grad(param),
                state["exp_avg"],
                state["exp_avg_sq"],
                num_steps=int(state["num_steps"]),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )

    def named_state(self) -> dict[str, Tensor]:
        """Moments and step counts by `PARAMETER/BUFFER`, as references; the schedule is not in it."""
        return {
            f"{name}/{key}": buffer
            for group in self.param_groups
            for name, param in zip(group["names"], group["params"], strict=True)
            for key, buffer in self.state[param].items()
        }

    @torch.no_grad()
    def load_named_state(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `named_state`; raises ValueError when names or shapes do not fit."""
        own = self.named_state()
        if own.keys() != saved.keys():
            differing = sorted(own.keys() ^ saved.keys())
            raise ValueError(
                f"optimizer state is of another model: {len(differing)} entries differ, e.g. {', '.join(differing[:3])}"
            )
        for name, buffer in own.items():
            if buffer.shape != saved[name].shape:
                raise ValueError(
                    f"optimizer state {name} has shape {tuple(saved[name].shape)}, "
                    f"this model needs {tuple(buffer.shape)}"
                )
            buffer.copy_(saved[name])


def _fresh_state(kind: str, param: Tensor) -> dict[str, Tensor]:
    if kind == "muon":
        return {"momentum": torch.zeros_like(param), "variance": param.new_zeros(variance_shape(param.shape))}
    return {
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
        "num_steps": torch.zeros((), dtype=torch.int64),
    }


def _grad(param: Tensor) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad
