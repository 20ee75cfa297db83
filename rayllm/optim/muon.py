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
from torch.linalg import vector_norm

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
GRAM_BLOCKS = (POLAR_EXPRESS[:2], POLAR_EXPRESS[2:])
TINY = 1e-10


def muon_update_(
    params_KMN: Tensor,
    grads_KMN: Tensor,
    momentum_KMN: Tensor,
    variance: Tensor,
    *,
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    signal: Tensor,
    beta2: float,
    orthogonalize_dtype: torch.dtype,
) -> None:
    """One step on a stack, in place. `variance` has shape (K, M, 1) where M >= N, else (K, 1, N).

    `lr`, `momentum`, `weight_decay` and `signal` are scalars on the stack's device and in its dtype, so that a compiled
    step serves any of their values. Nothing changes where `signal` is 0 and all is finite; else it must be 1.
    """
    momentum_KMN.lerp_(grads_KMN, (1 - momentum) * signal)
    update_KMN = orthogonalize(grads_KMN.lerp(momentum_KMN, momentum), orthogonalize_dtype)
    _reduce_variance_(update_KMN, variance, (1 - beta2) * signal)
    # Tall matrices move further, so that a step changes the outputs alike whatever the shape.
    step_size = lr * signal * math.sqrt(max(1.0, params_KMN.size(-2) / params_KMN.size(-1)))
    # Cautious: decay only where it does not pull against the update.
    decay_KMN = torch.mul(update_KMN, params_KMN).ge_(0).mul_(weight_decay)
    params_KMN.sub_(update_KMN.addcmul_(params_KMN, decay_KMN).mul_(step_size))


def orthogonalize(x_KMN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest semi-orthogonal matrix, about: singular values near 1, Frobenius norm sqrt(min(M, N)).

    A zero matrix stays zero. The products are in `dtype` (default: that of `x_KMN`), the norms in that of `x_KMN`.
    """
    num_rows, num_columns = x_KMN.shape[-2:]
    row_norm_KM1 = vector_norm(x_KMN, dim=-1, keepdim=True)
    # Equilibrate: every row to the root mean square of their norms. The norm of the outcome follows from the rows'.
    rms_norm_K11 = vector_norm(row_norm_KM1, dim=-2, keepdim=True) / math.sqrt(num_rows)
    scale_KM1 = rms_norm_K11 / row_norm_KM1.clamp_min(1e-6)
    frobenius_K11 = vector_norm(row_norm_KM1 * scale_KM1, dim=-2, keepdim=True)
    y_KMN = (x_KMN * (scale_KM1 / (frobenius_K11 * 1.01 + 1e-6))).to(dtype or x_KMN.dtype)
    y_KMN = (_polar_by_gram if _goes_by_gram(x_KMN.shape[-2:], y_KMN.dtype) else _polar)(y_KMN)
    y_KMN = y_KMN.to(x_KMN.dtype)
    return y_KMN.mul_(math.sqrt(min(num_rows, num_columns)) / _frobenius(y_KMN).clamp_min(1e-6))


def _polar(y_KMN: Tensor) -> Tensor:
    """Polar Express as it is written: each step multiplies by a polynomial of the smaller Gram matrix."""
    is_tall = y_KMN.size(-2) > y_KMN.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = y_KMN.mT @ y_KMN if is_tall else y_KMN @ y_KMN.mT
        mix = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factors = (y_KMN, mix) if is_tall else (mix, y_KMN)
        y_KMN = torch.baddbmm(y_KMN, *factors, beta=a)
    return y_KMN


def _polar_by_gram(y_KMN: Tensor) -> Tensor:
    """The same in a third fewer operations for matrices four times as wide as high: the polynomials of several steps
    are multiplied with each other first, all small and square, as one step's Gram matrix follows from the last one's.

    Rounding grows with each such step, so the Gram matrix is computed anew after two: the error is then as in `_polar`.
    """
    is_tall = y_KMN.size(-2) > y_KMN.size(-1)
    for first, *others in GRAM_BLOCKS:
        gram = y_KMN.mT @ y_KMN if is_tall else y_KMN @ y_KMN.mT
        product = factor = _polynomial(gram, *first)
        for step in others:
            gram = factor @ gram @ factor
            factor = _polynomial(gram, *step)
            product = factor @ product
        y_KMN = y_KMN @ product if is_tall else product @ y_KMN
    return y_KMN


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b gram + c gram^2."""
    value = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    value.diagonal(dim1=-2, dim2=-1).add_(a)
    return value


def _goes_by_gram(shape: torch.Size, dtype: torch.dtype) -> bool:
    """Where it takes fewer operations; bfloat16 is too coarse for it."""
    return max(shape) > 2 * min(shape) and dtype in (torch.float32, torch.float64)


def variance_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the second-moment buffer of one (M, N) matrix: one number per row of a tall one, else per column."""
    num_rows, num_columns = shape
    return (num_rows, 1) if num_rows >= num_columns else (1, num_columns)


def muon_flops(shape: torch.Size, dtype: torch.dtype) -> int:
    """Floating-point operations of orthogonalizing one (M, N) matrix, all but all that a step takes."""
    narrow, wide = sorted(shape)
    num_steps, num_blocks = len(POLAR_EXPRESS), len(POLAR_EXPRESS)
    if _goes_by_gram(shape, dtype):
        num_blocks = len(GRAM_BLOCKS)
    # A block: into the Gram matrix and out again. A step: its square, and behind the first of a block three more.
    return 2 * narrow**2 * (2 * num_blocks * wide + (num_steps + 3 * (num_steps - num_blocks)) * narrow)


def _reduce_variance_(update_KMN: Tensor, variance: Tensor, weight: Tensor) -> None:
    """Even out the update's rows (or columns) by their running mean square; its Frobenius norm stays."""
    reduced_dim, kept_dim = (-1, -2) if variance.size(-1) == 1 else (-2, -1)
    norm = vector_norm(update_KMN, dim=reduced_dim, keepdim=True)
    variance.lerp_(norm.square() / update_KMN.size(reduced_dim), weight)
    scale = variance.clamp_min(TINY).rsqrt()
    before_K11, after_K11 = (vector_norm(n, dim=kept_dim, keepdim=True) for n in (norm, norm * scale))
    update_KMN.mul_(scale * (before_K11 / after_K11.clamp_min(TINY)))


def _frobenius(x_KMN: Tensor) -> Tensor:
    return vector_norm(x_KMN, dim=(-2, -1), keepdim=True)
