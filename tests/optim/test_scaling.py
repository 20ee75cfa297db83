"""The plan behind the depth dial, against the figures nanochat publishes, and the schedules."""

from __future__ import annotations

import pytest

from rayllm.config.schema import Horizon, ModelConfig, OptimConfig, PretrainConfig, WorkersConfig
from rayllm.model.gpt import GPT
from rayllm.optim.scaling import count_parameters, plan, plan_model
from rayllm.optim.schedule import PretrainSchedule
from rayllm.plans.memory import training_bytes
from rayllm.plans.pretrain import describe_plan

# depth: parameters, scaling parameters, FLOPs per token, tokens per step, rate multiplier, weight decay, steps
NANOCHAT = {
    4: (36.70e6, 11.53e6, 8.02e7, 262_144, 0.707, 1.890, 528),
    8: (125.8e6, 41.94e6, 2.957e8, 262_144, 0.707, 0.520, 1920),
    12: (286_261_730, 110.10e6, 7.597e8, 524_288, 1.0, 0.28, 2520),
    20: (896.5e6, 435.2e6, 2.886e9, 1_048_576, 1.414, 0.100, 4980),
    24: (1_384.1e6, 729.8e6, 4.775e9, 1_048_576, 1.414, 0.0597, 8352),
    32: (2_818.6e6, 1_677.7e6, 1.077e10, 2_097_152, 2.0, 0.0368, 9600),
}


@pytest.mark.parametrize("depth", NANOCHAT)
def test_plan_matches_nanochat(depth) -> None:
    derived = plan(PretrainConfig(depth=depth), vocab_size=32768)
    total, scaling, flops, tokens, rate, decay, steps = NANOCHAT[depth]
    assert derived.parameters.total == pytest.approx(total, rel=1e-3)
    assert derived.parameters.scaling == pytest.approx(scaling, rel=1e-3)
    assert derived.flops_per_token == pytest.approx(flops, rel=1e-3)
    assert (derived.tokens_per_step, derived.num_steps) == (tokens, steps)
    assert derived.lr_multiplier == pytest.approx(rate, rel=1e-3)
    assert derived.matrix_weight_decay == pytest.approx(decay, rel=2e-3)


@pytest.mark.parametrize("num_kv_heads", [None, 1])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_counted_parameters_are_the_model_s(depth, num_kv_heads) -> None:
    config = PretrainConfig(
        depth=depth, model=ModelConfig(aspect_ratio=48, head_dim=16, num_kv_heads=num_kv_heads, sequence_len=32)
    )
    shape = plan_model(config, vocab_size=100)
    assert count_parameters(shape).total == sum(p.numel() for p in GPT(shape).parameters())


def test_batch_split_over_workers() -> None:
    config = PretrainConfig(
        depth=4, tokens_per_step=2048 * 12, rows_per_micro_batch=4, workers=WorkersConfig(num_workers=2)
    )
    derived = plan(config, 1000)
    assert (derived.rows_per_step, derived.rows_per_micro_batch, derived.num_micro_batches) == (12, 4, 2)


def test_horizons_agree() -> None:
    by_ratio = plan(PretrainConfig(depth=4, horizon=Horizon(kind="ratio", value=8)), 32768)
    for kind, value in (
        ("tokens", by_ratio.num_tokens),
        ("steps", by_ratio.num_steps),
        ("flops", by_ratio.num_tokens * by_ratio.flops_per_token),
    ):
        assert plan(PretrainConfig(depth=4, horizon=Horizon(kind=kind, value=value)), 32768) == by_ratio


def test_impossible_batches_name_the_cure() -> None:
    with pytest.raises(
        ValueError, match=r"tokens_per_step=5000 must be a multiple .* = 2048: try --tokens_per_step=4096"
    ):
        plan(PretrainConfig(depth=4, tokens_per_step=5000), 1000)
    with pytest.raises(ValueError, match="less than one step"):
        plan(PretrainConfig(depth=4, horizon=Horizon(kind="tokens", value=1000)), 1000)


def test_the_plan_in_words_names_what_a_user_asks() -> None:
    described = describe_plan(PretrainConfig(depth=12))
    assert described["parameters"].startswith("286,261,730")
    assert described["steps"] == "2,520"
    assert "GiB per worker" in described["estimated_memory"]
    assert {"training_flops", "tokens", "tokens_per_step", "estimated_time"} <= described.keys()


def test_workers_share_the_optimizer_s_state() -> None:
    """Of the bytes of one worker only weights, gradients and activations stay with each of many."""
    derived = plan(PretrainConfig(depth=12), vocab_size=32768)
    alone, of_two, of_many = (training_bytes(derived.model, 2048, n) for n in (1, 2, 1000))
    counts = derived.parameters
    state = 4 * (2 * counts.total - counts.matrices)
    assert alone - of_two == pytest.approx(state / 2, rel=0.1)
    assert of_many < alone - 0.9 * state


def test_schedule() -> None:
    schedule = PretrainSchedule(1000, OptimConfig())
    assert schedule.at(0).lr_multiplier == pytest.approx(1 / 40)
    assert schedule.at(39).lr_multiplier == schedule.at(350).lr_multiplier == 1
    assert schedule.at(675).lr_multiplier == pytest.approx(0.525), "half-way down from 1 to 0.05"
    assert schedule.at(1000).lr_multiplier == pytest.approx(0.05)
    assert schedule.at(0).momentum == 0.85
    assert schedule.at(200).momentum == pytest.approx(0.91)
    assert schedule.at(1000).momentum == pytest.approx(0.90)
    assert schedule.at(0).weight_decay_share == 1
    assert schedule.at(500).weight_decay_share == pytest.approx(0.5)
    assert schedule.at(1000).weight_decay_share == pytest.approx(0)
