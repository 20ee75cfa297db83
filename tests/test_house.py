"""The rules of the house, held by the tools that know them: style, types, and who may import whom."""

from __future__ import annotations

import ast
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


def test_the_loops_fit_on_a_screen() -> None:
    """Both main loops at most 60 lines, THE RL file at most 200, every file at most 400."""
    for path, name in (("actors/rl.py", "learn_from_rollouts"), ("rayllm/training/loop.py", "fit")):
        functions = [n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)]
        (loop,) = [f for f in functions if f.name == name]
        assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 60, path
    assert len((ROOT / "actors/rl.py").read_text().splitlines()) <= 200
    for room in ("rayllm", "actors", "tasks"):
        for file in (ROOT / room).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file
