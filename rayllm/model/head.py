"""The unembedding: softcapped log-probabilities of targets, without ever holding all logits.

Logits are made a chunk of tokens at a time, used up, and forgotten. A cap of 15 bounds them, so that their exponentials
neither overflow nor need a maximum subtracted.

Shapes: N positions with a target, C of them in a chunk, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm.model.config import LOGITS_PER_CHUNK

LOGIT_CAP = 15.0


TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""From log p(target) (C,), the entropy of p (C,) and which of the N these are, to the loss of each (C,)."""


@dataclass(frozen=True)
class Cut:
    """The distribution that targets were drawn from, where it is not the model's own: its logits divided by
    `temperature`, and of position n only the tokens `kept_K[ends_N[n - 1] : ends_N[n]]` where top-k or top-p cut it."""

    temperature: float = 1.0
    kept_K: Tensor | None = None
    ends_N: Tensor | None = None

    def mask_CV(self, chunk: slice, vocab_size: int) -> Tensor:
        """1 at the tokens kept, 0 elsewhere."""
        assert self.kept_K is not None and self.ends_N is not None
        begin = 0 if chunk.start == 0 else int(self.ends_N[chunk.start - 1])
        ends_C = self.ends_N[chunk] - begin
        kept = self.kept_K[begin : begin + int(ends_C[-1])]
        row_idx = torch.searchsorted(ends_C, torch.arange(len(kept), device=kept.device), right=True)
        mask_CV = torch.zeros(len(ends_C), vocab_size, device=kept.device)
        return mask_CV.index_put_((row_idx, kept), mask_CV.new_ones(()))


def summed_loss(
    x_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    token_loss: TokenLoss | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """The sum of the targets' losses, as a scalar of at least float32: -log p(target), in nats, or `token_loss`.

    The gradient is made in the pass that makes the loss, while a chunk's logits are at hand: no product is done twice.
    `token_loss` is called once for each chunk and says by autograd what its loss makes of log-probability and entropy.
    `head_VD` may have padding rows behind the first `vocab_size`; they never compete and get no gradient.
    """
    return _SummedLoss.apply(x_ND, head_VD, targets_N, vocab_size, token_loss, cut)  # type: ignore[no-any-return]


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


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        token_loss: TokenLoss | None,
        cut: Cut | None,
    ) -> Tensor:
        loss = x_ND.new_zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32))
        needs_grad = any(ctx.needs_input_grad)
        grad_x_ND, grad_head_VD = (torch.empty_like(x_ND), torch.zeros_like(head_VD)) if needs_grad else (None, None)
        weight_VD = head_VD[:vocab_size].to(x_ND.dtype)
        temperature = 1.0 if cut is None else cut.temperature
        for chunk in _chunks(x_ND, vocab_size):
            x_CD, targets_C1 = x_ND[chunk], targets_N[chunk, None]
            capped_CV = capped_logits(x_CD, weight_VD, vocab_size)
            logits_CV = capped_CV if temperature == 1 else capped_CV / temperature
            share_CV = logits_CV.exp()
            if cut is not None and cut.kept_K is not None:
                share_CV.mul_(cut.mask_CV(chunk, vocab_size))
            total_C1 = share_CV.sum(1, keepdim=True)
            log_total_C1 = total_C1.log()
            log_prob_C1 = logits_CV.gather(1, targets_C1) - log_total_C1
            entropy_C1, by_entropy_C1 = None, None
            if token_loss is None:
                losses_C, by_log_prob_C1 = -log_prob_C1, torch.full_like(log_prob_C1, -1)
            else:
                entropy_C1 = log_total_C1 - torch.linalg.vecdot(share_CV, logits_CV)[:, None] / total_C1
                losses_C, by_log_prob_C1, by_entropy_C1 = _differentiate(token_loss, log_prob_C1, entropy_C1, chunk)
            loss += losses_C.sum()
            if grad_x_ND is not None and grad_head_VD is not None:
                # d log p_t / dz = 1[t] - p;  dH / dz = -p (log p + H)
                factor_CV = by_log_prob_C1
                if by_entropy_C1 is not None and entropy_C1 is not None:
                    factor_CV = by_log_prob_C1 + by_entropy_C1 * (logits_CV - log_total_C1 + entropy_C1)
                grad_CV = share_CV.mul_(factor_CV / -total_C1)
                grad_CV.scatter_add_(1, targets_C1, by_log_prob_C1)
                if temperature != 1:
                    grad_CV.div_(temperature)
                _product_gradients(grad_CV, capped_CV, x_CD, weight_VD, grad_x_ND[chunk], grad_head_VD[:vocab_size])
        ctx.save_for_backward(grad_x_ND, grad_head_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x_ND, grad_head_VD = ctx.saved_tensors
        return grad_x_ND * grad.to(grad_x_ND.dtype), grad_head_VD * grad.to(grad_head_VD.dtype), None, None, None, None


def _differentiate(
    token_loss: TokenLoss, log_prob_C1: Tensor, entropy_C1: Tensor, chunk: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses (C,), and what they make of log-probability and entropy (C, 1); None where entropy plays no part."""
    with torch.enable_grad():
        log_prob_C, entropy_C = (x_C1[:, 0].detach().requires_grad_() for x_C1 in (log_prob_C1, entropy_C1))
        losses_C = token_loss(log_prob_C, entropy_C, chunk)
        by_log_prob_C, by_entropy_C = torch.autograd.grad(losses_C.sum(), (log_prob_C, entropy_C), allow_unused=True)
    return losses_C.detach(), by_log_prob_C[:, None], None if by_entropy_C is None else by_entropy_C[:, None]


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
