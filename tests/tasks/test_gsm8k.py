from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from rayllm.engine.calculator import calculate
from rayllm.types import Conversation, Part
from tasks.build import build_task
from tasks.gsm8k import GSM8K
from tasks.solutions import prose, solution_parts

ROW = {"question": "Half of 48?", "answer": "It is 48/2 = <<48/2=24>>24 clips.\n#### 24"}


def write(data_dir: Path, rows: list[object], name: str = "test.jsonl") -> Path:
    file = data_dir / "gsm8k" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLLM_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def real_gsm8k() -> None:
    root = os.environ.get("RAYLLM_DATA_DIR")
    if not root or not Path(root, "gsm8k/train.jsonl.gz").is_file():
        pytest.skip(
            "REAL DATA ABSENT: set RAYLLM_DATA_DIR to a folder with gsm8k/{train,test}.jsonl.gz to run this test"
        )


def solution_of(conversation: Conversation) -> tuple[Part, ...]:
    content = conversation.messages[-1].content
    assert isinstance(content, tuple)
    return content


def questions(task: GSM8K) -> set[object]:
    return {task.conversation(idx).messages[0].content for idx in range(len(task))}


def test_calculator_calls_become_parts() -> None:
    assert solution_parts("so <<2*3=6>>6 and <<a=b=7>>.") == (
        Part("text", "so "),
        Part("python", "2*3"),
        Part("python_output", "6"),
        Part("text", "6 and "),
        Part("python", "a=b"),
        Part("python_output", "7"),
        Part("text", "."),
    )
    assert solution_parts("<<2+2>>") == (Part("python", "2+2"),)


def test_a_problem_and_its_verdicts(data_dir: Path) -> None:
    write(data_dir, [ROW])
    task = GSM8K("test")
    assert (task.name, len(task)) == ("gsm8k/test", 1)
    question, answer = task.conversation(0).messages
    assert (question.role, question.content, answer.role) == ("user", "Half of 48?", "assistant")
    assert [part.type for part in solution_of(task.conversation(0))] == ["text", "python", "python_output", "text"]
    assert task.evaluate(0, "#### 24.0") == 1.0
    assert task.evaluate(0, "#### 25") == 0.0
    assert task.evaluate(0, "24") == 0.0


@pytest.mark.parametrize("answer", ["It is 24.", "#### 1,8", "#### none"])
def test_a_reference_without_an_answer_is_named_by_file_and_line(data_dir: Path, answer: str) -> None:
    file = write(data_dir, [ROW, {"question": "?", "answer": answer}])
    with pytest.raises(ValueError, match=r"line 2: the answer .*####") as error:
        GSM8K("test")
    assert str(file) in str(error.value)


@pytest.mark.parametrize("row", [[1], "text", {"question": "?"}, {"question": " ", "answer": "#### 1"}])
def test_a_row_of_another_shape_is_named_by_file_and_line(data_dir: Path, row: object) -> None:
    write(data_dir, [row])
    with pytest.raises(ValueError, match="line 1: expected"):
        GSM8K("test")


def test_broken_files_are_told(data_dir: Path) -> None:
    file = write(data_dir, [ROW])
    file.write_text("{no json\n")
    with pytest.raises(ValueError, match="line 1: no JSON"):
        GSM8K("test")
    file.unlink()
    file.with_name("test.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(ValueError, match="damaged or cut gzip"):
        GSM8K("test")


def test_without_file_and_hub_the_error_says_what_was_tried(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="the hub did not give openai/gsm8k") as error:
        GSM8K("test")
    assert str(data_dir / "gsm8k/test.jsonl.gz") in str(error.value)
    assert "Put the file there" in str(error.value)


def test_validation_is_carved_from_train_by_content(data_dir: Path) -> None:
    rows: list[object] = [{**ROW, "question": f"Question {number}?"} for number in range(800)]
    write(data_dir, rows, "train.jsonl")
    parts = {split: questions(GSM8K(split)) for split in ("train", "validation")}
    assert not parts["train"] & parts["validation"]
    assert len(parts["train"] | parts["validation"]) == 800
    assert 20 < len(parts["validation"]) < 90
    write(data_dir, rows[::-1], "train.jsonl")
    assert questions(GSM8K("validation")) == parts["validation"]
    write(data_dir, rows[:1], "train.jsonl")
    with pytest.raises(ValueError, match="holds no problems"):
        GSM8K("validation")


def test_real_problems(real_gsm8k: None) -> None:
    train, validation, test = (build_task("gsm8k", split=split) for split in ("train", "validation", "test"))
    assert (len(train) + len(validation), len(test)) == (7473, 1319)
    assert len(validation) >= 256  # as many as pass@1 is measured on
    for task in (validation, test):
        for idx in range(len(task)):
            parts = solution_of(task.conversation(idx))
            assert task.evaluate(idx, prose(parts)) == 1.0
            assert not any("<<" in part.text for part in parts)
    first = build_task("gsm8k", split="test", num_examples=5)
    assert [first.conversation(i) for i in range(5)] == [test.conversation(i) for i in range(5)]
    assert len(first) == 5
    assert len(build_task("gsm8k", split="test", num_examples=10**6)) == 1319


def test_the_calculator_agrees_with_every_call_of_the_real_test_part(real_gsm8k: None) -> None:
    test = GSM8K("test")
    num_calls = 0
    for idx in range(len(test)):
        parts = solution_of(test.conversation(idx))
        for call, output in zip(parts, parts[1:], strict=False):
            if call.type == "python" and output.type == "python_output":
                num_calls += 1
                value = calculate(call.text)
                stated = calculate(output.text)
                assert value is not None and stated is not None, call.text
                assert float(value) == pytest.approx(float(stated), rel=0.02), call.text
    assert num_calls > 4000
