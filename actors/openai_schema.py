"""OpenAI's chat API as far as it is spoken here: what a request may say, and the shape of answers and errors.

Fields that are not listed are ignored, as OpenAI's servers do with fields of a later day.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rayllm.types import Conversation, Message

MAX_BODY_BYTES = 4 * 2**20
_MAX_STOPS, _MAX_STOP_LEN = 4, 256


class APIError(Exception):
    """An answer that is an error: HTTP status, a sentence for people, and OpenAI's words for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class ChatMessage(_Model):
    """One turn; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: object) -> object:
        """Text may come as a list of parts; other parts (images, audio, files) are not understood."""
        if not isinstance(content, list):
            return content
        texts: list[str] = [
            part["text"]
            for part in content
            if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        ]
        if len(texts) < len(content):
            raise ValueError('every part must be {"type": "text", "text": "..."}: this model reads text alone')
        return "".join(texts)


class StreamOptions(_Model):
    """What a stream tells besides the text."""

    include_usage: bool = False


class ChatRequest(_Model):
    """The body of POST /v1/chat/completions. A field that is null or absent has the server's default."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    """Beyond OpenAI: draw among the k likeliest tokens; 0: no cut."""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer word for max_tokens; wins over it."""
    n: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: list[str] | None = None
    """Texts before which an answer ends; one may come without a list."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _few_short_stops(cls, stop: object) -> object:
        stops = [stop] if isinstance(stop, str) else stop
        if stops is None:
            return None
        if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
            raise ValueError("must be a text or a list of texts")
        if len(stops) > _MAX_STOPS or not all(1 <= len(text) <= _MAX_STOP_LEN for text in stops):
            raise ValueError(f"must be at most {_MAX_STOPS} texts of 1 to {_MAX_STOP_LEN} characters")
        return stops

    @property
    def conversation(self) -> Conversation:
        """The messages in our words; who may speak when is checked where they are rendered."""
        roles: dict[str, Literal["system", "user", "assistant"]]
        roles = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
        return Conversation(tuple(Message(roles[message.role], message.content) for message in self.messages))


def parse_request(body: bytes) -> ChatRequest:
    """Read a request's body; APIError 400 or 413 says what is wrong with it."""
    if len(body) > MAX_BODY_BYTES:
        raise APIError(413, f"the request has {len(body)} bytes, at most {MAX_BODY_BYTES} are read")
    try:
        raw = json.loads(body)
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise APIError(400, "the request holds half a character (a lone surrogate such as \\ud800)") from error
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the request is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise APIError(400, f"the request must be a JSON object, got {type(raw).__name__}")
    try:
        return ChatRequest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise APIError(400, f"{param}: {message}", param=param) from error


@dataclass(frozen=True)
class Piece:
    """The next text of answer `index`, and why the answer ended where it did."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None


@dataclass
class Usage:
    """Tokens of the prompt, and of all answers together."""

    num_prompt_tokens: int
    num_completion_tokens: int = 0

    def render(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }


@dataclass(frozen=True)
class Envelope:
    """What all objects of one answer have in common."""

    model: str
    request_id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        """The whole answer: the pieces of each index put together."""
        choices = [
            {
                "index": end.index,
                "message": {
                    "role": "assistant",
                    "content": "".join(piece.text for piece in pieces if piece.index == end.index),
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": end.finish_reason,
            }
            for end in sorted((p for p in pieces if p.finish_reason), key=lambda p: p.index)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.render()}

    def opening_chunk(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece as stream chunks: its text, then its end."""
        text = [self._chunk(piece.index, {"content": piece.text}, None)] if piece.text else []
        end = [self._chunk(piece.index, {}, piece.finish_reason)] if piece.finish_reason else []
        return text + end

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.render()}

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}
