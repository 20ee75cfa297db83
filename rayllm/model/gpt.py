"""The transformer: architecture and initial weights, nothing else.

A GPT after nanochat (github.com/karpathy/nanochat): rotary positions, QK norm, squared ReLU, sliding windows,
value embeddings, smear, backout, and learned scalars on the residual stream. No bias, no dropout, no norm weights.
Parameter names are nanochat's, so that checkpoints travel both ways.

Shapes: B rows, T tokens, D model, H query heads, K kv heads, E head dim, V vocab, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from rayllm.model.attention import attend
from rayllm.model.config import SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from rayllm.model.kv_cache import KVCache

IGNORE_INDEX = -1
ROPE_BASE = 100_000.0
QK_SCALE = 1.2
LOGIT_CAP = 15.0
# Positions the rotary tables cover, in rows: generation may go well beyond the training length, as windows are finite.
POSITIONS_PER_ROW = 10

Reduction = Literal["mean", "sum", "none"]


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


class Positions(NamedTuple):
    """Where a forward's tokens stand: their rotary angles, and (B, T) indices where rows differ in length."""

    cos: Tensor
    sin: Tensor
    uneven_BT: Tensor | None


class Linear(nn.Linear):
    """A bias-free linear map whose float32 weight is cast to the activations' dtype at each use."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Windowed causal self-attention with grouped keys and values, rotary positions, then QK norm."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.window = config.windows[layer_idx]
        kv_width = config.num_kv_heads * config.head_dim
        self.c_q = Linear(config.d_model, config.d_model)
        self.c_k = Linear(config.d_model, kv_width)
        self.c_v = Linear(config.d_model, kv_width)
        self.c_proj = Linear(config.d_model, config.d_model)
        has_value_embed = layer_idx in config.value_embed_layers
        self.ve_gate = Linear(VE_GATE_CHANNELS, config.num_kv_heads) if has_value_embed else None

    def forward(self, h_BTD: Tensor, value_embed: Tensor | None, at: Positions, cache: KVCache | None) -> Tensor:
        heads = (*h_BTD.shape[:2], -1, self.head_dim)
        q_BTHE, k_BTKE, v_BTKE = (proj(h_BTD).view(heads) for proj in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None and value_embed is not None:
            gate_BTK1 = 3 * torch.sigmoid(self.ve_gate(h_BTD[..., :VE_GATE_CHANNELS])).unsqueeze(-1)
            v_BTKE = v_BTKE + gate_BTK1 * value_embed.view(heads)
        q_BTHE, k_BTKE = (norm(rotate(x, at.cos, at.sin)) * QK_SCALE for x in (q_BTHE, k_BTKE))
        if cache is not None:
            k_BTKE, v_BTKE = cache.append(self.layer_idx, k_BTKE, v_BTKE, at.uneven_BT)
        return self.c_proj(attend(q_BTHE, k_BTKE, v_BTKE, self.window, at.uneven_BT).flatten(2))


class MLP(nn.Module):
    """Two layers, four times as wide in between, with squared ReLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.d_model, 4 * config.d_model)
        self.c_proj = Linear(4 * config.d_model, config.d_model)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(h_BTD)).square())


class Block(nn.Module):
    """Attention then MLP, each on the normed stream and added to it."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, value_embed: Tensor | None, at: Positions, cache: KVCache | None) -> Tensor:
        x_BTD = x_BTD + self.attn(norm(x_BTD), value_embed, at, cache)
        return x_BTD + self.mlp(norm(x_BTD))


class GPT(nn.Module):
    """The model. Weights are made uninitialised; call `init_weights` or load a state dict.

    `compute_dtype` is the dtype of activations; None: that of the weights.
    """

    cos_SE: Tensor
    sin_SE: Tensor

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        num_rows = config.padded_vocab_size
        blocks = nn.ModuleList([Block(config, i) for i in range(config.num_layers)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(num_rows, config.d_model), "h": blocks})
        self.lm_head = Linear(config.d_model, num_rows)
        self.resid_lambdas = nn.Parameter(torch.empty(config.num_layers))
        self.x0_lambdas = nn.Parameter(torch.empty(config.num_layers))
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        kv_width = config.num_kv_heads * config.head_dim
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(num_rows, kv_width) for i in config.value_embed_layers})
        cos_SE, sin_SE = rotary_tables(POSITIONS_PER_ROW * config.sequence_len, config.head_dim)
        self.register_buffer("cos_SE", cos_SE, persistent=False)
        self.register_buffer("sin_SE", sin_SE, persistent=False)

    @property
    def wte(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.transformer["h"])

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        reduction: Reduction = "mean",
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in at least float32; with targets their negative log-likelihood in nats.

        Targets of -1 are ignored; `reduction="none"` keeps the shape (B, T), 0 where ignored. With a cache the
        tokens continue what it holds, in chunks of any size. Raises ValueError past the rotary tables or the cache.
        """
        logits_BTV = self._logits(self._trunk(tokens_BT, cache))
        if targets_BT is None:
            return logits_BTV
        nll = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
        )
        return nll.view_as(targets_BT) if reduction == "none" else nll

    def _trunk(self, tokens_BT: Tensor, cache: KVCache | None) -> Tensor:
        dtype = self.compute_dtype or self.lm_head.weight.dtype
        at = self._positions(tokens_BT.size(1), cache, dtype)
        x_BTD = norm(self.wte(tokens_BT).to(dtype))
        last_embed_BD = x_BTD[:, -1]
        x0_BTD = x_BTD = self._smear(x_BTD, cache)
        x_mid_BTD = x_BTD
        for i, block in enumerate(self.blocks):
            x_BTD = self.resid_lambdas[i] * x_BTD + self.x0_lambdas[i] * x0_BTD
            value_embed = self.value_embeds[str(i)](tokens_BT).to(dtype) if str(i) in self.value_embeds else None
            x_BTD = block(x_BTD, value_embed, at, cache)
            if i == self.config.num_layers // 2:
                x_mid_BTD = x_BTD
        if cache is not None:
            cache.advance(tokens_BT.size(1), last_embed_BD)
        return norm(x_BTD - self.backout_lambda.to(dtype) * x_mid_BTD)

    def _positions(self, num_tokens: int, cache: KVCache | None, dtype: torch.dtype) -> Positions:
        """Where the tokens stand, after checking that there is room for them."""
        end = num_tokens + (0 if cache is None else int(cache.lengths.max()))
        if end > self.cos_SE.size(0):
            raise ValueError(
                f"sequence of {end} tokens is longer than the {self.cos_SE.size(0)} positions this model has "
                f"({POSITIONS_PER_ROW} times its sequence_len {self.config.sequence_len}): shorten it"
            )
        if cache is not None:
            cache.require_room(num_tokens)
        uneven_BT = None if cache is None or cache.is_even else cache.positions_BT(num_tokens)
        chosen = slice(end - num_tokens, end) if uneven_BT is None else uneven_BT
        cos, sin = (table[chosen].to(dtype).unsqueeze(-2) for table in (self.cos_SE, self.sin_SE))
        return Positions(cos, sin, uneven_BT)

    def _smear(self, x_BTD: Tensor, cache: KVCache | None) -> Tensor:
        """Mix a gated share of the token before into each token; a sequence's first token has none before it."""
        if cache is None:
            before_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
        else:
            before_BTD = torch.cat([cache.last_embed_BD[:, None], x_BTD[:, :-1]], dim=1)
        gate_BT1 = self.smear_lambda.to(x_BTD.dtype) * torch.sigmoid(self.smear_gate(x_BTD[..., :SMEAR_GATE_CHANNELS]))
        return x_BTD + gate_BT1 * before_BTD

    def _logits(self, x_BTD: Tensor) -> Tensor:
        # The padding rows of the vocabulary never compete: they are cut off before the cap.
        logits_BTV = F.linear(x_BTD, self.lm_head.weight[: self.config.vocab_size].to(x_BTD.dtype))
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return LOGIT_CAP * torch.tanh(logits_BTV / LOGIT_CAP)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw initial weights on the CPU from `seed`: the same weights on any device.

        Output projections are zero, so that every block starts as the identity; lm_head is tiny, so that the
        first loss is ln(V).
        """
        generator = torch.Generator().manual_seed(seed)

        def fill(weight: Tensor, *, bound: tuple[float, float] | None = None, std: float = 0.0) -> None:
            drawn = torch.empty(weight.shape)
            drawn.uniform_(*bound, generator=generator) if bound else drawn.normal_(0, std, generator=generator)
            weight.copy_(drawn)

        s = math.sqrt(3 / self.config.d_model)  # uniform(-s, s) has standard deviation 1 / sqrt(d_model)
        fill(self.wte.weight, std=0.8)
        fill(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for proj in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                fill(proj.weight, bound=(-s, s))
            fill(block.mlp.c_fc.weight, bound=(-0.4 * s, 0.4 * s))
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                fill(block.attn.ve_gate.weight, bound=(0.0, 0.02))
        for embed in self.value_embeds.values():
            fill(cast(nn.Embedding, embed).weight, bound=(-s, s))
        fill(self.smear_gate.weight, bound=(0.0, 0.02))
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)
        depth_L = torch.arange(self.config.num_layers) / max(self.config.num_layers - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth_L)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth_L)


def rotary_tables(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (num_positions, head_dim / 2) of RoPE angles, in float32."""
    frequency_E = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle_SE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency_E)
    return angle_SE.cos(), angle_SE.sin()


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by minus the angle of its position (RoPE, half-split).

    `cos` and `sin` are of shape (T, 1, E / 2), or (B, T, 1, E / 2) where rows stand at different positions.
    """
    a, b = x_BTHE.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
