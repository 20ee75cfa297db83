"""A small tokenizer for the tests of this room, trained once."""

from __future__ import annotations

import pytest

from rayllm.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_documents() -> list[str]:
    """A few kilobytes of text with plenty to merge."""
    names = ["Tom", "Anna", "Mina", "José", "the dog", "a small bird"]
    verbs = ["walks to", "looks at", "finds", "remembers", "talks about"]
    places = ["the river", "the old house", "the market", "her garden", "the café"]
    sentences = [
        f"{n} {v} {p}, and {i} days later it rains." for i, n in enumerate(names) for v in verbs for p in places
    ]
    return [" ".join(sentences[start : start + 10]) for start in range(0, len(sentences), 10)]


@pytest.fixture(scope="session")
def small_tokenizer(small_documents: list[str]) -> Tokenizer:
    """320 tokens: 256 bytes, 55 merges, 9 special tokens."""
    return Tokenizer.train(small_documents, 320)
