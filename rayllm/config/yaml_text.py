"""YAML in and out, with the scalars of YAML 1.2.

PyYAML speaks YAML 1.1, where `no` is a boolean, `1e-4` a text, `12:30` a number and `2026-01-01` a date. Here plain
scalars are null, true or false, decimal numbers (underscores allowed), or the text they are.
"""

from __future__ import annotations

import re

import yaml

from rayllm.config.errors import ConfigError, shorten

Scalar = None | bool | int | float | str

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {
    word: value
    for value, words in {
        None: ("", "~", "null", "Null", "NULL"),
        True: ("true", "True", "TRUE"),
        False: ("false", "False", "FALSE"),
    }.items()
    for word in words
}
_INFINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


def resolve_plain(text: str) -> Scalar:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if text.lower() in _INFINITE:
        return float(_INFINITE[text.lower()])
    try:
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text):
            return float(text.replace("_", ""))
    except ValueError:  # thousands of digits: no number that anybody means
        return text
    return text


def is_plain(node: yaml.ScalarNode) -> bool:
    """Whether a scalar stands without quotes (or a block sign), so that it may be a number or null."""
    return not node.style


def scalar_value(node: yaml.ScalarNode) -> Scalar:
    """The value of a scalar node: text when quoted, else what it looks like."""
    return resolve_plain(node.value) if is_plain(node) else node.value


def source_of(node: yaml.Node) -> str:
    """A node as it was written, on one line."""
    start, end = node.start_mark, node.end_mark
    if start is not None and start.buffer is not None:
        return shorten(start.buffer[start.pointer : end.pointer].rstrip("\0"))
    return shorten(str(node.value))


def compose(text: str, where: str) -> yaml.Node | None:
    """Parse one YAML document into nodes that know their lines; None when it is empty.

    Raises ConfigError naming `where:line` when the text is no YAML.
    """
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}{line}: not valid YAML: {shorten(reason, 160)}") from error
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where}:{line_number}: not valid YAML: character {error.character!r} is not allowed"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from error


class _Dumper(yaml.SafeDumper):
    """Groups as blocks, lists of values on one line, text quoted wherever it would be read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    looks_like_text = isinstance(resolve_plain(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if looks_like_text else '"')


def _represent_list(dumper: _Dumper, items: list) -> yaml.SequenceNode:
    holds_groups = any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not holds_groups)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def dump(tree: dict[str, object]) -> str:
    """A tree of plain values as YAML that `compose` and `scalar_value` read back as the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
