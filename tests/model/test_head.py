"""The chunked head against plain PyTorch on all logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rayllm.model import head

VOCAB, PADDED = 37, 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them short."""
    monkeypatch.setitem(head.LOGITS_PER_CHUNK, "cpu", 5 * VOCAB)


def inputs(dtype: torch.dtype = torch.float64, count: int = 13) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(count, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head_VD = torch.randn(PADDED, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets_N = torch.randint(0, VOCAB, (count,), generator=generator)
    return x_ND, head_VD, targets_N, torch.randn(count, generator=generator, dtype=torch.float64)


def naive(x_ND: Tensor, head_VD: Tensor) -> Tensor:
    return 15 * torch.tanh(x_ND @ head_VD[:VOCAB].T / 15)


def test_summed_loss_equals_cross_entropy_of_all_logits() -> None:
    x_ND, head_VD, targets_N, _ = inputs()
    expected = F.cross_entropy(naive(x_ND, head_VD), targets_N, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, (x_ND, head_VD))
    total = head.summed_loss(x_ND, head_VD, targets_N, VOCAB)
    torch.testing.assert_close(total, expected)
    for ours, theirs in zip(torch.autograd.grad(3 * total, (x_ND, head_VD)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert wanted[1][VOCAB:].abs().sum() == 0, "padding rows have no gradient"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("has_cut", [False, True])
@pytest.mark.parametrize("uses_entropy", [False, True])
def test_any_loss_of_a_token_is_differentiated_in_one_pass(
    temperature: float, has_cut: bool, uses_entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through all logits, under the distribution that the tokens were drawn from."""
    monkeypatch.setitem(head.LOGITS_PER_CHUNK, "cpu", 7 * VOCAB)  # several chunks
    x_ND, head_VD, targets_N, weights_N = inputs()
    draw = random.Random(0)
    kept = [sorted({int(t), *draw.sample(range(VOCAB), 1 + n % 9)}) for n, t in enumerate(targets_N)]

    def token_loss(log_prob_C: Tensor, entropy_C: Tensor, chunk: slice) -> Tensor:  # in no linear way
        loss_C = weights_N[chunk] * log_prob_C.exp()
        return loss_C + weights_N[chunk].flip(0).abs() * entropy_C.square() if uses_entropy else loss_C

    logits_NV = naive(x_ND, head_VD) / temperature
    if has_cut:
        is_kept_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
        for n, ids in enumerate(kept):
            is_kept_NV[n, ids] = True
        logits_NV = logits_NV.masked_fill(~is_kept_NV, -1e30)
    log_p_NV = F.log_softmax(logits_NV, dim=-1)
    log_prob_N = log_p_NV.gather(1, targets_N[:, None])[:, 0]
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    chunks = list(head._chunks(x_ND, VOCAB))
    assert len(chunks) > 1
    expected = sum(token_loss(log_prob_N[chunk], entropy_N[chunk], chunk).sum() for chunk in chunks)
    ends_N = torch.tensor([len(ids) for ids in kept]).cumsum(0)
    kept_K = torch.tensor([i for ids in kept for i in ids])
    cut = head.Cut(temperature, kept_K, ends_N) if has_cut else head.Cut(temperature)
    total = head.summed_loss(x_ND, head_VD, targets_N, VOCAB, token_loss, cut)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad(expected, (x_ND, head_VD))
    for ours, theirs in zip(torch.autograd.grad(total, (x_ND, head_VD)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_log_probs_and_entropy_equal_those_of_all_logits() -> None:
    x_ND, head_VD, targets_N, weights_N = inputs()

    def loss(log_prob_N: Tensor, entropy_N: Tensor) -> Tensor:  # both used, in no linear way
        return (weights_N * log_prob_N.exp() + weights_N.flip(0) * entropy_N.square()).sum()

    log_p_NV = F.log_softmax(naive(x_ND, head_VD), dim=-1)
    expected = (log_p_NV.gather(1, targets_N[:, None])[:, 0], -(log_p_NV.exp() * log_p_NV).sum(-1))
    ours = head.log_probs(x_ND, head_VD, targets_N, VOCAB)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    wanted = torch.autograd.grad(loss(*expected), (x_ND, head_VD))
    for mine, theirs in zip(torch.autograd.grad(loss(*ours), (x_ND, head_VD)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_master_weights_keep_their_precision_under_bfloat16() -> None:
    x_ND, _, targets_N, _ = inputs(torch.bfloat16)
    head_VD = inputs(torch.float32)[1]
    total = head.summed_loss(x_ND, head_VD, targets_N, VOCAB)
    assert total.dtype == torch.float32
    grad_x, grad_head = torch.autograd.grad(total, (x_ND, head_VD))
    assert (grad_x.dtype, grad_head.dtype) == (torch.bfloat16, torch.float32)
    exact_x, exact_head, *_ = inputs()
    exact = head.summed_loss(exact_x, exact_head, targets_N, VOCAB)
    wanted = torch.autograd.grad(exact, (exact_x, exact_head))
    assert (grad_head - wanted[1]).norm() < 0.02 * wanted[1].norm()


def test_no_target_is_no_loss() -> None:
    x_ND, head_VD, targets_N, _ = inputs(count=0)
    total = head.summed_loss(x_ND, head_VD, targets_N, VOCAB)
    grad_x, grad_head = torch.autograd.grad(total, (x_ND, head_VD))
    assert total == 0 and grad_x.shape == (0, 24) and grad_head.abs().sum() == 0


def test_all_logits_are_never_held() -> None:
    """No tensor of forward or backward has as many numbers as there are logits, or nearly."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    x_ND, head_VD, targets_N, _ = inputs(count=300)
    with Watch():
        head.summed_loss(x_ND, head_VD, targets_N, VOCAB).backward()
        log_prob_N, entropy_N = head.log_probs(x_ND, head_VD, targets_N, VOCAB)
        (log_prob_N.sum() + entropy_N.sum()).backward()
    assert largest == x_ND.numel() < 300 * VOCAB
