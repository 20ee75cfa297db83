"""Pretraining under Ray Train: who runs where, and what happens when a worker dies.

The work itself is `rayllm.training`; each worker resumes by itself from the run directory, so starting the
workers again is all that recovery takes.
"""

from __future__ import annotations

import errno
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from actors import cluster
from rayllm.config.schema import PretrainConfig, WorkersConfig
from rayllm.runs.progress import ProgressFollower
from rayllm.runs.run_dir import open_run
from rayllm.runs.tracking import check_sinks
from rayllm.runtime import build_runtime
from rayllm.training.pretrain import check_inputs, check_resume, run_worker

# What may differ when a run is resumed: how it is run and watched, not what it computes.
RESUMABLE_CHANGES = (
    "workers", "tracking", "log_every", "eval_every", "sample_every", "sample_tokens", "save_every", "keep_checkpoints",
)  # fmt: skip
# Errors that come again on every try: never a reason to start the workers anew.
FATAL = (ValueError, FileNotFoundError, PermissionError, FloatingPointError)


def run(config: PretrainConfig) -> None:
    """The `pretrain` stage: train, or go on with the run in `config.out`."""
    _, _, plan = check_inputs(config)
    check_sinks(config.tracking)
    with open_run(
        config.out, stage="pretrain", config=config, plan=plan.to_dict(), may_change=RESUMABLE_CHANGES
    ) as run_dir:
        checkpoint = check_resume(run_dir.path, plan)
        if checkpoint is not None and checkpoint.step >= plan.num_steps:
            print(f"pretrain: {config.out} holds all {plan.num_steps} steps of this recipe already; nothing to do")
            return
        if checkpoint is not None:
            print(f"pretrain: resuming {config.out} after step {checkpoint.step} of {plan.num_steps}", file=sys.stderr)
        with cluster.connect() as ray_cluster:
            placement = plan_placement(config.workers, ray_cluster)
            with ProgressFollower(run_dir.metrics_path, num_steps=plan.num_steps):
                metrics = _train(config, run_dir.path, placement)
        bpb, stderr = metrics["val/bpb"], metrics["val/bpb_stderr"]
        print(
            f"pretrain: {plan.num_steps} steps done, validation {bpb:.4f} +- {stderr:.4f} bits per byte: {config.out}"
        )


def plan_placement(workers: WorkersConfig, ray_cluster: cluster.Cluster) -> ScalingConfig:
    """Which resources each worker gets; waits for a growing cluster to have them."""
    use_gpu = workers.device == "cuda" or (workers.device == "auto" and ray_cluster.count("GPU") >= workers.num_workers)
    cpus = workers.cpus_per_worker or (1 if use_gpu else max(1, ray_cluster.count("CPU") // workers.num_workers))
    resources = {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})
    ray_cluster.wait_for_room([resources] * workers.num_workers, workers.placement_timeout_s)
    return ScalingConfig(num_workers=workers.num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def _train(config: PretrainConfig, run_path: Path, placement: ScalingConfig) -> dict[str, float]:
    """Run the workers to the end, starting them again from the last checkpoint when one dies."""
    for num_failures in range(config.workers.max_failures + 1):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": _with_absolute_paths(config), "run_path": str(run_path.resolve())},
            scaling_config=placement,
            torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo"),
            run_config=RunConfig(
                name=f"attempt-{num_failures}",
                storage_path=str((run_path / "ray").resolve()),
                failure_config=FailureConfig(max_failures=0),
                # Failures are reported here, once; Ray would print each traceback three times.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        try:
            return _fit(trainer).return_value
        except TrainingFailedError as failure:
            cause = _root_cause(failure)
            if _is_fatal(cause) or num_failures == config.workers.max_failures:
                raise cause from failure
            print(
                f"pretrain: workers failed ({type(cause).__name__}: {cause}); starting them again from the last "
                f"checkpoint ({num_failures + 1} of at most {config.workers.max_failures} times)",
                file=sys.stderr,
            )
    raise AssertionError("unreachable: the last failure is raised")


def _fit(trainer: TorchTrainer) -> ray.train.Result:
    """`trainer.fit()` beside the main thread, where Ray Train would take Ctrl-C for itself."""
    outcome: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except Exception as error:  # noqa: BLE001 - handed over whole, and raised by result()
            outcome.set_exception(error)

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    return outcome.result()


def _with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """Workers run in a directory of their own."""
    shards, tokenizer = (str(Path(p).resolve()) for p in (config.data.shards, config.data.tokenizer))
    return replace(config, data=replace(config.data, shards=shards, tokenizer=tokenizer))


def _worker(loop_config: dict[str, Any]) -> dict[str, float]:
    """What Ray Train runs on each worker."""
    config: PretrainConfig = loop_config["config"]
    context = ray.train.get_context()
    device = config.workers.device
    if device == "auto" and not ray.get_gpu_ids() and not torch.backends.mps.is_available():
        device = "cpu"
    runtime = build_runtime(
        device, config.workers.dtype, rank=context.get_world_rank(), world_size=context.get_world_size()
    )
    return run_worker(config, Path(loop_config["run_path"]), runtime)


def _root_cause(failure: BaseException) -> BaseException:
    """The first fatal error of any worker, else the first error there is."""
    failures = list(getattr(failure, "worker_failures", {}).values()) or [failure]
    causes = [getattr(f, "cause", None) or getattr(f, "_base_exc", None) or f for f in failures]
    return next((c for c in causes if _is_fatal(c)), causes[0])


def _is_fatal(cause: BaseException) -> bool:
    is_disk_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return is_disk_full or isinstance(cause, FATAL)
