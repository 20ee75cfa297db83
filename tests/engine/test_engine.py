"""The engine: the same tokens whatever runs beside a sequence, and every end there is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.engine.request import Handle, Request
from rayllm.engine.sampling import stable_seed
from rayllm.model.gpt import GPT
from rayllm.types import Prompt

KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
]
TEXTS = ["".join(chr(97 + (i * i + 7 * text_idx) % 26) for i in range(200)) for text_idx in range(3)]


@dataclass
class Asked:
    """It comes `gap` steps after the one before. Its prompt is the first `cut` characters of a text, or, where it
    `follows` an earlier request, the first `cut` tokens of what that has by then; and a few tokens more."""

    gap: int
    text_idx: int
    cut: int
    num_own: int
    follows: int | None
    num_samples: int
    max_tokens: int
    kind: int
    cancel_after: int | None


asked = st.builds(
    Asked,
    gap=st.integers(0, 40),
    text_idx=st.integers(0, 2),
    cut=st.integers(0, 60) | st.integers(40, 200),
    num_own=st.integers(1, 4),
    follows=st.none() | st.integers(0, 6),
    num_samples=st.integers(1, 3),
    max_tokens=st.integers(1, 40) | st.integers(100, 180),
    kind=st.integers(0, len(KINDS) - 1),
    cancel_after=st.none() | st.integers(0, 60),
)


@settings(max_examples=15)
@given(
    pattern=st.sampled_from(["L", "S", "SL", "SSSL", "LS"]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    num_slots=st.integers(1, 5),
    num_prompts=st.none() | st.integers(1, 5),
    chunk_len=st.integers(2, 24) | st.integers(100, 300),
    row_chunk_len=st.integers(1, 70),
    token_budget=st.sampled_from([5, 30, 4096]),
    repeats=st.booleans(),
    requests=st.lists(asked, min_size=1, max_size=6),
    swaps=st.lists(st.tuples(st.integers(0, 150), st.booleans()), max_size=2),
)
def test_every_token_is_what_its_weights_say_without_a_cache(
    lab, pattern, heads, num_slots, num_prompts, chunk_len, row_chunk_len, token_budget, repeats, requests, swaps
) -> None:
    """Whatever windows, heads and chunks; whoever comes, goes on from another, asks a tool, or is cancelled; and also
    where weights change under way."""
    shape = {
        "window_pattern": pattern,
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "d_model": max(24, 8 * heads[0]),
    }
    models = {version: lab.model((5, 11, 7)[version], torch.float64, **shape) for version in range(3)}
    engine = lab.engine(
        lab.model(5, torch.float64, **shape),
        chunk_len=chunk_len,
        row_chunk_len=row_chunk_len,
        token_budget=token_budget,
        num_slots=num_slots,
        num_prompts=num_prompts,
        calculator=lambda code: f"{len(code)} and more" if len(code) % 3 else None,
        repeats=repeats,
    )
    handles: list[Handle] = []
    streamed: dict[tuple[int, int], list[int]] = {}
    arrivals: dict[int, list[Asked]] = {}
    cancels: dict[int, list[Handle]] = {}
    arrival = version = 0
    for request in requests:
        arrival += request.gap
        arrivals.setdefault(arrival, []).append(request)
    swap_steps = dict(swaps)
    for step_idx in range(5000):
        for request in arrivals.pop(step_idx, []):
            text = lab.prompt(TEXTS[request.text_idx]).token_ids
            if request.follows is not None and request.follows < len(handles):
                sequence = handles[request.follows].sequences[0]
                text = (*sequence.prompt_ids, *sequence.token_ids)
            own = lab.ids("one", "more")[: request.num_own]
            prompt = Prompt(f"p{len(handles)}", (*text[: request.cut], *own))
            sampling = SamplingConfig(max_tokens=request.max_tokens, seed=3, **KINDS[request.kind])  # type: ignore[arg-type]
            handles.append(engine.submit(Request(prompt, sampling, request.num_samples)))
            if request.cancel_after is not None:
                cancels.setdefault(step_idx + request.cancel_after, []).append(handles[-1])
        for handle in cancels.pop(step_idx, []):
            handle.cancel(len(handle.sequences) - 1)
        if step_idx in swap_steps:
            version += 1
            engine.load(models[version].state_dict(), version, drain=swap_steps[step_idx])
        for delta in engine.step():
            assert len(delta.token_ids) == len(delta.sampled)
            streamed.setdefault((handles.index(delta.handle), delta.sample_idx), []).extend(delta.token_ids)
        if engine.is_idle and not arrivals:
            break
    assert engine.is_idle and all(handle.is_done for handle in handles)
    for number, handle in enumerate(handles):
        prompt, sampling = handle.request.prompt, handle.request.sampling
        for i, completion in enumerate(handle.completions()):
            assert completion.finish_reason != "failed" and completion.error is None
            assert tuple(streamed[number, i]) == completion.token_ids
            lab.check(completion, prompt.token_ids, sampling, stable_seed(3, prompt.prompt_id, i), models)
    # What was kept for others goes when it must, and nobody is left in it.
    engine._scheduler.prefixes.clear()


@pytest.mark.parametrize("pattern", ["L", "S"])
def test_greedy_decoding_far_beyond_every_window_and_around_the_ring(lab, pattern: str) -> None:
    """Rings of 48 and 144 slots, sequences of up to 320."""
    model = lab.model(5, torch.float64, window_pattern=pattern)
    engine = lab.engine(model, chunk_len=16, row_chunk_len=4, max_len=320)
    sampling = SamplingConfig(temperature=0, max_tokens=400)
    prompts = [lab.prompt(text) for text in ("x", TEXTS[0][:150], TEXTS[1][:40])]
    for prompt, (completion,) in zip(prompts, engine.generate(prompts, sampling), strict=True):
        assert completion.finish_reason == "length" and len(prompt.token_ids) + len(completion.token_ids) == 320
        lab.check(completion, prompt.token_ids, sampling, 0, {0: model})


def test_logprobs_in_float32_are_those_of_a_full_forward(lab) -> None:
    model = lab.model()
    start = lab.prompt("logprobs")
    ((completion,),) = lab.engine(model).generate([start], SamplingConfig(max_tokens=150, seed=1))
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*start.token_ids, *completion.token_ids]]))[0, len(start.token_ids) - 1 : -1]
    expected = logits_TV.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_a_completion_does_not_depend_on_what_runs_beside_it(lab) -> None:
    model, sampling = lab.model(5), SamplingConfig(max_tokens=40, seed=5)
    prompts = [lab.prompt(text) for text in ("one", "a longer prompt", "x", "and a fourth one")]
    alone = [lab.engine(model, num_slots=1).generate([p], sampling, num_samples=3)[0] for p in prompts]
    for num_slots in (2, 5, 64):
        together = lab.engine(model, num_slots=num_slots).generate(prompts, sampling, num_samples=3)
        assert [[c.token_ids for c in group] for group in together] == [[c.token_ids for c in g] for g in alone]
    assert len({c.token_ids for group in alone for c in group}) == 12


def test_weights_laid_out_for_inference_say_the_same(lab) -> None:
    """Also when weights are loaded into it."""
    prompts, sampling = [lab.prompt("fused"), lab.prompt(TEXTS[0])], SamplingConfig(max_tokens=20)
    engine = lab.engine(lab.model(1, torch.float64).lay_out_for_inference())
    for version, seed in enumerate((1, 2)):
        model = lab.model(seed, torch.float64)
        engine.load(model.state_dict(), version)
        for prompt, (completion,) in zip(prompts, engine.generate(prompts, sampling), strict=True):
            address = stable_seed(sampling.seed, prompt.prompt_id, 0)
            lab.check(completion, prompt.token_ids, sampling, address, {version: model})


def test_cancelled_sequences_leave_their_place(lab) -> None:
    model = lab.model()
    engine = lab.engine(model, num_slots=2)
    sampling = SamplingConfig(max_tokens=30)
    handles = [engine.submit(Request(lab.prompt(text), sampling)) for text in ("a", "b", "c", "d")]
    deltas = engine.step()
    assert [delta.handle for delta in deltas] == handles[:2]
    for handle in (handles[0], handles[3], handles[3]):
        handle.cancel()
        assert handle.is_done
    ends = [(d.handle, d.token_ids) for d in lab.run(engine) if d.finish_reason == "cancelled"]
    assert ends == [(handles[0], ()), (handles[3], ())]
    completions = [handle.completions()[0] for handle in handles]
    assert [c.finish_reason == "cancelled" for c in completions] == [True, False, False, True]
    assert [len(completions[0].token_ids), len(completions[3].token_ids)] == [1, 0]
    ((alone,),) = lab.engine(model).generate([lab.prompt("c")], sampling)
    assert completions[2].token_ids == alone.token_ids


def test_stop_texts_end_an_answer_across_tokens_and_outside_tool_blocks(lab) -> None:
    script = {("a",): "b", ("b",): "c", ("c",): "d", ("d",): "<|python_start|>", ("<|python_start|>",): "x"}
    script |= {("x",): "y", ("y",): "<|python_end|>", ("<|python_end|>",): "é", ("é"[:1],): "f"}
    model = lab.scripted({**script, ("f",): "x"})
    for stop, expected in (
        (("cd",), "bcd"),
        (("xy",), "bcd<|python_start|>xy<|python_end|>"),
        (("bcdq", "c"), "bc"),
        ((), None),
    ):
        sampling = SamplingConfig(temperature=0, max_tokens=12, stop=stop)
        ((completion,),) = lab.engine(model).generate([lab.prompt("a")], sampling)
        text = lab.tokenizer.decode(list(completion.token_ids))
        if expected is None:
            assert completion.finish_reason == "length" and len(completion.token_ids) == 12
        elif stop == ("xy",):
            assert text.startswith(expected), "not in the block"
        else:
            assert text == expected and completion.finish_reason == "stop"


def test_a_completion_ends_where_the_context_does_or_with_a_stop_token(lab) -> None:
    sampling = SamplingConfig(max_tokens=50, temperature=0)
    ((completion,),) = lab.engine(lab.scripted({}), max_len=10).generate([lab.prompt("1234567")], sampling)
    assert len(completion.token_ids) == 2 and completion.finish_reason == "length"
    for end in ("<|assistant_end|>", "<|bos|>"):
        ((completion,),) = lab.engine(lab.scripted({("z",): end})).generate([lab.prompt("q")], sampling)
        assert list(completion.token_ids) == lab.ids("z", end) and completion.finish_reason == "stop"


def test_seeds_are_by_address(lab) -> None:
    model, prompt, sampling = lab.model(), lab.prompt("p"), SamplingConfig(max_tokens=30, seed=4)
    engine = lab.engine(model)
    own, given_seed = (engine.submit(Request(prompt, sampling, 2, seed=seed)) for seed in (None, 9))
    lab.run(engine)
    for handle, seed in ((own, 4), (given_seed, 9)):
        assert [sequence.seed for sequence in handle.sequences] == [stable_seed(seed, "p", i) for i in (0, 1)]
    assert len({c.token_ids for handle in (own, given_seed) for c in handle.completions()}) == 4


@pytest.mark.parametrize(
    ("token_ids", "num_samples", "rule"),
    [
        ((), 1, "request 'p': the prompt is empty"),
        ((1, 265), 1, "request 'p': token 265 is outside the vocabulary of 265"),
        ((-1,), 1, "token -1 is outside"),
        ((1,) * 300, 1, "has 300 tokens and leaves no room for an answer: at most 299 fit"),
        ((1,), 0, "num_samples must be at least 1, got 0"),
        ((1,), -2, "num_samples must be at least 1, got -2"),
    ],
)
def test_bad_requests_are_refused_and_the_others_go_on(lab, token_ids, num_samples, rule) -> None:
    engine, sampling = lab.engine(lab.scripted({})), SamplingConfig(max_tokens=5)
    good = engine.submit(Request(lab.prompt("good"), sampling))
    bad = Prompt("p", token_ids)
    with pytest.raises(ValueError, match=rule):
        engine.submit(Request(bad, sampling, num_samples))
    lab.run(engine)
    assert good.completions()[0].finish_reason == "length"
    if num_samples > 0:
        groups = engine.generate([lab.prompt("a"), bad, lab.prompt("b")], sampling, num_samples=2)
        assert [[c.finish_reason for c in group] for group in groups] == [
            ["length"] * 2,
            ["failed"] * 2,
            ["length"] * 2,
        ]
        error = groups[1][0].error
        assert error is not None and rule.split(": ")[-1] in error and groups[1][0].token_ids == ()


def poison(lab, model: GPT) -> GPT:
    """Keys and logits are no numbers for a sequence that holds the token N, which this model likes to say."""
    (token,) = lab.ids("N")
    model.lm_head.weight.data[token] *= 4
    poisoned = lab.model()
    poisoned.load_state_dict(model.state_dict())
    poisoned.wte.weight.data[token] = torch.nan
    return poisoned


@pytest.mark.parametrize("where", ["prompt", "row"])
@pytest.mark.parametrize("end", ["fails", "is cancelled", "gets good weights"])
@pytest.mark.parametrize("kind", KINDS[:1] + KINDS[2:])
def test_what_is_not_a_number_fails_alone_and_leaves_nothing_behind(lab, kind, end: str, where: str) -> None:
    """However a bad sequence ends, the rows that it and its prompt had serve others, who have fewer tokens there."""
    (token,), model = lab.ids("N"), lab.model()
    sizes = {"num_slots": 4, "num_prompts": 3, "chunk_len": 8, "repeats": end == "fails"}
    engine = lab.engine(poison(lab, model), **sizes)
    sampling = SamplingConfig(max_tokens=40, **kind)
    texts = ["xxxxxxxxxxN" + "x" * 20] if where == "prompt" else ["a", "b", "c"]
    bad = [engine.submit(Request(lab.prompt(text), sampling, 4)) for text in texts]
    sequences = [sequence for handle in bad for sequence in handle.sequences]
    for _ in range(100):
        engine.step()
        prompt_is_bad = where == "prompt" and sequences[0].prefix is not None and sequences[0].prefix.num_cached > 10
        if end != "fails" and (prompt_is_bad or any(token in sequence.token_ids[-1:] for sequence in sequences)):
            break
    else:
        assert engine.is_idle or end == "fails"
    if end == "is cancelled":
        for handle in bad:
            handle.cancel()
    elif end == "gets good weights":
        engine.load(model.state_dict(), 1)
    lab.run(engine)
    failed = [sequence for sequence in sequences if sequence.finish_reason == "failed"]
    assert (len(failed) > 0) == (end == "fails") or where == "row"
    for sequence in failed:
        assert sequence.error is not None and "the logits are not finite" in sequence.error
        assert f", sample {sequence.sample_idx}, token {len(sequence.token_ids)}: " in sequence.error
    short = SamplingConfig(max_tokens=3, **kind)
    prompts = [lab.prompt(chr(97 + i % 26) * (1 + i % 3), f"again{i}") for i in range(40)]
    groups = lab.engine(model, **sizes).generate(prompts, short, num_samples=2)
    good = [i for i, group in enumerate(groups) if not any(token in c.token_ids for c in group)]
    assert len(good) >= 12
    served = engine.generate([prompts[i] for i in good], short, num_samples=2)
    assert [[c.error for c in group] for group in served] == [[None, None]] * len(good)
    assert [[c.token_ids for c in g] for g in served] == [[c.token_ids for c in groups[i]] for i in good]


def test_a_row_that_is_not_a_number_stops_nobody_beside_it(lab) -> None:
    model = lab.model()
    engine = lab.engine(poison(lab, model))
    sampling = SamplingConfig(max_tokens=4)
    good, bad, fine = (lab.prompt(text) for text in ("a", "xxN", "bb"))
    groups = engine.generate([good, bad, fine], sampling, num_samples=2)
    assert [c.finish_reason for c in groups[1]] == ["failed"] * 2
    assert groups[1][1].error == (
        "request 'xxN', sample 1, token 0: the logits are not finite; the model's weights are damaged or diverged"
    )
    unbroken = lab.engine(model).generate([good, fine], sampling, num_samples=2)
    assert [[c.token_ids for c in groups[i]] for i in (0, 2)] == [[c.token_ids for c in group] for group in unbroken]


@pytest.mark.parametrize("repeats", [True, False])
def test_numbers_that_fail_behind_the_last_draw_stay_with_nobody(lab, repeats: bool) -> None:
    """A call's output ends the sequence, after the token before it has left keys that are no numbers."""
    model, short, (start, token) = (
        lab.model(),
        SamplingConfig(max_tokens=3),
        lab.ids("<|python_start|>", "<|python_end|>"),
    )
    model.lm_head.weight.data[start] *= 3
    poisoned = lab.model()
    poisoned.load_state_dict(model.state_dict())
    poisoned.wte.weight.data[token] = torch.nan
    settings = {"num_slots": 1, "num_prompts": 2, "repeats": repeats, "calculator": lambda code: "x" * 40}
    num_ended_so = 0
    for text in "abcdefghijklmnopqrst":
        engine = lab.engine(poisoned, **settings)
        ((first,),) = engine.generate([lab.prompt(text)], SamplingConfig(max_tokens=40))
        if first.finish_reason != "length" or first.sampled_mask[-1]:
            continue
        num_ended_so += 1
        prompts = [lab.prompt(text, f"again{i}") for i in range(4)]
        expected = lab.engine(model, **settings).generate(prompts, short)
        for (found,), (right,) in zip(engine.generate(prompts, short), expected, strict=True):
            assert token in right.token_ids or found.token_ids == right.token_ids, found.error
    assert num_ended_so >= 2


def test_a_prompt_may_be_any_sequence_of_tokens(lab) -> None:
    prompt, sampling = lab.prompt("as a list"), SamplingConfig(max_tokens=5)
    groups = lab.engine(lab.model()).generate([prompt, Prompt(prompt.prompt_id, list(prompt.token_ids))], sampling)  # type: ignore[arg-type]
    assert groups[0][0].token_ids == groups[1][0].token_ids


@pytest.mark.parametrize("name", ["num_slots", "num_prompts", "max_len", "chunk_len", "row_chunk_len", "token_budget"])
def test_an_engine_in_which_nothing_could_run_is_refused(lab, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Engine(lab.scripted({}), lab.tokenizer, **{"num_slots": 2, "max_len": 20, name: 0})
