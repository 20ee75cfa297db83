"""Settings are checked however they are made: from a recipe, or in code."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pkgutil import resolve_name
from typing import Any

import pytest

from rayllm.cli import STAGES
from rayllm.config.chat_schema import SFTConfig, TaskConfig
from rayllm.config.frozen import annotations_of, build
from rayllm.config.load import to_dict
from rayllm.config.schema import Horizon, ModelConfig, PretrainConfig, SamplingConfig, TrackingConfig


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_defaults_fit_their_fields(stage: Any) -> None:
    schema = resolve_name(stage.schema)
    assert build(schema, to_dict(schema())) == schema()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -3}, "top_k: got -3, expected integer > 0 or null"),
        ({"top_k": True}, "top_k: got True, expected integer > 0 or null"),
        ({"top_k": 1.5}, "top_k: got 1.5, expected integer > 0 or null"),
        ({"top_k": "5"}, "top_k: got '5', expected integer > 0 or null"),
        ({"top_p": 1.01}, "top_p: got 1.01, expected number > 0 <= 1 or null"),
        ({"temperature": math.nan}, "temperature: got nan, expected number >= 0"),
        ({"temperature": math.inf}, "temperature: got inf, expected number >= 0"),
        ({"temperature": 10**400}, "temperature: got 1000"),
        ({"temperature": None}, "temperature: got None, expected number >= 0"),
        ({"stop": "ab"}, "stop: got 'ab', expected list of text"),
        ({"stop": ["a", ""]}, r"stop\.1: got '', expected text"),
    ],
)
def test_settings_in_code_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SamplingConfig(), **settings)


def test_a_whole_text_matches_a_pattern() -> None:
    assert ModelConfig(window_pattern="SL").window_pattern == "SL"
    for pattern in ("", "SX", "SL\n"):
        with pytest.raises(ValueError, match="window_pattern"):
            ModelConfig(window_pattern=pattern)


def test_what_stands_for_a_value_becomes_it() -> None:
    horizon = Horizon(kind="steps", value=8)
    assert type(horizon.value) is float
    tracking = TrackingConfig(sinks=["wandb"])  # type: ignore[arg-type]
    assert tracking.sinks == ("wandb",)
    tasks = SFTConfig(tasks=[{"name": "gsm8k"}, TaskConfig(epochs=3)]).tasks  # type: ignore[arg-type,list-item]
    assert tasks == (TaskConfig(name="gsm8k"), TaskConfig(epochs=3))


def test_a_misfit_deep_in_a_tree_is_named() -> None:
    with pytest.raises(ValueError, match=r"tasks\.1\.epochs: got 0, expected integer > 0"):
        build(SFTConfig, {"tasks": [{}, {"epochs": 0}]})
    with pytest.raises(ValueError, match=r"model\.width: there is no such key"):
        build(PretrainConfig, {"model": {"width": 3}})
    with pytest.raises(ValueError, match="model: got 3, expected group of keys"):
        PretrainConfig(model=3)  # type: ignore[arg-type]


def test_trees_are_frozen_hashable_and_travel() -> None:
    task = TaskConfig(name="gsm8k")
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "word_problems"  # type: ignore[misc]
    assert {task: 1}[TaskConfig(name="gsm8k")] == 1
    config = PretrainConfig(depth=3)
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301
    assert list(annotations_of(Horizon)) == ["kind", "value"]
