"""The `report` stage: one page over all stages of a model, as Markdown and as HTML."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayllm.config.chat_schema import ReportConfig
from rayllm.runs.atomic import write_atomic
from rayllm.runs.curves import plot_runs
from rayllm.runs.history import History, RunHistory, mapping, number, read_history
from rayllm.runs.page import Block, Bullets, Code, Heading, Paragraph, Samples, Table, render_html, render_markdown
from rayllm.runs.plots import Plot, render_svg
from rayllm.runs.progress import render_duration
from rayllm.runs.sharpening import describe_sharpening

_STAGES = ("tokenizer", "tokenize", "pretrain", "import-nanochat", "sft", "rl", "base-eval", "chat-eval")
# The number that a stage is about: metric, its name, and what to multiply it with (pass@1 reads as a percentage).
_KEY_METRICS = {
    "tokenizer": ("bytes_per_token/training text", "bytes per token", 1.0),
    "pretrain": ("val/bpb", "bits per byte", 1.0),
    "sft": ("val/loss", "validation loss", 1.0),
    "rl": ("val/pass@1", "pass@1", 100.0),
}
_PLOTS_FOLDER = "report_plots"
_MAX_SAMPLES = 8


def run(config: ReportConfig) -> None:
    """Write report.md and report.html about `config.run` and say where they are."""
    if not config.run:
        raise ValueError("report: about which run? `rayllm report runs/quickstart`")
    page = write_report(config.run, config.out)
    print(f"report: {page} and {page.with_suffix('.html')}")


def write_report(run_path: str | Path, out: str | Path | None = None) -> Path:
    """Write report.md, its plots and report.html to `out` (default: `run_path`) and return the path of report.md.

    Raises FileNotFoundError or ValueError where `run_path` holds no run, OSError where `out` cannot be written.
    """
    run_path = Path(run_path).expanduser()
    history = read_history(run_path, _STAGES)
    out = Path(out).expanduser() if out else run_path
    try:
        (out / _PLOTS_FOLDER).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{error.filename} is a file, not a directory; pass --out= another path") from error
    title = f"How {run_path.resolve().name} was made"
    blocks = build_blocks(history)
    for plot in (block for block in blocks if isinstance(block, Plot)):
        write_atomic(out / _PLOTS_FOLDER / f"{plot.name}.svg", render_svg(plot))
    write_atomic(out / "report.html", render_html(title, blocks))
    write_atomic(out / "report.md", render_markdown(title, blocks, _PLOTS_FOLDER))
    return out / "report.md"


def build_blocks(history: History) -> list[Block]:
    """The page, section by section; a section that has nothing to tell is left out."""
    sections: tuple[tuple[str, Iterator[Block]], ...] = (
        ("Stages", _stages(history)),
        ("What reinforcement learning added", _gain(history)),
        ("Curves", plot_runs(history.runs)),
        ("Evaluations", _evaluation_tables(history.evaluations)),
        ("Samples", _samples(history)),
        ("Time", _times(history)),
        ("Environment", _environment(history)),
        ("What could not be read", iter([Bullets(history.notes)] if history.notes else [])),
    )
    blocks: list[Block] = []
    for heading, section in sections:
        content = list(section)
        blocks += [Heading(heading), *content] if content else []
    return blocks


def _stages(history: History) -> Iterator[Block]:
    rows = []
    for stage_run in history.runs:
        seconds = _seconds(history, stage_run)
        rows.append(
            (
                stage_run.stage,
                Code(stage_run.name),
                f"{stage_run.num_steps:,}" if stage_run.num_steps else "",
                _tokens(stage_run),
                _key_metric(stage_run),
                "" if seconds is None else render_duration(seconds),
                Code(stage_run.newest_checkpoint or ""),
            )
        )
    if rows:
        columns = ("stage", "directory", "steps", "tokens", "result", "time", "checkpoint")
        yield Table("Stages in the order of the model's life", columns, rows, numeric=("steps", "tokens", "time"))
        yield Paragraph("± is one standard error. Tokens of an RL run are those that it learned from.")


def _tokens(stage_run: RunHistory) -> str:
    per_step = number(stage_run.plan.get("tokens_per_step"))
    if stage_run.stage == "tokenize":
        num_tokens = sum(number(stage_run.results.get(f"{split}_tokens")) or 0 for split in ("train", "val"))
    elif per_step is not None:
        num_tokens = per_step * stage_run.num_steps
    else:
        num_tokens = sum(stage_run.series("train/num_tokens").values)
    return f"{num_tokens:,.0f}" if num_tokens else ""


def _key_metric(stage_run: RunHistory) -> str:
    if stage_run.stage == "tokenize" and (ratio := number(stage_run.results.get("bytes_per_token"))) is not None:
        return f"bytes per token {ratio:.4f}"
    if stage_run.stage not in _KEY_METRICS:
        return ""
    key, name, factor = _KEY_METRICS[stage_run.stage]
    series = stage_run.series(key)
    if not series:
        return ""
    last = _with_error(series.values[-1], series.stderrs and series.stderrs[-1], factor)
    first = _with_error(series.values[0], None, factor)
    return f"{name} {last}" + (f" (from {first})" if len(series.steps) > 1 else "")


def _with_error(value: object, stderr: object, factor: float = 1.0) -> str:
    """`1.7310 ± 0.0080`, or with a factor of 100 `78.1 ± 2.1 %`; empty where there is no value."""
    middle, error = number(value), number(stderr)
    if middle is None:
        return ""
    digits, unit = (1, " %") if factor == 100 else (4, "")
    shown = f"{middle * factor:.{digits}f}"
    return shown + ("" if error is None else f" ± {error * factor:.{digits}f}") + unit


def _gain(history: History) -> Iterator[Block]:
    yield from _measured_gain(history.summary)
    for stage_run in history.runs:
        if stage_run.stage == "rl" and (told := describe_sharpening(stage_run.records)) is not None:
            yield Paragraph(f"{stage_run.name}, on its validation problems: {told}.")


def _measured_gain(summary: Mapping[str, Any]) -> Iterator[Block]:
    measured = {stage: mapping(mapping(summary.get("pass_at_1")).get(stage)) for stage in ("sft", "rl")}
    rows = [
        (f"after {stage}", _with_error(found.get("value"), found.get("stderr"), 100), f"{problems:,.0f}")
        for stage, found in measured.items()
        if found and (problems := number(found.get("num_problems")) or 0)
    ]
    if not rows:
        return
    yield Table("pass@1 on the same held-out problems", ("model", "pass@1", "problems"), rows, ("pass@1", "problems"))
    before, after = (number(found.get("value")) for found in measured.values())
    errors = [number(found.get("stderr")) for found in measured.values()]
    if before is not None and after is not None and None not in errors:
        error = math.hypot(*(error or 0.0 for error in errors))
        gain = f"{100 * (after - before):+.1f} ± {100 * error:.1f} points"
        yield Paragraph(f"The difference is {gain}, its error taken as if the two measurements were independent.")


def _evaluation_tables(evaluations: Sequence[RunHistory]) -> Iterator[Table]:
    base_rows: list[Sequence[str]] = []
    chat_rows: list[Sequence[str]] = []
    for evaluation in evaluations:
        where, results = Code(evaluation.name), evaluation.results
        step = "" if (at := number(results.get("step"))) is None else f"{at:,.0f}"
        if bpb := mapping(results.get("bits_per_byte")):
            counts = [_count(bpb, key) for key in ("num_tokens", "num_bytes")]
            base_rows.append((where, step, _with_error(bpb.get("value"), bpb.get("stderr")), *counts))
        for task in map(mapping, _sequence(results.get("tasks"))):
            shares = [mapping(task.get(key)) for key in ("pass@1", "greedy")]
            solved = [_with_error(share.get("value"), share.get("stderr"), 100) for share in shares]
            counts = [_count(task, key) for key in ("num_problems", "num_samples", "num_failed")]
            chat_rows.append((where, step, str(task.get("task", "")), *solved, *counts))
    if base_rows:
        names = ("evaluation", "step", "bits per byte", "tokens", "bytes")
        yield Table("Base models: bits per byte of held-out text", names, base_rows, names[1:])
    if chat_rows:
        columns = ("evaluation", "step", "task", "pass@1", "greedy", "problems", "samples each", "failed")
        caption = "Chat models: share of problems solved, by samples at temperature 1 and by the likeliest answer"
        yield Table(caption, columns, chat_rows, (columns[1], *columns[3:]))


def _count(found: Mapping[str, Any], key: str) -> str:
    return "" if (count := number(found.get(key))) is None else f"{count:,.0f}"


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _samples(history: History) -> Iterator[Samples]:
    for stage_run in history.runs:
        if texts := stage_run.texts[:_MAX_SAMPLES]:
            split = [text.partition("|") for _, text in texts]  # samples are recorded as PROMPT|CONTINUATION
            pairs = [(prompt, text) if bar else ("", prompt) for prompt, bar, text in split]
            yield Samples(f"{stage_run.name}, step {texts[0][0]:,}", pairs)
    for evaluation in history.evaluations:
        found = evaluation.results.get("samples")
        if isinstance(found, Mapping):  # base-eval: prompt -> {greedy, sampled}
            for kind in ("greedy", "sampled"):
                pairs = [(prompt, str(texts[kind])) for prompt, texts in found.items() if kind in mapping(texts)]
                if pairs:
                    yield Samples(f"{evaluation.name}, {kind}", pairs[:_MAX_SAMPLES])
        for sample in [mapping(sample) for sample in _sequence(found)][:_MAX_SAMPLES]:  # chat-eval: a list
            reward = number(sample.get("reward"))
            verdict = "failed" if reward is None else f"reward {reward:g}"
            label = f"{evaluation.name}, {sample.get('task', '')}, {verdict}"
            yield Samples(label, [(f"{sample.get('prompt', '')}\n\n", str(sample.get("answer", "")))])


def _seconds(history: History, stage_run: RunHistory) -> float | None:
    """By the clock of the whole life where it has one for this directory's stage, else by the run's own records."""
    by_summary = number(mapping(mapping(history.summary.get("stages")).get(stage_run.name)).get("seconds"))
    return stage_run.seconds if by_summary is None else by_summary


def _times(history: History) -> Iterator[Block]:
    by_summary = {
        str(stage): number(mapping(found).get("seconds"))
        for stage, found in mapping(history.summary.get("stages")).items()
    }
    by_run = {run.name: run.seconds for run in (*history.runs, *history.evaluations)}
    times = [(name, seconds) for name, seconds in (by_summary or by_run).items() if seconds is not None]
    if times:
        total = render_duration(sum(seconds for _, seconds in times))
        yield Plot("time", f"Seconds of each stage, {total} together", "seconds", bars=tuple(times))


def _environment(history: History) -> Iterator[Block]:
    rows: list[Sequence[str]] = []
    machines: dict[tuple[str, str], str] = {}
    for stage_run in (*history.runs, *history.evaluations):
        for launch in stage_run.launches:
            git, versions = mapping(launch.get("git")), mapping(launch.get("versions"))
            commit = str(git.get("commit") or "unknown")[:12] + (" + changes" if git.get("dirty") else "")
            command = [str(argument) for argument in _sequence(launch.get("command"))]
            command[:1] = [Path(argument).name for argument in command[:1]]
            rows.append((stage_run.name, str(launch.get("time", "")), Code(shlex.join(command)), Code(commit)))
            machine = f"{launch.get('num_cpus', '?')} CPU cores, {launch.get('platform', 'unknown platform')}"
            packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
            machines.setdefault((machine, packages), stage_run.name)
    if rows:
        yield Table("Each launch", ("directory", "time", "command", "commit"), rows)
        seen = [(machine, packages, name) for (machine, packages), name in machines.items()]
        yield Table("Machines and versions", ("machine", "versions", "first seen in"), seen)
