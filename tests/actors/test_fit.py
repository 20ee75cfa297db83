"""Pretraining through Ray Train: any number of workers, killed and resumed, interrupted, on bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from actors import fit
from rayllm.config.load import to_yaml
from rayllm.config.schema import OptimConfig, PretrainConfig, TrackingConfig
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.stop_request import StopRequest
from rayllm.runs.tracking import read_metrics
from rayllm.text.tokenizer import SPLIT_PATTERN, Tokenizer

Recipe = Callable[..., PretrainConfig]
HANG_LIMIT_S = 240.0


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read_metrics(out / "metrics.jsonl") if "train/loss" in r}


def last_step(out: Path) -> int:
    """The last that the run in `out` has recorded."""
    return max((r["step"] for r in read_metrics(out / "metrics.jsonl")), default=0)


def wait_until(command: Any, is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANG_LIMIT_S
    while not is_true():
        assert command.process.poll() is None, f"ended early:\n{command.process.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited {HANG_LIMIT_S} s for {what}"
        time.sleep(0.01)


def weights(out: Path) -> dict[str, bytes]:
    state = load_file(open_checkpoint(out).path / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_recipe: Recipe, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PretrainConfig, Path]:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    config = tiny_recipe(out)
    fit.run(config)
    return config, out


def test_a_run_leaves_what_one_needs_to_trust_and_repeat_it(uninterrupted) -> None:
    config, out = uninterrupted
    records = read_metrics(out / "metrics.jsonl")
    assert sorted(losses(out)) == list(range(1, 21))
    assert losses(out)[20] < losses(out)[1] - 0.5
    validation = {r["step"]: r["val/bpb"] for r in records if "val/bpb" in r}
    assert list(validation) == [0, 10, 20] and validation[20] < validation[0]
    assert sum(r.get("name") == "sample" for r in records) == 7
    assert (out / "config.yaml").read_text(encoding="utf-8").strip() == to_yaml(config).strip()
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert (plan["num_steps"], plan["tokens_per_step"]) == (20, 512)
    launch = json.loads((out / "provenance.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {"command", "versions", "git"} <= launch.keys()
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == ["step_000016", "step_000020"], "the newest two"


def test_two_workers_match_one(uninterrupted, tiny_recipe: Recipe, tmp_path: Path) -> None:
    _, one = uninterrupted
    fit.run(tiny_recipe(tmp_path / "two", num_workers=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-4)


def test_a_finished_run_is_not_run_again(uninterrupted, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = uninterrupted
    before, num_records = weights(out), len(read_metrics(out / "metrics.jsonl"))
    fit.run(config)
    assert "holds all 20 steps of this recipe already" in capsys.readouterr().out
    assert weights(out) == before and len(read_metrics(out / "metrics.jsonl")) == num_records


@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_leaves_nothing_behind(tiny_recipe: Recipe, commands, tmp_path: Path) -> None:
    command = commands("pretrain", tiny_recipe(tmp_path / "run", num_steps=100_000))
    command.wait_for(tmp_path / "run" / "checkpoints" / "step_000008")
    command.process.send_signal(signal.SIGINT)
    output, _ = command.process.communicate(timeout=HANG_LIMIT_S)
    assert command.process.returncode == 130, output
    ours = [line for line in output.splitlines() if "pid=" not in line]  # the rest is what Ray's own actors print
    assert "Traceback" not in "\n".join(ours)
    command.wait_until_gone()
    assert open_checkpoint(tmp_path / "run").step >= 8


@pytest.mark.slow
def test_sigterm_saves_after_the_step_under_way_and_the_same_command_goes_on(
    uninterrupted, tiny_recipe: Recipe, commands, side_by_side, tmp_path: Path
) -> None:
    _, expected = uninterrupted

    def stop_and_go_on(victim: str) -> None:
        run = tmp_path / victim
        config = tiny_recipe(run, save_every=None, eval_every=None)
        command = commands("pretrain", config)
        command.wait_for(run / "metrics.jsonl")
        wait_until(command, lambda: last_step(run) >= 2, "step 2")
        (worker,) = command.processes("RayTrainWorker")
        os.kill(worker, signal.SIGSTOP)  # lest it be done before a busy machine lets the signal through
        before = last_step(run)
        os.kill(worker if victim == "worker" else command.process.pid, signal.SIGTERM)
        if victim == "driver":
            wait_until(command, StopRequest(run, look_every_s=0).is_asked, "the request to stop")
        os.kill(worker, signal.SIGCONT)
        output, _ = command.process.communicate(timeout=HANG_LIMIT_S)
        assert command.process.returncode == 0, output
        saved = open_checkpoint(run).step
        assert before <= saved < 20
        stopped = f"pretrain: stopped by SIGTERM after step {saved} of 20, checkpoint saved; the same command goes on"
        assert stopped in output
        assert ("saving a checkpoint after this step" in output) == (victim == "driver")
        command.wait_until_gone()

        again = commands("pretrain", config)
        output, _ = again.process.communicate(timeout=HANG_LIMIT_S)
        assert again.process.returncode == 0 and f"after step {saved} of 20" in output, output
        assert weights(run) == weights(expected)
        assert losses(run) == losses(expected)

    side_by_side(stop_and_go_on, ("driver", "worker"))


@pytest.mark.slow
def test_a_killed_worker_is_replaced(uninterrupted, tiny_recipe: Recipe, commands, tmp_path: Path) -> None:
    _, expected = uninterrupted
    command = commands("pretrain", tiny_recipe(tmp_path / "run"))
    command.wait_for(tmp_path / "run" / "checkpoints" / "step_000004")
    for pid in command.processes("RayTrainWorker"):
        os.kill(pid, signal.SIGKILL)
    output, _ = command.process.communicate(timeout=HANG_LIMIT_S)
    assert command.process.returncode == 0, output
    assert "starting them again from the last checkpoint (1 of at most 3 times)" in output
    assert weights(tmp_path / "run") == weights(expected)


@pytest.mark.slow
def test_a_diverging_run_says_so_once_and_is_not_tried_again(
    ray_session: None, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = OptimConfig(embedding_lr=1e30, unembedding_lr=1e30, matrix_lr=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+: lower the learning rates"):
        fit.run(tiny_recipe(tmp_path / "run", optim=rates))
    assert "starting them again" not in capsys.readouterr().err


def test_bad_input_is_said_before_ray_starts(tiny_recipe: Recipe, uninterrupted, tmp_path: Path) -> None:
    config, out = uninterrupted
    with pytest.raises(ValueError, match=r"depth was 2 and is now 3"):
        fit.run(replace(config, depth=3))
    with pytest.raises(FileNotFoundError, match="no_tokenizer"):
        fit.run(tiny_recipe(tmp_path / "a", data=replace(config.data, tokenizer="no_tokenizer")))
    with pytest.raises(FileNotFoundError, match="no_shards"):
        fit.run(tiny_recipe(tmp_path / "a", data=replace(config.data, shards="no_shards")))
    Tokenizer({bytes([b]): b for b in range(256)} | {b"is": 256}, SPLIT_PATTERN).save(tmp_path / "other")
    with pytest.raises(ValueError, match="were made by another tokenizer"):
        fit.run(tiny_recipe(tmp_path / "a", data=replace(config.data, tokenizer=str(tmp_path / "other"))))
    with pytest.raises(ValueError, match="must be a multiple of"):
        fit.run(tiny_recipe(tmp_path / "a", tokens_per_step=500))
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("not a run")
    with pytest.raises(ValueError, match="full"):
        fit.run(tiny_recipe(tmp_path / "full"))


def test_more_workers_than_the_machine_has_are_refused(ray_session: None, tiny_recipe: Recipe, tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path / "run", num_workers=512, tokens_per_step=64 * 512)
    with pytest.raises(ValueError, match=r"this machine is too small: 512 workers need 512 CPU"):
        fit.run(config)


@pytest.mark.slow
def test_tensorboard_and_wandb_at_once(ray_session: None, tiny_recipe: Recipe, tmp_path: Path) -> None:
    tracking = TrackingConfig(sinks=("tensorboard", "wandb"))
    fit.run(tiny_recipe(tmp_path / "run", num_steps=3, tracking=tracking))
    files = [str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")]
    assert any("events.out.tfevents" in name for name in files)
    assert any(name.endswith(".wandb") for name in files)


@pytest.mark.parametrize("fault", ["too little text", "damaged shard"])
def test_bad_text_is_told_before_there_is_a_run_directory(
    tiny_recipe: Recipe, corpus: Path, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(corpus / "shards", tmp_path / "shards")
    config = tiny_recipe(tmp_path / "run")
    config = replace(config, data=replace(config.data, shards=str(tmp_path / "shards")))
    if fault == "damaged shard":
        shard = next(path for path in (tmp_path / "shards" / "train").iterdir() if path.stat().st_size > 1000)
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    else:
        config = replace(config, model=replace(config.model, sequence_len=2**16), tokens_per_step=2**16)
    with pytest.raises(ValueError, match="too little text" if fault == "too little text" else "damaged"):
        fit.run(config)
    assert not (tmp_path / "run").exists()
