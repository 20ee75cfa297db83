"""The loop around the engine: what happens to requests when the engine fails, is full, or stops."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.engine_loop import EngineBusyError, EngineLoop, GenerationFailedError, Ticket
from rayllm.config.schema import SamplingConfig
from rayllm.engine.engine import Delta, Engine
from rayllm.engine.reply import render_reply_prompt
from rayllm.runs.load import load
from rayllm.types import Conversation, Message, Prompt

TIME_LIMIT_S = 30.0


class BrittleEngine(Engine):
    """Fails in its step `fails_at`."""

    num_steps = 0
    fails_at = 10**9

    def step(self) -> list[Delta]:
        self.num_steps += 1
        if self.num_steps == self.fails_at:
            raise RuntimeError("out of memory")
        return super().step()


class Kitchen:
    """Builds engines and prompts of the small chat model; `engines` are those built so far."""

    def __init__(self, checkpoint: Path) -> None:
        self.model, self.tokenizer = load(checkpoint)
        self.engines: list[BrittleEngine] = []

    def build_engine(self) -> Engine:
        self.engines.append(BrittleEngine(self.model, self.tokenizer, num_slots=2, max_len=1024))
        return self.engines[-1]

    def prompt(self, text: str) -> tuple[Prompt, SamplingConfig]:
        sampling = SamplingConfig(temperature=0, max_tokens=1000)
        ids, sampling = render_reply_prompt(self.tokenizer, Conversation((Message("user", text),)), sampling, 1024)
        return Prompt("", tuple(ids)), sampling

    async def read(self, ticket: Ticket) -> str:
        ids: list[int] = []
        while True:
            for delta in await ticket.deltas():
                ids += delta.token_ids
                if delta.finish_reason is not None:
                    return self.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def kitchen(chat_checkpoint: Path) -> Kitchen:
    return Kitchen(chat_checkpoint)


async def wait_until_idle(loop: EngineLoop, engine: Engine) -> None:
    while loop.num_open or not engine.is_idle:
        await asyncio.sleep(0.001)


def test_a_failed_engine_is_replaced_and_later_requests_do_not_notice(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        loop = EngineLoop(kitchen.build_engine, num_slots=2, max_waiting=2)
        kitchen.engines[-1].fails_at = 5
        async with loop.running():
            lost = [await loop.submit(*kitchen.prompt("sing")) for _ in range(3)]
            for ticket in lost:
                with pytest.raises(GenerationFailedError, match="out of memory"):
                    await kitchen.read(ticket)
            # Its numbers begin anew: closing old tickets must not touch new answers.
            answer = await loop.submit(*kitchen.prompt("hi"))
            for ticket in lost:
                ticket.close()
            assert (await kitchen.read(answer)).startswith("Hello, wörld!")
            assert loop.num_open == 0 and loop.is_running

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_closing_a_ticket_ends_running_and_waiting_sequences(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        loop = EngineLoop(kitchen.build_engine, num_slots=2, max_waiting=4)
        engine = kitchen.engines[-1]
        async with loop.running():
            ticket = await loop.submit(*kitchen.prompt("sing"), num_samples=5)  # two run, three wait
            await ticket.deltas()
            ticket.close()
            await wait_until_idle(loop, engine)
            assert engine.num_steps < 100  # and not the thousand that the song takes
            assert (await kitchen.read(await loop.submit(*kitchen.prompt("hi")))).startswith("Hello, wörld!")

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))


def test_what_is_too_much_is_refused_and_a_stopped_loop_says_so(kitchen: Kitchen) -> None:
    async def scenario() -> None:
        loop = EngineLoop(kitchen.build_engine, num_slots=2, max_waiting=1)
        async with loop.running():
            ticket = await loop.submit(*kitchen.prompt("sing"), num_samples=3)
            with pytest.raises(EngineBusyError, match="3 answers are under way or waiting, at most 3 may"):
                await loop.submit(*kitchen.prompt("hi"))
        with pytest.raises(GenerationFailedError, match="has stopped"):
            await kitchen.read(ticket)
        with pytest.raises(GenerationFailedError, match="has stopped"):
            await loop.submit(*kitchen.prompt("hi"))

    asyncio.run(asyncio.wait_for(scenario(), TIME_LIMIT_S))
