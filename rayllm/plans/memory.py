"""Bytes that models take while they are trained, and while they answer. Torch-free estimates."""

from __future__ import annotations

from rayllm.model.config import LOGITS_PER_CHUNK, GPTConfig
from rayllm.optim.scaling import count_parameters

# Kept for backward of a layer, in numbers per token and channel: the stream, normed inputs, queries, keys, values and
# attention's output (about 10), and the MLP (about 12).
_ACTIVATIONS = 22


def bytes_per_number(dtype: str, device: str) -> int:
    """Of what is computed in `dtype`; "auto" is bfloat16 on a GPU, and taken for float32 on a CPU."""
    return 2 if dtype == "bfloat16" or (dtype == "auto" and device == "cuda") else 4


def training_bytes(
    model: GPTConfig,
    tokens_at_once: int,
    num_workers: int = 1,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    recompute_blocks: bool = False,
) -> int:
    """Peak memory of one worker: float32 weights and gradients, its share of the optimizer's state, what a step needs
    beside them, activations of the tokens run at once, logits."""
    counts = count_parameters(model)
    # Muon keeps one buffer for a matrix, AdamW two for the rest; shared out among the workers.
    state = (counts.matrices + 2 * (counts.total - counts.matrices)) / num_workers
    # Muon works on copies of weights, gradient and update of one shape at a time, a third of all matrices; of two such
    # thirds the outcome may be on its way between workers.
    third = counts.matrices / 3
    step = 3 * third / num_workers + (2 * third if num_workers > 1 else 0)
    per_token = (model.num_layers + _ACTIVATIONS) if recompute_blocks else model.num_layers * _ACTIVATIONS
    activations = tokens_at_once * per_token * model.d_model * bytes_per_number(dtype, device)
    logits = 4 * 3 * min(tokens_at_once * model.vocab_size, LOGITS_PER_CHUNK[device])
    return int(4 * (2 * counts.total + state + step)) + activations + logits


def weight_bytes(model: GPTConfig, dtype: str, device: str) -> int:
    """Of a model that is only asked."""
    return count_parameters(model).total * bytes_per_number(dtype, device)


def kv_bytes_per_token(model: GPTConfig, dtype: str, device: str) -> int:
    """Keys and values of one token in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * bytes_per_number(dtype, device)


def cache_bytes(
    model: GPTConfig, num_rows: int, max_len: int, *, chunk_len: int | None, dtype: str, device: str
) -> int:
    """A `KVCache` of `num_rows`: with `chunk_len` a layer keeps no more than its window and that; None: all."""
    kept = sum(max_len if chunk_len is None else min(max_len, window + chunk_len) for window in model.windows)
    return num_rows * kept * kv_bytes_per_token(model, dtype, device) // model.num_layers


def gib(num_bytes: float) -> str:
    """As people read it: `1.25 GiB`."""
    return f"{num_bytes / 2**30:.2f} GiB"
