"""THE RL loop: sample -> collate -> learn -> publish -> evaluate, on one screen.

Rollout actors answer each problem many times; a verdict rewards each answer; the learners make answers that beat their
group's mean likelier; the new weights go back to the rollout actors. All of a step is a function of (recipe, step):
a run that was killed goes on from its last checkpoint as if nothing had been.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from actors import cluster
from actors.cluster import ActorGroup, place_in_turns
from actors.journal import Journal
from actors.learner import LearnerGroup
from actors.rollout import RolloutPool, SampleRequest, load_task
from actors.weights import ObjectStoreChannel, WeightsChannel
from rayllm.config.chat_schema import RLConfig
from rayllm.config.load import to_dict
from rayllm.config.schema import SamplingConfig
from rayllm.data.packing import shuffle
from rayllm.engine.reply import open_chat_checkpoint
from rayllm.engine.sampling import stable_seed
from rayllm.runs.checkpoint import Checkpoint, latest_checkpoint
from rayllm.runs.progress import ProgressFollower
from rayllm.runs.run_dir import RunDir, open_run
from rayllm.runs.tracking import build_tracker, check_sinks
from rayllm.training.loop import Metrics
from rayllm.training.rollout_batch import collate_groups

# What may differ when a run is resumed: how it is run and watched, not what it computes.
RESUMABLE_CHANGES = (
    "learners", "rollouts", "tokens_per_micro_batch", "tracking", "eval_every", "save_every", "keep_checkpoints",
)  # fmt: skip


def run(config: RLConfig) -> None:
    """The `rl` stage: teach a chat model, or go on with the run in `config.out`."""
    start = open_chat_checkpoint(config.checkpoint)
    num_problems = len(load_task(config.task))
    load_task(config.validation)  # what is missing or damaged is told before there is a run directory
    check_sinks(config.tracking)
    plan = {"num_steps": config.num_steps, "num_problems": num_problems, "start": str(start)}
    with open_run(config.out, stage="rl", config=config, plan=plan, may_change=RESUMABLE_CHANGES) as run_dir:
        own = latest_checkpoint(run_dir.checkpoints)
        if own is not None and own.step >= config.num_steps:
            print(f"rl: {config.out} holds all {config.num_steps} steps of this recipe already; nothing to do")
            return
        if own is not None:
            print(f"rl: resuming {config.out} after step {own.step} of {config.num_steps}", file=sys.stderr)
        with cluster.connect() as ray_cluster, ProgressFollower(run_dir.metrics_path, num_steps=config.num_steps):
            score = teach(config, run_dir, own or start, ray_cluster, resumes=own is not None)
        value, stderr = score["val/pass@1"], score["val/pass@1_stderr"]
        print(f"rl: {config.num_steps} steps done, validation pass@1 {value:.1%} +- {stderr:.1%}: {config.out}")


def teach(
    config: RLConfig,
    run_dir: RunDir,
    checkpoint: Checkpoint,
    ray_cluster: cluster.Cluster,
    *,
    resumes: bool,
    pool_class: type[RolloutPool] = RolloutPool,
    channel: WeightsChannel | None = None,
) -> Metrics:
    """Start the actors, run the loop, and leave nothing running; returns the last validation."""
    first_step = checkpoint.step if resumes else 0
    rollouts, learners = config.rollouts, config.learners
    groups = [
        ActorGroup(rollouts.num_actors, rollouts.cpus_per_actor, rollouts.device),
        ActorGroup(learners.num_workers, learners.cpus_per_worker, learners.device),
    ]
    path = checkpoint.address
    for_pool, for_learners = place_in_turns(ray_cluster, groups, learners.placement_timeout_s)
    pool = pool_class(path, rollouts, for_pool, channel or ObjectStoreChannel(), first_step)
    try:
        group = LearnerGroup(config, for_learners, path, resumes)
        tracker = build_tracker(
            run_dir.path, config.tracking, config=to_dict(config), resume_step=first_step if resumes else None
        )
        try:
            journal = Journal(config, run_dir.checkpoints, pool, group, tracker, checkpoint)
            learn_from_rollouts(config, pool, group, journal, first_step)
            group.flush()
            return journal.validation
        finally:
            tracker.close()
            group.close()
    finally:
        pool.close()


def learn_from_rollouts(
    config: RLConfig, pool: RolloutPool, learners: LearnerGroup, journal: Journal, first_step: int
) -> None:
    """Train from `first_step` (steps done before) to `config.num_steps`, on-policy."""
    problems = ProblemOrder(len(load_task(config.task)), config.prompts_per_step, config.seed)
    if first_step == 0:
        journal.validate(0)
    for step in range(first_step, config.num_steps):
        start_s = time.perf_counter()
        example_ids, epoch = problems.at(step)
        seed = stable_seed(config.seed, epoch)
        sampling = SamplingConfig(temperature=1.0, max_tokens=config.max_tokens, seed=seed)
        groups = pool.sample(SampleRequest(config.task, example_ids, config.num_samples, sampling))
        sampled_s = time.perf_counter()

        batch = collate_groups(groups)
        metrics = batch.metrics | learners.step(batch, step)
        learned_s = time.perf_counter()

        pool.load(learners.source, number=step + 1)
        end_s = time.perf_counter()
        metrics |= {
            "train/sample_s": sampled_s - start_s,
            "train/learn_s": learned_s - sampled_s,
            "train/publish_s": end_s - learned_s,
            "train/tokens_per_s": batch.metrics["train/num_tokens"] / (end_s - start_s),
            "train/epoch": float(epoch),
        }
        journal.record(step + 1, metrics, groups)


class ProblemOrder:
    """Which examples a step takes: a shuffled pass over all of them after the other, by index alone."""

    def __init__(self, num_problems: int, per_step: int, seed: int) -> None:
        if num_problems < 1:
            raise ValueError("the task holds no problem to learn from")
        self._num_problems, self._per_step, self._seed = num_problems, per_step, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def at(self, step: int) -> tuple[tuple[int, ...], int]:
        """Example indices of a step, and the epoch in which it begins; a step may reach into the next."""
        first = step * self._per_step
        places = [divmod(first + j, self._num_problems) for j in range(self._per_step)]
        return tuple(self._example(epoch, place) for epoch, place in places), places[0][0]

    def _example(self, epoch: int, place: int) -> int:
        if self._epoch != epoch:
            self._epoch, self._order = epoch, shuffle(self._num_problems, self._seed, epoch)
        return int(self._order[place])
