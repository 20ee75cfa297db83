"""Many requests on one engine: what happens to them when the engine fails, is full, or stops."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from rayllm.config.schema import SamplingConfig
from rayllm.engine.async_engine import AsyncEngine, EngineBusyError, GenerationFailedError, RequestStream
from rayllm.engine.engine import Engine
from rayllm.engine.reply import render_reply_prompt
from rayllm.engine.request import Delta, Handle, Request
from rayllm.runs.load import load
from rayllm.types import Conversation, Message, Prompt

TIME_LIMIT_S = 30.0


class BrittleEngine(Engine):
    """Fails in its step `fails_at`; stands still in a step while the `gate` is closed."""

    num_steps = 0
    fails_at = 10**9

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gate, self.is_in_step = threading.Event(), threading.Event()
        self.gate.set()
        self.handles: list[Handle] = []

    def submit(self, request: Request) -> Handle:
        self.handles.append(super().submit(request))
        return self.handles[-1]

    def step(self) -> list[Delta]:
        self.is_in_step.set()
        assert self.gate.wait(TIME_LIMIT_S)
        self.num_steps += 1
        if self.num_steps == self.fails_at:
            raise RuntimeError("out of memory")
        return super().step()


class Kitchen:
    """Builds engines and requests of the small chat model; `engines` are those built so far."""

    def __init__(self, checkpoint: Path) -> None:
        self.model, self.tokenizer = load(checkpoint)
        self.engines: list[BrittleEngine] = []
        self.max_engines = 10**9

    def build_engine(self) -> Engine:
        if len(self.engines) == self.max_engines:
            raise RuntimeError("there is no further engine")
        self.engines.append(BrittleEngine(self.model, self.tokenizer, num_slots=2, max_len=1024))
        return self.engines[-1]

    def request(self, text: str, num_samples: int = 1, **changes: object) -> Request:
        sampling = SamplingConfig(**{"temperature": 0, "max_tokens": 1000, **changes})  # type: ignore[arg-type]
        ids, sampling = render_reply_prompt(self.tokenizer, Conversation((Message("user", text),)), sampling, 1024)
        return Request(Prompt("", tuple(ids)), sampling, num_samples)

    async def read(self, stream: RequestStream) -> str:
        """The samples, one behind the other."""
        ids: defaultdict[int, list[int]] = defaultdict(list)
        async for deltas in stream:
            for delta in deltas:
                ids[delta.sample_idx] += delta.token_ids
        return "".join(self.tokenizer.decode(ids[sample_idx]) for sample_idx in sorted(ids))


@pytest.fixture
def kitchen(chat_checkpoint: Path) -> Kitchen:
    return Kitchen(chat_checkpoint)


async def wait_until_idle(engine: AsyncEngine, inner: Engine) -> None:
    while engine.num_open or not inner.is_idle:
        await asyncio.sleep(0.001)


def test_requests_at_once_get_what_each_would_get_alone(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(kitchen.build_engine, num_slots=2, max_waiting=9)
        asked = [kitchen.request("hi"), kitchen.request("sing", max_tokens=30), kitchen.request("hi", 2, stop=("ö",))]
        async with engine.running():
            streams = [await engine.submit(request) for request in asked]
            said = await asyncio.gather(*(kitchen.read(stream) for stream in streams))
            assert said[0] == "Hello, wörld! How are you?<|assistant_end|>" and said[1] == "la " * 10
            assert said[2] == "Hello, wö" * 2
            assert engine.num_open == 0
            assert await kitchen.read(streams[0]) == ""  # what has ended stays so

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_a_failed_engine_is_replaced_and_later_requests_do_not_notice(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(kitchen.build_engine, num_slots=2, max_waiting=2)
        kitchen.engines[-1].fails_at = 5
        async with engine.running():
            lost = [await engine.submit(kitchen.request("sing")) for _ in range(3)]
            for stream in lost:
                with pytest.raises(GenerationFailedError, match="out of memory"):
                    await kitchen.read(stream)
            answer = await engine.submit(kitchen.request("hi"))
            for stream in lost:
                stream.close()
            assert (await kitchen.read(answer)).startswith("Hello, wörld!")
            assert engine.num_open == 0 and engine.is_running and len(kitchen.engines) == 2

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_a_failed_engine_is_gone_before_the_next_is_built(kitchen: Kitchen, caplog: pytest.LogCaptureFixture) -> None:
    """A GPU may have no room for two."""
    caplog.set_level(logging.CRITICAL, "rayllm.engine.async_engine")  # what is logged holds the error's frames
    built: list[weakref.ref[Engine]] = []

    def build() -> Engine:
        assert all(engine() is None for engine in built)
        kitchen.build_engine()
        kitchen.engines[-1].fails_at = 3
        built.append(weakref.ref(kitchen.engines[-1]))
        return kitchen.engines.pop()

    async def scenario() -> None:
        engine = AsyncEngine(build, num_slots=2, max_waiting=2)
        async with engine.running():
            for _ in range(3):
                with pytest.raises(GenerationFailedError, match="out of memory"):
                    await kitchen.read(await engine.submit(kitchen.request("sing")))
        assert len(built) == 4

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_where_no_engine_can_be_had_nothing_hangs(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(kitchen.build_engine, num_slots=2, max_waiting=2)
        kitchen.engines[-1].fails_at, kitchen.max_engines = 5, 1
        async with engine.running():
            stream = await engine.submit(kitchen.request("sing"))
            with pytest.raises(GenerationFailedError, match="out of memory"):
                await kitchen.read(stream)
            while engine.is_running:
                await asyncio.sleep(0.001)
            with pytest.raises(GenerationFailedError, match="has stopped"):
                await engine.submit(kitchen.request("hi"))

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_a_request_whose_logits_are_no_numbers_fails_alone(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(kitchen.build_engine, num_slots=2, max_waiting=9)
        async with engine.running():
            song = await engine.submit(kitchen.request("sing", max_tokens=60))
            broken = await engine.submit(kitchen.request("hi \x01", num_samples=5))
            with pytest.raises(GenerationFailedError, match="logits are not finite"):
                await kitchen.read(broken)
            assert await kitchen.read(song) == "la " * 20
            await wait_until_idle(engine, kitchen.engines[-1])
            with pytest.raises(ValueError, match="leaves no room for an answer"):
                await engine.submit(Request(Prompt("", (0,) * 1024), SamplingConfig()))

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_closing_a_stream_ends_running_and_waiting_samples(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(kitchen.build_engine, num_slots=2, max_waiting=4)
        inner = kitchen.engines[-1]
        async with engine.running():
            stream = await engine.submit(kitchen.request("sing", num_samples=5))  # two run, three wait
            await anext(stream)
            reader = asyncio.create_task(kitchen.read(stream))
            stream.close()
            assert engine.num_open == 0
            await reader  # and does not wait for what never comes
            await wait_until_idle(engine, inner)
            assert inner.num_steps < 100  # and not the thousand that the song takes
            assert (await kitchen.read(await engine.submit(kitchen.request("hi")))).startswith("Hello, wörld!")

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_a_request_closed_within_a_step_is_cancelled_after_it(kitchen: Kitchen) -> None:
    """The step runs in a thread of its own, and must not see its sequences change."""

    async def scenario() -> None:
        engine = AsyncEngine(kitchen.build_engine, num_slots=2, max_waiting=4)
        inner = kitchen.engines[-1]
        inner.gate.clear()
        async with engine.running():
            stream = await engine.submit(kitchen.request("sing"))
            ((sequence,),) = [handle.sequences for handle in inner.handles]
            assert await asyncio.to_thread(inner.is_in_step.wait, TIME_LIMIT_S)
            stream.close()
            assert sequence.finish_reason is None
            inner.gate.set()
            await wait_until_idle(engine, inner)
            assert sequence.finish_reason == "cancelled" and inner.num_steps == 2

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_what_is_too_much_is_refused_and_a_stopped_engine_says_so(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(kitchen.build_engine, num_slots=2, max_waiting=1)
        async with engine.running():
            stream = await engine.submit(kitchen.request("sing", num_samples=3))
            with pytest.raises(EngineBusyError, match="3 answers are under way or waiting, at most 3 may"):
                await engine.submit(kitchen.request("hi"))
        with pytest.raises(GenerationFailedError, match="has stopped"):
            await kitchen.read(stream)
        with pytest.raises(GenerationFailedError, match="has stopped"):
            await engine.submit(kitchen.request("hi"))

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))
