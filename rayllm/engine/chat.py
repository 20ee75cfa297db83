"""The `chat` stage: talk with a chat model in the terminal."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from types import FrameType

from rayllm.config.chat_schema import ChatConfig
from rayllm.config.schema import SamplingConfig
from rayllm.engine.calculator import calculate
from rayllm.engine.engine import Engine
from rayllm.engine.reply import cut_at_stop, open_chat_checkpoint, render_reply_prompt
from rayllm.engine.request import Request
from rayllm.engine.sampling import stable_seed
from rayllm.model.gpt import GPT
from rayllm.runs.load import load
from rayllm.runtime import build_runtime
from rayllm.text.chat import split_completion
from rayllm.text.stream import AnswerStream
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation, Message, Part, Prompt

HELP = """\
/new   start a new conversation
/help  show this
/exit  leave (so does Ctrl-D); Ctrl-C stops an answer"""


def run(config: ChatConfig) -> None:
    """Answer `config.prompt`, or hold a conversation until the input ends.

    Raises ValueError or FileNotFoundError for a checkpoint that is none of a chat model.
    """
    checkpoint = open_chat_checkpoint(config.checkpoint)
    runtime = build_runtime(config.device, config.dtype)
    model, tokenizer = load(checkpoint.path, runtime.device, runtime.dtype)
    chat = Chat(model.lay_out_for_inference(), tokenizer, config.sampling)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")  # whatever comes, no character ends the program
    if config.prompt is not None:
        _show(chat.reply(config.prompt))
    else:
        converse(chat)


class Chat:
    """A conversation, turn by turn. Turn i is drawn from the seed hashed from (sampling.seed, i)."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._context_len = model.config.sequence_len
        # Two prompts: the one that is answered, and the conversation so far, from which the next one starts.
        self._engine = Engine(
            model, tokenizer, num_slots=1, num_prompts=2, max_len=self._context_len, calculator=calculate
        )
        self._messages: tuple[Message, ...] = ()

    @property
    def conversation(self) -> Conversation:
        """The turns so far; an answer that was stopped stands as far as it came."""
        return Conversation(self._messages)

    def clear(self) -> None:
        """Start anew."""
        self._messages = ()

    def reply(self, text: str, should_stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer to a message, piece by piece; asks `should_stop` before each token.

        Raises ValueError, and forgets the message, where it is too long or the model's output is not a number.
        """
        messages = (*self._messages, Message("user", text))
        ids, sampling = render_reply_prompt(self._tokenizer, Conversation(messages), self._sampling, self._context_len)
        seed = stable_seed(sampling.seed, len(messages))
        handle = self._engine.submit(Request(Prompt("", tuple(ids)), sampling, seed=seed))
        stream = AnswerStream(self._tokenizer, sampling.stop)
        try:
            while not self._engine.is_idle:
                if should_stop():
                    handle.cancel()
                for delta in self._engine.step():
                    if delta.handle is handle and (piece := stream.push(delta.token_ids)):
                        yield piece
        finally:
            handle.cancel()  # the reader may have left
        if piece := stream.finish():
            yield piece
        (completion,) = handle.completions()
        if completion.finish_reason == "failed":
            raise ValueError(completion.error)
        parts = split_completion(self._tokenizer, completion.token_ids, completion.sampled_mask)
        self._messages = (*messages, Message("assistant", _cut_at_stop(parts, sampling.stop)))


def _cut_at_stop(parts: tuple[Part, ...], stop: tuple[str, ...]) -> tuple[Part, ...]:
    """As it was shown: without the stop text, which is what an answer ends with."""
    *before, last = parts or (Part("text", ""),)
    if last.type != "text":
        return parts
    text = cut_at_stop(last.text, stop)
    return (*before, Part("text", text)) if text else tuple(before)


def converse(chat: Chat) -> None:
    """Read messages from stdin, one a line, and answer each on stdout until the input ends."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401, gives `input` its line editing and history

        print(HELP, file=sys.stderr)
    while (line := _read_line("> " if is_terminal else "")) is not None:
        message = line.strip()
        if message in ("/exit", "/quit"):
            return
        if message == "/new":
            chat.clear()
            print("a new conversation", file=sys.stderr)
        elif message.startswith("/") and message[1:].isalpha():  # /help, or a command that is none
            print(HELP, file=sys.stderr)
        elif message:
            try:
                with _ctrl_c_asks() as is_asked:
                    _show(chat.reply(message, should_stop=is_asked))
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)


def _read_line(prompt: str) -> str | None:
    """The next line; None at the end of the input. Ctrl-C while typing clears the line."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                print()
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            print()


def _show(pieces: Iterator[str]) -> None:
    is_terminal = sys.stdout.isatty()
    for piece in pieces:
        print(_spell_out_controls(piece) if is_terminal else piece, end="", flush=True)
    print(flush=True)


def _spell_out_controls(text: str) -> str:
    """A model must not steer the terminal."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


@contextlib.contextmanager
def _ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C a request, so that it never strikes in the middle of a step; the second interrupts."""
    asked = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
