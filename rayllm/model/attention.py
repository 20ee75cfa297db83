"""Attention of the engine: to parts of what a row sees, that are then joined.

Shapes: B rows, T queries, S keys, H query heads, K kv heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attend_to_part(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a part of the keys, for inference; returns (B, T, H, E) and the logarithm (B, T, H) of the part's
    share before it is normalized.

    `mask_BTS` is added to the scores: 0, or `hidden_score` where a query does not see a key.
    """
    num_rows, num_queries, num_heads, head_dim = q_BTHE.shape
    num_kv_heads = k_BSKE.size(2)
    # Heads that share keys stand in the queries' place: (B, K, G T, E).
    q_BKQE = q_BTHE.view(num_rows, num_queries, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_BKSE, v_BKSE = k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
    if num_queries > 1 and num_kv_heads < num_heads:
        mask_BTS = mask_BTS.repeat(1, num_heads // num_kv_heads, 1)
    mask_B1QS = mask_BTS[:, None]
    if q_BTHE.device.type == "cpu":  # the kernel behind SDPA here, which also tells the share
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y_BKQE, share_BKQ = flash(q_BKQE, k_BKSE, v_BKSE, attn_mask=mask_B1QS)
    else:
        y_BKQE, share_BKQ = attend_by_products(q_BKQE, k_BKSE, v_BKSE, mask_B1QS)
    heads = (num_rows, num_heads, num_queries)
    return y_BKQE.reshape(*heads, head_dim).transpose(1, 2), share_BKQ.reshape(heads).transpose(1, 2)


def attend_by_products(q_BKQE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_B1QS: Tensor) -> tuple[Tensor, Tensor]:
    """The same by plain matrix products, on any device; returns (B, K, Q, E) and the shares (B, K, Q)."""
    scores_BKQS = (q_BKQE @ k_BKSE.transpose(-1, -2)).float() * q_BKQE.size(-1) ** -0.5 + mask_B1QS
    share_BKQ = scores_BKQS.logsumexp(dim=-1)
    return (scores_BKQS - share_BKQ[..., None]).exp().to(v_BKSE.dtype) @ v_BKSE, share_BKQ


FlashFunction = Callable[..., tuple[Tensor, Tensor]]
"""`flash_attn_with_kvcache` of FlashAttention 2 (Dao 2023)."""


def load_flash(device: torch.device, dtype: torch.dtype) -> FlashFunction | None:
    """FlashAttention's decode kernel, where it is installed and computes in `dtype` on `device`."""
    is_able = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if not is_able or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:  # not installed, or built for another torch
        return None
    flash: FlashFunction = flash_attn_with_kvcache
    return flash


def attend_with_flash(
    flash: FlashFunction,
    q_BTHE: Tensor,
    cached: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    lengths_B: Tensor,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Store new keys and values behind the first `lengths_B` of the cached ones, position p in slot p, and attend to
    what the window holds, in one kernel; returns what `attend_to_part` does."""
    y_BTHE, share_BHT = flash(
        q_BTHE,
        *cached,
        *new,
        cache_seqlens=lengths_B.int(),
        causal=True,
        window_size=(window, 0),
        return_softmax_lse=True,
    )
    return y_BTHE, share_BHT.transpose(1, 2)


def join_parts(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to all keys, from attention to two parts of them."""
    (y_a_BTHE, share_a_BTH), (y_b_BTHE, share_b_BTH) = a, b
    weight_BTH1 = torch.sigmoid(share_b_BTH - share_a_BTH)[..., None].to(y_a_BTHE.dtype)
    return torch.lerp(y_a_BTHE, y_b_BTHE, weight_BTH1)


def visibility(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen; else a score so low that it has no share, yet a number: a query may see none of a part."""
    return torch.zeros(is_seen.shape, device=is_seen.device, dtype=dtype).masked_fill_(~is_seen, -1e30)
