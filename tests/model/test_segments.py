"""Packed equals unpacked: sequences that share rows, and samples that share their prompt, as if each were alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayllm.model.backends import attend_with_flex, attend_with_sdpa
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.model.segments import Segment, Segments

SHAPES = {
    "mha": GPTConfig(600, 50, 4, 2, 2, 48, "SSSL"),
    "gqa": GPTConfig(600, 50, 3, 4, 2, 64, "SL"),
    "odd": GPTConfig(200, 50, 5, 3, 1, 48, "S"),
}


def build(config: GPTConfig, dtype: torch.dtype = torch.float64) -> GPT:
    """A model whose every weight matters."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.4 if p.dim() > 1 else 0.7))
    return model.to(dtype)


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed))


def gradients(model: GPT) -> list[Tensor]:
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_unpacked(shape: str) -> None:
    model = build(SHAPES[shape])
    lengths = [[5, 1, 300, 94], [200, 199, 1]]  # two rows of 400 tokens; windows of 128 begin to matter
    tokens_BT = random_tokens(800).view(2, 400)
    targets_BT = random_tokens(800, seed=1).view(2, 400)
    ids_BT = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    packed_BT = model(tokens_BT, targets_BT, reduction="none", segments=Segments.from_ids(ids_BT))
    packed_BT.square().sum().backward()
    packed_gradients = gradients(model)

    alone = []
    for b, row in enumerate(lengths):
        for first, last in zip(torch.tensor([0, *row]).cumsum(0), torch.tensor(row).cumsum(0), strict=False):
            alone.append(model(tokens_BT[b : b + 1, first:last], targets_BT[b : b + 1, first:last], reduction="none"))
    alone_BT = torch.cat(alone, dim=1).view(2, 400)
    alone_BT.square().sum().backward()
    torch.testing.assert_close(packed_BT, alone_BT, atol=1e-9, rtol=0)
    for packed, by_itself in zip(packed_gradients, gradients(model), strict=True):
        torch.testing.assert_close(packed, by_itself, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt_len", [1, 70, 150])
def test_samples_that_share_a_prompt_give_the_gradient_of_rows_of_their_own(shape: str, prompt_len: int) -> None:
    model = build(SHAPES[shape])
    prompt_N, lengths = random_tokens(prompt_len), [3, 1, 140, 60]
    samples = [random_tokens(n, seed=n) for n in lengths]
    weights = [1.5, -2.0, 0.25, 3.0]

    naive = torch.zeros((), dtype=torch.float64)
    for sample_N, weight in zip(samples, weights, strict=True):
        row_N = torch.cat([prompt_N, sample_N])
        targets_N = row_N[1:].clone()
        targets_N[: prompt_len - 1] = -1
        naive = naive + weight * model(row_N[None, :-1], targets_N[None], reduction="sum")
    naive.backward()
    naive_gradients = gradients(model)

    # The prompt once, then every sample but for its last token, which predicts nothing.
    pieces, target_idx, start = [Segment(0, prompt_len)], [], prompt_len
    for n in lengths:
        target_idx.append(torch.tensor([prompt_len - 1, *range(start, start + n - 1)]))
        if n > 1:
            pieces.append(Segment(start, n - 1, 0, prompt_len))
        start += n - 1
    weights_N = torch.repeat_interleave(torch.tensor(weights, dtype=torch.float64), torch.tensor(lengths))
    shared = model(
        torch.cat([prompt_N, *(s[:-1] for s in samples)])[None],
        torch.cat(samples),
        reduction="sum",
        segments=Segments(pieces),
        target_idx_N=torch.cat(target_idx),
        token_loss=lambda logp_C, entropy_C, chunk: -weights_N[chunk] * logp_C,
    )
    shared.backward()
    torch.testing.assert_close(shared, naive, atol=1e-9, rtol=1e-9)
    for ours, theirs in zip(gradients(model), naive_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int, pieces: list[Segment]) -> Tensor:
    """One softmax over all keys, with what is not seen struck out; the first piece is the only prefix."""
    sequence = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([p.length for p in pieces]))
    position = torch.cat([torch.arange(p.length) + p.prefix_len for p in pieces])
    continues = torch.tensor([p.prefix_len > 0 for p in pieces])[sequence]
    ago = position[:, None] - position
    is_seen = (sequence[:, None] == sequence) | (continues[:, None] & (sequence == 0))
    is_seen &= (ago >= 0) & (ago <= window)
    scores = torch.einsum("bthe,bshe->bhts", q, k.repeat_interleave(2, 2)) / 4
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v.repeat_interleave(2, 2))


def random_qkv(num_rows: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(num_rows, num_tokens, h, 16, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    return q, k, v


@settings(max_examples=40, deadline=None)
@given(
    num_prefix=st.integers(1, 160),
    samples=st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=5),
    window=st.sampled_from([1, 30, 128, 500]),
)
def test_segments_see_what_they_should(num_prefix: int, samples: list[tuple[int, bool]], window: int) -> None:
    pieces, start = [Segment(0, num_prefix)], num_prefix
    for length, is_shared in samples:
        pieces.append(Segment(start, length, 0, num_prefix if is_shared else 0))
        start += length
    q, k, v = random_qkv(1, start)
    ours = attend_with_sdpa(q, k, v, window, Segments(pieces))
    torch.testing.assert_close(ours, by_definition(q, k, v, window, pieces), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sees_what_it_should() -> None:
    pieces = [Segment(0, 70), Segment(70, 90, 0, 70), Segment(160, 40)]
    q, k, v = random_qkv(1, 200)
    ours = attend_with_flex(q, k, v, 50, Segments(pieces))
    torch.testing.assert_close(ours, by_definition(q, k, v, 50, pieces), atol=1e-12, rtol=0)
    rows = (random_qkv(2, 200)[0], *random_qkv(2, 200)[1:])
    torch.testing.assert_close(attend_with_flex(*rows, 50), attend_with_sdpa(*rows, 50), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [1, 7, 128, 299, 300, 1000])
def test_blocks_of_queries_equal_whole_rows(window: int) -> None:
    q, k, v = random_qkv(2, 300)
    alone = [by_definition(q[b : b + 1], k[b : b + 1], v[b : b + 1], window, [Segment(0, 300)]) for b in range(2)]
    torch.testing.assert_close(attend_with_sdpa(q, k, v, window), torch.cat(alone), atol=1e-12, rtol=0)
    a_segment_each = Segments([Segment(0, 300), Segment(300, 300)])
    torch.testing.assert_close(attend_with_sdpa(q, k, v, window, a_segment_each), torch.cat(alone), atol=1e-12, rtol=0)


def test_neighbours_of_one_id_in_different_rows_stay_apart() -> None:
    segments = Segments.from_ids(torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert segments.segments == (Segment(0, 2), Segment(2, 1), Segment(3, 3))
    assert segments.positions_N.tolist() == [0, 1, 0, 0, 1, 2]
    assert segments.before_N.tolist() == [-1, 0, -1, -1, 3, 4]


def test_a_sequence_longer_than_the_model_is_refused_by_its_own_length() -> None:
    model = build(GPTConfig(8, 50, 1, 1, 1, 48, "L"))
    tokens_BT = random_tokens(160)[None]
    model(tokens_BT, segments=Segments([Segment(0, 80), Segment(80, 80)]))
    with pytest.raises(ValueError, match="sequence of 81 tokens"):
        model(tokens_BT, segments=Segments([Segment(0, 79), Segment(79, 81)]))


def test_recomputed_blocks_give_the_same_gradient() -> None:
    model = build(SHAPES["gqa"])
    tokens_BT, targets_BT = random_tokens(300).view(2, 150), random_tokens(300, seed=1).view(2, 150)
    model(tokens_BT, targets_BT).backward()
    kept = gradients(model)
    model.recompute_blocks = True
    model(tokens_BT, targets_BT).backward()
    for recomputed, expected in zip(gradients(model), kept, strict=True):
        torch.testing.assert_close(recomputed, expected, atol=0, rtol=0)
