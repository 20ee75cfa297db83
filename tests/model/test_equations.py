"""Imported models of many shapes against the architecture's equations, written plainly in float64.

One line here is one line of nanochat's forward: no cache, no fused product, no kernel; what `rayllm.model` must equal.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rayllm
from rayllm.config.schema import ImportNanochatConfig
from rayllm.runs import import_nanochat

REFERENCE = Path(__file__).parents[1] / "parity" / "mha"
FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
SHAPES = [
    (64, 400, 1, 2, 1, 48, "L"),
    (256, 400, 3, 4, 2, 64, "SL"),
    (300, 400, 5, 6, 3, 96, "SSSL"),
    (512, 400, 2, 4, 1, 64, "S"),
    (1024, 450, 7, 4, 4, 64, "SSL"),
    (200, 401, 6, 3, 1, 96, "LS"),
    (600, 448, 9, 8, 2, 128, "SSSL"),
    (128, 400, 4, 2, 2, 32, "LLLL"),
]


def random_weights(shape: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights in nanochat's names, every one of which shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, std: float = 0.3) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    d_model, num_layers = shape["n_embd"], shape["n_layer"]
    kv_width = d_model // shape["n_head"] * shape["n_kv_head"]
    num_rows = math.ceil(shape["vocab_size"] / 64) * 64
    weights = {
        "transformer.wte.weight": draw(num_rows, d_model, std=0.8),
        "lm_head.weight": draw(num_rows, d_model, std=0.05),
        "resid_lambdas": 1 + draw(num_layers, std=0.1),
        "x0_lambdas": draw(num_layers, std=0.1),
        "smear_gate.weight": draw(1, 24),
        "smear_lambda": draw(1),
        "backout_lambda": draw(1),
    }
    for i in range(num_layers):
        block, std = f"transformer.h.{i}.", d_model**-0.5
        for name, num_outputs in (("c_q", d_model), ("c_k", kv_width), ("c_v", kv_width), ("c_proj", d_model)):
            weights[f"{block}attn.{name}.weight"] = draw(num_outputs, d_model, std=std)
        weights[f"{block}mlp.c_fc.weight"] = draw(4 * d_model, d_model, std=std)
        weights[f"{block}mlp.c_proj.weight"] = draw(d_model, 4 * d_model, std=std / 2)
        if i % 2 == (num_layers - 1) % 2:
            weights[f"{block}attn.ve_gate.weight"] = draw(shape["n_kv_head"], 12)
            weights[f"value_embeds.{i}.weight"] = draw(num_rows, kv_width)
    return weights


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps)


def rotate(x: Tensor) -> Tensor:
    """RoPE over (B, T, H, E): the first half of a head's channels is paired with the second."""
    half = x.size(-1) // 2
    angle = torch.arange(x.size(1))[:, None] * 100_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin, a, b = angle.cos()[:, None], angle.sin()[:, None], x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def logits_by_definition(weights: dict[str, Tensor], shape: dict[str, Any], tokens: Tensor) -> Tensor:
    w = {name: weight.double() for name, weight in weights.items()}
    num_layers, num_heads, num_kv_heads = shape["n_layer"], shape["n_head"], shape["n_kv_head"]
    pattern, full = shape["window_pattern"], shape["sequence_len"]
    windows = {"L": full, "S": math.ceil(full / 4 / 128) * 128}
    (num_rows, num_tokens), head_dim = tokens.shape, shape["n_embd"] // num_heads
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    x = norm(w["transformer.wte.weight"][tokens])
    gate = w["smear_lambda"] * torch.sigmoid(x[:, 1:, :24] @ w["smear_gate.weight"].T)
    x = x0 = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
    for i in range(num_layers):
        attn, mlp = f"transformer.h.{i}.attn.", f"transformer.h.{i}.mlp."
        window = full if i == num_layers - 1 else windows[pattern[i % len(pattern)]]
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = norm(x)
        q, k, v = (
            (h @ w[f"{attn}{name}.weight"].T).view(num_rows, num_tokens, -1, head_dim) for name in ("c_q", "c_k", "c_v")
        )
        if f"value_embeds.{i}.weight" in w:
            gate = 3 * torch.sigmoid(h[..., :12] @ w[f"{attn}ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][tokens].view_as(v)
        q, k = 1.2 * norm(rotate(q)), 1.2 * norm(rotate(k))
        k, v = (shared.repeat_interleave(num_heads // num_kv_heads, dim=2) for shared in (k, v))
        scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(head_dim)
        shares = scores.masked_fill((distance < 0) | (distance > window), -math.inf).softmax(-1)
        x = x + torch.einsum("bhts,bshe->bthe", shares, v).flatten(2) @ w[f"{attn}c_proj.weight"].T
        x = x + (norm(x) @ w[f"{mlp}c_fc.weight"].T).relu().square() @ w[f"{mlp}c_proj.weight"].T
        if i == num_layers // 2:
            x_mid = x
    logits = norm(x - w["backout_lambda"] * x_mid) @ w["lm_head.weight"].T
    return 15 * torch.tanh(logits[..., : shape["vocab_size"]] / 15)


@pytest.mark.parametrize("numbers", SHAPES, ids=str)
def test_an_imported_model_follows_the_equations(numbers, tmp_path) -> None:
    shape = dict(zip(FIELDS, numbers, strict=True))
    source = tmp_path / "source"
    source.mkdir()
    weights = random_weights(shape, seed=shape["n_layer"])
    for name in weights:
        if "wte" in name or "value_embeds" in name:
            weights[name] = weights[name].bfloat16()  # as nanochat leaves them on a GPU
    torch.save(weights, source / "model_000123.pt")
    (source / "meta_000123.json").write_text(json.dumps({"step": 123, "model_config": shape}))
    shutil.copy(REFERENCE / "tokenizer.pkl", source)
    import_nanochat.run(ImportNanochatConfig(source=str(source), out=str(tmp_path / "out")))
    model, _ = rayllm.load(tmp_path / "out")

    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(379, (2, min(2 * shape["sequence_len"], 700)), generator=generator)
    targets_BT = tokens_BT.roll(-1, dims=1)
    targets_BT[:, :3] = -1
    expected_BTV = logits_by_definition(weights, shape, tokens_BT)
    expected_BT = F.cross_entropy(expected_BTV.transpose(1, 2), targets_BT, ignore_index=-1, reduction="none")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT).double(), expected_BTV, atol=2e-5, rtol=0)
        nll_BT = model(tokens_BT, targets_BT, reduction="none")
    torch.testing.assert_close(nll_BT.double(), expected_BT, atol=2e-5, rtol=0)
