"""From groups of rollouts to what a learner steps on: advantages against the group's mean, one global token count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from rayllm.types import Rollout, RolloutGroup


@dataclass(frozen=True)
class PolicySample:
    """One completion. ``is_sampled[t]`` tells whether the model drew token t."""

    token_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    advantage: float


@dataclass(frozen=True)
class PolicyGroup:
    """A prompt and the completions of it that have something to teach."""

    prompt_ids: tuple[int, ...]
    samples: tuple[PolicySample, ...]


@dataclass(frozen=True)
class TrainBatch:
    """One optimizer step. ``num_loss_tokens`` counts the sampled tokens of all groups kept, also of those whose
    samples were all equally good: these have no gradient, and are not in ``groups``."""

    groups: tuple[PolicyGroup, ...]
    num_loss_tokens: int
    metrics: dict[str, float]


def is_valid(rollout: Rollout) -> bool:
    """Whether a rollout came to its end and was judged; one that failed is no reward of 0."""
    return rollout.reward is not None and rollout.completion.finish_reason in ("stop", "length")


def collate_groups(groups: Sequence[RolloutGroup]) -> TrainBatch:
    """Advantage of a rollout: its reward minus the mean of its group's valid ones.

    Failed rollouts leave their group; a group with fewer than two left has no baseline and is dropped. Both are
    counted in the metrics.
    """
    taught: list[PolicyGroup] = []
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
        samples = (
            PolicySample(r.completion.token_ids, r.completion.sampled_mask, reward - baseline)
            for r, reward in zip(valid, group_rewards, strict=True)
        )
        taught.append(PolicyGroup(group.prompt.token_ids, tuple(samples)))
    num_valid = max(len(rewards), 1)
    return TrainBatch(
        groups=tuple(taught),
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
