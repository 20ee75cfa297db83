"""The model that a recipe names, as far as it can be known without reading weights. Torch-free.

Where there is no checkpoint yet, the recipe that will make it tells its shape: that of the stage before, whose `out` is
where the checkpoint is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rayllm.config.chat_schema import SFTConfig
from rayllm.config.load import load_config
from rayllm.config.recipes import list_recipes, recipe_stem
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import PretrainConfig, TokenizerConfig
from rayllm.model.config import GPTConfig
from rayllm.optim.scaling import count_parameters, plan_model
from rayllm.plans.memory import gib
from rayllm.runs.checkpoint import peek_checkpoint
from rayllm.text.tokenizer import read_tokenizer_json

ConfigT = TypeVar("ConfigT")
DEFAULT_VOCAB_SIZE = TokenizerConfig().vocab_size


@dataclass(frozen=True)
class FoundModel:
    """A model's shape, where it is known, and what to tell of it."""

    config: GPTConfig | None
    lines: dict[str, object]


def find_model(place: str) -> FoundModel:
    """The model of the newest checkpoint at a path or URL, or else the one that a recipe would put there."""
    found = peek_checkpoint(place)
    if found is not None:
        address, manifest = found
        model = GPTConfig.from_dict(manifest.state["model"])
        size = manifest.files.get("model.safetensors", {}).get("size", 0)
        origin = f"{address}, step {manifest.step}, {gib(size)} of weights"
        return FoundModel(model, {"checkpoint": origin} | _describe(model))
    made = _model_to_be(place)
    if made is None:
        why = f"none at {place} yet, and no recipe of ours makes one there: sizes, memory and time depend on it"
        return FoundModel(None, {"checkpoint": why})
    model, maker = made
    return FoundModel(
        model, {"checkpoint": f"none at {place} yet; sizes are those of what {maker} makes"} | _describe(model)
    )


def find_vocab_size(tokenizer: str) -> tuple[int, str]:
    """Of the tokenizer at a path, or else of the one that a recipe would put there; and how it is known."""
    if Path(tokenizer).exists():
        return int(read_tokenizer_json(tokenizer)["vocab_size"]), tokenizer
    for command, recipe in _recipes("tokenizer", TokenizerConfig):
        if recipe.kind == "bpe" and _is_made_at(tokenizer, recipe.out):
            return recipe.vocab_size, f"as {command} makes it, as there is no tokenizer at {tokenizer} yet"
    return DEFAULT_VOCAB_SIZE, f"assumed, as there is no tokenizer at {tokenizer} yet"


def describe_shape(model: GPTConfig) -> str:
    """Layers, width, heads and windows on a line."""
    windows = "/".join(map(str, model.windows))
    return (
        f"{model.num_layers} layers, width {model.d_model}, {model.num_heads} heads of {model.head_dim} "
        f"({model.num_kv_heads} kv), windows {windows}"
    )


def _describe(model: GPTConfig) -> dict[str, object]:
    return {
        "model": describe_shape(model),
        "parameters": f"{count_parameters(model).total:,} (vocabulary {model.vocab_size:,})",
    }


def _model_to_be(place: str) -> tuple[GPTConfig, str] | None:
    """The shape of the model that will be at a place where there is none, and the command that makes it."""
    for command, recipe in _recipes("pretrain", PretrainConfig):
        if _is_made_at(place, recipe.out):
            return plan_model(recipe, find_vocab_size(recipe.data.tokenizer)[0]), command
    # These keep the shape of what they start from, which is itself not looked for at `place`.
    later: list[tuple[str, SFTConfig | RLConfig]] = [*_recipes("sft", SFTConfig), *_recipes("rl", RLConfig)]
    for command, tuned in later:
        if _is_made_at(place, tuned.out) and not _is_made_at(tuned.checkpoint, tuned.out):
            found = peek_checkpoint(tuned.checkpoint)
            if found is not None:
                return GPTConfig.from_dict(found[1].state["model"]), command
            if (made := _model_to_be(tuned.checkpoint)) is not None:
                return made[0], f"{made[1]}, then {command}"
    return None


def _recipes(stage: str, schema: type[ConfigT]) -> Iterator[tuple[str, ConfigT]]:
    """The packaged recipes of a stage, and its defaults, each with its command."""
    for name in list_recipes(recipe_stem(schema)):
        yield f"`rayllm {stage} {name}`", load_config(schema, name)
    yield f"`rayllm {stage}`", schema()


def _is_made_at(place: str, out: str) -> bool:
    """Whether a run in `out`, wherever that is relative to, is what a place names."""
    return f"/{place.rstrip('/')}".endswith(f"/{out}")
