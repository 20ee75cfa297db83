"""Muon and AdamW against independent definitions, and what they must never do."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from rayllm.config.schema import OptimConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim import matrices, muon
from rayllm.optim.groups import build_optimizer
from rayllm.optim.muon import POLAR_EXPRESS, orthogonalize
from rayllm.optim.optimizer import MuonAdamW


def muon_reference(p, g, momentum_buffer, variance, *, lr, momentum, beta2, weight_decay):
    """Muon on one matrix as the papers write it, in numpy and float64; returns the new three."""
    m, n = p.shape
    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * momentum_buffer
    rows = np.sqrt((x**2).sum(1, keepdims=True))
    x = x * (np.sqrt((x**2).sum() / m) / np.maximum(rows, 1e-6))
    x = x / (1.01 * np.linalg.norm(x) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        if m > n:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    x = x * np.sqrt(min(m, n)) / np.linalg.norm(x)
    variance = beta2 * variance + (1 - beta2) * (x**2).mean(axis=1 if m >= n else 0, keepdims=True)
    scaled = x / np.sqrt(np.maximum(variance, 1e-10))
    x = scaled * np.linalg.norm(x) / np.linalg.norm(scaled)
    eta = lr * np.sqrt(max(1, m / n))
    return p - eta * x - eta * weight_decay * p * (x * p >= 0), momentum_buffer, variance


def muon_group(params, **settings):
    group = {
        "kind": "muon",
        "name": "matrices",
        "names": [f"w{i}" for i in range(len(params))],
        "params": params,
        "lr": 0.02,
    }
    defaults = {"momentum": 0.95, "beta2": 0.9, "weight_decay": 0.1, "orthogonalize_dtype": params[0].dtype}
    return group | defaults | settings


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 7)])
def test_muon_matches_reference(shape) -> None:
    rng = np.random.default_rng(0)
    params = [torch.nn.Parameter(torch.from_numpy(rng.normal(size=shape))) for _ in range(3)]
    variance_shape = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    expected = [(p.detach().numpy().copy(), np.zeros(shape), np.zeros(variance_shape)) for p in params]
    optimizer = MuonAdamW([muon_group(params)])
    for _ in range(4):
        for i, param in enumerate(params):
            grad = rng.normal(size=shape)
            param.grad = torch.from_numpy(grad)
            expected[i] = muon_reference(
                expected[i][0], grad, *expected[i][1:], lr=0.02, momentum=0.95, beta2=0.9, weight_decay=0.1
            )
        optimizer.step()
    state = optimizer.named_state()
    for i, (param, (p, momentum_buffer, variance)) in enumerate(zip(params, expected, strict=True)):
        np.testing.assert_allclose(param.detach().numpy(), p, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state[f"w{i}/momentum"].numpy(), momentum_buffer, rtol=1e-9)
        np.testing.assert_allclose(state[f"w{i}/variance"].numpy(), variance, rtol=1e-9)


def test_orthogonalize_evens_out_singular_values() -> None:
    """At its first step nanochat's update has singular values within a factor of four of each other."""
    x = torch.randn(3, 40, 25, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(orthogonalize(x))
    assert (s.max(-1).values / s.min(-1).values < 4).all()
    torch.testing.assert_close(orthogonalize(1000 * x), orthogonalize(x), rtol=1e-3, atol=1e-4)


def test_adamw_matches_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    group = {"kind": "adamw", "name": "table", "names": ["w"], "params": [ours], "noise": 0.0, **settings}
    optimizer = MuonAdamW([group])
    reference = torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def tiny_gpt(seed: int = 0) -> GPT:
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, num_layers=2, num_heads=2, num_kv_heads=1, d_model=32))
    model.init_weights(seed)
    return model


def train_step(model: GPT, optimizer: MuonAdamW, seed: int) -> None:
    tokens_BT = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(tokens_BT, tokens_BT.roll(-1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("gradient", ["none", "zero"])
def test_a_step_without_signal_changes_nothing(gradient) -> None:
    model = tiny_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    train_step(model, optimizer, seed=0)
    before = {k: v.clone() for k, v in {**model.state_dict(), **optimizer.named_state()}.items()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if gradient == "zero" else None
    optimizer.step()
    after = {**model.state_dict(), **optimizer.named_state()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rounding_steps_no_scalar_of_a_fresh_model() -> None:
    """Its residual scalars have a gradient of zero; which rounding makes of it depends on how the batch is split."""
    model = tiny_gpt()
    scalars = ("resid_lambdas", "x0_lambdas", "backout_lambda")
    before = {name: dict(model.named_parameters())[name].detach().clone() for name in scalars}
    optimizer = build_optimizer(model, OptimConfig())
    decay = next(g for g in optimizer.param_groups if g["name"] == "resid_lambdas")
    decay["weight_decay"] = 0.0
    tokens_BT = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    model(tokens_BT, tokens_BT.roll(-1, 1)).backward()
    noise = dict(model.named_parameters())["x0_lambdas"].grad
    assert noise.abs().max() > 0, "it is rounding, not zero"
    optimizer.step()
    for name in scalars:
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), before[name], rtol=0, atol=0)
    train_step(model, optimizer, seed=1)
    assert not torch.equal(model.x0_lambdas, before["x0_lambdas"]), "from then on they learn"


def test_zero_matrices_among_others_stay_finite() -> None:
    """At the first step most matrices have no gradient yet, as the output projections start at zero."""
    model = tiny_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    for i in range(3):
        train_step(model, optimizer, seed=i)
    tensors = {**model.state_dict(), **optimizer.named_state()}
    assert all(torch.isfinite(t.double()).all() for t in tensors.values())
    zero = torch.zeros(2, 4, 6)
    assert torch.equal(orthogonalize(zero), zero)


def test_gradients_that_are_no_number_are_not_hidden() -> None:
    model = tiny_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    train_step(model, optimizer, seed=0)
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    assert all(param.isnan().any() for param in model.parameters())


@pytest.mark.parametrize("shape", [(24, 100), (100, 24), (32, 32)])
def test_wide_matrices_are_orthogonalized_as_exactly_as_others(shape, monkeypatch) -> None:
    """Up to rounding of the same order, on a gradient of low rank in noise, where it shows most."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (draw(shape[0], 3) @ draw(3, shape[1]) + 1e-3 * draw(*shape))[None]
    fast = orthogonalize(x.float())
    monkeypatch.setattr(muon, "_goes_by_gram", lambda *_: False)
    exact = orthogonalize(x)
    error, plain_error = (float((y - exact).norm() / exact.norm()) for y in (fast, orthogonalize(x.float())))
    assert error < 8 * plain_error < 1e-3


def test_stacks_and_single_matrices_step_alike(monkeypatch) -> None:
    """A CPU takes large matrices one by one, a GPU all at once."""
    models = []
    for num_elements in (0, 2**40):
        monkeypatch.setattr(matrices, "CPU_CACHE_ELEMENTS", num_elements)
        models.append(tiny_gpt().double())
        optimizer = build_optimizer(models[-1], OptimConfig())
        for i in range(3):
            train_step(models[-1], optimizer, seed=i)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_update_rms_is_that_of_the_parameters_change() -> None:
    model = tiny_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    train_step(model, optimizer, seed=0)
    assert optimizer.update_rms() == {}, "it costs nothing where nobody asks"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens_BT = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    model(tokens_BT, tokens_BT.roll(-1, 1)).backward()
    optimizer.step(track_update_rms=True)
    after = dict(model.named_parameters())
    assert set(optimizer.update_rms()) == {group["name"] for group in optimizer.param_groups}
    assert {"lm_head", "wte", "value_embeds", "x0_lambdas", "matrices 32x128"} <= set(optimizer.update_rms())
    for group in optimizer.param_groups:
        change = torch.cat([(after[name] - before[name]).flatten() for name in group["names"]])
        torch.testing.assert_close(optimizer.update_rms()[group["name"]], change.square().mean().sqrt().detach())


@pytest.mark.slow
def test_a_compiled_step_is_the_plain_one_and_serves_any_rates() -> None:
    plain, compiled = tiny_gpt().double(), tiny_gpt().double()
    optimizers = build_optimizer(plain, OptimConfig()), build_optimizer(compiled, OptimConfig(), compiles=True)
    for i, stance in enumerate(("default", "fail_on_recompile", "fail_on_recompile")):
        for model, optimizer in zip((plain, compiled), optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - 0.1 * i)
                if group["kind"] == "muon":
                    group["momentum"], group["weight_decay"] = 0.85 + 0.03 * i, 0.2 - 0.03 * i
            draw = partial(torch.randn, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            for param in model.parameters():
                param.grad = draw(param.shape)
            with torch.compiler.set_stance(stance):
                optimizer.step()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_groups_follow_nanochat() -> None:
    model = tiny_gpt()
    optimizer = build_optimizer(model, OptimConfig(), lr_multiplier=0.5, matrix_weight_decay=1.5)
    by_name = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    width = (32 / 768) ** -0.5
    assert by_name["lm_head.weight"]["lr"] == pytest.approx(0.008 * width * 0.5)
    assert by_name["transformer.wte.weight"]["lr"] == pytest.approx(0.3 * width * 0.5)
    assert by_name["value_embeds.1.weight"]["lr"] == pytest.approx(0.15 * width * 0.5)
    assert by_name["resid_lambdas"]["lr"] == pytest.approx(0.005 * 0.5)
    assert by_name["x0_lambdas"]["lr"] == pytest.approx(0.25)
    assert by_name["x0_lambdas"]["betas"] == (0.96, 0.95)
    assert by_name["smear_lambda"]["lr"] == by_name["backout_lambda"]["lr"] == 0.2
    for name in ("transformer.h.0.attn.c_q.weight", "transformer.h.1.attn.ve_gate.weight"):
        assert by_name[name]["kind"] == "muon" and by_name[name]["weight_decay"] == 1.5
        assert by_name[name]["lr"] == pytest.approx(0.01)


def test_saved_state_goes_on_exactly() -> None:
    model, other = tiny_gpt(), tiny_gpt(seed=1)
    optimizer, fresh = build_optimizer(model, OptimConfig()), build_optimizer(other, OptimConfig())
    for i in range(2):
        train_step(model, optimizer, seed=i)
    other.load_state_dict(model.state_dict())
    fresh.load_named_state({name: tensor.clone() for name, tensor in optimizer.named_state().items()})
    for i in range(2, 4):
        train_step(model, optimizer, seed=i)
        train_step(other, fresh, seed=i)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_state_of_another_model_is_refused() -> None:
    optimizer = build_optimizer(tiny_gpt(), OptimConfig())
    state = optimizer.named_state()
    with pytest.raises(ValueError, match="1 entries differ, e.g. .*resid_lambdas/exp_avg"):
        optimizer.load_named_state({k: v for k, v in state.items() if k != "resid_lambdas/exp_avg"})
    with pytest.raises(ValueError, match="has shape"):
        optimizer.load_named_state({**state, "resid_lambdas/exp_avg": torch.zeros(7)})
