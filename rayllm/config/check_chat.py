"""Impossible combinations of the stages that come after a base model, and rules shared with the stages before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from rayllm.config.chat_schema import ChatConfig, ChatEvalConfig, ReportConfig, ServeConfig, SFTConfig, TaskConfig
from rayllm.config.errors import Conflict
from rayllm.config.quickstart_schema import QuickstartConfig
from rayllm.config.rl_schema import ExplainConfig, RLConfig
from rayllm.config.schema import WorkersConfig

_SPLITS = {"gsm8k": ("train", "validation", "test"), "chat_jsonl": ("train", "validation")}


def find_conflicts(config: Any, find_in_stage: Callable[[Any], Iterator[Conflict]]) -> Iterator[Conflict]:
    """Everything about a valid tree that cannot work; `find_in_stage` looks into the stages of a quickstart."""
    match config:
        case SFTConfig():
            yield from _sft(config)
        case RLConfig():
            yield from _rl(config)
        case ChatEvalConfig():
            yield from _chat_eval(config)
        case ChatConfig() if config.prompt is not None and not config.prompt.strip():
            yield Conflict(("prompt",), "prompt is empty; write what to ask, or leave it out to have a conversation")
        case ServeConfig():
            yield from _serve(config)
        case ReportConfig() if not config.run.strip():
            yield Conflict(("run",), "run is missing; give a run directory, or the folder of a model's runs")
        case ExplainConfig() if not config.run.strip():
            yield Conflict(("run",), "run is missing; give a run directory of the rl stage")
        case QuickstartConfig():
            # The tokenizer's and the shards' sources are set by the quickstart itself.
            for name in ("pretrain", "sft", "rl", "chat_eval"):
                for conflict in find_in_stage(getattr(config, name)):
                    keys = tuple(f"{name}.{key}" for key in conflict.keys)
                    yield Conflict(keys, f"{name}: {conflict.message.replace(' --', f' --{name}.')}")


def divisible_step(tokens: int, row_key: str, row: int, num_workers: int) -> Iterator[Conflict]:
    """A step is whole rows on each worker."""
    if tokens % (unit := row * num_workers):
        yield Conflict(
            ("tokens_per_step", row_key, "workers.num_workers"),
            f"tokens_per_step={tokens} is not divisible by {row_key} {row} * workers.num_workers "
            f"{num_workers} = {unit}; write --tokens_per_step={max(1, (tokens + unit // 2) // unit) * unit}",
        )


def one_mps_worker(key: str, workers: WorkersConfig) -> Iterator[Conflict]:
    """Apple's GPU serves one process."""
    if workers.device == "mps" and workers.num_workers > 1:
        yield Conflict(
            (f"{key}.num_workers", f"{key}.device"),
            f"{key}.num_workers={workers.num_workers} is too many for {key}.device=mps, which serves one process; "
            f"write --{key}.num_workers=1 or --{key}.device=cpu",
        )


def _task(key: str, task: TaskConfig, *, needs_verdict: bool = False, is_mixture: bool = False) -> Iterator[Conflict]:
    """What one task, at `key`, cannot be."""
    if needs_verdict and task.name == "chat_jsonl":
        yield Conflict(
            (f"{key}.name",), f"{key}.name=chat_jsonl has no verdict on answers; write --{key}.name=gsm8k or another"
        )
    if task.name == "chat_jsonl" and not (task.path or "").strip():
        yield Conflict(
            (f"{key}.path", f"{key}.name"),
            f"{key}.path is missing; {key}.name=chat_jsonl reads conversations from a file, write --{key}.path=FILE",
        )
    if task.name != "chat_jsonl" and task.path is not None:
        yield Conflict(
            (f"{key}.path", f"{key}.name"),
            f"{key}.path={task.path} is not read by {key}.name={task.name}; write --{key}.name=chat_jsonl, or leave "
            "the path out",
        )
    splits = _SPLITS.get(task.name)
    if splits and task.split not in splits:
        yield Conflict(
            (f"{key}.split", f"{key}.name"),
            f"{key}.split={task.split} is no part of {task.name}, which has {', '.join(splits)}; "
            f"write --{key}.split={splits[-1]}",
        )
    if task.epochs > 1 and not is_mixture:
        yield Conflict(
            (f"{key}.epochs",), f"{key}.epochs={task.epochs} counts only in the mixture of sft; leave it out here"
        )


def _leak(key: str, held_out: TaskConfig, train_key: str, train: TaskConfig) -> Iterator[Conflict]:
    """What is learned from tells nothing when it is tested on."""
    if _source(held_out) == _source(train):
        yield Conflict(
            (f"{key}.split", f"{key}.name", f"{train_key}.split", f"{train_key}.name"),
            f"{key} holds what {train_key} learns from ({train.path or train.name}, split {train.split}); write "
            f"--{key}.split={'validation' if train.split != 'validation' else 'test'}",
        )


def _source(task: TaskConfig) -> TaskConfig:
    return dataclasses.replace(task, num_examples=None, epochs=1)


def _sft(config: SFTConfig) -> Iterator[Conflict]:
    if not config.tasks:
        yield Conflict(("tasks",), "tasks=[] leaves nothing to learn; write --tasks='[{name: word_problems}]'")
    if not config.validation:
        yield Conflict(
            ("validation",),
            "validation=[] leaves nothing to measure; write --validation='[{name: word_problems, split: validation}]'",
        )
    for task_idx, task in enumerate(config.tasks):
        yield from _task(f"tasks.{task_idx}", task, is_mixture=True)
    for held_out_idx, held_out in enumerate(config.validation):
        yield from _task(f"validation.{held_out_idx}", held_out)
        for task_idx, task in enumerate(config.tasks):
            yield from _leak(f"validation.{held_out_idx}", held_out, f"tasks.{task_idx}", task)
    if config.sequence_len is not None:
        yield from divisible_step(
            config.tokens_per_step, "sequence_len", config.sequence_len, config.workers.num_workers
        )
    yield from one_mps_worker("workers", config.workers)


def _rl(config: RLConfig) -> Iterator[Conflict]:
    if config.num_samples < 2:
        yield Conflict(
            ("num_samples",),
            f"num_samples={config.num_samples} leaves no baseline: a sample is judged against the others of its "
            "problem; write --num_samples=16, or at least 2",
        )
    if config.top_p is not None and config.top_p > 1:
        yield Conflict(
            ("top_p",), f"top_p={config.top_p} is a share of probability; write --top_p=0.95, or leave it out"
        )
    if config.max_staleness > 0 and config.placement == "colocated":
        yield Conflict(
            ("max_staleness", "placement"),
            f"max_staleness={config.max_staleness} samples while it learns, and placement=colocated takes turns; write "
            "--placement=disaggregated, or --max_staleness=0",
        )
    if config.loss.overlong == "penalty" and config.loss.overlong_buffer > config.max_tokens:
        yield Conflict(
            ("loss.overlong_buffer", "max_tokens"),
            f"loss.overlong_buffer={config.loss.overlong_buffer} is longer than any completion, max_tokens="
            f"{config.max_tokens}; write --loss.overlong_buffer={max(1, config.max_tokens // 4)}",
        )
    if config.replay is not None:
        for key, value, off in (
            ("rollout_only", config.rollout_only, False),
            ("max_staleness", config.max_staleness, 0),
            ("sampling_budget", config.sampling_budget, 1),
        ):
            if value != off:
                yield Conflict(
                    ("replay", key),
                    f"{key}={value} is about sampling, and replay={config.replay} samples nothing; leave one out",
                )
    yield from _task("task", config.task, needs_verdict=True)
    yield from _task("validation", config.validation, needs_verdict=True)
    yield from _leak("validation", config.validation, "task", config.task)
    if config.validation.split.startswith("test"):
        yield Conflict(
            ("validation.split",),
            f"validation.split={config.validation.split} would choose weights by what they are tested on; write "
            "--validation.split=validation, and the test part is tried once, at the end",
        )
    yield from one_mps_worker("learners", config.learners)


def _chat_eval(config: ChatEvalConfig) -> Iterator[Conflict]:
    if not config.tasks:
        yield Conflict(
            ("tasks",), "tasks=[] leaves nothing to be tested on; write --tasks='[{name: word_problems, split: test}]'"
        )
    for task_idx, task in enumerate(config.tasks):
        yield from _task(f"tasks.{task_idx}", task, needs_verdict=True)


def _serve(config: ServeConfig) -> Iterator[Conflict]:
    if not config.host.strip():
        yield Conflict(("host",), "host is empty; write --host=127.0.0.1, or 0.0.0.0 to open it to the network")
    if config.model_name is not None and not config.model_name.strip():
        yield Conflict(("model_name",), "model_name is empty; write a name, or leave it out to have the run's")
