"""Pretraining and fine-tuning under Ray Train: who runs where, and what happens when a worker dies.

The work itself is `rayllm.training`; each worker resumes by itself from the run directory, so starting the
workers again is all that recovery takes.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from actors import cluster
from actors.rollout import load_task
from rayllm.config.chat_schema import SFTConfig
from rayllm.config.schema import PretrainConfig, WorkersConfig
from rayllm.data.conversation_rows import ConversationRows
from rayllm.data.conversations import Mixture, render_mixture
from rayllm.runs.atomic import write_json
from rayllm.runs.checkpoint import Checkpoint
from rayllm.runs.progress import ProgressFollower
from rayllm.runs.run_dir import RunDir, open_run
from rayllm.runs.stop_request import StopRequest, asking_on_sigterm, note_sigterm
from rayllm.runs.tracking import check_sinks
from rayllm.runtime import Runtime, build_runtime
from rayllm.training import pretrain, sft
from rayllm.training.loop import Metrics
from rayllm.training.stage import Outcome

# What may differ when a run is resumed: how it is run and watched, not what it computes.
RESUMABLE_CHANGES = (
    "workers", "tracking", "log_every", "eval_every", "sample_every", "sample_tokens", "save_every", "keep_checkpoints",
)  # fmt: skip
# Errors that come again on every try: never a reason to start the workers anew.
FATAL = (ValueError, FileNotFoundError, PermissionError, FloatingPointError)

FitConfig = PretrainConfig | SFTConfig
RunWorker = Callable[[Any, Path, Runtime], Outcome]


def run(config: PretrainConfig) -> None:
    """The `pretrain` stage: train, or go on with the run in `config.out`."""
    shards, _, plan = pretrain.check_inputs(config)
    shards.verify()
    check_sinks(config.tracking)
    with open_run(
        config.out, stage="pretrain", config=config, plan=plan.to_dict(), may_change=RESUMABLE_CHANGES
    ) as run_dir:
        checkpoint = pretrain.check_resume(run_dir.checkpoints, plan)
        shards_path, tokenizer_path = (str(Path(p).resolve()) for p in (config.data.shards, config.data.tokenizer))
        data = replace(config.data, shards=shards_path, tokenizer=tokenizer_path)
        placed = replace(config, checkpoints=run_dir.checkpoints, data=data)
        metrics = _run_fit("pretrain", pretrain.run_worker, placed, run_dir, checkpoint, plan.num_steps)
    if metrics:
        bpb, stderr = metrics["val/bpb"], metrics["val/bpb_stderr"]
        print(
            f"pretrain: {plan.num_steps} steps done, validation {bpb:.4f} +- {stderr:.4f} bits per byte: {config.out}"
        )


def run_sft(config: SFTConfig) -> None:
    """The `sft` stage: fine-tune on conversations, or go on with the run in `config.out`."""
    run_path = Path(config.out).expanduser().absolute()
    start = sft.check_start(config, run_path)
    check_sinks(config.tracking)
    have_train, have_held_out = (_find_conversations(config, run_path, start, split) for split in ("train", "val"))
    with open_run(config.out, stage="sft", config=config, plan={}, may_change=RESUMABLE_CHANGES) as run_dir:
        train, _ = have_train(), have_held_out()
        rows = ConversationRows(train, start.sequence_len)
        plan = sft.plan_sft(config, start, rows)
        write_json(run_dir.path / "plan.json", plan.to_dict())
        _tell_conversations(train, rows)
        placed = replace(config, checkpoint=start.checkpoint.address, checkpoints=run_dir.checkpoints)
        metrics = _run_fit("sft", sft.run_worker, placed, run_dir, start.resumes_from, plan.num_steps)
    if metrics:
        loss, stderr = metrics["val/loss"], metrics["val/loss_stderr"]
        print(
            f"sft: {plan.num_steps} steps done, validation loss {loss:.4f} +- {stderr:.4f} nats per assistant token: "
            f"{config.out}"
        )


def _find_conversations(config: SFTConfig, run_path: Path, start: sft.SFTStart, split: str) -> Callable[[], Mixture]:
    """How to come by the rendered conversations of a split: they stand in the run directory, or their tasks, loaded
    here so that bad input is told before there is one, are rendered into it."""
    path, belongs_to = sft.mixture_path(run_path, split), start.identify(config, split)
    found = Mixture.find(path, belongs_to)
    if found is not None:
        return lambda: found
    tasks = [(load_task(task), task.epochs) for task in (config.tasks if split == "train" else config.validation)]
    return partial(
        render_mixture,
        path,
        tasks,
        start.tokenizer,
        max_tokens=start.sequence_len + 1,
        seed=config.seed,
        belongs_to=belongs_to,
    )


def _tell_conversations(mixture: Mixture, rows: ConversationRows) -> None:
    for task in mixture.tasks:
        left_out = f"; left out: {task.main_reasons}" if task.skipped else ""
        cut = f", {task.num_cut:,} of them cut to a row" if task.num_cut else ""
        print(
            f"sft: {task.name}: {task.num_conversations:,} conversations x {task.epochs}{cut}{left_out}",
            file=sys.stderr,
        )
    print(
        f"sft: {len(rows.rows):,} rows of {rows.sequence_len} tokens, {rows.padding_share:.1%} padding", file=sys.stderr
    )


def _run_fit(
    stage: str,
    run_worker: RunWorker,
    config: FitConfig,
    run_dir: RunDir,
    resumes_from: Checkpoint | None,
    num_steps: int,
) -> Metrics | None:
    """Train in the run directory to the end; None when it is there already. Paths in `config` must be absolute, as
    workers run in a directory of their own.

    SIGTERM (a spot machine's notice, `ray job stop`) has the workers save after the step under way; then SystemExit(0).
    """
    done = resumes_from.step if resumes_from else 0
    if done >= num_steps:
        print(f"{stage}: {config.out} holds all {num_steps} steps of this recipe already; nothing to do")
        return None
    if resumes_from is not None:
        print(f"{stage}: resuming {config.out} after step {done} of {num_steps}", file=sys.stderr)
    with cluster.connect() as ray_cluster:
        placement = plan_placement(config.workers, ray_cluster)
        request = StopRequest(run_dir.path)
        request.clear()
        told = f"{stage}: SIGTERM: saving a checkpoint after this step; a second one ends the run at once"
        with (
            asking_on_sigterm(request, say=lambda: print(told, file=sys.stderr, flush=True)),
            ProgressFollower(run_dir.metrics_path, num_steps=num_steps),
        ):
            outcome = _train(stage, run_worker, config, run_dir.path, placement)
        if outcome.step < num_steps:
            print(
                f"{stage}: stopped by SIGTERM after step {outcome.step} of {num_steps}, checkpoint saved; "
                f"the same command goes on from there: {config.out}",
                flush=True,
            )
            raise SystemExit(0)
        return outcome.metrics


def plan_placement(workers: WorkersConfig, ray_cluster: cluster.Cluster) -> ScalingConfig:
    """Which resources each worker gets; waits for a growing cluster to have them."""
    use_gpu = workers.device == "cuda" or (workers.device == "auto" and ray_cluster.count("GPU") >= workers.num_workers)
    share = min(ray_cluster.count("CPU") // workers.num_workers, ray_cluster.most_on_a_node("CPU"))
    cpus = workers.cpus_per_worker or (1 if use_gpu else max(1, share))
    resources = {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})
    ray_cluster.wait_for_room([resources] * workers.num_workers, workers.placement_timeout_s)
    return ScalingConfig(num_workers=workers.num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def _train(stage: str, run_worker: RunWorker, config: FitConfig, run_path: Path, placement: ScalingConfig) -> Outcome:
    """Run the workers to the end, starting them again from the last checkpoint when one dies."""
    for num_failures in range(config.workers.max_failures + 1):
        trainer = _Trainer(
            _worker,
            train_loop_config={"run_worker": run_worker, "config": config, "run_path": str(run_path.resolve())},
            scaling_config=placement,
            # Numbers that the host has are added up without waiting for the GPU.
            torch_config=_TorchConfig(backend="cpu:gloo,cuda:nccl" if placement.use_gpu else "gloo"),
            run_config=RunConfig(
                name=f"attempt-{num_failures}",
                storage_path=str((run_path / "ray").resolve()),
                failure_config=FailureConfig(max_failures=0),
                # Failures are reported here, once; Ray would print each traceback three times.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        try:
            outcome: Outcome = trainer.fit().return_value
            return outcome
        except TrainingFailedError as failure:
            cause = _root_cause(failure)
            if _is_fatal(cause) or num_failures == config.workers.max_failures:
                raise cause from failure
            print(
                f"{stage}: workers failed ({type(cause).__name__}: {cause}); starting them again from the last "
                f"checkpoint ({num_failures + 1} of at most {config.workers.max_failures} times)",
                file=sys.stderr,
            )
    raise AssertionError("unreachable: the last failure is raised")


class _Trainer(TorchTrainer):
    """One that leaves Ctrl-C to us: it then ends the run like any other stage. Ray's own handler exits with 0 or 1, and
    keeping it out by a thread would leave that thread within Ray while Ray is shut down, which ends the process."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


@dataclass
class _TorchConfig(TorchConfig):
    """One whose workers note SIGTERM instead of dying of it."""

    @property
    def backend_cls(self) -> type:
        return _TorchBackend


class _TorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """What it does on a worker it does in the main thread, where alone signals can be handled: training runs beside it,
    in a thread of Ray Train's."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(note_sigterm)


def _worker(loop_config: dict[str, Any]) -> Outcome:
    """What Ray Train runs on each worker."""
    config: FitConfig = loop_config["config"]
    context = ray.train.get_context()
    device = config.workers.device
    if device == "auto" and not ray.get_gpu_ids() and not torch.backends.mps.is_available():
        device = "cpu"
    runtime = build_runtime(
        device, config.workers.dtype, rank=context.get_world_rank(), world_size=context.get_world_size()
    )
    run_worker: RunWorker = loop_config["run_worker"]
    return run_worker(config, Path(loop_config["run_path"]), runtime)


def _root_cause(failure: BaseException) -> BaseException:
    """The first fatal error of any worker, else the first error there is."""
    failures = list(getattr(failure, "worker_failures", {}).values()) or [failure]
    causes = [getattr(f, "cause", None) or getattr(f, "_base_exc", None) or f for f in failures]
    return next((c for c in causes if _is_fatal(c)), causes[0])


def _is_fatal(cause: BaseException) -> bool:
    is_disk_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return is_disk_full or isinstance(cause, FATAL)
