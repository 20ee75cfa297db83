"""The loss of a token against its formula, on all logits, by autograd; and what it must be exactly."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rayllm.config.rl_schema import PolicyLossConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.training.policy import score_tokens, summed_policy_loss
from rayllm.training.policy_batch import micro_batches
from rayllm.training.policy_loss import PolicyLoss
from rayllm.training.rollout_batch import TrainBatch, collate_groups
from rayllm.types import Completion, Prompt, Rollout, RolloutGroup

VOCAB = 40


def build_model(seed: int) -> GPT:
    model = GPT(GPTConfig(sequence_len=64, vocab_size=VOCAB, num_layers=2, num_heads=2, num_kv_heads=1, d_model=32))
    model.init_weights(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
    return model.double()


def log_probs(model: GPT, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """(T, V) of a completion's tokens under its own cut, by a plain forward of one sequence."""
    tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    logits_TV = model(tokens)[0, len(prompt.token_ids) - 1 : -1] / temperature
    if completion.kept_ids is not None:
        is_kept_TV = torch.zeros_like(logits_TV, dtype=torch.bool)
        for t, ids in enumerate(completion.kept_ids):
            is_kept_TV[t, list(ids)] = True
        logits_TV = torch.where(is_kept_TV, logits_TV, -1e30)
    return F.log_softmax(logits_TV, dim=-1)


def sample_groups(*, has_cut: bool = False, versions: tuple[int, int] = (3, 3)) -> list[RolloutGroup]:
    """Three groups, the last of them even; the first half of each completion by one version, the rest by another."""
    draw = random.Random(0)
    groups = []
    for p in range(3):
        rollouts = []
        for i in range(4):
            length = draw.randrange(3, 9)
            ids = tuple(draw.randrange(VOCAB) for _ in range(length))
            mask = tuple(t % 4 != 2 for t in range(length))
            logprobs = tuple(-draw.random() * 4 for _ in ids)
            kept = tuple(tuple(sorted({t, *draw.sample(range(VOCAB), 6)})) for t in ids) if has_cut else None
            runs = ((versions[0], length // 2), (versions[1], length - length // 2))
            completion = Completion(ids, mask, logprobs, "length" if i == 1 else "stop", runs, kept)
            rollouts.append(Rollout(completion, 1.0 if p == 2 else draw.choice([0.0, 1.0, 0.5])))
        groups.append(
            RolloutGroup(Prompt(f"p{p}", tuple(draw.randrange(VOCAB) for _ in range(4 + p))), tuple(rollouts))
        )
    return groups


def ours(model: GPT, batch: TrainBatch, config: PolicyLossConfig, *, temperature: float = 1.0, reference: GPT | None):
    """(loss, gradients) of the first update, and the losses, to go on with."""
    losses = []
    for micro_batch in micro_batches(batch, 30, "cpu", temperature=temperature):
        scores = None if reference is None else score_tokens(reference, micro_batch).logp_M
        losses.append(PolicyLoss(micro_batch, config, reference_logp_M=scores))
    return losses, step(model, losses, batch)


def step(model: GPT, losses: list[PolicyLoss], batch: TrainBatch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for loss in losses:
        value = summed_policy_loss(model, loss) / batch.num_loss_tokens
        value.backward()
        total += float(value.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def naive(model: GPT, groups: list[RolloutGroup], config: PolicyLossConfig, **how) -> torch.Tensor:
    """The formula, one completion at a time. `how`: version, temperature, reference, first (a model)."""
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        rewards = [r.reward for r in group.rollouts]
        mean = sum(rewards) / len(rewards)
        std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
        for rollout in group.rollouts:
            c = rollout.completion
            if config.overlong == "mask" and c.finish_reason == "length":
                continue
            num_tokens += sum(c.sampled_mask)
            advantage = rollout.reward - mean
            if config.advantage == "leave_one_out":
                advantage = rollout.reward - (sum(rewards) - rollout.reward) / (len(rewards) - 1)
            elif config.advantage == "mean_std" and std:
                advantage /= std + 1e-6
            temperature = how.get("temperature", 1.0)
            all_logp = log_probs(model, group.prompt, c, temperature)
            logp = all_logp.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
            first = how.get("first")
            first_logp = logp.detach()
            if first is not None:
                first_logp = (
                    log_probs(first, group.prompt, c, temperature)
                    .gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
                    .detach()
                )
            versions = [v for v, n in c.weights_versions for _ in range(n)]
            for t, is_sampled in enumerate(c.sampled_mask):
                if not is_sampled:
                    continue
                ratio = (logp[t] - first_logp[t]).exp()
                clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                weight = 1.0
                if versions[t] != how.get("version", 3):
                    weight = min(float((first_logp[t] - c.logprobs[t]).exp()), config.importance_cap)
                total = total - weight * (torch.minimum(ratio * advantage, clipped * advantage))
                total = total - weight * advantage * (first_logp[t] - 1)
                if config.kl_coef:
                    reference = how["reference"]
                    ref = log_probs(reference, group.prompt, c, temperature)[t, c.token_ids[t]].detach()
                    total = total + config.kl_coef * ((ref - logp[t]).exp() - (ref - logp[t]) - 1)
                if config.entropy_coef:
                    total = total + config.entropy_coef * (all_logp[t].exp() * all_logp[t].clamp(min=-1e3)).sum()
    return total / num_tokens


CASES = {
    "reinforce": ({}, {}),
    "stale": ({}, {"versions": (1, 3)}),
    "all stale, tight cap": ({"importance_cap": 0.7}, {"versions": (1, 2)}),
    "leave one out": ({"advantage": "leave_one_out"}, {}),
    "over the standard deviation": ({"advantage": "mean_std"}, {}),
    "kl and entropy": ({"kl_coef": 0.3, "entropy_coef": 0.2}, {}),
    "cut": ({"entropy_coef": 0.2}, {"has_cut": True}),
    "masked": ({"overlong": "mask"}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formula(name: str) -> None:
    settings, how = CASES[name]
    config, groups = PolicyLossConfig(**settings), sample_groups(**how)
    temperature = 0.8 if name == "cut" else 1.0
    model, reference = build_model(1), build_model(2)
    batch = collate_groups(groups, config, version=3)
    losses, (value, gradients) = ours(
        model, batch, config, temperature=temperature, reference=reference if config.kl_coef else None
    )
    model.zero_grad()
    expected = naive(model, groups, config, temperature=temperature, reference=reference)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-9)
    scale = max(float(g.abs().max()) for g in gradients.values())
    for param_name, param in model.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(gradients[param_name], param.grad, rtol=1e-9, atol=1e-11 * scale)
    assert all(bool((loss.terms["ratio"] == 1).all()) for loss in losses if len(loss.batch.targets_M)), "exactly"
    terms = sum(float((loss.terms["policy"] + loss.terms["kl"] + loss.terms["entropy"]).sum()) for loss in losses)
    assert terms / batch.num_loss_tokens == pytest.approx(value, rel=1e-12)


def test_later_updates_are_clipped_asymmetrically() -> None:
    config, groups = PolicyLossConfig(clip_low=0.05, clip_high=0.15), sample_groups()
    model, moved = build_model(1), build_model(1)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=p.dtype) * 0.02)
    batch = collate_groups(groups, config, version=3)
    losses, _ = ours(model, batch, config, reference=None)
    for loss in losses:
        loss.end_update()
    value, gradients = step(moved, losses, batch)
    moved.zero_grad()
    expected = naive(moved, groups, config, first=model)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-9)
    for name, param in moved.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(gradients[name], param.grad, rtol=1e-8, atol=1e-12)
    ratios = torch.cat([loss.terms["ratio"] for loss in losses])
    assert (ratios > 1.15).any() and (ratios < 0.95).any(), "both clips are at work"


def test_a_sampler_of_another_dtype_has_every_token_corrected() -> None:
    config, groups = PolicyLossConfig(importance_cap=1.5), sample_groups()
    micro_batch = micro_batches(collate_groups(groups, config, version=3), 10_000, "cpu")[0]
    model = build_model(1)
    loss = PolicyLoss(micro_batch, config, corrects_all=True)
    summed_policy_loss(model, loss)
    expected = (loss.scores.logp_M - micro_batch.sampler_logp_M).exp().clamp(max=1.5)
    torch.testing.assert_close(loss.terms["weight"], expected)
    assert (loss.terms["weight"] == 1.5).any() and (loss.terms["weight"] < 1).any()


def test_what_the_learner_gave_its_own_tokens_mismatches_by_nothing() -> None:
    """Sampler and learner of one dtype and kernels: a ratio of exactly 1, a divergence of exactly 0."""
    from rayllm.runtime import build_runtime
    from rayllm.training.policy_stats import PolicyStats

    model, groups = build_model(1), sample_groups()
    batch = micro_batches(collate_groups(groups, version=3), 10_000, "cpu")[0]
    scored = replace(batch, sampler_logp_M=score_tokens(model, batch).logp_M, is_stale_M=~batch.is_stale_M)
    loss = PolicyLoss(scored, PolicyLossConfig())
    summed_policy_loss(model, loss)
    stats = PolicyStats(build_runtime("cpu", "float32"))
    stats.add([loss], is_first=True)
    measured = stats.measure()
    assert measured["train/mismatch_kl"] == 0.0 and measured["train/importance_max"] == 1.0
    assert measured["train/clip_share"] == 0.0 and measured["train/entropy"] > 0


def test_rewards_near_the_limit_are_lowered_and_verdicts_stay() -> None:
    groups = sample_groups()
    config = PolicyLossConfig(overlong="penalty", overlong_buffer=4)
    batch = collate_groups(groups, config, version=3, max_tokens=8)
    plain = collate_groups(groups, version=3)
    assert batch.metrics["train/reward"] == plain.metrics["train/reward"]
    assert batch.groups != plain.groups and len(batch.groups) == 3, "the even group has lengths to tell apart"
    long = [s for g in batch.groups for s in g.samples if len(s.token_ids) == 8]
    short = [s for g in batch.groups for s in g.samples if len(s.token_ids) <= 4]
    assert long and short and max(s.advantage for s in long) < max(s.advantage for s in short)


def test_even_groups_cost_no_forward_unless_a_term_needs_them() -> None:
    groups = sample_groups()
    assert len(collate_groups(groups).groups) == 2
    assert len(collate_groups(groups, PolicyLossConfig(entropy_coef=0.1)).groups) == 3
    assert collate_groups(groups).num_loss_tokens == collate_groups(groups[:2]).num_loss_tokens + sum(
        sum(r.completion.sampled_mask) for r in groups[2].rollouts
    )
