"""Checkpoints written while training goes on: real files, and a file system whose writes can be held back."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.writer import CheckpointWriter
from rayllm.text.tokenizer import Tokenizer


class HeldFileSystem(MemoryFileSystem):
    """In memory; looks at nothing, and so writes nothing, before it may."""

    protocol = "held"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    may_go = threading.Event()
    asked = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("held://", "memory://"))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.asked.set()
        assert self.may_go.wait(60)
        return super().ls(path, detail, **options)


class OneFolderFileSystem(LocalFileSystem):
    """The disk behind a protocol of its own, so that processes share it as they share a bucket."""

    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(path.replace("disk://", "file://"))


# The same in another process, and slow: 0.2 s before each file.
SLOW_DISK = """
import sys, time
import fsspec, torch
from fsspec.implementations.local import LocalFileSystem
from rayllm.runs.writer import CheckpointWriter
from rayllm.text.tokenizer import Tokenizer

class SlowFileSystem(LocalFileSystem):
    protocol = "disk"
    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(path.replace("disk://", "file://"))
    def put_file(self, *args, **options):
        time.sleep(0.2)
        super().put_file(*args, **options)

fsspec.register_implementation("disk", SlowFileSystem)
writer = CheckpointWriter(sys.argv[1], Tokenizer.byte_level(), keep=2)
def save(step):
    writer.save(step, model_state={"w": torch.full((10,), step)}, optimizer_state=None, state={})
"""


@pytest.fixture(autouse=True)
def file_systems(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLLM_CACHE_DIR", str(tmp_path / "cache"))
    for system in (HeldFileSystem, OneFolderFileSystem):
        fsspec.register_implementation(system.protocol, system, clobber=True)
    HeldFileSystem.store.clear()
    HeldFileSystem.may_go.clear()
    HeldFileSystem.asked.clear()
    yield
    HeldFileSystem.may_go.set()


def writer_to(root: str | Path, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(root, Tokenizer.byte_level(), keep=2, **options)


def save(writer: CheckpointWriter, step: int, w: torch.Tensor) -> None:
    writer.save(step, model_state={"w": w}, optimizer_state={"w/m": w[:2], "w/tied": w}, state={"at": step})


def test_training_goes_on_and_what_it_changes_is_not_in_the_file():
    w = torch.arange(6.0).reshape(2, 3)
    state = {"at": 1}
    with writer_to("held://run") as writer:
        writer.save(1, model_state={"w": w, "t": w.T}, optimizer_state={"w/m": w[1:]}, state=state)
        assert HeldFileSystem.asked.wait(60), "it is at it, and nothing is serialized yet"
        w.fill_(-1.0)
        state["at"] = 2
        HeldFileSystem.may_go.set()
    checkpoint = open_checkpoint("held://run")
    model, optimizer = checkpoint.load_model_state(), checkpoint.load_optimizer_state()
    before = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(model["w"], before) and torch.equal(model["t"], before.T)
    assert optimizer is not None and torch.equal(optimizer["w/m"], before[1:])
    assert checkpoint.state == {"at": 1}


def test_one_write_at_a_time():
    writer = writer_to("held://run")
    save(writer, 1, torch.ones(3))
    second = threading.Thread(target=save, args=(writer, 2, torch.ones(3)))
    second.start()
    second.join(0.5)
    assert second.is_alive(), "waits for the first"
    HeldFileSystem.may_go.set()
    second.join(60)
    assert not second.is_alive()
    writer.close()
    assert open_checkpoint("held://run").step == 2
    assert open_checkpoint("held://run/step_000001").step == 1


def test_a_wait_has_a_limit_and_says_for_what():
    writer = writer_to("held://run", timeout_s=0.2)
    save(writer, 7, torch.ones(3))
    for again in (lambda: save(writer, 8, torch.ones(3)), writer.flush, writer.close):
        with pytest.raises(TimeoutError, match=r"held://run/step_000007 is still not written after 0\.2 s"):
            again()
    HeldFileSystem.may_go.set()
    assert writer._thread is not None
    writer._thread.join(60)
    writer.close()
    assert open_checkpoint("held://run").step == 7


def test_what_goes_wrong_is_logged_at_once_and_raised_by_the_next_call(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where the folder should be")
    writer = writer_to(tmp_path / "taken" / "checkpoints")
    save(writer, 1, torch.ones(3))
    with pytest.raises(OSError, match="could not write its folder of the checkpoint"):
        save(writer, 2, torch.ones(3))
    assert "could not write its folder" in caplog.text
    (tmp_path / "taken").unlink()
    save(writer, 3, torch.ones(3))
    writer.flush()
    assert open_checkpoint(tmp_path / "taken").step == 3
    (tmp_path / "taken" / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "taken" / "checkpoints").write_text("")
    save(writer, 4, torch.ones(3))
    with pytest.raises(OSError, match="step_000004"):
        writer.close()
    writer.close()  # told once


def test_an_error_in_training_is_raised_and_the_write_is_finished(tmp_path):
    with pytest.raises(FloatingPointError, match="diverged"), writer_to(tmp_path) as writer:
        save(writer, 1, torch.ones(200_000))
        raise FloatingPointError("diverged")
    assert open_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("end", ["", "raise RuntimeError('training failed')", "sys.exit(3)"])
def test_a_process_that_ends_finishes_its_write(tmp_path, end):
    command = [sys.executable, "-c", SLOW_DISK + f"save(1)\n{end}\n", f"disk://{tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert bool(done.returncode) == bool(end), done.stderr
    assert open_checkpoint(f"disk://{tmp_path}/run").step == 1


def test_killed_while_it_writes_the_earlier_checkpoint_is_the_newest(tmp_path, caplog):
    program = SLOW_DISK + textwrap.dedent("""
        save(1)
        writer.flush()
        save(2)
        time.sleep(60)
    """)
    saver = subprocess.Popen([sys.executable, "-c", program, f"disk://{tmp_path}/run"])
    half = tmp_path / "run" / "step_000002"
    deadline = time.monotonic() + 60
    while not half.exists() or not any(half.iterdir()):
        assert time.monotonic() < deadline and saver.poll() is None, "waited 60 s for the second checkpoint to begin"
        time.sleep(0.01)
    saver.kill()
    saver.wait()
    assert not (half / "COMPLETE").exists()
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(f"disk://{tmp_path}/run").step == 1
    assert "disk:///" in caplog.text and "run/step_000002 is no whole checkpoint" in caplog.text
    (leftover,) = (tmp_path / "cache" / "uploads").glob("*/*.tmp-*")

    with writer_to(f"disk://{tmp_path}/run") as writer:
        save(writer, 3, torch.ones(3))
    assert sorted(os.listdir(tmp_path / "run")) == ["step_000001", "step_000003"], "what was half sent is gone"
    assert not leftover.exists()
