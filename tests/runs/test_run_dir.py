"""A run directory belongs to one run, and to one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rayllm.config.load import load_config
from rayllm.config.schema import OptimConfig, PretrainConfig, TrackingConfig, WorkersConfig
from rayllm.runs.run_dir import open_run, read_run

CONFIG = PretrainConfig(depth=4, workers=WorkersConfig(num_workers=1))
HOLD_UNTIL_STDIN_CLOSES = """
import sys
from rayllm.config.schema import PretrainConfig
from rayllm.runs.run_dir import open_run
with open_run(sys.argv[1], stage="pretrain", config=PretrainConfig(depth=4), plan={}):
    print("held", flush=True)
    sys.stdin.read()
"""


def launch(path: Path, config: PretrainConfig = CONFIG, stage: str = "pretrain", plan: dict | None = None):
    with open_run(path, stage=stage, config=config, plan=plan or {}, may_change=("workers", "log_every")) as run:
        return run


def test_new_run_writes_recipe_plan_identity_and_provenance(tmp_path):
    run = launch(tmp_path / "a" / "b", plan={"steps": 7})
    assert not run.resumed
    assert load_config(PretrainConfig, str(run.path / "config.yaml")) == CONFIG
    assert json.loads((run.path / "plan.json").read_text()) == {"steps": 7}
    record = read_run(run.path)
    assert (record.run_id, record.stage) == (run.run_id, "pretrain")
    assert len(run.run_id) == 12 and int(run.run_id, 16) >= 0
    assert (run.metrics_path, run.checkpoints) == (run.path / "metrics.jsonl", str(run.path / "checkpoints"))


def test_provenance_gains_a_line_for_each_launch(tmp_path):
    launch(tmp_path / "run")
    launch(tmp_path / "run")
    first, second = map(json.loads, (tmp_path / "run" / "provenance.jsonl").read_text().splitlines())
    assert first["command"] == second["command"] == sys.argv
    assert first["versions"]["torch"] and first["versions"]["python"] == sys.version.split()[0]
    assert first["num_cpus"] >= 1 and first["hostname"] and first["platform"] and first["time"] <= second["time"]
    assert first["git"] is None or set(first["git"]) == {"commit", "dirty"}


def test_same_recipe_joins_the_run(tmp_path):
    first, second = launch(tmp_path / "run"), launch(tmp_path / "run")
    assert second.resumed and second.run_id == first.run_id


def test_a_moved_run_can_go_on(tmp_path):
    first = launch(tmp_path / "run", replace(CONFIG, out="run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert launch(tmp_path / "moved", replace(CONFIG, out="moved")).run_id == first.run_id


def test_a_first_launch_that_made_nothing_leaves_the_directory_to_a_mended_recipe(tmp_path):
    for out, makes, joins in (("empty", False, False), ("begun", True, True)):
        with (
            pytest.raises(ValueError, match="no such text"),
            open_run(tmp_path / out, stage="pretrain", config=CONFIG, plan={}) as run,
        ):
            if makes:
                (run.path / "metrics.jsonl").touch()
            raise ValueError("no such text")
        if joins:
            with pytest.raises(ValueError, match="depth was 4 and is now 6"):
                launch(tmp_path / out, replace(CONFIG, depth=6))
        else:
            assert not launch(tmp_path / out, replace(CONFIG, depth=6)).resumed
    launch(tmp_path / "joined")
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "joined", stage="pretrain", config=CONFIG, plan={}):
        raise KeyboardInterrupt
    assert read_run(tmp_path / "joined").stage == "pretrain", "a run that was there stays"


def test_another_recipe_is_refused_by_its_keys(tmp_path):
    launch(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError) as refusal:
        launch(tmp_path / "run", replace(CONFIG, depth=6, optim=OptimConfig(matrix_lr=0.5), log_every=3))
    message = str(refusal.value)
    assert "depth was 4 and is now 6" in message and "optim.matrix_lr was 0.02 and is now 0.5" in message
    assert "log_every" not in message and "--out=" in message and "\n" not in message
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_keys_that_may_change_are_taken_over(tmp_path):
    launch(tmp_path / "run")
    fingerprint = read_run(tmp_path / "run").config_fingerprint
    changed = replace(CONFIG, workers=WorkersConfig(num_workers=2), log_every=5)
    assert launch(tmp_path / "run", changed).resumed
    assert load_config(PretrainConfig, str(tmp_path / "run" / "config.yaml")) == changed
    assert read_run(tmp_path / "run").config_fingerprint == fingerprint


def test_a_key_that_only_begins_alike_may_not_change(tmp_path):
    with open_run(tmp_path / "run", stage="pretrain", config=CONFIG, plan={}, may_change=("track", "dep")):
        pass
    with (
        pytest.raises(ValueError, match="depth was 4 and is now 5; tracking.project"),
        open_run(
            tmp_path / "run",
            stage="pretrain",
            config=replace(CONFIG, depth=5, tracking=TrackingConfig(project="x")),
            plan={},
            may_change=("track", "dep"),
        ),
    ):
        pass


def test_another_stage_is_refused(tmp_path):
    launch(tmp_path / "run")
    with pytest.raises(ValueError, match="'pretrain', not 'tokenizer'"):
        launch(tmp_path / "run", stage="tokenizer")


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not empty.*thesis\.tex"):
        launch(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        launch(tmp_path / "thesis.tex")


def test_a_start_that_was_cut_off_is_begun_again(tmp_path):
    run = launch(tmp_path / "run")
    (run.path / "run.json").unlink()
    (run.path / "provenance.jsonl").unlink()
    (run.path / ".plan.json.tmp-123").write_text("{")
    assert not launch(tmp_path / "run", replace(CONFIG, depth=9)).resumed


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_damaged_files_are_named(tmp_path, name):
    launch(tmp_path / "run")
    (tmp_path / "run" / name).write_text("{torn: [")
    with pytest.raises(ValueError, match=name):
        launch(tmp_path / "run")


def test_read_run_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_run(tmp_path)


def test_second_process_is_told_who_holds_the_directory(tmp_path):
    path = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_UNTIL_STDIN_CLOSES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on host"):
            launch(path)
        holder.kill()  # the lock dies with its process
        holder.wait()
        assert launch(path).resumed
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_is_dropped_after_an_error(tmp_path):
    launch(tmp_path / "run")
    with (
        pytest.raises(RuntimeError),
        open_run(tmp_path / "run", stage="pretrain", config=CONFIG, plan={}),
    ):
        with pytest.raises(ValueError, match="in use"):
            launch(tmp_path / "run")
        raise RuntimeError
    assert launch(tmp_path / "run").resumed
