"""The HTTP side of a served chat model: OpenAI's chat API, health, and the chat page.

A model's tool calls run inside the engine and stay out of the text: `content` is the prose around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from actors.openai_schema import APIError, ChatRequest, Envelope, Piece, Usage, parse_request
from rayllm.config.schema import SamplingConfig
from rayllm.engine.async_engine import AsyncEngine, EngineBusyError, GenerationFailedError, RequestStream
from rayllm.engine.reply import render_reply_prompt
from rayllm.engine.request import Request as EngineRequest
from rayllm.text.stream import AnswerStream
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Prompt

PAGE = Path(__file__).parent / "web" / "index.html"
# The page is one file: nothing is loaded from elsewhere, and nothing is sent elsewhere.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


@dataclass(frozen=True)
class ChatModel:
    """What the API serves; `defaults` hold where a request says nothing, and `defaults.max_tokens` is the most."""

    name: str
    tokenizer: Tokenizer
    context_len: int
    defaults: SamplingConfig
    engine: AsyncEngine


def build_app(model: ChatModel) -> FastAPI:
    """The web application; the engine runs as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with model.engine.running():
            yield

    app = FastAPI(title="rayllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(APIError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    page, started = PAGE.read_text(encoding="utf-8"), int(time.time())

    @app.get("/")
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    async def tell_health() -> Response:
        num_open, num_slots = model.engine.num_open, model.engine.num_slots
        counts = {"num_running": min(num_open, num_slots), "num_waiting": max(0, num_open - num_slots)}
        is_well = model.engine.is_running
        told = {"status": "ok" if is_well else "stopped", "model": model.name, "num_slots": num_slots, **counts}
        return JSONResponse(told, status_code=200 if is_well else 503)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_describe(model, started)]})

    @app.get("/v1/models/{name:path}")
    async def tell_model(name: str) -> Response:
        _check_model(model, name)
        return JSONResponse(_describe(model, started))

    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> Response:
        asked = parse_request(await request.body())
        answers = await _start(model, asked)
        envelope = Envelope(model.name)
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return EventStream(answers, _render_events(answers, envelope, with_usage=with_usage))
        try:
            pieces = [piece async for piece in answers.pieces()]
        except GenerationFailedError as error:
            raise _generation_failed(error) from error
        finally:
            answers.close()
        return JSONResponse(envelope.completion(pieces, answers.usage))

    return app


class Answers:
    """The answers to one request while they are written."""

    def __init__(self, request: EngineRequest, stream: RequestStream, tokenizer: Tokenizer) -> None:
        self.usage = Usage(len(request.prompt.token_ids))
        self.num_answers = request.num_samples
        self._stream = stream
        self._texts = [AnswerStream(tokenizer, request.sampling.stop) for _ in range(request.num_samples)]

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes, until each answer has ended. Raises GenerationFailedError."""
        async for deltas in self._stream:
            texts: dict[int, str] = {}
            ended: dict[int, Literal["stop", "length"]] = {}
            for delta in deltas:
                index, stream = delta.sample_idx, self._texts[delta.sample_idx]
                self.usage.num_completion_tokens += len(delta.token_ids)
                texts[index] = texts.get(index, "") + stream.push(delta.token_ids)
                if delta.finish_reason is not None:
                    texts[index] += stream.finish()
                    ended[index] = "length" if delta.finish_reason == "length" else "stop"
            for index, text in texts.items():
                if text or index in ended:
                    yield Piece(index, text, ended.get(index))

    def close(self) -> None:
        """End what has not ended: its reader is gone."""
        self._stream.close()


class EventStream(StreamingResponse):
    """Answers as server-sent events; ends them when the reader leaves, be it before the first event."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _start(model: ChatModel, asked: ChatRequest) -> Answers:
    """Check a request against the model and queue its answers."""
    if asked.model is not None:
        _check_model(model, asked.model)
    num_answers = asked.n or 1
    if num_answers > model.engine.num_slots:
        raise APIError(400, f"n: at most {model.engine.num_slots} answers to a request, got {num_answers}", param="n")
    sampling = _sampling(asked, model.defaults)
    try:
        # In a thread: a long text takes a while to encode, and the other answers go on meanwhile.
        token_ids, sampling = await asyncio.to_thread(
            render_reply_prompt, model.tokenizer, asked.conversation, sampling, model.context_len
        )
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        request = EngineRequest(Prompt("", tuple(token_ids)), sampling, num_answers, seed)
        stream = await model.engine.submit(request)
    except ValueError as error:
        raise APIError(400, str(error), param="messages") from error
    except EngineBusyError as error:
        raise APIError(503, f"too many requests: {error}; try again later", code="overloaded") from error
    except GenerationFailedError as error:
        raise _generation_failed(error) from error
    return Answers(request, stream, model.tokenizer)


def _sampling(asked: ChatRequest, defaults: SamplingConfig) -> SamplingConfig:
    param = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(asked, param) or defaults.max_tokens
    if max_tokens > defaults.max_tokens:
        raise APIError(400, f"{param}: at most {defaults.max_tokens} are served, got {max_tokens}", param=param)
    return replace(
        defaults,
        temperature=defaults.temperature if asked.temperature is None else asked.temperature,
        top_k=defaults.top_k if asked.top_k is None else asked.top_k or None,
        top_p=defaults.top_p if asked.top_p is None else asked.top_p,
        max_tokens=max_tokens,
        stop=defaults.stop if asked.stop is None else tuple(asked.stop),
    )


async def _render_events(answers: Answers, envelope: Envelope, *, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. An error after the first of them can only be told in the stream, which then ends."""
    try:
        for index in range(answers.num_answers):
            yield _event(envelope.opening_chunk(index))
        async for piece in answers.pieces():
            yield "".join(_event(chunk) for chunk in envelope.chunks(piece))
        if with_usage:
            yield _event(envelope.usage_chunk(answers.usage))
        yield "data: [DONE]\n\n"
    except GenerationFailedError as error:
        yield _event(_generation_failed(error).body)


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _describe(model: ChatModel, started: int) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": started, "owned_by": "rayllm"}


def _check_model(model: ChatModel, name: str) -> None:
    if name != model.name:
        message = f"there is no model {name!r} here; this server has {model.name!r}"
        raise APIError(404, message, param="model", code="model_not_found")


def _generation_failed(error: GenerationFailedError) -> APIError:
    return APIError(500, str(error), code="generation_failed")


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """No such path, no such method: in the same shape as our own errors."""
    assert isinstance(error, HTTPException)
    shown = APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(shown.body, status_code=error.status_code, headers=error.headers)
