"""The base-eval stage refuses what it must not measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayllm.config.schema import BaseEvalConfig, ImportNanochatConfig
from rayllm.data.shards import Manifest, ShardWriter
from rayllm.evals import base
from rayllm.runs import import_nanochat
from rayllm.runs.checkpoint import open_checkpoint

REFERENCE = Path(__file__).parents[1] / "parity" / "mha"


def test_damaged_validation_text_is_not_measured(tmp_path: Path) -> None:
    import_nanochat.run(ImportNanochatConfig(source=str(REFERENCE), out=str(tmp_path / "model")))
    tokenizer = open_checkpoint(tmp_path / "model").load_tokenizer()
    shards = tmp_path / "shards"
    writer = ShardWriter(
        shards, "val", piece_idx=0, piece="text", vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id
    )
    writer.add(tokenizer.encode("She has 12 pens. " * 100))
    entries = tuple(writer.close())
    Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, {}, (), entries).save(shards)
    settings = {"checkpoint": str(tmp_path / "model"), "shards": str(shards), "prompts": (), "max_tokens": 256}
    base.run(BaseEvalConfig(**settings, out=str(tmp_path / "whole")))

    file = shards / entries[0].file
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        base.run(BaseEvalConfig(**settings, out=str(tmp_path / "damaged")))
    assert not (tmp_path / "damaged").exists()
