"""What quickstart adds to its stages: where each reads and writes, its seeds, its clock, its last table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.quickstart import StageClock, place, render_end, write_corpus
from rayllm.config.chat_schema import CorpusConfig, QuickstartConfig
from rayllm.config.load import load_config


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
    clock = StageClock(path)
    clock.time("rl", lambda: None)
    clock.time("sft", lambda: None)
    clock.write(pass_at_1={"sft": {"value": 0.5}})
    written = json.loads(path.read_text())
    assert written["stages"]["rl"]["seconds"] == 99.0 and written["stages"]["sft"]["seconds"] < 9
    assert written["pass_at_1"] == {"sft": {"value": 0.5}}
    with pytest.raises(ZeroDivisionError):
        clock.time("broken", lambda: 1 // 0)
    assert "broken" not in json.loads(path.read_text())["stages"]


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
