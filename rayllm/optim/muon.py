"""Muon: momentum, then an orthogonalized step, for stacks of matrices of one shape.

The steps, in order: Nesterov momentum (Jordan, kellerjordan.github.io/posts/muon), row equilibration (MuonEq),
Polar Express orthogonalization (arXiv:2505.16932), rescaling to a full-rank norm (Muon+), variance reduction
(NorMuon, arXiv:2510.05491), cautious weight decay (arXiv:2510.12402). The update's size does not depend on
the gradient's, only on its direction.

Shapes: K matrices of M rows and N columns, (out, in) as torch.nn.Linear keeps them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
TINY = 1e-10


def muon_update_(
    params_KMN: Tensor,
    grads_KMN: Tensor,
    momentum_KMN: Tensor,
    variance_KM1: Tensor,
    *,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    orthogonalize_dtype: torch.dtype,
) -> None:
    """One step on a stack, in place. `variance` has shape (K, M, 1) where M >= N, else (K, 1, N)."""
    momentum_KMN.lerp_(grads_KMN, 1 - momentum)
    direction_KMN = torch.lerp(grads_KMN, momentum_KMN, momentum)
    update_KMN = orthogonalize(direction_KMN.to(orthogonalize_dtype)).to(params_KMN.dtype)
    update_KMN = _reduce_variance(update_KMN, variance_KM1, beta2)
    # Tall matrices move further, so that a step changes the outputs alike whatever the shape.
    step_size = lr * math.sqrt(max(1.0, params_KMN.size(-2) / params_KMN.size(-1)))
    # Cautious: decay only where it does not pull against the update.
    decay_KMN = params_KMN * (update_KMN * params_KMN >= 0)
    params_KMN.sub_(step_size * (update_KMN + weight_decay * decay_KMN))


def orthogonalize(x_KMN: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, about: singular values near 1, Frobenius norm sqrt(min(M, N)).

    A zero matrix stays zero.
    """
    num_rows, num_columns = x_KMN.shape[-2:]
    row_norm_KM1 = x_KMN.norm(dim=-1, keepdim=True)
    rms_norm_K11 = _frobenius(x_KMN) / math.sqrt(num_rows)
    x_KMN = x_KMN * (rms_norm_K11 / row_norm_KM1.clamp_min(1e-6))
    x_KMN = x_KMN / (_frobenius(x_KMN) * 1.01 + 1e-6)
    is_tall = num_rows > num_columns
    for a, b, c in POLAR_EXPRESS:
        gram = x_KMN.mT @ x_KMN if is_tall else x_KMN @ x_KMN.mT
        mix = b * gram + c * (gram @ gram)
        x_KMN = a * x_KMN + (x_KMN @ mix if is_tall else mix @ x_KMN)
    return x_KMN * (math.sqrt(min(num_rows, num_columns)) / _frobenius(x_KMN).clamp_min(1e-6))


def variance_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the second-moment buffer of one (M, N) matrix: one number per row of a tall one, else per column."""
    num_rows, num_columns = shape
    return (num_rows, 1) if num_rows >= num_columns else (1, num_columns)


def _reduce_variance(update_KMN: Tensor, variance: Tensor, beta2: float) -> Tensor:
    """Even out the update's rows (or columns) by their running mean square; its Frobenius norm stays."""
    reduced_dim = -1 if variance.size(-1) == 1 else -2
    variance.lerp_(update_KMN.square().mean(dim=reduced_dim, keepdim=True), 1 - beta2)
    evened_KMN = update_KMN * variance.clamp_min(TINY).rsqrt()
    return evened_KMN * (_frobenius(update_KMN) / _frobenius(evened_KMN).clamp_min(TINY))


def _frobenius(x_KMN: Tensor) -> Tensor:
    return x_KMN.norm(dim=(-2, -1), keepdim=True)
