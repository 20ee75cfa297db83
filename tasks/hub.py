"""Rows of Hugging Face data sets. Every wait is bounded, since name look-ups hang below any HTTP timeout."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

TIMEOUT_S = 180.0
"""How long the hub may take to give a data set of a few megabytes."""


def load_rows(repo: str, subset: str, split: str, cure: str) -> list[Mapping[str, Any]]:
    """All rows of one split. Raises ValueError that says what was asked, what came back, and the cure."""
    rows: list[Mapping[str, Any]] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            from datasets import load_dataset

            found: Iterable[Mapping[str, Any]] = load_dataset(repo, subset, split=split)
            rows.extend(found)
        except Exception as error:  # noqa: BLE001 - told below, by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True, name=f"hub {repo}")
    thread.start()
    thread.join(TIMEOUT_S)
    if thread.is_alive():
        errors.append(TimeoutError(f"no answer within {TIMEOUT_S:.0f} s"))
    if errors:
        first_line = (str(errors[0]).strip().splitlines() or ["no reason given"])[0]
        reason = f"{type(errors[0]).__name__}: {first_line}"
        asked = f"{repo} (subset {subset}, split {split})"
        raise ValueError(f"the hub did not give {asked}: {reason}; {cure}") from errors[0]
    return rows
