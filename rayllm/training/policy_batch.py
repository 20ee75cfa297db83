"""From a step's groups to tensors: completions packed end to end up to a budget of tokens, behind one prompt a group.

Shapes: N tokens of a micro-batch, in one row; M of its sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rayllm.model.head import Cut
from rayllm.model.segments import Segment, Segments
from rayllm.training.rollout_batch import PolicyGroup, PolicySample, TrainBatch


@dataclass(frozen=True)
class PolicyMicroBatch:
    """Tokens to run forward at once, and which tokens were sampled behind which of them, with their advantages, what
    the sampler gave them, and whether its weights were other ones.

    The first tokens of a prompt's samples are all sampled behind its last token, so positions repeat.
    """

    tokens_1N: Tensor
    segments: Segments
    target_idx_M: Tensor
    targets_M: Tensor
    advantages_M: Tensor
    sampler_logp_M: Tensor
    is_stale_M: Tensor
    cut: Cut | None
    """What the targets were drawn from, where that is not the model's own distribution."""
    address_M3: Tensor
    """Index of its group in the batch, of its sample in the group, and of the token in the sample; on the CPU."""


def micro_batches(
    batch: TrainBatch,
    tokens_per_micro_batch: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    *,
    temperature: float = 1.0,
) -> list[PolicyMicroBatch]:
    """The share of one learner, of samples drawn at a temperature. Every learner gets about as many tokens, and as many
    micro-batches.

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
    return [_collate(groups, device, temperature) for groups in [*own, *idle]]


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


def _collate(groups: Sequence[PolicyGroup], device: torch.device | str, temperature: float) -> PolicyMicroBatch:
    tokens: list[int] = []
    segments: list[Segment] = []
    targets: list[_Target] = []
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
            targets += _targets(sample, behind, group.group_idx)
    precise = torch.float32 if str(device) == "mps" else torch.float64

    def column(key: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(target, key) for target in targets], dtype=dtype).to(device)

    return PolicyMicroBatch(
        tokens_1N=torch.tensor([tokens]).to(device),
        segments=Segments(segments).to(device),
        target_idx_M=column("behind", torch.int64),
        targets_M=column("token_id", torch.int64),
        advantages_M=column("advantage", precise),
        sampler_logp_M=column("logp", precise),
        is_stale_M=column("is_stale", torch.bool),
        cut=_cut([target.kept_ids for target in targets], temperature, device),
        address_M3=torch.tensor([target.address for target in targets], dtype=torch.int64).view(-1, 3),
    )


class _Target(NamedTuple):
    behind: int
    token_id: int
    advantage: float
    logp: float
    is_stale: bool
    kept_ids: tuple[int, ...] | None
    address: tuple[int, int, int]


def _targets(sample: PolicySample, behind: Sequence[int], group_idx: int) -> Iterator[_Target]:
    """The tokens that were drawn, each behind its place in the forward."""
    for t, is_sampled in enumerate(sample.is_sampled):
        if is_sampled:
            yield _Target(
                behind[t],
                sample.token_ids[t],
                sample.advantage,
                sample.logprobs[t] if sample.logprobs else 0.0,
                bool(sample.is_stale and sample.is_stale[t]),
                None if sample.kept_ids is None else sample.kept_ids[t],
                (group_idx, sample.sample_idx, t),
            )


def _cut(kept: Sequence[tuple[int, ...] | None], temperature: float, device: torch.device | str) -> Cut | None:
    if any(ids is None for ids in kept) or not kept:
        return None if temperature == 1 else Cut(temperature)
    ids = [ids or () for ids in kept]
    flat = torch.tensor([token_id for some in ids for token_id in some], dtype=torch.int64)
    ends = torch.tensor(list(accumulate(map(len, ids))), dtype=torch.int64)
    return Cut(temperature, flat.to(device), ends.to(device))
