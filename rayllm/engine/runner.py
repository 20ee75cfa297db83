"""Continuing a prompt: prefill once, then decode all its samples together with a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from rayllm.config.schema import SamplingConfig
from rayllm.engine.sampling import sample_tokens, stable_seed
from rayllm.model.gpt import GPT
from rayllm.model.kv_cache import KVCache
from rayllm.types import Completion


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    num_samples: int = 1,
    stop_ids: Collection[int] = (),
    prompt_id: str = "",
) -> list[Completion]:
    """Completions of one prompt of token ids; each ends after a stop token (kept) or `sampling.max_tokens`.

    A sample depends only on its seed, hashed from (sampling.seed, prompt_id, sample index), and on the prompt.
    Raises ValueError for an empty prompt or an id outside the vocabulary.
    """
    _check_prompt(model, prompt)
    device = model.lm_head.weight.device
    cache = KVCache(
        model.config,
        num_rows=1,
        capacity=len(prompt) + sampling.max_tokens,
        device=device,
        dtype=model.compute_dtype or model.lm_head.weight.dtype,
    )
    logits_BV = model(torch.tensor([list(prompt)], device=device), cache=cache)[:, -1].repeat(num_samples, 1)
    cache = cache.repeat(num_samples)
    seeds = np.array([stable_seed(sampling.seed, prompt_id, i) for i in range(num_samples)], dtype=np.uint64)
    token_columns: list[list[int]] = []
    logprob_columns: list[list[float]] = []
    is_done = np.zeros(num_samples, dtype=bool)
    for t in range(sampling.max_tokens):
        tokens_B, logprobs_B = sample_tokens(
            logits_BV, seeds, t, temperature=sampling.temperature, top_k=sampling.top_k
        )
        token_columns.append(tokens_B.tolist())
        logprob_columns.append(logprobs_B.tolist())
        is_done |= np.isin(token_columns[-1], list(stop_ids))
        if is_done.all() or t + 1 == sampling.max_tokens:
            break
        logits_BV = model(tokens_B[:, None], cache=cache)[:, -1]
    rows = zip(zip(*token_columns, strict=True), zip(*logprob_columns, strict=True), strict=True)
    return [_completion(tokens, logprobs, stop_ids) for tokens, logprobs in rows]


def _completion(tokens: Sequence[int], logprobs: Sequence[float], stop_ids: Collection[int]) -> Completion:
    stop_idx = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    num_tokens = len(tokens) if stop_idx is None else stop_idx + 1
    return Completion(
        token_ids=tuple(tokens[:num_tokens]),
        sampled_mask=(True,) * num_tokens,
        logprobs=tuple(logprobs[:num_tokens]),
        finish_reason="length" if stop_idx is None else "stop",
    )


def _check_prompt(model: GPT, prompt: Sequence[int]) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token (the bos token starts a text)")
    outside = [token for token in prompt if not 0 <= token < model.config.vocab_size]
    if outside:
        raise ValueError(f"prompt token {outside[0]} is outside the vocabulary of {model.config.vocab_size}")
