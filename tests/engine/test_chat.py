"""Talking in the terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from torch.nn import Module

from rayllm.config.chat_schema import ChatConfig
from rayllm.config.schema import SamplingConfig
from rayllm.engine.chat import Chat, run
from rayllm.engine.reply import open_chat_checkpoint, render_reply_prompt
from rayllm.runs.checkpoint import open_checkpoint, save_checkpoint
from rayllm.runs.load import load
from rayllm.text.chat import render_for_reply
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation, Message, Part

GREEDY = SamplingConfig(temperature=0, max_tokens=60)
TOKENIZER = Tokenizer.byte_level()


def greedy(checkpoint: Path, **changes: object) -> ChatConfig:
    return ChatConfig(checkpoint=str(checkpoint), sampling=GREEDY, device="cpu", **changes)  # type: ignore[arg-type]


def test_one_shot_prints_only_the_answer(chat_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(greedy(chat_checkpoint, prompt="hi"))
    assert capsys.readouterr().out == "Hello, wörld! How are you?\n"


def test_piped_messages_are_answered_line_by_line(
    chat_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n/new\nsing\n/exit\nhi\n"))
    run(greedy(chat_checkpoint))
    assert capsys.readouterr().out == f"Hello, wörld! How are you?\n{'la ' * 20}\n"


def test_a_message_that_is_too_long_is_told_and_the_conversation_goes_on(
    chat_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'x' * 2000}\nhi\n"))
    run(greedy(chat_checkpoint))
    shown = capsys.readouterr()
    assert re.search(r"error: the last user turn takes \d+ tokens", shown.err)
    assert shown.out == "Hello, wörld! How are you?\n"


def test_an_answer_that_is_stopped_stands_as_far_as_it_came(chat_checkpoint: Path) -> None:
    chat = Chat(*load(chat_checkpoint), GREEDY)
    said: list[str] = []
    said.extend(chat.reply("sing", should_stop=lambda: len("".join(said)) >= 9))
    assert "".join(said) == "la la la "
    user, assistant = chat.conversation.messages
    assert user.content == "sing"
    assert not isinstance(assistant.content, str) and assistant.content[0].text == "la la la "
    assert "".join(chat.reply("hi"))  # and the next one finds the engine free


def test_a_stop_text_ends_an_answer_and_is_neither_shown_nor_kept(chat_checkpoint: Path) -> None:
    chat = Chat(*load(chat_checkpoint), replace(GREEDY, stop=("nothing", "! How")))
    assert "".join(chat.reply("hi")) == "Hello, wörld"
    assert chat.conversation.messages[-1] == Message("assistant", (Part("text", "Hello, wörld"),))
    chat = Chat(*load(chat_checkpoint), replace(GREEDY, stop=("H",)))
    assert "".join(chat.reply("hi")) == ""
    assert chat.conversation.messages[-1] == Message("assistant", ())


def test_a_next_turn_computes_only_what_is_new(chat_checkpoint: Path) -> None:
    """The conversation so far is in the cache: its prompt, and the answer but for its end, which was never run."""
    model, tokenizer = load(chat_checkpoint)
    in_chunks: list[int] = []

    def count(module: Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if inputs[0].ndim == 2 and inputs[0].size(1) > 1:
            in_chunks.append(inputs[0].numel())

    model.wte.register_forward_hook(count)
    chat = Chat(model, tokenizer, GREEDY)
    assert "".join(chat.reply("hi")) == "Hello, wörld! How are you?"
    first = len(render_for_reply(tokenizer, Conversation((Message("user", "hi"),))))
    assert sum(in_chunks) == first
    in_chunks.clear()
    assert "".join(chat.reply("and what is it that you do?"))
    second = len(render_for_reply(tokenizer, Conversation(chat.conversation.messages[:-1])))
    assert sum(in_chunks) == second - first - len("Hello, wörld! How are you?".encode())


def test_output_that_is_not_a_number_is_told(chat_checkpoint: Path) -> None:
    chat = Chat(*load(chat_checkpoint), GREEDY)
    with pytest.raises(ValueError, match="not finite"):
        list(chat.reply("hi \x01"))
    assert "".join(chat.reply("hi")) == "Hello, wörld! How are you?"


def test_a_base_checkpoint_is_refused_with_the_cure(chat_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(chat_checkpoint)
    for stage, source_stage in (("base", None), ("imported", "base")):
        path = save_checkpoint(
            tmp_path / stage,
            1,
            model_state=checkpoint.load_model_state(),
            optimizer_state=None,
            state={**checkpoint.state, "stage": stage, "source_stage": source_stage},
            tokenizer=checkpoint.load_tokenizer(),
            keep=1,
        )
        with pytest.raises(ValueError, match="stage 'base'.*rayllm sft"):
            open_chat_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no chat model at .*--checkpoint"):
        open_chat_checkpoint(tmp_path / "nowhere")


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(chat_checkpoint: Path) -> None:
    """In a real terminal."""
    code = (
        "from rayllm.engine.chat import run\n"
        "from rayllm.config.chat_schema import ChatConfig\n"
        "from rayllm.config.schema import SamplingConfig\n"
        f"run(ChatConfig(checkpoint={str(chat_checkpoint)!r}, device='cpu',\n"
        "    sampling=SamplingConfig(temperature=0, max_tokens=1000)))"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = ""

    def read_until(text: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 1.0)[0]:
                shown += os.read(ours, 4096).decode(errors="replace")
        shown = shown.split(text, 1)[1]

    try:
        read_until("> ")
        os.write(ours, b"sing\n")
        read_until("la la la la ")
        process.send_signal(signal.SIGINT)
        read_until("\n> ")
        os.write(ours, b"/new\nhi\n")
        read_until("Hello, wörld! How are you?")
        read_until("> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_prompt_leaves_room_for_the_answer_and_drops_the_oldest_turns() -> None:
    turns = [Message(role, f"{i} " * 40) for i, role in enumerate(("user", "assistant") * 5)]  # type: ignore[arg-type]
    conversation = Conversation((*turns, Message("user", "last")))
    ids, sampling = render_reply_prompt(TOKENIZER, conversation, SamplingConfig(max_tokens=500), context_len=256)
    assert len(ids) <= 256 - 64 and sampling.max_tokens == 256 - len(ids)
    text = TOKENIZER.decode(ids)
    assert "last" in text and "9 9" in text and "0 0" not in text
    _, sampling = render_reply_prompt(TOKENIZER, conversation, SamplingConfig(max_tokens=5), context_len=4096)
    assert sampling.max_tokens == 5
