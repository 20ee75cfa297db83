from __future__ import annotations

import re
from collections import Counter

import pytest

from rayllm.engine.calculator import calculate
from rayllm.types import Part
from tasks.build import build_task
from tasks.solutions import prose
from tasks.word_problems import SPLITS, WordProblems, story
from tasks.word_templates import SEEN, UNSEEN
from tasks.word_world import HE_OF

NUM = 2000
HARD = {split: WordProblems(split, max_level=4) for split in SPLITS}


def solution_of(task: WordProblems, idx: int) -> tuple[Part, ...]:
    content = task.conversation(idx).messages[-1].content
    assert isinstance(content, tuple)
    return content


@pytest.mark.parametrize("split", SPLITS)
def test_every_reference_solution_is_right(split: str) -> None:
    task = HARD[split]
    for idx in range(NUM // 2):
        parts = solution_of(task, idx)
        assert [part.type for part in parts] == ["text", "python", "python_output"] * task.level_of(idx) + ["text"]
        for call, output, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            assert calculate(call.text) == output.text
            assert after.text.startswith(output.text + " ")
        assert int(parts[-2].text) >= 2
        assert parts[-1].text.endswith(f"\n#### {parts[-2].text}")
        assert task.evaluate(idx, prose(parts)) == 1.0
        assert task.evaluate(idx, f"#### {int(parts[-2].text) + 1}") == 0.0
        assert task.evaluate(idx, parts[-2].text) == 0.0


@pytest.mark.parametrize("split", SPLITS)
def test_every_number_of_a_solution_comes_from_its_question_or_a_step_before(split: str) -> None:
    """Else nobody could find the answer from the question."""
    for idx in range(NUM):
        problem = HARD[split].problem(idx)
        known = set(re.findall(r"\d+", problem.question)) | ({"2"} if "half" in problem.question else set())
        for left, right, result in re.findall(r"<<(\d+)[-+*/](\d+)=(\d+)>>", problem.solution):
            assert {left, right} <= known, problem
            known.add(result)
        assert not re.search(r"[{}\[\]]", problem.question + problem.solution), problem


def test_splits_are_disjoint_whatever_the_seed_and_the_names() -> None:
    problems = {
        split: [WordProblems(split, max_level=4, seed=seed).problem(idx) for seed in (0, 1) for idx in range(NUM)]
        for split in SPLITS
    }
    texts = {split: {problem.question for problem in problems[split]} for split in SPLITS}
    cores = {
        split: {(problem.template.name, tuple(problem.numbers.items())) for problem in problems[split]}
        for split in SPLITS
    }
    templates = {split: {problem.template.name for problem in problems[split]} for split in SPLITS}
    for a in SPLITS:
        for b in SPLITS:
            if a < b:
                assert not texts[a] & texts[b]
                assert not cores[a] & cores[b]
    assert templates["train"] == templates["validation"] == templates["test"] == {template.name for template in SEEN}
    assert templates["test_unseen"] == {template.name for template in UNSEEN}
    assert not templates["test_unseen"] & templates["train"]


def test_a_split_has_many_different_problems() -> None:
    for split in SPLITS:
        task = WordProblems(split)
        texts = Counter(task.problem(idx).question for idx in range(256))
        assert len(texts) >= 250, split
    assert len({WordProblems().problem(idx).question for idx in range(NUM)}) > 0.97 * NUM


def test_a_problem_is_a_function_of_seed_split_and_index() -> None:
    task = WordProblems("test", seed=3)
    forwards = [task.conversation(idx) for idx in range(50)]
    again = WordProblems("test", seed=3, num_examples=50)
    assert [again.conversation(idx) for idx in reversed(range(50))] == forwards[::-1]
    assert [WordProblems("test", seed=4).conversation(idx) for idx in range(50)] != forwards
    assert task.conversation(999_999) == task.conversation(999_999)


def test_a_problem_stays_what_it_was() -> None:
    """Figures that were published rest on these problems: a change here is a new task."""
    assert (
        WordProblems("test").problem(0).question
        == "Zoe buys 8 cups. Each cup costs 7 dollars. She pays with 60 dollars. How many dollars does she get back?"
    )
    assert (
        WordProblems("test").problem(0).solution
        == "The cups cost <<8*7=56>>56 dollars.\nShe gets <<60-56=4>>4 dollars.\n#### 4"
    )


@pytest.mark.parametrize("max_level", [1, 2, 3, 4])
def test_levels_are_numbers_of_steps(max_level: int) -> None:
    for split in ("train", "test_unseen"):
        task = WordProblems(split, max_level=max_level)
        levels = Counter(task.level_of(idx) for idx in range(300))
        assert set(levels) == set(range(1, max_level + 1))
        for idx in range(50):
            assert task.problem(idx).solution.count("<<") == task.level_of(idx)
            assert task.template_of(idx) in {template.name for template in (*SEEN, *UNSEEN)}


def test_its_length() -> None:
    assert len(WordProblems()) == 1_000_000
    task = WordProblems(num_examples=3)
    assert len(task) == 3
    for idx in (3, -1):
        with pytest.raises(IndexError, match="problems 0 to 2"):
            task.conversation(idx)


def test_people_are_called_by_their_pronoun() -> None:
    for idx in range(500):
        question = WordProblems().problem(idx).question
        first = question.split()[0]
        pronouns = set(re.findall(r"\b(he|she)\b", question.lower()))
        assert pronouns <= {HE_OF[first]}, question


def test_stories_hold_no_solution() -> None:
    unseen_asks = {template.question.rsplit(". ", 1)[-1].split("{things}")[-1] for template in UNSEEN}
    test_questions = {HARD[split].problem(idx).question for split in ("validation", "test") for idx in range(NUM)}
    num_asking = 0
    for idx in range(NUM):
        text = story(idx)
        assert "####" not in text and "<<" not in text and "{" not in text
        if "How many" in text:
            num_asking += 1
            lines = text.split("\n")
            assert "=" not in text  # no sum
            assert all(line.endswith("?") and line.count("?") == 1 for line in lines)  # and no word after a question
            assert not test_questions & set(lines)
        assert not any(ask.strip(" ?") in text for ask in unseen_asks if len(ask) > 12)
    assert num_asking > NUM / 10


def test_sums_in_stories_are_right() -> None:
    num_sums = 0
    for idx in range(NUM):
        for sum_told, result in re.findall(r"(\d+[-+*/]\d+) = (\d+)", story(idx)):
            num_sums += 1
            assert calculate(sum_told) == result, story(idx)
        for bags, each, hold in re.findall(
            r"(\d+) bags with (\d+) \w+ each(?:\. The bags)? hold (?:\d+\*\d+ = )?(\d+)", story(idx)
        ):
            num_sums += 1
            assert int(bags) * int(each) == int(hold), story(idx)
    assert num_sums > NUM


def test_stories_differ_and_repeat() -> None:
    texts = [story(idx) for idx in range(1000)]
    assert len(set(texts)) > 990
    assert texts[:50] == [story(idx) for idx in range(50)]
    assert texts[:50] != [story(idx, seed=1) for idx in range(50)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": "riddles"}, "no task 'riddles'; there are word_problems, gsm8k, chat_jsonl"),
        ({"name": "word_problems", "split": "dev"}, "word_problems has no split 'dev'; it has train"),
        ({"name": "gsm8k", "split": "test_unseen"}, "gsm8k has no split 'test_unseen'"),
        ({"name": "chat_jsonl", "split": "test", "path": "x"}, "chat_jsonl has no split 'test'"),
        ({"name": "chat_jsonl"}, "chat_jsonl needs a path"),
        ({"name": "gsm8k", "path": "x.jsonl"}, "gsm8k reads no path"),
        ({"name": "word_problems", "path": "x.jsonl"}, "word_problems reads no path"),
        ({"name": "word_problems", "num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"name": "word_problems", "max_level": 5}, "max_level must be 1 to 4, got 5"),
        ({"name": "word_problems", "max_level": 0}, "max_level must be 1 to 4, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_task(**given)


def test_build_by_name() -> None:
    task = build_task("word_problems", split="validation", num_examples=5, max_level=1, seed=2)
    assert (task.name, len(task)) == ("word_problems/validation", 5)
    expected = WordProblems("validation", max_level=1, seed=2)
    assert [task.conversation(i) for i in range(5)] == [expected.conversation(i) for i in range(5)]
