"""One learner's part of an RL step: REINFORCE with a group baseline, normalized over the tokens of the whole step.

Token-level normalization after DAPO (Yu et al. 2025, arXiv 2503.14476): every sampled token of the step weighs the
same, whatever the length of its completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rayllm.config.schema import OptimConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.schedule import Schedule
from rayllm.runs.checkpoint import Checkpoint, save_checkpoint
from rayllm.runs.load import load_tokenizer, load_weights, model_config
from rayllm.runtime import Runtime
from rayllm.training.accumulate import accumulate_gradient
from rayllm.training.loop import Metrics, grad_norm
from rayllm.training.rollout_batch import PolicyMicroBatch, TrainBatch, micro_batches


def summed_policy_loss(model: torch.nn.Module, batch: PolicyMicroBatch) -> Tensor:
    """-sum(logp * A) over the sampled tokens."""
    nll_BT: Tensor = model(batch.inputs_BT, batch.targets_BT, reduction="none")
    return (nll_BT * batch.advantages_B[:, None].to(nll_BT.dtype)).sum()


class PolicyLearner:
    """A replica of the model, its optimizer, and their steps; one of the workers of `runtime`.

    Starts from `checkpoint`, with its optimizer where that is a checkpoint of this run (`resumes`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        optim: OptimConfig,
        schedule: Schedule,
        runtime: Runtime,
        *,
        rows_per_micro_batch: int,
        resumes: bool,
    ) -> None:
        self.model = GPT(model_config(checkpoint), compute_dtype=runtime.dtype)
        load_weights(self.model, checkpoint)
        self.model.to(runtime.device)
        self._replica: torch.nn.Module = self.model
        if runtime.world_size > 1:
            self._replica = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self._optimizer = build_optimizer(self.model, optim, rank=runtime.rank, world_size=runtime.world_size)
        if resumes:
            self._optimizer.load_named_state(checkpoint.load_optimizer_state() or {})
        self._tokenizer = load_tokenizer(checkpoint)
        self._schedule, self._runtime = schedule, runtime
        self._rows_per_micro_batch = rows_per_micro_batch
        self._weight_decay = optim.weight_decay

    def step(self, batch: TrainBatch, step: int) -> Metrics:
        """Take step number `step` (from 0), alike on every learner. A batch without signal changes nothing.

        Raises FloatingPointError when the gradient is no longer a number; the weights are then as before.
        """
        rates = self._schedule.at(step)
        metrics = {"train/lr_multiplier": rates.lr_multiplier, "train/loss": 0.0, "train/grad_norm": 0.0}
        if not batch.rows:
            return metrics
        rates.apply(self._optimizer, self._weight_decay)
        share = self.accumulate(batch)
        metrics["train/loss"] = float(self._runtime.sum_over_workers(share))
        metrics["train/grad_norm"] = float(grad_norm(self.model))
        if not torch.isfinite(torch.tensor(metrics["train/grad_norm"])):
            raise FloatingPointError(f"the gradient is not finite at step {step + 1}: lower lr_fraction")
        self._optimizer.step()
        self._optimizer.zero_grad()
        return metrics

    def accumulate(self, batch: TrainBatch) -> Tensor:
        """The gradient of a batch, added up over all learners; returns this one's share of the loss."""
        runtime = self._runtime
        return accumulate_gradient(
            self._replica,
            micro_batches(batch, self._rows_per_micro_batch, runtime.device, runtime.rank, runtime.world_size),
            summed_policy_loss,
            num_loss_tokens=batch.num_loss_tokens,
            world_size=runtime.world_size,
        )

    def save(self, checkpoints_path: Path, step: int, metrics: Mapping[str, float], keep: int) -> None:
        """Write a checkpoint of `step` steps done; called on every learner, as they gather what the first writes."""
        optimizer_state = self._optimizer.gather_named_state()
        if self._runtime.rank != 0:
            return
        save_checkpoint(
            checkpoints_path,
            step,
            model_state=self.model.state_dict(),
            optimizer_state=optimizer_state,
            state={
                "stage": "rl",
                "model": self.model.config.to_dict(),
                "tokenizer_fingerprint": self._tokenizer.fingerprint,
                "metrics": dict(metrics),
            },
            tokenizer=self._tokenizer,
            keep=keep,
        )
