"""Where and in what dtype a worker computes."""

from __future__ import annotations

import pytest
import torch

from rayllm.runtime import build_runtime, cpu_prefers_bfloat16


@pytest.mark.parametrize(
    ("vendor", "flags", "prefers"),
    [
        ("AuthenticAMD", "fpu avx512f avx512_bf16 sse", True),
        ("GenuineIntel", "fpu avx512f avx512_bf16 sse", False),
        ("GenuineIntel", "fpu avx512_bf16 amx_bf16 amx_tile", True),
        ("AuthenticAMD", "fpu avx2", False),
    ],
)
def test_bfloat16_only_where_a_cpu_multiplies_it_faster(vendor: str, flags: str, prefers: bool) -> None:
    core = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\nbugs\t\t: none\n\n"
    assert cpu_prefers_bfloat16(core * 2) == prefers
    assert not cpu_prefers_bfloat16("")


def test_training_on_a_cpu_is_float32_and_a_named_dtype_is_taken() -> None:
    assert build_runtime("cpu").dtype == torch.float32
    assert build_runtime("cpu", "float32").dtype == torch.float32
    assert build_runtime("cpu", "bfloat16").dtype == torch.bfloat16
