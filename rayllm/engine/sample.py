"""The `sample` stage: continue texts with any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.config.schema import SampleConfig, SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.engine.reply import cut_at_stop
from rayllm.model.gpt import GPT
from rayllm.runs.load import load
from rayllm.runtime import build_runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Prompt


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
    start = Prompt(prompt, (tokenizer.bos_id, *tokenizer.encode(prompt)))
    room = model.config.max_positions - len(start.token_ids)
    if sampling.max_tokens > room:
        cure = f"write --sampling.max_tokens={room} or less" if room > 0 else "shorten the text"
        raise ValueError(
            f"{prompt[:40]!r} of {len(start.token_ids)} tokens and sampling.max_tokens={sampling.max_tokens} are more "
            f"than the {model.config.max_positions} positions this model has: {cure}"
        )
    engine = Engine(model, tokenizer, num_slots=num_samples, max_len=len(start.token_ids) + sampling.max_tokens)
    (completions,) = engine.generate([start], sampling, num_samples=num_samples)
    if errors := [c.error for c in completions if c.finish_reason == "failed"]:
        raise ValueError(errors[0])
    # An imported model may know ids that its tokenizer has no text for.
    texts = [
        tokenizer.decode([i for i in c.token_ids if i != tokenizer.bos_id and i < tokenizer.vocab_size])
        for c in completions
    ]
    return [cut_at_stop(text, sampling.stop) for text in texts]
