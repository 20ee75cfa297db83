"""The `chat-eval` stage: pass@1 of a chat model on tasks with a verdict, sampled by rollout actors."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from actors import cluster
from actors.cluster import ActorGroup, place_in_turns
from actors.rollout import RolloutPool, SampleRequest, load_task
from actors.weights import ObjectStoreChannel
from rayllm.config.chat_schema import ChatEvalConfig, TaskConfig
from rayllm.config.schema import SamplingConfig
from rayllm.engine.reply import open_chat_checkpoint
from rayllm.evals.pass_at_k import Estimate, pass_at_k
from rayllm.runs.atomic import write_json
from rayllm.runs.load import load_tokenizer
from rayllm.text.chat import answer_text
from rayllm.types import RolloutGroup

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
    """Print a table and write `report.json`."""
    checkpoint = open_chat_checkpoint(config.checkpoint)
    with cluster.connect() as ray_cluster:
        rollouts = config.rollouts
        group = ActorGroup(rollouts.num_actors, rollouts.cpus_per_actor, rollouts.device)
        (placement,) = place_in_turns(ray_cluster, [group], rollouts.timeout_s)
        pool = RolloutPool(str(checkpoint.path.resolve()), rollouts, placement, ObjectStoreChannel(), checkpoint.step)
        try:
            reports = []
            for task in config.tasks:
                reports.append(evaluate_task(pool, task, config.num_samples, config.max_tokens, config.seed))
                print(render_report(reports[-1]), flush=True)
        finally:
            pool.close()
    tokenizer = load_tokenizer(checkpoint)
    out = Path(config.out) if config.out else checkpoint.path.parent.parent / "chat-eval" / checkpoint.path.name
    out.mkdir(parents=True, exist_ok=True)
    samples = [
        {
            "task": report.task,
            "prompt": tokenizer.decode(list(group.prompt.token_ids)),
            "answer": answer_text(tokenizer, r.completion.token_ids, r.completion.sampled_mask),
            "reward": r.reward,
        }
        for report in reports
        for group in report.groups[:NUM_SHOWN]
        for r in group.rollouts[:1]
    ]
    content = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "tasks": [to_json(report) for report in reports],
        "samples": samples,
    }
    write_json(out / "report.json", json.loads(json.dumps(content)))
    print(f"chat-eval: {out / 'report.json'}")


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
        **{f"pass@{k}": asdict(estimate) for k, estimate in report.pass_at_k.items()},
        "greedy": asdict(report.greedy),
        "num_problems": report.num_problems,
        "num_samples": report.num_samples,
        "num_failed": report.num_failed,
        "seconds": round(report.seconds, 3),
    }
