"""Who runs next: first come, first served, into the rows that are free. Torch-free.

The running sequences always fill the first rows, so that a decode step works on as few as there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rayllm.engine.sequence import SequenceState


@dataclass
class Scheduler:
    """`running[i]` is the sequence in row i of the cache."""

    num_slots: int
    waiting: deque[SequenceState] = field(default_factory=deque)
    running: list[SequenceState] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, sequences: Iterable[SequenceState]) -> None:
        self.waiting.extend(sequences)

    def admit(self) -> list[tuple[int, SequenceState]]:
        """Move waiting sequences into free rows; returns (row, sequence) of each."""
        admitted = []
        while self.waiting and len(self.running) < self.num_slots:
            sequence = self.waiting.popleft()
            admitted.append((len(self.running), sequence))
            self.running.append(sequence)
        return admitted

    def remove_finished(self) -> list[tuple[int, int | None]]:
        """Drop finished sequences; returns, in order, each row freed and the row that moves there (None: none does)."""
        moves: list[tuple[int, int | None]] = []
        for row_idx in reversed(range(len(self.running))):
            if self.running[row_idx].finish_reason is None:
                continue
            last = self.running.pop()
            last_idx = len(self.running)
            if row_idx == last_idx:
                moves.append((row_idx, None))
            else:
                self.running[row_idx] = last
                moves.append((row_idx, last_idx))
        return moves
