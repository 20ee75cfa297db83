"""The engine on an NVIDIA GPU: the same words as on a CPU, from captured graphs as without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.model.attention import attend_to_part, attend_with_flash, join_parts, load_flash, visibility
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Completion, Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO NVIDIA GPU HERE: its graphs and kernels go untested"),
]
TOKENIZER = Tokenizer.byte_level()
MARGIN = 1e-4
"""Logits that differ by less may change places with the order of additions."""
TEXTS = ["x", "a longer prompt than the others, " * 9, "the same", "the same", "and another one"]
PROMPTS = [Prompt(text, (TOKENIZER.bos_id, *TOKENIZER.encode(text))) for text in TEXTS]
GREEDY = SamplingConfig(temperature=0, max_tokens=200)


def build_model(seed: int) -> GPT:
    """Every parameter random, so that each part of it shows; windows of 128 and 256 tokens."""
    config = GPTConfig(256, TOKENIZER.vocab_size, num_layers=3, num_heads=4, num_kv_heads=2, d_model=128)
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.15)
    return model.eval()


def build_engine(model: GPT, *, has_graphs: bool = True, **settings: Any) -> Engine:
    settings = {"num_slots": 20, "max_len": 600, **settings}
    engine = Engine(model.to("cuda"), TOKENIZER, **settings)
    assert engine._runner._graphs is not None, "on a GPU decode steps are captured"
    if not has_graphs:
        engine._runner._graphs = None
    return engine


def check_greedy(seed: int, groups: list[list[Completion]], margin: float = MARGIN) -> None:
    """Each token is the likeliest that a float64 model on the CPU gives there, but for near ties."""
    exact = build_model(seed).double()
    num_sure = 0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            assert completion.finish_reason in ("stop", "length"), completion.error
            tokens = torch.tensor(completion.token_ids)
            with torch.no_grad():
                logits_TV = exact(torch.tensor([[*prompt.token_ids, *completion.token_ids]]))[0]
            logits_TV = logits_TV[len(prompt.token_ids) - 1 : -1]
            best_T2 = logits_TV.topk(2, dim=-1).values
            is_sure_T = best_T2[:, 0] - best_T2[:, 1] > margin
            assert torch.equal(tokens[is_sure_T], logits_TV.argmax(dim=-1)[is_sure_T])
            num_sure += int(is_sure_T.sum())
            expected_T = logits_TV.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(completion.logprobs, dtype=torch.float64), expected_T, atol=1e-3, rtol=0
            )
    assert num_sure > 200


@pytest.mark.parametrize("has_graphs", [False, True])
@pytest.mark.parametrize("num_slots", [1, 3, 20])
def test_tokens_equal_those_of_the_cpu(has_graphs: bool, num_slots: int) -> None:
    """In float32, with rows that come and go, prompts that are shared, and windows that are left behind."""
    engine = build_engine(build_model(1), has_graphs=has_graphs, num_slots=num_slots)
    check_greedy(1, engine.generate(PROMPTS, GREEDY, num_samples=3))


def test_captured_steps_equal_those_that_are_not() -> None:
    sampling = SamplingConfig(max_tokens=150, seed=3)
    with_graphs, without = (
        build_engine(build_model(1).double(), has_graphs=has_graphs).generate(PROMPTS, sampling, num_samples=4)
        for has_graphs in (True, False)
    )
    for group, right in zip(with_graphs, without, strict=True):
        for completion, expected in zip(group, right, strict=True):
            assert completion.token_ids == expected.token_ids
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_captured_steps_see_new_weights() -> None:
    engine = build_engine(build_model(1))
    check_greedy(1, engine.generate(PROMPTS, GREEDY))
    engine.load(build_model(2).state_dict(), 1)
    check_greedy(2, engine.generate(PROMPTS, GREEDY))
    engine.load({name: weight.cuda() for name, weight in build_model(1).state_dict().items()}, 2)
    check_greedy(1, engine.generate(PROMPTS, GREEDY))


def test_a_dialogue_goes_on_from_the_cache() -> None:
    engine = build_engine(build_model(1), num_slots=2, num_prompts=3)
    ((first,),) = engine.generate([PROMPTS[1]], GREEDY)
    longer = Prompt("longer", (*PROMPTS[1].token_ids, *first.token_ids[:-20], 65, 66))
    ((again,),) = engine.generate([longer], SamplingConfig(temperature=0, max_tokens=40))
    ((alone,),) = build_engine(build_model(1)).generate([longer], SamplingConfig(temperature=0, max_tokens=40))
    assert again.logprobs[0] == pytest.approx(alone.logprobs[0], abs=1e-3)
    assert again.token_ids[0] == alone.token_ids[0]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 3), (8, 1)])
@pytest.mark.parametrize("num_queries", [1, 5, 64])
def test_attention_to_parts_equals_the_definition(dtype, atol, num_heads, num_kv_heads, num_queries) -> None:
    """Both parts and their sum, also where a query sees nothing of one; queries and keys are as long as after norm."""
    generator = torch.Generator().manual_seed(num_queries)
    num_rows, num_keys, head_dim, split, window = 3, 200, 64, 70, 90
    q, k, v = (
        torch.randn(num_rows, length, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for length, heads in ((num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads))
    )
    ago_TS = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    is_seen_BTS = ((ago_TS >= 0) & (ago_TS <= window)).expand(num_rows, -1, -1)
    parts = [slice(0, split), slice(split, num_keys)]
    found = [
        attend_to_part(q.cuda(), k[:, part].cuda(), v[:, part].cuda(), visibility(is_seen_BTS[..., part].cuda(), dtype))
        for part in parts
    ]
    k64, v64 = (x.double().repeat_interleave(num_heads // num_kv_heads, dim=2) for x in (k, v))
    scores_BHTS = torch.einsum("bthe,bshe->bhts", q.double(), k64) * head_dim**-0.5
    scores_BHTS = scores_BHTS.masked_fill(~is_seen_BTS[:, None], -torch.inf)
    for part, (y_BTHE, share_BTH) in zip(parts, found, strict=True):
        sees_BT = is_seen_BTS[..., part].any(dim=-1)
        expected = torch.einsum("bhts,bshe->bthe", scores_BHTS[..., part].softmax(-1), v64[:, part])
        torch.testing.assert_close(y_BTHE.cpu().double()[sees_BT], expected[sees_BT], atol=atol, rtol=atol)
        share = scores_BHTS[..., part].logsumexp(-1).transpose(1, 2)
        torch.testing.assert_close(share_BTH.cpu().double()[sees_BT], share[sees_BT], atol=atol, rtol=atol)
    joined = join_parts(*found).cpu().double()
    expected = torch.einsum("bhts,bshe->bthe", scores_BHTS.softmax(-1), v64)
    torch.testing.assert_close(joined, expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("window", [0, 40, 1000])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_flash_attention_equals_plain_products(window: int, num_kv_heads: int) -> None:
    flash = load_flash(torch.device("cuda"), torch.bfloat16)
    if flash is None:
        pytest.skip("FLASH-ATTN IS NOT INSTALLED, or this GPU is too old for it: its path goes untested")
    torch.manual_seed(0)
    cached = [torch.randn(5, 300, num_kv_heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    new = [torch.randn(5, 1, num_kv_heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    q_B1HE = torch.randn(5, 1, 4, 64, device="cuda", dtype=torch.bfloat16)
    lengths_B = torch.tensor([0, 1, 39, 200, 299], device="cuda")
    y, share = attend_with_flash(flash, q_B1HE, (cached[0], cached[1]), (new[0], new[1]), lengths_B, window)
    for stored, added in zip(cached, new, strict=True):
        assert torch.equal(stored[torch.arange(5), lengths_B], added[:, 0]), "it stores what is new"
    ago_BS = lengths_B[:, None] - torch.arange(300, device="cuda")
    mask_BTS = visibility((ago_BS >= 0) & (ago_BS <= window), torch.bfloat16)[:, None]
    expected_y, expected_share = attend_to_part(q_B1HE, cached[0], cached[1], mask_BTS)
    torch.testing.assert_close(y, expected_y, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(share.float(), expected_share.float(), atol=3e-2, rtol=1e-2)
