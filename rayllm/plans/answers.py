"""The plans of the stages that ask a model, in words, for `--dry-run`: what they read, write and take. Torch-free."""

from __future__ import annotations

from pathlib import Path

from rayllm.config.chat_schema import ChatConfig, ChatEvalConfig, ServeConfig
from rayllm.config.schema import BaseEvalConfig, SampleConfig
from rayllm.data.shards import MANIFEST, Manifest
from rayllm.model.config import GPTConfig
from rayllm.optim.estimate import ASSUMED_UTILISATION, assumed_rates
from rayllm.plans.engine import EnginePlan, engine_device, sampling_flops_per_token
from rayllm.plans.memory import gib, weight_bytes
from rayllm.plans.model import find_model
from rayllm.plans.train import describe_claim, describe_task, render_seconds


def describe_sample(config: SampleConfig) -> dict[str, object]:
    """The `sample` stage."""
    found = find_model(config.checkpoint)
    num_texts = len(config.prompts) * config.num_samples
    lines = found.lines | {
        "writes": f"to the terminal: {len(config.prompts)} prompt(s) x {config.num_samples} sample(s), each of up to "
        f"{config.sampling.max_tokens} tokens"
    }
    if found.config is None:
        return lines
    # No text has more tokens than bytes, and one more stands before it.
    longest = max(len(prompt.encode()) for prompt in config.prompts) + 1
    max_len = min(longest + config.sampling.max_tokens, found.config.max_positions)
    engine = _engine(found.config, config.num_samples, config.num_samples, max_len, config.dtype, config.device)
    return lines | _describe_engine(engine, num_texts, config.sampling.max_tokens)


def describe_chat(config: ChatConfig) -> dict[str, object]:
    """The `chat` stage."""
    found = find_model(config.checkpoint)
    lines = found.lines | {"answers": f"of up to {config.sampling.max_tokens} tokens"}
    if found.config is None:
        return lines
    engine = _engine(found.config, 1, 2, found.config.sequence_len, config.dtype, config.device)
    return (
        lines
        | {"context": f"{found.config.sequence_len:,} tokens, conversation and answer"}
        | _describe_engine(engine, 1, config.sampling.max_tokens)
    )


def describe_serve(config: ServeConfig) -> dict[str, object]:
    """The `serve` stage."""
    found = find_model(config.checkpoint)
    lines = found.lines | {
        "listens": f"http://{config.host}:{config.port}",
        "replicas": describe_claim(config.num_replicas, None, config.device),
        "answers": f"{config.num_replicas * config.num_slots:,} together, {config.num_replicas * config.max_waiting:,} "
        f"waiting, of up to {config.sampling.max_tokens} tokens",
    }
    if found.config is None:
        return lines
    slots = config.num_slots
    engine = _engine(found.config, slots, 2 * slots, found.config.sequence_len, config.dtype, config.device)
    return lines | {"memory_per_replica": engine.describe_memory()}


def describe_chat_eval(config: ChatEvalConfig) -> dict[str, object]:
    """The `chat-eval` stage."""
    found = find_model(config.checkpoint)
    rollouts = config.rollouts
    amounts = [task.num_examples for task in config.tasks]
    num_problems = sum(amount or 0 for amount in amounts)
    num_completions = num_problems * (config.num_samples + 1)
    unknown = f", and {amounts.count(None)} whole task(s) besides" if None in amounts else ""
    lines = found.lines | {
        "tasks": ", ".join(map(describe_task, config.tasks)),
        "completions": f"{num_problems:,} problems x ({config.num_samples} samples + 1 greedy) = {num_completions:,}"
        f"{unknown}, of up to {config.max_tokens} tokens: at most {num_completions * config.max_tokens:,}{unknown}",
        "rollouts": describe_claim(rollouts.num_actors, rollouts.cpus_per_actor, rollouts.device),
        "writes": f"report.json to {config.out or 'chat-eval/step_N beside the checkpoint'}",
    }
    if found.config is None:
        return lines
    num_prompts = rollouts.num_prompts or rollouts.num_slots
    max_len = found.config.sequence_len
    engine = _engine(found.config, rollouts.num_slots, num_prompts, max_len, rollouts.dtype, rollouts.device)
    lines["memory_per_rollout_actor"] = engine.describe_memory()
    if num_completions:
        seconds = engine.decoding_seconds(num_completions, config.max_tokens, rollouts.num_actors)
        rate = engine.describe_rate(rollouts.num_actors)
        lines["time"] = f"about {render_seconds(seconds)}{unknown} ({rate}; answers of {config.max_tokens} tokens)"
    return lines


def describe_base_eval(config: BaseEvalConfig) -> dict[str, object]:
    """The `base-eval` stage."""
    found = find_model(config.checkpoint)
    num_tokens, origin = _held_out(config)
    lines = found.lines | {
        "reads": f"{num_tokens:,} validation tokens at most ({origin})",
        "samples": f"{len(config.prompts)} prompt(s), greedily and sampled, {config.sampling.max_tokens} tokens each",
        "writes": f"report.json to {config.out or 'base-eval/step_N beside the checkpoint'}",
    }
    model = found.config
    if model is None:
        return lines
    device = engine_device(config.device)
    rates = assumed_rates(device, 1)
    flops = num_tokens * sampling_flops_per_token(model)
    seconds = flops / (ASSUMED_UTILISATION * rates.flops_per_s)
    return lines | {
        "memory": f"{gib(weight_bytes(model, config.dtype, device))} of weights, and batches of "
        f"{config.rows_per_batch} rows x {model.sequence_len} tokens",
        "flops": f"{flops:.3e}",
        "time": f"about {render_seconds(seconds)} ({ASSUMED_UTILISATION:.0%} of {rates.origin})",
    }


def _held_out(config: BaseEvalConfig) -> tuple[int, str]:
    if not Path(config.shards, MANIFEST).exists():
        return config.max_tokens, f"no shards at {config.shards} yet"
    held_out = sum(shard.num_tokens for shard in Manifest.load(config.shards).shards if shard.split == "val")
    return min(held_out, config.max_tokens), f"of {held_out:,} in {config.shards}"


def _engine(model: GPTConfig, num_slots: int, num_prompts: int, max_len: int, dtype: str, device: str) -> EnginePlan:
    return EnginePlan(model, num_slots, num_prompts, max_len, dtype, engine_device(device))


def _describe_engine(engine: EnginePlan, num_texts: int, num_tokens: int) -> dict[str, object]:
    seconds = engine.decoding_seconds(num_texts, num_tokens)
    return {
        "memory": engine.describe_memory(),
        "time": f"about {render_seconds(seconds)} (answers of {num_tokens} tokens; {engine.describe_rate()})",
    }
