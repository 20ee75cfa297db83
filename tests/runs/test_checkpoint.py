"""Checkpoints under real faults: a disk that is full, a process that is killed, a byte that flips."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rayllm.runs.checkpoint import check_tensor_shapes, latest_checkpoint, open_checkpoint, save_checkpoint
from rayllm.text.tokenizer import Tokenizer

SAVE_BEYOND_THE_LIMIT = """
import resource, signal, sys
from pathlib import Path
import torch
from rayllm.runs.checkpoint import save_checkpoint
from rayllm.text.tokenizer import Tokenizer
part, limit = sys.argv[2], int(sys.argv[3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
big, small = {"w": torch.zeros(300_000)}, {"w": torch.zeros(1)}
try:
    save_checkpoint(Path(sys.argv[1]), 2, model_state=big if part == "model" else small,
                    optimizer_state=big if part == "optimizer" else small,
                    state={"note": "x" * 900_000} if part == "state" else {}, tokenizer=Tokenizer.byte_level(), keep=1)
except OSError as error:
    print(error.errno, error)
    sys.exit(7)
"""

SAVE_FOREVER = """
import itertools, sys
from pathlib import Path
import torch
from rayllm.runs.checkpoint import save_checkpoint
from rayllm.text.tokenizer import Tokenizer
tokenizer = Tokenizer.byte_level()
for n in itertools.count(int(sys.argv[2]) * 2):
    # Every second save replaces the one before it, and no other is kept.
    save_checkpoint(Path(sys.argv[1]), n // 2, model_state={"w": torch.full((20_000,), n // 2)}, optimizer_state=None,
                    state={"n": n}, tokenizer=tokenizer, keep=1)
    print(n // 2, flush=True)
"""


def save(root: Path, step: int, keep: int = 2, value: float | None = None, optimizer: bool = True) -> Path:
    model = {"w": torch.full((4, 3), float(step if value is None else value)), "b": torch.arange(5).bfloat16()}
    return save_checkpoint(
        root,
        step,
        model_state=model,
        optimizer_state={"m/w": torch.ones(12), "step": torch.tensor(step)} if optimizer else None,
        state={"model": {"depth": 4}, "position": {"epoch": 1, "row_idx": step}, "bpb": 1.25},
        tokenizer=Tokenizer.byte_level(),
        keep=keep,
    )


def steps(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_roundtrip(tmp_path):
    path = save(tmp_path / "checkpoints", 500)
    assert path == tmp_path / "checkpoints" / "step_000500"
    for address in (path, str(path), tmp_path, tmp_path / "checkpoints", f"file://{tmp_path}", f"file://{path}"):
        checkpoint = open_checkpoint(address)
        assert (checkpoint.path, checkpoint.step) == (path, 500)
    assert checkpoint.state == {"model": {"depth": 4}, "position": {"epoch": 1, "row_idx": 500}, "bpb": 1.25}
    model, optimizer = checkpoint.load_model_state(), checkpoint.load_optimizer_state()
    assert optimizer is not None and set(optimizer) == {"m/w", "step"} and optimizer["step"].item() == 500
    assert model["w"].dtype == torch.float32 and torch.equal(model["w"], torch.full((4, 3), 500.0))
    assert model["b"].dtype == torch.bfloat16 and torch.equal(model["b"], torch.arange(5).bfloat16())
    assert checkpoint.load_tokenizer().fingerprint == Tokenizer.byte_level().fingerprint


def test_without_optimizer(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path, 1, optimizer=False))
    assert not checkpoint.has_optimizer and checkpoint.load_optimizer_state() is None
    assert open_checkpoint(save(tmp_path, 2)).has_optimizer


def test_shared_storage_views_and_empty_tensors_are_stored_whole(tmp_path):
    buffer = torch.arange(24.0).reshape(4, 6)
    state = {"tied": buffer, "again": buffer, "rows": buffer[1:3], "columns": buffer.T, "none": torch.zeros(0, 3)}
    state |= {"none_too": torch.zeros(0), "scalar": torch.tensor(2.5), "grad": torch.ones(3, requires_grad=True)}
    path = save_checkpoint(
        tmp_path, 1, model_state=state, optimizer_state=None, state={}, tokenizer=Tokenizer.byte_level(), keep=1
    )
    loaded = open_checkpoint(path).load_model_state()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_readable_as_the_umask_says(tmp_path):
    path = save(tmp_path, 1)
    assert {file.stat().st_mode for file in path.glob("*.*")} == {(path / "checkpoint.json").stat().st_mode}


def test_keeps_the_newest(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == ["step_000020", "step_000030"]
    save(tmp_path, 1_000_000, keep=1)
    assert steps(tmp_path) == ["step_1000000"]
    assert open_checkpoint(tmp_path).step == 1_000_000


def test_replay_replaces_the_same_step_and_spares_later_ones(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 20, keep=1, value=-1.0)
    assert steps(tmp_path) == ["step_000020", "step_000030"]
    assert open_checkpoint(tmp_path / "step_000020").load_model_state()["w"][0, 0] == -1.0


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "tokenizer/tokenizer.json"])
def test_a_flipped_byte_is_found(tmp_path, caplog, file):
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    flip_byte(newest / file)
    with pytest.raises(ValueError, match=f"{file} is damaged: its checksum differs"):
        open_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(tmp_path).step == 1
    assert file in caplog.text


def test_a_changed_state_is_found(tmp_path):
    path = save(tmp_path, 1)
    manifest = path / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"row_idx": 1', '"row_idx": 2'))
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": "0"}', "null", "\x00"])
def test_a_torn_manifest_is_found(tmp_path, content):
    path = save(tmp_path, 1)
    (path / "checkpoint.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
        open_checkpoint(path)


def test_missing_and_cut_files_are_found(tmp_path):
    path = save(tmp_path, 1)
    model = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(model[:-1])
    with pytest.raises(ValueError, match=f"{len(model) - 1} bytes instead of {len(model)}"):
        open_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        open_checkpoint(path)
    (path / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint\.json is missing"):
        open_checkpoint(path)
    with pytest.raises(ValueError, match="every checkpoint in"):
        latest_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(ValueError, match="format 3"):
        open_checkpoint(path)


def test_a_checkpoint_counts_only_with_its_marker(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="step_000002 is no whole checkpoint: its marker COMPLETE is missing"):
        open_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(tmp_path).step == 1
    assert "step_000002" in caplog.text
    (newest / "COMPLETE").write_bytes((tmp_path / "step_000001" / "COMPLETE").read_bytes())
    with pytest.raises(ValueError, match="another checkpoint's"):
        open_checkpoint(newest)


def test_format_1_had_no_marker(tmp_path):
    path = save(tmp_path, 1)
    (path / "COMPLETE").unlink()
    manifest = json.loads((path / "checkpoint.json").read_text())
    del manifest["sha256"]
    manifest["format"] = 1
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "sha256": digest}))
    assert open_checkpoint(tmp_path).step == 1
    flip_byte(path / "model.safetensors")
    with pytest.raises(ValueError, match="its checksum differs"):
        open_checkpoint(path)


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "no") is None
    with pytest.raises(FileNotFoundError, match="rayllm pretrain"):
        open_checkpoint(tmp_path / "no")


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process_id in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f"step_000001.tmp-{process_id}").mkdir()
    save(tmp_path, 2)
    assert steps(tmp_path) == [f"step_000001.tmp-{os.getppid()}", "step_000002"]


def test_killed_between_the_renames_of_a_replacement(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step_000001.replaced")
    assert open_checkpoint(tmp_path).step == 1
    save(tmp_path, 2)
    assert steps(tmp_path) == ["step_000001", "step_000002"]
    assert open_checkpoint(tmp_path / "step_000001").step == 1


@pytest.mark.parametrize(
    ("part", "limit"), [("model", 500_000), ("optimizer", 500_000), ("state", 500_000), ("tokenizer", 1000)]
)
def test_a_full_disk_leaves_earlier_checkpoints_untouched(tmp_path, part, limit):
    earlier = save(tmp_path, 1)
    command = [sys.executable, "-c", SAVE_BEYOND_THE_LIMIT, str(tmp_path), part, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    name = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "state": "checkpoint.json"}
    assert f"could not write {name.get(part, 'the tokenizer')} of the checkpoint" in done.stdout
    assert done.stdout.startswith("27 ") and "make room" in done.stdout
    assert steps(tmp_path) == ["step_000001"]
    assert open_checkpoint(tmp_path).path == earlier


def test_an_interrupt_leaves_no_half_checkpoint(tmp_path):
    class Interrupted(Tokenizer):
        def save(self, directory: str | Path) -> None:
            raise KeyboardInterrupt

    ranks = {bytes([byte]): byte for byte in range(256)}
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(
            tmp_path, 1, model_state={}, optimizer_state=None, state={}, tokenizer=Interrupted(ranks, "."), keep=1
        )
    assert steps(tmp_path) == []


def test_killed_at_any_moment_there_is_always_a_whole_checkpoint(tmp_path):
    draw = random.Random(0)
    step = 0
    for _ in range(4):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(step)], stdout=subprocess.PIPE, text=True
        )
        assert saver.stdout is not None
        saver.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.1))
        saver.kill()
        reported = [int(line) for line in saver.communicate()[0].splitlines()]
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.step >= max([step, *reported])
        assert torch.equal(checkpoint.load_model_state()["w"], torch.full((20_000,), checkpoint.step))
        step = checkpoint.step
    save(tmp_path, step + 1, keep=1)
    assert steps(tmp_path) == [f"step_{step + 1:06d}"]


def test_shapes_that_do_not_fit_are_named(tmp_path):
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "extra": torch.zeros(1)}
    check_tensor_shapes(state, {"a": (2, 3), "b": (4,), "extra": (1,)}, tmp_path)
    with pytest.raises(ValueError) as refusal:
        check_tensor_shapes(state, {"a": (3, 2), "b": (4,), **{f"lost{n}": (1,) for n in range(5)}}, tmp_path)
    message = str(refusal.value)
    assert "5 missing (lost0, lost1, lost2, ...)" in message
    assert "1 unexpected (extra)" in message
    assert "1 of another shape (a is (2, 3) and should be (3, 2))" in message and str(tmp_path) in message
