"""The training core on an NVIDIA GPU: every attention kernel, the chunked head and compiled steps against float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from rayllm.config.schema import WorkersConfig
from rayllm.data.loader import DataPosition, StepBatch, TokenBatch
from rayllm.model.backends import BackendName, attend_with_sdpa, choose_attention
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.model.segments import Segment, Segments
from rayllm.runtime import build_runtime
from rayllm.training.loop import forward_backward
from rayllm.training.replica import prepare_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO NVIDIA GPU HERE: its training kernels go untested"),
]
PIECES = [Segment(0, 150), Segment(150, 200, 0, 150), Segment(350, 90, 0, 150), Segment(440, 72)]
LAYOUTS = {"rows": None, "segments": Segments(PIECES)}


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 128, 300, 2048])
@pytest.mark.parametrize("name", get_args(BackendName))
def test_every_attention_kernel_equals_sdpa_on_the_cpu(name: BackendName, window: int, layout: str) -> None:
    try:
        _, attend = choose_attention(name, torch.device("cuda", 0), torch.bfloat16)
    except ValueError as error:
        pytest.skip(f"KERNEL NOT HERE: {error}")
    generator, segments = torch.Generator().manual_seed(0), LAYOUTS[layout]
    shape = (1, 512) if segments else (2, 256)
    drawn = [torch.randn(*shape, h, 64, generator=generator, dtype=torch.float64) for h in (4, 2, 2)]
    weight = torch.randn(*shape, 4, 64, generator=generator, dtype=torch.float64)
    exact = [x.bfloat16().double().requires_grad_() for x in drawn]
    expected = attend_with_sdpa(*exact, window, segments)
    (expected * weight).sum().backward()
    ours = [x.bfloat16().cuda().requires_grad_() for x in drawn]
    got = attend(*ours, window, segments and segments.to("cuda"))
    (got * weight.cuda()).sum().backward()
    assert relative_error(got, expected.detach()) < 0.01
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert relative_error(mine.grad, theirs.grad) < 0.02


@pytest.mark.parametrize("workers", [{}, {"compile": "off"}, {"compile": "off", "recompute_blocks": True}], ids=str)
def test_a_step_has_the_gradient_of_the_cpu(workers: dict) -> None:
    config = GPTConfig(256, 500, 4, 4, 2, 256)
    tokens = torch.randint(500, (4, 257), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :100] = -1
    batch = StepBatch((TokenBatch(tokens[:, :-1].contiguous(), targets),), DataPosition())

    def gradient(device: str, dtype: str) -> tuple[float, dict[str, Tensor]]:
        runtime = build_runtime(device, dtype)
        model = GPT(config, compute_dtype=runtime.dtype)
        model.init_weights(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        model.to(runtime.device).to(torch.float64 if dtype == "float64" else torch.float32)
        prepare_model(model, WorkersConfig(**(workers if device == "cuda" else {})), runtime)
        share = forward_backward(model, batch, runtime)[0]
        return float(share), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}

    exact_loss, exact = gradient("cpu", "float64")
    loss, ours = gradient("cuda", "bfloat16")
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    for name, grad in exact.items():
        if grad.norm() > 1e-6:
            assert relative_error(ours[name], grad) < 0.1, name
