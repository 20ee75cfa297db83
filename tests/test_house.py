"""The rules of the house, held by the tools that know them: style, types, and who may import whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def check(*command: str) -> None:
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, f"{' '.join(command)}\n{answer.stdout}{answer.stderr}"


def test_ruff() -> None:
    check(str(BIN / "ruff"), "check", ".")


@pytest.mark.timeout(600)  # a cold cache reads torch's types, too
def test_mypy() -> None:
    check(str(BIN / "mypy"))


def test_import_linter() -> None:
    check(str(BIN / "lint-imports"))
