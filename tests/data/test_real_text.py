"""The data room on real text: reading, sharding, packing and loading agree on every token."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from rayllm.data.loader import step_batches, validation_batches
from rayllm.data.packing import RowPlan
from rayllm.data.shards import Manifest, TokenShards
from rayllm.data.sources import SkipCounts, read_documents, resolve_sources
from rayllm.data.tokenizing import TokenizeJob, tokenize_piece
from rayllm.text.tokenizer import Tokenizer


@pytest.fixture
def stories(real_text_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLLM_DATA_DIR", str(real_text_dir))
    return real_text_dir


def test_real_files_are_read(stories: Path) -> None:
    pieces = resolve_sources(["pretrain/tinystories_train.parquet"], text_column="text", row_groups_per_piece=1)
    assert [piece.row_groups for piece in pieces] == [(0, 1), (1, 2), (2, 3)]
    skips = SkipCounts()
    texts = [text for piece in pieces for text in read_documents(piece, skips)]
    assert (len(texts), sum(len(text.encode()) for text in texts), skips.total) == (2753, 2_330_884, 0)
    (wiki_piece,) = resolve_sources(["pretrain/wikitext2_valid.txt.gz"], text_column="text")
    (wiki,) = read_documents(wiki_piece, skips)
    assert len(wiki.encode()) == 1_121_681 and "Homarus gammarus" in wiki[:100]


def test_real_stories_are_packed_and_loaded(stories: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.byte_level()
    pieces = resolve_sources(["pretrain/tinystories_train.parquet"], text_column="text", row_groups_per_piece=1)
    done = [tokenize_piece(TokenizeJob(idx, piece, 0.05), tokenizer, tmp_path) for idx, piece in enumerate(pieces)]
    entries = tuple(entry for piece in done for entry in piece.shards)
    Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, {}, (), entries).save(tmp_path)
    shards = TokenShards.load(tmp_path)
    shards.verify()
    assert shards.num_tokens("train") + shards.num_tokens("val") == 2_330_884 + 2753

    sequence_len = 512
    plan = RowPlan(shards.split("train").shards, sequence_len, "carry", seed=0)
    num_rows = sum(1 for _ in plan)
    assert plan.num_tail_tokens <= sequence_len and num_rows > shards.num_tokens("train") // (sequence_len + 1) - 1

    settings: dict[str, Any] = {
        "rows_per_step": 16,
        "rows_per_micro_batch": 16,
        "sequence_len": sequence_len,
        "seed": 0,
    }
    settings |= {"rank": 0, "world_size": 1, "long_documents": "carry"}
    reader = step_batches(shards, **settings)
    whole = list(islice(reader, num_rows // 16 + 3))
    reader.close()
    assert whole[-1].position.epoch == 1
    rows = [row for step in whole[:20] for row in step.micro_batches[0].inputs_BT.tolist()]
    assert all(row[0] == tokenizer.bos_id for row in rows)
    assert "Once upon a time" in tokenizer.decode([token for row in rows for token in row])
    resumed = step_batches(shards, **settings, position=whole[-3].position)
    again = next(resumed)
    resumed.close()
    assert again.position == whole[-2].position
    assert again.micro_batches[0].targets_BT.equal(whole[-2].micro_batches[0].targets_BT)

    validation = list(
        validation_batches(
            shards, rows_per_batch=8, sequence_len=sequence_len, max_tokens=10**9, long_documents="carry"
        )
    )
    num_rows = sum(len(batch.targets_BT) for batch in validation)
    assert num_rows * (sequence_len + 1) > shards.num_tokens("val") - (sequence_len + 1), "all but a tail"
