"""A tiny corpus, an untrained chat model, and recipes that teach them in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import cluster, rl
from actors.rollout import RolloutPool, RolloutWorker
from rayllm.config.chat_schema import RolloutConfig, TaskConfig
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import (
    Horizon,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    WorkersConfig,
)
from rayllm.data.shards import Manifest, ShardEntry, ShardWriter
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.runs.checkpoint import open_checkpoint, save_checkpoint
from rayllm.runs.run_dir import open_run
from rayllm.text.tokenizer import Tokenizer

# Ray's workers cannot import test modules: what is defined here travels by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TOKENIZER = Tokenizer.byte_level()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer/` (bytes) and `shards/` of a few hundred short sums, train and validation."""
    root = tmp_path_factory.mktemp("corpus")
    tokenizer = Tokenizer.byte_level()
    tokenizer.save(root / "tokenizer")
    entries: list[ShardEntry] = []
    for split, num_documents in (("train", 400), ("val", 40)):
        writer = ShardWriter(
            root / "shards", split, piece_idx=0, piece="sums", vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id
        )  # type: ignore[arg-type]
        for i in range(num_documents):
            writer.add(tokenizer.encode(f"{i} plus {7 * i % 50} is {i + 7 * i % 50}. " * (1 + i % 3)))
        entries += writer.close()
    Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        validation={"kind": "sources"},
        pieces=(),
        shards=tuple(entries),
    ).save(root / "shards")
    return root


@pytest.fixture(scope="session")
def tiny_recipe(corpus: Path) -> Callable[..., PretrainConfig]:
    """Twenty steps of 512 tokens of a two-layer model; keyword arguments change fields."""

    def build(out: Path, *, num_workers: int = 1, num_steps: int = 20, **changes: Any) -> PretrainConfig:
        settings: dict[str, Any] = {
            "depth": 2,
            "model": ModelConfig(aspect_ratio=16, head_dim=16, sequence_len=64),
            "horizon": Horizon(kind="steps", value=num_steps),
            "tokens_per_step": 512,
            "rows_per_micro_batch": 2,
            "data": PretrainDataConfig(shards=str(corpus / "shards"), tokenizer=str(corpus / "tokenizer")),
            "workers": WorkersConfig(num_workers=num_workers, device="cpu", dtype="float32"),
            "optim": OptimConfig(warmup_steps=2),
            "eval_every": 10,
            "eval_tokens": 1024,
            "sample_every": None,
            "sample_tokens": 4,
            "save_every": 4,
        }
        return PretrainConfig(out=str(out), **{**settings, **changes})

    return build


class AsciiTask:
    """Word problems, but what is right is an answer that begins with an ASCII character: an untrained model's even
    chance. Problem 13 cannot be judged, and the verdict on 14
    is no number."""

    name = "ascii"

    def __init__(self, problems: Any) -> None:
        self._problems = problems

    def __len__(self) -> int:
        return len(self._problems)

    def conversation(self, example_idx: int) -> Any:
        return self._problems.conversation(example_idx)

    def evaluate(self, example_idx: int, answer: str) -> float:
        if example_idx == 13:
            raise KeyError("the judge has lost this one")
        if example_idx == 14:
            return float("nan")
        return float(answer[:1].isascii() and answer != "")


class AsciiWorker(RolloutWorker):
    def _task(self, config: TaskConfig) -> Any:
        return AsciiTask(super()._task(config))


class AsciiPool(RolloutPool):
    @staticmethod
    def actor_class() -> Any:
        return ray.remote(AsciiWorker)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with an untrained chat model."""
    return save_untrained(tmp_path_factory.mktemp("rl") / "sft", sequence_len=256)


@pytest.fixture(scope="session")
def untrained() -> Callable[[Path, int], Path]:
    """Writes a run directory with an untrained chat model of some sequence length."""
    return save_untrained


def save_untrained(run: Path, sequence_len: int) -> Path:
    config = GPTConfig(
        sequence_len, vocab_size=TOKENIZER.vocab_size, num_layers=2, num_heads=2, num_kv_heads=2, d_model=32
    )
    model = GPT(config)
    model.init_weights(0)
    save_checkpoint(
        run / "checkpoints",
        5,
        model_state=model.state_dict(),
        optimizer_state=None,
        state={"stage": "sft", "model": config.to_dict(), "tokenizer_fingerprint": TOKENIZER.fingerprint},
        tokenizer=TOKENIZER,
        keep=1,
    )
    return run


@pytest.fixture(scope="session")
def recipe(start: Path) -> Callable[..., RLConfig]:
    """Fourteen steps from an untrained model in seconds; keyword arguments change fields."""

    def build(out: Path, **changes: Any) -> RLConfig:
        settings: dict[str, Any] = {
            "checkpoint": str(start),
            "task": TaskConfig(num_examples=40),
            "validation": TaskConfig(split="validation", num_examples=12),
            "num_steps": 14,
            "prompts_per_step": 4,
            "num_samples": 8,
            "max_tokens": 6,
            "lr_fraction": 1.0,
            "optim": OptimConfig(warmup_steps=0, weight_decay=0),
            "rollouts": RolloutConfig(num_actors=2, num_slots=16, device="cpu", timeout_s=120),
            "learners": WorkersConfig(device="cpu", dtype="float32", placement_timeout_s=120),
            "eval_every": 7,
            "eval_samples": 4,
            "test_at_end": False,
            "save_every": 1,
            "keep_checkpoints": 20,
        }
        return RLConfig(out=str(out), **{**settings, **changes})

    return build


@pytest.fixture(scope="session")
def ascii_pool() -> type[RolloutPool]:
    """Rollout actors with the judge above."""
    return AsciiPool


@pytest.fixture(scope="session")
def ascii_worker() -> type[RolloutWorker]:
    """One of them, as the plain class that it is."""
    return AsciiWorker


@pytest.fixture(scope="session")
def teach() -> Callable[..., dict[str, float]]:
    """`rl.run` with the judge above; keyword arguments are ports of `rl.teach`."""

    def run(config: RLConfig, **ports: Any) -> dict[str, float]:
        own = Path(config.out, "checkpoints").exists()
        checkpoint = open_checkpoint(Path(config.out) if own else config.checkpoint)
        opened = open_run(config.out, stage="rl", config=config, plan={}, may_change=rl.RESUMABLE_CHANGES)
        with opened as run_dir, cluster.connect() as ray_cluster:
            how = {"resumes": run_dir.resumed, "pool_class": AsciiPool} | ports
            return rl.teach(config, run_dir, checkpoint, ray_cluster, **how)

    return run
