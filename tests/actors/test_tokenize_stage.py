"""The `tokenize` stage on a real local Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.tokenize import describe_plan, run
from rayllm.config.schema import TokenizeConfig, ValidationSplit
from rayllm.data.shards import TokenShards
from rayllm.data.tokenizing import is_held_out, plan_jobs, tokenize_piece
from rayllm.text.tokenizer import SPLIT_PATTERN, Tokenizer

pytestmark = pytest.mark.usefixtures("ray_session")

STORIES = [f"Story {idx}. Once upon a time there were {idx} rays." for idx in range(40)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a byte tokenizer and text: parquet of five row groups, JSON lines with bad ones, a book."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYLLM_DATA_DIR", raising=False)
    Tokenizer.byte_level().save("tokenizer")
    Path("text").mkdir()
    pq.write_table(pa.table({"text": STORIES[:30]}), "text/a.parquet", row_group_size=6)
    lines = [json.dumps({"text": text}) for text in STORIES[30:]]
    Path("text/b.jsonl").write_text("\n".join([*lines, "no json", '{"text": ""}']) + "\n")
    Path("text/c.txt").write_text("A whole book.\n\nOf two paragraphs.")
    return tmp_path


def config(**changes: object) -> TokenizeConfig:
    settings: dict[str, object] = {
        "out": "shards",
        "tokenizer": "tokenizer",
        "sources": ("text",),
        "row_groups_per_shard": 2,
        "validation": ValidationSplit(fraction=0.25),
    }
    return TokenizeConfig(**settings | changes)  # type: ignore[arg-type]


def content(directory: str) -> dict[str, bytes]:
    """Every shard and the manifest, by path."""
    files = [*Path(directory).rglob("*.npy"), *Path(directory).glob("manifest.json")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_text_becomes_shards(capsys: pytest.CaptureFixture[str]) -> None:
    run(config())
    shards = TokenShards.load("shards")
    shards.verify()
    tokenizer = Tokenizer.load("tokenizer")
    assert (shards.tokenizer_fingerprint, shards.manifest.bos_id) == (tokenizer.fingerprint, tokenizer.bos_id)
    texts = {}
    for name in ("train", "val"):
        split = shards.split(name)  # type: ignore[arg-type]
        texts[name] = [tokenizer.decode(split.tokens(idx).tolist()[1:]) for idx in range(split.num_documents)]
    everything = [*STORIES, "A whole book.\n\nOf two paragraphs."]
    assert texts["val"] == [text for text in everything if is_held_out(text, 0.25)] != []
    assert texts["train"] == [text for text in everything if not is_held_out(text, 0.25)]
    assert shards.manifest.skipped == {"not_json": 1, "not_utf8": 0, "no_text": 0, "empty": 1}
    assert [piece["name"] for piece in shards.manifest.pieces] == [
        "text/a.parquet[0:2]", "text/a.parquet[2:4]", "text/a.parquet[4:5]", "text/b.jsonl", "text/c.txt",
    ]  # fmt: skip
    report = json.loads(Path("shards/report.json").read_text())
    assert report["train_documents"] + report["val_documents"] == 41
    assert report["bytes_per_token"] == 1.0 and report["tokens_per_s"] > 0
    assert "skipped 1 not_json, 1 empty" in capsys.readouterr().out


def test_shards_depend_on_text_recipe_and_tokenizer_alone(here: Path) -> None:
    """The tasks, which run in any order and on any worker, write what the plain function writes here."""
    run(config())
    for job in plan_jobs(config()):
        tokenize_piece(job, Tokenizer.load("tokenizer"), here / "alone")
    alone = content("alone")
    assert len(alone) > 5
    assert {name: raw for name, raw in content("shards").items() if name != "manifest.json"} == alone


def test_the_same_command_again_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(config())
    before = {path: path.stat().st_mtime_ns for path in Path("shards").rglob("*.npy")}
    capsys.readouterr()
    run(config())
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("shards").rglob("*.npy")} == before


def test_a_run_that_was_cut_off_is_done_again() -> None:
    run(config())
    whole = content("shards")
    Path("shards/manifest.json").unlink()
    Path("shards/train/000000-000.npy").write_bytes(b"half")
    Path("shards/train/.000001-000.npy.tmp-1").write_bytes(b"left behind")
    Path("shards/val/000099-000.npy").write_bytes(b"of no piece")
    run(config())
    assert content("shards") == whole
    assert not list(Path("shards").rglob(".*.npy*"))


def test_another_recipe_tokenizer_or_text_is_refused(here: Path) -> None:
    run(config())
    whole = content("shards")
    with pytest.raises(ValueError, match="row_groups_per_shard was 2 and is now 3"):
        run(config(row_groups_per_shard=3))
    with pytest.raises(ValueError, match=r"validation\.fraction was 0\.25 and is now 0\.5"):
        run(config(validation=ValidationSplit(fraction=0.5)))
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    Tokenizer(ranks, SPLIT_PATTERN).save("tokenizer")
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        run(config())
    Tokenizer.byte_level().save("tokenizer")
    (here / "text/d.txt").write_text("More text.")
    with pytest.raises(ValueError, match="the text in sources has changed"):
        run(config())
    assert content("shards") == whole


def test_sources_can_be_held_out_whole() -> None:
    run(config(validation=ValidationSplit(kind="sources", sources=("text/b.jsonl",))))
    shards = TokenShards.load("shards")
    assert (shards.split("train").num_documents, shards.split("val").num_documents) == (31, 10)
    assert {entry.piece for entry in shards.manifest.shards if entry.split == "val"} == {"text/b.jsonl"}


def test_text_that_a_task_cannot_read_is_one_clear_line(here: Path) -> None:
    (here / "text/d.txt").write_bytes(b"fine\n" * 30_000 + b"na\xefve")
    with pytest.raises(ValueError) as refusal:
        run(config())
    assert str(refusal.value).startswith(f"{here}/text/d.txt: not UTF-8 text (line 30001")
    assert "\n" not in str(refusal.value) and not Path("shards/manifest.json").exists()
    (here / "text/d.txt").unlink()
    run(config())
    TokenShards.load("shards").verify()


def test_a_disk_that_cannot_be_written_is_named(here: Path) -> None:
    run(config())
    (here / "shards/manifest.json").unlink()
    for path in sorted((here / "shards/train").iterdir()):
        path.unlink()
    (here / "shards/train").rmdir()
    (here / "shards/train").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="shards/train"):
        run(config())


def test_text_that_leaves_nothing_to_train_on_is_refused(here: Path) -> None:
    (here / "blank.jsonl").write_text('{"text": " "}\n' * 3)
    with pytest.raises(ValueError, match="no documents to train on: 0 held out, skipped 3 empty"):
        run(config(sources=("blank.jsonl",)))


def test_what_is_missing_is_found_before_anything_is_written() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(config(sources=("nowhere",)))
    with pytest.raises(FileNotFoundError):
        run(config(tokenizer="no_tokenizer"))
    assert not Path("shards").exists()


def test_the_plan_needs_no_ray(here: Path) -> None:
    plan = describe_plan(config(tokenizer="not_yet"))
    assert (plan["files"], plan["pieces (tasks)"]) == (3, 5)
    assert "none at not_yet yet" in str(plan["tokenizer"])
    code = (
        "import sys; from actors.tokenize import describe_plan; from rayllm.config.schema import TokenizeConfig; "
        f"describe_plan(TokenizeConfig(sources=({str(here / 'text')!r},))); "
        "assert not {'ray', 'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
