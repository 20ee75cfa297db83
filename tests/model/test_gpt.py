"""The model: its attention by definition, its weights, losses and shapes. Decoding is tested in tests/engine."""

from __future__ import annotations

import math

import pytest
import torch

from rayllm.model.backends import attend_with_sdpa
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT


def tiny_model(seed: int = 0, **shape) -> GPT:
    """A float64 model whose every parameter is random, so that each part of it shows in the logits."""
    defaults = {"sequence_len": 32, "vocab_size": 70, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "d_model": 32}
    model = GPT(GPTConfig(**{**defaults, **shape})).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model.eval()


def random_tokens(model: GPT, num_rows: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (num_rows, num_tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("num_tokens", [1, 4, 9])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_matches_its_definition(window, num_tokens, num_kv_heads) -> None:
    generator = torch.Generator().manual_seed(0)
    num_heads, head_dim = 4, 8
    q, k, v = (
        torch.randn(2, num_tokens, h, head_dim, generator=generator, dtype=torch.float64)
        for h in (num_heads, num_kv_heads, num_kv_heads)
    )
    expected = torch.zeros_like(q)
    for b in range(2):
        for t in range(num_tokens):
            seen = range(max(0, t - window), t + 1)
            for h in range(num_heads):
                g = h // (num_heads // num_kv_heads)
                scores = torch.stack([q[b, t, h] @ k[b, s, g] for s in seen]) / math.sqrt(head_dim)
                expected[b, t, h] = scores.softmax(0) @ torch.stack([v[b, s, g] for s in seen])
    torch.testing.assert_close(attend_with_sdpa(q, k, v, window), expected, atol=1e-12, rtol=0)


def test_future_tokens_change_nothing() -> None:
    model = tiny_model()
    tokens_BT = random_tokens(model, 1, 20)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 12:] = (changed_BT[:, 12:] + 1) % model.config.vocab_size
    with torch.no_grad():
        before_BTV, after_BTV = model(tokens_BT), model(changed_BT)
    assert torch.equal(before_BTV[:, :12], after_BTV[:, :12])
    assert not torch.equal(before_BTV[:, 12:], after_BTV[:, 12:])


def test_every_parameter_has_a_gradient_and_padding_rows_have_none() -> None:
    model = tiny_model()
    tokens_BT = random_tokens(model, 2, 16)
    model(tokens_BT, tokens_BT.roll(-1, 1)).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.abs().sum() > 0, name
    assert model.lm_head.weight.shape[0] == 128
    assert model.lm_head.weight.grad[70:].abs().sum() == 0


def test_initial_weights() -> None:
    config = GPTConfig(sequence_len=32, vocab_size=300, num_layers=4, num_heads=4, num_kv_heads=4, d_model=128)
    model, again, other = (GPT(config) for _ in range(3))
    model.init_weights(3)
    again.init_weights(3)
    other.init_weights(4)
    tokens_BT = random_tokens(model, 4, 32)
    loss = model(tokens_BT, tokens_BT.roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(300), abs=0.01), "the first loss is that of a uniform guess"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    state = model.state_dict()
    assert state["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.02)
    assert state["transformer.h.0.attn.c_q.weight"].std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert state["transformer.h.0.attn.c_proj.weight"].abs().sum() == 0
    assert state["resid_lambdas"].tolist() == pytest.approx([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05])
    assert state["x0_lambdas"].tolist() == pytest.approx([0.2, 0.15, 0.10, 0.05])


def test_reductions_agree_and_ignored_targets_count_nothing() -> None:
    model = tiny_model()
    tokens_BT = random_tokens(model, 2, 8)
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[0, :5] = -1
    none_BT = model(tokens_BT, targets_BT, reduction="none")
    assert none_BT.shape == (2, 8) and (none_BT[0, :5] == 0).all()
    torch.testing.assert_close(model(tokens_BT, targets_BT, reduction="sum"), none_BT.sum())
    torch.testing.assert_close(model(tokens_BT, targets_BT), none_BT.sum() / 11)


def test_bfloat16_compute_stays_near_float32() -> None:
    model = tiny_model().float()
    tokens_BT = random_tokens(model, 2, 16)
    with torch.no_grad():
        exact_BTV = model(tokens_BT)
        model.compute_dtype = torch.bfloat16
        rough_BTV = model(tokens_BT)
    assert rough_BTV.dtype == torch.float32
    assert (exact_BTV - rough_BTV).abs().mean() < 0.05 * exact_BTV.std()


def test_a_too_long_sequence_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="longer than the 320 positions"):
        model(random_tokens(model, 1, 321))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"num_heads": 5}, "num_heads must divide d_model"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"d_model": 36}, "must be even"),
        ({"window_pattern": "SX"}, "S and L"),
        ({"d_model": 16}, "at least 24"),
    ],
)
def test_impossible_shapes_are_refused(change, rule) -> None:
    with pytest.raises(ValueError, match=rule):
        tiny_model(**change)


def test_windows_and_value_embedding_layers() -> None:
    def shape(num_layers: int, pattern: str, sequence_len: int = 2048) -> GPTConfig:
        return GPTConfig(sequence_len, 100, num_layers, 2, 2, 32, pattern)

    assert shape(6, "SSSL").windows == (512, 512, 512, 2048, 512, 2048)
    assert shape(1, "S").windows == (2048,)
    assert shape(4, "SSSL", 256).windows == (128, 128, 128, 256)
    assert shape(4, "L").value_embed_layers == (1, 3)
    assert shape(5, "L").value_embed_layers == (0, 2, 4)
    assert GPTConfig.from_dict(shape(5, "L").to_dict()) == shape(5, "L")
