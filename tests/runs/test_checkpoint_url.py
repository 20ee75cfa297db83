"""Checkpoints at a URL: fsspec's memory, and a file system of ours that loses, cuts and refuses as networks do."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from rayllm.config.errors import ConfigError
from rayllm.config.load import load_config
from rayllm.config.schema import BaseEvalConfig, PretrainConfig
from rayllm.runs.checkpoint import latest_checkpoint, open_checkpoint, write_checkpoint
from rayllm.runs.places import open_store
from rayllm.runs.run_dir import open_run, read_run
from rayllm.text.tokenizer import Tokenizer


class DriverError(Exception):
    """Of a kind that only the driver knows, as botocore's."""


class FaultyFileSystem(MemoryFileSystem):
    """In memory, like a bucket: no rename; `faults` says what goes wrong, `fetched` what was read in full."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[dict[str, Exception | int]] = {}
    fetched: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))

    def _strike(self, kind: str, path: str) -> int | None:
        for pattern, fault in self.faults.items():
            if pattern in f"{kind} {path}":
                if isinstance(fault, Exception):
                    raise fault
                return fault
        return None

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        num_bytes = self._strike("put", rpath)
        super().pipe_file(rpath, Path(lpath).read_bytes()[:num_bytes])

    def pipe_file(self, path: str, value: bytes, *args: Any, **options: Any) -> None:
        self._strike("put", path)
        super().pipe_file(path, value, *args, **options)

    def get_file(self, rpath: str, lpath: str, *args: Any, **options: Any) -> None:
        self._strike("get", rpath)
        self.fetched.append(rpath)
        super().get_file(rpath, lpath, *args, **options)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._strike("rm", path)
        super().rm(path, recursive, maxdepth)

    def mv(self, *args: Any, **options: Any) -> None:
        raise AssertionError("there is no rename in a bucket")


URL = "faulty://bucket/run"


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch) -> type[FaultyFileSystem]:
    monkeypatch.setenv("RAYLLM_CACHE_DIR", str(tmp_path / "cache"))
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]
    FaultyFileSystem.faults.clear()
    FaultyFileSystem.fetched.clear()
    MemoryFileSystem.store.clear()
    return FaultyFileSystem


def save(step: int, url: str = URL, keep: int = 2, value: float | None = None) -> str:
    return write_checkpoint(
        open_store(url),
        step,
        model_state={"w": torch.full((4, 3), float(step if value is None else value))},
        optimizer_state={"w/m": torch.ones(12)},
        state={"stage": "base", "position": {"row_idx": step}},
        tokenizer=Tokenizer.byte_level(),
        keep=keep,
    )


def names(url: str = URL) -> list[str]:
    return [entry.name for entry in open_store(url).find()]


def flip_byte(bucket: type[FaultyFileSystem], path: str) -> None:
    content = bytearray(bucket.store[path].getvalue())
    content[-3] ^= 1
    MemoryFileSystem.pipe_file(bucket(), path, bytes(content))


@pytest.mark.parametrize("url", ["memory://bucket/run", URL])
def test_roundtrip(url, tmp_path):
    assert latest_checkpoint(url) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint at memory://bucket .*memory://bucket/checkpoints/step_"):
        open_checkpoint("memory://bucket")
    save(500, f"{url}/checkpoints")
    for address in (url, f"{url}/", f"{url}/checkpoints", f"{url}/checkpoints/step_000500"):
        checkpoint = open_checkpoint(address)
        assert (checkpoint.step, checkpoint.state["position"]) == (500, {"row_idx": 500})
        assert str(checkpoint) == checkpoint.address == f"{url}/checkpoints/step_000500"
    optimizer = checkpoint.load_optimizer_state()
    assert torch.equal(checkpoint.load_model_state()["w"], torch.full((4, 3), 500.0))
    assert optimizer is not None and torch.equal(optimizer["w/m"], torch.ones(12))
    assert checkpoint.load_tokenizer().fingerprint == Tokenizer.byte_level().fingerprint
    assert checkpoint.path.is_relative_to(tmp_path / "cache")
    with pytest.raises(ValueError, match="write --out=DIRECTORY"):
        checkpoint.report_path("base-eval")
    assert list((tmp_path / "cache" / "uploads").glob("*/*")) == [], "what was staged is gone"


def test_fetched_once_and_anew_where_the_cache_or_the_url_changed(bucket):
    save(1)
    open_checkpoint(URL)
    num_files = len(bucket.fetched)
    assert num_files >= 3
    checkpoint = open_checkpoint(f"{URL}/step_000001")
    assert len(bucket.fetched) == num_files, "from the cache"

    (checkpoint.path / "model.safetensors").write_bytes(b"torn")
    assert torch.equal(open_checkpoint(URL).load_model_state()["w"], torch.full((4, 3), 1.0))
    assert len(bucket.fetched) == 2 * num_files

    save(1, value=-1.0)
    assert torch.equal(open_checkpoint(URL).load_model_state()["w"], torch.full((4, 3), -1.0))
    assert torch.equal(checkpoint.load_model_state()["w"], torch.full((4, 3), 1.0)), "whoever has the old one keeps it"


def test_what_nobody_opened_for_a_week_leaves_the_cache(tmp_path):
    save(1)
    old = open_checkpoint(f"{URL}/step_000001").path
    save(2)
    kept = open_checkpoint(f"{URL}/step_000002").path
    long_ago = time.time() - 8 * 24 * 3600
    for path in (old, kept):
        os.utime(path.parent, (long_ago, long_ago))
    open_checkpoint(f"{URL}/step_000002")
    save(3)
    open_checkpoint(f"{URL}/step_000003")
    assert not old.exists() and kept.exists()


def test_keeps_the_newest_and_spares_later_ones():
    for step in (10, 20, 30):
        save(step)
    assert names() == ["step_000030", "step_000020"]
    assert save(20, keep=1, value=-1.0) == "step_000020.1"
    assert names() == ["step_000030", "step_000020.1"]
    assert save(20, keep=1) == "step_000020.2"
    assert open_checkpoint(f"{URL}/step_000020.2").load_model_state()["w"][0, 0] == 20
    assert open_checkpoint(URL).step == 30


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer/tokenizer.json", "checkpoint.json"])
def test_damage_is_named_by_its_url_and_the_one_before_is_used(bucket, caplog, file):
    save(1)
    save(2)
    flip_byte(bucket, f"/bucket/run/step_000002/{file}")
    with pytest.raises(ValueError, match=rf"^{URL}/step_000002/{file} is damaged"):
        open_checkpoint(f"{URL}/step_000002")
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(URL).step == 1
    assert f"{URL}/step_000002/{file}" in caplog.text
    flip_byte(bucket, "/bucket/run/step_000001/model.safetensors")
    shutil.rmtree(os.environ["RAYLLM_CACHE_DIR"])
    with pytest.raises(ValueError, match=f"every checkpoint in {URL} is damaged"):
        open_checkpoint(URL)


def test_a_missing_file_is_named(bucket):
    save(1)
    del bucket.store["/bucket/run/step_000001/optimizer.safetensors"]
    with pytest.raises(ValueError, match=f"{URL}/step_000001/optimizer.safetensors is missing"):
        open_checkpoint(f"{URL}/step_000001")


@pytest.mark.parametrize(
    ("at", "fault", "reason"),
    [
        ("put /bucket/run/step_000002/model", DriverError("no route"), "DriverError: no route"),
        ("put /bucket/run/step_000002/tokenizer", PermissionError("Access Denied"), "Access Denied"),
        ("put /bucket/run/step_000002/checkpoint.json", OSError(errno.EIO, "reset"), "reset"),
        ("put /bucket/run/step_000002/COMPLETE", DriverError("timed out"), "timed out"),
        ("put /bucket/run/step_000002/optimizer", 10, "10 bytes arrived of"),
    ],
)
def test_a_write_that_fails_anywhere_leaves_the_earlier_one_the_newest(bucket, caplog, tmp_path, at, fault, reason):
    save(1)
    bucket.faults[at] = fault
    with pytest.raises(OSError, match=f"could not write the files of the checkpoint {URL}/step_000002") as refusal:
        save(2)
    assert reason in str(refusal.value) and at.split("/")[-1] in str(refusal.value)
    assert isinstance(refusal.value, PermissionError) == isinstance(fault, PermissionError), "which no retry cures"
    assert "step_000002/COMPLETE" not in " ".join(bucket.store)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(URL).step == 1
    assert f"{URL}/step_000002 is no whole checkpoint" in caplog.text
    assert list((tmp_path / "cache" / "uploads").glob("*/*")) == []

    bucket.faults.clear()
    save(3)
    assert names() == ["step_000003", "step_000001"], "what was half sent is gone"


def test_a_replacement_that_fails_leaves_what_it_replaces(bucket):
    save(1)
    bucket.faults["put /bucket/run/step_000001.1/COMPLETE"] = DriverError("timed out")
    with pytest.raises(OSError, match="timed out"):
        save(1, value=-1.0)
    assert open_checkpoint(URL).load_model_state()["w"][0, 0] == 1
    bucket.faults.clear()
    save(1, value=-1.0)
    assert open_checkpoint(URL).load_model_state()["w"][0, 0] == -1


def test_what_may_not_be_removed_is_told_and_ends_nothing(bucket, caplog):
    bucket.faults["rm"] = PermissionError("Access Denied")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            save(step)
    assert f"could not remove {URL}/step_000001" in caplog.text
    assert open_checkpoint(URL).step == 3


def test_an_error_of_the_network_is_no_missing_checkpoint(bucket):
    save(1)
    bucket.faults["get"] = DriverError("no route")
    with pytest.raises(OSError, match=f"could not read {URL}/step_000001/.*no route"):
        latest_checkpoint(URL)


def test_a_driver_that_is_missing_is_named_with_the_cure():
    fsspec.register_implementation("nodriver", "no_such_driver.FileSystem", clobber=True, errtxt="Install it")
    with pytest.raises(ValueError, match=r"^nodriver://b: the driver .* not installed: pip install no_such_driver$"):
        open_checkpoint("nodriver://b/run")
    with pytest.raises(ValueError, match=r"nosuch://b: there is no driver for nosuch://; write a path, or a URL"):
        open_checkpoint("nosuch://b")


def test_out_is_a_path_and_checkpoints_may_be_a_url():
    config = load_config(PretrainConfig, None, ["--out=runs/a", f"--checkpoints={URL}"])
    assert config.checkpoints == URL
    with pytest.raises(ConfigError, match="write --out=runs/NAME --checkpoints=s3://bucket/run"):
        load_config(PretrainConfig, None, ["--out=s3://bucket/run"])
    with pytest.raises(ConfigError, match="must be a path; write --out=runs/NAME(?! --checkpoints)"):
        load_config(BaseEvalConfig, None, ["--out=s3://bucket/run"])


def test_a_run_owns_its_place_and_goes_on_from_it_in_another_directory(tmp_path):
    def launch(out: str, **settings: Any) -> Any:
        config = PretrainConfig(out=str(tmp_path / out), checkpoints=settings.pop("checkpoints", URL), **settings)
        return open_run(config.out, stage="pretrain", config=config, plan={}, may_change=("workers",))

    with launch("first", depth=4) as run:
        assert run.checkpoints == URL
        save(5, run.checkpoints)
    assert read_run(tmp_path / "first").checkpoints == URL
    checkpoint = open_checkpoint(tmp_path / "first")
    assert str(checkpoint) == f"{URL}/step_000005"
    assert checkpoint.report_path("base-eval") == tmp_path / "first" / "base-eval" / "step_000005"
    with launch("first", depth=4):
        pass
    with launch("its machine is gone", depth=4) as run:
        found = latest_checkpoint(run.checkpoints)
        assert found is not None and found.step == 5
    with pytest.raises(ValueError, match=f"{URL} holds the checkpoints of another run.*--checkpoints="), launch("b"):
        pass
    moved = pytest.raises(ValueError, match=f"checkpoints was '{URL}' and is now None")
    with moved, launch("first", depth=4, checkpoints=None):
        pass


def test_a_place_with_checkpoints_of_nobody_known_is_not_taken(tmp_path):
    save(5)
    config = PretrainConfig(out=str(tmp_path / "run"), checkpoints=URL)
    with pytest.raises(ValueError, match="unknown run"), open_run(config.out, stage="pretrain", config=config, plan={}):
        pass
    assert names() == ["step_000005"]


def test_a_place_may_be_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PretrainConfig(out="run", checkpoints="big/disk")
    with open_run(config.out, stage="pretrain", config=config, plan={}) as run:
        assert run.checkpoints == str(tmp_path / "big" / "disk")
        save(5, run.checkpoints)
    monkeypatch.chdir(tmp_path / "big")
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.path == tmp_path / "big" / "disk" / "step_000005"
