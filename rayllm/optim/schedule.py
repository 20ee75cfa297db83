"""How rates move over a run: pure functions of the step. Steps count from 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rayllm.config.schema import OptimConfig
from rayllm.optim.optimizer import MuonAdamW

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
MOMENTUM_WARMUP_STEPS = 400
FINETUNE_MOMENTUM = 0.95
FINETUNE_MOMENTUM_WARMUP_STEPS = 300


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
            lr_multiplier=lr_share(step, self.num_steps, self.optim),
            momentum=self._momentum(step),
            weight_decay_share=0.5 * (1 + math.cos(math.pi * step / self.num_steps)),
        )

    def _momentum(self, step: int) -> float:
        if step < MOMENTUM_WARMUP_STEPS:
            return MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * step / MOMENTUM_WARMUP_STEPS
        progress = _warmdown_progress(step, self.num_steps, self.optim)
        return MOMENTUM_PEAK + (MOMENTUM_END - MOMENTUM_PEAK) * progress


@dataclass(frozen=True)
class FinetuneSchedule:
    """As in pretraining, with every rate times `lr_fraction`; momentum up to where it stays, decay as it is."""

    num_steps: int
    optim: OptimConfig
    lr_fraction: float

    def at(self, step: int) -> Rates:
        warmth = min(step / FINETUNE_MOMENTUM_WARMUP_STEPS, 1.0)
        return Rates(
            lr_multiplier=self.lr_fraction * lr_share(step, self.num_steps, self.optim),
            momentum=MOMENTUM_START + (FINETUNE_MOMENTUM - MOMENTUM_START) * warmth,
            weight_decay_share=1.0,
        )


@dataclass(frozen=True)
class PolicySchedule:
    """For RL: every rate times `lr_fraction`, by default linear to zero; momentum and decay stand still."""

    num_steps: int
    optim: OptimConfig
    lr_fraction: float

    def at(self, step: int) -> Rates:
        return Rates(
            lr_multiplier=self.lr_fraction * lr_share(step, self.num_steps, self.optim),
            momentum=FINETUNE_MOMENTUM,
            weight_decay_share=1.0,
        )


def lr_share(step: int, num_steps: int, optim: OptimConfig) -> float:
    """The learning rate as a share of its peak: linear warm-up, plateau, linear warm-down."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    return 1 + (optim.final_lr_fraction - 1) * _warmdown_progress(step, num_steps, optim)


def _warmdown_progress(step: int, num_steps: int, optim: OptimConfig) -> float:
    """From 0, up to the start of the warm-down, to 1 at the end of the run."""
    num_warmdown_steps = round(optim.warmdown_ratio * num_steps)
    start = num_steps - num_warmdown_steps
    return (step - start) / num_warmdown_steps if step > start else 0.0
