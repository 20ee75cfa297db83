"""From groups of rollouts to what a learner steps on: advantages against the group's mean, one global token count.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from rayllm.model.gpt import IGNORE_INDEX
from rayllm.types import Rollout, RolloutGroup

TOKENS_PER_BUCKET = 32
"""Rows are padded to a multiple of so many tokens, so that shapes are few."""


@dataclass(frozen=True)
class RolloutRow:
    """A prompt and one of its completions. ``is_sampled[t]`` tells whether the model drew token t."""

    token_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    advantage: float


@dataclass(frozen=True)
class TrainBatch:
    """One optimizer step. ``num_loss_tokens`` counts the sampled tokens of all groups kept, also of those whose
    samples were all equally good: these have no gradient, and no row."""

    rows: tuple[RolloutRow, ...]
    num_loss_tokens: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class PolicyMicroBatch:
    """Rows to run forward at once: the token after each input (-1 where it was not sampled), and the advantages."""

    inputs_BT: Tensor
    targets_BT: Tensor
    advantages_B: Tensor


def is_valid(rollout: Rollout) -> bool:
    """Whether a rollout came to its end and was judged; one that failed is no reward of 0."""
    return rollout.reward is not None and rollout.completion.finish_reason in ("stop", "length")


def collate_groups(groups: Sequence[RolloutGroup]) -> TrainBatch:
    """Advantage of a rollout: its reward minus the mean of its group's valid ones.

    Failed rollouts leave their group; a group with fewer than two left has no baseline and is dropped. Both are
    counted in the metrics.
    """
    rows: list[RolloutRow] = []
    rewards: list[float] = []
    lengths: list[int] = []
    num_loss_tokens = num_failed = num_dropped = num_even = num_stopped = 0
    for group in groups:
        valid = [rollout for rollout in group.rollouts if is_valid(rollout)]
        num_failed += len(group.rollouts) - len(valid)
        if len(valid) < 2:
            num_dropped += 1
            continue
        group_rewards = [float(rollout.reward or 0.0) for rollout in valid]
        rewards += group_rewards
        lengths += [len(rollout.completion.token_ids) for rollout in valid]
        num_stopped += sum(rollout.completion.finish_reason == "stop" for rollout in valid)
        num_loss_tokens += sum(sum(rollout.completion.sampled_mask) for rollout in valid)
        if len(set(group_rewards)) == 1:
            num_even += 1
            continue
        baseline = fsum(group_rewards) / len(group_rewards)
        for rollout, reward in zip(valid, group_rewards, strict=True):
            rows.append(_build_row(group, rollout, reward - baseline))
    num_valid = max(len(rewards), 1)
    return TrainBatch(
        rows=tuple(rows),
        num_loss_tokens=num_loss_tokens,
        metrics={
            "train/reward": fsum(rewards) / num_valid if rewards else float("nan"),
            "train/completion_len": sum(lengths) / num_valid,
            "train/stopped_share": num_stopped / num_valid,
            "train/num_tokens": float(num_loss_tokens),
            "train/num_failed": float(num_failed),
            "train/num_dropped_groups": float(num_dropped),
            "train/even_group_share": num_even / max(len(groups) - num_dropped, 1),
        },
    )


def micro_batches(
    batch: TrainBatch, rows_per_micro_batch: int, device: torch.device | str, rank: int = 0, world_size: int = 1
) -> list[PolicyMicroBatch]:
    """The share of one learner: rows rank, rank + world_size, ... Every learner gets as many micro-batches."""
    num_rows = -(-len(batch.rows) // world_size)
    own = list(batch.rows[rank::world_size])
    own += [RolloutRow((0, 0), (False, False), 0.0)] * (num_rows - len(own))  # a row without targets has no gradient
    return [
        _collate_rows(own[start : start + rows_per_micro_batch], device)
        for start in range(0, num_rows, rows_per_micro_batch)
    ]


def _build_row(group: RolloutGroup, rollout: Rollout, advantage: float) -> RolloutRow:
    prompt, completion = group.prompt.token_ids, rollout.completion
    return RolloutRow(
        token_ids=(*prompt, *completion.token_ids),
        is_sampled=(*[False] * len(prompt), *completion.sampled_mask),
        advantage=advantage,
    )


def _collate_rows(rows: Sequence[RolloutRow], device: torch.device | str) -> PolicyMicroBatch:
    longest = max(len(row.token_ids) for row in rows) - 1
    num_tokens = -(-longest // TOKENS_PER_BUCKET) * TOKENS_PER_BUCKET
    inputs_BT = torch.zeros(len(rows), num_tokens, dtype=torch.int64)
    targets_BT = torch.full((len(rows), num_tokens), IGNORE_INDEX)
    for b, row in enumerate(rows):
        token_ids, is_sampled = torch.tensor(row.token_ids), torch.tensor(row.is_sampled)
        inputs_BT[b, : len(token_ids) - 1] = token_ids[:-1]
        targets_BT[b, : len(token_ids) - 1] = token_ids[1:].masked_fill(~is_sampled[1:], IGNORE_INDEX)
    advantages_B = torch.tensor([row.advantage for row in rows], dtype=torch.float64)
    return PolicyMicroBatch(inputs_BT.to(device), targets_BT.to(device), advantages_B.to(device, torch.float64))
