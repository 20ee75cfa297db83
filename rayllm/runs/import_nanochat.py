"""The `import-nanochat` stage: nanochat's checkpoint files become a checkpoint and tokenizer of ours.

No code from a file runs: weights are read by torch's weights-only loader, and the pickled tokenizer by an
unpickler that knows a single, inert class.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.config.schema import ImportNanochatConfig
from rayllm.model.config import GPTConfig
from rayllm.optim.scaling import count_parameters
from rayllm.runs.checkpoint import check_tensor_shapes, save_checkpoint
from rayllm.runs.run_dir import open_run
from rayllm.text.tokenizer import SPECIAL_TOKENS, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# nanochat's names of the architecture's fields, and ours.
_FIELDS = {
    "sequence_len": "sequence_len",
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "n_embd": "d_model",
    "window_pattern": "window_pattern",
}
_KINDS = {int: "a whole number", str: "text"}


def describe_plan(config: ImportNanochatConfig) -> dict[str, object]:
    """What would be read and written, for `--dry-run`; starts no torch. Where there is no source yet, that is told."""
    writes = f"{config.out}/checkpoints"
    if not Path(config.source).is_dir():
        return {"source": f"none at {config.source} yet: sizes depend on it", "writes": writes}
    source, step, model = _find_source(config)
    num_parameters = count_parameters(model).total
    size = _existing(source / f"model_{step:06d}.pt").stat().st_size
    return {
        "source": f"{source}, step {step}, {size / 2**30:.2f} GiB",
        "model": f"{model.num_layers} layers, width {model.d_model}, vocabulary {model.vocab_size:,}",
        "parameters": f"{num_parameters:,}",
        "writes": f"{writes}, {4 * num_parameters / 2**30:.2f} GiB of float32 weights",
        "memory": f"{(size + 4 * num_parameters) / 2**30:.2f} GiB: what is read and what is written",
    }


def run(config: ImportNanochatConfig) -> None:
    """Read `config.source`, write `config.out`; ValueError or FileNotFoundError names what does not fit."""
    source, step, model_config = _find_source(config)
    tokenizer = read_tokenizer(_existing(source / "tokenizer.pkl"))
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"{source}/tokenizer.pkl has {tokenizer.vocab_size} tokens, the model only {model_config.vocab_size}: "
            "copy the tokenizer that this model was trained with"
        )
    weights = read_weights(_existing(source / f"model_{step:06d}.pt"), model_config)
    plan: dict[str, object] = {"step": step, "model": model_config.to_dict()}
    with open_run(config.out, stage="import-nanochat", config=config, plan=plan) as run_dir:
        path = save_checkpoint(
            run_dir.path / "checkpoints",
            step,
            model_state=weights,
            optimizer_state=None,
            state={
                "stage": "imported",
                "source_stage": _source_stage(source),
                "model": model_config.to_dict(),
                "tokenizer_fingerprint": tokenizer.fingerprint,
            },
            tokenizer=tokenizer,
            keep=1,
        )
    print(f"import-nanochat: {sum(w.numel() for w in weights.values()):,} parameters of step {step}", file=sys.stderr)
    print(path)


def _find_source(config: ImportNanochatConfig) -> tuple[Path, int, GPTConfig]:
    """The directory, the step to import, and the architecture it has there."""
    source = Path(config.source)
    if not config.source or not source.is_dir():
        raise FileNotFoundError(
            f"source={config.source!r} is not a directory: give one with model_*.pt, meta_*.json and tokenizer.pkl"
        )
    step = _newest_step(source) if config.step is None else config.step
    return source, step, read_model_config(_existing(source / f"meta_{step:06d}.json"))


def read_model_config(path: Path) -> GPTConfig:
    """The architecture in a meta file; checkpoints from before sliding windows have full ones."""
    try:
        raw = json.loads(path.read_bytes())["model_config"]
        raw = {"window_pattern": "L", **raw}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object with a model_config: is this a nanochat checkpoint?") from error
    if raw.keys() != _FIELDS.keys():
        raise ValueError(f"{path}: model_config must have the fields {sorted(_FIELDS)}, got {sorted(raw)}")
    for name, value in raw.items():
        kind = str if name == "window_pattern" else int
        if type(value) is not kind:
            raise ValueError(f"{path}: model_config.{name} must be {_KINDS[kind]}, got {json.dumps(value)}")
    raw["window_pattern"] = raw["window_pattern"].upper()
    try:
        return GPTConfig(**{ours: raw[theirs] for theirs, ours in _FIELDS.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(path: Path, config: GPTConfig) -> dict[str, Tensor]:
    """The state dict of a model file as float32, under our (the same) names."""
    import torch
    from torch import Tensor

    from rayllm.model.gpt import GPT

    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for what is no file of weights torch raises whatever its bytes lead to
        raise ValueError(f"{path} is no plain file of weights: {str(error) or type(error).__name__}") from error
    if not isinstance(raw, dict) or not all(isinstance(n, str) and isinstance(w, Tensor) for n, w in raw.items()):
        raise ValueError(f"{path} is no plain file of weights: it must hold a dict of names to tensors")
    weights = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in raw.items()}
    # Checkpoints from before these scalars behave as if they were there with these values.
    weights.setdefault("resid_lambdas", torch.ones(config.num_layers))
    weights.setdefault("x0_lambdas", torch.zeros(config.num_layers))
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    check_tensor_shapes(weights, expected, path)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(
                f"{path}: {name} has values that are no numbers: take a checkpoint from before it diverged"
            )
    return weights


class _Encoding:
    """Stands in for tiktoken.Encoding while unpickling: keeps its state, does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Refuses every name in the file but tiktoken's Encoding, which becomes the inert class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only a tiktoken Encoding is expected")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a pickled tiktoken Encoding; ValueError when it is anything else."""
    try:
        encoding = _EncodingUnpickler(io.BytesIO(path.read_bytes())).load()
        ranks, special_ids = encoding.state["mergeable_ranks"], encoding.state["special_tokens"]
        special_tokens = tuple(sorted(special_ids, key=special_ids.__getitem__))
        if [special_ids[name] for name in special_tokens] != list(range(len(ranks), len(ranks) + len(special_ids))):
            raise ValueError(f"the ids of its special tokens do not follow those of its {len(ranks)} merges")
        if SPECIAL_TOKENS[0] not in special_tokens:
            raise ValueError(f"it has no {SPECIAL_TOKENS[0]}, with which every document begins")
        return Tokenizer(ranks=ranks, pattern=encoding.state["pat_str"], special_tokens=special_tokens)
    except Exception as error:  # for what is no pickle Python raises whatever its bytes lead to
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is no pickled tiktoken Encoding of nanochat's: {reason}") from error


def _source_stage(source: Path) -> str | None:
    """Which stage made it, as nanochat's folder of folders says; None where it lies elsewhere."""
    stages = {"base_checkpoints": "base", "chatsft_checkpoints": "sft", "chatrl_checkpoints": "rl"}
    return stages.get(source.resolve().parent.name)


def _newest_step(source: Path) -> int:
    steps = [int(m[1]) for p in source.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))]
    if not steps:
        raise FileNotFoundError(f"{source} holds no model_*.pt: give a nanochat checkpoint directory")
    return max(steps)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it needs model_*.pt, meta_*.json and tokenizer.pkl")
    return path
