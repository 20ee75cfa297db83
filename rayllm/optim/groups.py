"""Which parameter is stepped how: the groups of MuonAdamW for a GPT, after nanochat."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from rayllm.config.schema import OptimConfig
from rayllm.model.gpt import GPT
from rayllm.optim.optimizer import MuonAdamW

REFERENCE_D_MODEL = 768
SMEAR_AND_BACKOUT_LR = 0.2
SCALARS_NOISE = 1e-7
"""Gradients of scalars below this are rounding, and taken for zero. A fresh model's are of that kind: while its
projections are zero, scaling the residual stream changes nothing. AdamW would turn 1e-9 into whole steps of random
sign, and from the second step on no two runs would be alike."""


def build_optimizer(
    model: GPT,
    config: OptimConfig,
    *,
    lr_multiplier: float = 1.0,
    matrix_weight_decay: float | None = None,
    rank: int = 0,
    world_size: int = 1,
    compiles: bool = False,
) -> MuonAdamW:
    """AdamW for embeddings, unembedding and scalars, Muon for every matrix inside the blocks.

    `lr_multiplier` scales every rate but that of smear and backout (nanochat keeps it fixed);
    `matrix_weight_decay` replaces the recipe's where it has been scaled. The work is shared out among the `world_size`
    workers of the default process group; `compiles` has torch.compile fuse Muon's step.
    """
    width = lr_multiplier * (model.config.d_model / REFERENCE_D_MODEL) ** -0.5
    embedding_lr, unembedding_lr = config.embedding_lr * width, config.unembedding_lr * width
    scalar_lr = config.scalar_lr * lr_multiplier
    decay = config.weight_decay if matrix_weight_decay is None else matrix_weight_decay

    def adamw(
        name: str, lr: float, betas: tuple[float, float], weight_decay: float, *prefixes: str, noise: float = 0.0
    ) -> dict[str, Any]:
        named = {n: p for n, p in model.named_parameters() if n.startswith(prefixes)}
        return {
            "kind": "adamw",
            "name": name,
            "names": list(named),
            "params": list(named.values()),
            "lr": lr,
            "betas": betas,
            "eps": 1e-10,
            "noise": noise,
            "weight_decay": weight_decay,
        }

    groups = [
        adamw("lm_head", unembedding_lr, (0.8, 0.96), 0.01, "lm_head"),
        adamw("wte", embedding_lr, (0.8, 0.995), 0.001, "transformer.wte"),
        adamw("value_embeds", embedding_lr * 0.5, (0.8, 0.995), 0.01, "value_embeds"),
        adamw("resid_lambdas", scalar_lr * 0.01, (0.8, 0.95), 0.05, "resid_lambdas", noise=SCALARS_NOISE),
        adamw("x0_lambdas", scalar_lr, (0.96, 0.95), 0.0, "x0_lambdas", noise=SCALARS_NOISE),
        adamw("smear and backout", SMEAR_AND_BACKOUT_LR, (0.8, 0.95), 0.0, "smear_", "backout_", noise=SCALARS_NOISE),
    ]
    by_shape: dict[torch.Size, dict[str, torch.nn.Parameter]] = defaultdict(dict)
    for name, param in model.named_parameters():
        if name.startswith("transformer.h."):
            by_shape[param.shape][name] = param
    for shape in sorted(by_shape):
        groups.append(
            {
                "kind": "muon",
                "name": "matrices " + "x".join(map(str, shape)),
                "names": list(by_shape[shape]),
                "params": list(by_shape[shape].values()),
                "lr": config.matrix_lr * lr_multiplier,
                "momentum": 0.95,
                "beta2": 0.9,
                "weight_decay": decay,
                # Five products in a row lose nothing that matters in bfloat16 and are several times faster.
                "orthogonalize_dtype": model.compute_dtype or model.lm_head.weight.dtype,
            }
        )
    num_grouped = sum(len(g["params"]) for g in groups)
    assert num_grouped == len(list(model.parameters())), "every parameter is in exactly one group"
    return MuonAdamW(groups, rank=rank, world_size=world_size, compiles=compiles)
