"""Fixtures shared by all rooms: one local Ray for the whole test session, touching nothing of the user's."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from rayllm.config.load import to_yaml

# Set before anything imports Ray or torch: token in a temporary place, no RAY_ADDRESS of the user's, few threads.
os.environ.pop("RAY_ADDRESS", None)
# Threads that wait by spinning starve each other where several processes share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests that run in the background ignore Ctrl-C, and what they start would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HANG_LIMIT_S = 240.0

# No test asserts a latency: machines are shared.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


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


@pytest.fixture(scope="session")
def side_by_side() -> Callable[[Callable[[Any], object], Sequence[Any]], None]:
    """Calls a function with each item, three at a time, for what mostly waits for a Ray of its own to start."""

    def run(work: Callable[[Any], object], items: Sequence[Any]) -> None:
        with ThreadPoolExecutor(max_workers=3) as pool:
            list(pool.map(work, items))

    return run


class Command:
    """`rayllm STAGE` in a process of its own, whose Ray processes can be found by a mark in their environment."""

    def __init__(self, stage: str, config: Any, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        recipe = folder / f"{self.mark}.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayllm", stage, str(recipe)],
            env={**os.environ, "RAYLLM_TEST_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + HANG_LIMIT_S
        while not path.exists():
            assert self.process.poll() is None, f"ended early:\n{self.process.communicate()[0]}"
            assert time.monotonic() < deadline, f"waited {HANG_LIMIT_S} s for {path}"
            time.sleep(0.01)

    def processes(self, name: str = "") -> list[int]:
        """Living processes that this command started, those whose title holds `name`."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                is_ours = folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes()
                is_named = is_ours and name.encode() in (folder / "cmdline").read_bytes()
                if is_named and "\nState:\tZ" not in (folder / "status").read_text():
                    found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def kill(self) -> None:
        """As if the power had gone: SIGKILL to all of it, the workers first."""
        for pid in (*self.processes("ray::"), *self.processes()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(timeout=HANG_LIMIT_S)
        self.wait_until_gone()

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + 60
        while left := self.processes():
            assert time.monotonic() < deadline, f"processes {left} are still there a minute after the command ended"
            time.sleep(0.2)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Callable[[str, Any], Command]]:
    """Starts `rayllm STAGE` on a recipe, in a process of its own; nothing of it is left after the test."""
    started: list[Command] = []

    def start(stage: str, config: Any) -> Command:
        started.append(Command(stage, config, tmp_path))
        return started[-1]

    yield start
    for command in started:
        for pid in command.processes():
            os.kill(pid, signal.SIGKILL)
