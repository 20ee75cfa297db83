"""The optimizer on an NVIDIA GPU: the numbers of the CPU, compiled or not, and no wait for the device inside a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from rayllm.config.schema import OptimConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.optimizer import MuonAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO NVIDIA GPU HERE: the optimizer's kernels go untested"),
]


def build(device: str, dtype: torch.dtype = torch.float64, compiles: bool = False) -> tuple[GPT, MuonAdamW]:
    model = GPT(GPTConfig(sequence_len=64, vocab_size=500, num_layers=4, num_heads=4, num_kv_heads=2, d_model=64))
    model.init_weights(0)
    model.to(device, dtype)
    return model, build_optimizer(model, OptimConfig(), compiles=compiles)


def set_gradients(model: GPT, step: int) -> None:
    for i, param in enumerate(model.parameters()):
        drawn = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * step + i), dtype=torch.float64)
        param.grad = drawn.to(param.device, param.dtype)


def take_steps(model: GPT, optimizer: MuonAdamW, first: int, num_steps: int) -> None:
    """With rates that change, as a schedule's do."""
    for step in range(first, first + num_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - 0.1 * step)
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = 0.85 + 0.01 * step, 0.2 - 0.01 * step
        set_gradients(model, step)
        optimizer.step(track_update_rms=True)


def assert_same_weights(one: GPT, other: GPT, tolerance: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def no_waiting() -> Iterator[None]:
    """A call that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiles", [False, True])
def test_steps_as_the_cpu_does(compiles) -> None:
    expected, optimizer = build("cpu"), build("cuda", compiles=compiles)
    take_steps(*expected, 0, 4)
    take_steps(*optimizer, 0, 4)
    assert_same_weights(expected[0], optimizer[0], 1e-9)
    for name, rms in expected[1].update_rms().items():
        torch.testing.assert_close(optimizer[1].update_rms()[name].cpu(), rms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_step_waits_for_nothing_and_other_rates_compile_nothing_anew(compiles) -> None:
    model, optimizer = build("cuda", torch.float32, compiles)
    take_steps(model, optimizer, 0, 2)
    set_gradients(model, 2)
    for group in optimizer.param_groups:
        group["lr"] *= 0.7
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = 0.9, 0.05
    with torch.compiler.set_stance("fail_on_recompile"), no_waiting():
        optimizer.step(track_update_rms=True)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_step_without_signal_changes_nothing(compiles) -> None:
    model, optimizer = build("cuda", torch.float32, compiles)
    take_steps(model, optimizer, 0, 2)
    before = {k: v.clone() for k, v in {**model.state_dict(), **optimizer.named_state()}.items()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    after = {**model.state_dict(), **optimizer.named_state()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_state_travels_between_devices() -> None:
    model, optimizer = build("cuda")
    take_steps(model, optimizer, 0, 2)
    other, fresh = build("cpu")
    other.load_state_dict(model.state_dict())
    fresh.load_named_state(optimizer.gather_named_state())
    take_steps(model, optimizer, 2, 2)
    take_steps(other, fresh, 2, 2)
    assert_same_weights(model, other, 1e-9)
