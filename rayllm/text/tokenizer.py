"""Text <-> token ids. rustbpe learns the merges, tiktoken applies them, both at native speed.

Ids are the mergeable ranks (the 256 bytes and what was merged from them) and, after them, the special tokens.
On disk a tokenizer is two open files: `tokenizer.json`, and `ranks-<fingerprint>.tiktoken` with one base64 token and
its rank a line. The first is written last and names the second by content, so a cut save leaves the older tokenizer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayllm.runs.atomic import write_atomic

if TYPE_CHECKING:
    import numpy as np

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# Merges do not reach across these pieces: those of cl100k, but numbers are cut every two digits, not three, which
# spends less of a small vocabulary on them.
SPLIT_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s+",
    )
)

_JSON_NAME = "tokenizer.json"
_FORMAT, _FORMAT_VERSION = "rayllm-tokenizer", 1
_CURE = "copy the whole directory again, or train again"

# The regex engine backtracks over white space and gives up (by a panic) at a million characters of it in one run.
_MAX_BLANK_RUN = 500_000
_LONG_BLANK_RUN = re.compile(rf"(?<!\s)\s{{{_MAX_BLANK_RUN + 1},}}")


class Tokenizer:
    """Byte-pair encoding of any text, and special tokens that no text can spell.

    `ranks` maps each token's bytes to its id, 0 to len(ranks) - 1, and holds all 256 single bytes; `pattern` cuts text
    into the stretches within which merges happen. Raises ValueError where they, or the special tokens, are not such.
    """

    def __init__(
        self, ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> None:
        import tiktoken

        self._tokens = _in_rank_order(ranks)
        self.pattern = pattern
        self.special_tokens = tuple(special_tokens)
        if not all(isinstance(name, str) and name for name in self.special_tokens):
            raise ValueError(f"special tokens must be non-empty strings, got {list(self.special_tokens)}")
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(f"special tokens must differ from each other, got {list(self.special_tokens)}")
        self._special_ids = {name: len(self._tokens) + idx for idx, name in enumerate(self.special_tokens)}
        self._encoding = tiktoken.Encoding(
            "rayllm", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=self._special_ids
        )
        self.fingerprint = _fingerprint(self._tokens, pattern, self.special_tokens)
        """SHA-256 (hex) over ranks, pattern and special tokens: equal for tokenizers that give the same ids."""

    @staticmethod
    def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges that compress the documents best, `vocab_size` tokens in all.

        The same documents give the same tokenizer. Raises ValueError where there is no text, or too little of it.
        """
        import rustbpe

        assert not isinstance(documents, str), "documents must be an iterable of strings, got one string"
        num_fixed = 256 + len(SPECIAL_TOKENS)
        if vocab_size < num_fixed:
            raise ValueError(
                f"vocab_size must be at least {num_fixed}, 256 bytes and {len(SPECIAL_TOKENS)} special tokens, "
                f"got {vocab_size}"
            )
        num_chars = 0

        def pieces() -> Iterator[str]:
            nonlocal num_chars
            for document in documents:
                num_chars += len(document)
                yield from _cut_blank_runs(_encodable(document))

        learner = rustbpe.Tokenizer()
        learner.train_from_iterator(pieces(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        if not num_chars:
            raise ValueError("there is no text to train a tokenizer on: the sources gave no document with any text")
        learned = learner.get_mergeable_ranks()
        ranks = {bytes(token): rank for token, rank in learned}
        assert len(ranks) == len(learned), "two merges gave the same bytes"
        tokenizer = Tokenizer(ranks, SPLIT_PATTERN)
        if tokenizer.vocab_size < vocab_size:
            raise ValueError(
                f"vocab_size is {vocab_size}, but {num_chars:,} characters of text hold merges for "
                f"{tokenizer.vocab_size} only: give more text, or set vocab_size to {tokenizer.vocab_size} or less"
            )
        return tokenizer

    @staticmethod
    def byte_level() -> Tokenizer:
        """The smallest tokenizer: a token for each byte, and the special tokens."""
        return Tokenizer({bytes([byte]): byte for byte in range(256)}, SPLIT_PATTERN)

    @staticmethod
    def load(directory: str | Path) -> Tokenizer:
        """Read what `save` wrote and check that it is whole.

        Raises FileNotFoundError where a file is missing, ValueError where one is damaged or not ours.
        """
        described = read_tokenizer_json(directory)
        file = _ranks_file(Path(directory).expanduser(), described["fingerprint"])
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, and {_JSON_NAME} beside it needs it; {_CURE}")
        try:
            tokenizer = Tokenizer(_parse_ranks(file.read_bytes()), described["pattern"], described["special_tokens"])
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); {_CURE}") from error
        if tokenizer.fingerprint != described["fingerprint"] or tokenizer.vocab_size != described["vocab_size"]:
            raise ValueError(
                f"the tokenizer in {directory} is damaged: its files give {tokenizer.vocab_size} tokens with the "
                f"fingerprint {tokenizer.fingerprint[:16]}, {_JSON_NAME} says {described['vocab_size']} with "
                f"{described['fingerprint'][:16]}; {_CURE}"
            )
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer, or replace the one there. At any moment a reader finds the old one or this one."""
        folder = Path(directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        file = _ranks_file(folder, self.fingerprint)
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(self._tokens))
        write_atomic(file, b"".join(lines))
        description = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
        }
        write_atomic(folder / _JSON_NAME, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        for stale in set(folder.glob(f"ranks-{'[0-9a-f]' * 16}.tiktoken")) - {file}:
            stale.unlink(missing_ok=True)

    @property
    def kind(self) -> Literal["bpe", "byte"]:
        """`byte` where nothing was merged."""
        return "bpe" if len(self._tokens) > 256 else "byte"

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._tokens) + len(self.special_tokens)

    @property
    def bos_id(self) -> int:
        """Id of `<|bos|>`, which opens every document and conversation."""
        return self.special_id("<|bos|>")

    def special_id(self, name: str) -> int:
        """Id of a special token, given as in SPECIAL_TOKENS. Raises ValueError where there is no such token."""
        if name not in self._special_ids:
            raise ValueError(f"no special token {name!r}; this tokenizer has {', '.join(self.special_tokens)}")
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, never special ones: `<|bos|>` in a text is seven characters like any others.

        Halves of surrogate pairs, which are no text, become U+FFFD.
        """
        pieces = [self._encoding.encode_ordinary(piece) for piece in _cut_blank_runs(text)]
        return pieces[0] if len(pieces) == 1 else list(chain.from_iterable(pieces))

    def encode_batch(self, texts: Iterable[str], num_threads: int = 8) -> list[list[int]]:
        """`encode` of every text, on several threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of the ids, special tokens by their names. Raises ValueError for an id outside the vocabulary."""
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            strange = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {strange} is not in the vocabulary (0 to {self.vocab_size - 1})") from error

    def token_bytes_V(self) -> np.ndarray:
        """How many bytes of text each token stands for, shape (V,) int32; 0 for special tokens."""
        import numpy as np

        lengths = [len(token) for token in self._tokens] + [0] * len(self.special_tokens)
        return np.array(lengths, dtype=np.int32)


def read_tokenizer_json(directory: str | Path) -> dict[str, Any]:
    """What `tokenizer.json` says (kind, vocab_size, fingerprint, pattern, special_tokens), without loading the ranks.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or not ours.
    """
    file = Path(directory).expanduser() / _JSON_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer there: {file} is missing; `rayllm tokenizer --out={directory}` makes one"
        )
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); {_CURE}") from error
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise ValueError(
            f"{file} is no tokenizer of ours (its format is not {_FORMAT!r}); `rayllm tokenizer` makes one"
        )
    if described.get("version") != _FORMAT_VERSION:
        raise ValueError(f"{file} has format version {described.get('version')!r}, this code reads {_FORMAT_VERSION}")
    special_tokens, fingerprint = described.get("special_tokens"), described.get("fingerprint")
    sound = {
        "kind": described.get("kind") in ("bpe", "byte"),
        "vocab_size": type(described.get("vocab_size")) is int,
        "fingerprint": isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{64}", fingerprint) is not None,
        "pattern": isinstance(described.get("pattern"), str),
        "special_tokens": isinstance(special_tokens, list) and all(isinstance(name, str) for name in special_tokens),
    }
    if not all(sound.values()):
        bad = ", ".join(key for key, is_sound in sound.items() if not is_sound)
        raise ValueError(f"{file} is damaged ({bad} missing or not of its type); {_CURE}")
    return described


def _ranks_file(directory: Path, fingerprint: str) -> Path:
    return directory / f"ranks-{fingerprint[:16]}.tiktoken"


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """Ranks of a `.tiktoken` file; ValueError names the line that is none."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"line {number} is not a base64 token and its rank") from error
    return ranks


def _in_rank_order(ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """The tokens by id; ValueError unless ids count up from 0 and every byte has a token."""
    if not all(isinstance(token, bytes) and token for token in ranks):
        raise ValueError("ranks must map non-empty bytes to ids")
    tokens = sorted(ranks, key=ranks.__getitem__)
    for expected, token in enumerate(tokens):
        if ranks[token] != expected:
            raise ValueError(f"ranks must count up from 0: expected {expected}, got {ranks[token]} for {token!r}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"ranks must hold every single byte; {len(missing)} are missing, first {bytes(missing[:1])!r}")
    return tuple(tokens)


def _fingerprint(tokens: Sequence[bytes], pattern: str, special_tokens: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([pattern, list(special_tokens)]).encode())
    for token in tokens:
        digest.update(b"\n" + base64.b64encode(token))
    return digest.hexdigest()


def _encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, as `encode` sees them too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _cut_blank_runs(text: str) -> list[str]:
    """The text, cut within runs of white space that are longer than the regex engine bears. They join to the text."""
    if len(text) <= _MAX_BLANK_RUN:
        return [text]
    cuts = [0]
    for run in _LONG_BLANK_RUN.finditer(text):
        cuts.extend(range(run.start() + _MAX_BLANK_RUN, run.end(), _MAX_BLANK_RUN))
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]
