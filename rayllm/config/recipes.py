"""Finding recipes: by path, or by name under the `configs` folder that is installed with the package."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from rayllm.config.errors import ConfigError

RECIPES_ROOT = Path(__file__).resolve().parents[2] / "configs"


def recipe_stem(schema: type) -> str:
    """The file name (without suffix) of a stage's recipes: `BaseEvalConfig` -> `base_eval`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", schema.__name__.removesuffix("Config")).lower()


def list_recipes(stem: str) -> list[str]:
    """Names of the packaged recipes of a stage, as the command line takes them."""
    paths = sorted(path.relative_to(RECIPES_ROOT) for path in RECIPES_ROOT.rglob(f"{stem}.yaml"))
    return [(path.parent if len(path.parts) > 1 else path.with_suffix("")).as_posix() for path in paths]


def find_recipe(recipe: str, stem: str) -> Path:
    """The file that RECIPE names for the stage `stem`.

    RECIPE is a file, a folder that holds `stem`.yaml, or either of them under the packaged configs, there with or
    without .yaml; a path that exists wins. Raises ConfigError listing the recipes there are.
    """
    for root in (Path(), RECIPES_ROOT):
        for candidate in (root / recipe, root / recipe / f"{stem}.yaml", root / f"{recipe}.yaml"):
            if recipe and candidate.is_file():
                return candidate
    names = list_recipes(stem)
    close = difflib.get_close_matches(recipe, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    there = f"the recipes for this stage are: {', '.join(names)}" if names else "this stage has no packaged recipe"
    folder = f" (the folder has no {stem}.yaml)" if Path(recipe).is_dir() and recipe else ""
    raise ConfigError(f"recipe {recipe!r} not found{folder}; {hint}{there}; or give the path of a YAML file")
