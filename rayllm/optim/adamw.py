"""AdamW (arXiv:1711.05101): for embeddings, the unembedding and scalars."""

from __future__ import annotations

import math

from torch import Tensor


def adamw_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    num_steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place. `num_steps` counts this one, from 1."""
    beta1, beta2 = betas
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**num_steps)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**num_steps))
