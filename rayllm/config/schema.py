"""One frozen, typed tree per stage, from text to a base model. Torch-free; every field is documented where it stands.

The docstring under a field is its help text (`rayllm STAGE --help`). Intent lives here; numbers
that follow from it (steps, batch split, learning rates) are derived by `rayllm.optim.scaling`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from rayllm.config.frozen import Bounds, frozen

PositiveInt = Annotated[int, Bounds(gt=0)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]
Sources = tuple[str, ...]


@frozen
class TrackingConfig:
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    sinks: tuple[Literal["wandb", "tensorboard", "mlflow"], ...] = ()
    """Extra sinks, several at once: wandb (offline without a key), tensorboard, mlflow."""
    project: str = "rayllm"
    """Project (wandb) or experiment (MLflow) that runs are filed under."""
    name: str | None = None
    """Name of the run in the sinks; null: the name of the run directory."""


@frozen
class TokenizerConfig:
    """Train a byte-pair tokenizer on text and compare it with well-known ones."""

    out: str = "runs/tokenizer"
    """Directory to write the tokenizer to."""
    kind: Literal["bpe", "byte"] = "bpe"
    """bpe: train merges on `sources`; byte: the 256 bytes and the special tokens, no training."""
    sources: Sources = ()
    """Text to train on: files, folders or globs (txt, jsonl, parquet, each also .gz), looked up as given, then
    under RAYLLM_DATA_DIR; `hub:ORG/NAME[:SUBSET[:SPLIT]]` for a Hugging Face data set."""
    text_column: str = "text"
    """Column (parquet, hub) or key (jsonl) that holds the text."""
    vocab_size: Annotated[int, Bounds(ge=265, le=2**20)] = 32768
    """Size of the vocabulary: 256 bytes, the merges, and the 9 special tokens. Ignored for `kind: byte`."""
    max_chars: PositiveInt = 2_000_000_000
    """Stop reading after this many characters."""
    max_chars_per_document: PositiveInt = 10_000
    """Cut documents to this many characters, so that no single one dominates the merges."""


@frozen
class ValidationSplit:
    """Which documents are held out. The rule is stored in the manifest and never changes silently."""

    kind: Literal["hash", "sources"] = "hash"
    """hash: a document is held out when a hash of its text falls below `fraction`; sources: those of `sources`."""
    fraction: Fraction = 0.01
    """Share of documents held out, for `kind: hash`."""
    sources: Sources = ()
    """Sources held out whole, for `kind: sources`."""


@frozen
class TokenizeConfig:
    """Tokenize text into token shards on disk, in parallel, with Ray Data."""

    out: str = "runs/shards"
    """Directory to write the shards and their manifest to."""
    tokenizer: str = "runs/tokenizer"
    """Directory of the tokenizer."""
    sources: Sources = ()
    """Text to tokenize; the same forms as in the tokenizer stage."""
    text_column: str = "text"
    """Column (parquet, hub) or key (jsonl) that holds the text."""
    validation: ValidationSplit = ValidationSplit()
    """Which documents are held out."""
    row_groups_per_shard: PositiveInt = 8
    """Parquet row groups that one task reads and one shard holds."""


@frozen
class ModelConfig:
    """The architecture around the depth dial."""

    aspect_ratio: PositiveInt = 64
    """Width per layer: d_model is depth * aspect_ratio, rounded up to a multiple of head_dim."""
    head_dim: PositiveInt = 128
    """Channels per attention head; must be even."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); must divide the query heads. null: as many."""
    sequence_len: PositiveInt = 2048
    """Tokens per training row (T)."""
    window_pattern: Annotated[str, Bounds(pattern="^[SL]+$")] = "SSSL"
    """Attention windows, tiled over the layers: L full context, S a quarter; the last layer is always L."""


@frozen
class Horizon:
    """How long to train."""

    kind: Literal["ratio", "flops", "tokens", "steps"] = "ratio"
    """ratio: tokens per scaling parameter (block matrices + unembedding); flops: total training FLOPs; tokens;
    steps."""
    value: PositiveFloat = 12
    """The amount, in the unit of `kind`."""


@frozen
class OptimConfig:
    """MuonAdamW: learning rates at the reference batch of 2^19 tokens, and their schedule."""

    matrix_lr: PositiveFloat = 0.02
    """Muon, for the block matrices."""
    embedding_lr: PositiveFloat = 0.3
    """AdamW, for the token embedding (half of it for value embeddings), at d_model 768."""
    unembedding_lr: PositiveFloat = 0.008
    """AdamW, for lm_head, at d_model 768."""
    scalar_lr: PositiveFloat = 0.5
    """AdamW, for the x0 scalars (a hundredth of it for the residual scalars)."""
    weight_decay: NonNegativeFloat = 0.28
    """Muon's cautious weight decay at the reference batch and model (depth 12)."""
    warmup_steps: NonNegativeInt = 40
    """Steps of linear warm-up."""
    warmdown_ratio: Fraction = 0.65
    """Last share of the run over which the learning rate falls."""
    final_lr_fraction: Fraction = 0.05
    """Learning rate at the end, as a share of its peak."""


@frozen
class PretrainDataConfig:
    """What the model reads."""

    shards: str = "runs/shards"
    """Directory of token shards (the tokenize stage)."""
    tokenizer: str = "runs/tokenizer"
    """Directory of the tokenizer that made them; a copy travels with every checkpoint."""
    long_documents: Literal["crop", "carry"] = "crop"
    """When no document fits a row's rest, the shortest one is cut: `crop` drops its remainder (nanochat), `carry`
    keeps it as a document of its own (better where documents are much longer than a row)."""
    isolate: bool = False
    """Whether documents that share a row are kept from seeing each other. nanochat's do see each other."""
    seed: int = 0
    """Seed of the order of documents."""


@frozen
class WorkersConfig:
    """Data-parallel workers and what each computes on."""

    num_workers: PositiveInt = 1
    """Ray Train workers, each with one replica of the model."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a GPU where the cluster has one for each worker, else MPS (one worker), else CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype (weights stay float32). auto: bfloat16 on GPUs that have it and CPUs that multiply it faster, else
    float32."""
    attention: Literal["auto", "flash4", "flash3", "flash2", "flex", "sdpa"] = "auto"
    """Attention kernel. auto: the first of these that is installed and that the device can run; the log names it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the model. auto: on GPUs; on CPUs not, as the C++ compiler's minutes seldom pay there."""
    recompute_blocks: bool = False
    """Activation checkpointing: keep each block's input only and compute the block again in the backward pass; a third
    more work for a fraction of the memory."""
    cpus_per_worker: PositiveInt | None = None
    """CPU cores of each worker. null: the machine's cores over its workers on CPU, 1 on GPU."""
    max_failures: NonNegativeInt = 3
    """How often a died worker is replaced and training resumed from the last checkpoint."""
    placement_timeout_s: PositiveFloat = 600
    """How long to wait for the cluster to offer the workers' resources before giving up."""


@frozen
class PretrainConfig:
    """Pretrain a base model on token shards. `depth` is the one dial."""

    out: str = "runs/base"
    """Run directory; the same command again resumes it."""
    depth: PositiveInt = 12
    """Layers; width, heads, batch, learning rates and horizon follow from it."""
    model: ModelConfig = ModelConfig()
    """The architecture around the depth dial."""
    horizon: Horizon = Horizon()
    """How long to train."""
    tokens_per_step: PositiveInt | Literal["auto"] = "auto"
    """Tokens per optimizer step over all workers; auto: from depth, 2^19 at depth 12."""
    rows_per_micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Rows that one worker runs forward and backward at once; gradient accumulation fills the rest of the step. auto:
    about 65,536 tokens on a GPU, 2,048 on a CPU."""
    seed: int = 42
    """Seed of the initial weights."""
    data: PretrainDataConfig = PretrainDataConfig()
    """What the model reads."""
    optim: OptimConfig = OptimConfig()
    """Learning rates and schedule."""
    workers: WorkersConfig = WorkersConfig()
    """Data-parallel workers."""
    log_every: PositiveInt = 1
    """Steps between records of the training metrics."""
    eval_every: PositiveInt | None = 250
    """Steps between validation bits per byte (also after the last step); null: only after the last."""
    eval_tokens: PositiveInt = 41_943_040
    """Validation tokens per evaluation (or all there are)."""
    sample_every: PositiveInt | None = 2000
    """Steps between samples from fixed prompts; null: only after the last step."""
    sample_tokens: PositiveInt = 48
    """Tokens per sample."""
    save_every: PositiveInt | None = 1000
    """Steps between checkpoints (also after the last step); null: only after the last."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints to keep."""
    checkpoints: str | None = None
    """Where checkpoints are kept: a folder, or a URL such as s3://bucket/run; null: in the run directory."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""


@frozen
class SamplingConfig:
    """How the next token is drawn."""

    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0: greedy."""
    top_k: PositiveInt | None = None
    """Draw among the k likeliest tokens; null: no cut."""
    top_p: Annotated[float, Bounds(gt=0, le=1)] | None = None
    """Draw among the likeliest tokens that together have this share (nucleus sampling), after top_k; null: no cut."""
    max_tokens: PositiveInt = 128
    """Tokens to add."""
    stop: tuple[Annotated[str, Bounds(min_length=1)], ...] = ()
    """Texts that end an answer."""
    seed: int = 0
    """Seed of the draws."""


@frozen
class SampleConfig:
    """Continue a text with any checkpoint."""

    checkpoint: str = "runs/base"
    """A checkpoint, or a run directory (its newest checkpoint); path or URL."""
    prompts: tuple[str, ...] = ("Once upon a time",)
    """Texts to continue."""
    num_samples: PositiveInt = 1
    """Continuations of each prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """How the next token is drawn."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it and CPUs that multiply it faster, else float32."""


@frozen
class BaseEvalConfig:
    """Bits per byte of a base model on the validation split, and samples."""

    checkpoint: str = "runs/base"
    """A checkpoint, or a run directory (its newest checkpoint); path or URL."""
    shards: str = "runs/shards"
    """Token shards whose validation split is read."""
    out: str | None = None
    """Directory for the report; null: `base-eval` beside the checkpoint's run."""
    max_tokens: PositiveInt = 20_971_520
    """Validation tokens to read (or all there are)."""
    rows_per_batch: PositiveInt = 8
    """Rows per forward pass."""
    long_documents: Literal["crop", "carry"] = "crop"
    """As in pretraining; `carry` reads every validation token."""
    isolate: bool = False
    """As in pretraining: whether documents that share a row are kept from seeing each other."""
    prompts: tuple[str, ...] = (
        "The capital of France is",
        "Once upon a time",
        "If 5 pens cost 10 dollars, one pen costs",
    )
    """Texts to continue, greedily and sampled."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=48)
    """How the samples are drawn."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it, else float32."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""


@frozen
class ImportNanochatConfig:
    """Turn a nanochat checkpoint directory into our checkpoint and tokenizer; runs no code from a pickle."""

    source: str = ""
    """Directory with model_*.pt, meta_*.json and tokenizer.pkl (given as the first argument too)."""
    out: str = "runs/imported"
    """Directory of the new checkpoint."""
    step: NonNegativeInt | None = None
    """Which step to import; null: the newest."""
