"""What quickstart adds to its stages: where each reads and writes, its seeds, its clock, its last table."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from actors.quickstart import StageClock, place, render_end, render_scores, write_corpus
from rayllm.config.load import load_config
from rayllm.config.quickstart_schema import CorpusConfig, QuickstartConfig
from rayllm.runs.progress import ProgressFollower


def test_every_stage_reads_what_the_one_before_it_wrote(tmp_path: Path) -> None:
    config = place(load_config(QuickstartConfig, "quickstart", [f"--out={tmp_path}"]))
    assert config.tokenizer.sources == config.tokenize.sources == (f"{tmp_path}/corpus/stories.jsonl",)
    assert config.tokenizer.out == config.tokenize.tokenizer == config.pretrain.data.tokenizer
    assert config.tokenize.out == config.pretrain.data.shards
    assert config.pretrain.out == config.sft.checkpoint and config.sft.out == config.rl.checkpoint


def test_a_seed_moves_everything_but_the_problems_held_out() -> None:
    one, other = (place(load_config(QuickstartConfig, "quickstart", [f"--seed={seed}"])) for seed in (0, 3))
    for seeds in (
        lambda c: (c.corpus.seed, c.pretrain.seed, c.pretrain.data.seed, c.sft.seed, c.rl.seed),
        lambda c: (c.rl.task.seed, *(task.seed for task in c.sft.tasks)),
    ):
        assert [b - a for a, b in zip(seeds(one), seeds(other), strict=True)] == [3] * len(seeds(one))
    assert (one.rl.validation, one.chat_eval, one.sft.validation) == (
        other.rl.validation,
        other.chat_eval,
        other.sft.validation,
    )


def test_the_clock_keeps_the_time_of_work_that_is_done_already(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"stages": {"rl": {"seconds": 99.0}}}))
    clock = StageClock(path, io.StringIO())
    clock.time("rl", lambda: None)
    clock.time("sft", lambda: None)
    clock.write(pass_at_1={"sft": {"value": 0.5}})
    written = json.loads(path.read_text())
    assert written["stages"]["rl"]["seconds"] == 99.0 and written["stages"]["sft"]["seconds"] < 9
    assert written["pass_at_1"] == {"sft": {"value": 0.5}}
    with pytest.raises(ZeroDivisionError):
        clock.time("broken", lambda: 1 // 0)
    assert "broken" not in json.loads(path.read_text())["stages"]


def test_a_stage_is_one_line_and_the_rest_is_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> None:
        print("rl: 7 problems")
        print("rl: starting actors", file=sys.stderr)
        with ProgressFollower(tmp_path / "metrics.jsonl", num_steps=2, poll_every_s=0.01):
            lines = [
                {"step": 2, "train/loss": 0.5},
                {"step": 2, "val/pass@1": 0.25},
                {"step": 2, "name": "sample", "text": "Hi!"},
            ]
            (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        print("rl: 2 steps done")

    log = io.StringIO()
    clock = StageClock(tmp_path / "summary.json", log)
    clock.time("rl", stage)
    clock.time("chat-eval rl", lambda: print("report: there"), lambda: "pass@1 50.0%")
    shown = capsys.readouterr()
    assert shown.out == "rl                0s  2 steps done\nchat-eval rl      0s  pass@1 50.0%\n"
    assert shown.err == "rl  step 2/2  loss 0.500\n"
    for said in ("== rl", "rl: 7 problems", "rl: starting actors", "val pass@1 0.2500", "sample: Hi!", "report: there"):
        assert said in log.getvalue(), said


def test_the_corpus_is_written_once_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "corpus" / "stories.jsonl"
    write_corpus(CorpusConfig(num_documents=20), path)
    text, written = path.read_text(), path.stat().st_mtime_ns
    assert len([json.loads(line)["text"] for line in text.splitlines()]) == 20 and "####" not in text
    write_corpus(CorpusConfig(num_documents=20), path)
    assert path.stat().st_mtime_ns == written
    path.write_text(text[:100])
    write_corpus(CorpusConfig(num_documents=20), path)
    assert path.read_text() == text


def test_the_last_table_tells_before_and_after() -> None:
    def scores(value: float) -> list[dict]:
        estimate = {"value": value, "stderr": 0.01, "num_problems": 256}
        return [{"task": "word_problems/test", "pass@1": estimate, "greedy": {**estimate, "value": value + 0.1}}]

    config = place(load_config(QuickstartConfig, "quickstart", ["--out=there"]))
    shown = render_end({"sft": scores(0.5), "rl": scores(0.8)}, {"sft": 61.0, "rl": 60.0}, config, Path("there/r.html"))
    assert "50.0% +- 1.0%" in shown and "80.0% +- 1.0%" in shown and "90.0%" in shown
    assert "2 stages in 2m01s" in shown and "there/r.html" in shown and "rayllm serve --checkpoint=there/rl" in shown


def test_what_cannot_be_told_of_a_single_problem_ends_nothing() -> None:
    estimate = {"value": 1.0, "stderr": None, "num_problems": 1}
    scores = [{"task": "word_problems/test", "pass@1": estimate, "greedy": {**estimate, "value": None}}]
    assert render_scores(scores) == "pass@1 100.0% +- nan% word_problems/test"
    config = place(load_config(QuickstartConfig, "quickstart", ["--out=there"]))
    assert "nan% +- nan%" in render_end({"sft": scores, "rl": scores}, {"sft": 1.0}, config, Path("r.html"))
