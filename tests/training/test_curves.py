"""Learning curves on real text: how a step is computed changes nothing that anyone would see in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayllm.config.schema import (
    Horizon,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    WorkersConfig,
)
from rayllm.data.shards import Manifest
from rayllm.data.sources import resolve_sources
from rayllm.data.tokenizing import TokenizeJob, tokenize_piece
from rayllm.runtime import build_runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.pretrain import run_worker

NUM_STEPS = 200
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Curve = Callable[..., np.ndarray]


def _run_as_one_of(rank: int, world_size: int, config: PretrainConfig, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world_size)
    run_worker(config, path, build_runtime("cpu", config.workers.dtype, rank=rank, world_size=world_size))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def curve(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Training losses of 200 steps of 512 tokens at depth 4, each variant run once."""
    root = os.environ.get("RAYLLM_DATA_DIR")
    if not root:
        pytest.skip("REAL DATA ABSENT: set RAYLLM_DATA_DIR to a folder with pretrain/*.parquet to run this test")
    home = tmp_path_factory.mktemp("curves")
    tokenizer = Tokenizer.byte_level()
    tokenizer.save(home / "tokenizer")
    (home / "shards").mkdir()
    stories = str(Path(root, "pretrain", "tinystories_train.parquet"))
    pieces = resolve_sources([stories], text_column="text", row_groups_per_piece=1)
    done = [tokenize_piece(TokenizeJob(i, piece, 0.05), tokenizer, home / "shards") for i, piece in enumerate(pieces)]
    entries = tuple(entry for piece in done for entry in piece.shards)
    manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, {}, (), entries)
    manifest.save(home / "shards")
    recipe = PretrainConfig(
        depth=4,
        model=ModelConfig(aspect_ratio=32, head_dim=32, sequence_len=128),
        horizon=Horizon(kind="steps", value=NUM_STEPS),
        tokens_per_step=512,
        # 32 times the default: what the reference batch would have, and the rates fall with the root of the batch.
        optim=OptimConfig(matrix_lr=0.64, embedding_lr=9.6, unembedding_lr=0.256, scalar_lr=16.0, warmup_steps=20),
        data=PretrainDataConfig(shards=str(home / "shards"), tokenizer=str(home / "tokenizer")),
        workers=WorkersConfig(device="cpu", dtype="float32"),
        eval_every=None,
        eval_tokens=1024,
        sample_every=None,
        sample_tokens=1,
        save_every=None,
    )
    curves: dict[str, np.ndarray] = {}

    def losses(
        name: str, *, seed: int = 0, num_workers: int = 1, dtype: str = "float32", compile: str = "off"
    ) -> np.ndarray:
        if name not in curves:
            workers = replace(recipe.workers, num_workers=num_workers, dtype=dtype, compile=compile)
            config, path = replace(recipe, seed=seed, workers=workers), home / name
            path.mkdir()
            if num_workers > 1:
                mp.spawn(_run_as_one_of, (num_workers, config, path), nprocs=num_workers)
            else:
                run_worker(config, path, build_runtime("cpu", dtype))
            records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            curves[name] = np.array([record["train/loss"] for record in records if "train/loss" in record])
            assert curves[name].shape == (NUM_STEPS,)
        return curves[name]

    return losses


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far two curves are apart at the end: root mean square over the last 20 steps, on the same rows each."""
    return float(np.sqrt(np.mean((a[-20:] - b[-20:]) ** 2)))


def spread(curve: Curve) -> float:
    """Between two seeds of the initial weights."""
    return distance(curve("reference"), curve("other seed", seed=1))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"num_workers": 2}, id="two workers"),
        pytest.param(
            {"compile": "on"},
            id="compiled",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="NO C++ COMPILER: nothing is compiled"),
        ),
    ],
)
def test_the_curve_is_that_of_one_eager_worker(curve: Curve, variant: dict, request: pytest.FixtureRequest) -> None:
    reference, ours = curve("reference"), curve(request.node.callspec.id, **variant)
    assert reference[-20:].mean() < reference[:20].mean() - 1, "it learns"
    np.testing.assert_allclose(ours[:20], reference[:20], atol=1e-4, rtol=0)
    print(f"the ends are {distance(ours, reference) / spread(curve):.2f} of the spread of seeds apart")
    assert distance(ours, reference) < 0.1 * spread(curve)


@pytest.mark.skipif(
    build_runtime("cpu").dtype != torch.bfloat16,
    reason="NO FAST BFLOAT16 ON THIS CPU: its curve would take most of an hour",
)
def test_bfloat16_stays_within_the_spread_of_seeds(curve: Curve) -> None:
    ours = curve("bfloat16", dtype="bfloat16")
    assert distance(ours, curve("reference")) < spread(curve)
