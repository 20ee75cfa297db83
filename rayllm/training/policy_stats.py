"""What a step's sampled tokens looked like to the learners: entropy, mismatch with the sampler, ratios."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rayllm.runtime import Runtime
from rayllm.training.loop import Metrics
from rayllm.training.policy_loss import PolicyLoss, k3


class PolicyStats:
    """Sums over the tokens of this learner, added up over all when they are measured."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sums: dict[str, Tensor | float] = {}
        self._max_weight = 0.0

    def add(self, losses: Sequence[PolicyLoss], *, is_first: bool) -> None:
        """Count the tokens of an update. What says how policies differ from the sampler is of the first alone."""
        for loss in losses:
            batch, config = loss.batch, loss.config
            if not batch.targets_M.numel():
                continue
            ratio_M, advantages_M = loss.terms["ratio"], batch.advantages_M
            is_clipped_M = ((ratio_M > 1 + config.clip_high) & (advantages_M > 0)) | (
                (ratio_M < 1 - config.clip_low) & (advantages_M < 0)
            )
            self._add(num_ratios=float(len(ratio_M)), num_clipped=is_clipped_M.sum())
            if is_first:
                logp_M, sampler_logp_M = loss.scores.logp_M, batch.sampler_logp_M.to(loss.scores.logp_M.dtype)
                self._add(
                    num_tokens=float(len(logp_M)),
                    entropy=loss.scores.entropy_M.sum(),
                    mismatch_kl=k3(sampler_logp_M, logp_M).sum(),
                    kl=loss.terms["kl"].sum() / (config.kl_coef or 1.0),
                    weight=loss.terms["weight"].sum(),
                )
                self._max_weight = max(self._max_weight, float(loss.terms["weight"].max()))

    def measure(self) -> Metrics:
        """Means over the tokens of all learners; a collective call. `importance_max` is this learner's."""
        names = ("num_tokens", "entropy", "mismatch_kl", "kl", "weight", "num_ratios", "num_clipped")
        totals = self._runtime.sum_on_host([float(self._sums.get(name, 0.0)) for name in names])
        total = dict(zip(names, totals, strict=True))
        num_tokens = max(total["num_tokens"], 1.0)
        return {
            "train/entropy": total["entropy"] / num_tokens,
            "train/mismatch_kl": total["mismatch_kl"] / num_tokens,
            "train/reference_kl": total["kl"] / num_tokens,
            "train/importance_mean": total["weight"] / num_tokens,
            "train/importance_max": self._max_weight,
            "train/clip_share": total["num_clipped"] / max(total["num_ratios"], 1.0),
        }

    def _add(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value


def merge_learners(metrics: Sequence[Metrics]) -> Metrics:
    """The metrics of all learners: alike on each, but for what is a largest value."""
    return metrics[0] | {
        name: max(m[name] for m in metrics) for name in ("train/importance_max",) if name in metrics[0]
    }
