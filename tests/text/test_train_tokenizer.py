from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayllm.config.schema import TokenizerConfig
from rayllm.text.compare import load_references
from rayllm.text.tokenizer import Tokenizer
from rayllm.text.train import describe_plan, run


@pytest.fixture
def config(tmp_path: Path, small_documents: list[str], monkeypatch: pytest.MonkeyPatch) -> TokenizerConfig:
    monkeypatch.delenv("RAYLLM_DATA_DIR", raising=False)  # no rank files to load
    source = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": document}) for document in small_documents]
    source.write_text("\n".join([*lines, "no json", '{"text": 5}']) + "\n", encoding="utf-8")
    return TokenizerConfig(out=str(tmp_path / "out"), sources=(str(source),), vocab_size=320)


def changed(config: TokenizerConfig, **fields: object) -> TokenizerConfig:
    return TokenizerConfig(**{**vars(config), **fields})  # type: ignore[arg-type]


def read_report(config: TokenizerConfig) -> dict:
    return json.loads(Path(config.out, "report.json").read_text())


def test_the_stage_leaves_a_tokenizer_and_a_report(
    config: TokenizerConfig, small_tokenizer: Tokenizer, small_documents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(config)
    assert Tokenizer.load(config.out).fingerprint == small_tokenizer.fingerprint
    report = read_report(config)
    assert report["vocab_size"] == 320
    assert report["num_documents"] == len(small_documents)
    assert report["num_chars"] == sum(map(len, small_documents))
    assert (report["skipped"]["not_json"], report["skipped"]["no_text"]) == (1, 1)
    ratios = report["comparison"]["bytes_per_token"]
    assert ratios["training text"]["ours"] > ratios["korean"]["ours"]
    said = capsys.readouterr()
    assert "bytes per token" in said.out
    assert "skipped 2 documents: 1 not json, 1 no text" in said.err
    metrics = json.loads(Path(config.out, "metrics.jsonl").read_text())
    assert metrics["bytes_per_token/news"] == pytest.approx(ratios["news"]["ours"], abs=1e-4)


def test_caps_bound_what_is_read(config: TokenizerConfig) -> None:
    run(changed(config, max_chars=1000, max_chars_per_document=300, vocab_size=270))
    report = read_report(config)
    assert report["num_chars"] == 1000
    assert (report["num_documents"], report["num_cut_documents"]) == (4, 4)


def test_the_same_recipe_again_makes_the_same_tokenizer(config: TokenizerConfig) -> None:
    run(config)
    first = Tokenizer.load(config.out).fingerprint
    run(config)
    assert Tokenizer.load(config.out).fingerprint == first
    assert len(Path(config.out, "metrics.jsonl").read_text().splitlines()) == 1


def test_another_recipe_does_not_touch_a_finished_tokenizer(config: TokenizerConfig) -> None:
    run(config)
    first = Tokenizer.load(config.out).fingerprint
    with pytest.raises(ValueError, match="holds a run of another recipe: vocab_size was 320 and is now 300"):
        run(changed(config, vocab_size=300))
    assert Tokenizer.load(config.out).fingerprint == first


def test_too_much_vocabulary_can_be_corrected_in_place(config: TokenizerConfig) -> None:
    with pytest.raises(ValueError, match="hold merges for [0-9]+ only"):
        run(changed(config, vocab_size=5000))
    with pytest.raises(FileNotFoundError, match="rayllm tokenizer"):
        Tokenizer.load(config.out)
    run(config)
    assert Tokenizer.load(config.out).vocab_size == 320


def test_the_byte_level_tokenizer_needs_no_text(tmp_path: Path) -> None:
    config = TokenizerConfig(out=str(tmp_path / "out"), kind="byte")
    assert describe_plan(config) == {"vocabulary": "265 tokens: bytes and special tokens, no text is read"}
    run(config)
    assert Tokenizer.load(config.out).fingerprint == Tokenizer.byte_level().fingerprint
    assert read_report(config)["num_documents"] == 0


def test_the_plan_says_what_would_be_read(config: TokenizerConfig) -> None:
    plan = describe_plan(config)
    assert plan["vocabulary"] == "320 tokens"
    assert plan["text"] == "1 file, 1 piece"
    assert not Path(config.out).exists()


def test_missing_text_is_told_before_anything_is_written(tmp_path: Path) -> None:
    config = TokenizerConfig(out=str(tmp_path / "out"), sources=(str(tmp_path / "nothing.txt"),))
    for use in (run, describe_plan):
        with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
            use(config)
        with pytest.raises(ValueError, match="sources is empty"):
            use(changed(config, sources=()))
    assert not Path(config.out).exists()


def test_trains_on_real_text(real_text_dir: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(
        out=str(tmp_path / "out"), sources=("pretrain/tinystories_train.parquet",), vocab_size=1024, max_chars=1_000_000
    )
    run(config)
    ratios = read_report(config)["comparison"]["bytes_per_token"]
    assert set(ratios["news"]) == {"ours", *load_references()}
    assert ratios["training text"]["ours"] > 3
