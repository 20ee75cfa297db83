"""Causal sliding-window attention. A window of w sees w tokens back and the token itself.

Shapes: B rows, T queries, S keys, H query heads, K kv heads, E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, window: int, positions_BT: Tensor | None = None) -> Tensor:
    """Attend from each query to the keys at most `window` positions before it; returns (B, T, H, E).

    Key s stands at position s. The queries are the last T of S positions, or stand at `positions_BT`, in rows of
    different lengths. Keys and values of fewer heads than queries are shared among them (GQA). The softmax scale is
    1/sqrt(E).
    """
    num_queries, num_keys = q_BTHE.size(1), k_BSKE.size(1)
    mask, is_causal = None, False
    if positions_BT is not None:
        mask = _window_mask(positions_BT, num_keys, window)[:, None]
    else:
        num_seen = min(num_keys, num_queries + window)  # older keys are outside every query's window
        k_BSKE, v_BSKE = k_BSKE[:, num_keys - num_seen :], v_BSKE[:, num_keys - num_seen :]
        is_causal = num_queries > 1 and num_seen == num_queries and window >= num_seen - 1
        if num_queries > 1 and not is_causal:
            positions_T = torch.arange(num_seen - num_queries, num_seen, device=q_BTHE.device)
            mask = _window_mask(positions_T, num_seen, window)
    y_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_BTHE.size(2) != k_BSKE.size(2),
    )
    return y_BHTE.transpose(1, 2)


def _window_mask(positions_xT: Tensor, num_keys: int, window: int) -> Tensor:
    """True where the query at a position (any leading dimensions) may see key s; (..., T, S)."""
    key_S = torch.arange(num_keys, device=positions_xT.device)
    position_xT1 = positions_xT[..., None]
    return (key_S <= position_xT1) & (key_S >= position_xT1 - window)
