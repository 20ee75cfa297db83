"""AdamW (arXiv:1711.05101): for embeddings, the unembedding and scalars."""

from __future__ import annotations

from torch import Tensor
from torch.optim.adamw import adamw


def adamw_update_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    num_steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    signal: Tensor,
) -> None:
    """One step of all, in place, as one kernel of torch's. Nothing changes where the scalar `signal` is 0.

    `num_steps` are float32 scalars on the parameters' device and count the steps before this one.
    """
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        num_steps,
        fused=True,
        # Made for gradients that overflowed: the kernel looks at it on the device and leaves everything as it was.
        found_inf=1 - signal.float(),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
