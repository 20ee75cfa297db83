"""The transformer: architecture and initial weights, nothing else.

A GPT after nanochat (github.com/karpathy/nanochat): rotary positions, QK norm, squared ReLU, sliding windows,
value embeddings, smear, backout, and learned scalars on the residual stream. No bias, no dropout, no norm weights.
Parameter names are nanochat's, so that checkpoints travel both ways.

Shapes: B rows, T tokens, D model, H query heads, K kv heads, E head dim, V vocab, L layers, N positions with a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rayllm.model.backends import Attend, attend_with_sdpa, leave_pieces_uncompiled
from rayllm.model.config import POSITIONS_PER_ROW, SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from rayllm.model.head import Cut, TokenLoss, capped_logits, log_probs, summed_loss
from rayllm.model.kv_cache import CacheView
from rayllm.model.segments import Segments, take_rows

IGNORE_INDEX = -1
ROPE_BASE = 100_000.0
QK_SCALE = 1.2

Reduction = Literal["mean", "sum", "none"]


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


class Angles(NamedTuple):
    """Rotary cosines and sines of a forward's tokens: (T, 1, E / 2), or (B, T, 1, E / 2) where rows differ."""

    cos: Tensor
    sin: Tensor


class Seen(NamedTuple):
    """What a forward's tokens look back to: what a cache holds, or the rows themselves or segments of them."""

    attend: Attend
    cache: CacheView | None
    segments: Segments | None


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
        self.qkv_weight: Tensor | None = None

    def forward(self, h_BTD: Tensor, value_embed: Tensor | None, angles: Angles, seen: Seen) -> Tensor:
        heads = (*h_BTD.shape[:2], -1, self.head_dim)
        if self.qkv_weight is not None:
            qkv = F.linear(h_BTD, self.qkv_weight).view(heads)
            num_kv_heads = self.c_k.out_features // self.head_dim
            qk, v_BTKE = qkv.split([qkv.size(2) - num_kv_heads, num_kv_heads], dim=2)
            q_BTHE, k_BTKE = rotate_and_norm(qk, angles).split([qk.size(2) - num_kv_heads, num_kv_heads], dim=2)
        else:
            q_BTHE, k_BTKE, v_BTKE = (proj(h_BTD).view(heads) for proj in (self.c_q, self.c_k, self.c_v))
            q_BTHE, k_BTKE = (rotate_and_norm(x, angles) for x in (q_BTHE, k_BTKE))
        if self.ve_gate is not None and value_embed is not None:
            gate_BTK1 = 3 * torch.sigmoid(self.ve_gate(h_BTD[..., :VE_GATE_CHANNELS])).unsqueeze(-1)
            v_BTKE = v_BTKE + gate_BTK1 * value_embed.view(heads)
        if seen.cache is None:
            y_BTHE = seen.attend(q_BTHE, k_BTKE, v_BTKE, self.window, seen.segments)
        else:
            y_BTHE = seen.cache.attend(self.layer_idx, q_BTHE, k_BTKE, v_BTKE)
        return self.c_proj(y_BTHE.flatten(2))

    @torch.no_grad()
    def fuse(self) -> None:
        """Lay the weights of q, k and v side by side, so that one product gives all three."""
        projections = (self.c_q, self.c_k, self.c_v)
        self.qkv_weight = _for_products(torch.cat([proj.weight for proj in projections]))
        for proj, part in zip(projections, self.qkv_weight.split([p.out_features for p in projections]), strict=True):
            proj.weight.data = part


class MLP(nn.Module):
    """Two layers, four times as wide in between, with squared ReLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.d_model, 4 * config.d_model)
        self.c_proj = Linear(4 * config.d_model, config.d_model)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(h_BTD)).square())


class Block(nn.Module):
    """Attention then MLP, each on the normed stream and added to it; the stream is first mixed with where it began."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(
        self,
        streams: tuple[Tensor, Tensor],
        mix: tuple[Tensor, Tensor],
        value_embed: Tensor | None,
        angles: Angles,
        seen: Seen,
    ) -> Tensor:
        x_BTD = mix[0] * streams[0] + mix[1] * streams[1]
        x_BTD = x_BTD + self.attn(norm(x_BTD), value_embed, angles, seen)
        return x_BTD + self.mlp(norm(x_BTD))


class GPT(nn.Module):
    """The model. Weights are made uninitialised; call `init_weights` or load a state dict.

    `compute_dtype` is the dtype of activations; None: that of the weights. For training, `attend` is the kernel, and
    `recompute_blocks` keeps only each block's input for backward and computes the block once more there.
    """

    cos_SE: Tensor
    sin_SE: Tensor

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.attend: Attend = attend_with_sdpa
        self.recompute_blocks = False
        self._compiled_hidden: Callable[..., Tensor] | None = None
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
        cos_SE, sin_SE = rotary_tables(config.max_positions, config.head_dim)
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
        targets: Tensor | None = None,
        reduction: Reduction = "mean",
        cache: CacheView | None = None,
        *,
        segments: Segments | None = None,
        target_idx_N: Tensor | None = None,
        token_loss: TokenLoss | None = None,
        cut: Cut | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in at least float32; with targets their negative log-likelihood in nats.

        Targets (B, T) of -1 are ignored; `reduction="none"` keeps the shape, 0 where ignored. Targets (N,) are those of
        the positions `target_idx_N` among all B T, which may repeat (None: of all in order), and are not searched for
        -1. `token_loss` is summed in place of the likelihood, `cut` says what the targets were drawn from (see `head`).
        With a cache the tokens continue what it holds; with segments the rows hold sequences that do not see each
        other. Raises ValueError for a sequence longer than the rotary tables.
        """
        hidden = self.hidden if cache is not None or self._compiled_hidden is None else self._compiled_hidden
        x_BTD = hidden(tokens_BT, cache, segments)
        if targets is None:
            return self.logits(x_BTD)
        targets_N, target_idx_N = find_targets(targets) if targets.dim() == 2 else (targets, target_idx_N)
        x_ND = x_BTD.flatten(0, 1) if target_idx_N is None else take_rows(x_BTD.flatten(0, 1), target_idx_N)
        head = (self.lm_head.weight, targets_N, self.config.vocab_size)
        if reduction != "none":
            total = summed_loss(x_ND, *head, token_loss, cut)
            return total / len(targets_N) if reduction == "mean" else total
        nll_N = -log_probs(x_ND, *head)[0]
        if targets.dim() == 2 and target_idx_N is not None:
            nll_N = nll_N.new_zeros(targets.numel()).index_put((target_idx_N,), nll_N)
        return nll_N.view_as(targets)

    def hidden(self, tokens_BT: Tensor, cache: CacheView | None = None, segments: Segments | None = None) -> Tensor:
        """What the head reads: the normed stream (B, T, D) behind the last block."""
        dtype = self.compute_dtype or self.lm_head.weight.dtype
        angles = self._angles(tokens_BT, cache, segments, dtype)
        seen = Seen(self.attend, cache, segments)
        x0_BTD = x_BTD = self._smear(self._embed(tokens_BT, dtype), cache, segments)
        x_mid_BTD = x_BTD
        for i, block in enumerate(self.blocks):
            mix = (self.resid_lambdas[i], self.x0_lambdas[i])
            value_embed = self.value_embeds[str(i)](tokens_BT).to(dtype) if str(i) in self.value_embeds else None
            inputs = ((x_BTD, x0_BTD), mix, value_embed, angles, seen)
            if self.recompute_blocks and torch.is_grad_enabled():
                x_BTD = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BTD = block(*inputs)
            if i == self.config.num_layers // 2:
                x_mid_BTD = x_BTD
        return norm(x_BTD - self.backout_lambda.to(dtype) * x_mid_BTD)

    def logits(self, x_xD: Tensor) -> Tensor:
        """Logits (..., V) of a hidden state of any leading dimensions, capped, in at least float32."""
        return capped_logits(x_xD, self.lm_head.weight, self.config.vocab_size)

    def compile_rows(self) -> None:
        """Compile the forward of rows (not of what a cache holds) and its backward."""
        leave_pieces_uncompiled()
        self._compiled_hidden = torch.compile(self.hidden)

    @torch.no_grad()
    def lay_out_for_inference(self) -> GPT:
        """Place the weights where products of few rows read them fastest, q, k and v as one. Call it last: it does not
        outlive `to`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.data = _for_products(module.weight)
        for block in self.blocks:
            block.attn.fuse()
        return self

    def _embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return norm(self.wte(tokens).to(dtype))

    def _angles(
        self, tokens_BT: Tensor, cache: CacheView | None, segments: Segments | None, dtype: torch.dtype
    ) -> Angles:
        longest = tokens_BT.size(1) if segments is None else segments.max_positions
        if cache is None and longest > self.config.max_positions:
            raise ValueError(
                f"sequence of {longest} tokens is longer than the {self.config.max_positions} positions this model "
                f"has ({POSITIONS_PER_ROW} times its sequence_len {self.config.sequence_len}): shorten it"
            )
        if segments is not None:
            chosen: Tensor | slice = segments.positions_N.view_as(tokens_BT)
        else:
            chosen = slice(tokens_BT.size(1)) if cache is None else cache.positions_BT
        return Angles(*(table[chosen].to(dtype).unsqueeze(-2) for table in (self.cos_SE, self.sin_SE)))

    def _smear(self, x_BTD: Tensor, cache: CacheView | None, segments: Segments | None) -> Tensor:
        """Mix a gated share of the token before into each token; a sequence's first token has none before it."""
        if segments is not None:
            before_BTD = take_rows(x_BTD.flatten(0, 1), segments.before_N.clamp(min=0)).view_as(x_BTD)
            before_BTD = before_BTD.masked_fill((segments.before_N < 0).view(*x_BTD.shape[:2], 1), 0)
        elif cache is None:
            before_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
        else:
            first_BD = self._embed(cache.before_B.clamp(min=0), x_BTD.dtype)
            first_BD = first_BD.masked_fill((cache.before_B < 0)[:, None], 0)
            before_BTD = torch.cat([first_BD[:, None], x_BTD[:, :-1]], dim=1)
        gate_BT1 = self.smear_lambda.to(x_BTD.dtype) * torch.sigmoid(self.smear_gate(x_BTD[..., :SMEAR_GATE_CHANNELS]))
        return x_BTD + gate_BT1 * before_BTD

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


def find_targets(targets_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """The targets (N,) that are not -1, and their positions among all B T (None: every one). On a GPU this waits for
    the device, so look while they are on the CPU."""
    targets = targets_BT.flatten()
    target_idx_N = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return (targets, None) if len(target_idx_N) == len(targets) else (targets[target_idx_N], target_idx_N)


def _for_products(weight: Tensor) -> Tensor:
    """The same matrix, on a CPU in column-major order: products of few rows are up to twice as fast."""
    return weight.t().contiguous().t() if weight.device.type == "cpu" else weight


def rotary_tables(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (num_positions, head_dim / 2) of RoPE angles, in float32."""
    frequency_E = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle_SE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency_E)
    return angle_SE.cos(), angle_SE.sin()


def rotate_and_norm(x_BTHE: Tensor, angles: Angles) -> Tensor:
    """Rotate the two halves of each head by minus the angle of its position (RoPE, half-split), then norm and scale."""
    a, b = x_BTHE.chunk(2, dim=-1)
    return norm(torch.cat([a * angles.cos + b * angles.sin, b * angles.cos - a * angles.sin], dim=-1)) * QK_SCALE
