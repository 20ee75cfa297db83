"""Which side of a split something is on, decided by what it is: the same content is on the same side everywhere."""

from __future__ import annotations

import hashlib


def place_of(content: str) -> float:
    """A number in [0, 1) that is evenly spread over contents and always the same for one."""
    digest = hashlib.sha256(content.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
