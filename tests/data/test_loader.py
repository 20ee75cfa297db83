from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.data.loader import DataPosition, StepBatch, step_batches, validation_batches
from rayllm.data.packing import LongDocuments
from rayllm.data.shards import Manifest, ShardEntry, ShardWriter, TokenShards

BOS = 60_000
T = 15


def build(directory: Path, train: list[int], val: list[int]) -> TokenShards:
    """Shards of documents of these lengths; every token but BOS is a number of its own. Three documents a shard."""
    entries: list[ShardEntry] = []
    fresh = iter(range(BOS))
    for split, lengths in (("train", train), ("val", val)):
        for piece_idx, start in enumerate(range(0, len(lengths), 3)):
            writer = ShardWriter(directory, split, piece_idx=piece_idx, piece="p", vocab_size=BOS + 1, bos_id=BOS)  # type: ignore[arg-type]
            for length in lengths[start : start + 3]:
                writer.add(list(islice(fresh, length - 1)))
            entries += writer.close()
    Manifest("abc", BOS + 1, BOS, {}, (), tuple(entries)).save(directory)
    return TokenShards.load(directory)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    rng = np.random.default_rng(0)
    train, val = rng.integers(2, 40, 70), rng.integers(2, 40, 12)
    return build(tmp_path_factory.mktemp("shards"), train.tolist(), val.tolist())


def steps(shards: TokenShards, **changes: Any) -> Any:
    settings = {"rows_per_step": 8, "rows_per_micro_batch": 3, "sequence_len": T, "seed": 5, "long_documents": "carry"}
    return step_batches(shards, **{"rank": 0, "world_size": 1, **settings, **changes})


def rows_of(step: StepBatch) -> list[list[int]]:
    """Rows of a step, T + 1 tokens each, checked to be one sequence seen twice."""
    rows = []
    for batch in step.micro_batches:
        assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert batch.inputs_BT.is_contiguous() and batch.targets_BT.is_contiguous()
        assert torch.equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
        rows += torch.cat([batch.inputs_BT, batch.targets_BT[:, -1:]], dim=1).tolist()
    return rows


def take(generator: Any, count: int) -> list[StepBatch]:
    taken = list(islice(generator, count))
    generator.close()
    return taken


def assert_same(left: list[StepBatch], right: list[StepBatch]) -> None:
    assert [step.position for step in left] == [step.position for step in right]
    assert [rows_of(step) for step in left] == [rows_of(step) for step in right]


def test_steps_hold_their_rows_in_micro_batches(shards: TokenShards) -> None:
    (step,) = take(steps(shards), 1)
    assert [tuple(batch.inputs_BT.shape) for batch in step.micro_batches] == [(3, T), (3, T), (2, T)]
    assert step.position == DataPosition(epoch=0, row_idx=8)
    assert all(row[0] == BOS for row in rows_of(step))


@pytest.mark.parametrize("long_documents", ["crop", "carry"])
def test_isolated_documents_begin_at_their_bos(shards: TokenShards, long_documents: LongDocuments) -> None:
    for step in take(steps(shards, isolate=True, long_documents=long_documents), 6):
        for batch in step.micro_batches:
            assert batch.segments is not None and batch.segments.num_tokens == batch.inputs_BT.numel()
            first_N = batch.segments.positions_N == 0
            assert torch.equal(first_N, batch.inputs_BT.flatten() == BOS)
    assert all(batch.segments is None for step in take(steps(shards), 1) for batch in step.micro_batches)


def test_an_epoch_reads_every_token_once_and_the_next_follows(shards: TokenShards) -> None:
    """Tokens are numbers of their own, so that reading one twice or never shows."""
    taken = take(steps(shards, rows_per_step=1), 300)
    epochs = [step.position.epoch for step in taken]
    per_epoch = epochs.count(0)
    assert epochs.count(1) == pytest.approx(per_epoch, abs=2) and epochs == sorted(epochs)
    tokens = [token for step in taken[:per_epoch] for row in rows_of(step) for token in row if token != BOS]
    assert len(tokens) == len(set(tokens))
    num_text_tokens = shards.num_tokens("train") - shards.split("train").num_documents
    assert num_text_tokens - (T + 1) <= len(tokens) <= num_text_tokens
    first, second = taken[:per_epoch], taken[per_epoch : 2 * per_epoch]
    assert [rows_of(step) for step in first] != [rows_of(step) for step in second], "each epoch has an order of its own"


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 40), st.sampled_from([1, 4, 6]), st.sampled_from(["crop", "carry"]), st.integers(0, 3))
def test_resuming_anywhere_equals_not_having_stopped(
    shards: TokenShards, stop_after: int, rows_per_step: int, mode: LongDocuments, prefetch: int
) -> None:
    """Also over the ends of epochs, and whatever has been prefetched: the position is that of the step handed out."""
    whole = take(steps(shards, rows_per_step=rows_per_step, long_documents=mode), stop_after + 6)
    before = take(steps(shards, rows_per_step=rows_per_step, long_documents=mode, prefetch=prefetch), stop_after)
    position = before[-1].position if before else DataPosition()
    after = take(steps(shards, rows_per_step=rows_per_step, long_documents=mode, position=position), 6)
    assert_same(before + after, whole)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("mode", ["crop", "carry"])
def test_every_world_size_sees_the_same_rows_in_the_same_steps(
    shards: TokenShards, world_size: int, mode: LongDocuments
) -> None:
    alone = take(steps(shards, long_documents=mode), 20)
    ranks = [take(steps(shards, long_documents=mode, rank=r, world_size=world_size), 20) for r in range(world_size)]
    for step_idx, step in enumerate(alone):
        rows = rows_of(step)
        for rank, rank_steps in enumerate(ranks):
            assert rows_of(rank_steps[step_idx]) == rows[rank::world_size]
            assert rank_steps[step_idx].position == step.position


def test_a_position_from_one_world_size_continues_in_another(shards: TokenShards) -> None:
    whole = take(steps(shards), 12)
    position = take(steps(shards, rank=1, world_size=4), 7)[-1].position
    assert_same(take(steps(shards, position=position), 5), whole[7:])


def test_seeds_give_other_rows(shards: TokenShards) -> None:
    assert rows_of(take(steps(shards, seed=1), 1)[0]) != rows_of(take(steps(shards, seed=2), 1)[0])


def test_rows_that_do_not_divide_among_workers_are_refused_at_the_call(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="8 rows per step do not divide among 3 workers; choose tokens_per_step"):
        steps(shards, world_size=3)


def test_too_little_text_is_refused_at_the_call(tmp_path: Path) -> None:
    shards = build(tmp_path, [T], [5])
    with pytest.raises(ValueError, match=f"train split .* has {T} tokens, and one row needs {T + 1}"):
        steps(shards)
    with pytest.raises(ValueError, match="val split .* has 5 tokens.*validation.fraction"):
        validation_batches(shards, rows_per_batch=1, sequence_len=T, max_tokens=100, long_documents="crop")


def test_text_for_a_single_row_trains_on_it_in_every_epoch(tmp_path: Path) -> None:
    shards = build(tmp_path, [T + 1], [])
    taken = take(steps(shards, rows_per_step=4), 2)
    assert [step.position for step in taken] == [DataPosition(3, 1), DataPosition(7, 1)]
    assert len({tuple(row) for step in taken for row in rows_of(step)}) == 1


def test_a_position_outside_of_the_shards_is_refused(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="cannot resume at row 100000 of epoch 0"):
        next(steps(shards, position=DataPosition(0, 100_000)))


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_what_fails_in_the_background_is_raised_to_the_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards = build(tmp_path, rng.integers(2, 40, 300).tolist(), [])
    reader = steps(shards, rows_per_step=1, seed=3)
    next(reader)
    for entry in shards.manifest.shards:  # shards are mapped by now; cutting the files must not be needed: unmap them
        (tmp_path / entry.file).unlink()
    shards.map_tokens.cache_clear()
    with pytest.raises(ValueError, match="npy is damaged"):
        for _ in range(10):
            next(reader)
    assert not prefetch_threads()


def test_the_thread_ends_with_its_reader(shards: TokenShards) -> None:
    closed = steps(shards)
    next(closed)
    assert len(prefetch_threads()) == 1
    closed.close()
    assert not prefetch_threads()

    dropped = steps(shards)
    next(dropped)
    del dropped
    gc.collect()
    assert not prefetch_threads()

    unused = steps(shards)
    del unused
    assert not prefetch_threads()


def test_prefetching_is_bounded(shards: TokenShards) -> None:
    """One step more than the queue holds can be under way; the maps that are read show how far it went."""
    reader = steps(shards, rows_per_step=1, prefetch=1)
    next(reader)
    time.sleep(0.2)
    (thread,) = prefetch_threads()
    reads = shards.map_tokens.cache_info()
    time.sleep(0.2)
    assert shards.map_tokens.cache_info() == reads and thread.is_alive()
    reader.close()


EXIT = """
import sys
from rayllm.data.loader import step_batches
from rayllm.data.shards import TokenShards
reader = step_batches(TokenShards.load(sys.argv[1]), rows_per_step=256, rows_per_micro_batch=1, sequence_len=15,
                      rank=0, world_size=1, seed=0, long_documents="crop")
next(reader)
"""


def test_an_open_reader_does_not_disturb_the_end_of_the_process(shards: TokenShards) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", EXIT, str(shards.directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def validation_rows(shards: TokenShards, **changes: Any) -> list[list[int]]:
    settings = {"rows_per_batch": 4, "sequence_len": T, "max_tokens": 10**9, "long_documents": "carry", **changes}
    rows = []
    for batch in validation_batches(shards, **settings):
        assert len(batch.inputs_BT) <= 4
        rows += torch.cat([batch.inputs_BT, batch.targets_BT[:, -1:]], dim=1).tolist()
    return rows


def test_validation_reads_the_same_rows_every_time_and_for_every_world_size(shards: TokenShards) -> None:
    rows = validation_rows(shards)
    assert rows == validation_rows(shards)
    tokens = [token for row in rows for token in row if token != BOS]
    num_text_tokens = shards.num_tokens("val") - shards.split("val").num_documents
    assert len(tokens) == len(set(tokens)) and num_text_tokens - T <= len(tokens)
    for world_size in (2, 3):
        for rank in range(world_size):
            assert validation_rows(shards, rank=rank, world_size=world_size) == rows[rank::world_size]


def test_validation_reads_at_most_max_tokens(shards: TokenShards) -> None:
    rows = validation_rows(shards)
    for num_rows in (1, 3, len(rows)):
        chosen = validation_rows(shards, max_tokens=(num_rows + 1) * T - 1)
        assert len(chosen) == num_rows and all(row in rows for row in chosen)
    spread = validation_rows(shards, max_tokens=2 * T)
    assert rows.index(spread[1]) - rows.index(spread[0]) == len(rows) // 2, "rows stand far apart"
    with pytest.raises(ValueError, match="less than one row of 15"):
        validation_batches(shards, rows_per_batch=1, sequence_len=T, max_tokens=T - 1, long_documents="crop")
