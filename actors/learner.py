"""Learners: actors that step replicas of one model together, data-parallel."""

from __future__ import annotations

import contextlib
import datetime
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from actors.cluster import Placement, wait_for
from actors.weights_roles import WeightsSender
from rayllm.config.rl_schema import RLConfig
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.writer import CheckpointWriter
from rayllm.runtime import build_runtime
from rayllm.training.loop import Metrics
from rayllm.training.policy import PolicyLearner
from rayllm.training.policy_stats import merge_learners
from rayllm.training.rollout_batch import TrainBatch
from rayllm.training.saved_rollouts import collect_terms, join_terms

STEP_TIMEOUT_S = 1800.0
CLOSE_TIMEOUT_S = 30.0


class LearnerWorker(WeightsSender):
    """Learner `rank` of the group; `start` makes it ready."""

    def __init__(self, config: RLConfig, rank: int, num_threads: int = 0) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        super().__init__(lambda: self.learner.model.state_dict())
        self._config, self._rank = config, rank
        self._writers: dict[str, CheckpointWriter] = {}

    def find_address(self) -> str:
        """An address at which this learner can be met."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, checkpoint: str, address: str, resumes: bool, sampler: Mapping[str, str] | None) -> None:
        """Meet the others and build the replica, for samples of a `sampler` that computes in its "dtype". Raises
        RuntimeError when one does not come in time."""
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
        dtype = str(runtime.dtype).removeprefix("torch.")
        self.learner = PolicyLearner(
            open_checkpoint(checkpoint),
            self._config,
            runtime,
            resumes=resumes,
            reference=open_checkpoint(self._config.checkpoint) if self._config.loss.kl_coef else None,
            corrects_all=sampler is not None and sampler["dtype"] != dtype,
        )

    def step(self, batch: TrainBatch, step: int) -> Metrics:
        return self.learner.step(batch, step)

    def read_terms(self) -> dict[str, np.ndarray]:
        """What this learner made of each token of the newest step."""
        return collect_terms(self.learner.last_losses)

    def save(self, place: str, keep: int, step: int, metrics: Mapping[str, float], num_prompts: int) -> None:
        """Begin to write a checkpoint to the folder or URL, which keeps the newest `keep`."""
        if place not in self._writers:
            self._writers[place] = CheckpointWriter(place, self.learner.tokenizer, keep)
        self.learner.save(self._writers[place], step, metrics, num_prompts)

    def flush(self) -> None:
        """Return once what was saved is whole in its place."""
        for writer in self._writers.values():
            writer.flush()

    def roll_back(self, checkpoint: str) -> None:
        """Go back to a checkpoint of this run, and on at half the rates."""
        self.learner.roll_back(open_checkpoint(checkpoint))


class LearnerGroup:
    """All learners, stepped as one. `source` is the one whose weights are published."""

    def __init__(
        self, config: RLConfig, placement: Placement, checkpoint: str, resumes: bool, sampler: Any = None
    ) -> None:
        device = placement.decide(config.learners.device)
        config = replace(config, learners=replace(config.learners, device=device))
        actor = LearnerActor.options(**placement.options())
        num_learners = config.learners.num_workers
        self._actors = [actor.remote(config, rank, placement.num_threads) for rank in range(num_learners)]
        self.source = self._actors[0]
        timeout_s = config.learners.placement_timeout_s
        (address,) = wait_for([self.source.find_address.remote()], timeout_s, "starting the first learner")
        starts = [a.start.remote(checkpoint, address, resumes, sampler) for a in self._actors]
        wait_for(starts, timeout_s, "starting the learners")

    def step(self, batch: TrainBatch, step: int) -> Metrics:
        """One batch on all learners; the metrics of the whole."""
        shared = ray.put(batch)
        return merge_learners(self._on_all("step", f"learning step {step + 1}", shared, step))

    def read_terms(self) -> dict[str, np.ndarray]:
        """What the learners made of each token of the newest step."""
        return join_terms(self._on_all("read_terms", "reading the terms of a step"))

    def save(self, place: str, keep: int, step: int, metrics: Mapping[str, float], num_prompts: int) -> None:
        """Begin to write a checkpoint to the folder or URL: the first learner does, of what all hold."""
        self._on_all("save", "saving the checkpoint", place, keep, step, dict(metrics), num_prompts)

    def roll_back(self, checkpoint: str) -> None:
        """Go back to a checkpoint of this run, and on at half the rates."""
        self._on_all("roll_back", f"going back to {checkpoint}", checkpoint)

    def flush(self, timeout_s: float = STEP_TIMEOUT_S) -> None:
        """Return once what was saved is whole in its place."""
        wait_for([self.source.flush.remote()], timeout_s, "writing the checkpoint")

    def _on_all(self, method: str, what: str, *arguments: Any) -> list[Any]:
        return wait_for([getattr(actor, method).remote(*arguments) for actor in self._actors], STEP_TIMEOUT_S, what)

    def close(self) -> None:
        """Stop the actors; a checkpoint that is being written is given a moment."""
        with contextlib.suppress(OSError):  # it took longer, or the actor is dead; the one before it stands
            self.flush(CLOSE_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)


LearnerActor = ray.remote(LearnerWorker)
