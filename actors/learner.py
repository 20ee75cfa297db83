"""Learners: actors that step replicas of one model together, data-parallel."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ray
import torch
import torch.distributed as dist

from actors.cluster import Placement, wait_for
from actors.weights import Packet, pack
from rayllm.config.chat_schema import RLConfig
from rayllm.optim.schedule import PolicySchedule
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runtime import build_runtime
from rayllm.training.loop import Metrics
from rayllm.training.policy import PolicyLearner
from rayllm.training.rollout_batch import TrainBatch

STEP_TIMEOUT_S = 1800.0


class LearnerWorker:
    """Learner `rank` of the group; `start` makes it ready."""

    def __init__(self, config: RLConfig, rank: int, num_threads: int = 0) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        self._config, self._rank = config, rank

    def find_address(self) -> str:
        """An address at which this learner can be met."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, checkpoint: str, address: str, resumes: bool) -> None:
        """Meet the others and build the replica. Raises RuntimeError when one does not come in time."""
        learners = self._config.learners
        runtime = build_runtime(learners.device, learners.dtype, rank=self._rank, world_size=learners.num_workers)
        if runtime.world_size > 1:
            dist.init_process_group(
                "nccl" if runtime.device.type == "cuda" else "gloo",
                init_method=f"tcp://{address}",
                rank=runtime.rank,
                world_size=runtime.world_size,
                timeout=datetime.timedelta(seconds=learners.placement_timeout_s),
            )
        self.learner = PolicyLearner(
            open_checkpoint(checkpoint),
            self._config.optim,
            PolicySchedule(self._config.num_steps, self._config.optim, self._config.lr_fraction),
            runtime,
            rows_per_micro_batch=self._config.rows_per_micro_batch,
            resumes=resumes,
        )

    def step(self, batch: TrainBatch, step: int) -> Metrics:
        return self.learner.step(batch, step)

    def pack_weights(self, number: int) -> Packet:
        return pack(self.learner.model.state_dict(), number)

    def save(self, checkpoints_path: str, step: int, metrics: Mapping[str, float]) -> None:
        self.learner.save(Path(checkpoints_path), step, metrics, self._config.keep_checkpoints)


class LearnerGroup:
    """All learners, stepped as one. `source` is the one whose weights are published."""

    def __init__(self, config: RLConfig, placement: Placement, checkpoint: str, resumes: bool) -> None:
        device = placement.decide(config.learners.device)
        config = replace(config, learners=replace(config.learners, device=device))
        actor = LearnerActor.options(**placement.options())
        num_learners = config.learners.num_workers
        self._actors = [actor.remote(config, rank, placement.num_threads) for rank in range(num_learners)]
        self.source = self._actors[0]
        timeout_s = config.learners.placement_timeout_s
        address = wait_for([self.source.find_address.remote()], timeout_s, "starting the first learner")[0]
        wait_for(
            [a.start.remote(checkpoint, address, resumes) for a in self._actors], timeout_s, "starting the learners"
        )

    def step(self, batch: TrainBatch, step: int) -> Metrics:
        """One optimizer step on all learners; the metrics of the whole."""
        shared = ray.put(batch)
        metrics = wait_for(
            [a.step.remote(shared, step) for a in self._actors], STEP_TIMEOUT_S, f"learning step {step + 1}"
        )
        return dict(metrics[0])

    def save(self, checkpoints_path: Path, step: int, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint: the first learner does, of what all hold."""
        wait_for(
            [a.save.remote(str(checkpoints_path), step, dict(metrics)) for a in self._actors],
            STEP_TIMEOUT_S,
            "saving the checkpoint",
        )

    def close(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            ray.kill(actor)


LearnerActor = ray.remote(LearnerWorker)
