"""THE RL loop: sample -> collate -> learn -> publish -> evaluate, on one screen.

Rollout actors answer each problem many times; a verdict rewards each answer; the learners make answers that beat their
group's mean likelier; the new weights go back to the rollout actors. Where sampling and learning take turns
(max_staleness 0), all of a step is a function of (recipe, step): a run that was killed goes on from its last checkpoint
as if nothing had been.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from actors import cluster
from actors.cluster import ActorGroup, Placement, has_gpus_for_all, place_apart, place_in_turns
from actors.journal import Journal
from actors.learner import LearnerGroup
from actors.ray_metrics import RayMetrics
from actors.rollout import RolloutPool, load_task
from actors.stream import GroupSource, RolloutStream, SavedGroups
from actors.weights import ObjectStoreChannel, WeightsChannel
from actors.weights_group import ProcessGroupChannel
from rayllm.config.load import to_dict
from rayllm.config.rl_schema import RLConfig
from rayllm.engine.reply import open_chat_checkpoint
from rayllm.runs.checkpoint import Checkpoint, latest_checkpoint
from rayllm.runs.progress import ProgressFollower
from rayllm.runs.run_dir import RunDir, open_run
from rayllm.runs.sharpening import describe_sharpening
from rayllm.runs.tracking import build_tracker, check_sinks, read_metrics
from rayllm.training.loop import Metrics
from rayllm.training.rollout_batch import collate_groups
from rayllm.training.saved_rollouts import saved_files

# What may differ when a run is resumed: how it is run and watched, not what it computes.
RESUMABLE_CHANGES = (
    "learners", "rollouts", "placement", "weights", "tokens_per_micro_batch", "tracking", "eval_every", "save_every",
    "samples_every", "keep_checkpoints", "test_at_end", "guard",
)  # fmt: skip

CHANNELS: dict[str, type[WeightsChannel]] = {"object_store": ObjectStoreChannel, "process_group": ProcessGroupChannel}


def run(config: RLConfig) -> None:
    """The `rl` stage: teach a chat model, or go on with the run in `config.out`."""
    start = open_chat_checkpoint(config.checkpoint)
    num_problems = len(load_task(config.task))
    if config.replay is not None:
        saved_files(config.replay)
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
        if (told := describe_sharpening(read_metrics(run_dir.metrics_path))) is not None:
            print(f"rl: {told}")
        score_text = ""
        if score:
            score_text = f", validation pass@1 {score['val/pass@1']:.1%} +- {score['val/pass@1_stderr']:.1%}"
        print(f"rl: {config.num_steps} steps done{score_text}: {config.out}")


def place(config: RLConfig, ray_cluster: cluster.Cluster) -> list[Placement]:
    """What each rollout actor and each learner gets; waits for a growing cluster to have it."""
    groups = [
        ActorGroup(config.rollouts.num_actors, config.rollouts.cpus_per_actor, config.rollouts.device),
        ActorGroup(config.learners.num_workers, config.learners.cpus_per_worker, config.learners.device),
    ]
    takes_turns = config.placement == "colocated"
    if config.placement == "auto":
        takes_turns = config.max_staleness == 0 and not has_gpus_for_all(ray_cluster, groups)
    return (place_in_turns if takes_turns else place_apart)(ray_cluster, groups, config.learners.placement_timeout_s)


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
    known = checkpoint.state.get("num_prompts") if resumes else None
    num_prompts = known if isinstance(known, int) else first_step * config.prompts_per_step
    for_pool, for_learners = place(config, ray_cluster)
    with ExitStack() as stack:
        pool, learners = None, None
        if config.replay is None:
            pool = pool_class(
                checkpoint.address, config.rollouts, for_pool, channel or CHANNELS[config.weights](), first_step
            )
            stack.callback(pool.close)
        if not config.rollout_only:
            sampler = None if pool is None else pool.describe()
            learners = LearnerGroup(config, for_learners, checkpoint.address, resumes, sampler)
            stack.callback(learners.close)
        tracker = build_tracker(
            run_dir.path,
            config.tracking,
            config=to_dict(config),
            resume_step=first_step if resumes else None,
            extra_sinks=[RayMetrics(run_dir.path.name)],
        )
        stack.callback(tracker.close)
        source = RolloutStream(config, pool, first_step, num_prompts) if pool is not None else SavedGroups(config)
        journal = Journal(config, run_dir, pool, learners, source, tracker, checkpoint, first_step)
        learn_from_rollouts(config, source, learners, journal, first_step)
        journal.finish()
        return journal.validation


def learn_from_rollouts(
    config: RLConfig, source: GroupSource, learners: LearnerGroup | None, journal: Journal, first_step: int
) -> None:
    """Train from `first_step` (steps done before) to `config.num_steps`. How far sampling runs ahead of learning is the
    source's business; how stale that makes a token is written on it, and the loss corrects for it."""
    if first_step == 0:
        with journal.phase("evaluate"):
            journal.validate(0)
    for step in range(first_step, config.num_steps):
        with journal.phase("publish"):
            source.settle()
        with journal.phase("wait_for_rollouts"):
            groups, taken = source.take(step)
        with journal.phase("learn"):
            batch = collate_groups(groups, config.loss, version=step, max_tokens=config.max_tokens)
            learned = learners.step(batch, step) if learners is not None else {}
        source.publish(learners, number=step + 1)
        journal.record(step + 1, batch.metrics | taken | learned, groups)
