"""From groups of rollouts to what a learner steps on: advantages against the group, one global token count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt

from rayllm.config.rl_schema import PolicyLossConfig
from rayllm.types import Completion, Rollout, RolloutGroup

STD_EPS = 1e-6
REINFORCE = PolicyLossConfig()


@dataclass(frozen=True)
class PolicySample:
    """One completion. Of each token: ``is_sampled`` tells whether the model drew it, ``logprobs`` what the sampler
    gave it, ``is_stale`` whether other weights than those to be trained drew it; ``kept_ids``, where sampling cut the
    distribution, what it was drawn from."""

    token_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    advantage: float
    logprobs: tuple[float, ...] = ()
    is_stale: tuple[bool, ...] = ()
    kept_ids: tuple[tuple[int, ...], ...] | None = None
    sample_idx: int = 0
    """Which of its group's rollouts it is."""


@dataclass(frozen=True)
class PolicyGroup:
    """A prompt and the completions of it that have something to teach."""

    prompt_ids: tuple[int, ...]
    samples: tuple[PolicySample, ...]
    group_idx: int = 0
    """Which of the batch's groups it is."""


@dataclass(frozen=True)
class TrainBatch:
    """One batch of an optimizer. ``num_loss_tokens`` counts the sampled tokens of all groups kept, also of those whose
    samples were all equally good: these have no gradient, and are not in ``groups`` unless the loss has terms that
    they count in."""

    groups: tuple[PolicyGroup, ...]
    num_loss_tokens: int
    metrics: dict[str, float]


def is_valid(rollout: Rollout) -> bool:
    """Whether a rollout came to its end and was judged; one that failed is no reward of 0."""
    return rollout.reward is not None and rollout.completion.finish_reason in ("stop", "length")


def is_even(group: RolloutGroup) -> bool:
    """Whether a group has nothing to teach: fewer than two valid samples, or verdicts that are all alike."""
    verdicts = [rollout.reward for rollout in group.rollouts if is_valid(rollout)]
    return len(verdicts) < 2 or len(set(verdicts)) == 1


def collate_groups(
    groups: Sequence[RolloutGroup],
    loss: PolicyLossConfig = REINFORCE,
    *,
    version: int = 0,
    max_tokens: int | None = None,
) -> TrainBatch:
    """Advantages as `loss` defines them, for weights of number `version`; `max_tokens` bounds a completion, for the
    penalty on those that come near.

    Failed rollouts leave their group; a group with fewer than two left has no baseline and is dropped. Both are
    counted in the metrics.
    """
    keeps_even = loss.kl_coef > 0 or loss.entropy_coef > 0
    taught: list[PolicyGroup] = []
    kept: list[Rollout] = []
    num_loss_tokens = num_failed = num_dropped = num_even = 0
    for group_idx, group in enumerate(groups):
        places = [i for i, rollout in enumerate(group.rollouts) if is_valid(rollout)]
        valid = [group.rollouts[i] for i in places]
        num_failed += len(group.rollouts) - len(valid)
        if len(valid) < 2:
            num_dropped += 1
            continue
        kept += valid
        advantages = _advantages([_shaped_reward(rollout, loss, max_tokens) for rollout in valid], loss.advantage)
        samples = [
            _sample(rollout.completion, advantage, version, sample_idx)
            for rollout, advantage, sample_idx in zip(valid, advantages, places, strict=True)
            if loss.overlong != "mask" or rollout.completion.finish_reason != "length"
        ]
        num_loss_tokens += sum(sum(sample.is_sampled) for sample in samples)
        has_signal = any(advantages)
        num_even += not has_signal
        if samples and (has_signal or keeps_even):
            taught.append(PolicyGroup(group.prompt.token_ids, tuple(samples), group_idx))
    counts = {"num_failed": num_failed, "num_dropped_groups": num_dropped, "num_tokens": num_loss_tokens}
    return TrainBatch(
        groups=tuple(taught),
        num_loss_tokens=num_loss_tokens,
        metrics={
            **{f"train/{name}": float(number) for name, number in counts.items()},
            "train/even_group_share": num_even / max(len(groups) - num_dropped, 1),
            **_describe(kept, version),
        },
    )


def _shaped_reward(rollout: Rollout, loss: PolicyLossConfig, max_tokens: int | None) -> float:
    """The verdict, less the penalty for length (DAPO's soft overlong punishment)."""
    reward = float(rollout.reward or 0.0)
    if loss.overlong != "penalty" or max_tokens is None:
        return reward
    num_over = len(rollout.completion.token_ids) - (max_tokens - loss.overlong_buffer)
    return reward - min(max(num_over / loss.overlong_buffer, 0.0), 1.0)


def _advantages(rewards: Sequence[float], kind: str) -> list[float]:
    """Exactly zero where all rewards are alike."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    n, mean = len(rewards), fsum(rewards) / len(rewards)
    if kind == "leave_one_out":
        return [(reward - mean) * n / (n - 1) for reward in rewards]
    std = sqrt(fsum((reward - mean) ** 2 for reward in rewards) / n) if kind == "mean_std" else 1.0
    return [(reward - mean) / (std + STD_EPS if kind == "mean_std" else 1.0) for reward in rewards]


def _sample(completion: Completion, advantage: float, version: int, sample_idx: int) -> PolicySample:
    sampled_by = token_versions(completion)
    return PolicySample(
        completion.token_ids,
        completion.sampled_mask,
        advantage,
        completion.logprobs,
        tuple(v != version for v in sampled_by),
        completion.kept_ids,
        sample_idx,
    )


def token_versions(completion: Completion) -> list[int]:
    """Number of the weights that drew each token, from the runs that the completion carries."""
    return [number for number, length in completion.weights_versions for _ in range(length)]


def _describe(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """What a step's valid completions are like."""
    if not rollouts:
        return {"train/reward": float("nan")}
    completions = [rollout.completion for rollout in rollouts]
    lengths = sorted(len(c.token_ids) for c in completions)
    ages = [version - number for c in completions for number in token_versions(c)]
    histogram = {age: ages.count(age) / len(ages) for age in sorted(set(ages))}
    num_stopped = sum(c.finish_reason == "stop" for c in completions)
    return {
        "train/reward": fsum(float(rollout.reward or 0.0) for rollout in rollouts) / len(rollouts),
        "train/completion_len": sum(lengths) / len(lengths),
        "train/completion_len_p50": float(lengths[len(lengths) // 2]),
        "train/completion_len_p90": float(lengths[len(lengths) * 9 // 10]),
        "train/stopped_share": num_stopped / len(completions),
        "train/truncated_share": 1 - num_stopped / len(completions),
        **{f"train/staleness/{age}": share for age, share in histogram.items()},
    }
