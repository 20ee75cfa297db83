"""The tensors of the engine: chunks of prompts and rows run together, and running rows decode together.

Shapes: B rows, T tokens, P prompts, R rows of a prompt, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rayllm.engine.graphs import DecodeGraphs
from rayllm.engine.scheduler import Chunk, Keep, Move, PromptCopy, Start, batches
from rayllm.engine.sequence import SequenceState
from rayllm.engine.views import ChunkView, DecodeInput, DecodeView
from rayllm.model.attention import FlashFunction, load_flash
from rayllm.model.gpt import GPT
from rayllm.model.kv_cache import KVCache

KEYS_PER_BUCKET = 16
"""A decode step reads a multiple of so many keys."""
GRAPH_KEYS_PER_BUCKET, GRAPH_ROWS_PER_BUCKET = 128, 32
"""As a CUDA graph it also has a multiple of so many rows, so that graphs are few; those in excess compute in vain."""


class ModelRunner:
    """A model, a cache of `num_prompts` prompts and one of what `num_slots` rows add to theirs, each of up to `max_len`
    tokens; and what each prompt and row would say next. Prompts are fed at most `chunk_len` tokens at once, rows
    `row_chunk_len`. `flash` (None: what is installed) attends to what rows added.

    On a GPU decode steps are replayed as CUDA graphs.
    """

    def __init__(
        self,
        model: GPT,
        *,
        num_slots: int,
        num_prompts: int,
        max_len: int,
        chunk_len: int,
        row_chunk_len: int,
        flash: FlashFunction | None = None,
    ) -> None:
        self.model = model
        device, dtype = model.lm_head.weight.device, model.compute_dtype or model.lm_head.weight.dtype
        self._flash = flash or load_flash(device, dtype)
        self.prompts, self.rows = (
            KVCache(model.config, num_rows, max_len, chunk_len=most, rings=rings, device=device, dtype=dtype)
            for num_rows, most, rings in (
                (num_prompts, chunk_len, True),
                (num_slots, row_chunk_len, self._flash is None),
            )
        )
        self._prompt_logits: dict[int, Tensor] = {}
        self._row_logits: dict[int, Tensor] = {}  # of rows that have come since the last decode step
        self._decoded_BV = torch.empty(0, model.config.vocab_size, device=device)
        self._graphs = DecodeGraphs(self._run_decode) if device.type == "cuda" else None
        self._most = (0, 0)  # prompts, and samples of one, that a graph has had to do with

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> None:
        """Compute chunks; what follows the last token of each is kept."""
        for batch in batches(chunks):
            lengths = [len(chunk.token_ids) for chunk in batch]
            tokens_BT = np.zeros((len(batch), max(lengths)), dtype=np.int64)
            for b, chunk in enumerate(batch):
                tokens_BT[b, : lengths[b]] = chunk.token_ids
            x_BTD = self.model.hidden(self._send(tokens_BT), ChunkView(self.prompts, self.rows, batch))
            ends_B = self._send(np.array(lengths) - 1)
            logits_BV = self.model.logits(x_BTD[torch.arange(len(batch), device=x_BTD.device), ends_B])
            kept = self._prompt_logits if batch[0].prefix_row is None else self._row_logits
            kept |= {chunk.row_idx: logits_V for chunk, logits_V in zip(batch, logits_BV, strict=True)}

    @torch.inference_mode()
    def decode(self, running: Sequence[SequenceState]) -> None:
        """Run the next due token of each sequence; where none is due, its last one again, which changes nothing."""
        given = self._decode_input(running)
        self._decoded_BV = self._graphs(given) if self._graphs is not None else self._run_decode(given)
        self._row_logits.clear()

    @torch.inference_mode()
    def logits_BV(self, num_rows: int) -> Tensor:
        """What the first rows would say next; the caller may overwrite it."""
        logits_BV = self._decoded_BV[:num_rows]
        for row_idx in range(len(logits_BV)):
            if row_idx in self._row_logits:
                logits_BV[row_idx] = self._row_logits[row_idx]
        if missing := range(len(logits_BV), num_rows):
            logits_BV = torch.cat([logits_BV, torch.stack([self._row_logits[row_idx] for row_idx in missing])])
        return logits_BV

    @torch.inference_mode()
    def prepare(self, clears: Sequence[int], copies: Sequence[PromptCopy]) -> None:
        """Clear prompts, then let prompts begin as others do."""
        for row_idx in clears:
            self.prompts.clear_row(row_idx)
        for copy in copies:
            self.prompts.copy_row(copy.to_prompt, copy.from_prompt, copy.length)

    def start(self, starts: Sequence[Start]) -> None:
        """Rows begin where prompts end."""
        for row_idx, from_prompt in starts:
            self._row_logits[row_idx] = self._prompt_logits[from_prompt]

    @torch.inference_mode()
    def change(self, changes: Sequence[Keep | Move]) -> None:
        """Rows become prompts, or go elsewhere, in this order."""
        for change in changes:
            if isinstance(change, Keep):
                if change.must_clear:
                    self.prompts.clear_row(change.to_prompt)
                self.prompts.copy_row(change.to_prompt, change.from_prompt, change.base)
                self.prompts.append_row(change.to_prompt, change.base, self.rows, change.from_row, change.length)
                continue
            to_row, from_row, length = change
            self.rows.copy_row(to_row, from_row, length)
            if from_row in self._row_logits:
                self._row_logits[to_row] = self._row_logits.pop(from_row)
            elif from_row < len(self._decoded_BV):
                self._row_logits[to_row] = self._decoded_BV[from_row].clone()

    @torch.inference_mode()
    def scrub(self, rows: Sequence[int]) -> list[int]:
        """Clear those of the running rows whose logits are not numbers, as masks do not hide such; returns them."""
        if not rows:
            return []
        logits_BV = torch.stack(
            [self._row_logits[row] if row in self._row_logits else self._decoded_BV[row] for row in rows]
        )
        is_finite = logits_BV.isfinite().all(dim=-1).tolist()
        damaged = [row_idx for row_idx, is_sound in zip(rows, is_finite, strict=True) if not is_sound]
        for row_idx in damaged:
            self.rows.clear_row(row_idx)
        return damaged

    def check_weights(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where these are not the tensors of this model."""
        own = self.model.state_dict()
        wrong = sorted(n for n in own.keys() | state.keys() if _shape(own.get(n)) != _shape(state.get(n)))
        if wrong:
            ours, theirs = _shape(own.get(wrong[0])), _shape(state.get(wrong[0]))
            raise ValueError(
                f"weights of another model: {len(wrong)} tensors differ, e.g. {wrong[0]}: expected {ours}, got {theirs}"
            )

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the weights in place, cast to the dtype they have here."""
        for name, weight in self.model.state_dict().items():
            weight.copy_(state[name])
        self._prompt_logits.clear()
        self._row_logits.clear()

    def _decode_input(self, running: Sequence[SequenceState]) -> DecodeInput:
        num_rows, is_static = len(running), self._graphs is not None
        num_columns = min(_round_up(num_rows, GRAPH_ROWS_PER_BUCKET), self.rows.num_rows) if is_static else num_rows
        numbers_5B = np.zeros((5, num_columns), dtype=np.int64)
        numbers_5B[:, :num_rows] = np.array([sequence.run_next() for sequence in running]).T
        prompt_B = numbers_5B[4, :num_rows].copy()
        own_B = (numbers_5B[2] - numbers_5B[3])[:num_rows]
        first_prompt = 0 if is_static else int(np.min(prompt_B))
        count_P = np.bincount(prompt_B - first_prompt)
        nth_B = np.empty(num_rows, dtype=np.int64)  # each row's place among those of its prompt
        nth_B[np.argsort(prompt_B, kind="stable")] = np.concatenate([np.arange(count) for count in count_P])
        num_prompts, num_samples = len(count_P), int(np.max(count_P))
        if is_static:
            num_prompts, num_samples = max(self._most[0], num_prompts), max(self._most[1], num_samples)
            self._most = (num_prompts, num_samples)
        rows_PR = np.zeros((num_prompts, num_samples), dtype=np.int64)
        rows_PR[prompt_B - first_prompt, nth_B] = np.arange(num_rows)
        numbers_5B[4, :num_rows] = (prompt_B - first_prompt) * num_samples + nth_B
        return DecodeInput(
            numbers_5B=self._send(numbers_5B),
            rows_PR=self._send(rows_PR),
            first_prompt=first_prompt,
            num_prompt_keys=self._num_keys(int(numbers_5B[3].max())),
            num_keys=self._num_keys(int(own_B.max()) + 1) if self._flash is None else self.rows.max_len,
            shortest=0 if is_static else int(own_B.min()) + 1,
        )

    def _num_keys(self, longest: int) -> int:
        bucket = KEYS_PER_BUCKET if self._graphs is None else GRAPH_KEYS_PER_BUCKET
        return min(self.rows.max_len, _round_up(longest, bucket))

    def _run_decode(self, given: DecodeInput) -> Tensor:
        view = DecodeView(self.prompts, self.rows, given, self._flash)
        return self.model.logits(self.model.hidden(view.tokens_B[:, None], view)[:, 0])

    def _send(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.prompts.device, non_blocking=True)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _shape(weight: Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else tuple(weight.shape)
