"""The laptop recipes on real text, shortened: from the tokenizer to the report, each as it stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from actors import evaluate, fit, rl, tokenize
from rayllm.config.chat_schema import ChatEvalConfig, SFTConfig
from rayllm.config.load import load_config
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import BaseEvalConfig, PretrainConfig, SampleConfig, TokenizeConfig, TokenizerConfig
from rayllm.engine import sample
from rayllm.evals import base
from rayllm.runs.report import write_report
from rayllm.runs.tracking import read_metrics
from rayllm.text import train
from rayllm.text.tokenizer import Tokenizer

ConfigT = TypeVar("ConfigT")


def laptop(schema: type[ConfigT], flags: Sequence[str]) -> ConfigT:
    return load_config(schema, "laptop", list(flags))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_real_text_becomes_a_model(
    real_text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipes write to runs/laptop
    stories = "--sources=[pretrain/tinystories_train.parquet]"
    train.run(laptop(TokenizerConfig, [stories, "--vocab_size=1024", "--max_chars=1000000"]))
    tokenize.run(laptop(TokenizeConfig, [stories]))
    report = json.loads(Path("runs/laptop/shards/report.json").read_text(encoding="utf-8"))
    assert report["train_tokens"] > 500_000 and report["bytes_per_token"] > 2.5

    shorter = ["--horizon.kind=steps", "--horizon.value=14", "--tokens_per_step=2048", "--rows_per_micro_batch=4"]
    often = ["--eval_every=7", "--eval_tokens=8192", "--save_every=7", "--log_every=1", "--optim.warmup_steps=4"]
    fit.run(laptop(PretrainConfig, [*shorter, *often]))
    records = read_metrics(Path("runs/laptop/base/metrics.jsonl"))
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[-1] < losses[0] - 0.3, losses

    capsys.readouterr()
    base.run(laptop(BaseEvalConfig, ["--max_tokens=8192"]))
    printed = capsys.readouterr().out
    report = json.loads(Path("runs/laptop/base/base-eval/step_000014/report.json").read_text(encoding="utf-8"))
    measured = report["bits_per_byte"]
    last = [record["val/bpb"] for record in records if "val/bpb" in record][-1]
    assert measured["value"] == pytest.approx(last, rel=1e-4), "evaluated apart, it is what training said"
    assert f"{measured['value']:.4f}" in printed and "Once upon a time" in printed

    sample.run(laptop(SampleConfig, ["--prompts=One day", "--sampling.max_tokens=8", "--num_samples=2"]))
    assert capsys.readouterr().out.count("One day") >= 2

    fit.run_sft(laptop(SFTConfig, ["--tokens_per_step=2048", "--rows_per_micro_batch=4", "--max_steps=6"]))
    losses = [r["val/loss"] for r in read_metrics(Path("runs/laptop/sft/metrics.jsonl")) if "val/loss" in r]
    assert losses[-1] < losses[0] - 0.5, losses

    few = ["--prompts_per_step=2", "--num_samples=4", "--max_tokens=40", "--validation.num_examples=6"]
    rl.run(laptop(RLConfig, [*few, "--num_steps=2"]))
    records = read_metrics(Path("runs/laptop/rl/metrics.jsonl"))
    assert [r["train/num_failed"] for r in records if "train/reward" in r] == [0, 0], "real problems, every one judged"
    assert [r["step"] for r in records if "val/pass@1" in r] == [0, 2]

    evaluate.run(laptop(ChatEvalConfig, ["--tasks.0.num_examples=8", "--max_tokens=40"]))
    report = json.loads(Path("runs/laptop/rl/chat-eval/step_000002/report.json").read_text(encoding="utf-8"))
    assert report["tasks"][0]["task"] == "gsm8k/test" and report["tasks"][0]["num_problems"] == 8

    page = write_report(Path("runs/laptop")).with_suffix(".html").read_text(encoding="utf-8")
    assert "gsm8k/test" in page and f"{measured['value']:.4f}" in page

    Tokenizer.byte_level().save("bytes")
    tokenize.run(laptop(TokenizeConfig, [stories, "--tokenizer=bytes", "--out=byte_shards"]))
    with pytest.raises(ValueError, match="made by another tokenizer"):
        base.run(laptop(BaseEvalConfig, ["--shards=byte_shards"]))
