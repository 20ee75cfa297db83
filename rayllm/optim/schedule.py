"""How rates move over a run: pure functions of the step. Steps count from 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rayllm.config.schema import OptimConfig
from rayllm.optim.optimizer import MuonAdamW

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
MOMENTUM_WARMUP_STEPS = 400


@dataclass(frozen=True)
class Rates:
    """What holds at one step: a multiple of each group's learning rate, Muon's momentum, and the share of its decay."""

    lr_multiplier: float
    momentum: float
    weight_decay_share: float

    def apply(self, optimizer: MuonAdamW, matrix_weight_decay: float) -> None:
        """Set them on the optimizer, from each group's initial rate."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = self.momentum
                group["weight_decay"] = matrix_weight_decay * self.weight_decay_share


class Schedule(Protocol):
    """Rates by step."""

    def at(self, step: int) -> Rates: ...


@dataclass(frozen=True)
class PretrainSchedule:
    """Warm-up, plateau, linear warm-down; momentum up, then down with the warm-down; decay by cosine to 0."""

    num_steps: int
    optim: OptimConfig

    def at(self, step: int) -> Rates:
        return Rates(
            lr_multiplier=self._lr_multiplier(step),
            momentum=self._momentum(step),
            weight_decay_share=0.5 * (1 + math.cos(math.pi * step / self.num_steps)),
        )

    @property
    def _num_warmdown_steps(self) -> int:
        return round(self.optim.warmdown_ratio * self.num_steps)

    def _warmdown_progress(self, step: int) -> float | None:
        """From 0 to 1 over the warm-down; None before it."""
        start = self.num_steps - self._num_warmdown_steps
        return (step - start) / self._num_warmdown_steps if step > start else None

    def _lr_multiplier(self, step: int) -> float:
        if step < self.optim.warmup_steps:
            return (step + 1) / self.optim.warmup_steps
        progress = self._warmdown_progress(step)
        return 1.0 if progress is None else 1 + (self.optim.final_lr_fraction - 1) * progress

    def _momentum(self, step: int) -> float:
        if step < MOMENTUM_WARMUP_STEPS:
            return MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * step / MOMENTUM_WARMUP_STEPS
        progress = self._warmdown_progress(step)
        return MOMENTUM_PEAK if progress is None else MOMENTUM_PEAK + (MOMENTUM_END - MOMENTUM_PEAK) * progress
