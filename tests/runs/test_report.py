"""The report page: what it tells of a whole life, of parts of one, and of damaged files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.config.chat_schema import ReportConfig
from rayllm.runs.history import read_history
from rayllm.runs.page import Code, Paragraph, Samples, Table, render_html, render_markdown
from rayllm.runs.plots import Curve, Plot, render_svg
from rayllm.runs.report import run, write_report

START_S = 1_800_000_000.0
NASTY = "<script>alert('&')</script> | `a`` b` \x1b[31m \ud800 *_[x](y)_*"


@pytest.fixture(scope="module", autouse=True)
def _own_matplotlib_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))


def write_run(
    folder: Path,
    stage: str,
    records: list[Mapping[str, Any]],
    *,
    plan: Mapping[str, Any] | None = None,
    starts_s=(0.0,),
) -> Path:
    """A run directory in the files of rayllm.runs.run_dir and rayllm.runs.tracking; times count from START_S."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"run_id": "0" * 12, "stage": stage, "created": "2027-01-15T08:00:00+00:00", "config_fingerprint": "f"}
    (folder / "run.json").write_text(json.dumps(identity))
    (folder / "plan.json").write_text(json.dumps(plan or {"num_steps": 9}))
    launches = [
        {
            "time": f"2027-01-15T08:{int(start_s) // 60:02d}:{int(start_s) % 60:02d}+00:00",
            "command": ["/venv/bin/rayllm", stage, "quickstart", "--out=a b"],
            "git": {"commit": "c0ffee" * 6, "dirty": False},
            "versions": {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0"},
            "platform": "Linux",
            "num_cpus": 2,
        }
        for start_s in starts_s
    ]
    (folder / "provenance.jsonl").write_text("".join(json.dumps(launch) + "\n" for launch in launches))
    lines = [json.dumps({**record, "time_s": START_S + record["time_s"]}) for record in records]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def write_checkpoint(run_path: Path, step: int, *, whole: bool = True) -> None:
    folder = run_path / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / ("checkpoint.json" if whole else "model.safetensors")).write_text("{}")


def rl_records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(61):
        climb = 1 - math.exp(-step / 25)
        if step % 20 == 0:
            passes = {f"val/pass@{k}": 0.55 + 0.03 * k + 0.22 * climb for k in (1, 2, 4)}
            stderrs = {f"{key}_stderr": 0.02 for key in passes}
            greedy = {"val/greedy": 0.6 + 0.2 * climb}
            records.append({"step": step, "time_s": 60 + 2.0 * step, **passes, **stderrs, **greedy})
        if step:
            reward = 0.55 + 0.22 * climb + 0.12 * math.sin(7 * step)
            metrics = {"train/reward": reward, "train/loss": -0.01, "train/num_tokens": 9000, "train/num_failed": 0}
            records.append({"step": step, "time_s": 61 + 2.0 * step, **metrics})
    records.append({"step": 60, "time_s": 190.0, "name": "sample", "text": f"How many apples?|{NASTY} 18"})
    return records


@pytest.fixture
def life(tmp_path: Path) -> Path:
    """A folder as the whole life leaves it, with summary.json and evaluations of two stages."""
    root = tmp_path / "quickstart"
    pretrain = [{"step": 0, "time_s": 5.0, "val/bpb": 3.2, "val/bpb_stderr": 0.01}]
    pretrain += [{"step": s, "time_s": 5.0 + s, "train/loss": 6 - s / 20} for s in range(1, 41)]
    pretrain += [{"step": 40, "time_s": 46.0, "val/bpb": 1.25, "val/bpb_stderr": 0.004}]
    sft = [{"step": s, "time_s": 3.0 + s, "train/loss": 2 - s / 20} for s in range(1, 12)]
    sft += [{"step": 11, "time_s": 15.0, "val/loss": 0.9, "val/loss_stderr": 0.03}]
    write_run(root / "tokenizer", "tokenizer", [{"step": 0, "time_s": 4, "bytes_per_token/training text": 3.5}])
    write_run(root / "shards", "tokenize", [])
    counts = {"train_tokens": 1_000_000, "val_tokens": 10_000, "bytes_per_token": 3.25, "seconds": 7.5}
    (root / "shards" / "report.json").write_text(json.dumps(counts))
    write_run(root / "base", "pretrain", pretrain, plan={"tokens_per_step": 4096})
    write_run(root / "sft", "sft", sft, plan={"tokens_per_step": 2048})
    write_run(root / "rl", "rl", rl_records(), starts_s=(0.0, 100.0))
    for step, whole in ((9, True), (60, True), (70, False)):
        write_checkpoint(root / "rl", step, whole=whole)
    for name, share in (("sft", 0.56), ("rl", 0.78)):
        evaluation = write_run(root / name / "chat-eval" / "step_000060", "chat-eval", [])
        task = {
            "task": "word_problems/test",
            "pass@1": {"value": share, "stderr": 0.021},
            "greedy": {"value": share + 0.02, "stderr": 0.03},
            "num_problems": 256,
            "num_samples": 4,
            "num_failed": 3,
            "seconds": 20.0,
        }
        samples = [
            {"task": "word_problems/test", "prompt": "2 + 2?", "answer": "#### 4", "reward": 1.0},
            {"task": "word_problems/test", "prompt": "3 + 3?", "answer": NASTY, "reward": None},
        ]
        report = {"checkpoint": "x", "step": 60, "tasks": [task], "samples": samples}
        (evaluation / "report.json").write_text(json.dumps(report))
    measured = {name: {"value": v, "stderr": 0.021, "num_problems": 256} for name, v in (("sft", 0.56), ("rl", 0.78))}
    stages = {"corpus": {"seconds": 2.0}, "rl": {"seconds": 195.5}}
    (root / "summary.json").write_text(json.dumps({"stages": stages, "pass_at_1": measured}))
    return root


class _Tags(HTMLParser):
    """Every opened tag with its attributes; fails where tags do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def close(self) -> None:
        super().close()
        assert not self._open


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(page)
    parser.close()
    return parser.found


def row_of(markdown: str, stage: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {stage} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_tells_every_stage_in_order(life: Path) -> None:
    page = write_report(life)
    markdown = page.read_text(encoding="utf-8")
    assert page == life / "report.md"
    assert row_of(markdown, "tokenizer")[4:] == ["bytes per token 3.5000", "4s", ""]
    assert row_of(markdown, "tokenize")[3:6] == ["1,010,000", "bytes per token 3.2500", "8s"]
    assert row_of(markdown, "pretrain")[2:6] == [
        "40", f"{40 * 4096:,}", "bits per byte 1.2500 ± 0.0040 (from 3.2000)", "46s",
    ]  # fmt: skip
    assert row_of(markdown, "sft")[2:6] == ["11", f"{11 * 2048:,}", "validation loss 0.9000 ± 0.0300", "15s"]
    # Its newest whole checkpoint, and its time from summary.json.
    rl = row_of(markdown, "rl")
    assert rl[1:4] == ["`rl`", "60", "540,000"]
    assert rl[4].startswith("pass@1 78.0 ± 2.0 % (from 58.0 %)")
    assert rl[5:] == ["3m16s", "`step_000060`"]
    order = [markdown.index(f"| {stage} |") for stage in ("tokenizer", "tokenize", "pretrain", "sft", "rl")]
    assert order == sorted(order)
    for told in (
        "after sft | 56.0 ± 2.1 % | 256",
        r"The difference is +22.0 ± 3.0 points",
        r"`rl/chat-eval/step_000060` | 60 | word\_problems/test | 78.0 ± 2.1 % | 80.0 ± 3.0 % | 256 | 4 | 3 |",
        "`rayllm rl quickstart '--out=a b'` | `c0ffeec0ffee`",
        "torch 2.13.0",
    ):
        assert told in markdown, told


def test_plots_are_files_for_markdown_and_inside_the_html(life: Path, tmp_path: Path) -> None:
    page = write_report(life, tmp_path / "elsewhere")
    linked = re.findall(r"!\[[^\n]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    names = ["base-loss", "base-bpb", "sft-loss", "rl-reward", "rl-pass", "time"]
    assert linked == [f"report_plots/{name}.svg" for name in names]
    for link in linked:
        ElementTree.parse(page.parent / link)
    tags = tags_of((page.parent / "report.html").read_text(encoding="utf-8"))
    plots = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(plots) == len(names)
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
    assert "pass@4 from 0.67 to 0.87 at step 60" in (plots[4]["aria-label"] or "")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointers = {str(attributes["xlink:href"]).removeprefix("#") for tag, attributes in tags if tag == "use"}
    assert pointers and pointers <= set(ids)


def test_sharpening_is_named(life: Path) -> None:
    markdown = write_report(life).read_text(encoding="utf-8")
    assert "sharpening" not in markdown and "pass@2" not in markdown  # pass@4 rose, too; between 1 and 4 is no curve
    flat = [{**r, "val/pass@4": 0.7} if "val/pass@4" in r else r for r in rl_records()]
    write_run(life / "rl", "rl", flat)
    markdown = write_report(life).read_text(encoding="utf-8")
    assert "rl, on its validation problems: sharpening: pass@1 rose by 20.0 +- 2.8 points and pass@4 by 0.0" in markdown


def test_html_is_self_contained_and_harmless(life: Path) -> None:
    page = write_report(life).with_suffix(".html").read_text(encoding="utf-8")
    tags = tags_of(page)
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "a"}
    assert not [attributes for _, attributes in tags if "src" in attributes or "onload" in attributes]
    assert not re.findall(r"url\((?!#)", page)
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page
    assert "\x1b" not in page and r"\x1b[31m \ud800" in page
    assert ("html", {"lang": "en"}) in tags
    assert all(attributes.get("scope") for tag, attributes in tags if tag == "th")
    assert len([tag for tag, _ in tags if tag == "caption"]) == len([tag for tag, _ in tags if tag == "table"])


def test_text_cannot_break_out_of_markdown() -> None:
    table = Table("t", ("a", "b"), [(NASTY, Code(NASTY))])
    page = render_markdown("t", [table, Samples("s", [("", "```\n# out\n````\n")])], "plots")
    row = next(line for line in page.splitlines() if line.startswith("| \\<script"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "`````text\n```\n# out\n````\n\n`````" in page


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(codec=None, exclude_categories=()), max_size=30))
def test_any_text_renders_to_a_well_formed_page(text: str) -> None:
    blocks = [Paragraph(text), Table(text, (text, "b"), [(text, Code(text))]), Samples(text, [(text, text)])]
    tags_of(render_html(text, blocks))
    render_markdown(text, blocks, "plots").encode()


def test_a_resumed_run_counts_only_the_time_it_ran(tmp_path: Path) -> None:
    records = [{"step": s, "time_s": t, "train/reward": 0.5} for s, t in ((1, 10), (2, 20), (3, 610), (4, 630))]
    write_run(tmp_path / "rl", "rl", records, starts_s=(0.0, 600.0))
    [history] = read_history(tmp_path, ()).runs
    assert history.seconds == 20 + 30


@pytest.mark.parametrize("stage", ["tokenize", "pretrain", "sft", "rl", "chat-eval"])
def test_one_run_that_has_just_begun(tmp_path: Path, stage: str) -> None:
    folder = write_run(tmp_path / "new", stage, [])
    (folder / "metrics.jsonl").unlink()
    run(ReportConfig(run=str(folder)))
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "# How new was made" in markdown and "![" not in markdown


def test_one_run_of_a_life_by_itself(life: Path) -> None:
    markdown = write_report(life / "rl").read_text(encoding="utf-8")
    assert "rl-pass.svg" in markdown and "chat-eval/step" in markdown and "pretrain" not in markdown


def test_damage_is_counted_and_the_rest_told(life: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (life / "base" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 41, "train/loss": 1.0\n\xff\xfe\n[1, 2]\n{"step": 42, "train/loss": "NaN"}\n')
        file.write(b'{"step": 43, "time_s": "?", "train/loss": {"x": 1}, "val/bpb": null}\n')
    (life / "sft" / "plan.json").write_text('{"tokens_per_step": ')
    (life / "sft" / "chat-eval" / "step_000060" / "report.json").write_text('{"tasks": 7, "samples": {"a": 1}}')
    (life / "rl" / "provenance.jsonl").write_text(
        "torn\n" + json.dumps({"time": "never", "command": 3, "git": 0}) + "\n"
    )
    (life / "summary.json").write_text("[]")
    run(ReportConfig(run=str(life)))
    assert str(life / "report.md") in capsys.readouterr().out
    markdown = (life / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"{life / 'base' / 'metrics.jsonl'}: 3 damaged lines were left out" in markdown
    assert f"{life / 'rl' / 'provenance.jsonl'}: 1 damaged lines were left out" in markdown
    for file in (life / "sft" / "plan.json", life / "summary.json"):
        assert f"{file}: could not be read, and was left out" in markdown
    assert row_of(markdown, "pretrain")[4].startswith("bits per byte 1.2500")
    assert row_of(markdown, "sft")[2:4] == ["11", ""]


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no run at .*nowhere: give a run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="empty holds no run"):
        write_report(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"):
        write_report(tmp_path / "file")
    with pytest.raises(ValueError, match="about which run"):
        run(ReportConfig())
    assert not list((tmp_path / "empty").iterdir())


def test_out_that_cannot_be_is_a_clear_error(life: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a directory; pass --out="):
        write_report(life, tmp_path / "file")


def test_long_runs_stay_light(tmp_path: Path) -> None:
    records = [{"step": s, "time_s": s, "train/reward": 0.5 + math.sin(s) / 2} for s in range(1, 20_001)]
    write_report(write_run(tmp_path / "rl", "rl", records))
    assert (tmp_path / "rl" / "report.html").stat().st_size < 150_000


def test_the_same_runs_give_the_same_pages(life: Path) -> None:
    write_report(life)
    first = {file.name: file.read_bytes() for file in life.rglob("report*") if file.is_file()}
    write_report(life)
    assert {file.name: file.read_bytes() for file in life.rglob("report*") if file.is_file()} == first


def test_a_plot_takes_the_colours_of_its_page() -> None:
    plot = Plot("p", "<&>", "y", (Curve("c", [1, 2], [0.5, 1], [0.1, 0.1], "dots"),))
    assert "var(--ink)" in render_svg(plot, themed=True) and "var(--" not in render_svg(plot)
