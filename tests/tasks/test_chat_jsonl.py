from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from rayllm.text.chat import render_conversation
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation
from tasks.build import build_task
from tasks.chat_jsonl import ChatJsonl

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(file: Path, rows: list[object]) -> str:
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(file)


def said(conversation: Conversation) -> list[tuple[str, object]]:
    return [(message.role, message.content) for message in conversation.messages]


SHAPES = {
    "bare list": HELLO,
    "messages": {"messages": HELLO},
    "ShareGPT": {"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "ChatterBot": {"categories": ["x"], "conversation": ["hi", "hello"]},
    "dialogue": {"turns": [{"speaker": "USER", "utterance": "hi"}, {"speaker": "SYSTEM", "utterance": "hello"}]},
    "Topical-Chat": {"content": [{"agent": "agent_2", "message": "hi"}, {"agent": "agent_1", "message": "hello "}]},
    "persona chat": {"Best Generated Conversation": "User 2: hi\n\n[they meet]\nUser 1: hello"},
    "question and answer": {"question": "hi", "answer": "hello"},
    "self-instruct": {"instruction": "hi", "instances": [{"input": "", "output": "hello"}]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_becomes_turns(tmp_path: Path, shape: str) -> None:
    task = ChatJsonl(write(tmp_path / "chat.jsonl", [SHAPES[shape]]))
    assert said(task.conversation(0)) == [("user", "hi"), ("assistant", "hello")]
    assert task.skipped == {}


def test_longer_shapes(tmp_path: Path) -> None:
    rows: list[object] = [
        {"question": "q", "answer": "7", "rationale": "because"},
        {"instruction": "do", "instances": [{"input": "this", "output": "done"}, {"input": "", "output": "no"}]},
        {"conversations": [{"from": "system", "value": "be kind"}, *SHAPES["ShareGPT"]["conversations"]]},  # type: ignore[call-overload]
        [HELLO[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "python", "text": "1"}]}],
    ]
    task = ChatJsonl(write(tmp_path / "chat.jsonl", rows))
    assert said(task.conversation(0))[1] == ("assistant", "because\nThe answer is 7.")
    assert said(task.conversation(1)) == [("user", "do\n\nthis"), ("assistant", "done")]
    assert [role for role, _ in said(task.conversation(2))] == ["system", "user", "assistant"]
    assert [part.type for part in task.conversation(3).messages[1].content] == ["text", "python"]  # type: ignore[union-attr]


BAD_LINES = {
    "{no json": "not_json",
    "[" * 100_000: "not_json",
    "3": "unknown_shape",
    "null": "unknown_shape",
    '"messages"': "unknown_shape",
    '{"text": "x"}': "unknown_shape",
    '{"messages": 3}': "unknown_shape",
    '{"messages": [{"role": "tool", "content": "x"}]}': "unknown_shape",
    '{"messages": [{"role": "user"}]}': "unknown_shape",
    '{"conversations": [{"from": ["human"], "value": "x"}]}': "unknown_shape",
    '{"conversation": ["hi", 3]}': "unknown_shape",
    '{"conversation": "hi"}': "unknown_shape",
    '{"turns": ["hi"]}': "unknown_shape",
    '{"instruction": "do", "instances": []}': "unknown_shape",
    "[]": "empty",
    '{"messages": []}': "empty",
    '{"conversation": ["hi"]}': "empty",
    '{"conversation": ["hi", " "]}': "empty",
    '{"Best Generated Conversation": "no turns"}': "empty",
    '[{"role": "system", "content": "x"}]': "empty",
    '[{"role": "assistant", "content": "x"}]': "roles",
    '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]': "roles",
    '[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]': "roles",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_bad_line_is_left_out_and_counted(tmp_path: Path, line: str) -> None:
    task = ChatJsonl(write(tmp_path / "chat.jsonl", [HELLO, line]))
    assert len(task) == 1
    assert task.skipped == {BAD_LINES[line]: 1}


def test_no_utf8_is_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_bytes(json.dumps(HELLO).encode() + b'\n["\xff"]\n\n')
    assert ChatJsonl(str(file)).skipped == {"not_utf8": 1}


def test_a_last_user_turn_is_cut_off_and_counted(tmp_path: Path) -> None:
    task = ChatJsonl(write(tmp_path / "chat.jsonl", [[*HELLO, {"role": "user", "content": "and then?"}]]))
    assert said(task.conversation(0)) == [("user", "hi"), ("assistant", "hello")]
    assert task.skipped == {"last_user_turn": 1}


def test_a_file_without_one_good_line_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", ["", "{no json", '{"text": "x"}'])
    with pytest.raises(ValueError, match=r"none of its 2 lines can be used; line 2: no JSON") as error:
        ChatJsonl(file)
    assert file in str(error.value)
    with pytest.raises(ValueError, match="there are none"):
        ChatJsonl(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ValueError, match="line 1: turn 0: expected user, got assistant"):
        ChatJsonl(write(tmp_path / "roles.jsonl", [HELLO[::-1]]))


def test_where_a_file_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, data_dir = tmp_path / "given", tmp_path / "data"
    for folder in (given, data_dir):
        folder.mkdir()
    monkeypatch.chdir(given)
    monkeypatch.setenv("RAYLLM_DATA_DIR", str(data_dir))
    with pytest.raises(FileNotFoundError, match=r"'chat\.jsonl'.*chat\.jsonl\.gz.*data/chat\.jsonl"):
        ChatJsonl("chat.jsonl")
    (data_dir / "chat.jsonl.gz").write_bytes(gzip.compress(json.dumps(HELLO).encode()))
    assert len(ChatJsonl("chat.jsonl")) == 1
    write(given / "chat.jsonl", [HELLO, HELLO])
    assert len(ChatJsonl("chat.jsonl")) == 2
    with pytest.raises(ValueError, match="is a folder"):
        ChatJsonl(str(data_dir))
    monkeypatch.delenv("RAYLLM_DATA_DIR")
    with pytest.raises(FileNotFoundError, match="RAYLLM_DATA_DIR, where files are looked up too, is not set"):
        ChatJsonl("none.jsonl")


def test_validation_is_held_out_by_content(tmp_path: Path) -> None:
    rows: list[object] = [{"conversation": [f"question {number}", "answer"]} for number in range(2000)]
    file = write(tmp_path / "chat.jsonl", rows)
    train, validation = ChatJsonl(file), ChatJsonl(file, "validation")
    asked = [{task.conversation(i).messages[0].content for i in range(len(task))} for task in (train, validation)]
    assert not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == 2000
    assert 15 < len(validation) < 75
    assert len(ChatJsonl(file, num_examples=7)) == 7
    of_half = ChatJsonl(write(tmp_path / "half.jsonl", rows[:1000]), "validation")
    assert {of_half.conversation(i).messages[0].content for i in range(len(of_half))} <= asked[1]
    with pytest.raises(ValueError, match="its validation part is empty: 1 conversations"):
        ChatJsonl(write(tmp_path / "one.jsonl", [HELLO]), "validation")


def test_a_chat_has_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no verdicts"):
        ChatJsonl(write(tmp_path / "chat.jsonl", [HELLO])).evaluate(0, "hello")


def test_real_conversations_all_render() -> None:
    root = os.environ.get("RAYLLM_DATA_DIR")
    if not root or not Path(root, "sft").is_dir():
        pytest.skip("REAL DATA ABSENT: set RAYLLM_DATA_DIR to a folder with sft/*.jsonl.gz to run this test")
    tokenizer = Tokenizer.byte_level()
    files = sorted(file for file in Path(root, "sft").glob("*.jsonl.gz") if file.stat().st_size < 1_000_000)
    for file in files:
        task = build_task("chat_jsonl", path=f"sft/{file.name}")
        skipped = sum(
            getattr(task, "skipped", {}).get(reason, 0) for reason in ("unknown_shape", "not_json", "roles", "empty")
        )
        assert skipped <= len(task) * 0.04, file
        for idx in range(0, len(task), 1 + len(task) // 50):
            ids, mask = render_conversation(tokenizer, task.conversation(idx), max_tokens=10**6)
            assert sum(mask) > 1, file
            assert ids[-1] == tokenizer.special_id("<|assistant_end|>")
    assert len(files) > 5
    identity = ChatJsonl("sft/identity_conversations.jsonl.gz")
    assert identity.skipped == {"last_user_turn": 4}
