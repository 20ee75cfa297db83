"""One learner's part of an RL step: policy gradients normalized over the tokens of the whole step, and Muon.

Token-level normalization after DAPO (Yu et al. 2025, arXiv 2503.14476): every sampled token of the step weighs the
same, whatever the length of its completion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayllm.config.rl_schema import RLConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.scaling import flops_per_token
from rayllm.optim.schedule import PolicySchedule
from rayllm.runs.checkpoint import Checkpoint
from rayllm.runs.load import load_tokenizer, load_weights, model_config
from rayllm.runs.writer import CheckpointWriter
from rayllm.runtime import Runtime
from rayllm.training.accumulate import accumulate_gradient
from rayllm.training.loop import Metrics
from rayllm.training.policy_batch import PolicyMicroBatch, micro_batches
from rayllm.training.policy_loss import PolicyLoss, TokenScores
from rayllm.training.policy_stats import PolicyStats
from rayllm.training.replica import prepare_model, replicate
from rayllm.training.rollout_batch import TrainBatch
from rayllm.training.speed import Utilization


def summed_policy_loss(model: torch.nn.Module, loss: PolicyLoss) -> Tensor:
    """The sum of the losses of a micro-batch's sampled tokens, not yet divided by their number."""
    return _forward(model, loss.batch, loss)


def score_tokens(model: torch.nn.Module, batch: PolicyMicroBatch) -> TokenScores:
    """Log-probability and entropy of the sampled tokens under the distribution that they were drawn from, (M,) each."""
    scores = TokenScores.for_batch(batch)
    with torch.no_grad():
        _forward(model, batch, scores)
    return scores


def _forward(model: torch.nn.Module, batch: PolicyMicroBatch, token_loss: PolicyLoss | TokenScores) -> Tensor:
    loss: Tensor = model(
        batch.tokens_1N,
        batch.targets_M,
        reduction="sum",
        segments=batch.segments,
        target_idx_N=batch.target_idx_M,
        token_loss=token_loss,
        cut=batch.cut,
    )
    return loss


class PolicyLearner:
    """A replica of the model, its optimizer, and their steps; one of the workers of `runtime`.

    Starts from `checkpoint`, with its optimizer where that is a checkpoint of this run (`resumes`). `reference`, where
    the loss has a term for it, is what the run started from. `corrects_all`: the sampler computes in another dtype.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: RLConfig,
        runtime: Runtime,
        *,
        resumes: bool,
        reference: Checkpoint | None = None,
        corrects_all: bool = False,
    ) -> None:
        self.model = GPT(model_config(checkpoint), compute_dtype=runtime.dtype)
        self.tokenizer = load_tokenizer(checkpoint)
        self._config, self._runtime, self._corrects_all = config, runtime, corrects_all
        self._schedule = PolicySchedule(config.num_steps, config.optim, config.lr_fraction)
        self.model.to(runtime.device)
        prepare_model(self.model, config.learners, runtime)
        self._replica = replicate(self.model, runtime)
        self._optimizer = build_optimizer(self.model, config.optim, rank=runtime.rank, world_size=runtime.world_size)
        self._rate_share = 1.0
        self.last_losses: list[PolicyLoss] = []
        """Of this learner's micro-batches, in the newest step that had a signal."""
        load_weights(self.model, checkpoint)
        if resumes:
            self._take_up(checkpoint)
        self._reference: GPT | None = None
        if config.loss.kl_coef > 0 and reference is not None:
            self._reference = GPT(model_config(reference), compute_dtype=runtime.dtype)
            load_weights(self._reference, reference)
            self._reference.to(runtime.device).requires_grad_(False)
            prepare_model(self._reference, config.learners, runtime)
        self._flops_per_token = flops_per_token(self.model.config)
        self._utilization = Utilization(runtime)

    def step(self, batch: TrainBatch, step: int) -> Metrics:
        """Learn from batch number `step` (from 0), alike on every learner. A batch without signal changes nothing.

        Raises FloatingPointError when the gradient is no longer a number; the weights are then as before.
        """
        rates = self._schedule.at(step)
        metrics = {"train/lr_multiplier": rates.lr_multiplier * self._rate_share, "train/loss": 0.0}
        metrics["train/grad_norm"] = 0.0
        self.last_losses = []
        if not batch.groups:
            return metrics
        start_s = time.perf_counter()
        rates.apply(self._optimizer, self._config.optim.weight_decay)
        for group in self._optimizer.param_groups:
            group["lr"] *= self._rate_share
        losses = self.prepare(batch)
        stats = PolicyStats(self._runtime)
        for update in range(self._config.updates_per_batch):
            share = self.accumulate(losses, batch.num_loss_tokens)
            norms = self._step_optimizer(step)
            if update == 0:
                metrics["train/loss"] = float(self._runtime.sum_over_workers(share))
                metrics |= norms
            stats.add(losses, is_first=update == 0)
            for loss in losses:
                loss.end_update()
        self.last_losses = losses
        metrics |= stats.measure()
        metrics |= {f"train/update_rms/{name}": float(rms) for name, rms in self._optimizer.update_rms().items()}
        return metrics | self._speed(losses, time.perf_counter() - start_s)

    def prepare(self, batch: TrainBatch) -> list[PolicyLoss]:
        """This learner's share of a batch, as the losses of its micro-batches."""
        runtime, config = self._runtime, self._config
        shares = micro_batches(
            batch,
            config.tokens_per_micro_batch,
            runtime.device,
            runtime.rank,
            runtime.world_size,
            temperature=config.temperature,
        )
        return [
            PolicyLoss(
                share,
                config.loss,
                self._corrects_all,
                None if self._reference is None else score_tokens(self._reference, share).logp_M,
            )
            for share in shares
        ]

    def accumulate(self, losses: Sequence[PolicyLoss], num_loss_tokens: int) -> Tensor:
        """The gradient of a batch, added up over all learners; returns this one's share of the loss."""
        return accumulate_gradient(
            self._replica,
            losses,
            summed_policy_loss,
            num_loss_tokens=num_loss_tokens,
            world_size=self._runtime.world_size,
        )

    def roll_back(self, checkpoint: Checkpoint) -> None:
        """Be what a checkpoint of this run holds, and go on at half the rates of now."""
        rate_share = self._rate_share
        load_weights(self.model, checkpoint)
        self._take_up(checkpoint)
        self._rate_share = rate_share / 2

    def save(self, writer: CheckpointWriter, step: int, metrics: Mapping[str, float], num_prompts: int) -> None:
        """Begin to write a checkpoint of `step` steps done, that took `num_prompts` problems; called on every learner,
        as the first one writes what all hold."""
        optimizer_state = self._optimizer.gather_named_state()
        if self._runtime.rank != 0:
            return
        writer.save(
            step,
            model_state=self.model.state_dict(),
            optimizer_state=optimizer_state,
            state={
                "stage": "rl",
                "model": self.model.config.to_dict(),
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "metrics": dict(metrics),
                "num_prompts": num_prompts,
                "rate_share": self._rate_share,
            },
        )

    def _take_up(self, checkpoint: Checkpoint) -> None:
        self._optimizer.load_named_state(checkpoint.load_optimizer_state() or {})
        self._rate_share = float(checkpoint.state.get("rate_share", 1.0))  # type: ignore[arg-type]

    def _step_optimizer(self, step: int) -> Metrics:
        """Returns the norms of the gradient, of all and of each group, which must be numbers. A gradient of zero
        changes nothing."""
        norms = {
            group["name"]: torch.stack(torch._foreach_norm(grads)).norm()
            for group in self._optimizer.param_groups
            if (grads := [p.grad for p in group["params"] if p.grad is not None])
        }
        metrics = {f"train/grad_norm/{name}": float(norm) for name, norm in norms.items()}
        metrics["train/grad_norm"] = math.hypot(*metrics.values())
        if not math.isfinite(metrics["train/grad_norm"]):
            raise FloatingPointError(f"the gradient is not finite at step {step + 1}: lower lr_fraction")
        self._optimizer.step(track_update_rms=True)
        self._optimizer.zero_grad()
        return metrics

    def _speed(self, losses: Sequence[PolicyLoss], seconds: float) -> Metrics:
        num_tokens = sum(loss.batch.tokens_1N.numel() for loss in losses) * self._config.updates_per_batch
        (total,) = self._runtime.sum_on_host([num_tokens])
        mfu = self._utilization.of(total / seconds * self._flops_per_token)
        return {"learn/tokens": total, "learn/tokens_per_s": total / seconds, "learn/mfu": mfu}
