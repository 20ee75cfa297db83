"""Grade-school word problems that this code writes itself, in GSM8K's form: seeded, endless, offline.

    Tom has 5 apples. He buys 3 bags with 4 apples each. How many apples does he have now?

    The bags hold <<3*4=12>>12 apples.
    He has <<5+12=17>>17 apples.
    #### 17

Problem i of a split depends on (seed, split, i) and the hardest level alone, and costs some tens of microseconds.
Two problems that differ only in names and things count as one: which of train, validation and test it belongs to is
decided by hashing its template and numbers, whatever the seed. `test_unseen` has templates that no other split has.
"""

from __future__ import annotations

import random

from rayllm.types import Conversation, Message
from tasks.answers import extract_answer, is_same_answer
from tasks.solutions import solution_parts
from tasks.word_stories import story
from tasks.word_templates import SEEN, UNSEEN
from tasks.word_world import SPLITS, WordProblem, draw_problem

__all__ = ["DEFAULT_LEN", "SPLITS", "WordProblem", "WordProblems", "story"]

DEFAULT_LEN = 1_000_000


class WordProblems:
    """Problems of levels 1 to `max_level`, all templates equally often; `level` is the number of steps of a solution.

    An answer is worth 1.0 where the number behind its last `####` is right, else 0.0. Raises ValueError for a split or
    a level that there is not.
    """

    def __init__(
        self, split: str = "train", *, num_examples: int | None = None, max_level: int = 2, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"word_problems has no split {split!r}; it has {', '.join(SPLITS)}")
        if not 1 <= max_level <= 4:
            raise ValueError(f"max_level must be 1 to 4, got {max_level}")
        self.name = f"word_problems/{split}"
        self._split = split
        self._templates = [t for t in (UNSEEN if split == "test_unseen" else SEEN) if t.level <= max_level]
        self._seed = seed
        self._num_examples = DEFAULT_LEN if num_examples is None else num_examples

    def __len__(self) -> int:
        return self._num_examples

    def conversation(self, example_idx: int) -> Conversation:
        """The question, and the solution with its calculator calls as parts."""
        problem = self.problem(example_idx)
        return Conversation((Message("user", problem.question), Message("assistant", solution_parts(problem.solution))))

    def evaluate(self, example_idx: int, answer: str) -> float:
        """1.0 where the number behind the last `####` is right, else 0.0."""
        given, right = extract_answer(answer), extract_answer(self.problem(example_idx).solution)
        assert right is not None
        return float(given is not None and is_same_answer(given, right))

    def template_of(self, example_idx: int) -> str:
        """Name of the template a problem was made from."""
        return self.problem(example_idx).template.name

    def level_of(self, example_idx: int) -> int:
        """Steps that a problem takes."""
        return self.problem(example_idx).template.level

    def problem(self, example_idx: int) -> WordProblem:
        """Write problem `example_idx`."""
        if not 0 <= example_idx < len(self):
            raise IndexError(f"{self.name} has problems 0 to {len(self) - 1}, got {example_idx}")
        rng = random.Random(f"{self._seed}/{self._split}/{example_idx}")
        return draw_problem(rng, self._templates, self._split)
