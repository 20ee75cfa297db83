"""Groups on disk come back as they were."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from rayllm.text.tokenizer import Tokenizer
from rayllm.training.saved_rollouts import (
    TERM_NAMES,
    load_groups,
    read_groups,
    render_samples,
    save_groups,
    saved_files,
)
from rayllm.types import Completion, Prompt, Rollout, RolloutGroup

TOKENIZER = Tokenizer.byte_level()


def some_groups() -> list[RolloutGroup]:
    ids = tuple(TOKENIZER.encode("18 ✓"))
    whole = Completion(ids, (True,) * len(ids), (-0.5,) * len(ids), "stop", ((3, 2), (4, len(ids) - 2)))
    cut = Completion(ids[:2], (True, False), (-0.25, 0.0), "length", ((4, 2),), ((ids[0], 7), (ids[1],)))
    failed = Completion((), (), (), "failed", error="no room")
    prompt = Prompt("gsm8k/train/7", tuple(TOKENIZER.encode("What is 9 + 9?")))
    return [RolloutGroup(prompt, (Rollout(whole, 1.0), Rollout(cut, 0.0), Rollout(failed, None)))]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    groups = some_groups()
    terms = {"address": np.array([[0, 0, 1], [0, 1, 0]])} | {name: np.array([0.5, -1.5]) for name in TERM_NAMES}
    path = tmp_path / "rollouts" / "step_000003.jsonl.gz"
    save_groups(path, groups, terms)
    assert load_groups(path) == groups
    ((group, by_rollout),) = read_groups(path)
    assert group == groups[0]
    assert by_rollout[0] == {"t": [1], **{name: [0.5] for name in TERM_NAMES}}
    assert by_rollout[1] == {"t": [0], **{name: [-1.5] for name in TERM_NAMES}}
    assert by_rollout[2] is None
    save_groups(tmp_path / "rollouts" / "step_000001.jsonl.gz", groups)
    expected = [tmp_path / "rollouts" / f"step_00000{n}.jsonl.gz" for n in (1, 3)]
    assert saved_files(str(tmp_path)) == saved_files(str(tmp_path / "rollouts")) == expected
    assert saved_files(str(path)) == [path]


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no saved rollouts"):
        saved_files(str(tmp_path))
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz holds no saved rollouts"):
        load_groups(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": 3}'))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 1 is no group"):
        load_groups(tmp_path / "a.jsonl.gz")


def test_samples_can_be_read() -> None:
    text = render_samples(some_groups(), TOKENIZER, 40)
    for part in (
        "# Step 40",
        "gsm8k/train/7",
        "What is 9 + 9?",
        "18 ✓",
        "reward 1 ",
        "Rewards: 1, 0, failed",
        "no room",
    ):
        assert part in text, part
