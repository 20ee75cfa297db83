"""The `tokenize` stage: text to token shards with Ray Data, one task for each piece of text.

    sources -> pieces -> (read, encode, write shards) in parallel -> manifest.json

The shards depend on the text, the recipe and the tokenizer alone, not on which task ran where or when.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.config.schema import TokenizeConfig
from rayllm.data.shards import MANIFEST, Manifest, ShardEntry, TokenShards, token_dtype
from rayllm.data.sources import SkipCounts
from rayllm.data.tokenizing import TokenizedPiece, TokenizeJob, plan_jobs, tokenize_piece
from rayllm.runs.atomic import write_atomic
from rayllm.runs.run_dir import open_run
from rayllm.text.tokenizer import read_tokenizer_json

if TYPE_CHECKING:
    from rayllm.text.tokenizer import Tokenizer

REPORT = "report.json"
PROGRESS_EVERY_S = 5.0


def describe_plan(config: TokenizeConfig) -> dict[str, object]:
    """What the stage would do, by label, for `--dry-run`. Finds the text; starts no Ray."""
    return _describe(config, plan_jobs(config))


def run(config: TokenizeConfig) -> None:
    """Tokenize `config.sources` into `config.out`; does nothing where that is done already.

    Raises ValueError, FileNotFoundError or OSError with the cure; all but unreadable text deep in a file and a
    full disk are found before Ray starts.
    """
    from rayllm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.tokenizer)
    jobs = plan_jobs(config)
    with open_run(config.out, stage="tokenize", config=config, plan=_describe(config, jobs)) as run_dir:
        if (run_dir.path / MANIFEST).exists():
            _check_is_ours(TokenShards.load(run_dir.path), config, tokenizer, jobs)
            print(f"tokenize: {config.out} holds the shards of this recipe already; nothing to do")
            return
        for split in ("train", "val"):  # what a run that was cut off left behind
            shutil.rmtree(run_dir.path / split, ignore_errors=True)
        tokenized, seconds = _tokenize_all(jobs, config, tokenizer, run_dir.path)
        skips = SkipCounts()
        for piece in tokenized:
            skips.add(SkipCounts(**piece.skipped))
        manifest = Manifest(
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            validation=asdict(config.validation),
            pieces=_list_pieces(jobs),
            shards=tuple(entry for piece in tokenized for entry in piece.shards),
            skipped=asdict(skips),
        )
        report = _build_report(manifest, sum(piece.num_text_bytes for piece in tokenized), seconds)
        if not report["train_documents"]:
            raise ValueError(f"no documents to train on: {report['val_documents']} held out, skipped {_show(skips)}")
        write_atomic(run_dir.path / REPORT, json.dumps(report, indent=2) + "\n")
        manifest.save(run_dir.path)
        _print_report(config, report, skips)


def _describe(config: TokenizeConfig, jobs: Sequence[TokenizeJob]) -> dict[str, object]:
    tokenizer: object = f"none at {config.tokenizer} yet"
    if Path(config.tokenizer).exists():
        vocab_size = int(read_tokenizer_json(config.tokenizer)["vocab_size"])
        tokenizer = f"{config.tokenizer}, {vocab_size:,} tokens, stored as {token_dtype(vocab_size)}"
    split = config.validation
    held_out = f"{split.fraction:.2%} of documents, by hash" if split.kind == "hash" else ", ".join(split.sources)
    return {
        "tokenizer": tokenizer,
        "files": len({job.piece.path or job.piece.hub and job.piece.hub.name for job in jobs}),
        "bytes on disk": sum(job.piece.num_bytes for job in jobs),
        "pieces (tasks)": len(jobs),
        "held out": held_out,
    }


def _list_pieces(jobs: Sequence[TokenizeJob]) -> tuple[dict[str, Any], ...]:
    return tuple({"name": job.piece.name, "num_bytes": job.piece.num_bytes} for job in jobs)


def _check_is_ours(
    shards: TokenShards, config: TokenizeConfig, tokenizer: Tokenizer, jobs: Sequence[TokenizeJob]
) -> None:
    """The recipe is the same (open_run saw to that); refuse shards of another tokenizer or of text that has changed."""
    cure = "write to another --out, or delete this one"
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{config.out} was made with another tokenizer than {config.tokenizer} holds now; {cure}")
    if shards.manifest.pieces != _list_pieces(jobs):
        raise ValueError(f"the text in sources has changed since {config.out} was made; {cure}")


def _tokenize_all(
    jobs: Sequence[TokenizeJob], config: TokenizeConfig, tokenizer: Tokenizer, directory: Path
) -> tuple[list[TokenizedPiece], float]:
    """Run the jobs on the cluster; returns their outcomes in the order of the jobs, and the seconds it took."""
    from actors import cluster

    work = partial(
        _run_job,
        jobs=jobs,
        tokenizer_path=str(Path(config.tokenizer).absolute()),
        fingerprint=tokenizer.fingerprint,
        directory=str(directory),
    )
    with cluster.connect():
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # we print our own progress
        rows = ray.data.from_items([{"job_idx": job.job_idx} for job in jobs], override_num_blocks=len(jobs))
        rows.context.enable_progress_bars = False
        tokenized: list[TokenizedPiece] = []
        progress = _Progress(len(jobs))
        for row in rows.map(work).iter_rows():
            outcome = json.loads(row["outcome"])
            if "error" in outcome:
                raise (OSError if outcome["is_os_error"] else ValueError)(outcome["error"])
            piece = TokenizedPiece(**outcome | {"shards": tuple(ShardEntry(**entry) for entry in outcome["shards"])})
            tokenized.append(piece)
            progress.add(piece)
    return sorted(tokenized, key=lambda piece: piece.job_idx), progress.seconds


def _run_job(
    row: dict[str, Any], *, jobs: Sequence[TokenizeJob], tokenizer_path: str, fingerprint: str, directory: str
) -> dict[str, str]:
    """Body of a task. Errors that people can cure travel as values: they arrive as one line, without Ray's frames."""
    job = jobs[row["job_idx"]]
    try:
        outcome = asdict(tokenize_piece(job, _load_tokenizer(tokenizer_path, fingerprint), directory))
    except (ValueError, OSError) as error:
        outcome = {"error": str(error), "is_os_error": isinstance(error, OSError)}
    return {"outcome": json.dumps(outcome)}


@lru_cache(maxsize=1)
def _load_tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """The tokenizer, loaded once in each worker process."""
    from rayllm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{path} holds another tokenizer here than where the command was given; share one directory")
    return tokenizer


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, num_jobs: int):
        self._num_jobs, self._num_done, self._num_tokens = num_jobs, 0, 0
        self._start, self._last_line_s = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, piece: TokenizedPiece) -> None:
        self._num_done += 1
        self._num_tokens += sum(entry.num_tokens for entry in piece.shards)
        if self.seconds - self._last_line_s >= PROGRESS_EVERY_S:
            self._last_line_s = self.seconds
            rate = self._num_tokens / self.seconds
            done = f"{self._num_done}/{self._num_jobs} pieces, {self._num_tokens:,} tokens, {rate:,.0f} tokens/s"
            print(f"tokenize: {done}", file=sys.stderr)


def _build_report(manifest: Manifest, num_text_bytes: int, seconds: float) -> dict[str, Any]:
    """The stage in numbers. Tokens count every BOS; bytes per token leave it out, as it stands for no text."""

    def total(split: str, attribute: str) -> int:
        return sum(getattr(entry, attribute) for entry in manifest.shards if entry.split == split)

    counts = {f"{s}_{n}": total(s, f"num_{n}") for s in ("train", "val") for n in ("documents", "tokens")}
    num_tokens = counts["train_tokens"] + counts["val_tokens"]
    num_text_tokens = num_tokens - counts["train_documents"] - counts["val_documents"]
    return {
        **counts,
        "bytes_per_token": num_text_bytes / max(num_text_tokens, 1),
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "shards": len(manifest.shards),
        "skipped": manifest.skipped,
    }


def _print_report(config: TokenizeConfig, report: dict[str, Any], skips: SkipCounts) -> None:
    for split in ("train", "val"):
        documents, tokens = report[f"{split}_documents"], report[f"{split}_tokens"]
        print(f"tokenize: {split:5} {documents:,} documents, {tokens:,} tokens")
    print(f"tokenize: {report['bytes_per_token']:.3f} bytes per token, {report['tokens_per_s']:,.0f} tokens/s")
    if skips.total:
        print(f"tokenize: skipped {_show(skips)}")
    if not report["val_documents"]:
        print("tokenize: nothing is held out for validation; raise validation.fraction to change that", file=sys.stderr)
    print(f"tokenize: {report['shards']} shards in {config.out}")


def _show(skips: SkipCounts) -> str:
    counts = {reason: count for reason, count in asdict(skips).items() if count}
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
