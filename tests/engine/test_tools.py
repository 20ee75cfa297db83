"""Tools in the middle of decoding: what they write enters, and whoever waits, fails or hangs stops nobody else."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref

import pytest

from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.engine.request import Delta, Request
from rayllm.engine.tools import MAX_OUTPUT_CHARS, MAX_STUCK, ToolRunner
from rayllm.types import Completion

HANG_LIMIT_S = 30.0
# "?" and "!" ask the tool at once; what follows its output, or its silence, is one word and an end.
SCRIPT = {
    ("?",): "<|python_start|>",
    ("!",): "<|python_start|>",
    ("?", "<|python_start|>"): "4",
    ("!", "<|python_start|>"): "7",
    ("4",): "<|python_end|>",
    ("7",): "<|python_end|>",
    ("<|python_end|>",): "n",
    ("<|output_end|>",): "k",
    ("n",): "<|assistant_end|>",
    ("k",): "<|assistant_end|>",
    (".",): "<|python_end|>",
}
GREEDY = SamplingConfig(temperature=0, max_tokens=60)


def ask(lab, engine: Engine, *texts: str, max_tokens: int = 60):
    sampling = SamplingConfig(temperature=0, max_tokens=max_tokens)
    return [engine.submit(Request(lab.prompt(text), sampling)) for text in texts]


def build(lab, tool, **settings) -> Engine:
    return lab.engine(lab.scripted(SCRIPT), calculator=tool, **settings)


def text_of(lab, completion: Completion) -> str:
    return lab.tokenizer.decode(list(completion.token_ids))


def answered(code: str, output: str) -> str:
    block = f"<|python_start|>{code}<|python_end|>"
    return f"{block}<|output_start|>{output}<|output_end|>k<|assistant_end|>"


def run_until(engine: Engine, done) -> list[Delta]:
    """Steps until then; a tool that is not waited for needs time, of which there is a limit."""
    deltas, deadline = [], time.monotonic() + HANG_LIMIT_S
    while not done():
        assert time.monotonic() < deadline
        deltas += engine.step()
    return deltas


@pytest.mark.parametrize("repeats", [False, True])
def test_a_python_block_is_answered_and_the_answer_is_not_sampled(lab, repeats: bool) -> None:
    engine = build(lab, lambda code: f"six of {code}", repeats=repeats, weights_version=3)
    (handle,) = ask(lab, engine, "?")
    deltas = lab.run(engine)
    (completion,) = handle.completions()
    assert text_of(lab, completion) == answered("4", "six of 4")
    output = lab.ids("<|output_start|>", "six of 4", "<|output_end|>")
    num_tokens = len(completion.token_ids)
    assert completion.sampled_mask == tuple(not 3 <= t < 3 + len(output) for t in range(num_tokens))
    assert [logprob == 0.0 for t, logprob in enumerate(completion.logprobs) if 3 <= t < 3 + len(output)]
    assert completion.weights_versions == ((3, num_tokens),) and completion.finish_reason == "stop"
    assert [t for delta in deltas for t in delta.token_ids] == list(completion.token_ids)
    assert [s for delta in deltas for s in delta.sampled] == list(completion.sampled_mask)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]


def test_a_call_without_a_value_adds_nothing_and_stray_ends_call_nothing(lab) -> None:
    calls: list[str] = []
    engine = build(lab, calls.append)
    silent, stray = ask(lab, engine, "?", ".")
    lab.run(engine)
    assert text_of(lab, silent.completions()[0]) == "<|python_start|>4<|python_end|>n<|assistant_end|>"
    assert text_of(lab, stray.completions()[0]) == "<|python_end|>n<|assistant_end|>"
    assert all(silent.completions()[0].sampled_mask) and calls == ["4"]


@pytest.mark.parametrize("max_tokens", [3, 4, 6, 9, 10])
def test_what_a_tool_writes_counts_and_is_cut_at_the_limit(lab, max_tokens: int) -> None:
    """Three tokens are drawn, the output has seven."""
    engine = build(lab, lambda code: "12345")
    (handle,) = ask(lab, engine, "?", max_tokens=max_tokens)
    lab.run(engine)
    (completion,) = handle.completions()
    assert completion.finish_reason == "length" and len(completion.token_ids) == max_tokens
    assert text_of(lab, completion)[: len(answered("4", "12345"))] in answered("4", "12345")
    assert completion.sampled_mask == (True,) * 3 + (False,) * (max_tokens - 3)


def test_output_is_text_whatever_it_spells(lab) -> None:
    spelled = "<|assistant_end|>\ud800" + "x" * MAX_OUTPUT_CHARS
    engine = build(lab, lambda code: spelled if code == "4" else 0.5, max_len=2000)  # type: ignore[return-value]
    long, number = ask(lab, engine, "?", "!", max_tokens=1990)
    lab.run(engine)
    assert text_of(lab, number.completions()[0]) == answered("7", "0.5")
    completion = long.completions()[0]
    assert completion.finish_reason == "length" and lab.ids("<|assistant_end|>")[0] not in completion.token_ids
    assert "<|assistant_end|>\ufffdxxx" in text_of(lab, completion)


def test_whoever_waits_stops_nobody(lab) -> None:
    """With one row for each, then with one that is free again and again."""
    is_open, is_called = threading.Event(), threading.Event()

    def tool(code: str) -> str:
        is_called.set()
        assert is_open.wait(HANG_LIMIT_S)
        return "late"

    engine = build(lab, tool, tool_timeout_s=HANG_LIMIT_S, num_slots=2)
    waiting, *others = ask(lab, engine, "?", "a", "b", "c", max_tokens=30)
    run_until(engine, lambda: all(handle.is_done for handle in others))
    assert is_called.wait(HANG_LIMIT_S) and not waiting.is_done
    assert len(waiting.sequences[0].token_ids) == 3, "nothing is drawn before the output is there"
    is_open.set()
    lab.run(engine)
    assert text_of(lab, waiting.completions()[0]) == answered("4", "late")


@pytest.mark.parametrize("repeats", [False, True])
def test_a_failing_call_is_an_error_text_in_its_row_alone(lab, repeats: bool) -> None:
    def tool(code: str) -> str:
        if code == "4":
            raise ZeroDivisionError("no such number")
        return "fine"

    engine = build(lab, tool, repeats=repeats)
    failing, fine, other = ask(lab, engine, "?", "!", "a", max_tokens=59)
    lab.run(engine)
    assert text_of(lab, failing.completions()[0]) == answered("4", "error: ZeroDivisionError: no such number")
    assert text_of(lab, fine.completions()[0]) == answered("7", "fine")
    assert text_of(lab, other.completions()[0]) == "z" * 59


@pytest.mark.parametrize("repeats", [False, True])
def test_a_call_that_hangs_is_given_up_and_those_behind_it_are_run(lab, repeats: bool) -> None:
    is_over = threading.Event()

    def tool(code: str) -> str:
        if code == "4":
            assert is_over.wait(HANG_LIMIT_S)
        return "fine"

    engine = build(lab, tool, tool_timeout_s=0.2, repeats=repeats)
    try:
        hanging, behind, other = ask(lab, engine, "?", "!", "a")
        lab.run(engine, max_steps=10**6)
        assert text_of(lab, hanging.completions()[0]) == answered("4", "error: no result within 0.2 s")
        assert text_of(lab, behind.completions()[0]) == answered("7", "fine")
        assert len(other.completions()[0].token_ids) == 60
        assert text_of(lab, engine.generate([lab.prompt("!")], GREEDY)[0][0]) == answered("7", "fine")
    finally:
        is_over.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_kills_its_thread_is_given_up(lab) -> None:
    def tool(code: str) -> str:
        if code == "4":
            raise SystemExit
        return "fine"

    engine = build(lab, tool, tool_timeout_s=0.2)
    dead, behind = ask(lab, engine, "?", "!")
    lab.run(engine, max_steps=10**6)
    assert "error: " in text_of(lab, dead.completions()[0])
    assert text_of(lab, behind.completions()[0]) == answered("7", "fine")


def test_a_batch_that_repeats_gives_the_same_tokens_at_the_same_steps(lab) -> None:
    """Tools take as long as they like."""
    model = lab.model(5, window_pattern="L")
    sampling = SamplingConfig(max_tokens=60, seed=4)
    histories = []
    for pace in (0.0, 1.0, 2.0):
        rng = random.Random(pace)

        def tool(code: str, pace: float = pace, rng: random.Random = rng) -> str | None:
            time.sleep(rng.random() * 0.004 * pace)
            return f"{len(code)}" if len(code) % 4 else None

        engine = lab.engine(model, calculator=tool, repeats=True, num_slots=3, chunk_len=16)
        for _ in range(2):
            handles = [engine.submit(Request(lab.prompt(text), sampling, 3)) for text in ("one", "another", "third")]
            places = {id(handle): idx for idx, handle in enumerate(handles)}
            history = []
            while not engine.is_idle:
                history.append([(places[id(d.handle)], *d[1:]) for d in engine.step()])
            histories.append((history, [handle.completions() for handle in handles]))
    assert all(history == histories[0] for history in histories), "down to the last bit of the log-probabilities"
    masks = [c.sampled_mask for completions in histories[0][1] for c in completions]
    assert sum(not all(mask) for mask in masks) >= 2, "tools were called"


def test_a_cancelled_call_is_forgotten_and_its_row_is_free(lab) -> None:
    is_over = threading.Event()
    engine = build(lab, lambda code: str(is_over.wait(HANG_LIMIT_S)), tool_timeout_s=HANG_LIMIT_S, num_slots=1)
    (handle,) = ask(lab, engine, "?")
    run_until(engine, lambda: handle.sequences[0].is_calling)
    handle.cancel()
    (other,) = ask(lab, engine, "a")
    deltas = run_until(engine, lambda: other.is_done)
    assert deltas[0] == Delta(handle, 0, (), (), "cancelled")
    is_over.set()
    assert len(handle.completions()[0].token_ids) == 3


def test_output_joins_a_sequence_that_goes_on_under_new_weights(lab) -> None:
    is_open = threading.Event()
    engine = build(lab, lambda code: str(is_open.wait(HANG_LIMIT_S)), tool_timeout_s=HANG_LIMIT_S, num_slots=2)
    (handle,) = ask(lab, engine, "?")
    run_until(engine, lambda: handle.sequences[0].is_calling)
    engine.load(lab.scripted(SCRIPT).state_dict(), version=1)
    is_open.set()
    lab.run(engine)
    (completion,) = handle.completions()
    assert text_of(lab, completion) == answered("4", "True")
    assert completion.weights_versions == ((0, 3), (1, len(completion.token_ids) - 3))


def tool_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "tools"}


def test_so_many_threads_may_hang_and_no_more(lab) -> None:
    before, is_over = tool_threads(), threading.Event()
    runner = ToolRunner(lambda code: str(is_over.wait(HANG_LIMIT_S)), lab.tokenizer, timeout_s=0.02)
    try:
        calls = [runner.start(lab.ids("1"), join_step=0) for _ in range(MAX_STUCK + 5)]
        for call in calls:
            runner.wait(call)
        late = runner.start(lab.ids("1"), join_step=0)
        assert late.done.is_set() and late.output == f"error: {MAX_STUCK} earlier calls never returned"
        assert {call.output for call in calls[:MAX_STUCK]} == {"error: no result within 0.02 s"}
        assert {call.output for call in calls[MAX_STUCK:]} == {late.output}
        stuck = tool_threads() - before
        assert len(stuck) == MAX_STUCK
    finally:
        is_over.set()
    for thread in stuck:
        thread.join(HANG_LIMIT_S)
        assert not thread.is_alive()


def test_threads_end_with_the_engine(lab) -> None:
    before = tool_threads()
    engine = build(lab, lambda code: "x")
    engine.generate([lab.prompt("?")], GREEDY)
    own, gone = tool_threads() - before, weakref.ref(engine)
    assert len(own) == 1
    del engine
    gc.collect()
    assert gone() is None
    for thread in own:
        thread.join(HANG_LIMIT_S)
        assert not thread.is_alive()
