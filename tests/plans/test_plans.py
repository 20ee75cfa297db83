"""What --dry-run tells, against what is there: caches, checkpoints, recipes that make what is not there yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayllm.config.chat_schema import ChatConfig, ChatEvalConfig, RolloutConfig, ServeConfig, SFTConfig, TaskConfig
from rayllm.config.load import load_config
from rayllm.config.recipes import list_recipes
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import BaseEvalConfig, ImportNanochatConfig, PretrainConfig, SampleConfig
from rayllm.engine import engine
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.model.kv_cache import KVCache
from rayllm.plans import answers, pretrain, quickstart, rl, train
from rayllm.plans.engine import CHUNK_LEN, ROW_CHUNK_LEN, EnginePlan
from rayllm.plans.memory import cache_bytes, training_bytes
from rayllm.plans.model import find_model
from rayllm.runs.checkpoint import peek_checkpoint, save_checkpoint
from rayllm.runs.import_nanochat import describe_plan as describe_import
from rayllm.text.tokenizer import Tokenizer

MODEL = GPTConfig(sequence_len=1024, vocab_size=265, num_layers=4, num_heads=4, num_kv_heads=2, d_model=64)
MHA = Path(__file__).parents[1] / "parity" / "mha"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.byte_level()
    return save_checkpoint(
        tmp_path / "run" / "checkpoints",
        7,
        model_state=GPT(MODEL).state_dict(),
        optimizer_state=None,
        state={"stage": "sft", "model": MODEL.to_dict(), "tokenizer_fingerprint": tokenizer.fingerprint},
        tokenizer=tokenizer,
        keep=1,
    )


# Memory


@pytest.mark.parametrize("chunk_len", [None, 64, 512])
def test_caches_take_what_is_planned(chunk_len: int | None) -> None:
    cache = KVCache(
        MODEL, 3, 1024, chunk_len=chunk_len, rings=chunk_len is not None, device="meta", dtype=torch.bfloat16
    )
    held = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in layer)
    assert cache_bytes(MODEL, 3, 1024, chunk_len=chunk_len, dtype="bfloat16", device="cpu") == held


def test_the_engine_feeds_prompts_and_rows_as_planned() -> None:
    assert (CHUNK_LEN, ROW_CHUNK_LEN) == (engine.CHUNK_LEN, engine.ROW_CHUNK_LEN)


def test_what_takes_less_memory_is_planned_to_take_less() -> None:
    plain = training_bytes(MODEL, 2048)
    assert training_bytes(MODEL, 2048, recompute_blocks=True) < plain
    assert training_bytes(MODEL, 2048, dtype="bfloat16") < plain
    assert training_bytes(MODEL, 1024) < plain
    assert training_bytes(MODEL, 2048, num_workers=4) < plain


def test_more_engines_are_sooner_done_on_gpus_and_share_a_cpu() -> None:
    on_gpu, on_cpu = (EnginePlan(MODEL, 64, 64, 1024, "auto", device) for device in ("cuda", "cpu"))
    assert on_gpu.decoding_seconds(512, 100, 4) == pytest.approx(on_gpu.decoding_seconds(512, 100) / 4, rel=0.01)
    assert on_cpu.decoding_seconds(512, 100, 8) > on_cpu.decoding_seconds(512, 100) / 8


# Which model it is


def test_a_checkpoint_is_told_without_reading_its_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"no weights at all")
    for place in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        peeked = peek_checkpoint(place)
        assert peeked is not None
        assert (peeked[0], peeked[1].step) == (str(checkpoint), 7)
        assert find_model(str(place)).config == MODEL
    assert peek_checkpoint(checkpoint.parent / "step_000008") is None


def test_a_damaged_manifest_is_told(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
        peek_checkpoint(checkpoint.parent.parent)


def test_without_a_checkpoint_the_recipes_that_make_it_tell_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_model("runs/laptop/sft")
    assert found.config is not None
    assert (found.config.num_layers, found.config.vocab_size, found.config.sequence_len) == (4, 8192, 512)
    assert "`rayllm pretrain laptop`, then `rayllm sft laptop`" in str(found.lines["checkpoint"])
    assert find_model("/mnt/shared/runs/laptop/base").config == found.config
    depth_12 = find_model("runs/rl").config
    assert depth_12 is not None
    assert depth_12.num_layers == 12


def test_what_nobody_makes_is_told_on_one_line(tmp_path: Path) -> None:
    found = find_model(str(tmp_path / "mine"))
    assert found.config is None
    assert list(found.lines) == ["checkpoint"]
    assert str(found.lines["checkpoint"]).startswith(f"none at {tmp_path / 'mine'} yet")


# Plans


def test_plans_with_and_without_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    there, nowhere = str(checkpoint), str(tmp_path / "nowhere")
    task = TaskConfig(num_examples=10)
    plans: list[tuple[Any, Any, str]] = [
        (rl.describe_plan, lambda c: RLConfig(checkpoint=c), "memory_per_learner"),
        (train.describe_plan, lambda c: SFTConfig(checkpoint=c, max_steps=3), "estimated_memory"),
        (answers.describe_sample, lambda c: SampleConfig(checkpoint=c), "memory"),
        (answers.describe_chat, lambda c: ChatConfig(checkpoint=c), "memory"),
        (answers.describe_serve, lambda c: ServeConfig(checkpoint=c), "memory_per_replica"),
        (answers.describe_chat_eval, lambda c: ChatEvalConfig(checkpoint=c, tasks=(task,)), "memory_per_rollout_actor"),
        (answers.describe_base_eval, lambda c: BaseEvalConfig(checkpoint=c, shards=nowhere), "memory"),
    ]
    for describe, build, label in plans:
        known, unknown = describe(build(there)), describe(build(nowhere))
        assert "step 7" in known["checkpoint"]
        assert "GiB" in known[label]
        assert unknown["checkpoint"].startswith(f"none at {nowhere} yet")
        assert label not in unknown
        assert unknown.keys() <= known.keys()


def test_a_step_of_rl_in_numbers(checkpoint: Path) -> None:
    config = RLConfig(checkpoint=str(checkpoint), num_steps=100, prompts_per_step=4, num_samples=8, max_tokens=50)
    assert "4 prompts x 8 samples = 32 completions of up to 50 tokens: 1,600 sampled, 2,112" in rl.describe_step(config)
    assert "100 steps: 400 prompts, 3,200 completions, at most 160,000 tokens" in rl.describe_run(config)
    assert rl.num_validations(config) == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"placement": "colocated"}, "colocated: taking turns on the same devices (3 GPU(s))"),
        (
            {"placement": "disaggregated"},
            "disaggregated: each on devices of its own (5 GPUs), up to 0 version(s) apart",
        ),
        ({"max_staleness": 1}, "disaggregated: each on devices of its own (5 GPUs), up to 1 version(s) apart"),
        ({}, "auto: each on devices of its own (5 GPUs); without them, taking turns on the same devices (3 GPU(s))"),
    ],
)
def test_who_shares_with_whom(settings: dict[str, Any], told: str) -> None:
    config = load_config(RLConfig, None, ["--learners={num_workers: 2, device: cuda}"])
    config = replace(config, rollouts=RolloutConfig(num_actors=3, device="cuda"), **settings)
    assert rl.describe_placement(config) == told


@pytest.mark.parametrize("recipe", list_recipes("rl"))
def test_rl_recipes_fit_their_hardware(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of an 80, 48 or 24 GB card to spare."""
    monkeypatch.chdir(tmp_path)
    config = load_config(RLConfig, recipe)
    model = find_model(config.checkpoint).config
    assert model is not None
    sampling, learning = rl.plan_engine(config, model).num_bytes, rl.learner_bytes(config, model)
    sampler_gb, learner_gb = (24, 48) if recipe == "gsm8k/cluster" else (80, 80)
    if rl.shares_devices(config):
        assert sampling + learning < 0.9 * sampler_gb * 1e9
    assert sampling < 0.9 * sampler_gb * 1e9
    assert learning < 0.9 * learner_gb * 1e9
    assert "memory_per_learner" in rl.describe_plan(config)


def test_plans_that_need_no_checkpoint(tmp_path: Path) -> None:
    imported = describe_import(ImportNanochatConfig(source=str(MHA)))
    assert {"source", "model", "parameters", "writes", "memory"} == imported.keys()
    assert "none at" in str(describe_import(ImportNanochatConfig(source=str(tmp_path / "x")))["source"])
    assert "GiB per worker" in str(pretrain.describe_plan(PretrainConfig(depth=4))["estimated_memory"])
    told = quickstart.describe_plan(load_config(quickstart.QuickstartConfig, "quickstart"))
    assert told["pretrain"] == "150 steps of 8,192 tokens"
