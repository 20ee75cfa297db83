from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rayllm.data import shards as shards_module
from rayllm.data.shards import Manifest, ShardEntry, ShardWriter, TokenShards, token_dtype

BOS = 99


def write(directory: Path, documents: dict[str, list[list[int]]], *, vocab_size: int = 100) -> Path:
    """A directory of shards, one piece, documents given by split."""
    entries: list[ShardEntry] = []
    for split in ("train", "val"):
        writer = ShardWriter(directory, split, piece_idx=3, piece="book.txt", vocab_size=vocab_size, bos_id=BOS)  # type: ignore[arg-type]
        for document in documents.get(split, []):
            writer.add(document)
        entries += writer.close()
    manifest = Manifest(
        tokenizer_fingerprint="abc",
        vocab_size=vocab_size,
        bos_id=BOS,
        validation={"kind": "hash", "fraction": 0.1},
        pieces=({"name": "book.txt", "num_bytes": 10},),
        shards=tuple(entries),
        skipped={"empty": 2},
    )
    manifest.save(directory)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(tmp_path / "shards", {"train": [[1, 2, 3], [4], [5, 6]], "val": [[7, 8]]})


def test_round_trip(directory: Path) -> None:
    shards = TokenShards.load(directory)
    shards.verify()
    train = shards.split("train")
    assert (train.num_documents, train.num_tokens, shards.num_tokens("val")) == (3, 9, 3)
    assert [train.tokens(idx).tolist() for idx in range(3)] == [[BOS, 1, 2, 3], [BOS, 4], [BOS, 5, 6]]
    assert train.tokens(0, 2, 2).tolist() == [2, 3]
    assert train.tokens(0, 1, 0).tolist() == []
    assert train.shards[0].lengths.tolist() == [4, 2, 3]
    assert shards.split("val").tokens(0).tolist() == [BOS, 7, 8]
    assert (shards.tokenizer_fingerprint, shards.vocab_size) == ("abc", 100)
    assert shards.manifest.validation == {"kind": "hash", "fraction": 0.1} and shards.manifest.skipped == {"empty": 2}
    assert isinstance(train.shards[0].tokens, np.memmap)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_tokens_take_the_smallest_type_that_holds_the_vocabulary(
    tmp_path: Path, vocab_size: int, dtype: type[np.unsignedinteger]
) -> None:
    last = vocab_size - 1
    shards = TokenShards.load(write(tmp_path, {"train": [[last, 0]]}, vocab_size=vocab_size))
    assert token_dtype(vocab_size) == dtype
    assert shards.split("train").shards[0].tokens.dtype == dtype
    assert shards.split("train").tokens(0).tolist() == [BOS, last, 0]


def test_a_token_outside_of_the_type_is_never_wrapped_round(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", piece_idx=0, piece="x", vocab_size=100, bos_id=BOS)
    with pytest.raises(OverflowError):
        writer.add([65536])


def test_long_pieces_are_written_as_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_TOKENS_PER_SHARD", 5)  # a setting: the real one takes 128 MiB
    documents = [[idx] * 2 for idx in range(5)]
    shards = TokenShards.load(write(tmp_path, {"train": documents}))
    assert [entry.file for entry in shards.manifest.shards] == [f"train/000003-{part:03d}.npy" for part in range(3)]
    train = shards.split("train")
    assert [train.tokens(idx).tolist()[1:] for idx in range(5)] == documents


def test_the_same_documents_give_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again", {"train": [[1, 2, 3], [4], [5, 6]], "val": [[7, 8]]})
    for name in ("manifest.json", "train/000003-000.npy", "val/000003-000.npy"):
        assert (directory / name).read_bytes() == (again / name).read_bytes()


def test_a_directory_without_manifest_is_unfinished(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="run `rayllm tokenize"):
        TokenShards.load(directory)


def edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:-40]),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[]"),
        edit(lambda raw: raw.pop("bos_id")),
        edit(lambda raw: raw.update(format_version=2)),
        edit(lambda raw: raw["shards"][0].pop("sha256")),
    ],
)
def test_a_damaged_manifest_is_named(directory: Path, damage: Callable[[Path], object]) -> None:
    damage(directory / "manifest.json")
    with pytest.raises(ValueError, match="manifest.json cannot be read .*run `rayllm tokenize` again"):
        TokenShards.load(directory)


def test_a_missing_or_cut_shard_is_named_on_loading(directory: Path) -> None:
    shard = directory / "train/000003-000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="000003-000.npy is damaged: expected 146 bytes, found 144"):
        TokenShards.load(directory)
    shard.unlink()
    with pytest.raises(ValueError, match="train/000003-000.npy is damaged: missing"):
        TokenShards.load(directory)


def test_a_flipped_bit_is_found_by_verify(directory: Path) -> None:
    shard = directory / "val/000003-000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="val/000003-000.npy is damaged: its checksum differs"):
        TokenShards.load(directory).verify()
    with pytest.raises(ValueError, match="val/000003-000.npy is damaged: its checksum differs"):
        TokenShards.load(directory).verify("val")
    TokenShards.load(directory).verify("train")


def test_shards_that_are_not_what_the_manifest_says_are_refused_when_read(directory: Path) -> None:
    shard = directory / "train/000003-000.npy"
    healthy = shard.read_bytes()

    shard.write_bytes(healthy[:128] + bytes(2) + healthy[130:])  # the first BOS gone
    with pytest.raises(ValueError, match="expected 3 documents, found 2"):
        TokenShards.load(directory).split("train").tokens(0)

    shard.write_bytes(healthy.replace(b"<u2", b"<i2"))
    with pytest.raises(ValueError, match="expected 9 uint16, found int16"):
        TokenShards.load(directory).split("train").tokens(0)

    shard.write_bytes(b"\x93NUMPX" + healthy[6:])
    with pytest.raises(ValueError, match="is damaged"):
        TokenShards.load(directory).split("train").tokens(0)


FILL = """
import resource, sys
from pathlib import Path
from rayllm.data.shards import ShardWriter
writer = ShardWriter(Path(sys.argv[1]), "train", piece_idx=0, piece="x", vocab_size=100, bos_id=99)
writer.add([1] * 100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    writer.close()
except OSError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk: the write fails half-way all the same."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert "could not write" in done.stdout and str(tmp_path / "train/000000-000.npy") in done.stdout, done
    assert list((tmp_path / "train").iterdir()) == []


def test_many_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_TOKENS_PER_SHARD", 1)
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 8)
    shards = TokenShards.load(write(tmp_path, {"train": [[idx % 90] for idx in range(100)]}))
    train = shards.split("train")
    assert [train.tokens(idx)[1] for idx in range(100)] == [idx % 90 for idx in range(100)]
    assert shards.map_tokens.cache_info().currsize == 8


def test_manifest_round_trip(directory: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(directory)
    dataclasses.replace(manifest, bos_id=7).save(tmp_path)
    assert Manifest.load(tmp_path) == dataclasses.replace(manifest, bos_id=7)
