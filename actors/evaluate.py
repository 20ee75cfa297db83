"""The `chat-eval` stage: pass@1 of a chat model on tasks with a verdict, sampled by rollout actors."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from actors import cluster
from actors.cluster import ActorGroup, place_in_turns
from actors.rollout import RolloutPool, SampleRequest, load_task
from actors.weights import ObjectStoreChannel
from rayllm.config.chat_schema import ChatEvalConfig, TaskConfig
from rayllm.config.load import to_dict
from rayllm.config.schema import SamplingConfig
from rayllm.engine.reply import open_chat_checkpoint
from rayllm.evals.pass_at_k import Estimate, pass_at_k
from rayllm.runs.atomic import write_json
from rayllm.runs.checkpoint import Checkpoint
from rayllm.runs.load import load_tokenizer
from rayllm.runs.run_dir import open_run
from rayllm.runs.tracking import build_tracker, check_sinks
from rayllm.text.chat import answer_text
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import RolloutGroup

MAY_CHANGE = ("rollouts", "tracking")
NUM_SHOWN = 3
"""Answers of each task that the report shows."""


@dataclass(frozen=True)
class TaskReport:
    """A model's score on a task. `pass_at_k[k]` is the chance that one of k samples is right."""

    task: str
    pass_at_k: dict[int, Estimate]
    greedy: Estimate
    num_problems: int
    num_samples: int
    num_failed: int
    seconds: float
    groups: Sequence[RolloutGroup]


def evaluate_task(pool: RolloutPool, config: TaskConfig, num_samples: int, max_tokens: int, seed: int) -> TaskReport:
    """Sample every problem `num_samples` times at temperature 1, and once greedily."""
    start = time.perf_counter()
    example_ids = tuple(range(len(load_task(config))))
    sampling = SamplingConfig(temperature=1.0, max_tokens=max_tokens, seed=seed)
    sampled = pool.sample(SampleRequest(config, example_ids, num_samples, sampling))
    greedy = pool.sample(SampleRequest(config, example_ids, 1, replace(sampling, temperature=0)))
    return TaskReport(
        task=f"{config.name}/{config.split}",
        pass_at_k={k: pass_at_k(sampled, k) for k in range(1, num_samples + 1)},
        greedy=pass_at_k(greedy, 1),
        num_problems=len(example_ids),
        num_samples=num_samples,
        num_failed=sum(r.reward is None for group in (*sampled, *greedy) for r in group.rollouts),
        seconds=time.perf_counter() - start,
        groups=sampled,
    )


def run(config: ChatEvalConfig) -> None:
    """Print a table; write report.json and metrics.jsonl to the report directory."""
    checkpoint = open_chat_checkpoint(config.checkpoint)
    check_sinks(config.tracking)
    for task in config.tasks:
        load_task(task)  # what is missing or damaged is told before there is a report directory
    # Beside the run's checkpoints, one report per step: runs/rl/chat-eval/step_000500.
    out = Path(config.out) if config.out else checkpoint.report_path("chat-eval")
    plan = {"checkpoint": str(checkpoint), "step": checkpoint.step}
    with open_run(out, stage="chat-eval", config=config, plan=plan, may_change=MAY_CHANGE) as run_dir:
        reports = _evaluate(config, checkpoint)
        content = plan | {
            "tasks": [to_json(report) for report in reports],
            "samples": list(_samples(reports, load_tokenizer(checkpoint))),
        }
        write_json(run_dir.path / "report.json", content)
        tracker = build_tracker(run_dir.path, config.tracking, config=to_dict(config), resume_step=None)
        for report in reports:
            one = report.pass_at_k[1]
            tracker.log(
                checkpoint.step, {f"{report.task}/pass@1": one.value, f"{report.task}/pass@1_stderr": one.stderr}
            )
        tracker.close()
        print(f"chat-eval: {run_dir.path / 'report.json'}")


def _evaluate(config: ChatEvalConfig, checkpoint: Checkpoint) -> list[TaskReport]:
    rollouts, reports = config.rollouts, []
    with cluster.connect() as ray_cluster:
        group = ActorGroup(rollouts.num_actors, rollouts.cpus_per_actor, rollouts.device)
        (placement,) = place_in_turns(ray_cluster, [group], rollouts.timeout_s)
        pool = RolloutPool(checkpoint.address, rollouts, placement, ObjectStoreChannel(), checkpoint.step)
        try:
            for task in config.tasks:
                reports.append(evaluate_task(pool, task, config.num_samples, config.max_tokens, config.seed))
                print(render_report(reports[-1]), flush=True)
        finally:
            pool.close()
    return reports


def _samples(reports: Sequence[TaskReport], tokenizer: Tokenizer) -> Iterator[dict[str, object]]:
    """The first answer to each task's first problems."""
    for report in reports:
        for group in report.groups[:NUM_SHOWN]:
            completion, reward = group.rollouts[0].completion, group.rollouts[0].reward
            yield {
                "task": report.task,
                "prompt": tokenizer.decode(list(group.prompt.token_ids)),
                "answer": answer_text(tokenizer, completion.token_ids, completion.sampled_mask),
                "reward": reward,
            }


def render_report(report: TaskReport) -> str:
    """A task's score on one line."""
    one, greedy = report.pass_at_k[1], report.greedy
    failed = f", {report.num_failed} failed" if report.num_failed else ""
    return (
        f"{report.task:<28} pass@1 {one.value:6.1%} +- {one.stderr:.1%}   greedy {greedy.value:6.1%} +- "
        f"{greedy.stderr:.1%}   {report.num_problems} problems x {report.num_samples} samples{failed}, "
        f"{report.seconds:.0f} s"
    )


def to_json(report: TaskReport) -> dict[str, object]:
    """A task's score as it stands in `report.json`."""
    return {
        "task": report.task,
        **{f"pass@{k}": _estimate(estimate) for k, estimate in report.pass_at_k.items()},
        "greedy": _estimate(report.greedy),
        "num_problems": report.num_problems,
        "num_samples": report.num_samples,
        "num_failed": report.num_failed,
        "seconds": round(report.seconds, 3),
    }


def _estimate(estimate: Estimate) -> dict[str, object]:
    """null stands for what cannot be told, such as the error of a single problem."""
    return {key: None if math.isnan(number) else number for key, number in asdict(estimate).items()}
