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
