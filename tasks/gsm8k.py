"""GSM8K, grade-school maths: 7,473 problems to learn from and 1,319 to be tested on (https://arxiv.org/abs/2110.14168).

`gsm8k/train.jsonl` and `gsm8k/test.jsonl` (each also .gz), as given or under RAYLLM_DATA_DIR, else `openai/gsm8k` on
the hub. The data set has no validation part: those train problems whose question hashes into the first sixteenth (some
470) are held out as one, and train is what is left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rayllm.types import Conversation, Message
from tasks.answers import MARKER, extract_answer, is_same_answer
from tasks.files import find_file, read_lines
from tasks.hub import load_rows
from tasks.solutions import solution_parts
from tasks.splits import place_of

VALIDATION_SHARE = 1 / 16
SPLITS = ("train", "validation", "test")


class GSM8K:
    """Problems of one split, in the order of the file. An answer is worth 1.0 where its number is right, else 0.0.

    Raises ValueError for a row without question or without a number behind `####` in its answer, naming file and line.
    """

    def __init__(self, split: str = "train", num_examples: int | None = None) -> None:
        assert split in SPLITS, split
        self.name = f"gsm8k/{split}"
        self._problems: list[tuple[str, str]] = []
        self._answers: list[str] = []
        for where, row in _rows("test" if split == "test" else "train"):
            if num_examples is not None and len(self) == num_examples:
                break
            question, solution, answer = _read(row, where)
            if split == "test" or (place_of(question) < VALIDATION_SHARE) == (split == "validation"):
                self._problems.append((question, solution))
                self._answers.append(answer)
        if not self._problems:
            raise ValueError(f"{self.name} holds no problems: the file behind it is empty or too small to be split")

    def __len__(self) -> int:
        return len(self._problems)

    def conversation(self, example_idx: int) -> Conversation:
        """The question, and the reference solution with its calculator calls as parts."""
        question, solution = self._problems[example_idx]
        return Conversation((Message("user", question), Message("assistant", solution_parts(solution))))

    def evaluate(self, example_idx: int, answer: str) -> float:
        """1.0 where the number behind the last `####` is the reference's, else 0.0."""
        given = extract_answer(answer)
        return float(given is not None and is_same_answer(given, self._answers[example_idx]))


def _rows(part: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, row) of every row."""
    try:
        file = find_file(f"gsm8k/{part}.jsonl")
    except FileNotFoundError as error:
        cure = f"{error}. Put the file there, or go where the hub can be reached"
        for number, row in enumerate(load_rows("openai/gsm8k", "main", part, cure), start=1):
            yield f"openai/gsm8k {part}, row {number}", row
        return
    for number, line in read_lines(file):
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: no JSON ({error}); expected an object with question and answer") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with question and answer, got {type(row).__name__}")
        yield where, row


def _read(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    """Question, solution, answer."""
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str) or not question.strip():
        raise ValueError(f"{where}: expected strings under question and answer; the keys are {', '.join(row)}")
    answer = extract_answer(solution)
    if answer is None:
        fault = "holds no '####'" if MARKER not in solution else "has no well-formed number behind its last '####'"
        raise ValueError(f"{where}: the answer {fault}; a reference solution must end like '#### 18'")
    return question, solution, answer
