"""From a step's groups to tensors: completions packed end to end up to a budget of tokens, behind one prompt a group.

Shapes: N tokens of a micro-batch, in one row; M of its sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllm.model.segments import Segment, Segments
from rayllm.training.rollout_batch import PolicyGroup, PolicySample, TrainBatch


@dataclass(frozen=True)
class PolicyMicroBatch:
    """Tokens to run forward at once, and which tokens were sampled behind which of them, with their advantages.

    The first tokens of a prompt's samples are all sampled behind its last token, so positions repeat.
    """

    tokens_1N: Tensor
    segments: Segments
    target_idx_M: Tensor
    targets_M: Tensor
    advantages_M: Tensor


def micro_batches(
    batch: TrainBatch, tokens_per_micro_batch: int, device: torch.device | str, rank: int = 0, world_size: int = 1
) -> list[PolicyMicroBatch]:
    """The share of one learner. Every learner gets about as many tokens, and as many micro-batches.

    A group is split, and its prompt repeated, only where it is larger than a micro-batch or a learner's share; a
    micro-batch exceeds the budget only by a single completion that does.
    """
    total = sum(_num_tokens(group) for group in batch.groups)
    most = min(tokens_per_micro_batch, max(1, total // world_size))
    units = sorted((u for group in batch.groups for u in _split(group, most)), key=_num_tokens, reverse=True)
    shares = _deal(units, world_size)
    bins = [_fill(share, tokens_per_micro_batch) for share in shares]
    own = bins[rank]
    idle = [_IDLE] * (max(map(len, bins)) - len(own))
    return [_collate(groups, device) for groups in [*own, *idle]]


# A forward of one token, and no target: a learner without work of its own takes part in the others' reductions.
_IDLE = (PolicyGroup((0,), ()),)


def _num_tokens(group: PolicyGroup) -> int:
    """Tokens of a forward: the last of a completion predicts nothing."""
    return len(group.prompt_ids) + sum(_num_inputs(sample) for sample in group.samples)


def _num_inputs(sample: PolicySample) -> int:
    return max(len(sample.token_ids) - 1, 0)


def _split(group: PolicyGroup, most: int) -> Iterator[PolicyGroup]:
    """Parts of a group of up to `most` tokens, or one completion."""
    part: list[PolicySample] = []
    num_tokens = len(group.prompt_ids)
    for sample in group.samples:
        if part and num_tokens + _num_inputs(sample) > most:
            yield replace(group, samples=tuple(part))
            part, num_tokens = [], len(group.prompt_ids)
        part.append(sample)
        num_tokens += _num_inputs(sample)
    yield replace(group, samples=tuple(part))


def _deal(units: Sequence[PolicyGroup], world_size: int) -> list[list[PolicyGroup]]:
    """Largest first, each to the learner that has least."""
    shares: list[list[PolicyGroup]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for unit in units:
        least = loads.index(min(loads))
        shares[least].append(unit)
        loads[least] += _num_tokens(unit)
    return shares


def _fill(units: Sequence[PolicyGroup], budget: int) -> list[Sequence[PolicyGroup]]:
    """Each unit into the first micro-batch that has room for it."""
    bins: list[list[PolicyGroup]] = []
    rooms: list[int] = []
    for unit in units:
        size = _num_tokens(unit)
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            bins.append([])
            rooms.append(budget)
            at = len(bins) - 1
        bins[at].append(unit)
        rooms[at] -= size
    return list(bins)


def _collate(groups: Sequence[PolicyGroup], device: torch.device | str) -> PolicyMicroBatch:
    tokens: list[int] = []
    segments: list[Segment] = []
    target_idx: list[int] = []
    targets: list[int] = []
    advantages: list[float] = []
    for group in groups:
        prompt_start, prompt_len = len(tokens), len(group.prompt_ids)
        segments.append(Segment(prompt_start, prompt_len))
        tokens += group.prompt_ids
        for sample in group.samples:
            start, num_inputs = len(tokens), _num_inputs(sample)
            if num_inputs:
                segments.append(Segment(start, num_inputs, prompt_start, prompt_len))
            tokens += sample.token_ids[:-1]
            behind = (prompt_start + prompt_len - 1, *range(start, start + num_inputs))
            for at, token_id, is_sampled in zip(behind, sample.token_ids, sample.is_sampled, strict=False):
                if is_sampled:
                    target_idx.append(at)
                    targets.append(token_id)
                    advantages.append(sample.advantage)
    return PolicyMicroBatch(
        torch.tensor([tokens]).to(device),
        Segments(segments).to(device),
        torch.tensor(target_idx, dtype=torch.int64).to(device),
        torch.tensor(targets, dtype=torch.int64).to(device),
        torch.tensor(advantages, dtype=torch.float64).to(device, torch.float32 if str(device) == "mps" else None),
    )
