"""Tasks by name, as recipes name them."""

from __future__ import annotations

from rayllm.types import Task
from tasks import chat_jsonl, gsm8k, word_problems

_SPLITS = {
    "word_problems": word_problems.SPLITS,
    "gsm8k": gsm8k.SPLITS,
    "chat_jsonl": chat_jsonl.SPLITS,
}


def build_task(
    name: str,
    *,
    split: str = "train",
    path: str | None = None,
    num_examples: int | None = None,
    max_level: int = 2,
    seed: int = 0,
) -> Task:
    """A split of a task, cut to its first `num_examples` where it has more (None: all; word problems: a million).

    `path` is the file of chat_jsonl; `max_level` and `seed` are for word_problems, the others pass them over. Raises
    ValueError for a task, a split or a combination that there is not, and what the task itself raises.
    """
    if name not in _SPLITS:
        raise ValueError(f"no task {name!r}; there are {', '.join(_SPLITS)}")
    if split not in _SPLITS[name]:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(_SPLITS[name])}")
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"{name}: num_examples must be at least 1, got {num_examples}")
    if name == "chat_jsonl":
        if not path:
            raise ValueError("chat_jsonl needs a path: the .jsonl or .jsonl.gz file with the conversations")
        return chat_jsonl.ChatJsonl(path, split, num_examples)
    if path:
        raise ValueError(f"{name} reads no path, got {path!r}; leave it out, or set name to chat_jsonl")
    if name == "gsm8k":
        return gsm8k.GSM8K(split, num_examples)
    return word_problems.WordProblems(split, num_examples=num_examples, max_level=max_level, seed=seed)
