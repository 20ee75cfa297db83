"""The trees of the stages that come after a base model: SFT, evaluation, chat, serving, reports."""

from __future__ import annotations

from typing import Annotated, Literal

from rayllm.config.frozen import Bounds, frozen
from rayllm.config.schema import (
    OptimConfig,
    PositiveFloat,
    PositiveInt,
    SamplingConfig,
    TrackingConfig,
    WorkersConfig,
)


@frozen
class TaskConfig:
    """A task: where conversations to learn from, or problems with a verdict, come from."""

    name: Literal["word_problems", "gsm8k", "chat_jsonl"] = "word_problems"
    """word_problems: grade-school problems that our own code writes, endless and offline; gsm8k: the real ones
    (RAYLLM_DATA_DIR, then the hub); chat_jsonl: conversations from files, without a verdict."""
    split: Literal["train", "validation", "test", "test_unseen"] = "train"
    """Which part; validation of gsm8k is carved from its train part, test_unseen holds word problems of templates
    that no other part has."""
    path: str | None = None
    """chat_jsonl: a file, looked up as given, then under RAYLLM_DATA_DIR."""
    num_examples: PositiveInt | None = None
    """Take only the first so many examples of the split; null: all there are."""
    max_level: Annotated[int, Bounds(ge=1, le=4)] = 2
    """word_problems: the hardest level; a problem of level n takes n steps."""
    seed: int = 0
    """word_problems: seed of the problems."""
    epochs: PositiveInt = 1
    """sft: how often its conversations are in the mixture."""


@frozen
class SFTConfig:
    """Teach a base model to chat: supervised fine-tuning on conversations, loss on assistant tokens only."""

    out: str = "runs/sft"
    """Run directory; the same command again resumes it."""
    checkpoint: str = "runs/base"
    """Model to start from: a checkpoint, or a run directory (its newest checkpoint); path or URL."""
    tasks: tuple[TaskConfig, ...] = (TaskConfig(),)
    """The mixture of conversations."""
    validation: tuple[TaskConfig, ...] = (TaskConfig(split="validation", num_examples=200),)
    """Conversations held out, for the validation loss."""
    sequence_len: PositiveInt | None = None
    """Tokens per row; null: the base model's. A longer conversation is cut to it and counted."""
    tokens_per_step: PositiveInt = 2**19
    """Tokens per optimizer step over all workers, padding included."""
    rows_per_micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Rows that one worker runs forward and backward at once; gradient accumulation fills the rest of the step. auto:
    about 65,536 tokens on a GPU, 2,048 on a CPU."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps; null: when the mixture has been read once."""
    seed: int = 0
    """Seed of the order of conversations."""
    isolate: bool = True
    """Whether conversations that share a row are kept from seeing each other, as when the model is asked."""
    warm_start_optimizer: bool = True
    """Go on with the moments of the base run's optimizer, where its checkpoint has them."""
    lr_fraction: PositiveFloat = 0.8
    """Multiplies every learning rate of `optim`."""
    optim: OptimConfig = OptimConfig(
        unembedding_lr=0.004, weight_decay=0, warmup_steps=0, warmdown_ratio=0.5, final_lr_fraction=0
    )
    """Learning rates and schedule; unlike in pretraining not scaled to the batch."""
    workers: WorkersConfig = WorkersConfig()
    """Data-parallel workers."""
    log_every: PositiveInt = 1
    """Steps between records of the training metrics."""
    eval_every: PositiveInt | None = 200
    """Steps between validation losses (also after the last step); null: only after the last."""
    save_every: PositiveInt | None = 1000
    """Steps between checkpoints (also after the last step); null: only after the last."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints to keep."""
    checkpoints: str | None = None
    """Where checkpoints are kept: a folder, or a URL such as s3://bucket/run; null: in the run directory."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""


@frozen
class RolloutConfig:
    """The actors that sample: each holds a copy of the model and a KV-cached engine."""

    num_actors: PositiveInt = 1
    """Rollout actors."""
    num_slots: PositiveInt = 128
    """Sequences that one actor decodes together."""
    num_prompts: PositiveInt | None = None
    """Different prompts that these may come from; each takes memory of its own. null: as many as slots."""
    new_weights: Literal["recompute", "drain"] = "recompute"
    """When weights change while sequences run: recompute lets them go on under the new ones, from their tokens so far;
    drain lets them end under the old ones, and nothing else starts before: cheaper where all that is sampled ahead has
    slots and about the same length."""
    cpus_per_actor: PositiveInt | None = None
    """CPU cores of each actor. null: the machine's cores over the actors on CPU, 1 on GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where the cluster has one for each actor, else CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it, else float32."""
    timeout_s: PositiveFloat = 1800
    """How long one step's sampling, or one transfer of weights, may take before it is given up."""


@frozen
class ChatEvalConfig:
    """pass@1 of a chat model on tasks with a verdict, with standard errors, and greedy accuracy beside it."""

    checkpoint: str = "runs/sft"
    """A checkpoint of the sft or rl stage, or a run directory (its newest checkpoint); path or URL."""
    out: str | None = None
    """Directory for the report; null: `chat-eval/step_N` beside the checkpoint's run."""
    tasks: tuple[TaskConfig, ...] = (
        TaskConfig(split="test", num_examples=256),
        TaskConfig(split="test_unseen", num_examples=256),
    )
    """What to be tested on."""
    num_samples: PositiveInt = 4
    """Samples of each problem at temperature 1, without a cut."""
    max_tokens: PositiveInt = 256
    """Longest completion, in tokens."""
    seed: int = 0
    """Seed of the draws."""
    rollouts: RolloutConfig = RolloutConfig()
    """The actors that sample."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""


@frozen
class ChatConfig:
    """Talk with a chat model in the terminal."""

    checkpoint: str = "runs/rl"
    """A checkpoint of the sft or rl stage, or a run directory (its newest checkpoint); path or URL."""
    prompt: str | None = None
    """Answer this one message and exit (-p for short); null: a conversation."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_k=50, max_tokens=256)
    """How answers are drawn."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it and CPUs that multiply it faster, else float32."""


@frozen
class ServeConfig:
    """Serve a chat model over HTTP on Ray Serve: OpenAI's chat API, and a page to talk with it."""

    checkpoint: str = "runs/rl"
    """A checkpoint of the sft or rl stage, or a run directory (its newest checkpoint); path or URL."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network, which has no password."""
    port: Annotated[int, Bounds(ge=1, le=65535)] = 8000
    """Port to listen on."""
    model_name: str | None = None
    """Name that /v1/models tells; null: the name of the run directory."""
    num_replicas: PositiveInt = 1
    """Copies of the model that share the requests."""
    num_slots: PositiveInt = 16
    """Answers that one copy writes together; further requests wait their turn."""
    max_waiting: PositiveInt = 256
    """Requests that may wait at one copy; more are refused with status 503."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_k=50, max_tokens=512)
    """How answers are drawn where a request says nothing; max_tokens is also the most a request may ask for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where the cluster has one for each replica, else CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it and CPUs that multiply it faster, else float32."""


@frozen
class ReportConfig:
    """One page over all stages of a run: a table, plots, samples, times, environment."""

    run: str = ""
    """A run directory, or the folder that holds the run directories of one model (given as the first argument too)."""
    out: str | None = None
    """Directory for report.md and report.html; null: that of `run`."""
