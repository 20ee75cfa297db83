from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.data.packing import POOL_SIZE, LongDocuments, Row, RowPlan, document_order, shuffle


@dataclass
class Lengths:
    """The shard of a plan: its documents' lengths alone."""

    lengths: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.lengths)


def shards_of(*lengths: list[int]) -> list[Lengths]:
    return [Lengths(np.array(shard, np.int64)) for shard in lengths]


shard_lists = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40), min_size=1, max_size=4)
modes = st.sampled_from(["crop", "carry"])


def used_tokens(rows: list[Row]) -> Counter[tuple[int, int]]:
    """How often each (document, token) is in a row; a BOS put before a carried piece is no token of a document."""
    return Counter((doc, at) for row in rows for doc, start, length in row for at in range(start, start + length))


def cost(row: Row) -> int:
    return sum(piece.length + (piece.start > 0) for piece in row)


@settings(deadline=None)
@given(shard_lists, st.integers(1, 40), modes, st.integers(-3, 2**70), st.integers(0, 3))
def test_every_row_is_full_and_every_piece_lies_in_its_document(
    lengths: list[list[int]], sequence_len: int, mode: LongDocuments, seed: int, epoch: int
) -> None:
    plan = RowPlan(shards_of(*lengths), sequence_len, mode, seed, epoch)
    rows = list(plan)
    flat = [length for shard in lengths for length in shard]
    assert plan.num_rows == len(rows)
    for row in rows:
        assert cost(row) == sequence_len + 1
        for piece in row:  # a piece opens with BOS: the document's own (start 0) or one put before it
            assert piece.start >= 0 and piece.length >= (piece.start == 0)
            assert piece.start + piece.length <= flat[piece.document_idx]
    assert rows or sum(flat) < sequence_len + 1, "text for a row gives a row"


@settings(deadline=None)
@given(shard_lists, st.integers(1, 40), st.integers(0, 5))
def test_crop_uses_no_token_twice_and_counts_those_it_drops(
    lengths: list[list[int]], sequence_len: int, seed: int
) -> None:
    plan = RowPlan(shards_of(*lengths), sequence_len, "crop", seed)
    rows = list(plan)
    used = used_tokens(rows)
    assert all(piece.start == 0 for row in rows for piece in row)
    assert not used or max(used.values()) == 1
    assert used.total() + plan.num_cropped_tokens + plan.num_tail_tokens == sum(map(sum, lengths))


@settings(deadline=None)
@given(shard_lists, st.integers(1, 40), st.integers(0, 5))
def test_carry_uses_every_token_once_but_for_the_counted_tail(
    lengths: list[list[int]], sequence_len: int, seed: int
) -> None:
    plan = RowPlan(shards_of(*lengths), sequence_len, "carry", seed)
    used = used_tokens(list(plan))
    assert not used or max(used.values()) == 1
    assert used.total() + plan.num_tail_tokens == sum(map(sum, lengths))
    assert plan.num_tail_tokens <= sequence_len and plan.num_cropped_tokens == 0


@settings(deadline=None)
@given(shard_lists, st.integers(1, 40), modes)
def test_the_plan_is_a_function_of_lengths_seed_and_epoch(
    lengths: list[list[int]], sequence_len: int, mode: LongDocuments
) -> None:
    plan = RowPlan(shards_of(*lengths), sequence_len, mode, 7, 1)
    again = RowPlan(shards_of(*lengths), sequence_len, mode, 7, 1)
    assert list(plan) == list(again) == list(plan)


def test_best_fit_takes_the_largest_that_fits_and_cuts_the_shortest_when_none_does() -> None:
    # On disk order; 10 tokens a row. 7 fits first (largest under 10), then nothing fits 3, so 4, the shortest, is cut.
    shards = shards_of([12, 4, 7, 11])
    assert list(RowPlan(shards, 9, "crop", None)) == [((2, 0, 7), (1, 0, 3)), ((3, 0, 10),), ((0, 0, 10),)]
    carried = RowPlan(shards, 9, "carry", None)
    # What is left of document 1 is one token and a BOS before it: it fills the end of the next row but one.
    assert list(carried) == [
        ((2, 0, 7), (1, 0, 3)),
        ((1, 3, 1), (3, 0, 8)),
        ((3, 8, 3), (0, 0, 6)),
    ]
    assert carried.num_tail_tokens == 6


def test_a_space_of_one_token_takes_a_bos_and_loses_nothing_when_carrying() -> None:
    plan = RowPlan(shards_of([5, 9]), 5, "carry", None)
    assert list(plan)[0] == ((0, 0, 5), (1, 0, 1))
    assert list(plan)[1] == ((1, 1, 5),)


@settings(deadline=None)
@given(st.lists(st.integers(1, 31), max_size=80), st.sampled_from([1, 3, 100]))
def test_padding_keeps_every_document_whole_and_in_one_row(lengths: list[int], pool_size: int) -> None:
    plan = RowPlan(shards_of(lengths), 30, "pad", None, pool_size=pool_size)
    rows = list(plan)
    pieces = [piece for row in rows for piece in row]
    assert sorted(pieces) == [(idx, 0, length) for idx, length in enumerate(lengths)]
    assert all(0 < cost(row) <= 31 for row in rows)
    assert (plan.num_rows, plan.num_cropped_tokens, plan.num_tail_tokens) == (len(rows), 0, 0)
    assert all(cost(row) + rows[idx + 1][0].length > 31 for idx, row in enumerate(rows[:-1]) if pool_size > 80), (
        "a row ends only where nothing fits, so not even what opens the next one"
    )


def test_padding_fills_by_best_fit_and_leaves_the_rest_empty() -> None:
    rows = list(RowPlan(shards_of([4, 6, 3, 8]), 9, "pad", None))
    assert rows == [((3, 0, 8),), ((1, 0, 6), (0, 0, 4)), ((2, 0, 3),)]


def test_documents_are_chosen_from_a_pool() -> None:
    """The document that fits stands just inside of the pool, and just outside of it."""
    for place, is_seen in ((POOL_SIZE - 1, True), (POOL_SIZE, False)):
        lengths = [20] * (POOL_SIZE + 1)
        lengths[place] = 10
        first_row = next(iter(RowPlan(shards_of(lengths), 9, "crop", None)))
        assert (first_row == ((place, 0, 10),)) is is_seen


def test_epochs_and_seeds_give_other_orders_of_the_same_documents() -> None:
    shards = shards_of([5] * 300, [6] * 200, [7] * 100)

    def order(seed: int | None, epoch: int) -> list[tuple[int, int]]:
        chunks = document_order(shards, seed=seed, epoch=epoch)
        return [pair for docs, lengths in chunks for pair in zip(docs.tolist(), lengths.tolist(), strict=True)]

    on_disk = order(None, 0)
    assert on_disk == list(enumerate([5] * 300 + [6] * 200 + [7] * 100))
    drawn = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(one) == on_disk for one in drawn)
    assert len({tuple(one) for one in drawn}) == 3
    assert len({length for _, length in drawn[0][:50]}) == 3, "shards are shuffled together, not one after the other"


def test_large_corpora_are_shuffled_in_windows_of_shards() -> None:
    shards = shards_of(*[[idx + 2] * 3 for idx in range(150)])
    chunks = list(document_order(shards, seed=0, epoch=0))
    assert [len(documents) for documents, _ in chunks] == [64 * 3, 64 * 3, 22 * 3]
    documents = np.concatenate([documents for documents, _ in chunks])
    lengths = np.concatenate([lengths for _, lengths in chunks])
    assert sorted(documents.tolist()) == list(range(450))
    assert (lengths == documents // 3 + 2).all()


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    assert shuffle(10, 42, 3).tolist() == [0, 8, 6, 5, 1, 3, 7, 4, 2, 9]
    assert shuffle(0, 1).tolist() == [] and shuffle(1, 1).tolist() == [0]


def test_shards_without_documents_give_no_rows() -> None:
    plan = RowPlan([], 8, "crop", 0)
    assert list(plan) == [] and plan.num_tail_tokens == 0


@pytest.mark.parametrize("mode", ["crop", "carry"])
def test_planning_is_fast(mode: LongDocuments) -> None:
    """A tenth of what it does on a quiet machine: this guards against an algorithm that scans its pool."""
    lengths = np.random.default_rng(0).integers(20, 400, 50_000)
    start = time.perf_counter()
    plan = RowPlan([Lengths(lengths)], 512, mode, 0)
    assert sum(1 for _ in plan) > 10_000
    assert 50_000 / (time.perf_counter() - start) > 30_000
