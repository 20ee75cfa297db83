"""Help shows every field's path, type, default and docstring, as wide as asked."""

from __future__ import annotations

import re
from pkgutil import resolve_name

import pytest

from rayllm.cli import STAGES
from rayllm.config import chat_schema
from rayllm.config.chat_schema import SFTConfig
from rayllm.config.fields import list_fields
from rayllm.config.help import render_stage_help
from rayllm.config.schema import BaseEvalConfig, PretrainConfig, TokenizerConfig

CHAT_SCHEMAS = [
    value for name, value in vars(chat_schema).items() if value.__class__ is type and name.endswith("Config")
]
SCHEMAS = list(dict.fromkeys([resolve_name(stage.schema) for stage in STAGES] + CHAT_SCHEMAS))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_is_there_with_its_docstring(schema: type) -> None:
    page = render_stage_help(schema, "rayllm x", width=80, color=False)
    words = " ".join(page.split())
    for field in list_fields(schema).values():
        assert field.doc, f"{schema.__name__}.{field.key} needs a docstring"
        assert " ".join(field.doc.split()) in words
        assert (f"{field.key}:" if field.is_group else f"--{field.key} ") in words
    assert max(map(len, page.splitlines())) <= 80
    assert "\033" not in page


def test_types_and_defaults_in_words() -> None:
    words = " ".join(render_stage_help(PretrainConfig, "rayllm x", width=100, color=False).split())
    assert "--tokens_per_step integer > 0 or auto; default: auto" in words
    assert "--eval_every integer > 0 or null; default: 250" in words
    assert "--optim.warmdown_ratio number from 0 to 1; default: 0.65" in words
    assert "--tracking.sinks list of wandb, tensorboard or mlflow; default: []" in words
    words = " ".join(render_stage_help(TokenizerConfig, "rayllm x", width=100, color=False).split())
    assert "--vocab_size integer from 265 to 1048576; default: 32768" in words
    assert "Recipes for this stage: laptop" in words


def test_the_keys_of_an_item_stand_below_its_list() -> None:
    words = " ".join(render_stage_help(SFTConfig, "rayllm x", width=100, color=False).split())
    assert (
        "--validation list of groups; default: [{name: word_problems, split: validation, num_examples: 200, "
        "max_level: 2, seed: 0, epochs: 1}] Conversations held out, for the validation loss. validation.0: A task:"
    ) in words
    assert (
        "This is the first item; validation.1 and so on have the same keys. --validation.0.name word_problems," in words
    )
    assert "--validation.0.split train, validation, test or test_unseen; default: validation" in words
    assert "--tasks.0.split train, validation, test or test_unseen; default: train" in words


def test_a_groups_default_is_the_stages_own() -> None:
    assert list_fields(BaseEvalConfig)["sampling.max_tokens"].default == 48


def test_color_only_adds_escapes() -> None:
    plain, colored = (render_stage_help(PretrainConfig, "rayllm x", width=90, color=c) for c in (False, True))
    assert plain != colored
    assert re.sub(r"\033\[\d+m", "", colored) == plain
