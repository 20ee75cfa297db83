"""The served model through the official client, Ray Serve's proxy and a real socket."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from openai.types.chat import ChatCompletionChunk

from actors import cluster
from actors.chat_api import Answers, EventStream
from actors.serve import check_address, plan_placement, run_name, serving
from rayllm.config.chat_schema import ServeConfig
from rayllm.config.schema import SamplingConfig
from rayllm.engine.async_engine import RequestStream
from rayllm.engine.calculator import calculate
from rayllm.engine.engine import Engine
from rayllm.engine.reply import render_reply_prompt
from rayllm.engine.request import Request
from rayllm.runs.checkpoint import open_checkpoint, save_checkpoint
from rayllm.runs.load import load
from rayllm.text.stream import AnswerStream
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation, Message, Prompt

TIME_LIMIT_S = 60.0
NUM_SLOTS, MAX_WAITING, MAX_TOKENS = 4, 2, 900
HI = [{"role": "user", "content": "hi"}]
SING = [{"role": "user", "content": "sing"}]
HELLO = "Hello, wörld! How are you?"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def config(chat_checkpoint: Path) -> ServeConfig:
    return ServeConfig(
        checkpoint=str(chat_checkpoint),
        port=free_port(),
        num_slots=NUM_SLOTS,
        max_waiting=MAX_WAITING,
        sampling=SamplingConfig(temperature=0, max_tokens=MAX_TOKENS),
        device="cpu",
    )


@pytest.fixture(scope="module")
def url(config: ServeConfig, ray_session: None) -> Iterator[str]:
    with serving(config) as url:
        yield url
    assert ray.is_initialized(), "only what was started here is stopped"
    check_address(config.host, config.port)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIME_LIMIT_S)


def wait_until_free(url: str) -> float:
    """Seconds until no answer is under way."""
    start = time.monotonic()
    while httpx.get(f"{url}/health", timeout=TIME_LIMIT_S).json()["num_running"]:
        assert time.monotonic() - start < TIME_LIMIT_S
        time.sleep(0.01)
    return time.monotonic() - start


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_an_answer_comes_whole_with_its_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI)
    assert answer.choices[0].message.content == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    # <bos> <user_start> h i <user_end> <assistant_start>; the answer's bytes and its end.
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == len(HELLO.encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("stop", [None, "o", ["How ar", "world"], ["?!", "y"]])
def test_streaming_gives_what_the_whole_answer_has(client: openai.OpenAI, stop: Any) -> None:
    """For the same seed: the same texts, ends and counts, whatever is sampled."""
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 40}
    asked |= {"stop": stop, "extra_body": {"top_k": 20}}
    whole = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [c.message.content for c in whole.choices] == [c.message.content for c in again.choices]
    assert [c.index for c in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert text_of(chunks, choice.index) == choice.message.content
        ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert ends[-1] == choice.finish_reason and set(ends[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    if stop is None:
        other = client.chat.completions.create(**{**asked, "seed": 8})
        assert [c.message.content for c in other.choices] != [c.message.content for c in whole.choices]


def test_stop_texts_end_the_answer_before_them_even_across_tokens(client: openai.OpenAI) -> None:
    for stop, expected in ((" How", "Hello, wörld!"), (["zz", "ö"], "Hello, w"), ("How?", HELLO)):
        answer = client.chat.completions.create(model="tiny", messages=HI, stop=stop)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(model="tiny", messages=SING, stop="a la")
    assert answer.choices[0].message.content == "l" and answer.usage is not None
    assert answer.usage.completion_tokens == len("la la")  # and not a token more is written


def test_max_tokens_cuts_and_says_so(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        asked: Any = {name: 9}
        answer = client.chat.completions.create(model="tiny", messages=SING, **asked)
        assert answer.choices[0].message.content == "la la la "
        assert answer.choices[0].finish_reason == "length"


def test_text_parts_developer_turns_and_unknown_fields_are_understood(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    asked: Any = {"messages": [{"role": "user", "content": parts, "name": "Ann"}], "extra_body": {"a_later_day": 1}}
    assert client.chat.completions.create(model="tiny", **asked).choices[0].message.content == HELLO
    asked = {"messages": [{"role": "developer", "content": "Be kind."}, *HI], "max_tokens": 3}
    assert client.chat.completions.create(model="tiny", **asked).usage.prompt_tokens > 6


def test_requests_at_once_are_answered_together(url: str) -> None:
    """More than there are slots: each gets its own answer."""

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIME_LIMIT_S
        ) as client:
            songs = [client.chat.completions.create(model="tiny", messages=SING, max_tokens=30) for _ in range(3)]
            greetings = [client.chat.completions.create(model="tiny", messages=HI) for _ in range(3)]
            return [a.choices[0].message.content for a in await asyncio.gather(*songs, *greetings)]

    assert asyncio.run(ask_all()) == ["la " * 10] * 3 + [HELLO] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(url: str, stream: bool) -> None:
    wait_until_free(url)
    start = time.monotonic()
    httpx.post(f"{url}/v1/chat/completions", json={"messages": SING}, timeout=TIME_LIMIT_S).raise_for_status()
    whole_s = time.monotonic() - start
    body = {"messages": SING, "stream": stream}
    with pytest.raises((httpx.ReadTimeout, _LeftError)):  # noqa: SIM117
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=0.2) as response:
            for line in response.iter_lines():
                if '"la' in line or '"l"' in line:
                    raise _LeftError
    assert wait_until_free(url) < whole_s / 2


class _LeftError(Exception):
    pass


def test_a_client_that_leaves_before_the_first_event_ends_its_answers_too() -> None:
    cancelled: list[bool] = []
    stream = RequestStream(1, lambda: cancelled.append(True))
    answers = Answers(Request(Prompt("", (1,)), SamplingConfig()), stream, Tokenizer.byte_level())

    async def events() -> AsyncIterator[str]:
        yield "never asked for"

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()

    async def leave() -> None:
        response = EventStream(answers, events())
        await asyncio.wait_for(response({"type": "http"}, receive, send), TIME_LIMIT_S)

    asyncio.run(leave())
    assert cancelled == [True]


def test_too_many_requests_are_refused(url: str, client: openai.OpenAI) -> None:
    wait_until_free(url)
    streams = [
        client.chat.completions.create(model="tiny", messages=SING, stream=True, n=n) for n in (NUM_SLOTS, MAX_WAITING)
    ]
    with pytest.raises(openai.InternalServerError, match="too many requests") as caught:
        client.chat.completions.create(model="tiny", messages=HI)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    assert httpx.get(f"{url}/health", timeout=TIME_LIMIT_S).json()["num_waiting"] == MAX_WAITING
    for stream in streams:
        stream.close()
    wait_until_free(url)


def test_an_answer_that_fails_is_an_error_and_harms_no_other(client: openai.OpenAI) -> None:
    broken: Any = [{"role": "user", "content": "hi \x01"}]
    song = client.chat.completions.create(model="tiny", messages=SING, stream=True, max_tokens=300)
    next(iter(song))
    with pytest.raises(openai.InternalServerError, match="not finite") as caught:
        client.chat.completions.create(model="tiny", messages=broken)
    assert caught.value.status_code == 500
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model="tiny", messages=broken, stream=True))
    assert text_of(list(song)) == "la " * 100
    assert client.chat.completions.create(model="tiny", messages=HI).choices[0].message.content == HELLO


ERRORS: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b'{"messages": [', 400, "no JSON"),
    "no object": ([1], 400, "must be a JSON object"),
    "no messages": ({}, 400, "messages: Field required"),
    "no turns": ({"messages": []}, 400, "messages: .*at least 1"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "hi"}]}, 400, r"messages.0.role: .*'user'"),
    "roles that do not alternate": ({"messages": HI + HI}, 400, "turn 1: .*alternate"),
    "an assistant turn last": ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, 400, "must be the user's"),
    "a late system turn": ({"messages": [*HI, {"role": "system", "content": "x"}]}, 400, "only come first"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "reads text alone"),
    "no text": ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content: .*string"),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half a character"),
    "too long a prompt": ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "last user turn takes 200"),
    "another model": ({"messages": HI, "model": "gpt-4"}, 404, "no model 'gpt-4'.*'tiny'"),
    "too many tokens": ({"messages": HI, "max_tokens": 901}, 400, "max_tokens: at most 900"),
    "too many answers": ({"messages": HI, "n": 5}, 400, "n: at most 4"),
    "a wild temperature": ({"messages": HI, "temperature": 3}, 400, "temperature: .*less than or equal to 2"),
    "a temperature in words": ({"messages": HI, "temperature": "hot"}, 400, "temperature: "),
    "a temperature that is no number": (b'{"messages": [], "temperature": NaN}', 400, ""),
    "top_p": ({"messages": HI, "top_p": 1.5}, 400, "top_p"),
    "an empty stop": ({"messages": HI, "stop": ""}, 400, "stop: .*1 to 256"),
    "five stops": ({"messages": HI, "stop": list("abcde")}, 400, "stop: must be at most 4"),
    "too large a body": (b" " * (4 * 2**20 + 1), 413, "at most"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_requests_get_a_clear_error_in_openai_s_shape(url: str, name: str) -> None:
    body, status, message = ERRORS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, timeout=TIME_LIMIT_S)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error


def test_paths_and_methods_that_are_none(url: str) -> None:
    for answer, status in (
        (httpx.get(f"{url}/nowhere", timeout=TIME_LIMIT_S), 404),
        (httpx.get(f"{url}/v1/chat/completions", timeout=TIME_LIMIT_S), 405),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_models_health_and_page(url: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "rayllm"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    wait_until_free(url)
    health = httpx.get(f"{url}/health", timeout=TIME_LIMIT_S).json()
    assert health == {"status": "ok", "model": "tiny", "num_slots": NUM_SLOTS, "num_running": 0, "num_waiting": 0}
    page = httpx.get(url, timeout=TIME_LIMIT_S)
    assert page.headers["content-type"].startswith("text/html") and "<textarea" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in page.text


def test_the_served_answer_is_the_engine_s(config: ServeConfig, client: openai.OpenAI) -> None:
    """Sampled and seeded: the way over HTTP adds nothing and loses nothing."""
    model, tokenizer = load(config.checkpoint)
    sampling = SamplingConfig(temperature=0.9, top_k=None, max_tokens=50)
    turns = Conversation((Message("user", "sing a song"),))
    ids, sampling = render_reply_prompt(tokenizer, turns, sampling, model.config.sequence_len)
    engine = Engine(model, tokenizer, num_slots=NUM_SLOTS, max_len=model.config.sequence_len, calculator=calculate)
    ((completion,),) = engine.generate([Prompt("", tuple(ids))], replace(sampling, seed=11))
    stream = AnswerStream(tokenizer)
    expected = stream.push(completion.token_ids) + stream.finish()
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "sing a song"}], temperature=0.9, max_tokens=50, seed=11
    )
    assert answer.choices[0].message.content == expected


def test_a_port_that_is_taken_is_told_before_anything_starts(config: ServeConfig, url: str) -> None:
    with pytest.raises(ValueError, match=f"port {config.port} of 127.0.0.1 is taken .*--port=PORT"), serving(config):
        raise AssertionError("unreachable")
    with pytest.raises(ValueError, match="is no address"):
        check_address("no.such.host.invalid", 8000)
    with pytest.raises(ValueError, match=r"is --host an address of this machine\?"):
        check_address("192.0.2.1", 8000)


def test_a_base_checkpoint_is_refused_before_anything_starts(chat_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(chat_checkpoint)
    base = save_checkpoint(
        tmp_path / "base" / "checkpoints",
        1,
        model_state=checkpoint.load_model_state(),
        optimizer_state=None,
        state={**checkpoint.state, "stage": "base"},
        tokenizer=checkpoint.load_tokenizer(),
        keep=1,
    )
    with pytest.raises(ValueError, match="stage 'base'.*rayllm sft"), serving(ServeConfig(checkpoint=str(base))):
        raise AssertionError("unreachable")


def test_a_model_is_named_after_its_run(chat_checkpoint: Path, tmp_path: Path) -> None:
    assert run_name(open_checkpoint(chat_checkpoint)) == "tiny"


def test_more_replicas_than_this_machine_has_room_for(ray_session: None) -> None:
    with cluster.connect() as ray_cluster, pytest.raises(ValueError, match="lower --num_replicas"):
        plan_placement(ServeConfig(num_replicas=1000, device="cpu"), ray_cluster)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_serves_until_it_is_told_to_stop(
    chat_checkpoint: Path, tmp_path: Path, sent: signal.Signals, exit_code: int
) -> None:
    port, out, err = free_port(), tmp_path / "out", tmp_path / "err"
    url = f"http://127.0.0.1:{port}"
    command = ["serve", f"--checkpoint={chat_checkpoint}", f"--port={port}", "--device=cpu"]
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "rayllm", *command], stdout=stdout, stderr=stderr)
    try:
        deadline = time.monotonic() + 2 * TIME_LIMIT_S
        while not out.read_text().endswith("\n"):
            assert time.monotonic() < deadline and process.poll() is None, err.read_text()
            time.sleep(0.1)
        assert f"{url}/ " in out.read_text() and f"{url}/v1 " in out.read_text()
        body = {"messages": HI, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIME_LIMIT_S)
        assert answer.json()["choices"][0]["message"]["content"] == HELLO
        process.send_signal(sent)
        assert process.wait(timeout=TIME_LIMIT_S) == exit_code, err.read_text()
        assert "Traceback" not in err.read_text() and "SIGTERM received" not in err.read_text()
        check_address("127.0.0.1", port)
    finally:
        process.kill()
        process.wait()
