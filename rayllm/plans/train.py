"""What a step of training takes, for `--dry-run`: shared by the stages that train, and the plan of fine-tuning."""

from __future__ import annotations

from rayllm.config.chat_schema import SFTConfig, TaskConfig
from rayllm.config.schema import WorkersConfig
from rayllm.model.config import GPTConfig
from rayllm.optim.estimate import ASSUMED_UTILISATION, assumed_device, assumed_rates
from rayllm.optim.scaling import flops_per_token, split_step, split_worker_rows
from rayllm.plans.memory import gib, training_bytes
from rayllm.plans.model import find_model
from rayllm.runs.progress import render_duration


def describe_plan(config: SFTConfig) -> dict[str, object]:
    """What fine-tuning takes, as far as that is known before the conversations are read."""
    found = find_model(config.checkpoint)
    model = found.config
    sequence_len = config.sequence_len or (model.sequence_len if model else None)
    lines = found.lines | {
        "learns from": ", ".join(map(describe_task, config.tasks)),
        "held out": ", ".join(map(describe_task, config.validation)),
        "steps": _describe_steps(config),
        "tokens_per_step": f"{config.tokens_per_step:,} (padding included)",
        "workers": describe_claim(config.workers.num_workers, config.workers.cpus_per_worker, config.workers.device),
        "writes": f"checkpoints to {config.checkpoints or config.out}, the rendered conversations to {config.out}",
    }
    return lines if model is None or sequence_len is None else lines | _describe_sizes(config, model, sequence_len)


def _describe_sizes(config: SFTConfig, model: GPTConfig, sequence_len: int) -> dict[str, object]:
    """What depends on the model."""
    workers = config.workers
    _, rows = split_step(config.tokens_per_step, sequence_len, workers.num_workers, row_key="sequence_len")
    at_once = split_worker_rows(config.rows_per_micro_batch, rows, sequence_len, assumed_device(workers))
    flops = flops_per_token(model) * config.tokens_per_step
    lines: dict[str, object] = {
        "tokens_per_step": f"{config.tokens_per_step:,} (padding included) = {-(-rows // at_once)} micro-batches x up "
        f"to {at_once} rows x {sequence_len} tokens x {workers.num_workers} worker(s)",
        "flops_per_step": f"{flops:.3e}",
        "estimated_memory": f"{worker_memory(model, at_once * sequence_len, workers)} per worker",
        "time_per_step": describe_time(flops, workers),
    }
    if config.max_steps is not None:
        lines["time_at_most"] = describe_time(flops * config.max_steps, workers)
    return lines


def _describe_steps(config: SFTConfig) -> str:
    most = "" if config.max_steps is None else f", at most {config.max_steps:,}"
    return f"one pass over the conversations, whose number is known once they are read{most}"


def describe_task(task: TaskConfig) -> str:
    """A task on part of a line: `gsm8k/train x 4`."""
    name = task.path if task.name == "chat_jsonl" else task.name
    amount = "" if task.num_examples is None else f" (the first {task.num_examples:,})"
    return f"{name}/{task.split}{amount}" + (f" x {task.epochs}" if task.epochs > 1 else "")


def describe_claim(num_actors: int, num_cpus: int | None, device: str) -> str:
    """What so many actors claim of the cluster."""
    cpus = f"{num_cpus} CPU" if num_cpus else "1 CPU"
    on_cpu = f"{num_cpus} CPU each" if num_cpus else "the CPUs shared out among them"
    claims = {"cuda": f"1 GPU and {cpus} each", "cpu": on_cpu, "mps": "Apple's GPU"}
    return f"{num_actors}: " + claims.get(
        device, f"1 GPU and {cpus} each where the cluster has {num_actors} GPU(s), else {on_cpu}"
    )


def worker_memory(model: GPTConfig, tokens_at_once: int, workers: WorkersConfig) -> str:
    """Of one worker, in GiB."""
    num_bytes = training_bytes(
        model,
        tokens_at_once,
        workers.num_workers,
        dtype=workers.dtype,
        device=assumed_device(workers),
        recompute_blocks=workers.recompute_blocks,
    )
    return gib(num_bytes)


def learning_seconds(flops: float, workers: WorkersConfig) -> float:
    """Of so many FLOPs over all workers, at the utilisation assumed; recomputed blocks add a forward pass."""
    rates = assumed_rates(assumed_device(workers), workers.num_workers)
    return flops * (4 / 3 if workers.recompute_blocks else 1) / (ASSUMED_UTILISATION * rates.flops_per_s)


def describe_time(flops: float, workers: WorkersConfig) -> str:
    """The time of so many FLOPs over all workers, with the rate assumed and its origin."""
    rates = assumed_rates(assumed_device(workers), workers.num_workers)
    reached = ASSUMED_UTILISATION * rates.flops_per_s
    return (
        f"{render_seconds(learning_seconds(flops, workers))} at {reached / 1e9:,.0f} GFLOP/s "
        f"({ASSUMED_UTILISATION:.0%} of {rates.origin})"
    )


def render_seconds(seconds: float) -> str:
    """`0.4s`, `45s`, `12m30s`, `3h05m`."""
    return f"{seconds:.1g}s" if seconds < 1 else f"{seconds:.1f}s" if seconds < 10 else render_duration(seconds)
