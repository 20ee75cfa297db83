"""The one error of this room."""

from __future__ import annotations


class ConfigError(ValueError):
    """A recipe or flag that cannot be used: one line with key, value, origin and cure."""


def shorten(text: str, limit: int = 80) -> str:
    """Text on one line, cut in its middle when long, for showing what somebody wrote."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 20]} ... {line[-15:]}"
