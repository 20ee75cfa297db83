"""Causal sliding-window attention. A window of w sees w tokens back and the token itself.

Shapes: B rows, T queries, S keys, H query heads, K kv heads, E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, window: int) -> Tensor:
    """Attend from the last T of S positions to those at most `window` before them; returns (B, T, H, E).

    The keys are contiguous in position and end at the last query, so S >= T; keys and values of fewer heads
    than queries are shared among them (GQA). The softmax scale is 1/sqrt(E).
    """
    num_queries, num_keys = q_BTHE.size(1), k_BSKE.size(1)
    num_seen = min(num_keys, num_queries + window)  # older keys are outside every query's window
    k_BSKE, v_BSKE = k_BSKE[:, num_keys - num_seen :], v_BSKE[:, num_keys - num_seen :]
    is_plain_causal = num_seen == num_queries and window >= num_seen - 1
    needs_mask = num_queries > 1 and not is_plain_causal
    mask_TS = _window_mask(num_queries, num_seen, window, q_BTHE.device) if needs_mask else None
    y_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=mask_TS,
        is_causal=is_plain_causal and num_queries > 1,
        enable_gqa=q_BTHE.size(2) != k_BSKE.size(2),
    )
    return y_BHTE.transpose(1, 2)


def _window_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """True where query t (the last `num_queries` of `num_keys` positions) may see key s."""
    key_pos_S = torch.arange(num_keys, device=device)
    query_pos_T1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    return (key_pos_S <= query_pos_T1) & (key_pos_S >= query_pos_T1 - window)
