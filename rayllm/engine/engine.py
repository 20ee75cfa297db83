"""The engine: prompts in, completions out, for RL, evaluation, chat and serving alike.

Each step computes the prompts that are new, draws a token for every sequence that is ready for one, and runs these
through the model together. A row that ends goes to the next that waits. When a sequence closes a python block, the call
runs beside the loop, and its output enters the sequence in one short chunk. The draw for token t is a function of
(seed, t) alone, so a sequence comes out the same whatever runs beside it, up to floating-point ties (`sampling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from rayllm.config.schema import SamplingConfig
from rayllm.engine.prefixes import PrefixTable
from rayllm.engine.request import Batch, Delta, Handle, Request
from rayllm.engine.runner import ModelRunner
from rayllm.engine.sampling import Draws, draw_tokens, stable_seed
from rayllm.engine.scheduler import Scheduler
from rayllm.engine.sequence import Dialect, SequenceState
from rayllm.engine.tools import ToolCall, ToolRunner
from rayllm.model.gpt import GPT
from rayllm.text.stream import AnswerStream
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Calculator, Completion, Prompt

CHUNK_LEN = 512
"""Most tokens of one prompt in a step: what others, who decode, wait for."""
ROW_CHUNK_LEN = 64
"""Most tokens of one sequence's own in a step: tool output is short, and room for it is kept in every window."""
TOKEN_BUDGET = 4096
"""Most tokens of all prompts in a step."""


class Engine:
    """Driven by one thread: `submit`, then `step` until the handle is done.

    `num_slots` sequences decode together, from at most `num_prompts` (None: as many) different prompts.
    `max_len` bounds a prompt and its completion together. A call of the calculator may take `tool_timeout_s`.
    `repeats` makes what a batch gives depend on the batch alone, down to the last bit: tool output joins one step after
    its call, and nothing is kept of prompts once the engine is idle. Without it a call's output joins when it is there,
    and a prompt that goes on from an earlier one starts where that ended.

    Raises ValueError for sizes with which nothing could ever run.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        num_slots: int,
        max_len: int,
        num_prompts: int | None = None,
        calculator: Calculator | None = None,
        tool_timeout_s: float = 5.0,
        repeats: bool = False,
        weights_version: int = 0,
        chunk_len: int = CHUNK_LEN,
        row_chunk_len: int = ROW_CHUNK_LEN,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        num_prompts = num_slots if num_prompts is None else num_prompts
        sizes = {"num_slots": num_slots, "num_prompts": num_prompts, "max_len": max_len, "chunk_len": chunk_len}
        for name, size in (sizes | {"row_chunk_len": row_chunk_len, "token_budget": token_budget}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.weights_version = weights_version
        self._tokenizer = tokenizer
        self._vocab_size = model.config.vocab_size
        self._max_len = max_len
        self._repeats = repeats
        self._dialect = Dialect.of(tokenizer)
        self._runner = ModelRunner(
            model,
            num_slots=num_slots,
            num_prompts=num_prompts,
            max_len=max_len,
            chunk_len=chunk_len,
            row_chunk_len=row_chunk_len,
        )
        self._scheduler = Scheduler(
            num_slots,
            PrefixTable(num_prompts),
            token_budget=token_budget,
            chunk_len=chunk_len,
            row_chunk_len=row_chunk_len,
            prompt_cut=self._runner.prompts.shortest_cut,
            row_cut=self._runner.rows.shortest_cut,
        )
        self._tools = None if calculator is None else ToolRunner(calculator, tokenizer, tool_timeout_s)
        self._calling: list[tuple[SequenceState, ToolCall]] = []
        self._step_idx = 0
        self._new_weights: tuple[Mapping[str, Tensor], int] | None = None

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    @property
    def tool_counts(self) -> dict[str, int]:
        """Calls so far whose outcome was looked at, and those that failed or took too long."""
        return {} if self._tools is None else dict(self._tools.counts)

    def submit(self, request: Request) -> Handle:
        """Queue a request. Raises ValueError where it cannot be run; others are not touched."""
        request.check(self._vocab_size, self._max_len)
        prompt, sampling = request.prompt, request.sampling
        run_seed = sampling.seed if request.seed is None else request.seed
        handle = Handle(request)
        handle.sequences = [
            SequenceState(
                handle=handle,
                prompt_ids=tuple(prompt.token_ids),
                sample_idx=i,
                sampling=sampling,
                seed=stable_seed(run_seed, prompt.prompt_id, i),
                max_tokens=min(sampling.max_tokens, self._max_len - len(prompt.token_ids)),
                dialect=self._dialect,
                answer=AnswerStream(self._tokenizer, sampling.stop) if sampling.stop else None,
            )
            for i in range(request.num_samples)
        ]
        self._scheduler.submit(handle.sequences)
        return handle

    def step(self) -> list[Delta]:
        """Give each sequence that is ready for it one token; returns what was added. Waits for a tool only where there
        is nothing else to do, and no longer than its time limit."""
        self._step_idx += 1
        deltas = [_end(sequence) for sequence in self._scheduler.cancelled()]
        self._remove_finished()
        self._join_tool_output(deltas)
        work = self._scheduler.plan(starts=self._new_weights is None)
        self._runner.prepare(work.clears, work.copies)
        self._runner.run(work.chunks)
        if self._new_weights is None:
            self._runner.start(self._scheduler.admit())
        self._draw(deltas)
        self._remove_finished()
        if any(sequence.num_due for sequence in self._scheduler.running):
            self._runner.decode(self._scheduler.running)
        elif self._new_weights is not None and not self._scheduler.running:
            self._take_weights(*self._new_weights)
        elif self._tools is not None and self._calling and not deltas and not work.chunks:
            self._tools.wait(self._calling[0][1])
        if self._repeats and self.is_idle:
            self._scheduler.prefixes.clear()
        return deltas

    def generate(
        self, prompts: Iterable[Prompt], sampling: SamplingConfig, *, num_samples: int = 1
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, in the order of the prompts.

        Those of a prompt that cannot be run have failed, with the reason as their error.
        """
        batch = self.submit_all([Request(prompt, sampling, num_samples) for prompt in prompts])
        while not self.is_idle:
            self.step()
        return batch.completions()

    def submit_all(self, requests: Iterable[Request]) -> Batch:
        """Queue requests together; those that cannot be run have failed."""
        batch = Batch()
        for request in requests:
            try:
                batch.add(self.submit(request))
            except ValueError as error:
                batch.add_failed(request, str(error))
        return batch

    def load(self, state: Mapping[str, Tensor], version: int, *, drain: bool = False) -> None:
        """Replace the weights. What runs goes on under the new ones, from its tokens so far, computed anew; or, with
        `drain`, it ends under the old ones, and nothing else starts before; `state` must stay as it is until then.

        Raises ValueError, and changes nothing, where the weights are of another model.
        """
        self._runner.check_weights(state)
        if drain and self._scheduler.running:
            self._new_weights = (state, version)
        else:
            self._take_weights(state, version)

    def _take_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        self._runner.scrub(range(len(self._scheduler.running)))
        self._runner.load(state)
        self._scheduler.start_over()
        self.weights_version, self._new_weights = version, None

    def _join_tool_output(self, deltas: list[Delta]) -> None:
        """Let the output of calls that are done, or due, enter their sequences."""
        self._calling = [(sequence, call) for sequence, call in self._calling if sequence.finish_reason is None]
        if self._tools is None or not self._calling:
            return
        if self._repeats:
            for _, call in self._calling:
                if call.join_step <= self._step_idx:
                    self._tools.wait(call)
        self._tools.poll()
        still_calling = []
        for sequence, call in self._calling:
            if call.join_step > self._step_idx if self._repeats else not call.done.is_set():
                still_calling.append((sequence, call))
                continue
            sequence.is_calling = False
            if taken := sequence.insert(self._tools.output_ids(call), self.weights_version):
                deltas.append(_delta(sequence, taken, sampled=False))
        self._calling = still_calling

    def _draw(self, deltas: list[Delta]) -> None:
        """One token for each sequence that is ready for it; one whose logits are not numbers has failed."""
        running = self._scheduler.running
        kinds: dict[tuple[float, int | None, float | None], list[int]] = {}  # rows of one kind are drawn together
        for row_idx, s in enumerate(running):
            if not s.is_calling and s.finish_reason is None and not s.num_due:
                how = s.sampling
                kinds.setdefault((how.temperature, how.top_k, how.top_p), []).append(row_idx)
        if not kinds:
            return
        logits_BV = self._runner.logits_BV(len(running))
        seeds_B = np.array([s.seed for s in running], dtype=np.uint64)
        t_B = np.array([len(s.token_ids) for s in running], dtype=np.uint64)
        for (temperature, top_k, top_p), rows in kinds.items():
            chosen = slice(None) if len(rows) == len(running) else rows
            draws = draw_tokens(
                logits_BV[chosen], seeds_B[chosen], t_B[chosen], temperature=temperature, top_k=top_k, top_p=top_p
            )
            for i, row_idx in enumerate(rows):
                deltas.append(self._add(running[row_idx], draws, i))

    def _add(self, sequence: SequenceState, draws: Draws, i: int) -> Delta:
        if not draws.is_finite[i]:
            where = f"{sequence.handle.request}, sample {sequence.sample_idx}, token {len(sequence.token_ids)}"
            error = f"{where}: the logits are not finite; the model's weights are damaged or diverged"
            sequence.finish("failed", error)
            return _end(sequence)
        assert sequence.prefix is not None
        sequence.prefix.is_sound = True
        kept_ids = draws.kept_ids[i] if draws.kept_ids is not None else ()
        token_id = draws.tokens[i]
        code_ids = sequence.add(token_id, draws.logprobs[i], kept_ids, self.weights_version)
        if code_ids is not None and self._tools is not None and sequence.finish_reason is None:
            sequence.is_calling = True
            self._calling.append((sequence, self._tools.start(code_ids, self._step_idx + 1)))
        return _delta(sequence, (token_id,), sampled=True)

    def _remove_finished(self) -> None:
        """Free the rows of what has ended. What ended with a token that was drawn had numbers for logits."""
        running = self._scheduler.running
        unseen = [i for i, s in enumerate(running) if s.finish_reason is not None and not s.ended_in_a_draw]
        damaged = self._runner.scrub(unseen)
        self._runner.change(self._scheduler.remove_finished(keeps=not self._repeats, damaged=damaged))


def _delta(sequence: SequenceState, token_ids: tuple[int, ...], *, sampled: bool) -> Delta:
    return Delta(sequence.handle, sequence.sample_idx, token_ids, (sampled,) * len(token_ids), sequence.finish_reason)


def _end(sequence: SequenceState) -> Delta:
    return _delta(sequence, (), sampled=False)
