"""`rayllm STAGE --help`: every field's key, type, default and docstring, as wide as the terminal."""

from __future__ import annotations

import textwrap

from rayllm.config.fields import ConfigField, describe_type, format_value, list_fields
from rayllm.config.recipes import list_recipes, recipe_stem

BOLD, DIM, PLAIN = "\033[1m", "\033[2m", "\033[0m"


def paint(text: str, style: str, color: bool) -> str:
    """Text in an ANSI style, or as it is."""
    return f"{style}{text}{PLAIN}" if color else text


def render_stage_help(schema: type, usage: str, *, width: int, color: bool) -> str:
    """The help page of the stage that `schema` configures; `usage` is its command line."""
    fields = list_fields(schema)
    recipes = list_recipes(recipe_stem(schema))
    keys = "\n".join(_render_field(field, width, color) for field in fields.values())
    parts = [
        f"{paint('usage:', BOLD, color)} {usage}",
        _wrap(_one_line(schema.__doc__ or ""), width),
        f"{paint('Keys', BOLD, color)} (defaults < recipe < flags)",
        keys,
        f"{paint('Recipes for this stage:', BOLD, color)} {', '.join(recipes) or 'none'}",
    ]
    return "\n\n".join(parts)


def _render_field(field: ConfigField, width: int, color: bool) -> str:
    indent = "  " + "  " * field.key.count(".")
    if field.is_group:
        head = f"{indent}{paint(f'{field.key}:', BOLD, color)}"
    else:
        kind = f"{describe_type(field.annotation)}; default: {format_value(field.default)}"
        hanging = f"{indent}      "
        plain = textwrap.fill(f"{indent}--{field.key}  {kind}", width, subsequent_indent=hanging)
        name, _, rest = plain.partition(f"--{field.key}")
        head = name + paint(f"--{field.key}", BOLD, color) + paint(rest, DIM, color)
    return f"{head}\n{_wrap(_one_line(field.doc), width, indent + '      ')}"


def _wrap(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
