from __future__ import annotations

from pathlib import Path

import pytest

from rayllm.config.schema import TokenizeConfig, ValidationSplit
from rayllm.data.documents import TextPiece
from rayllm.data.shards import Manifest, TokenShards
from rayllm.data.tokenizing import TokenizeJob, is_held_out, plan_jobs, tokenize_piece
from rayllm.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYLLM_DATA_DIR", raising=False)
    return tmp_path


def test_the_hash_rule_is_stable_and_holds_out_its_share() -> None:
    texts = [f"document {idx}" for idx in range(4000)]
    held_out = [is_held_out(text, 0.1) for text in texts]
    assert 320 < sum(held_out) < 480
    assert [idx for idx in range(80) if is_held_out(f"document {idx}", 0.1)] == [40, 44, 59, 70], (
        "the rule must never change"
    )
    assert all(is_held_out(text, 0.2) for text in texts if is_held_out(text, 0.1)), "a larger share holds out more"
    assert not any(is_held_out(text, 0) for text in texts) and all(is_held_out(text, 1) for text in texts)


def test_documents_are_tokenized_into_their_splits(here: Path) -> None:
    texts = [f"text {idx} — naïve <|bos|>" for idx in range(700)]
    (here / "a.txt").write_text("<|endoftext|>".join([*texts, " "]))
    tokenizer = Tokenizer.byte_level()
    job = TokenizeJob(5, TextPiece("a.txt", "txt", "text", str(here / "a.txt")), 0.25)
    done = tokenize_piece(job, tokenizer, here / "out")
    assert [entry.file for entry in done.shards] == ["train/000005-000.npy", "val/000005-000.npy"]
    assert done.num_text_bytes == sum(len(text.encode()) for text in texts)
    manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, {}, (), done.shards)
    manifest.save(here / "out")
    shards = TokenShards.load(here / "out")
    for name, is_val in (("train", False), ("val", True)):
        split = shards.split(name)  # type: ignore[arg-type]
        documents = [split.tokens(idx).tolist() for idx in range(split.num_documents)]
        assert all(document[0] == tokenizer.bos_id for document in documents)
        assert [tokenizer.decode(d[1:]) for d in documents] == [t for t in texts if is_held_out(t, 0.25) is is_val]
    assert tokenize_piece(job, tokenizer, here / "out") == done, "the same again"


def test_sources_held_out_whole_are_not_trained_on(here: Path) -> None:
    for name in "abc":
        (here / f"{name}.txt").write_text(name)
    split = ValidationSplit(kind="sources", sources=("b.txt",))
    jobs = plan_jobs(TokenizeConfig(sources=("*.txt",), validation=split))
    assert [(job.job_idx, job.piece.name, job.val_fraction) for job in jobs] == [
        (0, "a.txt", 0.0),
        (1, "c.txt", 0.0),
        (2, "b.txt", 1.0),
    ]
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        plan_jobs(TokenizeConfig(sources=("b.txt",), validation=split))
