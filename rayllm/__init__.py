"""rayllm: train a chat model from raw text, teach it with reinforcement learning, serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayllm.runs.load import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `rayllm --help` never waits for torch.
    if name == "load":
        from rayllm.runs.load import load

        return load
    raise AttributeError(f"module 'rayllm' has no attribute {name!r}")
