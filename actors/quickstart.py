"""The `quickstart` stage: the whole life of a small model on built-in data, in one command.

It runs the stages that stand on their own, one after the other in one Ray, and shows a line of each; the same command
again goes on where an earlier one ended.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from actors import cluster, evaluate, fit, rl, tokenize
from rayllm.config.chat_schema import ChatEvalConfig
from rayllm.config.quickstart_schema import CorpusConfig, QuickstartConfig
from rayllm.runs import report
from rayllm.runs.atomic import write_atomic, write_json
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.progress import only_progress, render_duration
from rayllm.text import train
from tasks.word_problems import story

LOG = "quickstart.log"
"""In `out`: everything that the stages say."""


def place(config: QuickstartConfig) -> QuickstartConfig:
    """The recipe with every stage reading what the one before it wrote, all below `out`, and its seeds."""
    root, seed = Path(config.out), config.seed
    corpus, tokenizer, shards, base, sft, rl_run = (
        str(root / name) for name in ("corpus/stories.jsonl", "tokenizer", "shards", "base", "sft", "rl")
    )
    return replace(
        config,
        tokenizer=replace(config.tokenizer, out=tokenizer, sources=(corpus,)),
        tokenize=replace(config.tokenize, out=shards, tokenizer=tokenizer, sources=(corpus,)),
        corpus=replace(config.corpus, seed=config.corpus.seed + seed),
        pretrain=replace(
            config.pretrain,
            out=base,
            seed=config.pretrain.seed + seed,
            data=replace(
                config.pretrain.data, shards=shards, tokenizer=tokenizer, seed=config.pretrain.data.seed + seed
            ),
        ),
        sft=replace(
            config.sft,
            out=sft,
            checkpoint=base,
            seed=config.sft.seed + seed,
            tasks=tuple(replace(task, seed=task.seed + seed) for task in config.sft.tasks),
        ),
        rl=replace(
            config.rl,
            out=rl_run,
            checkpoint=sft,
            seed=config.rl.seed + seed,
            task=replace(config.rl.task, seed=config.rl.task.seed + seed),
        ),
    )


def run(config: QuickstartConfig) -> None:
    """Run every stage; ends with a table of pass@1 before and after RL, and with where to look next."""
    config = place(config)
    root = Path(config.out)
    root.mkdir(parents=True, exist_ok=True)
    before, after = (replace(config.chat_eval, checkpoint=c) for c in (config.sft.out, config.rl.out))
    with (root / LOG).open("a", encoding="utf-8", errors="replace", buffering=1) as log, cluster.connect():
        clock = StageClock(root / "summary.json", log)
        clock.time("corpus", lambda: write_corpus(config.corpus, root / "corpus" / "stories.jsonl"))
        clock.time("tokenizer", lambda: train.run(config.tokenizer))
        clock.time("tokenize", lambda: tokenize.run(config.tokenize))
        clock.time("pretrain", lambda: fit.run(config.pretrain))
        clock.time("sft", lambda: fit.run_sft(config.sft))
        clock.time("chat-eval sft", lambda: evaluate.run(before), lambda: render_scores(read_scores(before)))
        clock.time("rl", lambda: rl.run(config.rl))
        clock.time("chat-eval rl", lambda: evaluate.run(after), lambda: render_scores(read_scores(after)))
    scores = {"sft": read_scores(before), "rl": read_scores(after)}
    clock.write(pass_at_1={name: pass_at_1(score) for name, score in scores.items()})
    page = report.write_report(root).with_suffix(".html")
    print(render_end(scores, clock.seconds, config, page))


class StageClock:
    """Runs stages, and shows of each its progress and then one line. What else they say goes to `log`. How long they
    took goes to the summary; a stage that found its work done keeps its earlier time there."""

    def __init__(self, summary: Path, log: TextIO) -> None:
        self._summary, self._log = summary, log
        self.seconds: dict[str, float] = {}
        if summary.exists():
            known = json.loads(summary.read_text(encoding="utf-8")).get("stages", {})
            self.seconds = {name: stage["seconds"] for name, stage in known.items()}

    def time(self, name: str, stage: Callable[[], object], tell: Callable[[], str] | None = None) -> None:
        """Run a stage; its line is what `tell` gives, or else the last that it printed."""
        screen, said, start_s = sys.stderr, _Copied(self._log), time.perf_counter()
        print(f"== {name}", file=self._log)
        if screen.isatty():
            print(f"{name} ...", end="", file=screen, flush=True)  # a bar, and the stage's line, will stand over it
        try:
            with redirect_stdout(said), redirect_stderr(self._log), only_progress(screen, name, self._log):
                stage()
        finally:
            if screen.isatty():
                print("\r\x1b[K", end="", file=screen, flush=True)
        taken_s = time.perf_counter() - start_s
        line = tell() if tell is not None else said.last_line.removeprefix(f"{name}: ")
        print(f"{name:<14}{render_duration(taken_s):>6}  {line}", flush=True)
        self.seconds[name] = round(max(taken_s, self.seconds.get(name, 0.0)), 2)
        self.write()

    def write(self, **results: object) -> None:
        """Write what is known by now."""
        write_json(self._summary, {"stages": {name: {"seconds": s} for name, s in self.seconds.items()}, **results})


class _Copied(io.TextIOBase):
    """Passes text on to a log, and remembers its last line."""

    def __init__(self, log: TextIO) -> None:
        self._log, self.last_line = log, ""

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            self.last_line = line
        return self._log.write(text)


def write_corpus(config: CorpusConfig, path: Path) -> None:
    """The built-in text as JSON lines, where it is not there yet."""
    lines = (json.dumps({"text": story(i, config.seed)}) + "\n" for i in range(config.num_documents))
    text = "".join(lines)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    print(f"corpus: {config.num_documents:,} documents, {len(text):,} bytes: {path}")


def read_scores(config: ChatEvalConfig) -> list[dict[str, Any]]:
    """What a chat evaluation wrote, task by task."""
    out = open_checkpoint(config.checkpoint).report_path("chat-eval")
    tasks: list[dict[str, Any]] = json.loads((out / "report.json").read_text(encoding="utf-8"))["tasks"]
    return tasks


def render_scores(scores: list[dict[str, Any]]) -> str:
    """`pass@1 46.3% +- 2.0% word_problems/test, ...`: of every task."""
    return "pass@1 " + ", ".join(f"{_share(score['pass@1'])} {score['task']}" for score in scores)


def _share(estimate: Mapping[str, float | None]) -> str:
    """`46.3% +- 2.0%`; `report.json` has null for what cannot be told, such as the error of a single problem."""
    value, stderr = (math.nan if (number := estimate[key]) is None else number for key in ("value", "stderr"))
    return f"{value:.1%} +- {stderr:.1%}"


def pass_at_1(scores: list[dict[str, Any]]) -> dict[str, float]:
    """Of the first task: the problems held out."""
    return {key: scores[0]["pass@1"][key] for key in ("value", "stderr", "num_problems")}


def render_end(
    scores: dict[str, list[dict[str, Any]]], seconds: dict[str, float], config: QuickstartConfig, page: Path
) -> str:
    """The table, and where to go from here."""
    lines = [f"\n{'pass@1 of':<28}{'after SFT':>18}{'after RL':>18}{'greedy after RL':>18}"]
    for sft, taught in zip(scores["sft"], scores["rl"], strict=True):
        cells = [_share(estimate) for estimate in (sft["pass@1"], taught["pass@1"], taught["greedy"])]
        lines.append(f"{sft['task']:<28}" + "".join(f"{cell:>18}" for cell in cells))
    total_s = sum(seconds.values())
    lines += [
        f"\n{len(seconds)} stages in {int(total_s // 60)}m{int(total_s % 60):02d}s. Where to look next:",
        f"  {page}",
        f"  {Path(config.out) / LOG}",
        f'  rayllm chat --checkpoint={config.rl.out} -p "Tom has 5 apples. He finds 3 more apples. '
        'How many apples does he have now?"',
        f"  rayllm serve --checkpoint={config.rl.out}",
    ]
    return "\n".join(lines)
