"""Conversations of a mixture of tasks, rendered once: token ids, and which of them are learned.

    token_ids.bin   learned.bin   lengths.bin   mixture.json (what the others must look like; counts of each task)

Rendering is the driver's work; workers read through memory maps. The folder is written under another name and renamed,
so it is whole or not there. Each conversation is in it once, however many epochs its task has in the mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rayllm.data.packing import shuffle
from rayllm.data.shards import token_dtype
from rayllm.runs.atomic import fsync_directory, naming, sha256_file, write_json
from rayllm.text.chat import render_conversation
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Task

FORMAT = 1
MANIFEST = "mixture.json"
MAX_REASONS = 20
"""Reasons that are told apart when conversations are skipped; what a broken file can say has no end."""


@dataclass
class TaskCounts:
    """What became of the conversations of one task."""

    name: str
    epochs: int
    num_conversations: int = 0
    """In the mixture, each counted once."""
    num_cut: int = 0
    """Among these, longer than a row: they lack their end."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Left out, by reason."""

    def skip(self, reason: str) -> None:
        """Count one more, among as many reasons as are told apart."""
        known = reason in self.skipped or len(self.skipped) < MAX_REASONS
        key = reason if known else "other reasons"
        self.skipped[key] = self.skipped.get(key, 0) + 1

    @property
    def main_reasons(self) -> str:
        """`12 x turn 1: ...; 3 x ...`, the three most frequent."""
        frequent = sorted(self.skipped.items(), key=lambda counted: -counted[1])
        return "; ".join(f"{number:,} x {reason}" for reason, number in frequent[:3])


class Mixture:
    """A rendered mixture. Conversations are counted through all its tasks in their order."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory, self._manifest = directory, manifest
        self.bos_id: int = manifest["bos_id"]
        self.tasks = [TaskCounts(**counts) for counts in manifest["tasks"]]

    @staticmethod
    def load(directory: Path) -> Mixture:
        """Raises FileNotFoundError where there is none, ValueError that names a missing or cut file."""
        path = directory / MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        mixture = Mixture(directory, manifest)
        for name, wanted in manifest["files"].items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else None
            if size != wanted["size"]:
                raise mixture._damage(name, f"expected {wanted['size']} bytes, found {size}")
        return mixture

    @staticmethod
    def find(directory: Path, belongs_to: Mapping[str, Any]) -> Mixture | None:
        """The mixture in a folder if it was rendered for `belongs_to`, read through and found whole; else None.

        Raises ValueError where it is damaged.
        """
        if not (directory / MANIFEST).exists():
            return None
        try:
            mixture = Mixture.load(directory)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{directory / MANIFEST} is damaged ({error!r}); {_cure(directory)}") from error
        if mixture._manifest["belongs_to"] != belongs_to or mixture._manifest["format"] != FORMAT:
            return None
        for name, wanted in mixture._manifest["files"].items():
            if sha256_file(directory / name) != wanted["sha256"]:
                raise mixture._damage(name, "its checksum differs")
        return mixture

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation."""
        return self._map("lengths.bin", np.dtype(np.int32))

    def tokens(self, conversation_idx: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, whether each is learned) of a conversation, views of the memory maps."""
        start, end = self._offsets[conversation_idx : conversation_idx + 2].tolist()
        return self._token_ids[start:end], self._learned[start:end]

    def order(self) -> np.ndarray:
        """Conversation indices in the order in which the mixture is read."""
        sizes, epochs = zip(*((task.num_conversations, task.epochs) for task in self.tasks), strict=True)
        return mixture_order(sizes, epochs, self._manifest["seed"])

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.append(0, np.cumsum(self.lengths, dtype=np.int64))

    @cached_property
    def _token_ids(self) -> np.ndarray:
        return self._map("token_ids.bin", np.dtype(self._manifest["dtype"]))

    @cached_property
    def _learned(self) -> np.ndarray:
        return self._map("learned.bin", np.dtype(np.bool_))

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        return np.memmap(self.directory / name, dtype, mode="r")

    def _damage(self, name: str, reason: str) -> ValueError:
        return ValueError(f"{self.directory / name} is damaged: {reason}; {_cure(self.directory)}")


def mixture_order(sizes: Sequence[int], epochs: Sequence[int], seed: int) -> np.ndarray:
    """Indices into the tasks' conversations, counted through; a pure function of its arguments.

    Each epoch of a task is a shuffle of its own, and the epochs of a task follow one another at even distances over
    the whole: every stretch holds each task in its share, and nothing comes again before all of its task has come.
    """
    places, indices, first = [], [], 0
    for task_idx, (size, num_epochs) in enumerate(zip(sizes, epochs, strict=True)):
        for epoch in range(num_epochs):
            indices.append(first + shuffle(size, seed, task_idx, epoch))
            places.append((epoch + (np.arange(size) + 0.5) / size) / num_epochs)
        first += size
    return np.concatenate(indices)[np.argsort(np.concatenate(places), kind="stable")]


def render_mixture(
    directory: Path,
    tasks: Sequence[tuple[Task, int]],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    seed: int,
    belongs_to: Mapping[str, Any],
) -> Mixture:
    """Render every conversation of the (task, epochs) to `directory`, replacing what it holds, with a progress bar.

    A conversation longer than `max_tokens` is cut to them. One that breaks a rule, or has nothing to learn in these
    tokens, is skipped; both are counted. `belongs_to` is what `Mixture.find` compares, JSON-able.
    Raises ValueError when a task has not one conversation to learn from, OSError when the disk is full.
    """
    from tqdm import tqdm

    assert tasks, "a mixture of nothing"
    # A task that reads a file may have left some of it out, and says so.
    counts = [TaskCounts(task.name, epochs, skipped=dict(getattr(task, "skipped", {}))) for task, epochs in tasks]
    dtype = token_dtype(tokenizer.vocab_size)
    with (
        _replacing(directory) as temporary,
        tqdm(total=sum(len(task) for task, _ in tasks), desc="rendering", leave=False, disable=None) as bar,
    ):
        with ExitStack() as stack:
            token_ids, learned, lengths = (
                stack.enter_context(_HashedFile(temporary / name))
                for name in ("token_ids.bin", "learned.bin", "lengths.bin")
            )
            for (task, _), task_counts in zip(tasks, counts, strict=True):
                for ids, mask in _render_task(task, task_counts, tokenizer, max_tokens):
                    bar.update()
                    if ids:
                        token_ids.write(np.array(ids, dtype).tobytes())
                        learned.write(np.array(mask, np.bool_).tobytes())
                        lengths.write(np.array([len(ids)], np.int32).tobytes())
        write_json(
            temporary / MANIFEST,
            {
                "format": FORMAT,
                "belongs_to": belongs_to,
                "dtype": dtype.name,
                "bos_id": tokenizer.bos_id,
                "seed": seed,
                "tasks": [asdict(task_counts) for task_counts in counts],
                "files": {
                    file.path.name: {"size": file.size, "sha256": file.sha256} for file in (token_ids, learned, lengths)
                },
            },
        )
    return Mixture.load(directory)


def _render_task(
    task: Task, counts: TaskCounts, tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, mask) of each example, both empty for one that is skipped."""
    for example_idx in range(len(task)):
        try:
            # One token more than there is room for tells what is longer.
            ids, mask = render_conversation(tokenizer, task.conversation(example_idx), max_tokens + 1)
            if not any(mask[:max_tokens]):
                raise ValueError(f"no assistant token among the first {max_tokens} tokens")
        except ValueError as error:
            counts.skip(" ".join(str(error).split()))
            yield [], []
            continue
        counts.num_conversations += 1
        counts.num_cut += len(ids) > max_tokens
        yield ids[:max_tokens], mask[:max_tokens]
    if not counts.num_conversations:
        raise ValueError(f"task {task.name} has no conversation to learn from ({counts.main_reasons or 'it is empty'})")


class _HashedFile:
    """A file that knows its size and digest when it is closed, and is on the disk then."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> _HashedFile:
        self._file = open(self.path, "wb")
        return self

    def write(self, content: bytes) -> None:
        assert self._file is not None
        with naming(self.path):
            self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with naming(self.path), self._file as file:
            file.flush()
            os.fsync(file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A new folder that takes the place of `directory` when the block ends well, and vanishes when it does not."""
    temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    with naming(temporary):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        fsync_directory(directory.parent)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _cure(directory: Path) -> str:
    return f"remove {directory} and run the same command again to render it anew"
