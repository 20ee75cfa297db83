"""The engine: the same tokens whatever runs beside a sequence, tools inside it, and every end there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.engine.sampling import stable_seed
from rayllm.engine.scheduler import Scheduler
from rayllm.engine.sequence import Dialect, SequenceState
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Completion, Prompt

TOKENIZER = Tokenizer.byte_level()


def build_model(seed: int = 0) -> GPT:
    model = GPT(
        GPTConfig(
            sequence_len=32, vocab_size=TOKENIZER.vocab_size, num_layers=3, num_heads=2, num_kv_heads=1, d_model=32
        )
    )
    model.init_weights(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return build_model()


def prompt(text: str, prompt_id: str = "") -> Prompt:
    return Prompt(prompt_id or text, (TOKENIZER.bos_id, *TOKENIZER.encode(text)))


def build_engine(model: GPT, **settings) -> Engine:
    return Engine(model, TOKENIZER, **{"num_slots": 4, "max_len": 300, **settings})


def test_a_completion_does_not_depend_on_what_runs_beside_it(model) -> None:
    sampling = SamplingConfig(max_tokens=40, seed=5)
    prompts = [prompt(text) for text in ("one", "a longer prompt", "x", "and a fourth one")]
    alone = [build_engine(model, num_slots=1).generate([p], sampling, num_samples=3)[0] for p in prompts]
    for num_slots in (2, 5, 64):
        together = build_engine(model, num_slots=num_slots).generate(prompts, sampling, num_samples=3)
        assert [[c.token_ids for c in group] for group in together] == [[c.token_ids for c in g] for g in alone]
    assert len({c.token_ids for group in alone for c in group}) == 12


def test_requests_of_different_kinds_share_a_batch(model) -> None:
    kinds = [
        SamplingConfig(max_tokens=9, temperature=0),
        SamplingConfig(max_tokens=20, temperature=0.7, top_k=5),
        SamplingConfig(max_tokens=17, top_p=0.5),
        SamplingConfig(max_tokens=14, seed=3),
    ]
    alone = [build_engine(model).generate([prompt("same")], kind)[0][0] for kind in kinds]
    engine = build_engine(model)
    engine.submit(prompt("first"), kinds[1])
    engine.step()
    seq_ids = [engine.submit(prompt("same"), kind)[0] for kind in kinds]
    while not engine.is_idle:
        engine.step()
    assert [engine.completion(seq_id).token_ids for seq_id in seq_ids] == [c.token_ids for c in alone]


def test_greedy_equals_decoding_without_a_cache(model) -> None:
    tokens = list(prompt("greedy").token_ids)
    ((completion,),) = build_engine(model).generate([prompt("greedy")], SamplingConfig(temperature=0, max_tokens=40))
    for token in completion.token_ids:
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)


def test_logprobs_are_those_of_a_full_forward(model) -> None:
    start = prompt("logprobs")
    ((completion,),) = build_engine(model).generate([start], SamplingConfig(max_tokens=60, seed=1))
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*start.token_ids, *completion.token_ids]]))[0, len(start.token_ids) - 1 : -1]
    expected = logits_TV.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_deltas_add_up_to_the_completion(model) -> None:
    engine = build_engine(model, num_slots=2)
    seq_ids = [i for text in ("a", "b", "c") for i in engine.submit(prompt(text), SamplingConfig(max_tokens=11))]
    streamed: dict[int, list[int]] = {seq_id: [] for seq_id in seq_ids}
    ends = []
    while not engine.is_idle:
        for delta in engine.step():
            streamed[delta.seq_id] += delta.token_ids
            ends += [delta.seq_id] if delta.finish_reason else []
    assert sorted(ends) == seq_ids
    for seq_id in seq_ids:
        completion = engine.completion(seq_id)
        assert tuple(streamed[seq_id]) == completion.token_ids
        assert completion.finish_reason in ("stop", "length")
        assert sum(n for _, n in completion.weights_versions) == len(completion.token_ids)


def drive(drawn: list[int], max_tokens: int = 100, calculator=None) -> Completion:
    """What becomes of a sequence whose draws are these, one after the other."""
    sequence = SequenceState(
        seq_id=0,
        prompt=prompt("p"),
        sampling=SamplingConfig(),
        seed=0,
        max_tokens=max_tokens,
        dialect=Dialect.of(TOKENIZER, calculator),
    )
    draws = itertools.chain(drawn, itertools.repeat(TOKENIZER.encode("z")[0]))
    for token_id in draws:
        sequence.add(token_id, -1.0, 7)
        if sequence.finish_reason is not None:
            return sequence.completion()
    raise AssertionError("endless")


def ids(*parts: str) -> list[int]:
    specials = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>")
    return [t for part in parts for t in ([TOKENIZER.special_id(part)] if part in specials else TOKENIZER.encode(part))]


def test_a_python_block_is_answered_and_the_answer_is_not_sampled() -> None:
    drawn = ids("so <|", "<|python_start|>", "2*3", "<|python_end|>", "!!!", "<|assistant_end|>")
    output = ids("<|output_start|>", "six of 2*3", "<|output_end|>")
    drawn[-4:-4] = [0] * len(output)  # drawn in vain while the output enters
    completion = drive(drawn, calculator=lambda expression: f"six of {expression}")
    expected = ids("so <|", "<|python_start|>", "2*3", "<|python_end|>")
    assert list(completion.token_ids) == [*expected, *output, *ids("!!!", "<|assistant_end|>")]
    tool = range(len(expected), len(expected) + len(output))
    assert [not sampled for sampled in completion.sampled_mask] == [t in tool for t in range(len(completion.token_ids))]
    assert [logprob == 0.0 for logprob in completion.logprobs] == [not s for s in completion.sampled_mask]
    assert completion.weights_versions == ((7, len(completion.token_ids)),) and completion.finish_reason == "stop"


def test_a_block_without_a_value_adds_nothing() -> None:
    drawn = ids("<|python_start|>", "what?", "<|python_end|>", "hm", "<|assistant_end|>")
    assert list(drive(drawn, calculator=lambda expression: None).token_ids) == drawn
    stray = ids("<|python_end|>", "<|python_end|>", "<|assistant_end|>")
    assert list(drive(stray, calculator=lambda expression: "never").token_ids) == stray


def test_tool_tokens_count_and_are_cut_at_the_limit() -> None:
    drawn = ids("<|python_start|>", "1", "<|python_end|>")
    completion = drive(drawn, max_tokens=6, calculator=lambda expression: "12345")
    assert completion.finish_reason == "length" and len(completion.token_ids) == 6
    assert completion.sampled_mask == (True,) * 3 + (False,) * 3


def test_the_calculator_runs_inside_the_batch(model) -> None:
    """A model that always says one thing: its block is answered in the middle of the decode."""
    script = ids("<|python_start|>", "4", "<|python_end|>")
    scripted = ScriptedModel(model, script)
    engine = build_engine(scripted, calculator=lambda expression: f"<{expression}>")
    ((completion,),) = engine.generate([prompt("?")], SamplingConfig(max_tokens=12, temperature=0))
    assert TOKENIZER.decode(list(completion.token_ids)).count("<|output_start|><4><|output_end|>") >= 1
    assert not all(completion.sampled_mask)


class ScriptedModel(GPT):
    """Continues a given script, whatever it has seen, by the length of its cache."""

    def __init__(self, model: GPT, script: list[int]) -> None:
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.script = script
        self.said = 0

    def forward(self, tokens_BT, targets_BT=None, reduction="mean", cache=None):
        logits_BTV = super().forward(tokens_BT, cache=cache) * 0
        logits_BTV[..., self.script[self.said % len(self.script)]] = 10.0
        self.said += 1
        return logits_BTV


def test_a_row_that_is_not_a_number_fails_alone(model) -> None:
    broken = NaNAfter(model, token=TOKENIZER.encode("N")[0])
    prompts = [prompt("good"), prompt("N"), prompt("fine")]
    sampling = SamplingConfig(max_tokens=20, temperature=0.01)
    groups = build_engine(broken, num_slots=3).generate(prompts, sampling, num_samples=2)
    reasons = [{c.finish_reason for c in group} for group in groups]
    assert reasons[1] == {"failed"} and "failed" not in reasons[0] | reasons[2]
    unbroken = build_engine(model, num_slots=3).generate(prompts, sampling, num_samples=2)
    assert [c.token_ids for c in groups[2]] == [c.token_ids for c in unbroken[2]]


class NaNAfter(GPT):
    """A model whose keys and logits are no numbers for a sequence that holds a token."""

    def __init__(self, model: GPT, token: int) -> None:
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.wte.weight.data[token] = torch.nan
        for embed in self.value_embeds.values():
            embed.weight.data[token] = torch.nan


def test_cancelled_sequences_leave_their_place(model) -> None:
    engine = build_engine(model, num_slots=2)
    seq_ids = [i for text in ("a", "b", "c", "d") for i in engine.submit(prompt(text), SamplingConfig(max_tokens=30))]
    engine.step()
    engine.cancel(seq_ids[0])
    engine.cancel(seq_ids[3])
    while not engine.is_idle:
        engine.step()
    completions = [engine.completion(seq_id) for seq_id in seq_ids]
    assert [c.finish_reason == "cancelled" for c in completions] == [True, False, False, True]
    alone = build_engine(model).generate([prompt("c")], SamplingConfig(max_tokens=30))
    assert completions[2].token_ids == alone[0][0].token_ids


def test_new_weights_are_sampled_and_named(model) -> None:
    engine, other = build_engine(build_model()), build_model(seed=7)
    before = engine.generate([prompt("w")], SamplingConfig(max_tokens=10))[0][0]
    engine.load(other.state_dict(), version=3)
    after = engine.generate([prompt("w")], SamplingConfig(max_tokens=10))[0][0]
    assert before.weights_versions == ((0, 10),) and after.weights_versions == ((3, 10),)
    assert after.token_ids == build_engine(other).generate([prompt("w")], SamplingConfig(max_tokens=10))[0][0].token_ids
    with pytest.raises(ValueError, match=r"weights of another model: 1 tensors differ, e.g. smear_lambda"):
        engine.load({k: v for k, v in other.state_dict().items() if k != "smear_lambda"}, version=4)
    assert engine.weights_version == 3


@pytest.mark.parametrize(
    ("token_ids", "rule"),
    [
        ((), "prompt 'p' is empty"),
        ((1, TOKENIZER.vocab_size), "token 265 is outside the vocabulary of 265"),
        ((-1,), "token -1 is outside"),
        ((1,) * 300, "has 300 tokens and leaves no room for an answer: at most 299 fit"),
    ],
)
def test_bad_prompts_are_refused_and_the_others_go_on(model, token_ids, rule) -> None:
    engine = build_engine(model)
    (seq_id,) = engine.submit(prompt("good"), SamplingConfig(max_tokens=5))
    with pytest.raises(ValueError, match=rule):
        engine.submit(Prompt("p", token_ids), SamplingConfig(max_tokens=5))
    while not engine.is_idle:
        engine.step()
    assert engine.completion(seq_id).finish_reason in ("stop", "length")


def test_a_completion_ends_where_the_context_does(model) -> None:
    ((completion,),) = build_engine(model, max_len=10).generate([prompt("1234567")], SamplingConfig(max_tokens=50))
    assert len(completion.token_ids) <= 2 and completion.finish_reason in ("stop", "length")


def test_seeds_are_by_address(model) -> None:
    engine = build_engine(model)
    seq_ids = engine.submit(prompt("p"), SamplingConfig(seed=4), num_samples=2, seed=9)
    assert [engine._sequences[i].seed for i in seq_ids] == [stable_seed(9, "p", 0), stable_seed(9, "p", 1)]


def test_rows_stay_dense_and_nobody_is_overtaken() -> None:
    scheduler = Scheduler(num_slots=3)
    sequences = [SequenceState(i, prompt("p"), SamplingConfig(), 0, 5, Dialect.of(TOKENIZER, None)) for i in range(7)]
    scheduler.submit(sequences)
    assert [(row, s.seq_id) for row, s in scheduler.admit()] == [(0, 0), (1, 1), (2, 2)]
    sequences[0].finish_reason = sequences[2].finish_reason = "stop"
    assert scheduler.remove_finished() == [(2, None), (0, 1)]
    assert [s.seq_id for s in scheduler.running] == [1]
    assert [(row, s.seq_id) for row, s in scheduler.admit()] == [(1, 3), (2, 4)]
