"""The table of prompts, and dialogues that go on from what the cache holds: the same tokens as from nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.config.schema import SamplingConfig
from rayllm.engine.prefixes import MIN_SHARED, PrefixTable
from rayllm.engine.request import Request
from rayllm.engine.sampling import stable_seed
from rayllm.types import Prompt


def filled(num_rows: int, *lengths: int) -> PrefixTable:
    """Prompts of these lengths, each of a token of its own, computed and without users; none reaches back further
    than 50 tokens."""
    table = PrefixTable(num_rows)
    for token, length in enumerate(lengths):
        prefix = table.claim((token,) * length)
        assert prefix is not None
        prefix.num_cached, prefix.shortest_cut, prefix.is_sound = length, max(0, length - 50), True
    return table


def test_the_prompt_unused_for_longest_makes_room_and_those_in_use_do_not() -> None:
    table = filled(3, 20, 20, 20)
    oldest, second = table.find((0,) * 20), table.find((1,) * 20)
    assert oldest is not None and second is not None
    oldest.num_users = 1
    new = table.claim((7,) * 5)
    assert new is not None and new.row_idx == 2, "the third was not asked for since"
    new.num_users = second.num_users = 1
    assert table.claim((8,) * 5) is None and len(table) == 3
    oldest.num_users = 0
    newest = table.claim((8,) * 5)
    assert newest is not None and newest.row_idx == oldest.row_idx and table.find((0,) * 20) is None


def test_prompts_share_what_they_begin_with() -> None:
    table = filled(3, 100, 100)
    (longer, num_shared) = table.find_shared((0,) * 100 + (5,)) or (None, 0)
    assert longer is not None and longer.row_idx == 0 and num_shared == 100
    assert (table.find_shared((1,) * 100) or (None, 0))[1] == 99, "the last token is run again, for what follows it"
    assert (table.find_shared((1,) * 60 + (5,)) or (None, 0))[1] == 60
    assert table.find_shared((1,) * 40 + (5,)) is None, "the ring reaches back no further"
    assert table.find_shared((1,) * (MIN_SHARED - 1) + (5,)) is None
    longer.num_cached = 99
    assert table.find_shared((0,) * 100 + (5,)) is None, "it is not ready"


def test_what_a_finished_sequence_left_is_gone_on_from_but_nothing_is_drawn_from_it() -> None:
    """The cache has its tokens, not what follows them."""
    table = filled(2, 30)
    kept = table.claim((9,) * 40)
    assert kept is not None
    kept.num_cached, kept.has_logits, kept.is_sound = 40, False, True
    assert table.find((9,) * 40) is None
    assert table.find_shared((9,) * 40) == (kept, 39)


def test_clearing_what_has_users_is_a_mistake_of_ours() -> None:
    table = filled(2, 30)
    prefix = table.find((0,) * 30)
    assert prefix is not None
    prefix.num_users = 1
    with pytest.raises(AssertionError):
        table.clear()
    prefix.num_users = 0
    table.clear()
    assert len(table) == 0


def test_a_row_is_cleared_for_its_next_prompt_until_its_numbers_were_seen_to_be_some() -> None:
    table = PrefixTable(1)
    for token, is_sound, must_clear in ((0, False, False), (1, True, True), (2, False, False), (3, True, True)):
        prefix = table.claim((token,) * 20)
        assert prefix is not None and prefix.must_clear == must_clear
        prefix.num_cached, prefix.is_sound = 20, is_sound
        assert (table.find_shared((token,) * 30) is not None) == is_sound, "nothing goes on from what may be none"
        if token == 2:
            table.clear()


@settings(max_examples=20)
@given(
    pattern=st.sampled_from(["L", "S", "LS"]),
    chunk_len=st.integers(4, 40),
    row_chunk_len=st.integers(1, 40),
    num_prompts=st.integers(1, 3),
    turns=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 60)), min_size=2, max_size=6),
)
def test_a_dialogue_that_goes_on_or_is_cut_back_equals_one_without_reuse(
    lab, pattern: str, chunk_len: int, row_chunk_len: int, num_prompts: int, turns: list[tuple[int, int, int]]
) -> None:
    """Each turn takes back some tokens of the dialogue so far, says something new, and is answered."""
    model = lab.model(5, torch.float64, window_pattern=pattern)
    sizes = {"num_slots": 2, "num_prompts": num_prompts, "max_len": 320}
    engine = lab.engine(model, chunk_len=chunk_len, row_chunk_len=row_chunk_len, **sizes)
    dialogue = lab.prompt("a dialogue begins").token_ids
    for turn, (num_back, num_new, max_tokens) in enumerate(turns):
        dialogue = dialogue[: max(1, len(dialogue) - num_back)]
        dialogue = (*dialogue, *[100 + (turn * 7 + i) % 90 for i in range(num_new)])
        if len(dialogue) > 300:
            break
        sampling = SamplingConfig(max_tokens=max_tokens, temperature=turn % 2)
        handle = engine.submit(Request(Prompt(f"{turn}", dialogue), sampling))
        lab.run(engine)
        (completion,) = handle.completions()
        lab.check(completion, dialogue, sampling, stable_seed(0, f"{turn}", 0), {0: model})
        dialogue = (*dialogue, *completion.token_ids)


def test_a_prompt_cut_back_twice_has_all_that_its_windows_look_back_to(lab) -> None:
    """Cut to 200 and run up to 203, the row looks as if it held what a row of 203 tokens does; it does not."""
    model = lab.model(5, torch.float64, window_pattern="L")
    engine = lab.engine(model, chunk_len=40, num_slots=1, num_prompts=1, repeats=False)
    text = tuple((i * i + 5 * i) % 200 for i in range(240))
    sampling = SamplingConfig(temperature=0, max_tokens=1)
    for end in (240, 202, 167):
        prompt = Prompt("p", (*text[:end], 201, 202))
        ((completion,),) = engine.generate([prompt], sampling)
        lab.check(completion, prompt.token_ids, sampling, 0, {0: model})


def test_the_second_turn_computes_only_what_is_new(lab) -> None:
    """Seen from outside: what one step of a small budget can do."""
    engine = lab.engine(lab.scripted({}), chunk_len=8, token_budget=8, num_slots=1, num_prompts=2)
    sampling = SamplingConfig(temperature=0, max_tokens=20)
    first = engine.submit(Request(lab.prompt("x" * 79), sampling))
    assert sum(1 for _ in iter(lambda: len(engine.step()), 1)) == 9, "80 tokens are ten chunks"
    lab.run(engine)
    dialogue = (*first.request.prompt.token_ids, *first.completions()[0].token_ids, *lab.ids("and"))
    for prompt_ids in (dialogue, dialogue[:99], dialogue):
        engine.submit(Request(Prompt("", prompt_ids), sampling))
        assert len(engine.step()) == 1, "it answers in the first step"
        lab.run(engine)
