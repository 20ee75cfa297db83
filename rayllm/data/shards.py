"""Token shards on disk: ``train/*.npy`` and ``val/*.npy`` of token ids, and a ``manifest.json`` written last.

A shard is a one-dimensional .npy file (uint16 where the vocabulary fits, else uint32) that is read through a memory
map. Its documents stand end to end; the BOS that opens each one delimits them. A directory without a manifest
is an unfinished one. Nothing here knows of text, Ray or torch.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rayllm.runs.atomic import sha256_file, write_atomic

FORMAT = "rayllm-token-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_TOKENS_PER_SHARD = 2**26
"""A writer begins a new file when it holds this many tokens: bounds its memory whatever the size of a source."""
MAX_OPEN_SHARDS = 256
"""Memory maps kept open at once; each takes a file descriptor."""

Split = Literal["train", "val"]


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard. ``file`` is relative to the manifest; ``piece`` names the text it holds."""

    file: str
    split: Split
    piece: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What the shards of a directory are: made by which tokenizer from which text, what is held out by which rule."""

    tokenizer_fingerprint: str
    vocab_size: int
    bos_id: int
    validation: dict[str, Any]
    pieces: tuple[dict[str, Any], ...]
    shards: tuple[ShardEntry, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    def save(self, directory: str | Path) -> None:
        """Write manifest.json atomically. Call it when every shard stands."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": self.dtype.name}
        write_atomic(Path(directory, MANIFEST), json.dumps(head | asdict(self), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(directory: str | Path) -> Manifest:
        """Raises FileNotFoundError where there is none, ValueError where it is damaged or of another version."""
        path = Path(directory, MANIFEST)
        if not path.is_file():
            raise FileNotFoundError(
                f"no token shards in {directory}: {path} is missing; run `rayllm tokenize --out={directory}` to its end"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
                found = f"{raw['format']} version {raw['format_version']}"
                raise ValueError(f"expected {FORMAT} version {FORMAT_VERSION}, found {found}")
            known = {f.name: raw[f.name] for f in fields(Manifest)}
            known["shards"] = tuple(ShardEntry(**entry) for entry in raw["shards"])
            return Manifest(**known | {"pieces": tuple(raw["pieces"])})
        except (KeyError, TypeError, ValueError) as error:
            reason = f"missing key {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} cannot be read ({reason}); delete {directory} and run `rayllm tokenize` again"
            ) from error


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShardWriter:
    """Collects the tokenized documents of one piece of text and one split, and writes them as shards.

    Files are named ``{split}/{piece_idx}-{part}.npy``. Each appears whole or not at all.
    """

    def __init__(
        self, directory: str | Path, split: Split, *, piece_idx: int, piece: str, vocab_size: int, bos_id: int
    ):
        self._directory, self._split, self._piece_idx, self._piece = Path(directory), split, piece_idx, piece
        self._dtype, self._bos_id = token_dtype(vocab_size), bos_id
        self._documents: list[np.ndarray] = []
        self._num_tokens = 0
        self._entries: list[ShardEntry] = []

    def add(self, token_ids: Sequence[int]) -> None:
        """Append one document: its tokens without BOS, which is put before them here."""
        document = np.empty(len(token_ids) + 1, self._dtype)
        document[0] = self._bos_id
        document[1:] = token_ids
        self._documents.append(document)
        self._num_tokens += len(document)
        if self._num_tokens >= MAX_TOKENS_PER_SHARD:
            self._flush()

    def close(self) -> list[ShardEntry]:
        """Write what is left and return the entries of all files. Raises OSError when the disk is full."""
        if self._documents:
            self._flush()
        return self._entries

    def _flush(self) -> None:
        file = f"{self._split}/{self._piece_idx:06d}-{len(self._entries):03d}.npy"
        path = self._directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(self._documents))
        content = buffer.getvalue()
        write_atomic(path, content)
        sha256 = hashlib.sha256(content).hexdigest()
        self._entries.append(
            ShardEntry(file, self._split, self._piece, len(self._documents), self._num_tokens, len(content), sha256)
        )
        self._documents, self._num_tokens = [], 0


class Shard:
    """One shard of a loaded directory; offsets of its documents are found when first asked for."""

    def __init__(self, owner: TokenShards, entry: ShardEntry):
        self._owner, self.entry = owner, entry

    @property
    def num_documents(self) -> int:
        return self.entry.num_documents

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the shard, as a read-only memory map."""
        return self._owner.map_tokens(self.entry)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each document begins, and after the last the end: int64 of num_documents + 1."""
        tokens, bos_id = self.tokens, self._owner.manifest.bos_id
        starts = np.flatnonzero(tokens == bos_id)
        if len(starts) != self.num_documents or starts[0] != 0:
            raise self._owner.damage(self.entry, f"expected {self.num_documents} documents, found {len(starts)}")
        return np.append(starts, len(tokens))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, BOS counted."""
        return np.diff(self.offsets)


class SplitTokens:
    """The documents of one split, counted through all its shards in the order of the manifest."""

    def __init__(self, owner: TokenShards, split: Split):
        self.bos_id = owner.manifest.bos_id
        self.shards = [Shard(owner, entry) for entry in owner.manifest.shards if entry.split == split]
        self.num_tokens = sum(shard.entry.num_tokens for shard in self.shards)
        ends = np.cumsum([shard.num_documents for shard in self.shards], dtype=np.int64).tolist()
        self._first_documents = [0, *ends]
        self.num_documents: int = self._first_documents[-1]

    def tokens(self, document_idx: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens ``start : start + length`` of a document (to its end for None), a view of the memory map."""
        shard_idx = bisect_right(self._first_documents, document_idx) - 1
        shard = self.shards[shard_idx]
        at = document_idx - self._first_documents[shard_idx]
        begin, end = shard.offsets[at : at + 2].tolist()
        stop = end if length is None else begin + start + length
        assert begin <= begin + start <= stop <= end, (document_idx, start, length)
        return shard.tokens[begin + start : stop]


class TokenShards:
    """A directory of token shards, open for reading.

    Loading checks the manifest and the size of every file; :meth:`verify` also checks their contents.
    """

    def __init__(self, directory: str | Path, manifest: Manifest):
        self.directory, self.manifest = Path(directory), manifest
        self.map_tokens = lru_cache(MAX_OPEN_SHARDS)(self._map_tokens)
        self._splits: dict[Split, SplitTokens] = {"train": SplitTokens(self, "train"), "val": SplitTokens(self, "val")}

    @staticmethod
    def load(directory: str | Path) -> TokenShards:
        """Raises FileNotFoundError where no finished shards are, ValueError that names a missing or cut file."""
        shards = TokenShards(directory, Manifest.load(directory))
        for entry in shards.manifest.shards:
            path = shards.directory / entry.file
            if not path.is_file():
                raise shards.damage(entry, "missing")
            if path.stat().st_size != entry.num_bytes:
                raise shards.damage(entry, f"expected {entry.num_bytes} bytes, found {path.stat().st_size}")
        return shards

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest.tokenizer_fingerprint

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    def num_tokens(self, split: Split) -> int:
        """Tokens of a split, every BOS counted."""
        return self._splits[split].num_tokens

    def split(self, split: Split) -> SplitTokens:
        return self._splits[split]

    def verify(self, split: Split | None = None) -> None:
        """Read every shard (of one split) and compare checksums. Raises ValueError that names the first damaged one."""
        for entry in self.manifest.shards:
            if split in (None, entry.split) and sha256_file(self.directory / entry.file) != entry.sha256:
                raise self.damage(entry, "its checksum differs from the manifest's")

    def damage(self, entry: ShardEntry, reason: str) -> ValueError:
        """The error that names a damaged shard and the cure."""
        cure = f"delete {self.directory} and run `rayllm tokenize` again"
        return ValueError(f"token shard {self.directory / entry.file} is damaged: {reason}; {cure}")

    def _map_tokens(self, entry: ShardEntry) -> np.ndarray:
        try:
            tokens = np.load(self.directory / entry.file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self.damage(entry, str(error)) from error
        if tokens.shape != (entry.num_tokens,) or tokens.dtype != self.manifest.dtype:
            expected = f"expected {entry.num_tokens} {self.manifest.dtype}"
            raise self.damage(entry, f"{expected}, found {tokens.dtype} of shape {tokens.shape}")
        return tokens
