"""THE training loop, for pretraining and SFT, in one process or as one of many data-parallel workers."""

from __future__ import annotations

import math
import time
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
from rayllm.training.replica import replicate

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
) -> None:
    """Train from `first_step` (steps done before) to `num_steps`.

    The loss of a step is the sum over its targets, divided by their number over all micro-batches and workers:
    any split gives the same gradient. Raises FloatingPointError when the loss is no longer a number.
    """
    replica = replicate(model, runtime)
    peak_flops_per_s = runtime.peak_flops_per_s() * runtime.world_size
    if first_step == 0:
        callbacks.report(0, callbacks.evaluate())
    num_tokens, since = 0.0, time.perf_counter()
    for step in range(first_step, num_steps):
        batch = next(batches)
        rates = schedule.at(step)
        rates.apply(optimizer, matrix_weight_decay)
        loss, _ = forward_backward(replica, batch, runtime)
        optimizer.step()
        num_tokens += batch.num_tokens * runtime.world_size  # every worker has as many rows

        done, is_last = step + 1, step + 1 == num_steps
        is_saved = is_due(done, intervals.save_every, is_last)
        if is_saved or is_due(done, intervals.log_every, is_last):  # nothing is saved unseen
            mean_loss = float(runtime.sum_over_workers(loss))
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"loss is {mean_loss} at step {done}: lower the learning rates (optim.*_lr)")
            tokens_per_s = num_tokens / (time.perf_counter() - since)
            metrics = {
                "train/loss": mean_loss,
                "train/lr_multiplier": rates.lr_multiplier,
                "train/grad_norm": float(grad_norm(model)),
                "train/tokens_per_s": tokens_per_s,
                "train/mfu": tokens_per_s * flops_per_token / peak_flops_per_s,
                "train/epoch": float(batch.position.epoch),
            }
            callbacks.report(done, metrics)
            num_tokens, since = 0.0, time.perf_counter()
        optimizer.zero_grad()

        paused = time.perf_counter()
        if is_due(done, intervals.eval_every, is_last):
            callbacks.report(done, callbacks.evaluate())
        if is_due(done, intervals.sample_every, is_last):
            callbacks.sample(done)
        if is_saved:
            callbacks.save(done, batch.position)
        since += time.perf_counter() - paused


def forward_backward(model: torch.nn.Module, batch: StepBatch, runtime: Runtime) -> tuple[Tensor, float]:
    """Accumulate the gradient of one step, synchronized once over the workers.

    Returns this worker's share of the mean loss (a scalar tensor; the shares add up to it) and the step's
    number of targets over all workers.
    """
    num_local = sum(int((m.targets_BT != IGNORE_INDEX).sum()) for m in batch.micro_batches)
    num_loss_tokens = float(runtime.sum_over_workers([num_local]))

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
    return share, num_loss_tokens


def grad_norm(model: torch.nn.Module) -> Tensor:
    """Euclidean norm of all gradients together."""
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    return torch.stack(norms).norm()


def is_due(done: int, every: int | None, is_last: bool) -> bool:
    """Whether something of an interval is to be done after `done` steps; None: only after the last."""
    return is_last or (every is not None and done % every == 0)
