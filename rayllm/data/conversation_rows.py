"""Rows of whole conversations: packed by best fit, padded where nothing fits, targets only where something is learned.

The rows of a mixture are one global sequence, a pure function of its lengths and order. A step takes the next
``rows_per_step`` of them, and rank r of W the rows r, r + W, ... among these, as in pretraining.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayllm.data.conversations import Mixture
from rayllm.data.loader import DataPosition, StepBatch, TokenBatch, prefetched
from rayllm.data.packing import RowPlan
from rayllm.model.gpt import IGNORE_INDEX
from rayllm.model.segments import Segments

POOL_SIZE = 100
"""Conversations to choose from. A larger pool pads less, but keeps the short ones back for the end of the mixture."""

ConversationRow = tuple[int, ...]
"""Indices of the conversations that stand end to end in a row; none: a row of padding alone."""


@dataclass(frozen=True)
class _Lengths:
    """A mixture in its order, as packing sees it: one shard."""

    lengths: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.lengths)


class ConversationRows:
    """The rows of a mixture: every conversation whole and in as many rows as its task has epochs; with `isolate` none
    sees another."""

    def __init__(self, mixture: Mixture, sequence_len: int, *, isolate: bool = False) -> None:
        self.mixture, self.sequence_len, self._isolates = mixture, sequence_len, isolate
        order = mixture.order()
        lengths = mixture.lengths[order]
        plan = RowPlan([_Lengths(lengths)], sequence_len, "pad", seed=None, pool_size=POOL_SIZE)
        self.rows: list[ConversationRow] = [tuple(int(order[piece.document_idx]) for piece in row) for row in plan]
        self.num_tokens = int(lengths.sum())

    @property
    def padding_share(self) -> float:
        """Share of the rows' tokens that stand for nothing."""
        return 1 - self.num_tokens / (len(self.rows) * (self.sequence_len + 1))

    def step_batches(
        self,
        *,
        rows_per_step: int,
        rows_per_micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        position: DataPosition,
        prefetch: int = 2,
    ) -> Generator[StepBatch, None, None]:
        """Yield this rank's batches from `position` to the end of the mixture.

        The last step holds the rows that are left, and rows of padding alone where they do not divide among the
        ranks. Raises ValueError, at the call, when `position` lies outside of these rows.
        """
        assert 0 <= rank < world_size and rows_per_micro_batch > 0 and rows_per_step % world_size == 0
        if position.epoch or not 0 <= position.row_idx <= len(self.rows):
            raise ValueError(
                f"cannot resume at row {position.row_idx} of epoch {position.epoch}: the mixture has one epoch of "
                f"{len(self.rows)} rows; its conversations are not those that the checkpoint was trained on"
            )

        def steps() -> Iterator[StepBatch]:
            for first in range(position.row_idx, len(self.rows), rows_per_step):
                rows = self.rows[first : first + rows_per_step]
                end = DataPosition(0, first + len(rows))
                rows = rows + [()] * (-len(rows) % world_size)
                yield StepBatch(tuple(self._collate(rows[rank::world_size], rows_per_micro_batch)), end)

        return prefetched(steps(), prefetch)

    def batches(self, *, rows_per_batch: int, rank: int = 0, world_size: int = 1) -> Iterator[TokenBatch]:
        """Yield this rank's share of all rows once, for validation; ranks may differ by one batch."""
        return self._collate(self.rows[rank::world_size], rows_per_batch)

    def _collate(self, rows: Sequence[ConversationRow], rows_per_batch: int) -> Iterator[TokenBatch]:
        """Read rows, ``rows_per_batch`` at a time; the last batch may be smaller."""
        for first in range(0, len(rows), rows_per_batch):
            batch = rows[first : first + rows_per_batch]
            tokens = np.full((len(batch), self.sequence_len + 1), self.mixture.bos_id, np.int64)
            learned = np.zeros(tokens.shape, np.bool_)
            for row_idx, row in enumerate(batch):
                at = 0
                for conversation_idx in row:
                    ids, mask = self.mixture.tokens(conversation_idx)
                    tokens[row_idx, at : at + len(ids)] = ids
                    learned[row_idx, at : at + len(ids)] = mask
                    at += len(ids)
            targets = np.where(learned[:, 1:], tokens[:, 1:], IGNORE_INDEX)
            lengths = [[int(self.mixture.lengths[conversation_idx]) for conversation_idx in row] for row in batch]
            segments = Segments.of_rows(lengths, self.sequence_len) if self._isolates else None
            yield TokenBatch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), segments)
