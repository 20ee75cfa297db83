"""From recipe and flags to a stage's frozen tree: defaults < recipe < flags, merged as plain values, validated once.

Every error is one ConfigError line: origin (file:line or the flag), key, value received, and what to write instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from rayllm.config.check import find_conflicts
from rayllm.config.errors import ConfigError, shorten
from rayllm.config.fields import (
    ConfigField,
    Fields,
    accepts,
    choices_of,
    describe_type,
    element_of,
    find_field,
    format_value,
    list_fields,
    template_of,
)
from rayllm.config.flags import is_switch, key_of, list_switches, split_arguments
from rayllm.config.frozen import Misfit, build
from rayllm.config.recipes import find_recipe, recipe_stem
from rayllm.config.yaml_text import compose, dump, is_plain, resolve_plain, scalar_value, source_of

__all__ = ["ConfigError", "load_config", "to_dict", "to_yaml"]

ConfigT = TypeVar("ConfigT")

_SWITCHES = ("dry_run", "help")  # of the command itself; known here so that a misspelt one is recognised


def load_config(schema: type[ConfigT], recipe: str | None = None, flags: Sequence[str] = ()) -> ConfigT:
    """Build the tree of one stage from its defaults, a recipe (path or name) and flags (``--a.b=c``, ``--a.b c``).

    Keys are written with ``_`` or ``-``; one that is true or false needs no value to be true. Of two flags for one key
    the last counts. Raises ConfigError.
    """
    fields = list_fields(schema)
    settings = list(_recipe_settings(recipe, schema, fields)) if recipe is not None else []
    positionals, joined = split_arguments(flags, list_switches(schema))
    if positionals:
        raise ConfigError(f"{positionals[0]!r} is no flag; write --key=value")
    for flag in joined:
        settings.extend(_flag_settings(flag, fields))

    tree = to_dict(schema())
    given: dict[str, _Setting] = {}
    for setting in settings:
        key = setting.field.key
        _assign(tree, setting)
        given = {k: s for k, s in given.items() if not k.startswith(f"{key}.")}  # a list written anew is all new
        given[key] = setting
    config = _validate(schema, tree, given)
    for conflict in find_conflicts(config):
        origins = [given[key].origin for key in conflict.keys if key in given]
        raise ConfigError(f"{' and '.join(origins) or 'defaults'}: {conflict.message}")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A tree as plain values (dict, list, str, int, float, bool, None)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(member) for key, member in value.items()}
        return [plain(member) for member in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """A tree as a recipe that `load_config` reads back as the same tree."""
    return dump(to_dict(config))


@dataclass(frozen=True)
class _Setting:
    """One key set by somebody: its YAML node, where it stands, and how it was written there."""

    field: ConfigField
    node: yaml.Node
    origin: str
    is_flag: bool

    def error(self, problem: str, cure: str) -> ConfigError:
        written = _text_of_flag(self.origin) if self.is_flag else source_of(self.node)
        return ConfigError(f"{self.origin}: {self.field.key}: got {written or 'nothing'}, {problem}; {cure}")

    def unexpected(self) -> ConfigError:
        """The error for a value of the wrong type, out of its range or not among the choices."""
        written = str(self.node.value) if isinstance(self.node, yaml.ScalarNode) else ""
        annotation = self.field.annotation
        choices = [str(choice) for choice in choices_of(annotation)]
        close = difflib.get_close_matches(written.lower(), choices, n=1)
        if close:
            cure = f"did you mean {close[0]}?"
        elif written and not choices and accepts(annotation, str) and not isinstance(resolve_plain(written), str):
            cure = f"write {self.spell(json.dumps(written))}"
        else:
            cure = f"write for example {self.spell(_example(self.field))}"
        return self.error(f"expected {describe_type(annotation)}", cure)

    def spell(self, value: str) -> str:
        key, leaf = self.field.key, self.field.key.rpartition(".")[2]
        if self.is_flag:
            return f"--{key}={shlex.quote(value)}"
        return f"- {value}" if leaf.isdecimal() else f"{leaf}: {value}"

    def items(self) -> list[yaml.Node]:
        """The nodes of a list of groups, where one group alone needs no brackets."""
        return self.node.value if isinstance(self.node, yaml.SequenceNode) else [self.node]

    def value(self) -> Any:
        """The plain value; raises ConfigError where the node cannot be one for this field.

        Of a list of groups it is as many fresh items as were written; what is in them are settings of their own.
        """
        if self.field.is_group_list:
            return [to_dict(self.field.fresh_item) for _ in self.items()]
        return self._convert(self.node, self.field.annotation)

    def _convert(self, node: yaml.Node, annotation: Any) -> Any:
        element = element_of(annotation)
        if isinstance(node, yaml.SequenceNode) and element is not None:
            return [self._convert(child, element) for child in node.value]
        if not isinstance(node, yaml.ScalarNode):
            raise self.unexpected()
        value = scalar_value(node)
        if element is not None and value is not None:
            return [self._only_element(node, element)]
        if isinstance(value, float) and value.is_integer() and not accepts(annotation, float):
            value = int(value) if accepts(annotation, int) else value  # 1e6 tokens
        if self.is_flag and accepts(annotation, str) and not accepts(annotation, type(value)):
            value = node.value  # a run named 2026 needs no quotes here
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ConfigError(f"{ascii(self.origin)}: {self.field.key}: got {ascii(value)}, which is not valid Unicode")
        return value

    def _only_element(self, node: yaml.ScalarNode, element: Any) -> Any:
        if is_plain(node) and "," in node.value:
            several = ", ".join(part.strip() for part in node.value.split(","))
            one = self.spell(f"[{json.dumps(node.value)}]")
            raise self.error("one value or several?", f"write {self.spell(f'[{several}]')} for several, {one} for one")
        return self._convert(node, element)


def _recipe_settings(recipe: str, schema: type, fields: Fields) -> Iterator[_Setting]:
    path = find_recipe(recipe, recipe_stem(schema))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the recipe as UTF-8") from error
    root = compose(text, str(path))
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: got {source_of(root)}; a recipe is a list of lines like `key: value`")
    yield from _members(root, "", fields, str(path))


def _members(node: yaml.MappingNode, prefix: str, fields: Fields, path: str, flag: str = "") -> Iterator[_Setting]:
    """The settings below a group, in the order they are written."""
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        origin = flag or f"{path}:{line}"
        key = prefix + (key_node.value if isinstance(key_node, yaml.ScalarNode) else source_of(key_node))
        if key in lines:
            first = "" if flag else f", first on line {lines[key]}"
            raise ConfigError(f"{origin}: {key}: got {source_of(value_node)}, a second value{first}; keep one of them")
        lines[key] = line
        field = find_field(fields, key)
        if field is None:
            raise _unknown_key(key, origin, fields, f" (got {source_of(value_node)})", is_flag=False)
        yield from _settings(_Setting(field, value_node, origin, bool(flag)), fields, path, flag)


def _settings(setting: _Setting, fields: Fields, path: str, flag: str) -> Iterator[_Setting]:
    """The setting itself, those below it when it is a group, or both when it is a list of groups."""
    field = setting.field
    if not field.is_group:
        yield setting
        for item_idx, node in enumerate(setting.items() if field.is_group_list else ()):
            item = find_field(fields, f"{field.key}.{item_idx}")
            assert item is not None
            origin = flag or f"{path}:{node.start_mark.line + 1}"
            yield from _settings(_Setting(item, node, origin, bool(flag)), fields, path, flag)
        return
    if not isinstance(setting.node, yaml.MappingNode):
        problem = f"expected a group with keys among {', '.join(vars(field.default))}"
        raise setting.error(problem, f"write for example {setting.spell(_example(field))}")
    yield from _members(setting.node, f"{field.key}.", fields, path, flag)


def _flag_settings(flag: str, fields: Fields) -> Iterator[_Setting]:
    _, has_value, text = flag.partition("=")
    key, origin = key_of(flag), shorten(flag)
    field = find_field(fields, key)
    if field is None:
        raise _unknown_key(key, origin, fields, "", is_flag=True)
    if not has_value and is_switch(field):
        text = has_value = "true"
    if not has_value or not text:
        cure = f"write --{key}={shlex.quote(_example(field))}" + (" (or '\"\"' for an empty text)" if has_value else "")
        raise ConfigError(f"{origin}: {key}: got no value, expected {describe_type(field.annotation)}; {cure}")
    setting = _Setting(field, yaml.ScalarNode("", text), origin, is_flag=True)
    if text[0] in "\"'[{":  # quotes and brackets are YAML; everything else is one plain scalar, colons and all
        setting = dataclasses.replace(setting, node=_compose_flag(text, setting))
    yield from _settings(setting, fields, "", origin)


def _compose_flag(text: str, setting: _Setting) -> yaml.Node:
    annotation = setting.field.annotation
    takes_text = accepts(annotation, str) and not choices_of(annotation)
    as_it_is = yaml.ScalarNode("", text, style='"')
    try:
        node = compose(text, setting.origin)
    except ConfigError as error:
        if takes_text or (text[0] in "\"'" and element_of(annotation) is not None):
            return as_it_is
        raise setting.error("not valid YAML", f"write for example {setting.spell(_example(setting.field))}") from error
    assert node is not None
    return as_it_is if takes_text and not isinstance(node, yaml.ScalarNode) else node


def _text_of_flag(origin: str) -> str:
    return origin.partition("=")[2]


def _unknown_key(key: str, origin: str, fields: Fields, received: str, is_flag: bool) -> ConfigError:
    parent = key.rpartition(".")[0]
    while parent and find_field(fields, parent) is None:
        parent = parent.rpartition(".")[0]
    if parent and not (owner := fields[template_of(parent)]).is_group:
        below = f"list, whose items are {parent}.0, {parent}.1, ..." if owner.is_group_list else "value and has no keys"
        return ConfigError(f"{origin}: unknown key {key}{received}; {parent} is a {below}")
    prefix = f"{parent}." if parent else ""
    template = template_of(prefix)
    fields = {prefix + k.removeprefix(template) if k.startswith(template) else k: f for k, f in fields.items()}
    siblings = [k for k in fields if k.startswith(prefix) and "." not in k.removeprefix(prefix)]
    close = _closest(key.rpartition(".")[2], siblings, fields)
    switch = difflib.get_close_matches(key, _SWITCHES, n=1) if is_flag and not close else []
    if switch:
        cure = f"did you mean --{switch[0].replace('_', '-')}?"
    elif close:
        cure = f"did you mean {' or '.join(f'--{k}' if is_flag else k for k in close)}?"
    else:
        cure = f"the keys here are {', '.join(siblings)}"
    return ConfigError(f"{origin}: unknown key {key}{received}; {cure}")


def _closest(leaf: str, siblings: Sequence[str], fields: Fields) -> list[str]:
    """Keys that somebody who wrote `leaf` may have meant: of that name anywhere, else of a similar one."""
    for keys, cutoff in ((fields, 1.0), (siblings, 0.6), (fields, 0.75)):
        by_leaf: dict[str, list[str]] = {}
        for key in keys:
            by_leaf.setdefault(key.rpartition(".")[2], []).append(key)
        for match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=cutoff):
            return by_leaf[match]
    return []


def _example(field: ConfigField) -> str:
    if field.is_group or field.is_group_list:
        group = field.default if field.is_group else field.fresh_item
        name, value = next(iter(vars(group).items()))
        example = f"{{{name}: {format_value(value)}}}"
        return example if field.is_group else f"[{example}]"
    choices = choices_of(field.annotation)
    if field.default not in (None, (), ""):
        return format_value(field.default)
    if element_of(field.annotation) is not None:
        return format_value(choices[:1] or ("first", "second"))
    return format_value(choices[0]) if choices else "text" if accepts(field.annotation, str) else "1"


def _assign(tree: Any, setting: _Setting) -> None:
    """Put a setting's value into the tree of plain values."""
    *groups, name = setting.field.key.split(".")
    at = ""
    for group in groups:
        if isinstance(tree, list) and int(group) >= len(tree):
            problem = f"and {at[1:]} has {len(tree)} item(s), counted from 0"
            raise setting.error(problem, f"write all of {at[1:]} to have more")
        tree, at = tree[int(group) if isinstance(tree, list) else group], f"{at}.{group}"
    tree[name] = setting.value()


def _validate(schema: type[ConfigT], tree: dict[str, Any], given: Mapping[str, _Setting]) -> ConfigT:
    try:
        return build(schema, tree)
    except Misfit as misfit:
        prefixes = (".".join(misfit.path[:end]) for end in range(len(misfit.path), 0, -1))
        raise given[next(prefix for prefix in prefixes if prefix in given)].unexpected() from misfit
