"""Every recipe parses with its stage's schema, and recipes are found by path, name and folder."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

from rayllm.cli import STAGES
from rayllm.config.fields import list_fields
from rayllm.config.load import ConfigError, load_config
from rayllm.config.recipes import RECIPES_ROOT, find_recipe, list_recipes, recipe_stem
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import PretrainConfig, TokenizerConfig

SCHEMAS = {stage.name.replace("-", "_"): resolve_name(stage.schema) for stage in STAGES}
RECIPES = sorted(RECIPES_ROOT.rglob("*.y*ml"))


def test_there_are_recipes() -> None:
    assert {"laptop/pretrain.yaml", "laptop/sample.yaml"} <= {p.relative_to(RECIPES_ROOT).as_posix() for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(RECIPES_ROOT).as_posix())
def test_recipe_parses_with_its_stage(path: Path) -> None:
    assert path.stem in SCHEMAS, f"{path.name} is named after no stage: {', '.join(SCHEMAS)}"
    load_config(SCHEMAS[path.stem], str(path))
    opening = path.read_text(encoding="utf-8").partition("\n\n")[0]
    for word in ("# ", "Hardware:", "Time:", "Result:", f"rayllm {path.stem.replace('_', '-')} "):
        assert word in opening, f"{path} must open with a comment that has {word!r}"


def test_the_guide_to_rl_names_keys_that_there_are() -> None:
    guide = (RECIPES_ROOT.parent / "docs" / "rl.md").read_text(encoding="utf-8")
    groups = "loss|guard|rollouts|learners|optim|validation|tracking"
    named = set(re.findall(rf"\b((?:{groups})\.[a-z_]+)\b", guide))
    assert len(named) > 20 and named <= set(list_fields(RLConfig)), named - set(list_fields(RLConfig))


def test_schemas_are_named_after_their_stage() -> None:
    assert {stem: recipe_stem(schema) for stem, schema in SCHEMAS.items()} == {stem: stem for stem in SCHEMAS}


@pytest.mark.parametrize("name", ["laptop", "laptop/pretrain", "laptop/pretrain.yaml", str(RECIPES_ROOT / "laptop")])
def test_packaged_recipes_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name, "pretrain") == RECIPES_ROOT / "laptop" / "pretrain.yaml"
    assert load_config(PretrainConfig, name).out == "runs/laptop/base"


def test_local_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("laptop/pretrain.yaml", "mine.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("depth: 2\n")
    assert load_config(PretrainConfig, "laptop").depth == 2
    assert load_config(PretrainConfig, "mine").depth == 2
    assert load_config(PretrainConfig, "mine.yaml").depth == 2


def test_a_local_folder_without_the_stage_hides_no_packaged_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("laptop").mkdir()
    assert find_recipe("laptop", "tokenizer") == RECIPES_ROOT / "laptop" / "tokenizer.yaml"


def test_not_found_lists_the_recipes_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    there = ", ".join(list_recipes("tokenizer"))
    with pytest.raises(ConfigError) as caught:
        load_config(TokenizerConfig, "labtop")
    assert str(caught.value) == (
        f"recipe 'labtop' not found; did you mean laptop? the recipes for this stage are: {there}; "
        "or give the path of a YAML file"
    )
    with pytest.raises(ConfigError, match=r"recipe 'empty' not found \(the folder has no tokenizer.yaml\)"):
        load_config(TokenizerConfig, "empty")
    with pytest.raises(ConfigError, match="recipe '' not found"):
        load_config(TokenizerConfig, "")
    with pytest.raises(ConfigError, match="this stage has no packaged recipe"):
        find_recipe("laptop", "import_nanochat")
