"""The one error of this room, and the finding that becomes one."""

from __future__ import annotations

from dataclasses import dataclass


class ConfigError(ValueError):
    """A recipe or flag that cannot be used: one line with key, value, origin and cure."""


@dataclass(frozen=True)
class Conflict:
    """An impossible combination. ``keys`` are the dotted keys that take part, the one to change first."""

    keys: tuple[str, ...]
    message: str


def shorten(text: str, limit: int = 80) -> str:
    """Text on one line, cut in its middle when long, for showing what somebody wrote."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 20]} ... {line[-15:]}"
