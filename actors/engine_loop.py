"""One engine for many requests at once: a loop steps it in a thread and hands each request what was added to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Delta, Engine
from rayllm.types import Prompt

_log = logging.getLogger(__name__)
_STOPPED = "the engine has stopped; the server's log says why"


class EngineBusyError(Exception):
    """As many answers wait as may."""


class GenerationFailedError(Exception):
    """The engine could not write an answer."""


class Ticket:
    """A request's share of the engine: `deltas()` until every sequence has ended; `close()` gives up the rest."""

    def __init__(self, seq_ids: list[int], cancel: Callable[[Ticket, int], None]) -> None:
        self.seq_ids = tuple(seq_ids)
        self._cancel = cancel
        self._queue: asyncio.Queue[Delta | GenerationFailedError] = asyncio.Queue()

    async def deltas(self) -> list[Delta]:
        """What has been added since the last call; waits for at least one. Raises GenerationFailedError."""
        arrived = [await self._queue.get()]
        while not self._queue.empty():
            arrived.append(self._queue.get_nowait())
        deltas = []
        for delta in arrived:
            if isinstance(delta, GenerationFailedError):
                raise delta
            deltas.append(delta)
        return deltas

    def cancel(self, seq_id: int) -> None:
        """End one sequence; its place is free after the step under way. Nothing happens where it has ended."""
        self._cancel(self, seq_id)

    def close(self) -> None:
        """End all sequences that have not."""
        for seq_id in self.seq_ids:
            self._cancel(self, seq_id)

    def put(self, delta: Delta | GenerationFailedError) -> None:
        self._queue.put_nowait(delta)


class EngineLoop:
    """Owns the engine; every call but the engine's step is made on the event loop, between two steps.

    An engine whose step raised is not trusted again: its requests fail and `build_engine` makes another.
    """

    def __init__(self, build_engine: Callable[[], Engine], *, num_slots: int, max_waiting: int) -> None:
        self._build_engine = build_engine
        self._engine = build_engine()
        self.num_slots = num_slots
        self._max_open = num_slots + max_waiting
        self._open: dict[int, Ticket] = {}
        self._cancelled: set[int] = set()
        self._between_steps = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        """Sequences that run or wait."""
        return len(self._open)

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Step the engine while the block runs; what is unfinished then fails."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._fail_all(_STOPPED))
        try:
            yield
        finally:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def submit(
        self, prompt: Prompt, sampling: SamplingConfig, *, num_samples: int = 1, seed: int | None = None
    ) -> Ticket:
        """Queue `num_samples` answers. Raises EngineBusyError, ValueError for a bad prompt, GenerationFailedError."""
        async with self._between_steps:
            if not self.is_running:
                raise GenerationFailedError(_STOPPED)
            if self.num_open + num_samples > self._max_open:
                raise EngineBusyError(f"{self.num_open} answers are under way or waiting, at most {self._max_open} may")
            seq_ids = self._engine.submit(prompt, sampling, num_samples=num_samples, seed=seed)
            ticket = Ticket(seq_ids, self._cancel)
            self._open |= dict.fromkeys(seq_ids, ticket)
            self._wake.set()
            return ticket

    def _cancel(self, ticket: Ticket, seq_id: int) -> None:
        # The engine may be in a step, so it is told later; who asked hears nothing more from now on.
        # A ticket of an engine that failed shares numbers with those of the next, hence the look at whose it is.
        if self._open.get(seq_id) is ticket:
            del self._open[seq_id]
            self._cancelled.add(seq_id)
            self._wake.set()

    async def _run(self) -> None:
        event_loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
            while True:
                await self._wake.wait()
                async with self._between_steps:
                    while self._cancelled:
                        self._drop(self._cancelled.pop())
                    if self._engine.is_idle:
                        self._wake.clear()
                        continue
                    try:
                        deltas = await event_loop.run_in_executor(thread, self._engine.step)
                    except Exception as error:  # noqa: BLE001, whatever it is, it ends these requests alone
                        _log.exception("the engine failed with %d answers under way", self.num_open)
                        self._fail_all(f"generation failed: {error}")
                        self._engine = self._build_engine()
                        continue
                    self._deliver(deltas)

    def _drop(self, seq_id: int) -> None:
        self._engine.cancel(seq_id)
        self._engine.completion(seq_id)

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            ticket = self._open.get(delta.seq_id)
            if ticket is None:
                continue  # cancelled meanwhile
            if delta.finish_reason is not None:
                del self._open[delta.seq_id]
                self._engine.completion(delta.seq_id)
            if delta.finish_reason in ("failed", "cancelled"):
                ticket.put(GenerationFailedError("generation failed: the model's output is not a number"))
            else:
                ticket.put(delta)

    def _fail_all(self, message: str) -> None:
        for ticket in set(self._open.values()):
            ticket.put(GenerationFailedError(message))
        self._open.clear()
        self._cancelled.clear()
