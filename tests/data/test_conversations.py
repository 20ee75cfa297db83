"""Conversations rendered to disk, packed whole into padded rows, read by any number of ranks, resumed exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.data.conversation_rows import ConversationRows
from rayllm.data.conversations import Mixture, mixture_order, render_mixture
from rayllm.data.loader import DataPosition, StepBatch
from rayllm.text.chat import render_conversation
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation, Message

TOKENIZER = Tokenizer.byte_level()
IDENTITY = {"recipe": "this one"}


@dataclass
class ToyTask:
    """Conversations that are given to it."""

    conversations: list[Conversation]
    name: str = "toy"
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.conversations)

    def conversation(self, example_idx: int) -> Conversation:
        return self.conversations[example_idx]

    def evaluate(self, example_idx: int, answer: str) -> float:
        raise ValueError("a toy has no verdict")


def ask(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def toy(num_conversations: int, name: str = "toy") -> ToyTask:
    """Conversations of 7 to 25 tokens, no two alike."""
    return ToyTask([ask(f"{name[0]}{i}", "x" * (i * 7 % 17)) for i in range(num_conversations)], name)


def render(folder: Path, *tasks: tuple[ToyTask, int], sequence_len: int = 31, seed: int = 0) -> Mixture:
    return render_mixture(
        folder / "train", tasks, TOKENIZER, max_tokens=sequence_len + 1, seed=seed, belongs_to=IDENTITY
    )


# Order


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=4), st.integers(-5, 5))
def test_each_epoch_of_a_task_is_all_of_it_before_the_next(parts: list[tuple[int, int]], seed: int) -> None:
    sizes, epochs = zip(*parts, strict=True)
    order = mixture_order(sizes, epochs, seed).tolist()
    first = 0
    for size, num_epochs in parts:
        own = [idx - first for idx in order if first <= idx < first + size]
        assert len(own) == size * num_epochs
        for epoch in range(num_epochs):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))
        first += size
    assert order == mixture_order(sizes, epochs, seed).tolist()


def test_every_stretch_of_a_mixture_holds_each_task_in_its_share() -> None:
    order = mixture_order([100, 300], [3, 1], 0)
    for stretch in np.split(order, 6):
        assert abs((stretch < 100).sum() - 50) <= 1
    assert mixture_order([100], [2], 0).tolist() != mixture_order([100], [2], 1).tolist()
    first, second = np.split(mixture_order([100], [2], 0), 2)
    assert first.tolist() != second.tolist(), "shuffled anew"


# Rendering


def test_what_is_rendered_reads_back(tmp_path: Path) -> None:
    short, long = toy(20), toy(10, "other")
    mixture = render(tmp_path, (short, 1), (long, 2))
    for idx, conversation in enumerate(short.conversations + long.conversations):
        ids, mask = render_conversation(TOKENIZER, conversation)
        read_ids, read_mask = mixture.tokens(idx)
        assert (read_ids.tolist(), read_mask.astype(int).tolist()) == (ids, mask)
    assert [(t.name, t.epochs, t.num_conversations, t.num_cut) for t in mixture.tasks] == [
        ("toy", 1, 20, 0),
        ("other", 2, 10, 0),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train"]


def test_long_conversations_are_cut_and_broken_ones_skipped_and_all_counted(tmp_path: Path) -> None:
    conversations = [
        ask("hi", "y" * 100),
        ask("a question that leaves no room for its answer", "no"),
        Conversation((Message("user", "a"), Message("user", "b"))),
        Conversation((Message("user", "a"), Message("user", "c"))),
        ask("hi", "there"),
    ]
    mixture = render(tmp_path, (ToyTask(conversations, skipped={"not_json": 7}), 1))
    (counts,) = mixture.tasks
    assert (counts.num_conversations, counts.num_cut) == (2, 1)
    assert mixture.lengths.tolist() == [32, 12]
    assert counts.skipped == {
        "not_json": 7,
        "turn 1: user and assistant turns alternate: expected 'assistant', got 'user'": 2,
        "no assistant token among the first 32 tokens": 1,
    }


def test_a_file_with_a_thousand_faults_has_a_short_list_of_them(tmp_path: Path) -> None:
    class Faulty(ToyTask):
        def conversation(self, example_idx: int) -> Conversation:
            if example_idx:
                raise ValueError(f"line {example_idx}\nis broken")
            return super().conversation(example_idx)

    (counts,) = render(tmp_path, (Faulty(toy(1000).conversations), 1)).tasks
    assert len(counts.skipped) == 21
    assert counts.skipped["line 1 is broken"] == 1 and counts.skipped["other reasons"] == 979


def test_a_task_with_nothing_to_learn_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    broken = ToyTask([Conversation((Message("assistant", "a"),))] * 3, "broken")
    with pytest.raises(ValueError, match=r"task broken has no conversation to learn from \(3 x turn 0: "):
        render(tmp_path, (toy(3), 1), (broken, 1))
    with pytest.raises(ValueError, match=r"task empty has no conversation to learn from \(it is empty\)"):
        render(tmp_path, (ToyTask([], "empty"), 1))
    assert list(tmp_path.iterdir()) == []


def test_a_rendered_mixture_is_found_again_by_what_it_was_made_for(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    assert Mixture.find(folder, IDENTITY) is None
    made = render(tmp_path, (toy(9), 1))
    found = Mixture.find(folder, IDENTITY)
    assert found is not None and found.lengths.tolist() == made.lengths.tolist()
    assert Mixture.find(folder, {"recipe": "another"}) is None
    again = render(tmp_path, (toy(4), 1))
    assert len(again.lengths) == 4, "replaced"


@pytest.mark.parametrize("name", ["token_ids.bin", "learned.bin", "lengths.bin"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    render(tmp_path, (toy(9), 1))
    path = tmp_path / "train" / name
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its checksum differs; remove .*train and run"):
        Mixture.find(tmp_path / "train", IDENTITY)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} is damaged: expected \d+ bytes, found \d+"):
        Mixture.load(tmp_path / "train")


# Rows


def test_every_conversation_is_whole_in_its_rows_and_padding_is_masked(tmp_path: Path) -> None:
    mixture = render(tmp_path, (toy(50), 2), (toy(30, "other"), 1))
    rows = ConversationRows(mixture, 31)
    assert Counter(chain(*rows.rows)) == {idx: 2 if idx < 50 else 1 for idx in range(80)}
    num_padding = 0
    for row, batch in zip(rows.rows, rows.batches(rows_per_batch=1), strict=True):
        ids = np.concatenate([mixture.tokens(idx)[0] for idx in row])
        mask = np.concatenate([mixture.tokens(idx)[1] for idx in row])
        rest = 32 - len(ids)
        tokens = np.append(ids, [TOKENIZER.bos_id] * rest)
        learned = np.append(mask, [False] * rest)
        assert batch.inputs_BT.tolist() == [tokens[:-1].tolist()]
        assert batch.targets_BT.tolist() == [np.where(learned, tokens, -1)[1:].tolist()]
        assert (batch.targets_BT >= 0).any()
        num_padding += rest
    assert rows.padding_share == pytest.approx(num_padding / (32 * len(rows.rows)))
    assert rows.padding_share < 0.1


def test_conversations_longer_than_a_row_never_clog_the_packer(tmp_path: Path) -> None:
    """Two in three do not fit: each fills a row of its own, with something to learn in it, and the rest goes on."""
    conversations = [ask("hi", "y" * (100 if i % 3 else 5)) for i in range(300)]
    mixture = render(tmp_path, (ToyTask(conversations), 1))
    rows = ConversationRows(mixture, 31)
    assert mixture.tasks[0].num_cut == 200
    assert sorted(chain(*rows.rows)) == list(range(300))
    assert len(rows.rows) == 200 + 50
    assert all((batch.targets_BT >= 0).any() for batch in rows.batches(rows_per_batch=1))


# Steps


def steps(rows: ConversationRows, rank: int = 0, world_size: int = 1, **changes: object) -> list[StepBatch]:
    settings: dict = {"rows_per_step": 6, "rows_per_micro_batch": 2, "position": DataPosition()}
    return list(rows.step_batches(rank=rank, world_size=world_size, **{**settings, **changes}))


def rows_of(batch: StepBatch) -> list[tuple[list[int], list[int]]]:
    return [
        (inputs.tolist(), targets.tolist())
        for micro_batch in batch.micro_batches
        for inputs, targets in zip(micro_batch.inputs_BT, micro_batch.targets_BT, strict=True)
    ]


@pytest.fixture
def packed(tmp_path: Path) -> ConversationRows:
    rows = ConversationRows(render(tmp_path, (toy(62), 1)), 31)
    assert len(rows.rows) % 6 == 1, "the last step is short, and divides among no ranks"
    return rows


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_reads_the_same_rows_in_the_same_steps(packed: ConversationRows, world_size: int) -> None:
    alone = steps(packed)
    shares = [steps(packed, rank, world_size) for rank in range(world_size)]
    assert [len(share) for share in shares] == [len(alone)] * world_size
    for step_idx, whole in enumerate(alone):
        together = [rows_of(share[step_idx]) for share in shares]
        assert len({len(rows) for rows in together}) == 1, "every rank has as much to do"
        merged = [row for rows in zip(*together, strict=True) for row in rows]
        expected = rows_of(whole)
        assert merged[: len(expected)] == expected
        assert all(set(targets) == {-1} for _, targets in merged[len(expected) :])
        assert {share[step_idx].position for share in shares} == {whole.position}


def test_reading_goes_on_where_it_was(packed: ConversationRows) -> None:
    whole = steps(packed, prefetch=0)
    assert [rows_of(a) for a in steps(packed)] == [rows_of(a) for a in whole], "a thread changes nothing"
    for done in range(1, len(whole) + 1):
        rest = steps(packed, position=whole[done - 1].position)
        assert [rows_of(a) for a in rest] == [rows_of(a) for a in whole[done:]]
    assert whole[-1].position == DataPosition(0, len(packed.rows))
    for position in (DataPosition(0, len(packed.rows) + 1), DataPosition(1, 0)):
        with pytest.raises(ValueError, match=r"cannot resume at row \d+ of epoch \d: the mixture has one epoch of"):
            steps(packed, position=position)


def test_ranks_share_validation_rows(packed: ConversationRows) -> None:
    everything = torch.cat([b.inputs_BT for b in packed.batches(rows_per_batch=4)])
    shares = [torch.cat([b.inputs_BT for b in packed.batches(rows_per_batch=4, rank=r, world_size=2)]) for r in (0, 1)]
    assert torch.equal(everything[0::2], shares[0]) and torch.equal(everything[1::2], shares[1])
