"""From a path to a model that runs."""

from __future__ import annotations

import os

import torch

from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.runs.checkpoint import Checkpoint, check_tensor_shapes, open_checkpoint
from rayllm.text.tokenizer import Tokenizer


def load(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32"
) -> tuple[GPT, Tokenizer]:
    """Model (in eval mode, weights in `dtype`) and tokenizer of a checkpoint or of a run's newest checkpoint, by
    path or URL.

    Raises FileNotFoundError where there is none, ValueError when it is damaged or does not fit together.
    """
    checkpoint = open_checkpoint(path)
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16 or float64, got {dtype!r}")
    tokenizer = load_tokenizer(checkpoint)
    model = GPT(model_config(checkpoint))
    load_weights(model, checkpoint)
    return model.to(device=device, dtype=resolved).eval(), tokenizer


def model_config(checkpoint: Checkpoint) -> GPTConfig:
    """The architecture that a checkpoint's weights belong to."""
    raw = checkpoint.state.get("model")
    if not isinstance(raw, dict):
        raise ValueError(f"{checkpoint}: checkpoint.json has no model configuration")
    return GPTConfig.from_dict(raw)


def load_weights(model: GPT, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into the model; ValueError names the first tensors that do not fit."""
    weights = checkpoint.load_model_state()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensor_shapes(weights, expected, str(checkpoint))
    model.load_state_dict(weights)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer in a checkpoint; ValueError when it is not the one the checkpoint was saved with."""
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer.fingerprint != checkpoint.state.get("tokenizer_fingerprint"):
        raise ValueError(
            f"{checkpoint}/tokenizer is not the tokenizer that this model was trained with: put the original one back"
        )
    return tokenizer
