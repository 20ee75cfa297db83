"""The two caches and what a forward sees of them: as if there were no cache, however tokens come and rows lie."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayllm.config.schema import SamplingConfig
from rayllm.engine.prefixes import Prefix
from rayllm.engine.request import Handle, Request
from rayllm.engine.runner import ModelRunner
from rayllm.engine.scheduler import Chunk, Keep, Move, PromptCopy, Start, batches
from rayllm.engine.sequence import Dialect, SequenceState
from rayllm.engine.views import ChunkView
from rayllm.model.attention import attend_to_part, join_parts, visibility
from rayllm.model.gpt import GPT
from rayllm.model.kv_cache import KVCache
from rayllm.types import Prompt

PATTERNS = ["L", "S", "SL", "SSSL", "LS"]
HEADS = [(1, 1), (2, 1), (4, 2), (4, 4), (6, 3)]


def build_model(lab, pattern: str = "SL", heads: tuple[int, int] = (2, 1), num_layers: int = 3) -> GPT:
    """L sees 32 tokens back, S 128; 320 positions."""
    num_heads, num_kv_heads = heads
    return lab.model(
        dtype=torch.float64,
        window_pattern=pattern,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_model=max(24, 12 * num_heads),
    )


def random_tokens(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 265, num_tokens).tolist())


def full_logits(model: GPT, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


@settings(max_examples=25)
@given(
    pattern=st.sampled_from(PATTERNS),
    heads=st.sampled_from(HEADS),
    num_layers=st.integers(1, 4),
    chunk_len=st.integers(1, 40) | st.integers(90, 200),
    row_chunk_len=st.integers(1, 80),
    cuts=st.lists(st.integers(1, 30) | st.integers(70, 200), min_size=1, max_size=7),
    lengths=st.lists(st.tuples(st.integers(1, 160), st.integers(0, 150)), min_size=1, max_size=4),
    room=st.integers(0, 9),
)
def test_any_chunks_of_prompts_and_rows_equal_one_forward(
    lab,
    pattern: str,
    heads: tuple[int, int],
    num_layers: int,
    chunk_len: int,
    row_chunk_len: int,
    cuts: list[int],
    lengths: list[tuple[int, int]],
    room: int,
) -> None:
    """Each of the texts is cut as it comes, those of like kind run side by side, and shorter ones are padded."""
    model = build_model(lab, pattern, heads, num_layers)
    max_len = max(map(sum, lengths)) + room
    prompts, rows = (
        KVCache(model.config, len(lengths), max_len, chunk_len=most, device="cpu", dtype=torch.float64)
        for most in (chunk_len, row_chunk_len)
    )
    texts = [random_tokens(sum(length), seed) for seed, length in enumerate(lengths)]
    expected = [full_logits(model, text) for text in texts]
    done, next_cut = [0] * len(texts), cycle(cuts)
    while any(count < len(text) for count, text in zip(done, texts, strict=True)):
        chunks = []
        for idx, (text, (base, _)) in enumerate(zip(texts, lengths, strict=True)):
            start = done[idx]
            is_own = start >= base
            done[idx] = min(
                start + min(next(next_cut), row_chunk_len if is_own else chunk_len), len(text) if is_own else base
            )
            if done[idx] > start:
                before = text[start - 1] if start else -1
                behind = (base, idx) if is_own else (0, None)
                chunks.append(Chunk(idx, start, text[start : done[idx]], before, *behind))
        for batch in batches(chunks):
            num_tokens = max(len(chunk.token_ids) for chunk in batch)
            padded_BT = torch.tensor([(*c.token_ids, *[0] * (num_tokens - len(c.token_ids))) for c in batch])
            with torch.inference_mode():
                logits_BTV = model(padded_BT, cache=ChunkView(prompts, rows, batch))
            for chunk, logits_TV in zip(batch, logits_BTV, strict=True):
                end = chunk.start + len(chunk.token_ids)
                torch.testing.assert_close(
                    logits_TV[: len(chunk.token_ids)], expected[chunk.row_idx][chunk.start : end], atol=1e-9, rtol=0
                )


def test_a_padded_chunk_hides_nothing_of_a_row_that_is_nearly_full(lab) -> None:
    """The padding of the first would lie beyond `max_len`, where the slots of its first tokens come again."""
    model = build_model(lab, "S")
    prompts, rows = (KVCache(model.config, 2, 250, chunk_len=200, device="cpu", dtype=torch.float64) for _ in range(2))
    texts = [random_tokens(250, 1), random_tokens(181, 2)]
    starts = [150, 1]
    first = [Chunk(i, 0, text[:start], -1) for i, (text, start) in enumerate(zip(texts, starts, strict=True))]
    rest = [Chunk(i, start, texts[i][start:], texts[i][start - 1]) for i, start in enumerate(starts)]
    with torch.inference_mode():
        for chunk in first:
            model(torch.tensor([chunk.token_ids]), cache=ChunkView(prompts, rows, [chunk]))
        padded_BT = torch.tensor([(*rest[0].token_ids, *[0] * 80), rest[1].token_ids])
        logits_BTV = model(padded_BT, cache=ChunkView(prompts, rows, rest))
    for b, start in enumerate(starts):
        expected_TV = full_logits(model, texts[b])[start:]
        torch.testing.assert_close(logits_BTV[b, : len(expected_TV)], expected_TV, atol=1e-9, rtol=0)


def build_sequence(prompt_ids: tuple[int, ...], prompt_row: int, token_ids: tuple[int, ...]) -> SequenceState:
    """One whose prompt the cache holds, and whose other tokens are due."""
    request = Request(Prompt("p", prompt_ids), SamplingConfig())
    dialect = Dialect(frozenset(), -1, -2)
    sequence = SequenceState(Handle(request), prompt_ids, 0, request.sampling, 0, 400, dialect)
    sequence.prefix = Prefix(prompt_row, prompt_ids, must_clear=False, num_cached=len(prompt_ids), num_users=1)
    sequence.num_cached = len(prompt_ids)
    sequence.token_ids = list(token_ids)
    return sequence


def run_prompt(runner: ModelRunner, row_idx: int, token_ids: tuple[int, ...], start: int = 0) -> None:
    for at in range(start, len(token_ids), runner.prompts.chunk_len):
        end = min(at + runner.prompts.chunk_len, len(token_ids))
        runner.run([Chunk(row_idx, at, token_ids[at:end], token_ids[at - 1] if at else -1)])


def flash_by_its_documentation(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor,
    causal: bool,
    window_size: tuple[int, int],
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:
    """What flash_attn_with_kvcache says it does, for one new token of each row: stores it, looks at the whole of the
    cache, and returns (B, 1, H, E) and (B, H, 1)."""
    assert q.size(1) == k.size(1) == 1 and causal and window_size[1] == 0 and return_softmax_lse
    assert cache_seqlens.dtype == torch.int32 and k_cache.size(1) > int(cache_seqlens.max())
    rows, slots = torch.arange(q.size(0)), cache_seqlens.long()
    k_cache[rows, slots], v_cache[rows, slots] = k[:, 0], v[:, 0]
    keys, values = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k_cache, v_cache))
    ago_BS = slots[:, None] - torch.arange(k_cache.size(1))
    scores_BHS = torch.einsum("bhe,bshe->bhs", q[:, 0], keys) * q.size(-1) ** -0.5
    scores_BHS = scores_BHS.masked_fill(((ago_BS < 0) | (ago_BS > window_size[0]))[:, None], -torch.inf)
    share_BH1 = scores_BHS.logsumexp(-1, keepdim=True)
    return torch.einsum("bhs,bshe->bhe", (scores_BHS - share_BH1).exp(), values)[:, None], share_BH1


@pytest.mark.parametrize("flash", [None, flash_by_its_documentation])
@pytest.mark.parametrize("pattern", ["L", "S", "LS"])
@pytest.mark.parametrize("heads", [(2, 1), (4, 4)])
def test_rows_decode_beyond_every_window_whatever_lies_beside_them(lab, pattern, heads, flash) -> None:
    """Two rows share a prompt, one has another; they start at different times, one leaves, and its place is taken."""
    model = build_model(lab, pattern, heads)
    sizes = {"num_slots": 4, "num_prompts": 3, "max_len": 310, "chunk_len": 16, "row_chunk_len": 5}
    runner = ModelRunner(model, **sizes, flash=flash)
    long, short = random_tokens(150, 1), random_tokens(3, 2)
    run_prompt(runner, 2, long)
    run_prompt(runner, 0, short)
    rows = [build_sequence(long, 2, random_tokens(155, 3)), build_sequence(short, 0, random_tokens(300, 4))]
    rows += [build_sequence(long, 2, random_tokens(100, 5)), build_sequence(short, 0, random_tokens(40, 6))]
    expected = {id(row): full_logits(model, row.tokens(0, 400)) for row in rows}
    running = rows[:2]
    runner.start([Start(0, 2), Start(1, 0)])
    for step in range(155):
        logits_BV = runner.logits_BV(len(running))
        for logits_V, row in zip(logits_BV, running, strict=True):
            torch.testing.assert_close(logits_V, expected[id(row)][row.num_cached - 1], atol=1e-9, rtol=0)
        if step == 7:
            running += rows[2:]
            runner.start([Start(2, 2), Start(3, 0)])
        if step == 47:  # the last has come to its end, and so does the first
            running = [running[2], running[1]]
            runner.change([Move(0, 2, running[0].num_own)])
        if step == 60:
            runner.start([Start(2, 2)])
            running.append(build_sequence(long, 2, rows[0].tokens(150, 305)))
            expected[id(running[-1])] = expected[id(rows[0])]
        if step == 107:
            running = [running[2], running[1]]
            runner.change([Move(0, 2, running[0].num_own)])
        runner.decode(running)
    assert running[1].num_cached == len(short) + 155


@settings(max_examples=25)
@given(
    pattern=st.sampled_from(PATTERNS),
    chunk_len=st.integers(1, 60),
    row_chunk_len=st.integers(1, 60),
    base=st.integers(1, 150),
    num_own=st.integers(1, 120),
    cut_by=st.integers(0, 70),
    num_new=st.integers(1, 40),
)
def test_a_row_becomes_a_prompt_that_others_go_on_from(
    lab, pattern, chunk_len, row_chunk_len, base, num_own, cut_by, num_new
) -> None:
    """What a row added to its prompt is kept; a copy, cut back by no more than a chunk, goes on."""
    model = build_model(lab, pattern)
    runner = ModelRunner(
        model, num_slots=1, num_prompts=3, max_len=300, chunk_len=chunk_len, row_chunk_len=row_chunk_len
    )
    text = random_tokens(base + num_own, 1)
    run_prompt(runner, 0, text[:base])
    for at in range(base, len(text), row_chunk_len):
        runner.run([Chunk(0, at, text[at : at + row_chunk_len], text[at - 1], base, 0)])
    runner.change([Keep(1, False, 0, base, 0, num_own)])
    cut = max(1, len(text) - min(cut_by, chunk_len, row_chunk_len))  # so much every ring has to spare
    assert runner.prompts.shortest_cut(len(text)) <= cut
    runner.prepare([], [PromptCopy(2, 1, cut)])
    longer = (*text[:cut], *random_tokens(num_new, 2))
    run_prompt(runner, 2, longer, cut)
    runner.start([Start(0, 2)])
    torch.testing.assert_close(runner.logits_BV(1)[0], full_logits(model, longer)[-1], atol=1e-9, rtol=0)


def test_a_cleared_row_leaves_nothing_behind(lab) -> None:
    model = build_model(lab)
    runner = ModelRunner(model, num_slots=1, num_prompts=1, max_len=100, chunk_len=100, row_chunk_len=10)
    for cache in (runner.prompts, runner.rows):
        for keys, values in cache.layers:
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
    runner.rows.clear_row(0)
    runner.prepare([0], [])
    text = random_tokens(9, 1)
    run_prompt(runner, 0, text[:5])
    runner.start([Start(0, 0)])
    sequence = build_sequence(text[:5], 0, text[5:])
    for _ in range(4):
        runner.decode([sequence])
    torch.testing.assert_close(runner.logits_BV(1)[0], full_logits(model, text)[-1], atol=1e-9, rtol=0)


@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 3),
    num_queries=st.integers(1, 4),
    num_keys=st.integers(0, 9),
    heads=st.sampled_from(HEADS),
    window=st.integers(0, 14),
    split=st.integers(0, 12),
)
def test_attention_to_parts_joins_to_attention_to_all(num_rows, num_queries, num_keys, heads, window, split) -> None:
    """Also where a query sees nothing of a part."""
    num_heads, num_kv_heads = heads
    num_keys += num_queries
    split = min(max(split, 1), num_keys - 1) if num_keys > 1 else 0
    generator = torch.Generator().manual_seed(num_keys)
    q, k, v = (
        torch.randn(num_rows, length, count, 8, generator=generator, dtype=torch.float64)
        for length, count in ((num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads))
    )
    ago_TS = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    mask_BTS = visibility((ago_TS >= 0) & (ago_TS <= window), q.dtype).expand(num_rows, -1, -1)
    parts = [slice(0, split), slice(split, num_keys)]
    results = [
        attend_to_part(q, k[:, part], v[:, part], mask_BTS[..., part]) for part in parts if part.stop > part.start
    ]
    joined = join_parts(results[0], results[1]) if len(results) == 2 else results[0][0]
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=2) for x in (k, v))
    scores_BHTS = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(8) + mask_BTS[:, None]
    expected = torch.einsum("bhts,bshe->bthe", scores_BHTS.softmax(dim=-1), v)
    torch.testing.assert_close(joined, expected, atol=1e-12, rtol=0)


def test_a_cache_longer_than_the_model_has_positions_is_refused(lab) -> None:
    config = build_model(lab).config
    with pytest.raises(ValueError, match="cache of 321 tokens is longer than the 320 positions"):
        KVCache(config, 1, 321, device="cpu", dtype=torch.float64)
