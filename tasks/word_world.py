"""The small world of the word problems: its people, its things, and how a problem is made from a template.

A template is a question with numbers left open, and its solution step by step. In a question `{a}` to `{e}` are the
numbers, each drawn from its range; `{A}` and `{B}` two people, `{he}` and `{He}` the first of them, `{things}` and
`{thing}` what it is about. A step such as `"x = a * b: The bags hold {x} {things}."` makes one calculator call. Numbers
are drawn again until every step gives a whole number of at least 2, so that no sentence speaks of "1 apples".

Words are few and short on purpose: a vocabulary of 512 tokens holds most of them whole.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.splits import place_of

HE_OF = {
    "Tom": "he", "Ben": "he", "Sam": "he", "Max": "he", "Anna": "she", "Mia": "she", "Lily": "she", "Zoe": "she",
}  # fmt: skip
PEOPLE = tuple(HE_OF)
THINGS = ("apples", "pens", "eggs", "books", "cards", "coins", "cups", "shells")

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_SMALLEST_RESULT = 2
_SHARES = {"validation": (0.0, 0.1), "test": (0.1, 0.2), "train": (0.2, 1.0), "test_unseen": (0.0, 1.0)}
"""Where in [0, 1) the problems of a split hash to."""
SPLITS = ("train", "validation", "test", "test_unseen")


@dataclass(frozen=True)
class Template:
    """A kind of problem. ``level`` is its number of steps; ``numbers`` holds (smallest, largest) of each letter."""

    name: str
    level: int
    question: str
    steps: tuple[str, ...]
    numbers: Mapping[str, tuple[int, int]]

    def draw_numbers(self, rng: random.Random) -> dict[str, int]:
        """The numbers of one problem, such that every step has a result."""
        while True:
            numbers = {letter: rng.randint(low, high) for letter, (low, high) in self.numbers.items()}
            if self._results(numbers) is not None:
                return numbers

    def write(self, numbers: Mapping[str, int], words: Mapping[str, str]) -> tuple[str, str]:
        """The question and its solution in GSM8K's form, `#### answer` at the end."""
        results = self._results(numbers)
        assert results is not None, (self.name, numbers)
        known = {**numbers, **results}
        shown: dict[str, object] = {**words, **numbers}
        lines = []
        for step in self.steps:
            (target, left, sign, right), sentence = _read_step(step)
            call = f"{known.get(left, left)}{sign}{known.get(right, right)}"
            shown[target] = f"<<{call}={known[target]}>>{known[target]}"
            lines.append(sentence.format_map(shown))
        return self.question.format_map(shown), "\n".join([*lines, f"#### {known[target]}"])

    def _results(self, numbers: Mapping[str, int]) -> dict[str, int] | None:
        """What each step gives; None where one gives no whole number, or too small a one."""
        known = dict(numbers)
        for step in self.steps:
            (target, left, sign, right), _ = _read_step(step)
            a, b = (known[name] if name in known else int(name) for name in (left, right))
            known[target] = OPERATORS[sign](a, b)
            if known[target] < _SMALLEST_RESULT or (sign == "/" and a % b):
                return None
        return {name: value for name, value in known.items() if name not in numbers}


@dataclass(frozen=True)
class WordProblem:
    """A question, its solution as GSM8K writes them, and the template and numbers it was made from."""

    question: str
    solution: str
    template: Template
    numbers: Mapping[str, int]


def draw_problem(rng: random.Random, templates: Sequence[Template], split: str) -> WordProblem:
    """A problem of one of the templates, all equally likely, whose template and numbers hash into the split."""
    template = rng.choice(templates)
    low, high = _SHARES[split]
    while True:
        numbers = template.draw_numbers(rng)
        if low <= place_of(f"{template.name} {sorted(numbers.items())}") < high:
            return WordProblem(*template.write(numbers, draw_words(rng)), template, numbers)


def draw_words(rng: random.Random) -> dict[str, str]:
    """Who and what a problem is about."""
    first, second = rng.sample(PEOPLE, 2)
    he, things = HE_OF[first], rng.choice(THINGS)
    return {"A": first, "B": second, "he": he, "He": he.title(), "things": things, "thing": things[:-1]}


def _read_step(step: str) -> tuple[list[str], str]:
    """`"x = a * b: Words."` -> (["x", "a", "*", "b"], "Words.")."""
    formula, _, sentence = step.partition(": ")
    return formula.replace("= ", "").split(), sentence
