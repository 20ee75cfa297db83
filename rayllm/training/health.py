"""Whether a run is still healthy: numbers that are none, losses that explode, spikes.

What stops a run, and what does not, after what large runs report. A loss or gradient that is not finite never comes
back. A spike usually does: PaLM (arXiv 2204.02311, section 5.1) saw about twenty, OLMo 2 (arXiv 2501.00656, section
3.2) counts those of more than seven standard deviations above the running mean, both of the loss and of the gradient
norm. So spikes are told and do not stop a run, unless the loss stays where no model should be: above that of guessing
every token alike, ln V, and above where this run has been.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllm.data.loader import StepBatch
from rayllm.optim.optimizer import MuonAdamW
from rayllm.runtime import Runtime

SPIKE_DEVIATIONS = 7.0
OUTLIER_DEVIATIONS = 3.0
LEVEL_STEPS = 50
"""About how many steps the running mean remembers: a longer memory of the fall at the start hides spikes."""
MIN_STEPS = 50
"""Steps before anything counts as a spike."""
MIN_DEVIATION = 0.01
"""The least standard deviation, as a share of the mean: a run that fits a tiny text has next to none."""
EXPLOSION_STEPS = 10
EXPLOSION_NATS = 1.0
MAX_KEPT_BATCHES = 64


class DivergedError(FloatingPointError):
    """The run cannot go on. `batch` is what `batch_step` trained on, of this worker: the first step that went wrong,
    or where that is more than MAX_KEPT_BATCHES steps ago, the oldest that was kept."""

    def __init__(self, reason: str, step: int, batch_step: int, batch: StepBatch) -> None:
        super().__init__(f"{reason} at step {step}")
        self.reason, self.step, self.batch_step, self.batch = reason, step, batch_step, batch


@dataclass
class RunningLevel:
    """Running mean and variance of a series, its last LEVEL_STEPS values counting most. Once there are MIN_STEPS, an
    outlier counts as the largest value that is none, as in ZClip (arXiv 2504.02507): one moves the level little, and a
    series that settles somewhere else is followed within some dozens of steps."""

    num_seen: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def highest_usual(self) -> float:
        """Values above it are spikes."""
        return self._above(SPIKE_DEVIATIONS)

    def add(self, value: float) -> None:
        value = min(value, self._above(OUTLIER_DEVIATIONS))
        self.num_seen += 1
        weight = max(1 / self.num_seen, 1 / LEVEL_STEPS)
        away = value - self.mean
        self.mean += weight * away
        self.variance = (1 - weight) * (self.variance + weight * away * away)

    def _above(self, deviations: float) -> float:
        if self.num_seen < MIN_STEPS:
            return float("inf")
        return self.mean + deviations * max(self.variance**0.5, MIN_DEVIATION * abs(self.mean))


@dataclass(frozen=True)
class Verdict:
    """What one step says about the run."""

    fault: str | None = None
    """Why the run must stop."""
    num_faulty_steps: int = 1
    """How many steps, this one the last, show the fault."""
    spikes: tuple[str, ...] = ()
    """What stood out, with its usual level."""
    is_steady: bool = True
    """Whether the weights are worth keeping: false while the loss is out of the usual."""


@dataclass
class LossWatch:
    """Judges step by step. `uniform_loss`: ln V, what guessing every token alike costs."""

    uniform_loss: float
    _loss: RunningLevel = field(default_factory=RunningLevel)
    _grad_norm: RunningLevel = field(default_factory=RunningLevel)
    _best_mean: float = float("inf")
    _num_above: int = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Of one step's mean loss and gradient norm; the same numbers give the same verdict on every worker.

        A fault is a number that is not finite, or EXPLOSION_STEPS steps in a row whose loss is more than
        EXPLOSION_NATS above both `uniform_loss` and the lowest running mean (so that a run may start high and fall).
        """
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if value != value or value in (float("inf"), float("-inf")):
                return Verdict(f"{name} is {value}", is_steady=False)
        told = tuple(
            f"{name} {value:.4g} (usually {level.mean:.4g} +- {level.variance**0.5:.2g})"
            for name, value, level in (("loss", loss, self._loss), ("gradient norm", grad_norm, self._grad_norm))
            if value > level.highest_usual
        )
        is_usual = loss <= self._loss.highest_usual
        self._loss.add(loss)
        self._grad_norm.add(grad_norm)
        self._best_mean = min(self._best_mean, self._loss.mean)
        highest_sane = max(self.uniform_loss, self._best_mean) + EXPLOSION_NATS
        self._num_above = self._num_above + 1 if loss > highest_sane else 0
        if self._num_above >= EXPLOSION_STEPS:
            fault = f"loss is {loss:.4g}, above {highest_sane:.4g} for {self._num_above} steps in a row,"
            return Verdict(fault, self._num_above, told, is_steady=False)
        return Verdict(spikes=told, is_steady=is_usual and not self._num_above)


@dataclass(frozen=True)
class Look:
    """What was found in the steps since the look before; `loss` and `grad_norm` are those of the last."""

    loss: float
    grad_norm: float
    has_spikes: bool
    is_steady: bool

    @property
    def metrics(self) -> dict[str, float]:
        """Loss, gradient norm, and 1 where a spike was among the steps."""
        return {
            "train/loss": self.loss,
            "train/grad_norm": self.grad_norm,
            "train/spike": float(self.has_spikes),
        }


class StepWatch:
    """Losses and gradient norms of all steps, left on the device until someone looks, so that no step waits for them;
    and the newest batches, for replay."""

    def __init__(self, watch: LossWatch, runtime: Runtime) -> None:
        self._watch, self._runtime = watch, runtime
        self._unseen: list[Tensor] = []
        self._batches: deque[tuple[int, StepBatch]] = deque(maxlen=MAX_KEPT_BATCHES)

    def keep(self, step: int, batch: StepBatch, loss_share: Tensor, grad_norm: Tensor) -> None:
        """Take note of a step: this worker's share of its loss, and the norm of the gradient, the same on all."""
        self._unseen.append(torch.stack([loss_share, grad_norm.to(loss_share.dtype) / self._runtime.world_size]))
        self._batches.append((step, batch))

    def look(self) -> Look:
        """Judge the steps since the last look, alike on every worker; a collective call, and one wait for the device.

        Raises DivergedError. Spikes are told on stderr.
        """
        numbers = self._runtime.sum_over_workers(torch.stack(self._unseen)).tolist()
        first = self._batches[-1][0] - len(numbers) + 1
        self._unseen.clear()
        has_spikes = False
        for step, (loss, grad_norm) in enumerate(numbers, first):
            verdict = self._watch.judge(loss, grad_norm)
            if verdict.fault:
                self._stop(verdict.fault, step, step - verdict.num_faulty_steps + 1)
            if verdict.spikes:
                has_spikes = True
                if self._runtime.rank == 0:
                    print(f"spike at step {step}: {', '.join(verdict.spikes)}", file=sys.stderr, flush=True)
        return Look(loss, grad_norm, has_spikes, verdict.is_steady)

    @torch.no_grad()
    def check_weights(self, optimizer: MuonAdamW) -> None:
        """Raise DivergedError, on every worker, where a weight or a moment of any of them is not finite: a sane loss
        and a sane gradient may still make a step that overflows. A collective call."""
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [t for t in optimizer.held_state() if t.is_floating_point() and t.numel()]
        largest = torch.stack([n.float() for n in torch._foreach_norm(tensors, ord=float("inf"))])
        if float(self._runtime.sum_over_workers((~largest.isfinite()).sum())):
            step = self._batches[-1][0]
            self._stop("the update left weights or moments that are not finite", step, step)

    def _stop(self, reason: str, step: int, first_faulty_step: int) -> None:
        kept = next(entry for entry in self._batches if entry[0] >= first_faulty_step)
        raise DivergedError(reason, step, *kept)
