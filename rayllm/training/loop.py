"""THE training loop, for pretraining and SFT, in one process or as one of many data-parallel workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.data.loader import DataPosition, StepBatch, TokenBatch
from rayllm.model.gpt import GPT, IGNORE_INDEX, find_targets
from rayllm.optim.optimizer import MuonAdamW
from rayllm.optim.schedule import Schedule
from rayllm.runtime import Runtime
from rayllm.training.accumulate import accumulate_gradient
from rayllm.training.collector import collector_kept_out
from rayllm.training.health import LossWatch, StepWatch
from rayllm.training.replica import replicate
from rayllm.training.speed import Speed

Metrics = dict[str, float]


@dataclass(frozen=True)
class Intervals:
    """Every how many steps to do what; None: only after the last step."""

    log_every: int
    eval_every: int | None
    sample_every: int | None
    save_every: int | None


@dataclass(frozen=True)
class Callbacks:
    """What the loop calls; on every worker alike, as they may hold collective calls."""

    report: Callable[[int, Metrics], None]
    evaluate: Callable[[], Metrics]
    sample: Callable[[int], None]
    save: Callable[[int, DataPosition], None]
    wants_stop: Callable[[], bool] = lambda: False
    """Asked before each step; one worker's yes stops all, after that step."""


def fit(
    model: GPT,
    optimizer: MuonAdamW,
    schedule: Schedule,
    batches: Iterator[StepBatch],
    runtime: Runtime,
    callbacks: Callbacks,
    intervals: Intervals,
    *,
    num_steps: int,
    matrix_weight_decay: float,
    flops_per_token: float,
    first_step: int = 0,
) -> int:
    """Train from `first_step` (steps done before) to `num_steps`, or until a worker wants to stop: the step that
    begins then is the last, and saved. Returns the steps done.

    The loss of a step is the sum over its targets, divided by their number over all micro-batches and workers:
    any split gives the same gradient. Raises DivergedError (a FloatingPointError) where the run cannot go on.
    """
    replica = replicate(model, runtime)
    speed = Speed(runtime, flops_per_token)
    watch = StepWatch(LossWatch(uniform_loss=math.log(model.config.vocab_size)), runtime)
    owes_save = False
    with collector_kept_out() as collect_garbage:
        if first_step == 0:
            callbacks.report(0, callbacks.evaluate())
        for step in range(first_step, num_steps):
            batch, rates = next(batches), schedule.at(step)
            rates.apply(optimizer, matrix_weight_decay)
            loss, _, num_stopping = forward_backward(replica, batch, runtime, callbacks.wants_stop())
            done, is_last = step + 1, step + 1 == num_steps
            is_stop = num_stopping > 0 and not is_last
            owes_save |= is_due(done, intervals.save_every, is_last or is_stop)
            is_logged = owes_save or is_due(done, intervals.log_every, is_last)  # nothing is saved unseen
            optimizer.step(track_update_rms=is_logged)
            watch.keep(done, batch, loss, optimizer.grad_norm)
            speed.add(batch)
            if is_logged:
                seen = watch.look()
                updates = {f"train/update_rms/{name}": float(rms) for name, rms in optimizer.update_rms().items()}
                rest = {"train/lr_multiplier": rates.lr_multiplier, "train/epoch": float(batch.position.epoch)}
                callbacks.report(done, {**seen.metrics, **speed.measure(), **rest, **updates})
            optimizer.zero_grad()

            with speed.paused():
                if not is_stop and is_due(done, intervals.eval_every, is_last):
                    callbacks.report(done, callbacks.evaluate())
                    collect_garbage()
                if not is_stop and is_due(done, intervals.sample_every, is_last):
                    callbacks.sample(done)
                if owes_save and (seen.is_steady or is_last or is_stop):
                    watch.check_weights(optimizer)
                    callbacks.save(done, batch.position)
                    owes_save = False
                    collect_garbage()
            if is_stop:
                return done
    return num_steps


def forward_backward(
    model: torch.nn.Module, batch: StepBatch, runtime: Runtime, wants_stop: bool = False
) -> tuple[Tensor, float, int]:
    """Accumulate the gradient of one step, synchronized once over the workers.

    Returns this worker's share of the mean loss (a scalar tensor; the shares add up to it), the step's number of
    targets over all workers, and how many workers want to stop.
    """
    num_local = sum(int((m.targets_BT != IGNORE_INDEX).sum()) for m in batch.micro_batches)
    num_loss_tokens, num_stopping = runtime.sum_on_host([num_local, wants_stop])

    def summed_loss(replica: torch.nn.Module, batch: TokenBatch) -> Tensor:
        targets_N, target_idx_N = find_targets(batch.targets_BT)  # on the CPU still, so that no device is waited for
        here = batch.to(runtime.device)
        if target_idx_N is not None:
            target_idx_N = target_idx_N.to(runtime.device)
        loss: Tensor = replica(
            here.inputs_BT,
            targets_N.to(runtime.device),
            reduction="sum",
            segments=here.segments,
            target_idx_N=target_idx_N,
        )
        return loss

    share = accumulate_gradient(
        model, batch.micro_batches, summed_loss, num_loss_tokens=num_loss_tokens, world_size=runtime.world_size
    )
    return share, num_loss_tokens, int(num_stopping)


def grad_norm(model: torch.nn.Module) -> Tensor:
    """Euclidean norm of all gradients together."""
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    return torch.stack(norms).norm()


def is_due(done: int, every: int | None, is_last: bool) -> bool:
    """Whether something of an interval is to be done after `done` steps; None: only after the last."""
    return is_last or (every is not None and done % every == 0)
