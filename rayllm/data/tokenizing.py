"""Text to token shards, one piece at a time: what each task of the `tokenize` stage does, without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.config.schema import TokenizeConfig
from rayllm.data.shards import ShardEntry, ShardWriter
from rayllm.data.sources import SkipCounts, TextPiece, read_documents, resolve_sources

if TYPE_CHECKING:
    from rayllm.text.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 256
_BATCH_CHARS = 1_000_000


@dataclass(frozen=True)
class TokenizeJob:
    """One piece to tokenize, and the share of its documents to hold out (0: none, 1: all of them)."""

    job_idx: int
    piece: TextPiece
    val_fraction: float


@dataclass(frozen=True)
class TokenizedPiece:
    """What became of a job: the shards written, the UTF-8 bytes of text in them, the documents left out."""

    job_idx: int
    shards: tuple[ShardEntry, ...]
    num_text_bytes: int
    skipped: dict[str, int]


def plan_jobs(config: TokenizeConfig) -> list[TokenizeJob]:
    """Resolve the sources into jobs, the same whenever the files are; text that is held out whole comes last.

    A file that is both a source and a validation source is held out. Raises what `resolve_sources` raises, and
    ValueError when nothing is left to train on.
    """

    def resolve(sources: tuple[str, ...]) -> list[TextPiece]:
        return resolve_sources(
            sources, text_column=config.text_column, row_groups_per_piece=config.row_groups_per_shard
        )

    pieces = resolve(config.sources)
    if config.validation.kind == "hash":
        return [TokenizeJob(idx, piece, config.validation.fraction) for idx, piece in enumerate(pieces)]
    held_out = resolve(config.validation.sources)
    places = {piece.place for piece in held_out}
    train = [piece for piece in pieces if piece.place not in places]
    if not train:
        raise ValueError("validation.sources holds out all of sources, which leaves nothing to train on; name fewer")
    return [TokenizeJob(idx, piece, float(idx >= len(train))) for idx, piece in enumerate(train + held_out)]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a hash of its text, the same on any machine, is below ``fraction``."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def tokenize_piece(job: TokenizeJob, tokenizer: Tokenizer, directory: str | Path) -> TokenizedPiece:
    """Tokenize a piece into shards below ``directory``, on one core. Running it again writes the same files again.

    Raises ValueError for text that cannot be read, OSError for a disk that cannot be written.
    """
    train, val = (
        ShardWriter(
            directory,
            split,
            piece_idx=job.job_idx,
            piece=job.piece.name,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
        )
        for split in ("train", "val")
    )
    skips = SkipCounts()
    num_text_bytes = 0
    for texts in _batches(read_documents(job.piece, skips)):
        for text, token_ids in zip(texts, tokenizer.encode_batch(texts, num_threads=1), strict=True):
            num_text_bytes += len(text.encode())
            (val if is_held_out(text, job.val_fraction) else train).add(token_ids)
    return TokenizedPiece(job.job_idx, (*train.close(), *val.close()), num_text_bytes, asdict(skips))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document)
        if len(batch) == _BATCH_DOCUMENTS or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
