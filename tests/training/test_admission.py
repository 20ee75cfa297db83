"""How far sampling runs ahead."""

from __future__ import annotations

import random

import pytest

from rayllm.training.admission import room


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_group_is_never_staler_than_it_may_be(k: int) -> None:
    """Whatever the order in which groups end and batches are taken: first in, first out, and no group is learned from
    by weights more than k versions newer than those it was begun with; with nothing to wait for, all room is used."""
    per_batch, num_batches = 4, 12
    draw = random.Random(k)
    begun: list[int] = []  # the version at each group's admission
    version = num_taken = 0
    while version < num_batches:
        count = room(
            version=version,
            max_staleness=k,
            groups_per_batch=per_batch,
            num_accepted=num_taken,
            num_pending=len(begun) - num_taken,
            num_batches=num_batches,
        )
        begun += [version] * (count if len(begun) - num_taken < per_batch else draw.randint(0, count))
        assert len(begun) <= per_batch * num_batches, "nothing is sampled that no batch takes"
        if len(begun) - num_taken >= per_batch:
            ages = [version - begun[num_taken + i] for i in range(per_batch)]
            assert max(ages) <= k
            num_taken += per_batch
            version += 1
    assert room(version=0, max_staleness=k, groups_per_batch=4, num_accepted=0, num_pending=0, num_batches=99) == 4 * (
        k + 1
    )


def test_a_batch_half_accepted_leaves_room_for_its_other_half() -> None:
    """As when dynamic sampling replaces groups."""
    how = {"version": 5, "max_staleness": 0, "groups_per_batch": 8, "num_batches": 10}
    assert room(**how, num_accepted=5 * 8 + 3, num_pending=0) == 5
    assert room(**how, num_accepted=5 * 8 + 3, num_pending=5) == 0
    assert room(**how, num_accepted=5 * 8 + 3, num_pending=9) == 0
    assert room(**(how | {"version": 10}), num_accepted=10 * 8, num_pending=0) == 0
