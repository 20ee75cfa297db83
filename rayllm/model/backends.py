"""Attention for training: one function, several kernels, the best that the machine has.

The chain, best first: FlashAttention 4, 3 and 2 (Dao 2023, arXiv:2307.08691; Shah 2024, arXiv:2407.08608), where
installed and able; FlexAttention (windows and segments as a block mask) on GPUs; PyTorch's SDPA anywhere.

Shapes: B rows, T tokens, N = B T, H query heads, K kv heads, E head dim; R pieces, Q queries, S keys.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm.model.segments import QUERIES_PER_PIECE, Segments, take_rows

BackendName = Literal["flash4", "flash3", "flash2", "flex", "sdpa"]


class Attend(Protocol):
    """Causal attention of rows, or of the segments in them, over a window; returns (B, T, H, E).

    A window of w sees w tokens back and the token itself. Fewer kv heads than query heads are shared among them (GQA).
    The softmax scale is 1 / sqrt(E).
    """

    def __call__(
        self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, window: int, segments: Segments | None
    ) -> Tensor: ...


def attend_with_sdpa(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, window: int, segments: Segments | None = None
) -> Tensor:
    """In blocks of queries, each with no more keys than its window reaches."""
    if segments is not None:
        return _attend_to_pieces(q_BTHE, k_BTKE, v_BTKE, *segments.pieces(window))
    num_tokens = q_BTHE.size(1)
    if window >= num_tokens - 1:
        return _sdpa(q_BTHE, k_BTKE, v_BTKE, None)
    block_len = min(max(QUERIES_PER_PIECE, window), num_tokens)
    blocks = []
    for first in range(0, num_tokens, block_len):
        last, begin = min(first + block_len, num_tokens), max(0, first - window)
        ago_QS = torch.arange(first, last, device=q_BTHE.device)[:, None] - torch.arange(
            begin, last, device=q_BTHE.device
        )
        is_seen_QS = (ago_QS >= 0) & (ago_QS <= window)
        blocks.append(_sdpa(q_BTHE[:, first:last], k_BTKE[:, begin:last], v_BTKE[:, begin:last], is_seen_QS))
    return torch.cat(blocks, dim=1)


def _attend_pieces(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, batches: list, place_N: Tensor) -> Tensor:
    q_NHE, k_NKE, v_NKE = (x.flatten(0, 1) for x in (q_BTHE, k_BTKE, v_BTKE))
    attended = [
        _sdpa(
            take_rows(q_NHE, b.query_idx_RQ),
            take_rows(k_NKE, b.key_idx_RS),
            take_rows(v_NKE, b.key_idx_RS),
            b.is_seen_R1QS,
        ).flatten(0, 1)
        for b in batches
    ]
    return take_rows(torch.cat(attended), place_N).view_as(q_BTHE)


# What `attend_with_sdpa` calls for segments; see `leave_pieces_uncompiled`.
_attend_to_pieces: Callable[..., Tensor] = _attend_pieces


def leave_pieces_uncompiled() -> None:
    """Have torch.compile pass over pieces, whose shapes are new in every batch.

    No decorator: one would load PyTorch's compiler, a fifth of every process's start, for models never compiled, too.
    """
    global _attend_to_pieces
    _attend_to_pieces = torch.compiler.disable(_attend_pieces)


def _sdpa(q_BQHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, is_seen: Tensor | None) -> Tensor:
    """Attention where `is_seen`; None: causally."""
    y_BHQE = F.scaled_dot_product_attention(
        q_BQHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=is_seen,
        is_causal=is_seen is None,
        enable_gqa=q_BQHE.size(2) != k_BSKE.size(2),
    )
    return y_BHQE.transpose(1, 2)


def attend_with_flex(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, window: int, segments: Segments | None = None
) -> Tensor:
    """FlexAttention: blocks of keys that no query of a block sees are skipped. Trains on GPUs only."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = _compiled_flex() if q_BTHE.device.type == "cuda" else flex_attention
    mask = _block_mask(q_BTHE.size(1), window, q_BTHE.device) if segments is None else _segment_mask(segments, window)
    rows = [q_BTHE, k_BTKE, v_BTKE]
    if segments is not None:  # segments know no rows
        rows = [x.flatten(0, 1).unsqueeze(0) for x in rows]
    q_BHTE, k_BKTE, v_BKTE = (x.transpose(1, 2) for x in rows)
    y_BHTE = attend(q_BHTE, k_BKTE, v_BKTE, block_mask=mask, enable_gqa=q_BTHE.size(2) != k_BTKE.size(2))
    return cast(Tensor, y_BHTE).transpose(1, 2).reshape(q_BTHE.shape)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=64)
def _block_mask(num_tokens: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= window)

    return create_block_mask(is_seen, None, None, num_tokens, num_tokens, device=str(device))


def _segment_mask(segments: Segments, window: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_own = (key >= segments.own_start_N[query]) & (key <= query)
        is_prefix = (key >= segments.prefix_start_N[query]) & (key < segments.prefix_end_N[query])
        return (is_own | is_prefix) & (segments.positions_N[query] - segments.positions_N[key] <= window)

    num_tokens = segments.num_tokens
    make = functools.partial(create_block_mask, is_seen, None, None, num_tokens, num_tokens)
    return segments.remember(window, lambda: make(device=str(segments.device)))


@dataclass(frozen=True)
class FlashAttention:
    """One generation of FlashAttention: its function for rows, and that for sequences of any lengths."""

    for_rows: Callable[..., Any]
    for_lengths: Callable[..., Any]

    def __call__(
        self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, window: int, segments: Segments | None = None
    ) -> Tensor:
        options: dict[str, Any] = {"causal": True, "window_size": (window, 0)}
        if segments is None:
            return _attended(self.for_rows(q_BTHE, k_BTKE, v_BTKE, **options))
        q_NHE, k_NKE, v_NKE = (x.flatten(0, 1) for x in (q_BTHE, k_BTKE, v_BTKE))
        lengths = segments.lengths
        options |= {"cu_seqlens_q": lengths.query_ends, "cu_seqlens_k": lengths.key_ends}
        options |= {"max_seqlen_q": lengths.max_queries, "max_seqlen_k": lengths.max_keys}
        known = inspect.signature(self.for_lengths).parameters  # the newest finds the longest by itself
        options = {name: value for name, value in options.items() if name in known}
        k_SKE, v_SKE = (take_rows(x_NKE, lengths.key_idx_S) for x_NKE in (k_NKE, v_NKE))
        return _attended(self.for_lengths(q_NHE, k_SKE, v_SKE, **options)).view_as(q_BTHE)


def _attended(result: Any) -> Tensor:
    """Some versions return the logarithm of the sum, too."""
    return cast(Tensor, result[0] if isinstance(result, tuple) else result)


# module, and the compute capabilities whose forward and backward it has
_FLASH: dict[str, tuple[str, Callable[[tuple[int, int]], bool]]] = {
    "flash4": ("flash_attn.cute", lambda capability: capability[0] in (9, 10)),
    "flash3": ("flash_attn_interface", lambda capability: capability[0] == 9),
    "flash2": ("flash_attn", lambda capability: capability >= (8, 0)),
}


def choose_attention(
    wanted: BackendName | Literal["auto"], device: torch.device, dtype: torch.dtype
) -> tuple[str, Attend]:
    """The kernel a recipe names, or the first of the chain that this machine has; (name, function).

    Raises ValueError that says why a named one cannot run here, and what to write instead.
    """
    chain = ("flash4", "flash3", "flash2", "flex", "sdpa") if wanted == "auto" else (wanted,)
    reasons = {}
    for name in chain:
        built = _build(name, device, dtype)
        if not isinstance(built, str):
            return name, built
        reasons[name] = built
    raise ValueError(f"attention={wanted} cannot run here: {reasons[wanted]}; write attention=auto for one that can")


def _build(name: str, device: torch.device, dtype: torch.dtype) -> Attend | str:
    """A kernel, or why it cannot be had."""
    if name == "sdpa":
        return attend_with_sdpa
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and this worker computes on {device.type}"
    if name == "flex":
        return attend_with_flex if dtype != torch.float64 else "its GPU kernels know no float64"
    module_name, is_able = _FLASH[name]
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if not is_able(capability := torch.cuda.get_device_capability(device)):
        return f"it has no kernels for compute capability {capability[0]}.{capability[1]}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:  # not installed, or built for another torch
        return f"its package does not import ({error})"
    functions = (module.flash_attn_func, module.flash_attn_varlen_func)
    return FlashAttention(*(functions if name == "flash2" else map(torch.compiler.disable, functions)))
