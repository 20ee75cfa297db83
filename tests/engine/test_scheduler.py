"""The scheduler and its table of prompts, driven by a runner that only notes what lies where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.config.schema import SamplingConfig
from rayllm.engine.prefixes import Prefix, PrefixTable
from rayllm.engine.request import Handle, Request
from rayllm.engine.scheduler import Chunk, Keep, Move, Scheduler, Work, batches
from rayllm.engine.sequence import Dialect, SequenceState
from rayllm.types import Prompt

WINDOW = 24
VOCAB = 50
DIALECT = Dialect(stop_ids=frozenset({0}), python_start=-1, python_end=-2)


def build_sequence(prompt_ids: Sequence[int], max_tokens: int, sample_idx: int = 0) -> SequenceState:
    request = Request(Prompt("p", tuple(prompt_ids)), SamplingConfig(max_tokens=max_tokens))
    return SequenceState(
        handle=Handle(request),
        prompt_ids=request.prompt.token_ids,
        sample_idx=sample_idx,
        sampling=request.sampling,
        seed=sample_idx,
        max_tokens=max_tokens,
        dialect=DIALECT,
    )


def next_token(seen: Sequence[int], seed: int, version: int) -> int:
    """What a model with that window would say."""
    number = seed + 7 * version
    for token in seen:
        number = (number * 31 + token + 1) % 1_000_003
    return number % VOCAB


class RingRow:
    """A row of a cache that keeps what its window and a chunk need."""

    def __init__(self, capacity: int) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * capacity

    def store(self, start: int, tokens: Sequence[int]) -> None:
        for position, token in enumerate(tokens, start):
            self.slots[position % len(self.slots)] = (position, token)

    def read(self, start: int, end: int) -> list[int]:
        """The tokens at these positions, which must be there."""
        found = [self.slots[position % len(self.slots)] for position in range(start, end)]
        assert [held and held[0] for held in found] == list(range(start, end)), "overwritten, or never written"
        return [held[1] for held in found if held is not None]


class NotingRunner:
    """Takes the orders that the tensors would get, and gives as "logits" the tokens that the window shows."""

    def __init__(self, num_slots: int, num_prompts: int, chunk_len: int, row_chunk_len: int) -> None:
        self.capacity, self.row_capacity = WINDOW + chunk_len, WINDOW + row_chunk_len
        self.prompts = [RingRow(self.capacity) for _ in range(num_prompts)]
        self.rows = [RingRow(self.row_capacity) for _ in range(num_slots)]
        self.prompt_logits: dict[int, list[int]] = {}
        self.row_logits: dict[int, list[int]] = {}

    def prompt_cut(self, length: int) -> int:
        return length - self.capacity + WINDOW if length > self.capacity else 0

    def row_cut(self, length: int) -> int:
        return length - self.row_capacity + WINDOW if length > self.row_capacity else 0

    def seen(self, prompt_row: int, base: int, row_idx: int, end: int) -> list[int]:
        """What a window that ends at a position shows, of a prompt and what a row added to it."""
        start = max(0, end - WINDOW - 1)
        prompt = self.prompts[prompt_row].read(min(start, base), min(end, base))[max(0, start - min(start, base)) :]
        return prompt + self.rows[row_idx].read(max(start, base) - base, end - base)

    def copy_prompt(self, to_row: int, from_row: int, length: int) -> None:
        slots = self.prompts[from_row].slots[:length]
        self.prompts[to_row].slots[: len(slots)] = slots

    def run(self, chunk: Chunk) -> None:
        end = chunk.start + len(chunk.token_ids)
        if chunk.prefix_row is None:
            start = max(0, chunk.start - WINDOW)
            assert ([-1, *self.prompts[chunk.row_idx].read(start, chunk.start)])[-1] == chunk.before
            self.prompts[chunk.row_idx].store(chunk.start, chunk.token_ids)
            self.prompt_logits[chunk.row_idx] = self.prompts[chunk.row_idx].read(max(0, end - WINDOW - 1), end)
        else:
            assert self.seen(chunk.prefix_row, chunk.base, chunk.row_idx, chunk.start)[-1] == chunk.before
            self.rows[chunk.row_idx].store(chunk.start - chunk.base, chunk.token_ids)
            self.row_logits[chunk.row_idx] = self.seen(chunk.prefix_row, chunk.base, chunk.row_idx, end)

    def change(self, change: Keep | Move) -> None:
        if isinstance(change, Move):
            self.rows[change.to_row].slots[: change.length] = self.rows[change.from_row].slots[: change.length]
            self.row_logits[change.to_row] = self.row_logits.pop(change.from_row)
            return
        self.copy_prompt(change.to_prompt, change.from_prompt, change.base)
        first = max(0, change.length - min(self.capacity, self.row_capacity))
        self.prompts[change.to_prompt].store(change.base + first, self.rows[change.from_row].read(first, change.length))


@dataclass
class Asked:
    """It comes `gap` steps after the one before. Its prompt is the first `cut` tokens of a text, or, where it `follows`
    an earlier request, of what that has by then; and `num_own` others."""

    gap: int
    text_idx: int
    cut: int
    num_own: int
    follows: int | None
    num_samples: int
    max_tokens: int
    cancel_after: int | None


@dataclass
class Simulation:
    """The engine's step, without tensors; every step is checked."""

    num_slots: int
    num_prompts: int
    token_budget: int
    chunk_len: int
    keeps: bool
    row_chunk_len: int = 8
    sequences: list[SequenceState] = field(default_factory=list)
    started: list[SequenceState] = field(default_factory=list)
    tool_ends: dict[int, int] = field(default_factory=dict)  # sequence's number -> step
    version: int = 0
    step_idx: int = 0

    def __post_init__(self) -> None:
        self.runner = NotingRunner(self.num_slots, self.num_prompts, self.chunk_len, self.row_chunk_len)
        self.scheduler = Scheduler(
            self.num_slots,
            PrefixTable(self.num_prompts),
            token_budget=self.token_budget,
            chunk_len=self.chunk_len,
            row_chunk_len=self.row_chunk_len,
            prompt_cut=self.runner.prompt_cut,
            row_cut=self.runner.row_cut,
        )

    def submit(self, prompt_ids: Sequence[int], num_samples: int, max_tokens: int) -> list[SequenceState]:
        new = [build_sequence(prompt_ids, max_tokens, i) for i in range(num_samples)]
        self.sequences += new
        self.scheduler.submit(new)
        return new

    def swap(self) -> None:
        self.version += 1
        self.scheduler.start_over()
        assert not self.scheduler.running and not len(self.scheduler.prefixes)

    def step(self) -> None:
        self.step_idx += 1
        self.scheduler.cancelled()
        self._remove_finished()
        self._join_tools()
        work = self.scheduler.plan()
        self._check_budget(work.chunks)
        self.do(work)
        for row_idx, from_prompt in self.scheduler.admit():
            self.runner.row_logits[row_idx] = self.runner.prompt_logits[from_prompt]
            self.started.append(self.scheduler.running[row_idx])
        for row_idx, sequence in enumerate(self.scheduler.running):
            if not sequence.num_due and not sequence.is_calling and sequence.finish_reason is None:
                self._draw(row_idx, sequence)
        self._remove_finished()
        self._decode()
        self.check()

    def do(self, work: Work) -> None:
        for row_idx in work.clears:
            self.runner.prompts[row_idx] = RingRow(self.runner.capacity)
        for copy in work.copies:
            self.runner.copy_prompt(*copy)
        assert sorted(map(id, work.chunks)) == sorted(id(c) for batch in batches(work.chunks) for c in batch)
        for chunk in work.chunks:
            self.runner.run(chunk)

    def _join_tools(self) -> None:
        for number, sequence in enumerate(self.sequences):
            if sequence.is_calling and self.tool_ends[number] <= self.step_idx:
                sequence.is_calling = False
                output = [(number + i) % VOCAB for i in range(self.tool_ends[number] % 5)]
                sequence.insert(output, self.version)

    def _draw(self, row_idx: int, sequence: SequenceState) -> None:
        token = next_token(self.runner.row_logits[row_idx], sequence.seed, self.version)
        sequence.add(token, -1.0, (), self.version)
        assert sequence.prefix is not None
        sequence.prefix.is_sound = True
        if token % 10 == 3 and sequence.finish_reason is None:
            sequence.is_calling = True
            self.tool_ends[self.sequences.index(sequence)] = self.step_idx + 1 + token // 10

    def _remove_finished(self) -> None:
        for change in self.scheduler.remove_finished(keeps=self.keeps):
            self.runner.change(change)

    def _decode(self) -> None:
        for row_idx, sequence in enumerate(self.scheduler.running):
            if not sequence.num_due:
                continue
            position, prefix = sequence.num_cached, sequence.prefix
            assert prefix is not None
            token, before, base = sequence.token(position), sequence.token(position - 1), len(sequence.prompt_ids)
            self.runner.run(Chunk(row_idx, position, (token,), before, base, prefix.row_idx))
            sequence.num_cached += 1

    def _check_budget(self, chunks: list[Chunk]) -> None:
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self.token_budget
        for chunk in chunks:
            most = self.chunk_len if chunk.prefix_row is None else self.row_chunk_len
            assert 0 < len(chunk.token_ids) <= most
        places = [(chunk.prefix_row is None, chunk.row_idx) for chunk in chunks]
        assert len(set(places)) == len(places), "two chunks in one row"

    def check(self) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        live = [*running, *waiting]
        assert len(running) <= self.num_slots and len(set(map(id, live))) == len(live)
        assert {id(s) for s in self.sequences if s.finish_reason is None} <= set(map(id, live)), "one is lost"
        users: dict[int, list[SequenceState]] = {}
        for sequence in live:
            if sequence.prefix is not None:
                users.setdefault(id(sequence.prefix), []).append(sequence)
        prefixes: dict[int, Prefix] = {id(s.prefix): s.prefix for s in live if s.prefix is not None}
        for key, prefix in prefixes.items():
            assert prefix.num_users == len(users[key])
            assert 0 <= prefix.row_idx < self.num_prompts
        rows = [prefix.row_idx for prefix in prefixes.values()]
        assert len(set(rows)) == len(rows), "a row was given up while it had users"
        assert len(self.scheduler.prefixes) <= self.num_prompts
        for row_idx, sequence in enumerate(running):
            assert sequence.prefix is not None and sequence.prefix.token_ids == sequence.prompt_ids
            end = sequence.num_cached
            held = self.runner.seen(sequence.prefix.row_idx, len(sequence.prompt_ids), row_idx, end)
            assert held == list(sequence.tokens(max(0, end - WINDOW - 1), end))


TEXTS = [[(i * i + 13 * i + text_idx) % VOCAB for i in range(200)] for text_idx in range(3)]

asked = st.builds(
    Asked,
    gap=st.integers(0, 6),
    text_idx=st.integers(0, 2),
    cut=st.integers(0, 120) | st.integers(40, 64),
    num_own=st.integers(1, 5),
    follows=st.none() | st.integers(0, 12),
    num_samples=st.integers(1, 4),
    max_tokens=st.integers(1, 60),
    cancel_after=st.none() | st.integers(0, 30),
)


@settings(max_examples=80)
@given(
    num_slots=st.integers(1, 5),
    num_prompts=st.sampled_from([1, 1, 2, 3, 6]),
    token_budget=st.integers(1, 60),
    chunk_len=st.integers(1, 20),
    row_chunk_len=st.integers(1, 20),
    keeps=st.booleans(),
    requests=st.lists(asked, min_size=1, max_size=14),
    swaps=st.sets(st.integers(0, 120), max_size=3),
)
def test_whatever_is_asked_all_is_done_in_order_and_nothing_is_left(
    num_slots: int,
    num_prompts: int,
    token_budget: int,
    chunk_len: int,
    row_chunk_len: int,
    keeps: bool,
    requests: list[Asked],
    swaps: set[int],
) -> None:
    simulation = Simulation(num_slots, num_prompts, token_budget, chunk_len, keeps, row_chunk_len)
    samples: list[list[SequenceState]] = []
    cancels: dict[int, list[SequenceState]] = {}
    arrivals: dict[int, list[Asked]] = {}
    arrival = 0
    for request in requests:
        arrival += request.gap
        arrivals.setdefault(arrival, []).append(request)
    for step_idx in range(20_000):
        for request in arrivals.pop(step_idx, []):
            text = TEXTS[request.text_idx]
            if request.follows is not None and request.follows < len(samples):
                earlier = samples[request.follows][0]
                text = [*earlier.prompt_ids, *earlier.token_ids]
            prompt_ids = [*text[: request.cut], *range(request.num_own)]
            samples.append(simulation.submit(prompt_ids, request.num_samples, request.max_tokens))
            if request.cancel_after is not None:
                cancels.setdefault(step_idx + request.cancel_after, []).append(samples[-1][-1])
        for sequence in cancels.pop(step_idx, []):
            sequence.finish("cancelled")
        if step_idx in swaps:
            simulation.swap()
        simulation.step()
        if simulation.scheduler.is_idle and not arrivals:
            break
    else:
        raise AssertionError("somebody starves")

    for sequence in simulation.sequences:
        assert sequence.finish_reason is not None
        tokens, drawn_by = (
            [*sequence.prompt_ids, *sequence.token_ids],
            [v for v, n in sequence.versions for _ in range(n)],
        )
        for t, is_sampled in enumerate(sequence.sampled):
            end = len(sequence.prompt_ids) + t
            seen = tokens[max(0, end - WINDOW - 1) : end]
            assert not is_sampled or tokens[end] == next_token(seen, sequence.seed, drawn_by[t])
        if sequence.finish_reason == "length":
            assert len(sequence.token_ids) == sequence.max_tokens
    first_starts = list({id(s): s for s in simulation.started}.values())
    numbers = {id(s): number for number, s in enumerate(simulation.sequences)}
    assert [numbers[id(s)] for s in first_starts] == sorted(numbers[id(s)] for s in first_starts), "overtaken"
    simulation.scheduler.prefixes.clear()  # asserts that none has users


def run(simulation: Simulation, sequence: SequenceState) -> SequenceState:
    for _ in range(1000):
        if sequence.finish_reason is not None:
            return sequence
        simulation.step()
    raise AssertionError("never done")


def test_a_prompt_in_use_keeps_its_row_when_a_sequence_ends_with_the_same_tokens() -> None:
    """A sequence ends with just the tokens that another request, which still runs, has as its prompt."""
    foreseen = Simulation(num_slots=1, num_prompts=1, token_budget=100, chunk_len=20, keeps=False)
    (first,) = foreseen.submit(range(1, 20), num_samples=1, max_tokens=12)
    run(foreseen, first)
    simulation = Simulation(num_slots=3, num_prompts=4, token_budget=100, chunk_len=20, keeps=True)
    (again,) = simulation.submit(first.prompt_ids, num_samples=1, max_tokens=12)
    (second,) = simulation.submit(first.tokens(0, first.num_cached), num_samples=1, max_tokens=50)
    run(simulation, again)
    assert again.token_ids == first.token_ids and second.finish_reason is None
    for text in TEXTS:
        simulation.submit(text[:30], num_samples=1, max_tokens=2)
    run(simulation, second)


def test_a_prompt_that_was_cut_back_is_cut_back_no_further_than_it_reaches() -> None:
    """The second prompt overwrites the end of the first in its row; what the third would need is older than the row
    holds, though not older than one would hold that had always been that short."""
    simulation = Simulation(num_slots=1, num_prompts=1, token_budget=100, chunk_len=16, keeps=False)
    assert simulation.runner.capacity == 40
    for prompt_ids in (TEXTS[0][:60], [*TEXTS[0][:55], 1, 2], [*TEXTS[0][:43], 3]):
        sequence = run(simulation, *simulation.submit(prompt_ids, num_samples=1, max_tokens=1))
        assert sequence.token_ids == [next_token(prompt_ids[-WINDOW - 1 :], 0, 0)]


def test_rows_stay_dense_and_nobody_is_overtaken() -> None:
    scheduler = Scheduler(3, PrefixTable(3), token_budget=100, chunk_len=10, row_chunk_len=10)
    sequences = [build_sequence([1, 2, 3], 5, i) for i in range(7)]
    scheduler.submit(sequences)
    (chunk,) = scheduler.plan().chunks
    assert chunk == Chunk(0, 0, (1, 2, 3), -1), "one prompt, computed once"
    assert [tuple(start) for start in scheduler.admit()] == [(0, 0), (1, 0), (2, 0)]
    sequences[0].finish("stop")
    sequences[2].finish("stop")
    assert scheduler.remove_finished(keeps=False) == [Move(0, 1, 0)]
    assert scheduler.running == [sequences[1]] and not any(scheduler.plan())
    assert [tuple(start) for start in scheduler.admit()] == [(1, 0), (2, 0)]
    assert scheduler.running == [sequences[1], sequences[3], sequences[4]]


@pytest.mark.parametrize("budget", [1, 7, 30])
def test_a_long_prompt_stops_nobody_and_is_cut_to_the_budget(budget: int) -> None:
    scheduler = Scheduler(2, PrefixTable(2), token_budget=budget, chunk_len=10, row_chunk_len=10)
    short, long = build_sequence([5], 99), build_sequence(TEXTS[0][:100], 99)
    scheduler.submit([short, long])
    lengths = []
    while long not in scheduler.running:
        lengths.append(sum(len(chunk.token_ids) for chunk in scheduler.plan().chunks))
        scheduler.admit()
        assert short in scheduler.running
    assert sum(lengths) == 101 and set(lengths[1:-1]) == {min(budget, 10)}


def test_a_dialogue_goes_on_where_it_ended() -> None:
    """Of the second turn only what is new is computed; of one that shares no more than a few tokens, everything."""
    simulation = Simulation(num_slots=1, num_prompts=3, token_budget=200, chunk_len=200, keeps=True)
    (first,) = simulation.submit(TEXTS[1][:40], num_samples=1, max_tokens=8)
    run(simulation, first)
    for prompt_ids, num_computed in (
        ([*first.prompt_ids, *first.token_ids, 9, 9, 9], 4),
        ([*first.prompt_ids[:30], 9, 9], 2),
        ([*first.prompt_ids[:10], 9, 9], 12),
    ):
        (again,) = simulation.submit(prompt_ids, num_samples=1, max_tokens=1)
        work = simulation.scheduler.plan()
        assert sum(len(chunk.token_ids) for chunk in work.chunks) == num_computed
        simulation.do(work)
        simulation.step()
        assert again.finish_reason == "length"
