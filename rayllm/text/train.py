"""The `tokenizer` stage (`rayllm tokenizer laptop`): read text, learn its merges, compare with known tokenizers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rayllm.config.load import to_dict
from rayllm.config.schema import TokenizerConfig, TrackingConfig
from rayllm.data.sources import SkipCounts, TextPiece, read_documents, resolve_sources
from rayllm.runs.atomic import write_atomic
from rayllm.runs.run_dir import open_run
from rayllm.runs.tracking import build_tracker
from rayllm.text.compare import SAMPLES, Comparison, compare, load_references
from rayllm.text.tokenizer import Tokenizer

_HEAD_CHARS = 100_000
_LINE_EVERY_S, _REDRAW_EVERY_S = 10.0, 0.2


def describe_plan(config: TokenizerConfig) -> dict[str, object]:
    """What the stage would read and make. Raises FileNotFoundError or ValueError for sources that it could not read."""
    return _describe(config, _resolve(config))


def run(config: TokenizerConfig) -> None:
    """Make the tokenizer in `config.out`, write report.json beside it, print the comparison.

    Over an older one of the same recipe it is made anew and takes its place at once, when complete. Raises
    FileNotFoundError or ValueError for sources that cannot be read or hold too little text.
    """
    pieces = _resolve(config)
    references = load_references()  # before the long work, so that a damaged file is told at once
    plan = _describe(config, pieces)
    with open_run(config.out, stage="tokenizer", config=config, plan=plan, may_change=_may_change(config)) as run_dir:
        start_s = time.perf_counter()
        text = TrainingText(pieces, config.max_chars, config.max_chars_per_document)
        tokenizer = Tokenizer.byte_level() if config.kind == "byte" else Tokenizer.train(text, config.vocab_size)
        seconds = time.perf_counter() - start_s
        texts = {**SAMPLES, "training text": text.head}
        for kind, sample in texts.items():
            assert tokenizer.decode(tokenizer.encode(sample)) == sample, f"{kind} does not survive a round trip"
        comparison = compare({"ours": tokenizer, **references}, texts)
        tokenizer.save(run_dir.path)
        report = _report(tokenizer, text, seconds, comparison)
        write_atomic(run_dir.path / "report.json", json.dumps(report, indent=2) + "\n")
        tracker = build_tracker(run_dir.path, TrackingConfig(), config=to_dict(config), resume_step=None)
        ratios = {f"bytes_per_token/{kind}": row["ours"] for kind, row in comparison.bytes_per_token.items()}
        tracker.log(0, {"vocab_size": tokenizer.vocab_size, "seconds": seconds, **ratios})
        tracker.close()
    if text.skips.total:
        print(f"skipped {_count(text.skips.total, 'document')}: {_describe_skips(text.skips)}", file=sys.stderr)
    print(comparison.table())
    print(f"\n{tokenizer.vocab_size:,} tokens in {seconds:.1f} s: {config.out}")


class TrainingText:
    """The documents of the pieces, cut to the caps, with a count of what was read and its progress on stderr."""

    def __init__(self, pieces: Sequence[TextPiece], max_chars: int, max_chars_per_document: int) -> None:
        self._pieces = pieces
        self._max_chars = max_chars
        self._max_chars_per_document = max_chars_per_document
        self.num_documents = self.num_cut_documents = self.num_chars = 0
        self.skips = SkipCounts()
        self.head = ""
        """The first documents, about 100,000 characters, as they are trained on."""

    def __iter__(self) -> Iterator[str]:
        progress = _Progress()
        for piece_idx, piece in enumerate(self._pieces):
            for document in read_documents(piece, self.skips):
                taken = document[: min(self._max_chars_per_document, self._max_chars - self.num_chars)]
                self.num_documents += 1
                self.num_cut_documents += len(taken) < len(document)
                self.num_chars += len(taken)
                if len(self.head) < _HEAD_CHARS:
                    self.head += taken[: _HEAD_CHARS - len(self.head)] + "\n"
                yield taken
                progress.show(f"{self} (piece {piece_idx + 1} of {len(self._pieces)})")
                if self.num_chars >= self._max_chars:
                    progress.end(f"{self}, which is max_chars; learning the merges ...")
                    return
        progress.end(f"{self}; learning the merges ...")

    def __str__(self) -> str:
        cut = f" ({self.num_cut_documents:,} of them cut)" if self.num_cut_documents else ""
        return f"tokenizer: read {_count(self.num_documents, 'document')}{cut}, {_count(self.num_chars, 'character')}"


class _Progress:
    """A line that is drawn over on a terminal, and a line now and then in a log."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown_at_s = time.monotonic()

    def show(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_at_s >= (_REDRAW_EVERY_S if self._is_terminal else _LINE_EVERY_S):
            self._shown_at_s = now_s
            self._draw(line, end="" if self._is_terminal else "\n")

    def end(self, line: str) -> None:
        self._draw(line, end="\n")

    def _draw(self, line: str, end: str) -> None:
        print(f"\r\x1b[K{line}" if self._is_terminal else line, end=end, file=sys.stderr, flush=True)


def _may_change(config: TokenizerConfig) -> list[str]:
    """Nothing beside a finished tokenizer, everything where an earlier launch failed before it had one."""
    return (
        [] if (Path(config.out).expanduser() / "tokenizer.json").exists() else [field.name for field in fields(config)]
    )


def _resolve(config: TokenizerConfig) -> list[TextPiece]:
    return [] if config.kind == "byte" else resolve_sources(config.sources, text_column=config.text_column)


def _describe(config: TokenizerConfig, pieces: Sequence[TextPiece]) -> dict[str, object]:
    if config.kind == "byte":
        return {"vocabulary": f"{Tokenizer.byte_level().vocab_size} tokens: bytes and special tokens, no text is read"}
    files = {piece.path for piece in pieces if piece.path}
    num_hub_shards = sum(piece.hub is not None for piece in pieces)
    hub = f" and {_count(num_hub_shards, 'shard')} of the hub" if num_hub_shards else ""
    return {
        "vocabulary": f"{config.vocab_size:,} tokens",
        "text": f"{_count(len(files), 'file')}{hub}, {_count(len(pieces), 'piece')}",
        "on disk": f"{sum(piece.num_bytes for piece in pieces) / 1e6:,.1f} MB",
        "read at most": f"{config.max_chars:,} characters, {config.max_chars_per_document:,} of each document",
    }


def _report(tokenizer: Tokenizer, text: TrainingText, seconds: float, comparison: Comparison) -> dict[str, object]:
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "seconds": round(seconds, 2),
        "num_documents": text.num_documents,
        "num_cut_documents": text.num_cut_documents,
        "num_chars": text.num_chars,
        "skipped": asdict(text.skips),
        "comparison": comparison.as_dict(),
    }


def _describe_skips(skips: SkipCounts) -> str:
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in asdict(skips).items() if count)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
