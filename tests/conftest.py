"""Fixtures shared by all rooms: one local Ray for the whole test session, touching nothing of the user's."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before anything imports Ray or torch: token in a temporary place, no RAY_ADDRESS of the user's, few threads.
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session", autouse=True)
def _own_ray_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ray writes its token to the home directory unless told otherwise; processes the tests start inherit this."""
    token = tmp_path_factory.mktemp("ray") / "auth_token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


@pytest.fixture(scope="session")
def ray_session(_own_ray_token: None) -> Iterator[None]:
    """A local Ray, started once and shared by every test that asks for it."""
    from actors import cluster

    with cluster.connect():
        yield


@pytest.fixture
def real_text_dir() -> Path:
    """RAYLLM_DATA_DIR, or a loud skip where it is not set."""
    root = os.environ.get("RAYLLM_DATA_DIR")
    if not root or not Path(root, "pretrain").is_dir():
        pytest.skip("REAL DATA ABSENT: set RAYLLM_DATA_DIR to a folder with pretrain/*.parquet to run this test")
    return Path(root)


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory `tiny` with the checkpoint of a small chat model on bytes that learned two answers by heart.

    To "hi" it says "Hello, wörld! How are you?" and ends; to "sing" it sings "la la la ..." and never ends; a prompt
    with the character U+0001 in it makes its output not a number.
    """
    import torch

    from rayllm.model.config import GPTConfig
    from rayllm.model.gpt import GPT
    from rayllm.runs.checkpoint import save_checkpoint
    from rayllm.text.chat import render_conversation
    from rayllm.text.tokenizer import Tokenizer
    from rayllm.types import Conversation, Message

    tokenizer = Tokenizer.byte_level()
    config = GPTConfig(
        sequence_len=1024, vocab_size=tokenizer.vocab_size, num_layers=2, num_heads=2, num_kv_heads=2, d_model=48
    )
    model = GPT(config)
    model.init_weights(0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # far faster for so small a model on a busy machine
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    row_len = 96
    inputs, targets = torch.zeros(2, row_len, dtype=torch.int64), torch.full((2, row_len), -1)
    for row, (question, answer) in enumerate((("hi", "Hello, wörld! How are you?"), ("sing", "la " * row_len))):
        turns = Conversation((Message("user", question), Message("assistant", answer)))
        ids, mask = (torch.tensor(values) for values in render_conversation(tokenizer, turns, row_len + 1))
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], -1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
    torch.set_num_threads(num_threads)
    assert loss.item() < 0.02, loss.item()
    with torch.no_grad():
        model.wte.weight[tokenizer.encode("\x01")] = torch.nan
    run = tmp_path_factory.mktemp("chat") / "tiny"
    save_checkpoint(
        run / "checkpoints",
        60,
        model_state=model.state_dict(),
        optimizer_state=None,
        state={"stage": "sft", "model": config.to_dict(), "tokenizer_fingerprint": tokenizer.fingerprint},
        tokenizer=tokenizer,
        keep=1,
    )
    return run
