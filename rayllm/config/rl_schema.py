"""The trees of the rl stage and of what explains its steps."""

from __future__ import annotations

from typing import Literal

from rayllm.config.chat_schema import RolloutConfig, TaskConfig
from rayllm.config.frozen import frozen
from rayllm.config.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OptimConfig,
    PositiveFloat,
    PositiveInt,
    TrackingConfig,
    WorkersConfig,
)


@frozen
class PolicyLossConfig:
    """What makes the better answers likelier. As it stands: REINFORCE against the mean of the group."""

    advantage: Literal["mean", "mean_std", "leave_one_out"] = "mean"
    """A sample's reward minus the mean of its group; mean_std: over its standard deviation (GRPO); leave_one_out:
    minus the mean of the others (RLOO)."""
    importance_cap: PositiveFloat = 2.0
    """Largest weight, learner's over sampler's probability, of a token that was not sampled by the weights trained."""
    clip_low: Fraction = 0.2
    """Second and later updates on a batch: how far a token's probability counts as it falls below where it was."""
    clip_high: PositiveFloat = 0.28
    """The same as it rises above (DAPO's clip-higher)."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the divergence from the model that RL starts from, in nats per token (k3)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of a bonus for entropy, in nats per token."""
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    """Samples that were cut off at max_tokens. keep: they count by their reward; mask: they teach nothing, but count in
    their group's mean; penalty: what a sample takes of its last `overlong_buffer` tokens lowers its reward, by up to
    1."""
    overlong_buffer: PositiveInt = 64
    """For penalty: tokens before max_tokens over which it grows from 0 to 1 (DAPO)."""


@frozen
class GuardConfig:
    """What is watched so that a run ends near its best: a run that left it goes back there, at half the rates."""

    max_drop: PositiveFloat | None = 2.0
    """Validation pass@1 may fall so many of its standard errors below the best one; null: however far."""
    max_kl: PositiveFloat | None = 1.0
    """Mismatch of learner and sampler, in nats per token, averaged over a step; null: not watched."""
    min_entropy: NonNegativeFloat | None = None
    """Entropy of the policy, in nats per token, averaged over a step; null: not watched."""


@frozen
class RLConfig:
    """Teach a chat model by reinforcement: sample answers, judge them, make the better ones likelier."""

    out: str = "runs/rl"
    """Run directory; the same command again resumes it."""
    checkpoint: str = "runs/sft"
    """Model to start from: a checkpoint of the sft stage, or its run directory; path or URL."""
    task: TaskConfig = TaskConfig()
    """Problems to learn from."""
    validation: TaskConfig = TaskConfig(split="validation", num_examples=256)
    """Fixed problems held out, for pass@k as it runs."""
    test_at_end: bool = True
    """Whether the test part of the validation's task is tried, once, after the last step."""
    num_steps: PositiveInt = 400
    """Batches to learn from."""
    prompts_per_step: PositiveInt = 16
    """Problems of a batch."""
    num_samples: PositiveInt = 16
    """Completions of each problem, which share one baseline: at least 2."""
    max_tokens: PositiveInt = 256
    """Longest completion, in tokens."""
    temperature: PositiveFloat = 1.0
    """Of the samples; the distribution that is sampled is the one that is trained."""
    top_k: PositiveInt | None = None
    """Sample from the k likeliest tokens alone; null: from all."""
    top_p: PositiveFloat | None = None
    """Sample from the likeliest tokens that make up so much probability; null: from all."""
    max_staleness: NonNegativeInt = 0
    """How many versions behind the weights that sample may be. 0: sampling and learning take turns; 1: the next batch
    is sampled while this one is learned; k: k batches ahead."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps on each batch; from the second on the ratio to the first is clipped (PPO)."""
    sampling_budget: PositiveInt = 1
    """Dynamic sampling (DAPO): groups whose samples are all right or all wrong are replaced by those of further
    problems, up to so many times prompts_per_step in all. 1: off."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """The loss."""
    tokens_per_micro_batch: PositiveInt = 16_384
    """Tokens that one learner runs forward and backward at once, prompts counted once for their samples; any split
    gives the same gradient."""
    seed: int = 0
    """Seed of the order of problems and of every draw."""
    lr_fraction: PositiveFloat = 0.05
    """Multiplies every learning rate of `optim`."""
    optim: OptimConfig = OptimConfig(
        embedding_lr=0.2, unembedding_lr=0.004, weight_decay=0, warmup_steps=0, warmdown_ratio=1, final_lr_fraction=0
    )
    """Learning rates and schedule; not scaled to the batch."""
    guard: GuardConfig = GuardConfig()
    """When to go back to the best weights so far."""
    rollouts: RolloutConfig = RolloutConfig()
    """The actors that sample."""
    learners: WorkersConfig = WorkersConfig()
    """The actors that learn, data-parallel."""
    placement: Literal["auto", "colocated", "disaggregated"] = "auto"
    """colocated: both share devices and take turns; disaggregated: each has its own. auto: shared where max_staleness
    is 0 and there are not GPUs enough for all, else apart."""
    weights: Literal["object_store", "process_group"] = "object_store"
    """How new weights reach the actors that sample: Ray's object store, one copy a node; or a broadcast of
    torch.distributed (NCCL between GPUs, else gloo)."""
    eval_every: PositiveInt | None = 50
    """Steps between validations (also before the first and after the last step); null: only those two."""
    eval_samples: PositiveInt = 16
    """Samples of each validation problem, at temperature 1; pass@k is told up to this k."""
    save_every: PositiveInt | None = 50
    """Steps between checkpoints (also after the last step); null: only after the last."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints to keep, besides the best."""
    checkpoints: str | None = None
    """Where checkpoints are kept: a folder, or a URL such as s3://bucket/run; null: in the run directory."""
    samples_every: PositiveInt | None = 10
    """Steps between samples kept to be read (samples/) and to be explained or replayed (rollouts/); null: none."""
    replay: str | None = None
    """Learn from saved groups instead of sampling: a file or folder of rollouts/*.jsonl.gz; step n takes the n-th, over
    and over."""
    rollout_only: bool = False
    """Sample and judge, and learn nothing: to look at a model, or to save groups for replay."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""


@frozen
class ExplainConfig:
    """One group of an RL step, token by token: who drew it, how likely it was, and what it adds to the logged loss."""

    run: str = ""
    """Run directory of the rl stage (given as the first argument too)."""
    step: PositiveInt | None = None
    """A step whose rollouts were kept (every `samples_every` steps); null: the newest of them."""
    group: NonNegativeInt | None = None
    """Which group of the step, counted from 0; null: the first whose completions were not all alike."""
