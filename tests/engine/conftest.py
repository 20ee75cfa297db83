"""What the engine's tests share: small models, engines of short chunks, and the words of a model without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.engine.request import Delta
from rayllm.engine.sampling import draw_tokens
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.model.kv_cache import CacheView
from rayllm.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from rayllm.types import Completion, Prompt

SCRIPT_LOGIT = 50.0


class Scripted(GPT):
    """Says after a pair of tokens, or else after a token, what its script says; after any other, token `otherwise`."""

    def __init__(self, config: GPTConfig, script: Mapping[tuple[int, ...], int], otherwise: int) -> None:
        super().__init__(config)
        self.init_weights(0)
        self.script, self.otherwise = script, otherwise

    def hidden(self, tokens_BT: Tensor, cache: CacheView | None = None) -> Tensor:
        assert cache is not None
        x_BTV = torch.zeros(*tokens_BT.shape, self.config.vocab_size)
        for b, (first, row) in enumerate(zip(cache.before_B.tolist(), tokens_BT.tolist(), strict=True)):
            for t, pair in enumerate(pairwise([first, *row])):
                x_BTV[b, t, self.script.get(pair, self.script.get(pair[1:], self.otherwise))] = SCRIPT_LOGIT
        return x_BTV

    def logits(self, x_xD: Tensor) -> Tensor:
        return x_xD.clone()


class Lab:
    """Builds what is tested, and says what should come of it."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.byte_level()

    def ids(self, *parts: str) -> list[int]:
        """Tokens of texts and, by name (`<|bos|>`), of special tokens."""
        tokenizer = self.tokenizer
        return [i for p in parts for i in ([tokenizer.special_id(p)] if p in SPECIAL_TOKENS else tokenizer.encode(p))]

    def prompt(self, text: str, prompt_id: str = "") -> Prompt:
        return Prompt(prompt_id or text, tuple(self.ids("<|bos|>", text)))

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> GPT:
        """Random weights in all its parts. It opens and closes python blocks often, and seldom ends."""
        sizes = {"sequence_len": 32, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "d_model": 32}
        config = GPTConfig(**{"vocab_size": self.tokenizer.vocab_size, **sizes, **shape})
        model, generator = GPT(config).to(dtype), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.3)
            model.lm_head.weight *= 2
            model.lm_head.weight[self.ids("<|python_start|>", "<|python_end|>")] *= 2
        return model.eval()

    def scripted(self, script: Mapping[tuple[str, ...], str], otherwise: str = "z") -> Scripted:
        """A model of few words: single characters, or special tokens by name."""
        config = GPTConfig(200, self.tokenizer.vocab_size, num_layers=1, num_heads=1, num_kv_heads=1, d_model=24)
        by_ids = {tuple(self.ids(*seen)): self.ids(said)[0] for seen, said in script.items()}
        return Scripted(config, by_ids, self.ids(otherwise)[0])

    def engine(self, model: GPT, *, chunk_len: int | None = None, **settings: Any) -> Engine:
        """One whose chunks may be short, so that its caches wrap around early."""
        if chunk_len is not None:
            settings = {"row_chunk_len": chunk_len, **settings, "chunk_len": chunk_len}
        return Engine(model, self.tokenizer, **{"num_slots": 4, "max_len": 300, **settings})

    def run(self, engine: Engine, max_steps: int = 5000) -> list[Delta]:
        """Step until all is done; returns all that was added."""
        deltas: list[Delta] = []
        for _ in range(max_steps):
            if engine.is_idle:
                return deltas
            deltas += engine.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def check(
        self,
        completion: Completion,
        prompt_ids: Sequence[int],
        sampling: SamplingConfig,
        seed: int,
        models: Mapping[int, GPT],
        atol: float = 1e-9,
    ) -> None:
        """Each token is the one that the weights of its version, in a full forward without a cache, give at its place;
        with its log-probability and what it was chosen from."""
        tokens = completion.token_ids
        versions = [version for version, count in completion.weights_versions for _ in range(count)]
        assert len(versions) == len(tokens) == len(completion.sampled_mask) == len(completion.logprobs)
        for version in set(versions):
            with torch.no_grad():
                logits_TV = models[version](torch.tensor([[*prompt_ids, *tokens]]))[0, len(prompt_ids) - 1 : -1]
            t_T = np.arange(len(tokens), dtype=np.uint64)
            draws = draw_tokens(
                logits_TV,
                np.full(len(tokens), seed, dtype=np.uint64),
                t_T,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )
            for t in range(len(tokens)):
                if versions[t] != version:
                    continue
                if not completion.sampled_mask[t]:
                    assert completion.logprobs[t] == 0.0
                    continue
                assert tokens[t] == draws.tokens[t], f"token {t} of {len(tokens)}, version {version}"
                assert abs(completion.logprobs[t] - draws.logprobs[t]) <= atol, t
                if draws.kept_ids is not None:
                    assert completion.kept_ids is not None
                    assert completion.kept_ids[t] == draws.kept_ids[t]


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Far faster for such small models where cores are few."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
