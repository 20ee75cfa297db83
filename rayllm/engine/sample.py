"""The `sample` stage: continue texts with any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.config.schema import SampleConfig, SamplingConfig
from rayllm.engine.runner import generate
from rayllm.model.gpt import GPT
from rayllm.runs.load import load
from rayllm.runtime import build_runtime
from rayllm.text.tokenizer import Tokenizer


def run(config: SampleConfig) -> None:
    """Print `num_samples` continuations of each prompt."""
    runtime = build_runtime(config.device, config.dtype)
    model, tokenizer = load(config.checkpoint, runtime.device, runtime.dtype)
    for prompt in config.prompts:
        for text in continue_text(model, tokenizer, prompt, config.sampling, num_samples=config.num_samples):
            print(f"{prompt}{text}\n", flush=True)


def continue_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig, *, num_samples: int = 1
) -> Sequence[str]:
    """What the model adds to a text, up to `sampling.max_tokens` tokens or the end of the document (bos)."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    completions = generate(model, ids, sampling, num_samples=num_samples, stop_ids=[tokenizer.bos_id], prompt_id=prompt)
    # An imported model may know ids that its tokenizer has no text for.
    return [
        tokenizer.decode([i for i in c.token_ids if i != tokenizer.bos_id and i < tokenizer.vocab_size])
        for c in completions
    ]
