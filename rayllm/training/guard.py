"""The collapse guard: notices that a policy has left its best, which Muon and Adam make easy.

Both are scale-invariant: a noisy batch moves the weights as far as a clear one, so too large a rate does not only slow
a run down, it ruins it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rayllm.config.rl_schema import GuardConfig

SCORE, SCORE_STDERR = "val/pass@1", "val/pass@1_stderr"


@dataclass
class CollapseGuard:
    """Keeps the best validation seen; each look gives a reason to go back there, or None."""

    config: GuardConfig
    best: Mapping[str, float] | None = None

    def is_best(self, validation: Mapping[str, float]) -> bool:
        """Whether this is the best validation so far; then it is the one that others are held against."""
        score = validation.get(SCORE, float("nan"))
        if score != score or (self.best is not None and score <= self.best[SCORE]):
            return False
        self.best = dict(validation)
        return True

    def look_at_validation(self, validation: Mapping[str, float]) -> str | None:
        """Whether pass@1 is further below the best than chance would have it."""
        if self.best is None or self.config.max_drop is None:
            return None
        score, stderr = validation[SCORE], max(validation[SCORE_STDERR], self.best[SCORE_STDERR])
        if self.best[SCORE] - score <= self.config.max_drop * stderr:  # false where the score is no number
            return None
        return (
            f"validation pass@1 fell to {score:.1%} from {self.best[SCORE]:.1%}, more than {self.config.max_drop:g} "
            f"standard errors ({stderr:.1%})"
        )

    def look_at_step(self, metrics: Mapping[str, float]) -> str | None:
        """Whether the policy is far from its sampler, or has no choice left."""
        kl, entropy = metrics.get("train/mismatch_kl", 0.0), metrics.get("train/entropy")
        if self.config.max_kl is not None and not kl <= self.config.max_kl:
            return (
                f"learner and sampler are {kl:.3g} nats per token apart, more than guard.max_kl={self.config.max_kl:g}"
            )
        if self.config.min_entropy is not None and entropy is not None and not entropy >= self.config.min_entropy:
            return f"entropy fell to {entropy:.3g} nats per token, below guard.min_entropy={self.config.min_entropy:g}"
        return None
