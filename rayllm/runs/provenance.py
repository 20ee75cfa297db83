"""Where a run's numbers come from: the command, the code and the packages of one launch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_PACKAGES = ("rayllm", "torch", "ray", "numpy")


def describe_launch() -> dict[str, object]:
    """One line of `provenance.jsonl`: time, command, commit, versions, machine. Imports none of the packages."""
    return {
        "time": timestamp(),
        "command": sys.argv,
        "git": _describe_checkout(Path(__file__).resolve().parents[2]),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "hostname": platform.node(),
    }


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _describe_checkout(root: Path) -> dict[str, object] | None:
    """The commit of the checkout that holds this code; None where there is none (an installed wheel, no git)."""
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside another project's checkout: that project's commit says nothing about ours.
    if top is None or Path(top).resolve() != root:
        return None
    changes = _git(root, "status", "--porcelain")
    return {"commit": _git(root, "rev-parse", "--verify", "HEAD"), "dirty": changes != ""}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
