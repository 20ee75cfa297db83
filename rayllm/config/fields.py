"""The schema seen as a flat table of dotted keys: what loading, help and errors share."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class ConfigField:
    """One key of a stage's tree. ``default`` is that of the tree, which may differ from its group's own."""

    key: str
    annotation: Any
    default: Any
    doc: str

    @property
    def is_group(self) -> bool:
        """Whether the key holds further keys instead of a value."""
        return dataclasses.is_dataclass(self.annotation)

    @property
    def is_group_list(self) -> bool:
        """Whether the key holds a list of groups, whose items have the keys `KEY.0`, `KEY.1`, ..."""
        return dataclasses.is_dataclass(element_of(self.annotation))

    @property
    def fresh_item(self) -> Any:
        """What a new item of a list of groups is before anything of it is set: the first item of the default."""
        schema = element_of(self.annotation)
        assert schema is not None, self.key
        return self.default[0] if self.default else schema()


Fields = Mapping[str, ConfigField]
_ITEM = re.compile(r"\.[0-9]+(?=\.|$)")


def list_fields(schema: type) -> dict[str, ConfigField]:
    """All fields of a stage by dotted key, in the order of the schema; a group stands before its members.

    Of a list of groups `KEY.0` is here, and stands for every item.
    """
    return {field.key: field for field in _walk(schema())}


def find_field(fields: Fields, key: str) -> ConfigField | None:
    """The field of a dotted key, which may go through any item of a list of groups; None where there is none."""
    field = fields.get(template_of(key))
    return None if field is None else dataclasses.replace(field, key=key)


def template_of(key: str) -> str:
    """The key of the first item for a key of any: `tasks.3.name` -> `tasks.0.name`."""
    return _ITEM.sub(".0", key)


def _walk(defaults: Any, prefix: str = "") -> Iterator[ConfigField]:
    schema = type(defaults)
    annotations = get_type_hints(schema, include_extras=True)
    docs = _docstrings_of(schema.__module__)[schema.__name__]
    for name in (member.name for member in dataclasses.fields(schema)):
        default = getattr(defaults, name)
        field = ConfigField(prefix + name, annotations[name], default, docs.get(name, ""))
        yield field
        if field.is_group_list:
            item = field.fresh_item
            doc = f"{type(item).__doc__} This is the first item; {field.key}.1 and so on have the same keys."
            yield ConfigField(f"{field.key}.0", type(item), item, doc)
            yield from _walk(item, prefix=f"{field.key}.0.")
        if field.is_group:
            yield from _walk(default, prefix=f"{field.key}.")


@cache
def _docstrings_of(module: str) -> dict[str, dict[str, str]]:
    """The text under each field of each class of a module, as it stands in the source."""
    docs: dict[str, dict[str, str]] = {}
    for schema in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(schema, ast.ClassDef):
            docs[schema.name] = dict(_docstrings(schema))
    return docs


def _docstrings(schema: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(schema.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, text


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def bare(annotation: Any) -> Any:
    """The annotation without its `Annotated` bounds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def element_of(annotation: Any) -> Any | None:
    """What a list-valued field holds, or None for a field that holds no list."""
    tuples = (bare(member) for member in alternatives(annotation) if get_origin(bare(member)) is tuple)
    return next((get_args(member)[0] for member in tuples), None)


def accepts(annotation: Any, kind: type) -> bool:
    """Whether a scalar of `kind` (int, float, str, bool or NoneType) is one of the field's alternatives."""
    return any(
        bare(member) is kind
        or (get_origin(member) is Literal and any(type(choice) is kind for choice in get_args(member)))
        for member in alternatives(annotation)
    )


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The words a field may hold, also inside a list; empty when it is not a choice."""
    members = alternatives(element_of(annotation) or annotation)
    return tuple(choice for member in members if get_origin(member) is Literal for choice in get_args(member))


def describe_type(annotation: Any) -> str:
    """A field's type in words, with its bounds: ``integer > 0 or null``, ``list of text``."""
    return " or ".join(_describe_one(member) for member in alternatives(annotation))


_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


def _describe_one(annotation: Any) -> str:
    kind = bare(annotation)
    if get_origin(kind) is Literal:
        *others, last = map(format_value, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        return "list of groups" if dataclasses.is_dataclass(element) else f"list of {describe_type(element)}"
    if dataclasses.is_dataclass(kind):
        return "group of keys"
    return _WORDS[kind] + _describe_bounds(annotation)


def _describe_bounds(annotation: Any) -> str:
    bounds: dict[str, Any] = {}
    for rule in get_args(annotation)[1:] if get_origin(annotation) is Annotated else ():
        bounds |= {name: bound for name, bound in vars(rule).items() if bound is not None}
    if "pattern" in bounds:
        return f" matching {bounds['pattern']}"
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    signs = {"gt": ">", "ge": ">=", "le": "<="}
    return "".join(f" {sign} {bounds[name]}" for name, sign in signs.items() if name in bounds)


def format_value(value: Any) -> str:
    """A value as one would write it in a recipe, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_format_in_brackets, value)) + "]"
    if dataclasses.is_dataclass(value):
        members = {name: member for name, member in vars(value).items() if member is not None}
        return "{" + ", ".join(f"{name}: {_format_in_brackets(member)}" for name, member in members.items()) + "}"
    return str(value)


def _format_in_brackets(value: Any) -> str:
    text = format_value(value)
    return f'"{text}"' if isinstance(value, str) and set(text) & set(",[]{}:#\"'") else text
