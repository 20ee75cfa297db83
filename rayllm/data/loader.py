"""Batches of tokens for training and validation, with exact resume.

Training reads one endless global sequence of rows, epoch after epoch. A step takes the next ``rows_per_step`` of
them, and rank r of W the rows r, r + W, ... among these: every world size sees the same rows in the same steps.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rayllm.data.packing import LongDocuments, Row, RowPlan
from rayllm.data.shards import Split, SplitTokens, TokenShards
from rayllm.model.segments import Segments

_T = TypeVar("_T")


@dataclass(frozen=True)
class DataPosition:
    """The next row to read: ``row_idx`` within ``epoch``."""

    epoch: int = 0
    row_idx: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """Rows to run forward at once: int64 inputs and the tokens that follow them (-1: no target). With segments the
    documents of a row do not see each other."""

    inputs_BT: Tensor
    targets_BT: Tensor
    segments: Segments | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch for a model on another device."""
        segments = None if self.segments is None else self.segments.to(device)
        return TokenBatch(self.inputs_BT.to(device), self.targets_BT.to(device), segments)


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step, and where the global sequence stands after it."""

    micro_batches: tuple[TokenBatch, ...]
    position: DataPosition

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads for it, padding included."""
        return sum(micro_batch.inputs_BT.numel() for micro_batch in self.micro_batches)


def step_batches(
    shards: TokenShards,
    *,
    rows_per_step: int,
    rows_per_micro_batch: int,
    sequence_len: int,
    rank: int,
    world_size: int,
    seed: int,
    long_documents: LongDocuments,
    isolate: bool = False,
    position: DataPosition = DataPosition(),
    prefetch: int = 2,
) -> Generator[StepBatch, None, None]:
    """Yield this rank's batches of the training split from ``position`` on, without end; ``isolate`` gives segments.

    Micro-batches hold ``rows_per_micro_batch`` rows, the last of a step what is left. A background thread keeps
    ``prefetch`` steps ready (0: none does); it ends when the generator is closed or dropped, and what fails in it is
    raised here. Continuing from the position of a batch gives exactly the batches that came after it.

    Raises ValueError, at the call, when the rows do not divide among the ranks or the split does not fill one row;
    while reading, when a shard is damaged or ``position`` lies outside of these shards.
    """
    assert 0 <= rank < world_size and rows_per_micro_batch > 0 and prefetch >= 0
    if rows_per_step <= 0 or rows_per_step % world_size:
        raise ValueError(
            f"{rows_per_step} rows per step do not divide among {world_size} workers; choose tokens_per_step as a "
            f"multiple of sequence_len * num_workers = {sequence_len * world_size}, or another number of workers"
        )
    split = split_with_rows(shards, "train", sequence_len)

    def steps() -> Iterator[StepBatch]:
        rows = _endless_rows(split, sequence_len, seed, long_documents, position)
        while True:
            taken = list(islice(rows, rows_per_step))
            own = [row for _, row in taken[rank::world_size]]
            yield StepBatch(tuple(_collate(split, own, rows_per_micro_batch, sequence_len, isolate)), taken[-1][0])

    return prefetched(steps(), prefetch)


def validation_batches(
    shards: TokenShards,
    *,
    rows_per_batch: int,
    sequence_len: int,
    max_tokens: int,
    long_documents: LongDocuments,
    isolate: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TokenBatch]:
    """Yield this rank's batches of the validation rows: the same rows on every call and for every world size.

    Together the ranks read all rows of ``sequence_len`` targets, or, where these are more than ``max_tokens``, as many
    as that allows at even distances, so that they still speak for every source. Ranks may differ by one row, and hence
    by one batch. Raises ValueError, at the call, when there is not one row.
    """
    assert 0 <= rank < world_size and rows_per_batch > 0
    if max_tokens < sequence_len:
        raise ValueError(
            f"{max_tokens} validation tokens are less than one row of {sequence_len}; ask for more (eval_tokens)"
        )
    split = split_with_rows(shards, "val", sequence_len)
    rows = list(RowPlan(split.shards, sequence_len, long_documents, seed=None))
    num_rows = min(len(rows), max_tokens // sequence_len)
    chosen = [rows[idx * len(rows) // num_rows] for idx in range(rank, num_rows, world_size)]
    return _collate(split, chosen, rows_per_batch, sequence_len, isolate)


def split_with_rows(shards: TokenShards, name: Split, sequence_len: int) -> SplitTokens:
    """The split, after checking that it fills a row: any split of at least as many tokens does."""
    split = shards.split(name)
    if split.num_tokens <= sequence_len:
        cure = "hold out more of it (validation.fraction)" if name == "val" else "tokenize more of it"
        raise ValueError(
            f"too little text: the {name} split of {shards.directory} has {split.num_tokens} tokens, and one row needs "
            f"{sequence_len + 1}; {cure}, or lower model.sequence_len"
        )
    return split


def _endless_rows(
    split: SplitTokens, sequence_len: int, seed: int, long_documents: LongDocuments, position: DataPosition
) -> Iterator[tuple[DataPosition, Row]]:
    """(position after the row, row) from ``position`` on. The rows before it are planned again, none of them read."""
    epoch, first = position.epoch, position.row_idx
    while True:
        plan = RowPlan(split.shards, sequence_len, long_documents, seed, epoch)
        for row_idx, row in enumerate(plan):
            if row_idx >= first:
                yield DataPosition(epoch, row_idx + 1), row
        assert plan.num_rows, "a split that fills a row gave none"
        if first > plan.num_rows:
            raise ValueError(
                f"cannot resume at row {first} of epoch {epoch}: it has {plan.num_rows} rows; the shards or "
                "sequence_len are not those that the checkpoint was trained on"
            )
        epoch, first = epoch + 1, 0


def _collate(
    split: SplitTokens, rows: list[Row], rows_per_batch: int, sequence_len: int, isolate: bool
) -> Iterator[TokenBatch]:
    """Read rows from disk, ``rows_per_batch`` at a time; the last batch may be smaller."""
    for first in range(0, len(rows), rows_per_batch):
        batch = rows[first : first + rows_per_batch]
        tokens = np.empty((len(batch), sequence_len + 1), np.int64)
        for row_tokens, row in zip(tokens, batch, strict=True):
            at = 0
            for document_idx, start, length in row:
                if start:
                    row_tokens[at] = split.bos_id
                    at += 1
                row_tokens[at : at + length] = split.tokens(document_idx, start, length)
                at += length
            assert at == sequence_len + 1, (at, row)
        tokens_BT = torch.from_numpy(tokens)
        lengths = [[length + bool(start) for _, start, length in row] for row in batch]
        segments = Segments.of_rows(lengths, sequence_len) if isolate else None
        yield TokenBatch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous(), segments)


@dataclass(frozen=True)
class _End:
    """Nothing more will come; with an error: because of it."""

    error: Exception | None = None


def prefetched(produced: Iterator[_T], depth: int) -> Generator[_T, None, None]:
    """Yield from an iterator that a background thread advances, at most ``depth`` items ahead (0: no thread)."""
    if not depth:
        yield from produced
        return
    # The first item is made here, where Ctrl-C reaches it: a resume plans all the rows before its own for it.
    first = list(islice(produced, 1))
    ready: queue.Queue[_T | _End] = queue.Queue(depth)
    stopped = threading.Event()
    thread = threading.Thread(target=_produce, args=(produced, ready, stopped), daemon=True, name="prefetch")

    def stop() -> None:
        stopped.set()
        while not ready.empty():  # a producer that waits for room sees the event now
            ready.get_nowait()
        thread.join()

    thread.start()
    # For a generator that is still open when the interpreter ends: a thread that is inside torch then aborts it.
    atexit.register(stop)
    try:
        yield from first
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:  # also when the consumer closes or drops this generator
        atexit.unregister(stop)
        stop()


def _produce(produced: Iterator[_T], ready: queue.Queue[_T | _End], stopped: threading.Event) -> None:
    try:
        for item in produced:
            ready.put(item)
            if stopped.is_set():
                return
        ready.put(_End())
    except Exception as error:  # noqa: BLE001 - raised again by the consumer
        ready.put(_End(error))
