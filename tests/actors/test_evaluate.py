"""The chat-eval stage through real actors: a table, a report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors import evaluate
from rayllm.config.chat_schema import ChatEvalConfig, RolloutConfig, TaskConfig


def recipe(checkpoint: Path, **changes) -> ChatEvalConfig:
    tasks = (TaskConfig(split="test", num_examples=6), TaskConfig(split="test_unseen", num_examples=5))
    settings = {"tasks": tasks, "num_samples": 3, "max_tokens": 4, "rollouts": RolloutConfig(num_actors=2, num_slots=8)}
    return ChatEvalConfig(checkpoint=str(checkpoint), **{**settings, **changes})


def test_it_prints_a_table_and_writes_a_report(
    chat_checkpoint: Path, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(recipe(chat_checkpoint, out=str(tmp_path / "out")))
    printed = capsys.readouterr().out
    assert "word_problems/test " in printed and "word_problems/test_unseen" in printed and "+-" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    first, second = report["tasks"]
    assert (first["num_problems"], second["num_problems"], first["num_samples"]) == (6, 5, 3)
    assert first["pass@1"] == {"value": 0.0, "stderr": 0.0, "num_problems": 6}
    assert {"pass@1", "pass@2", "pass@3", "greedy", "num_failed"} <= first.keys()
    assert report["step"] == 60 and len(report["samples"]) == 6 and "How" in report["samples"][0]["prompt"]


def test_by_default_the_report_stands_beside_the_run(chat_checkpoint: Path, ray_session: None) -> None:
    evaluate.run(recipe(chat_checkpoint, num_samples=1))
    assert (chat_checkpoint / "chat-eval" / "step_000060" / "report.json").exists()


def test_what_is_not_there_is_said_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no chat model at"):
        evaluate.run(recipe(tmp_path))


def test_a_task_that_cannot_be_read_leaves_nothing_behind(
    chat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    monkeypatch.setenv("RAYLLM_DATA_DIR", str(tmp_path))
    tasks = (TaskConfig(split="test", num_examples=2), TaskConfig(name="gsm8k", split="test"))
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: the answer holds no '####'"):
        evaluate.run(recipe(chat_checkpoint, tasks=tasks, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
