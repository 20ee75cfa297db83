"""The unembedding: softcapped log-probabilities of targets, without ever holding all logits.

Logits are made a chunk of tokens at a time, used up, and forgotten. A cap of 15 bounds them, so that their exponentials
neither overflow nor need a maximum subtracted.

Shapes: N positions with a target, C of them in a chunk, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_CAP = 15.0
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**27, "mps": 2**25}
"""As many as stay in a CPU's cache; on a GPU as many as keep it busy."""


def summed_nll(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, vocab_size: int, weights_N: Tensor | None) -> Tensor:
    """sum(weights * -log p(target)), in nats, as a scalar of at least float32; weights None: all 1.

    The gradient is made in the pass that makes the loss, while a chunk's logits are at hand: no product is done twice.
    `head_VD` may have padding rows behind the first `vocab_size`; they never compete and get no gradient.
    """
    return _SummedNLL.apply(x_ND, head_VD, targets_N, vocab_size, weights_N)  # type: ignore[no-any-return]


def log_probs(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy of p) of each position, (N,) each, in nats; both can be differentiated.

    For losses that need the log-probabilities before they know their gradient: the logits are made again for it.
    """
    return _LogProbs.apply(x_ND, head_VD, targets_N, vocab_size)  # type: ignore[no-any-return]


def capped_logits(x_xD: Tensor, head_VD: Tensor, vocab_size: int) -> Tensor:
    """All logits (..., V), capped, in at least float32."""
    logits_xV = F.linear(x_xD, head_VD[:vocab_size].to(x_xD.dtype))
    logits_xV = logits_xV.to(torch.promote_types(logits_xV.dtype, torch.float32))
    if not torch.is_grad_enabled():  # in place: logits are the largest tensor there is
        return logits_xV.div_(LOGIT_CAP).tanh_().mul_(LOGIT_CAP)
    return LOGIT_CAP * torch.tanh(logits_xV / LOGIT_CAP)


class _SummedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, vocab_size: int, weights_N: Tensor | None
    ) -> Tensor:
        precise = torch.promote_types(x_ND.dtype, torch.float32)
        loss = x_ND.new_zeros((), dtype=precise)
        needs_grad = any(ctx.needs_input_grad)
        grad_x_ND, grad_head_VD = (torch.empty_like(x_ND), torch.zeros_like(head_VD)) if needs_grad else (None, None)
        weight_VD = head_VD[:vocab_size].to(x_ND.dtype)
        for chunk in _chunks(x_ND, vocab_size):
            x_CD, targets_C1 = x_ND[chunk], targets_N[chunk, None]
            capped_CV = capped_logits(x_CD, weight_VD, vocab_size)
            target_C1 = capped_CV.gather(1, targets_C1)
            share_CV = capped_CV.exp()
            total_C1 = share_CV.sum(1, keepdim=True)
            weight_C1 = torch.ones_like(total_C1) if weights_N is None else weights_N[chunk, None].to(precise)
            loss += (weight_C1 * (total_C1.log() - target_C1)).sum()
            if grad_x_ND is not None and grad_head_VD is not None:
                grad_CV = share_CV.mul_(weight_C1 / total_C1)
                grad_CV.scatter_add_(1, targets_C1, -weight_C1)
                _product_gradients(grad_CV, capped_CV, x_CD, weight_VD, grad_x_ND[chunk], grad_head_VD[:vocab_size])
        ctx.save_for_backward(grad_x_ND, grad_head_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x_ND, grad_head_VD = ctx.saved_tensors
        return grad_x_ND * grad.to(grad_x_ND.dtype), grad_head_VD * grad.to(grad_head_VD.dtype), None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(x_ND.dtype, torch.float32)
        log_total_N, log_prob_N, entropy_N = (x_ND.new_empty(len(x_ND), dtype=precise) for _ in range(3))
        weight_VD = head_VD[:vocab_size].to(x_ND.dtype)
        for chunk in _chunks(x_ND, vocab_size):
            capped_CV = capped_logits(x_ND[chunk], weight_VD, vocab_size)
            share_CV = capped_CV.exp()
            total_C = share_CV.sum(1)
            log_total_N[chunk] = total_C.log()
            log_prob_N[chunk] = capped_CV.gather(1, targets_N[chunk, None])[:, 0] - log_total_N[chunk]
            entropy_N[chunk] = log_total_N[chunk] - torch.linalg.vecdot(share_CV, capped_CV) / total_C
        ctx.save_for_backward(x_ND, head_VD, targets_N, log_total_N, entropy_N)
        ctx.vocab_size = vocab_size
        return log_prob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_log_prob_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_ND, head_VD, targets_N, log_total_N, entropy_N = ctx.saved_tensors
        grad_x_ND, grad_head_VD = torch.empty_like(x_ND), torch.zeros_like(head_VD)
        weight_VD = head_VD[: ctx.vocab_size].to(x_ND.dtype)
        for chunk in _chunks(x_ND, ctx.vocab_size):
            capped_CV = capped_logits(x_ND[chunk], weight_VD, ctx.vocab_size)
            log_p_CV = capped_CV - log_total_N[chunk, None]
            p_CV = log_p_CV.exp()
            by_log_prob_C1, by_entropy_C1 = grad_log_prob_N[chunk, None], grad_entropy_N[chunk, None]
            # d log p_t / dz = 1[t] - p;  dH / dz = -p (log p + H)
            grad_CV = log_p_CV.add_(entropy_N[chunk, None]).mul_(by_entropy_C1).add_(by_log_prob_C1).mul_(p_CV).neg_()
            grad_CV.scatter_add_(1, targets_N[chunk, None], by_log_prob_C1)
            _product_gradients(
                grad_CV, capped_CV, x_ND[chunk], weight_VD, grad_x_ND[chunk], grad_head_VD[: ctx.vocab_size]
            )
        return grad_x_ND, grad_head_VD, None, None


def _product_gradients(
    grad_CV: Tensor, capped_CV: Tensor, x_CD: Tensor, weight_VD: Tensor, grad_x_CD: Tensor, grad_head_VD: Tensor
) -> None:
    """From the gradient of capped logits back through cap and product: `grad_x_CD` is set, `grad_head_VD` added to.

    Uses up its first two arguments.
    """
    slope_CV = capped_CV.square_().mul_(-(LOGIT_CAP**-2)).add_(1)
    grad_CV = grad_CV.mul_(slope_CV).to(x_CD.dtype)
    torch.mm(grad_CV, weight_VD, out=grad_x_CD)
    if grad_head_VD.dtype == x_CD.dtype:
        grad_head_VD.addmm_(grad_CV.mT, x_CD)
    else:  # the sum over chunks stays as precise as the master weights
        grad_head_VD.add_(grad_CV.mT @ x_CD)


def _chunks(x_ND: Tensor, vocab_size: int) -> Iterator[slice]:
    """Slices of like size, as few as the logits of a chunk allow."""
    num_positions = len(x_ND)
    num_chunks = max(1, -(-num_positions * vocab_size // LOGITS_PER_CHUNK.get(x_ND.device.type, 2**25)))
    size = max(1, -(-num_positions // num_chunks))
    return (slice(first, first + size) for first in range(0, num_positions, size))
