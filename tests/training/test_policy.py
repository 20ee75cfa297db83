"""RL's gradient: it is the formula's, and any split into micro-batches and learners gives the same."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayllm.config.schema import OptimConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim.schedule import PolicySchedule
from rayllm.training.accumulate import accumulate_gradient
from rayllm.training.policy import summed_policy_loss
from rayllm.training.policy_batch import PolicyMicroBatch, micro_batches
from rayllm.training.policy_loss import PolicyLoss
from rayllm.training.rollout_batch import REINFORCE, TrainBatch, collate_groups
from rayllm.types import Completion, FinishReason, Prompt, Rollout, RolloutGroup

Gradients = dict[str, torch.Tensor]


def build_model() -> GPT:
    model = GPT(GPTConfig(sequence_len=64, vocab_size=40, num_layers=2, num_heads=2, num_kv_heads=1, d_model=32))
    model.init_weights(0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model.double()


def rollout(length: int, reward: float | None, seed: int = 0, reason: FinishReason = "stop") -> Rollout:
    draw = random.Random(seed * 1000 + length)
    tokens = tuple(draw.randrange(40) for _ in range(length))
    sampled = tuple(t % 5 != 3 for t in range(length))
    return Rollout(Completion(tokens, sampled, (-1.0,) * length, reason), reward)


def groups() -> list[RolloutGroup]:
    """Rewards and lengths of every kind: even groups, failures, a group without a baseline."""
    draw = random.Random(0)
    made = []
    for p in range(6):
        prompt = Prompt(f"p{p}", tuple(draw.randrange(40) for _ in range(3 + p)))
        rollouts = [rollout(4 + 7 * (i + p) % 29, draw.choice([0.0, 1.0, 0.5]), seed=p) for i in range(5)]
        made.append(RolloutGroup(prompt, tuple(rollouts)))
    made[1] = RolloutGroup(made[1].prompt, tuple(Rollout(r.completion, 1.0) for r in made[1].rollouts))
    made[2] = RolloutGroup(made[2].prompt, (*made[2].rollouts[:3], rollout(9, None), rollout(8, 1.0, reason="failed")))
    made[3] = RolloutGroup(made[3].prompt, (rollout(9, 1.0), rollout(7, None), rollout(0, None, reason="failed")))
    return made


def gradients(model: GPT) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Gradients, other: Gradients) -> None:
    assert one.keys() == other.keys()
    scale = max(float(g.abs().max()) for g in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(
            gradient, other[name], rtol=1e-9, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def losses(batches: list[PolicyMicroBatch]) -> list[PolicyLoss]:
    return [PolicyLoss(batch, REINFORCE) for batch in batches]


def by_micro_batches(batch: TrainBatch, tokens_per_micro_batch: int) -> Gradients:
    model = build_model()
    accumulate_gradient(
        model,
        losses(micro_batches(batch, tokens_per_micro_batch, "cpu")),
        summed_policy_loss,
        num_loss_tokens=batch.num_loss_tokens,
    )
    return gradients(model)


def test_gradient_is_that_of_the_formula() -> None:
    """-sum(logp * A) / (sampled tokens of all valid rollouts), one completion at a time, without padding."""
    model, loss, num_tokens = build_model(), torch.zeros((), dtype=torch.float64), 0
    for group in groups():
        valid = [r for r in group.rollouts if r.reward is not None and r.completion.finish_reason != "failed"]
        if len(valid) < 2:
            continue
        mean = sum(r.reward for r in valid) / len(valid)
        for r in valid:
            tokens = [*group.prompt.token_ids, *r.completion.token_ids]
            logprobs_TV = model(torch.tensor([tokens]))[0].log_softmax(-1)
            for t, is_sampled in enumerate(r.completion.sampled_mask):
                at = len(group.prompt.token_ids) + t
                num_tokens += is_sampled
                loss = loss - is_sampled * (r.reward - mean) * logprobs_TV[at - 1, tokens[at]]
    (loss / num_tokens).backward()
    batch = collate_groups(groups())
    assert batch.num_loss_tokens == num_tokens
    assert_same(gradients(model), by_micro_batches(batch, 60))


def test_a_gradient_repeats_to_the_last_bit() -> None:
    """On a CPU, with several threads, though the keys and the last token of a prompt are taken by all its samples."""
    model = GPT(GPTConfig(sequence_len=64, vocab_size=40, num_layers=2, num_heads=4, num_kv_heads=2, d_model=128))
    model.init_weights(0)
    model.blocks[0].attn.c_proj.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    rollouts = tuple(rollout(40, float(i % 2), seed=i) for i in range(32))
    batch = collate_groups([RolloutGroup(Prompt(f"p{p}", tuple(range(30))), rollouts) for p in range(2)])
    micro_batch = micro_batches(batch, 10_000, "cpu")[0]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        seen = []
        for _ in range(12):
            model.zero_grad()
            summed_policy_loss(model, PolicyLoss(micro_batch, REINFORCE)).backward()
            seen.append(gradients(model))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(seen[0][name], again[name]) for again in seen[1:] for name in again)


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 30, 70, 150, 10_000])
def test_any_split_into_micro_batches_gives_the_same_gradient(tokens_per_micro_batch) -> None:
    batch = collate_groups(groups())
    assert_same(by_micro_batches(batch, 100), by_micro_batches(batch, tokens_per_micro_batch))


def _learn_as_one_of(rank: int, world_size: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    model, batch = build_model(), collate_groups(groups())
    replica = torch.nn.parallel.DistributedDataParallel(model)
    accumulate_gradient(
        replica,
        losses(micro_batches(batch, 60, "cpu", rank, world_size)),
        summed_policy_loss,
        num_loss_tokens=batch.num_loss_tokens,
        world_size=world_size,
    )
    torch.save(gradients(model), f"{out}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_learners_give_the_gradients_of_one(tmp_path, world_size) -> None:
    mp.spawn(_learn_as_one_of, (world_size, str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=world_size)
    one = by_micro_batches(collate_groups(groups()), 60)
    for rank in range(world_size):
        assert_same(one, torch.load(tmp_path / str(rank)))


def test_failures_are_counted_and_never_a_reward_of_zero() -> None:
    batch = collate_groups(groups())
    metrics = batch.metrics
    assert metrics["train/num_failed"] == 4 and metrics["train/num_dropped_groups"] == 1
    valid = [r.reward for g in groups() for r in g.rollouts if r.reward is not None]
    dropped = 1.0 + 1.0  # the single valid rollout of group 3, and the failed one of group 2 with a reward
    assert metrics["train/reward"] == pytest.approx((sum(valid) - dropped) / (len(valid) - 2))
    for index, group in enumerate(groups()[2:3]):
        rewards = [r.reward for r in group.rollouts[:3]]
        baseline = sum(rewards) / 3
        own = [taught for taught in batch.groups if taught.prompt_ids == group.prompt.token_ids]
        if len(set(rewards)) > 1:
            advantages = [sample.advantage for taught in own for sample in taught.samples]
            assert advantages == pytest.approx([r - baseline for r in rewards]), index


def test_groups_that_are_all_alike_cost_no_forward_and_keep_their_tokens() -> None:
    even = RolloutGroup(Prompt("e", (1, 2)), tuple(rollout(n, 0.1) for n in (5, 6, 7)))
    batch = collate_groups([even])
    assert batch.groups == () and batch.metrics["train/even_group_share"] == 1.0
    assert batch.num_loss_tokens == sum(sum(r.completion.sampled_mask) for r in even.rollouts)
    assert collate_groups([]).num_loss_tokens == 0


def test_learners_share_the_work_and_bring_as_many_micro_batches() -> None:
    batch = collate_groups(groups())
    wanted = sorted(int(t) for m in micro_batches(batch, 10_000, "cpu") for t in m.targets_M)
    for world_size in (1, 2, 3, 7, 50):
        shares = [micro_batches(batch, 60, "cpu", rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(int(t) for share in shares for m in share for t in m.targets_M) == wanted
    loads = [sum(m.tokens_1N.numel() for m in micro_batches(batch, 60, "cpu", rank, 3)) for rank in range(3)]
    assert max(loads) < 1.3 * min(loads), loads


def test_a_prompt_is_read_once_for_its_samples() -> None:
    batch = collate_groups(groups())
    (whole,) = micro_batches(batch, 10_000, "cpu")
    assert whole.tokens_1N.numel() == sum(
        len(g.prompt_ids) + sum(len(s.token_ids) - 1 for s in g.samples) for g in batch.groups
    )
    assert all(m.tokens_1N.numel() <= 60 for m in micro_batches(batch, 60, "cpu"))


def test_schedule_falls_from_the_fraction_to_the_end() -> None:
    schedule = PolicySchedule(10, OptimConfig(warmup_steps=2, warmdown_ratio=1, final_lr_fraction=0), lr_fraction=0.2)
    rates = [schedule.at(step).lr_multiplier for step in range(10)]
    assert rates[:2] == pytest.approx([0.1, 0.2]) and rates[2:] == pytest.approx(
        [0.02 * (10 - s) for s in range(2, 10)]
    )
