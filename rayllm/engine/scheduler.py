"""Who runs next: first come, first served, into the rows that are free. Torch-free.

A prompt is computed once for all sequences that start with it; each of these gets a row for what it adds. Running
sequences always fill the first rows, so that a decode step works on as few as there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rayllm.engine.prefixes import Prefix, PrefixTable
from rayllm.engine.sequence import SequenceState


class Chunk(NamedTuple):
    """Tokens to run at positions from `start` on, which come after the token `before` (-1: none): in row `row_idx` of
    the prompts, or, where `prefix_row` is given, in a row that goes on from the `base` tokens of that prompt."""

    row_idx: int
    start: int
    token_ids: tuple[int, ...]
    before: int
    base: int = 0
    prefix_row: int | None = None


class PromptCopy(NamedTuple):
    """The first `length` tokens of one prompt also begin another."""

    to_prompt: int
    from_prompt: int
    length: int


class Work(NamedTuple):
    """Prompts' rows to clear, copies to make, then chunks to run."""

    clears: list[int]
    copies: list[PromptCopy]
    chunks: list[Chunk]


class Start(NamedTuple):
    """A row begins where a prompt ends."""

    row_idx: int
    from_prompt: int


class Keep(NamedTuple):
    """A prompt of `base` tokens and the `length` tokens that a row added to it become a prompt of their own."""

    to_prompt: int
    must_clear: bool
    from_prompt: int
    base: int
    from_row: int
    length: int


class Move(NamedTuple):
    """The `length` own tokens of one row go to another."""

    to_row: int
    from_row: int
    length: int


@dataclass
class Scheduler:
    """`running[i]` is the sequence in row i of at most `num_slots`.

    A step runs at most `token_budget` tokens besides one of each running sequence: at most `chunk_len` of one prompt,
    `row_chunk_len` of one row.
    """

    num_slots: int
    prefixes: PrefixTable
    token_budget: int
    chunk_len: int
    row_chunk_len: int
    prompt_cut: Callable[[int], int] = lambda length: 0
    row_cut: Callable[[int], int] = lambda length: 0
    """The least that a prompt, or what a row added, can be cut to from a length."""
    waiting: deque[SequenceState] = field(default_factory=deque)
    running: list[SequenceState] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, sequences: Iterable[SequenceState]) -> None:
        self.waiting.extend(sequences)

    def plan(self, *, starts: bool = True) -> Work:
        """What to compute before tokens are drawn: the tokens that running sequences owe (what a tool wrote), then, if
        any may start now, prompts of sequences for which a row is free. It counts as done."""
        work, room = Work([], [], []), self.token_budget
        for row_idx, sequence in enumerate(self.running):
            if sequence.num_due > 1 and room and sequence.finish_reason is None:
                start = sequence.num_cached
                end = start + min(sequence.num_due, self.row_chunk_len, room)
                work.chunks.append(self._own_chunk(row_idx, start, end))
                sequence.num_cached = end
                room -= end - start
        for prefix in self._prefixes_wanted(work) if starts else ():
            start = prefix.num_cached
            end = min(len(prefix.token_ids), start + self.chunk_len, start + room)
            if end > start:
                before = prefix.token_ids[start - 1] if start else -1
                work.chunks.append(Chunk(prefix.row_idx, start, prefix.token_ids[start:end], before))
                prefix.num_cached = end
                prefix.shortest_cut = max(prefix.shortest_cut, self.prompt_cut(end))
                room -= end - start
        return work

    def admit(self) -> list[Start]:
        """Give rows to waiting sequences whose prompts are ready."""
        starts = []
        while self.waiting and len(self.running) < self.num_slots:
            prefix = self.waiting[0].prefix
            if prefix is None or not prefix.is_ready:
                break
            sequence = self.waiting.popleft()
            sequence.num_cached = prefix.num_cached
            starts.append(Start(len(self.running), prefix.row_idx))
            self.running.append(sequence)
        return starts

    def cancelled(self) -> list[SequenceState]:
        """What was cancelled since the last step; drops those that wait."""
        found = [sequence for sequence in (*self.running, *self.waiting) if sequence.finish_reason == "cancelled"]
        if found:
            for sequence in self.waiting:
                if sequence.finish_reason is not None:
                    sequence.leave_prefix()
            self.waiting = deque(sequence for sequence in self.waiting if sequence.finish_reason is None)
        return found

    def remove_finished(self, *, keeps: bool, damaged: Collection[int] = ()) -> list[Keep | Move]:
        """Drop what has ended; returns, in order, what keeps it for prompts that go on from it (`keeps`, but no
        `damaged` rows) and what closes the gaps."""
        changes: list[Keep | Move] = []
        for row_idx in reversed(range(len(self.running))):
            sequence = self.running[row_idx]
            if sequence.finish_reason is None:
                continue
            if keeps and row_idx not in damaged and (kept := self._keep(row_idx)) is not None:
                changes.append(kept)
            sequence.leave_prefix()
            last = self.running.pop()
            if row_idx < len(self.running):
                self.running[row_idx] = last
                changes.append(Move(row_idx, len(self.running), last.num_own))
        return changes

    def start_over(self) -> None:
        """Nothing that is cached is true any more: what runs goes back to the head of the queue, in its order."""
        for sequence in (*self.waiting, *self.running):
            sequence.leave_prefix()
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        self.prefixes.clear()

    def _prefixes_wanted(self, work: Work) -> list[Prefix]:
        """Of the sequences that could start now, in their order; notes what new ones need and take from older ones."""
        wanted: dict[int, Prefix] = {}
        for sequence, _ in zip(self.waiting, range(self.num_slots - len(self.running)), strict=False):
            if sequence.prefix is None:
                prefix = self.prefixes.find(sequence.prompt_ids) or self._claim(sequence.prompt_ids, work)
                if prefix is None:
                    break
                sequence.prefix = prefix
                prefix.num_users += 1
            wanted[sequence.prefix.row_idx] = sequence.prefix
        return list(wanted.values())

    def _claim(self, prompt_ids: tuple[int, ...], work: Work) -> Prefix | None:
        shared = self.prefixes.find_shared(prompt_ids)
        prefix = self.prefixes.claim(prompt_ids)
        if prefix is None:
            return None
        if prefix.must_clear:
            work.clears.append(prefix.row_idx)
        if shared is not None:
            source, length = shared
            work.copies.append(PromptCopy(prefix.row_idx, source.row_idx, length))
            prefix.num_cached, prefix.shortest_cut = length, source.shortest_cut
        return prefix

    def _own_chunk(self, row_idx: int, start: int, end: int) -> Chunk:
        sequence = self.running[row_idx]
        assert sequence.prefix is not None
        tokens, before, base = sequence.tokens(start, end), sequence.token(start - 1), len(sequence.prompt_ids)
        return Chunk(row_idx, start, tokens, before, base, sequence.prefix.row_idx)

    def _keep(self, row_idx: int) -> Keep | None:
        sequence = self.running[row_idx]
        if not sequence.num_own:
            return None
        assert sequence.prefix is not None
        kept = self.prefixes.claim(sequence.tokens(0, sequence.num_cached))
        if kept is None:
            return None
        base, own_cut = len(sequence.prompt_ids), self.row_cut(sequence.num_own)
        cuts = (sequence.prefix.shortest_cut, self.prompt_cut(sequence.num_cached), base + own_cut if own_cut else 0)
        kept.num_cached, kept.shortest_cut = sequence.num_cached, max(cuts)
        kept.has_logits, kept.is_sound = False, True
        return Keep(kept.row_idx, kept.must_clear, sequence.prefix.row_idx, base, row_idx, sequence.num_own)


def batches(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks to run side by side: all of prompts that begin, or that go on, or of rows; no more padding than tokens."""

    def kind(chunk: Chunk) -> tuple[bool, bool]:
        return chunk.prefix_row is not None, chunk.start > 0

    found: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda c: (kind(c), -len(c.token_ids))):
        first = found[-1][0] if found else None
        if first is None or kind(first) != kind(chunk) or 2 * len(chunk.token_ids) < len(first.token_ids):
            found.append([])
        found[-1].append(chunk)
    return found
