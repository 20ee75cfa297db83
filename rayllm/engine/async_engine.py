"""One engine for many requests at once: it is stepped in a thread, and each request hears what was added to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from rayllm.engine.engine import Engine
from rayllm.engine.request import Delta, Handle, Request

_log = logging.getLogger(__name__)
_STOPPED = "the engine has stopped; the log says why"


class EngineBusyError(Exception):
    """As many answers wait as may."""


class GenerationFailedError(Exception):
    """The engine could not write an answer."""


class RequestStream:
    """A request's share of the engine: `async for deltas in stream` gives what has been added since the last time, and
    ends when every sample has. Raises GenerationFailedError. `close` gives up what has not ended."""

    def __init__(self, num_samples: int, cancel: Callable[[], None]) -> None:
        self.num_open = num_samples
        """Samples that run or wait."""
        self._cancel = cancel
        self._unread: list[Delta] = []
        self._error: str | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[Delta]:
        await self._news.wait()
        if self._unread:
            deltas, self._unread = self._unread, []
            if self.num_open:
                self._news.clear()
            return deltas
        if self._error is not None:
            raise GenerationFailedError(self._error)
        raise StopAsyncIteration

    def close(self) -> None:
        """End the samples that have not; their places are free after the step under way."""
        if self.num_open:
            self.end()
            self._cancel()

    def put(self, delta: Delta) -> None:
        """Hand over what a step has added."""
        self.num_open -= delta.finish_reason is not None
        self._unread.append(delta)
        self._news.set()

    def end(self, error: str | None = None) -> None:
        """Nothing comes any more, for this reason."""
        self.num_open, self._error = 0, error
        self._news.set()


class AsyncEngine:
    """Owns an engine; every call but the engine's step is made on the event loop, between two steps.

    An engine whose step raised is not trusted again: its requests fail and `build_engine` makes another.
    """

    def __init__(self, build_engine: Callable[[], Engine], *, num_slots: int, max_waiting: int) -> None:
        self._build_engine = build_engine
        self._engine = build_engine()
        self.num_slots = num_slots
        self._max_open = num_slots + max_waiting
        self._open: dict[Handle, RequestStream] = {}
        self._given_up: list[Handle] = []
        self._between_steps = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        """Samples that run or wait."""
        return sum(stream.num_open for stream in self._open.values())

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Step the engine while the block runs; what is unfinished then fails."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._on_stop)
        try:
            yield
        finally:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises EngineBusyError, ValueError where it cannot be run, GenerationFailedError."""
        async with self._between_steps:
            if not self.is_running:
                raise GenerationFailedError(_STOPPED)
            if self.num_open + request.num_samples > self._max_open:
                raise EngineBusyError(f"{self.num_open} answers are under way or waiting, at most {self._max_open} may")
            handle = self._engine.submit(request)
            stream = RequestStream(request.num_samples, lambda: self._give_up(handle))
            self._open[handle] = stream
            self._wake.set()
            return stream

    def _give_up(self, handle: Handle) -> None:
        # The engine may be in a step, so it is told later; who asked hears nothing more from now on.
        if self._open.pop(handle, None) is not None:
            self._given_up.append(handle)
            self._wake.set()

    async def _run(self) -> None:
        event_loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
            while True:
                await self._wake.wait()
                async with self._between_steps:
                    while self._given_up:
                        self._given_up.pop().cancel()
                    if self._engine.is_idle:
                        self._wake.clear()
                        continue
                    deltas = await event_loop.run_in_executor(thread, self._step)
                    if isinstance(deltas, str):
                        self._fail_all(deltas)
                        del self._engine  # two may not fit
                        gc.collect()
                        self._engine = self._build_engine()
                    else:
                        self._deliver(deltas)

    def _step(self) -> list[Delta] | str:
        try:
            return self._engine.step()
        except Exception as error:  # noqa: BLE001, whatever it is, it ends these requests alone
            _log.exception("the engine failed, and its requests with it; another takes its place")
            return f"generation failed: {error}"

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            stream = self._open.get(delta.handle)
            if stream is None:
                continue  # given up meanwhile
            if delta.finish_reason == "failed":
                error = delta.handle.sequences[delta.sample_idx].error
                self._give_up(delta.handle)
                stream.end(f"generation failed: {error}")
                continue
            stream.put(delta)
            if not stream.num_open:
                del self._open[delta.handle]

    def _fail_all(self, error: str) -> None:
        for stream in self._open.values():
            stream.end(error)
        self._open.clear()
        self._given_up.clear()

    def _on_stop(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the engine has stopped", exc_info=error)
        self._fail_all(_STOPPED)
