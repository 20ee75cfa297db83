"""BOS-aligned best-fit packing: which pieces of which documents make up each training row.

Works on document lengths alone, so that every rank can replay the whole plan and read only its own
rows. The plan is a pure function of (document lengths, seed, epoch): one global sequence of rows.

A row holds ``sequence_len + 1`` tokens (inputs are all but the last, targets all but the first) and
starts with BOS. It is filled from a pool of documents: the largest that fits whole in the remaining
space goes in. When none fits, what happens depends on the mode: the shortest is cut to fill the row exactly (text, for
pretraining), or the rest of the row stays empty and nothing is ever cut (conversations).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

LongDocuments = Literal["crop", "carry"]
Filling = Literal["crop", "carry", "pad"]

POOL_SIZE = 1000
"""Documents to choose from: more of them leave fewer to be cut."""

SHARDS_PER_WINDOW = 64
"""Documents are shuffled over this many shards at once; bounds what a shuffle must know of a large corpus."""


class ShardLengths(Protocol):
    """What packing knows of a shard. ``lengths`` holds tokens per document, BOS counted, in the order on disk."""

    @property
    def num_documents(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray: ...


class Piece(NamedTuple):
    """Tokens ``start : start + length`` of a document of its split.

    Where ``start`` is 0 they open with the document's own BOS. Where it is not (``long_documents="carry"``) a BOS is
    put before them, and the piece takes ``length + 1`` tokens of its row.
    """

    document_idx: int
    start: int
    length: int


Row = tuple[Piece, ...]


def shuffle(num_items: int, *address: int) -> np.ndarray:
    """Return a permutation of ``range(num_items)`` drawn at ``address`` (seed first), the same on every machine.

    Sorts the raw draws of PCG64, whose stream NumPy promises to keep; that of ``Generator.permutation`` it does not.
    """
    entropy = [number % 2**64 for number in address]
    draws = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(num_items)
    return np.argsort(np.atleast_1d(draws), kind="stable")


def document_order(
    shards: Sequence[ShardLengths], *, seed: int | None, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (document indices, their lengths), shuffled by (seed, epoch); ``seed=None`` keeps the order on disk.

    Shards are shuffled, then the documents of each window of SHARDS_PER_WINDOW shards together.
    """
    first_document = np.cumsum([0] + [shard.num_documents for shard in shards])
    order = np.arange(len(shards)) if seed is None else shuffle(len(shards), seed, epoch)
    for start in range(0, len(shards), SHARDS_PER_WINDOW):
        window = order[start : start + SHARDS_PER_WINDOW].tolist()
        lengths = np.concatenate([shards[shard_idx].lengths for shard_idx in window])
        documents = np.concatenate(
            [first_document[idx] + np.arange(shards[idx].num_documents, dtype=np.int64) for idx in window]
        )
        if seed is not None:
            permutation = shuffle(len(documents), seed, epoch, 1 + start // SHARDS_PER_WINDOW)
            documents, lengths = documents[permutation], lengths[permutation]
        yield documents, lengths


@dataclass
class RowPlan:
    """The rows of one epoch, in order. Iterating plans them anew each time.

    ``filling`` says what happens to a row whose rest no document of the pool fits: the shortest is cut, and what is
    left of it dropped ("crop") or kept ("carry"); or the row is left short ("pad"), as is the last row, and every
    document, none of them longer than a row, is in exactly one row.

    The counts describe the rows planned so far by the latest iteration: ``num_cropped_tokens`` were cut from
    documents and dropped (always 0 but for "crop"), ``num_tail_tokens`` could not fill a last row (always 0 for "pad").
    """

    shards: Sequence[ShardLengths]
    sequence_len: int
    filling: Filling
    seed: int | None
    epoch: int = 0
    pool_size: int = POOL_SIZE
    num_rows: int = field(default=0, init=False)
    num_cropped_tokens: int = field(default=0, init=False)
    num_tail_tokens: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Row]:
        assert self.filling in ("crop", "carry", "pad"), self.filling
        self.num_rows = self.num_cropped_tokens = self.num_tail_tokens = 0
        # The pool, sorted by cost: the tokens a document takes of a row, with its BOS. Parallel lists, since
        # bisect on plain integers is what makes this fast. Among equals the oldest stands last and goes first.
        costs: list[int] = []
        documents: list[tuple[int, int]] = []

        def put(cost: int, document_idx: int, start: int) -> None:
            at = bisect_left(costs, cost)
            costs.insert(at, cost)
            documents.insert(at, (document_idx, start))

        fresh = self._fresh_documents()
        space = capacity = self.sequence_len + 1
        row: list[Piece] = []
        while True:
            while len(costs) < self.pool_size:
                arrival = next(fresh, None)
                if arrival is None:
                    break
                put(arrival[1], arrival[0], 0)
            if not costs:
                break
            at = bisect_right(costs, space) - 1
            fits = at >= 0
            if fits or self.filling != "pad":
                cost = costs.pop(at if fits else 0)
                document_idx, start = documents.pop(at if fits else 0)
                taken = min(cost, space)
                length = taken - 1 if start else taken
                row.append(Piece(document_idx, start, length))
                space -= taken
                if not fits and self.filling == "carry":
                    put(cost - taken + 1, document_idx, start + length)
                elif not fits:
                    self.num_cropped_tokens += cost - taken
            if not space or (not fits and self.filling == "pad"):
                assert row, "a document that is to stay whole is longer than a row"
                self.num_rows += 1
                yield tuple(row)
                row.clear()
                space = capacity
        if row and self.filling == "pad":
            self.num_rows += 1
            yield tuple(row)
        else:
            self.num_tail_tokens = sum(piece.length for piece in row)

    def _fresh_documents(self) -> Iterator[tuple[int, int]]:
        for documents, lengths in document_order(self.shards, seed=self.seed, epoch=self.epoch):
            yield from zip(documents.tolist(), lengths.tolist(), strict=True)
