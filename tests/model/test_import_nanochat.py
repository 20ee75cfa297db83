"""Importing checkpoints of other shapes, and refusing what is no checkpoint; nothing in a file is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import rayllm
from rayllm.config.schema import ImportNanochatConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.runs import import_nanochat

REFERENCE = Path(__file__).parents[1] / "parity" / "mha"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE, tmp_path / "source"))


def run_import(source: Path, **settings) -> Path:
    out = source.parent / "imported"
    import_nanochat.run(ImportNanochatConfig(source=str(source), out=str(out), **settings))
    return out


def write_checkpoint(source: Path, shape: GPTConfig, step: int = 7, **weights: torch.Tensor) -> GPT:
    """A checkpoint in nanochat's format with random weights, as a compiled bfloat16-embedding run leaves it."""
    model = GPT(shape)
    model.init_weights(step)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(step)) * 0.1)
    state = {f"_orig_mod.{name}": tensor for name, tensor in {**model.state_dict(), **weights}.items()}
    torch.save(state, source / f"model_{step:06d}.pt")
    fields = {theirs: getattr(shape, ours) for theirs, ours in import_nanochat._FIELDS.items()}
    (source / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": fields}))
    return model.eval()


@pytest.mark.parametrize(
    "shape",
    [
        GPTConfig(128, 379, num_layers=3, num_heads=4, num_kv_heads=2, d_model=64, window_pattern="SL"),
        GPTConfig(64, 379, num_layers=1, num_heads=2, num_kv_heads=1, d_model=48, window_pattern="L"),
        GPTConfig(300, 384, num_layers=5, num_heads=3, num_kv_heads=3, d_model=96, window_pattern="SSSL"),
    ],
)
def test_other_shapes_arrive_whole(source, shape) -> None:
    original = write_checkpoint(source, shape)
    model, tokenizer = rayllm.load(run_import(source))
    assert model.config == shape
    tokens_BT = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("She has 12 pens.")]])
    assert torch.equal(model(tokens_BT), original(tokens_BT))


def test_a_named_step_and_dtype(source) -> None:
    write_checkpoint(source, GPTConfig(64, 379, 1, 2, 2, 48), step=7)
    model, _ = rayllm.load(run_import(source, step=0), dtype="bfloat16")
    assert model.config.vocab_size == 400
    assert model.lm_head.weight.dtype == torch.bfloat16


class _Bomb:
    """Unpickling this the plain way would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused(source, tmp_path) -> None:
    marker = tmp_path / "executed"
    (source / "tokenizer.pkl").write_bytes(pickle.dumps(_Bomb(marker)))
    with pytest.raises(ValueError, match=r"no pickled tiktoken Encoding of nanochat.s: it names posix\.mkdir"):
        run_import(source)
    shutil.copy(REFERENCE / "tokenizer.pkl", source)
    torch.save({"wte": _Bomb(marker)}, source / "model_000000.pt")
    with pytest.raises(ValueError, match="no plain file of weights"):
        run_import(source)
    assert not marker.exists()
    assert not (source.parent / "imported").exists(), "nothing is written for a source that is refused"


@pytest.mark.parametrize("name", ["meta_000000.json", "tokenizer.pkl"])
def test_a_missing_file_is_named(source, name) -> None:
    (source / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        run_import(source)


def test_a_folder_without_a_checkpoint_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model_\*\.pt"):
        run_import(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        run_import(tmp_path / "nowhere")


def test_half_a_file_is_refused(source) -> None:
    path = source / "model_000000.pt"
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"model_000000\.pt is no plain file of weights"):
        run_import(source)


def rewrite_config(source: Path, **fields: object) -> None:
    path = source / "meta_000000.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "model_config": {**meta["model_config"], **fields}}))


@pytest.mark.parametrize("content", [b"", b'{"step": 0, "model_con', b"[1]", b"\xff\xfe\x00", b'{"model_config": 3}'])
def test_a_meta_file_that_is_none_is_named(source, content) -> None:
    (source / "meta_000000.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"meta_000000\.json holds no JSON object with a model_config"):
        run_import(source)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("n_layer", "4", 'n_layer must be a whole number, got "4"'),
        ("n_layer", 4.0, r"n_layer must be a whole number, got 4\.0"),
        ("n_head", None, "n_head must be a whole number, got null"),
        ("n_kv_head", True, "n_kv_head must be a whole number, got true"),
        ("window_pattern", 3, "window_pattern must be text, got 3"),
        ("window_pattern", "SX", "window_pattern is made of S and L"),
        ("n_kv_head", 3, "num_kv_heads must divide num_heads"),
        ("rope_base", 3, "must have the fields"),
        ("sequence_len", 10**12, "sequence_len is at most 16,777,216"),
    ],
)
def test_an_impossible_model_config_is_named_with_its_file(source, field, value, reason) -> None:
    rewrite_config(source, **{field: value})
    with pytest.raises(ValueError, match=rf"meta_000000\.json: .*{reason}"):
        run_import(source)


def test_windows_may_be_written_small(source) -> None:
    rewrite_config(source, window_pattern="sssl")
    model, _ = rayllm.load(run_import(source))
    assert model.config.window_pattern == "SSSL"


@pytest.mark.parametrize(
    "content", [b"", b"hello", [1, 2], {"lm_head.weight": 3}, {0: torch.zeros(1)}], ids=["empty", "text", *"123"]
)
def test_a_model_file_that_is_none_is_named(source, content) -> None:
    path = source / "model_000000.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"model_000000\.pt is no plain file of weights: \w"):
        run_import(source)


def write_encoding(source: Path, **changes: object) -> None:
    """A pickle of nanochat's tokenizer with parts of it replaced by what tiktoken itself would refuse to hold."""
    state = pickle.loads((source / "tokenizer.pkl").read_bytes()).__getstate__()  # noqa: S301, our own file
    body = pickle.dumps({**state, **changes}, protocol=3)[2:-1]
    (source / "tokenizer.pkl").write_bytes(b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + body + b"b.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pat_str": "((("}, "Opening parenthesis"),
        ({"pat_str": 5}, "int"),
        ({"mergeable_ranks": {b"a": 0}, "special_tokens": {"<|bos|>": 1}}, "must hold every single byte"),
        ({"special_tokens": {}}, r"it has no <\|bos\|>"),
        ({"special_tokens": {"<|bos|>": 999}}, "do not follow"),
        ({"mergeable_ranks": 3}, "int"),
    ],
)
def test_a_tokenizer_that_is_none_is_named(source, changes, reason) -> None:
    write_encoding(source, **changes)
    with pytest.raises(ValueError, match=rf"tokenizer\.pkl is no pickled tiktoken Encoding of nanochat's: .*{reason}"):
        run_import(source)


def test_weights_of_another_shape_are_named(source) -> None:
    shape = GPTConfig(64, 379, 1, 2, 2, 48)
    write_checkpoint(source, shape, **{"lm_head.weight": torch.zeros(384, 47)})
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        run_import(source)


def test_weights_that_are_no_numbers_are_named(source) -> None:
    write_checkpoint(source, GPTConfig(64, 379, 1, 2, 2, 48), **{"lm_head.weight": torch.full((384, 48), torch.nan)})
    with pytest.raises(ValueError, match=r"lm_head\.weight has values that are no numbers"):
        run_import(source)


def test_a_tokenizer_larger_than_the_model_is_refused(source) -> None:
    write_checkpoint(source, GPTConfig(64, 200, 1, 2, 2, 48))
    with pytest.raises(ValueError, match="has 379 tokens, the model only 200"):
        run_import(source)
