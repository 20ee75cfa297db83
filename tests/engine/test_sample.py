"""Continuing a text: where it ends, and what is said where it cannot be continued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rayllm.config.schema import SamplingConfig
from rayllm.engine.sample import continue_text
from rayllm.runs.load import load

GREEDY = SamplingConfig(temperature=0, max_tokens=20)


def test_a_stop_text_ends_the_text_before_it(chat_checkpoint: Path) -> None:
    model, tokenizer = load(chat_checkpoint)
    whole, again = continue_text(model, tokenizer, "sing", GREEDY, num_samples=2)
    assert whole == again and len(whole) > 4 and whole.isascii()
    for stop in (whole[3:5], whole[0]):
        texts = continue_text(model, tokenizer, "sing", replace(GREEDY, stop=("\0", stop)))
        assert texts == [whole[: whole.find(stop)]]


def test_what_cannot_be_continued_is_told(chat_checkpoint: Path) -> None:
    model, tokenizer = load(chat_checkpoint)
    with pytest.raises(ValueError, match="logits are not finite"):
        continue_text(model, tokenizer, "\x01", GREEDY)
    with pytest.raises(ValueError, match="positions this model has"):
        continue_text(model, tokenizer, "x" * 20_000, GREEDY)
