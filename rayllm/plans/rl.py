"""The plan of reinforcement learning in words, for `--dry-run`: what a step is, who holds what, and how long it takes.

How long completions and prompts are is not known beforehand: every number is for completions of `max_tokens`, so that
it is the most a step takes, and for prompts of `ASSUMED_PROMPT_LEN`.
"""

from __future__ import annotations

import math

from rayllm.config.rl_schema import RLConfig
from rayllm.model.config import GPTConfig
from rayllm.optim.estimate import ASSUMED_UTILISATION, assumed_device, assumed_rates
from rayllm.optim.scaling import count_parameters, flops_per_token
from rayllm.plans.engine import EnginePlan, engine_device, sampling_flops_per_token
from rayllm.plans.memory import bytes_per_number, gib, training_bytes
from rayllm.plans.model import find_model
from rayllm.plans.train import describe_claim, describe_task, learning_seconds, render_seconds

ASSUMED_PROMPT_LEN = 128
"""Tokens of a problem of grade-school mathematics, more or less."""


def describe_plan(config: RLConfig) -> dict[str, object]:
    """Label -> value with its unit; without a model, what follows from the recipe alone."""
    found = find_model(config.checkpoint)
    lines = {
        **found.lines,
        "learns from": f"{describe_task(config.task)}; held out: {describe_task(config.validation)}",
        "step": describe_step(config),
        "run": describe_run(config),
        "validation": describe_validation(config),
        "rollouts": describe_claim(config.rollouts.num_actors, config.rollouts.cpus_per_actor, config.rollouts.device),
        "learners": describe_claim(
            config.learners.num_workers, config.learners.cpus_per_worker, config.learners.device
        ),
        "placement": describe_placement(config),
        "writes": f"checkpoints to {config.checkpoints or config.out}, samples and metrics to {config.out}",
    }
    return lines if found.config is None else lines | _describe_sizes(config, found.config)


def num_completions(config: RLConfig) -> int:
    """Of a step; dynamic sampling may draw up to `sampling_budget` times as many."""
    return config.prompts_per_step * config.num_samples


def num_learned_tokens(config: RLConfig) -> int:
    """Of a step's forward and backward passes, at most: a prompt stands there once for its samples."""
    return num_completions(config) * config.max_tokens + config.prompts_per_step * ASSUMED_PROMPT_LEN


def num_validations(config: RLConfig) -> int:
    """Before the first step, after the last, and between."""
    return 1 + math.ceil(config.num_steps / (config.eval_every or config.num_steps))


def describe_step(config: RLConfig) -> str:
    """Prompts, completions and tokens of a step."""
    budget = "" if config.sampling_budget == 1 else f", up to {config.sampling_budget} times as many sampled"
    updates = "" if config.updates_per_batch == 1 else f", {config.updates_per_batch} times"
    return (
        f"{config.prompts_per_step} prompts x {config.num_samples} samples = {num_completions(config):,} completions "
        f"of up to {config.max_tokens} tokens: {num_completions(config) * config.max_tokens:,} sampled{budget}, "
        f"{num_learned_tokens(config):,} learned from{updates} (with prompts of {ASSUMED_PROMPT_LEN}, once for their "
        "samples)"
    )


def describe_run(config: RLConfig) -> str:
    """The same over all steps."""
    total = num_completions(config) * config.num_steps
    return (
        f"{config.num_steps:,} steps: {config.prompts_per_step * config.num_steps:,} prompts, {total:,} completions, "
        f"at most {total * config.max_tokens:,} tokens sampled"
    )


def describe_validation(config: RLConfig) -> str:
    """How often how much is sampled to see how good the model is."""
    amount = config.validation.num_examples
    test = ", and the test part once at the end" if config.test_at_end else ""
    each = f"{amount:,} problems" if amount else "all problems held out"
    return f"{num_validations(config)} times {each} x {config.eval_samples} samples{test}"


def describe_placement(config: RLConfig) -> str:
    """Whether learners and rollouts share devices."""
    num_rollouts, num_learners = config.rollouts.num_actors, config.learners.num_workers
    devices = {config.rollouts.device, config.learners.device}
    if devices == {"cpu"}:
        turns, apart = "taking turns on all cores", "each on cores of its own"
    else:
        condition = "" if devices == {"cuda"} else " where they have GPUs"
        turns = f"taking turns on the same devices ({max(num_rollouts, num_learners)} GPU(s){condition})"
        apart = f"each on devices of its own ({num_rollouts + num_learners} GPUs{condition})"
    if config.placement == "colocated":
        return f"colocated: {turns}"
    if config.placement == "disaggregated" or config.max_staleness > 0:
        return f"disaggregated: {apart}, up to {config.max_staleness} version(s) apart"
    return f"auto: {apart}; without them, {turns}"


def shares_devices(config: RLConfig) -> bool:
    """Whether sampling and learning are done by the same devices, as far as this machine can tell; cores are shared
    even by those who do not take turns."""
    return config.placement == "colocated" or assumed_device(config.learners) == "cpu"


def plan_engine(config: RLConfig, model: GPTConfig) -> EnginePlan:
    """What one rollout actor holds."""
    rollouts = config.rollouts
    num_prompts = rollouts.num_prompts or rollouts.num_slots
    device = engine_device(rollouts.device)
    return EnginePlan(model, rollouts.num_slots, num_prompts, model.sequence_len, rollouts.dtype, device)


def learner_bytes(config: RLConfig, model: GPTConfig) -> int:
    """What one learner holds: its replica and a step's largest micro-batch, and the model RL started from where the
    loss has a term for it."""
    learners, device = config.learners, assumed_device(config.learners)
    tokens = min(config.tokens_per_micro_batch, math.ceil(num_learned_tokens(config) / learners.num_workers))
    reference = 4 * count_parameters(model).total if config.loss.kl_coef else 0
    return reference + training_bytes(
        model,
        tokens,
        learners.num_workers,
        dtype=learners.dtype,
        device=device,
        recompute_blocks=learners.recompute_blocks,
    )


def _describe_sizes(config: RLConfig, model: GPTConfig) -> dict[str, object]:
    """Memory, FLOPs and time, which depend on the model."""
    engine, learner = plan_engine(config, model), learner_bytes(config, model)
    tokens = min(config.tokens_per_micro_batch, num_learned_tokens(config))
    weights = count_parameters(model).total * bytes_per_number("float32", "cpu")
    lines: dict[str, object] = {
        "memory_per_rollout_actor": engine.describe_memory(),
        "memory_per_learner": f"{gib(learner)}: float32 weights {gib(weights)}, as much of gradients, its share of the "
        f"optimizer's state, and a micro-batch of {tokens:,} tokens",
    }
    if shares_devices(config):
        lines["memory_shared"] = f"{gib(engine.num_bytes + learner)} where a rollout actor and a learner share a device"
    sampling = num_completions(config) * config.max_tokens * sampling_flops_per_token(model)
    lines["flops_per_step"] = f"at most {sampling:.3e} to sample, {_learning_flops(config, model):.3e} to learn"
    return lines | _describe_times(config, model, engine)


def _learning_flops(config: RLConfig, model: GPTConfig) -> float:
    """Of a step; the reference adds a forward pass."""
    passes = config.updates_per_batch + (1 / 3 if config.loss.kl_coef else 0)
    return num_learned_tokens(config) * flops_per_token(model) * passes


def _describe_times(config: RLConfig, model: GPTConfig, engine: EnginePlan) -> dict[str, object]:
    num_actors = config.rollouts.num_actors
    sample_s = engine.decoding_seconds(num_completions(config), config.max_tokens, num_actors)
    learn_s = learning_seconds(_learning_flops(config, model), config.learners)
    overlaps = config.max_staleness > 0 and not shares_devices(config)
    step_s = max(sample_s, learn_s) if overlaps else sample_s + learn_s
    in_turns = "one after the other" if config.max_staleness == 0 else "together, on the same cores"
    how = "the longer of the two, as they overlap" if overlaps else in_turns
    num_validated = (config.validation.num_examples or 0) * config.eval_samples
    validate_s = engine.decoding_seconds(num_validated, config.max_tokens, num_actors) * num_validations(config)
    learner_rates = assumed_rates(assumed_device(config.learners), config.learners.num_workers)
    besides = render_seconds(validate_s) + " of validations"
    besides += " (without the test part at the end)" if config.test_at_end else ""
    return {
        "time_per_step": f"about {render_seconds(step_s)}: {render_seconds(sample_s)} to sample, "
        f"{render_seconds(learn_s)} to learn, {how}",
        "time": f"about {render_seconds(step_s * config.num_steps)}, and {besides}",
        "assumed": f"completions of {config.max_tokens} tokens; sampling {engine.describe_rate(num_actors)}; learning "
        f"{ASSUMED_UTILISATION:.0%} of {learner_rates.origin}",
    }
