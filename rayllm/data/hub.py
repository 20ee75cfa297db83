"""Text data sets of the Hugging Face hub, streamed. Every wait here is bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

CONNECT_TIMEOUT_S = 20.0
"""How long the hub may take to say whether it knows a data set."""
OPEN_TIMEOUT_S = 180.0
"""How long listing a data set's files may take."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class HubName:
    """What follows ``hub:`` in a source. ``subset`` and ``split`` are None where the user left them out."""

    repo: str
    subset: str | None = None
    split: str | None = None

    @staticmethod
    def parse(source: str) -> HubName:
        """Read ``hub:ORG/NAME[:SUBSET[:SPLIT]]``; an empty SUBSET stands for the default one."""
        repo, *rest = source.removeprefix("hub:").split(":")
        org, _, name = repo.partition("/")
        if not org or not name or "/" in name or len(rest) > 2:
            raise ValueError(f"source {source!r} cannot be read: expected hub:ORG/NAME[:SUBSET[:SPLIT]]")
        subset, split = (*rest, "", "")[:2]
        return HubName(repo, subset or None, split or None)


@dataclass(frozen=True)
class HubShard:
    """One of ``num_shards`` parts of a split at a fixed revision; what one task reads."""

    name: HubName
    revision: str
    shard_idx: int
    num_shards: int


def list_shards(name: HubName) -> list[HubShard]:
    """Ask the hub for a data set (split "train" by default) and return its parts, at the revision it has now.

    Raises ConnectionError when the hub does not answer in time, whatever `datasets` raises otherwise.
    """
    from huggingface_hub import HfApi

    facts = _bounded(lambda: HfApi().dataset_info(name.repo, timeout=CONNECT_TIMEOUT_S / 2), CONNECT_TIMEOUT_S)
    first = HubShard(
        replace(name, split=name.split or "train"), revision=facts.sha or "main", shard_idx=0, num_shards=1
    )
    num_shards = _bounded(lambda: int(_open(first).num_shards), OPEN_TIMEOUT_S)
    return [replace(first, shard_idx=idx, num_shards=num_shards) for idx in range(num_shards)]


def read_rows(shard: HubShard) -> Iterator[dict[str, Any]]:
    """Stream the rows of one part."""
    stream = _bounded(lambda: _open(shard), OPEN_TIMEOUT_S)
    yield from stream.shard(num_shards=shard.num_shards, index=shard.shard_idx)


def _open(shard: HubShard) -> Any:
    from datasets import load_dataset

    name = shard.name
    return load_dataset(name.repo, name.subset, split=name.split, revision=shard.revision, streaming=True)


def _bounded(ask: Callable[[], _T], timeout_s: float) -> _T:
    """Return ``ask()``, or raise ConnectionError after ``timeout_s``: name look-ups hang below any HTTP timeout."""
    answers: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001 - raised again below, by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="hub")
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not answers:
        raise ConnectionError(f"no answer within {timeout_s:.0f} s")
    return answers[0]
