"""What an engine takes, for `--dry-run`: memory of a model that answers, and the time of its answers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from rayllm.model.config import GPTConfig
from rayllm.optim.estimate import assumed_rates, visible_gpu_name
from rayllm.optim.scaling import count_parameters, flops_per_token
from rayllm.plans.memory import cache_bytes, gib, kv_bytes_per_token, weight_bytes

# As the engine has them (rayllm/engine/engine.py).
CHUNK_LEN, ROW_CHUNK_LEN = 512, 64
# Of the rate of products or of reads, whichever is the tighter (docs/performance.md: 22 to 31 % on CPUs; GPUs not
# measured).
SAMPLING_UTILISATION = 0.3
STEP_OVERHEAD_S = 0.01
"""Of a step of decoding, whatever the model: Python's part, and starting the device's operations. A guess."""


@dataclass(frozen=True)
class EnginePlan:
    """One engine: `num_slots` sequences of up to `max_len` tokens, from `num_prompts` prompts."""

    model: GPTConfig
    num_slots: int
    num_prompts: int
    max_len: int
    dtype: str
    device: str

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.model, self.dtype, self.device)

    @property
    def slot_bytes(self) -> int:
        """On a GPU, where FlashAttention may attend to it, a row keeps all tokens; else windows are rings."""
        chunk_len = None if self.device == "cuda" else ROW_CHUNK_LEN
        return self._cache_bytes(self.num_slots, chunk_len)

    @property
    def prompt_bytes(self) -> int:
        return self._cache_bytes(self.num_prompts, CHUNK_LEN)

    @property
    def num_bytes(self) -> int:
        """All of it, with the logits of what runs."""
        logits = 2 * 4 * self.num_slots * self.model.vocab_size
        return self.weight_bytes + self.slot_bytes + self.prompt_bytes + logits

    def describe_memory(self) -> str:
        """`3.10 GiB = 1.00 GiB of weights + ...`."""
        return (
            f"{gib(self.num_bytes)}: weights {gib(self.weight_bytes)}, KV cache of {self.num_slots} slot(s) "
            f"{gib(self.slot_bytes)}, of {self.num_prompts} prompt(s) {gib(self.prompt_bytes)}"
        )

    def decoding_seconds(self, num_completions: int, num_tokens: int, num_engines: int = 1) -> float:
        """Of completions of `num_tokens` each by so many engines, each on a GPU of its own or all on one CPU."""
        rates = assumed_rates(self.device, num_engines)
        num_steps = -(-num_completions // (num_engines * self.num_slots)) * num_tokens
        seconds = num_completions * num_tokens * sampling_flops_per_token(self.model) / rates.flops_per_s
        if rates.bytes_per_s is not None:
            seconds = max(seconds, num_steps * self._read_bytes(num_tokens) / (rates.bytes_per_s / num_engines))
        return seconds / SAMPLING_UTILISATION + num_steps * STEP_OVERHEAD_S

    def describe_rate(self, num_engines: int = 1) -> str:
        """What `decoding_seconds` assumes."""
        rates = assumed_rates(self.device, num_engines)
        what = "" if rates.bytes_per_s is None else "what products or memory reads allow on "
        overhead = f"and {STEP_OVERHEAD_S * 1000:.0f} ms for each token of a row"
        return f"{SAMPLING_UTILISATION:.0%} of {what}{rates.origin}, {overhead}"

    def _read_bytes(self, num_tokens: int) -> float:
        """In a step of decoding: the weights of products, and half of what full rows hold in the end."""
        counts = count_parameters(self.model)
        weights = counts.scaling * weight_bytes(self.model, self.dtype, self.device) / counts.total
        return weights + self.num_slots * num_tokens / 2 * kv_bytes_per_token(self.model, self.dtype, self.device)

    def _cache_bytes(self, num_rows: int, chunk_len: int | None) -> int:
        return cache_bytes(
            self.model, num_rows, self.max_len, chunk_len=chunk_len, dtype=self.dtype, device=self.device
        )


def sampling_flops_per_token(model: GPTConfig) -> float:
    """Of the forward pass alone: a third of training's."""
    return flops_per_token(model) / 3


def engine_device(device: str) -> str:
    """What an engine will compute on, as far as this machine can tell."""
    if device != "auto":
        return device
    return "cpu" if visible_gpu_name() is None else "cuda"
