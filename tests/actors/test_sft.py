"""Fine-tuning through Ray Train: conversations rendered once, any number of workers, cut off and resumed, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from actors import fit
from rayllm.config.chat_schema import SFTConfig, TaskConfig
from rayllm.config.schema import WorkersConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.runs.checkpoint import open_checkpoint, save_checkpoint
from rayllm.runs.tracking import read_metrics
from rayllm.text.tokenizer import Tokenizer

Recipe = Callable[..., SFTConfig]
ROW = 320


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read_metrics(out / "metrics.jsonl") if "train/loss" in r}


def weights(out: Path) -> dict[str, bytes]:
    state = load_file(open_checkpoint(out).path / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def chat_recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A few steps on word problems, from a model that knows nothing; keyword arguments change fields."""
    root = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.byte_level()
    shape = GPTConfig(
        sequence_len=ROW, vocab_size=tokenizer.vocab_size, num_layers=2, num_heads=2, num_kv_heads=2, d_model=32
    )
    model = GPT(shape)
    model.init_weights(0)
    save_checkpoint(
        root / "checkpoints",
        3,
        model_state=model.state_dict(),
        optimizer_state=None,
        state={"stage": "base", "model": shape.to_dict(), "tokenizer_fingerprint": tokenizer.fingerprint},
        tokenizer=tokenizer,
        keep=1,
    )

    def build(out: Path, *, num_workers: int = 1, **changes: Any) -> SFTConfig:
        settings: dict[str, Any] = {
            "checkpoint": str(root),
            "tasks": (TaskConfig(num_examples=20, epochs=2), TaskConfig(num_examples=9, max_level=1, seed=1)),
            "validation": (TaskConfig(split="validation", num_examples=5),),
            "tokens_per_step": ROW * 4,
            "rows_per_micro_batch": 2,
            "workers": WorkersConfig(num_workers=num_workers, device="cpu", dtype="float32"),
            "lr_fraction": 0.2,
            "eval_every": 4,
            "save_every": 3,
            "keep_checkpoints": 9,
        }
        return SFTConfig(out=str(out), **{**settings, **changes})

    return build


@pytest.fixture(scope="module")
def uninterrupted(
    chat_recipe: Recipe, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SFTConfig, Path]:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    config = chat_recipe(out)
    fit.run_sft(config)
    return config, out


def test_a_run_reads_its_mixture_once_and_leaves_what_one_needs(uninterrupted) -> None:
    config, out = uninterrupted
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert plan["num_conversations"] == 29 and plan["rows_per_step"] == 4
    assert plan["num_steps"] == -(-plan["num_rows"] // 4)
    assert [(task["num_conversations"], task["epochs"]) for task in plan["tasks"]] == [(20, 2), (9, 1)]
    assert sorted(losses(out)) == list(range(1, plan["num_steps"] + 1))
    validation = {r["step"]: r["val/loss"] for r in read_metrics(out / "metrics.jsonl") if "val/loss" in r}
    assert validation[plan["num_steps"]] < validation[0] - 0.3, validation
    checkpoint = open_checkpoint(out)
    assert (checkpoint.step, checkpoint.state["stage"]) == (plan["num_steps"], "sft")


@pytest.mark.slow
def test_two_workers_match_one(uninterrupted, chat_recipe: Recipe, tmp_path: Path) -> None:
    _, one = uninterrupted
    fit.run_sft(chat_recipe(tmp_path / "two", num_workers=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_with_its_own_conversations(
    uninterrupted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its first checkpoint, without the base model, on the conversations rendered then: the same bits."""
    config, expected = uninterrupted
    out = tmp_path / "cut"
    shutil.copytree(expected, out)
    for checkpoint in (out / "checkpoints").iterdir():
        if checkpoint.name != "step_000003":
            shutil.rmtree(checkpoint)
    rendered = (out / "conversations" / "train" / "mixture.json").stat().st_mtime_ns
    fit.run_sft(replace(config, out=str(out)))
    assert f"resuming {out} after step 3 of" in capsys.readouterr().err
    assert (out / "conversations" / "train" / "mixture.json").stat().st_mtime_ns == rendered
    assert weights(out) == weights(expected)
    assert losses(out) == losses(expected)


def test_a_finished_run_is_not_run_again(uninterrupted, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = uninterrupted
    before = weights(out)
    fit.run_sft(config)
    assert "steps of this recipe already; nothing to do" in capsys.readouterr().out
    assert weights(out) == before


def test_bad_input_is_said_before_there_is_a_run(uninterrupted, chat_recipe: Recipe, tmp_path: Path) -> None:
    config, out = uninterrupted
    new = tmp_path / "new"
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        fit.run_sft(chat_recipe(new, checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="no file 'nowhere.jsonl'"):
        fit.run_sft(chat_recipe(new, tasks=(TaskConfig(name="chat_jsonl", path="nowhere.jsonl"),)))
    with pytest.raises(ValueError, match="must be a multiple of sequence_len"):
        fit.run_sft(chat_recipe(new, tokens_per_step=1000))
    assert not new.exists()
    with pytest.raises(ValueError, match=r"lr_fraction was 0.2 and is now 0.5"):
        fit.run_sft(replace(config, lr_fraction=0.5))
    (damaged := tmp_path / "damaged").mkdir()
    shutil.copytree(out, damaged, dirs_exist_ok=True)
    with open(damaged / "conversations" / "train" / "token_ids.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match=r"token_ids.bin is damaged: its checksum differs; remove .*train"):
        fit.run_sft(replace(config, out=str(damaged)))
