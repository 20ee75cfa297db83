"""Benchmarks run and say what they promise; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent
ENGINE_KEYS = {f"{name}.d2" for name in ("speedup", "speedup_same_dtype", "limit_share")}
TRAIN_KEYS = {f"{name}.d2" for name in ("speedup", "speedup_same_dtype", "limit_share", "memory_ratio")}
OVERLAP_KEYS = {f"overlap.{name}" for name in ("k1_over_k0", "bound", "k1_over_busier_side")}
RL_KEYS = {"speedup.k0", "speedup_same_dtype.k0", *OVERLAP_KEYS, "phase_share"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("script", "flags", "keys"),
    [
        ("bench_engine.py", ["--processes=2"], ENGINE_KEYS),
        ("bench_train.py", [], TRAIN_KEYS),
        ("bench_rl.py", [], RL_KEYS),
    ],
)
def test_the_last_line_is_the_result(script: str, flags: list[str], keys: set[str]) -> None:
    if script == "bench_engine.py" and not (Path(os.environ.get("RAYLLM_DATA_DIR", "")) / "gsm8k").is_dir():
        pytest.skip("RAYLLM_DATA_DIR has no gsm8k, whose prompts and lengths this benchmark is made of")
    done = subprocess.run(
        [sys.executable, str(BENCH / script), "--quick", *flags],
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    shares = result.pop("phase_share", {})
    assert result.keys() == keys - {"phase_share"}
    assert all(value > 0 and math.isfinite(value) for value in result.values())
    for phases in shares.values():
        assert phases["learn"] > 0 and sum(phases.values()) == pytest.approx(1, abs=0.01)
    assert bool(shares) == ("phase_share" in keys)
