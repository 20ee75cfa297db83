"""The loss of one sampled token, for any staleness and number of updates.

    -w (min(r A, clip(r) A) + c) + kl_coef KL - entropy_coef H,   r = p / p_first,   w = min(p_first / p_sampler, cap)

p is the probability under the weights being trained, p_first that under the weights at the batch's first update,
where r is exactly 1 and the gradient REINFORCE's, -w A grad log p; so is the value, by the constant c = A (log
p_first - 1). w, a constant, is 1 for a token that the very weights of the first update drew, and corrects for other
ones (decoupled PPO, AReaL, arXiv 2505.24298). clip is asymmetric (DAPO, arXiv 2503.14476), KL the k3 estimator
(joschu.net/blog/kl-approx.html).

Shapes: M sampled tokens of a micro-batch, C of them in a chunk of the head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllm.config.rl_schema import PolicyLossConfig
from rayllm.training.policy_batch import PolicyMicroBatch

MAX_LOG_RATIO = 20.0
"""Probabilities may differ by e^20 before a ratio is no number worth having."""


@dataclass
class TokenScores:
    """Called in place of a loss: keeps log p and entropy of each token, (M,), and gives no gradient."""

    logp_M: Tensor
    entropy_M: Tensor

    @staticmethod
    def for_batch(batch: PolicyMicroBatch) -> TokenScores:
        return TokenScores(torch.zeros_like(batch.advantages_M), torch.zeros_like(batch.advantages_M))

    def __call__(self, logp_C: Tensor, entropy_C: Tensor, chunk: slice) -> Tensor:
        self.logp_M[chunk], self.entropy_M[chunk] = logp_C.detach(), entropy_C.detach()
        return 0 * logp_C + 0 * entropy_C


@dataclass
class PolicyLoss:
    """The loss of a micro-batch's tokens, called by the head as it goes; one object serves all updates on the batch.

    `corrects_all`: the sampler computes in another dtype, so that no token was drawn by the very same policy.
    `reference_logp_M` are log-probabilities under the model that RL started from, needed where kl_coef is not 0.
    """

    batch: PolicyMicroBatch
    config: PolicyLossConfig
    corrects_all: bool = False
    reference_logp_M: Tensor | None = None
    scores: TokenScores = field(init=False)
    terms: dict[str, Tensor] = field(init=False)
    """Of the newest update, (M,) each: ratio, weight, policy, kl, entropy; `policy + kl + entropy` is the loss."""
    first_logp_M: Tensor | None = None
    first_terms: dict[str, Tensor] = field(default_factory=dict)
    """The terms of the first update, and its log-probabilities as `logp`."""

    def __post_init__(self) -> None:
        self.scores = TokenScores.for_batch(self.batch)
        zeros = torch.zeros_like(self.batch.advantages_M)
        self.terms = {name: zeros.clone() for name in ("ratio", "weight", "policy", "kl", "entropy")}

    def __call__(self, logp_C: Tensor, entropy_C: Tensor, chunk: slice) -> Tensor:
        self.scores(logp_C, entropy_C, chunk)
        config, advantage_C = self.config, self.batch.advantages_M[chunk].to(logp_C.dtype)
        first_C = logp_C.detach() if self.first_logp_M is None else self.first_logp_M[chunk].to(logp_C.dtype)
        ratio_C = _ratio(logp_C, first_C)
        clipped_C = ratio_C.clamp(1 - config.clip_low, 1 + config.clip_high)
        weight_C = _ratio(first_C, self.batch.sampler_logp_M[chunk].to(logp_C.dtype)).clamp(max=config.importance_cap)
        if not self.corrects_all:
            weight_C = torch.where(self.batch.is_stale_M[chunk], weight_C, torch.ones_like(weight_C))
        constant_C = advantage_C * (first_C - 1)
        loss_C = policy_C = -weight_C * (torch.minimum(ratio_C * advantage_C, clipped_C * advantage_C) + constant_C)
        self._keep(chunk, ratio=ratio_C, weight=weight_C, policy=policy_C)
        if config.kl_coef and self.reference_logp_M is not None:
            kl_C = config.kl_coef * k3(logp_C, self.reference_logp_M[chunk].to(logp_C.dtype))
            self._keep(chunk, kl=kl_C)
            loss_C = loss_C + kl_C
        if config.entropy_coef:
            bonus_C = -config.entropy_coef * entropy_C
            self._keep(chunk, entropy=bonus_C)
            loss_C = loss_C + bonus_C
        return loss_C

    def end_update(self) -> None:
        """The log-probabilities of the first update are what later ones are compared with."""
        if self.first_logp_M is None:
            self.first_logp_M = self.scores.logp_M.clone()
            self.first_terms = {name: term.clone() for name, term in self.terms.items()} | {"logp": self.first_logp_M}

    def _keep(self, chunk: slice, **terms_C: Tensor) -> None:
        for name, term_C in terms_C.items():
            self.terms[name][chunk] = term_C.detach().to(self.terms[name].dtype)


def k3(logp: Tensor, other_logp: Tensor) -> Tensor:
    """An estimate of KL(p || other) from samples of p: never negative, of little variance."""
    log_ratio = (other_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1


def _ratio(logp: Tensor, other_logp: Tensor) -> Tensor:
    """p / other."""
    return (logp - other_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
