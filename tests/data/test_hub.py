"""The hub, played by a local HTTP server that speaks as much of its protocol as streaming a data set takes.

The client reads where the hub is when it is imported, so that each case runs in a process of its own.
"""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllm.data.hub import HubName, _bounded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"data/test-00000.jsonl": b'{"text": "held out"}\n'}
for idx in range(4):
    rows = [{"text": f"document {idx}-{row}"} for row in range(3)]
    FILES[f"data/train-{idx:05d}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()

READ = """
import sys
from rayllm.data.sources import SkipCounts, read_documents, resolve_sources
try:
    for piece in resolve_sources([sys.argv[1]], text_column=sys.argv[2]):
        print("piece", piece.name)
        for text in read_documents(piece, SkipCounts()):
            print(text)
except (ValueError, FileNotFoundError) as error:
    print("refused:", error)
"""


class _Hub(http.server.BaseHTTPRequestHandler):
    """Knows one data set, lorem/stories."""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        repo = "/api/datasets/lorem/stories"
        if path in (repo, f"{repo}/revision/{COMMIT}", f"{repo}/revision/main"):
            siblings = [{"rfilename": name} for name in FILES]
            self._json({"id": "lorem/stories", "_id": "1", "sha": COMMIT, "private": False, "siblings": siblings})
        elif path.startswith(f"{repo}/tree/{COMMIT}"):
            below = path.removeprefix(f"{repo}/tree/{COMMIT}").strip("/")
            self._json(self._entries(below))
        elif path.startswith(f"/datasets/lorem/stories/resolve/{COMMIT}/"):
            self._file(path.removeprefix(f"/datasets/lorem/stories/resolve/{COMMIT}/"))
        else:
            self._missing("RepoNotFound" if "lorem/stories" not in path else "EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "/paths-info/" in self.path and self.path.startswith("/api/datasets/lorem/stories/"):
            asked = json.loads(body)["paths"]
            self._json([entry for entry in self._entries("") + self._entries("data") if entry["path"] in asked])
        else:
            self._missing("RepoNotFound")

    def _entries(self, folder: str) -> list[dict[str, object]]:
        if folder == "data":
            return [{"type": "file", "path": p, "size": len(b), "oid": "1" * 40} for p, b in FILES.items()]
        return [{"type": "directory", "path": "data", "size": 0, "oid": "2" * 40}]

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "there is no such thing here"})

    def _file(self, name: str) -> None:
        if name not in FILES:
            return self._missing("EntryNotFound")
        content, status = FILES[name], 200
        headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            end = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            content, status = content[int(first) : end + 1], 206
        self._send(status, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub_url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _read(source: str, hub_url: str, home: Path, text_column: str = "text") -> list[str]:
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home / "hf"), "RAYLLM_DATA_DIR": str(home)}
    environment |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", READ, source, text_column]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_data_set_of_the_hub_is_streamed_shard_by_shard(hub_url: str, tmp_path: Path) -> None:
    lines = _read("hub:lorem/stories", hub_url, tmp_path)
    texts = [line for line in lines if not line.startswith("piece")]
    assert texts == [f"document {idx}-{row}" for idx in range(4) for row in range(3)], "the train split, once"
    pieces = [line for line in lines if line.startswith("piece")]
    assert len(pieces) == 4 and COMMIT[:12] in pieces[0], "one piece a file, at a fixed revision"


def test_a_split_and_a_column_of_the_hub_are_checked(hub_url: str, tmp_path: Path) -> None:
    assert _read("hub:lorem/stories:default:test", hub_url, tmp_path)[1:] == ["held out"]
    (*_, refused) = _read("hub:lorem/stories", hub_url, tmp_path, text_column="content")
    assert refused.startswith("refused:") and "'content'" in refused and "'text'" in refused


def test_what_the_hub_does_not_know_is_refused(hub_url: str, tmp_path: Path) -> None:
    (refused,) = _read("hub:lorem/nothing", hub_url, tmp_path)
    assert (
        refused.startswith("refused: hub:lorem/nothing is not at hand") and str(tmp_path / "lorem/nothing") in refused
    )


def test_a_hub_that_does_not_answer_is_refused_in_time(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    (refused,) = _read("hub:lorem/stories", f"http://127.0.0.1:{port}", tmp_path)
    assert "the hub did not give it" in refused
    assert time.monotonic() - start < 60


def test_waiting_is_bounded() -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer within"):
        _bounded(lambda: time.sleep(30), timeout_s=0.2)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:a/b/c", "hub:/b", "hub:a/b:c:d:e"])
def test_a_malformed_name_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="expected hub:ORG/NAME"):
        HubName.parse(source)


def test_names_are_parsed() -> None:
    assert HubName.parse("hub:a/b") == HubName("a/b")
    assert HubName.parse("hub:a/b:sub") == HubName("a/b", "sub")
    assert HubName.parse("hub:a/b::val") == HubName("a/b", None, "val")
