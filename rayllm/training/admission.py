"""How far sampling may run ahead of learning: one inequality.

    accepted + pending <= (version + 1 + max_staleness) * groups_per_batch

`version` counts the batches that have been learned from and whose weights the samplers have. Batches take groups in the
order of their admission, so a group admitted at version v is of batch v + max_staleness at the latest, and the weights
that begin it are at most max_staleness versions old when it is learned from. 0 leaves sampling and learning to take
turns. (The rule of AReaL and SkyRL.)
"""

from __future__ import annotations


def room(
    *, version: int, max_staleness: int, groups_per_batch: int, num_accepted: int, num_pending: int, num_batches: int
) -> int:
    """How many groups may be admitted now; `num_accepted` are those of batches, `num_pending` those on their way.

    Nothing is sampled for more than the `num_batches` of the run.
    """
    num_batches_allowed = min(version + 1 + max_staleness, num_batches)
    return max(0, num_batches_allowed * groups_per_batch - num_accepted - num_pending)
