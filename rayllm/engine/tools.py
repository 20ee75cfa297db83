"""Runs the calls of tool blocks beside the decode loop; a call that fails or hangs costs its own row alone."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Calculator

MAX_OUTPUT_CHARS = 2000
"""Longer outputs are cut."""
MAX_STUCK = 16
"""With so many threads stuck in calls that never returned, further calls get an error at once."""
_ALL_STUCK = f"error: {MAX_STUCK} earlier calls never returned"


@dataclass(eq=False)
class ToolCall:
    """A tool block's call. Its output is None where it has none, or a text, which may be an error's."""

    code_ids: tuple[int, ...]
    join_step: int
    """The step of the engine at which its output enters, where steps are to repeat."""
    output: str | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def finish(self, output: str | None) -> None:
        """The first word counts."""
        if not self.done.is_set():
            self.output = output
            self.done.set()


@dataclass(eq=False)
class _Lane:
    """A thread's present call, and whether the thread is to take another."""

    is_open: bool = True
    call: ToolCall | None = None
    since: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ToolRunner:
    """A thread that runs a tool's calls in order. When one takes longer than `timeout_s`, its output is an error, its
    thread is left to itself and another goes on."""

    def __init__(self, tool: Calculator, tokenizer: Tokenizer, timeout_s: float) -> None:
        self._tool, self._tokenizer, self._timeout_s = tool, tokenizer, timeout_s
        self._calls: queue.SimpleQueue[ToolCall | None] = queue.SimpleQueue()
        self._stuck: list[threading.Thread] = []
        self.counts: Counter[str] = Counter(calls=0, errors=0, timeouts=0)
        self._open_lane()
        weakref.finalize(self, self._calls.put, None)

    def start(self, code_ids: Sequence[int], join_step: int) -> ToolCall:
        """Queue a call of the code that these tokens spell."""
        call = ToolCall(tuple(code_ids), join_step)
        if not self._lane.is_open and self._num_stuck() < MAX_STUCK:
            self._open_lane()
        if self._lane.is_open:
            self._calls.put(call)
        else:
            call.finish(_ALL_STUCK)
        return call

    def poll(self) -> None:
        """Give up the present call where its time is over."""
        lane = self._lane
        with lane.lock:
            if not lane.is_open or lane.call is None or time.monotonic() - lane.since < self._timeout_s:
                return
            lane.call.finish(f"error: no result within {self._timeout_s:g} s")
            self.counts["timeouts"] += 1
            lane.is_open = False
        self._stuck.append(self._thread)
        if self._num_stuck() < MAX_STUCK:
            self._open_lane()
            return
        while not self._calls.empty():
            if (waiting := self._calls.get()) is not None:
                waiting.finish(_ALL_STUCK)

    def wait(self, call: ToolCall) -> None:
        """Until a call is done; at most as long as those in front of it and it may take."""
        while not call.done.wait(self._timeout_s / 4):
            self.poll()

    def output_ids(self, call: ToolCall) -> list[int]:
        """What a finished call adds to its sequence: its output between output tokens, or nothing."""
        self.counts["calls"] += 1
        self.counts["errors"] += call.output is None or call.output.startswith("error:")
        if call.output is None:
            return []
        start, end = (self._tokenizer.special_id(name) for name in ("<|output_start|>", "<|output_end|>"))
        return [start, *self._tokenizer.encode(call.output[:MAX_OUTPUT_CHARS]), end]

    def _num_stuck(self) -> int:
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        return len(self._stuck)

    def _open_lane(self) -> None:
        self._lane = _Lane()
        arguments = (self._tool, self._tokenizer, self._calls, self._lane)
        self._thread = threading.Thread(target=_run_calls, args=arguments, name="tools", daemon=True)
        self._thread.start()


def _run_calls(tool: Calculator, tokenizer: Tokenizer, calls: queue.SimpleQueue[ToolCall | None], lane: _Lane) -> None:
    """A thread's life. It knows nothing of its runner, so that it ends with it."""
    while lane.is_open and (call := calls.get()) is not None:
        with lane.lock:
            lane.call, lane.since = call, time.monotonic()
        try:
            value = tool(tokenizer.decode(list(call.code_ids)))
            output = value if value is None else str(value)
        except Exception as error:  # noqa: BLE001, whatever a tool raises is its answer
            output = f"error: {type(error).__name__}: {error}"
        with lane.lock:
            call.finish(output)
            lane.call = None
