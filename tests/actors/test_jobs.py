"""Every stage as `ray job submit --working-dir . -- rayllm STAGE ...`, on a Ray head that was started by hand."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rayllm import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes in /proc"),
]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NANOCHAT = ROOT / "tests" / "parity" / "mha"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 90.0
JOB_LIMIT_S = 240.0


@dataclass(frozen=True)
class Stage:
    """A stage as a job. RUNS is the shared folder of the runs; TEXT, a file of text, and NANOCHAT, a model of
    nanochat's, are what every machine sees."""

    name: str
    flags: Sequence[str]
    writes: str = ""
    """A file below RUNS that is there afterwards."""
    prints: str = ""


# In the order of the life; each reads what the ones before it wrote.
LIFE = (
    Stage(
        "tokenizer",
        ["--sources=[TEXT]", "--vocab_size=300", "--out=RUNS/tokenizer"],
        writes="tokenizer/tokenizer.json",
        prints="300 tokens",
    ),
    Stage(
        "tokenize",
        ["--sources=[TEXT]", "--tokenizer=RUNS/tokenizer", "--validation.fraction=0.1", "--out=RUNS/shards"],
        writes="shards/manifest.json",
        prints="ray: joining",
    ),
    Stage(
        "pretrain",
        [
            "--depth=2",
            "--model={aspect_ratio: 16, head_dim: 16, sequence_len: 256}",
            "--horizon={kind: steps, value: 4}",
            "--tokens_per_step=512",
            "--rows_per_micro_batch=2",
            "--data={shards: RUNS/shards, tokenizer: RUNS/tokenizer}",
            "--workers={num_workers: 1, device: cpu}",
            "--eval_tokens=256",
            "--sample_every=null",
            "--sample_tokens=4",
            "--out=RUNS/base",
        ],
        writes="base/checkpoints/step_000004/checkpoint.json",
        prints="ray: joining",
    ),
    Stage(
        "sft",
        [
            "--checkpoint=RUNS/base",
            "--tasks=[{name: word_problems, num_examples: 16}]",
            "--validation=[{name: word_problems, num_examples: 4}]",
            "--tokens_per_step=512",
            "--rows_per_micro_batch=2",
            "--max_steps=2",
            "--workers={num_workers: 1, device: cpu}",
            "--out=RUNS/sft",
        ],
        writes="sft/checkpoints/step_000002/checkpoint.json",
        prints="nats per assistant token",
    ),
    Stage(
        "rl",
        [
            "--checkpoint=RUNS/sft",
            "--validation={num_examples: 4}",
            "--num_steps=1",
            "--prompts_per_step=2",
            "--num_samples=2",
            "--max_tokens=8",
            "--rollouts={device: cpu}",
            "--learners={device: cpu}",
            "--out=RUNS/rl",
        ],
        writes="rl/checkpoints/step_000001/checkpoint.json",
        prints="validation pass@1",
    ),
    Stage(
        "chat-eval",
        ["--checkpoint=RUNS/rl", "--tasks=[{num_examples: 4}]", "--max_tokens=8", "--rollouts={device: cpu}"],
        writes="rl/chat-eval/step_000001/report.json",
        prints="word_problems/test",
    ),
)
# These read at most what the life wrote, and nobody reads what they write: they can run side by side.
LEAVES = (
    Stage(
        "quickstart",
        [
            "--corpus.num_documents=1500",
            "--pretrain.horizon.value=3",
            "--pretrain.eval_tokens=512",
            "--sft.max_steps=2",
            "--rl={num_steps: 1, prompts_per_step: 2, num_samples: 2, max_tokens: 8}",
            "--rl.validation.num_examples=4",
            "--chat_eval={tasks: [{num_examples: 4}, {num_examples: 4}], max_tokens: 8}",
            "--out=RUNS/../quickstart",  # the report beside it reads all of RUNS
        ],
        writes="../quickstart/report.html",
        prints="after RL",
    ),
    Stage(
        "base-eval",
        ["--checkpoint=RUNS/base", "--shards=RUNS/shards", "--max_tokens=512", "--sampling.max_tokens=4"],
        writes="base/base-eval/step_000004/report.json",
        prints="bits per byte",
    ),
    Stage(
        "sample",
        ["--checkpoint=RUNS/base", "--prompts=One plus one", "--num_samples=1", "--sampling.max_tokens=4"],
        prints="One plus one",
    ),
    Stage("chat", ["--checkpoint=RUNS/rl", "--prompt=One plus one", "--sampling.max_tokens=4"]),
    Stage("explain", ["RUNS/rl", "--group=0"], prints="word_problems/train/"),
    Stage("report", ["RUNS"], writes="report.html"),
    Stage(
        "import-nanochat",
        ["NANOCHAT", "--out=RUNS/imported"],
        writes="imported/checkpoints/step_000000/checkpoint.json",
    ),
)


class Head:
    """`ray start --head` with ports, token, home and temporary folder of its own, so that no other Ray is touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.token = secrets.token_hex(32)
        (folder / "auth_token").write_text(self.token, encoding="utf-8")
        (folder / "home").mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAYLLM_TEST_MARK": self.mark,
        }
        with ExitStack() as held:  # all at once, or one port could be handed out twice
            dashboard, client, agent = (self._free_port(held) for _ in range(3))
        self.url = f"http://127.0.0.1:{dashboard}"
        self.log = folder / "head.log"
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [
                    str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2",
                    f"--temp-dir={folder / 'ray'}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                    f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                    "--object-store-memory=200000000", "--disable-usage-stats",
                ],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @staticmethod
    def _free_port(held: ExitStack) -> int:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        return int(listener.getsockname()[1])

    def get(self, path: str, token: str | None) -> int:
        """HTTP status of the dashboard's answer; 0 where nothing answers."""
        return self.get_url(f"{self.url}{path}", {"Authorization": f"Bearer {token}"} if token else {})

    @staticmethod
    def get_url(url: str, headers: Mapping[str, str] | None = None) -> int:
        """HTTP status of any answer; 0 where nothing answers."""
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=10) as ok:
                return int(ok.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while self.get("/api/jobs/", self.token) != 200:
            assert self.process.poll() is None, f"ray start ended:\n{self.log.read_text(encoding='utf-8')}"
            assert time.monotonic() < deadline, f"no head in {START_LIMIT_S} s:\n{self.log.read_text(encoding='utf-8')}"
            time.sleep(0.5)

    def ray(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "ray"), *arguments],
            cwd=cwd,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.url},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_LIMIT_S,
        )

    def submit(self, *command: str, cwd: Path, job_id: str = "") -> subprocess.CompletedProcess[str]:
        options = [f"--submission-id={job_id}"] if job_id else []
        return self.ray("job", "submit", "--working-dir", ".", *options, "--", *command, cwd=cwd)

    def processes(self) -> list[int]:
        """Living processes that came of this head, jobs and workers among them."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                is_ours = folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes()
                if is_ours and "\nState:\tZ" not in (folder / "status").read_text():
                    found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def stop(self) -> list[int]:
        """End it as `--block` is ended (never by `ray stop`, which ends every Ray of the machine).

        Returns the processes that had to be killed: none, when all went well.
        """
        self.process.terminate()
        deadline = time.monotonic() + STOP_LIMIT_S
        while self.processes() and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.2)
        left = self.processes()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(timeout=STOP_LIMIT_S)
        return left


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Not in pytest's folder: the paths of Ray's sockets may have 107 characters, no more.
    folder = Path(tempfile.mkdtemp(prefix="rayllm-"))
    head = Head(folder)
    try:
        head.wait_until_ready()
        yield head
    finally:
        left = head.stop()
        shutil.rmtree(folder, ignore_errors=True)
        assert not left and not head.processes(), f"the head left processes behind: {left}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a user has it: the code, and beside it what Git ignores, too large for an upload."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("rayllm", "actors", "tasks", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("runs/laptop/base/metrics.jsonl", ".venv/bin/python", "wandb/log", "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(200 * 2**20)  # holes; Ray takes uploads of 100 MiB at most
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a shared file system is on a cluster: text, and the runs."""
    folder = tmp_path_factory.mktemp("shared")
    lines = [json.dumps({"text": f"{i} plus {i % 7} is {i + i % 7}. One plus one is two. " * 3}) for i in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_requests_without_the_token_are_refused(head: Head) -> None:
    assert head.get("/api/jobs/", token=None) == 401
    assert head.get("/api/jobs/", token=secrets.token_hex(32)) in (401, 403)
    assert head.get("/api/jobs/", token=head.token) == 200


def test_a_job_gets_the_code_and_not_the_runs(head: Head, checkout: Path) -> None:
    program = "import os, rayllm; print('AT', rayllm.__file__); print('HAS', *sorted(os.listdir()))"
    done = head.submit("python", "-c", program, cwd=checkout)
    assert done.returncode == 0, done.stdout
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()}
    assert "working_dir_files" in lines["AT"][0], "the uploaded code comes before an installed one"
    found = set(lines["HAS"])
    assert {"rayllm", "actors", "tasks", "configs", "pyproject.toml"} <= found
    assert not found & {"runs", ".venv", "wandb", "model.safetensors"}


def test_every_stage_runs_as_a_job(head: Head, checkout: Path, shared: Path, side_by_side: Any) -> None:
    places = (("RUNS", str(shared / "runs")), ("TEXT", str(shared / "text.jsonl")), ("NANOCHAT", str(NANOCHAT)))

    def run(stage: Stage) -> None:
        flags = list(stage.flags)
        for word, place in places:
            flags = [flag.replace(word, place) for flag in flags]
        done = head.submit("rayllm", stage.name, *flags, cwd=checkout)
        assert done.returncode == 0, f"{stage.name}:\n{done.stdout}"
        assert "succeeded" in done.stdout and stage.prints in done.stdout, f"{stage.name}:\n{done.stdout}"
        assert (shared / "runs" / stage.writes).exists(), f"{stage.name} wrote no {stage.writes}:\n{done.stdout}"

    for stage in LIFE:
        run(stage)
    side_by_side(run, LEAVES)
    launch = json.loads((shared / "runs/base/provenance.jsonl").read_text(encoding="utf-8"))
    assert launch["command"][1:3] == ["pretrain", "--depth=2"]


def test_serve_answers_until_the_job_is_stopped(head: Head, checkout: Path, shared: Path) -> None:
    """After the stages above, whose chat model it serves."""
    with ExitStack() as held:
        port = Head._free_port(held)
    command = ["rayllm", "serve", f"--checkpoint={shared / 'runs/rl'}", f"--port={port}", "--device=cpu"]
    submitted = head.ray(
        "job", "submit", "--working-dir", ".", "--no-wait", "--submission-id=serve", "--", *command, cwd=checkout
    )
    assert submitted.returncode == 0, submitted.stdout
    body = {"messages": [{"role": "user", "content": "One plus one"}], "max_tokens": 4}
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + JOB_LIMIT_S
    while head.get_url(f"{url}/health") != 200:
        told = head.ray("job", "logs", "serve", cwd=shared).stdout
        assert time.monotonic() < deadline and "error" not in told, told
        time.sleep(1.0)
    asked = urllib.request.Request(f"{url}/v1/chat/completions", data=json.dumps(body).encode())
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] <= 4
    assert head.ray("job", "stop", "serve", cwd=shared).returncode == 0
    while head.get_url(f"{url}/health") != 0:
        assert time.monotonic() < deadline, "it still answers"
        time.sleep(0.5)


def test_no_stage_is_left_out() -> None:
    assert {stage.name for stage in LIFE + LEAVES} | {"serve"} == {stage.name for stage in cli.STAGES}


def test_a_job_that_fails_says_so(head: Head, checkout: Path, shared: Path) -> None:
    done = head.submit("rayllm", "pretrain", "--depth=two", cwd=checkout, job_id="wrong-depth")
    assert done.returncode == 1 and "depth" in done.stdout and "Traceback" not in done.stdout, done.stdout
    # The command line folds every failure into 1; the exit code itself is kept with the job.
    url, headers = f"{head.url}/api/jobs/wrong-depth", {"Authorization": f"Bearer {head.token}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        job = json.load(answer)
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)
    told = head.ray("job", "logs", "wrong-depth", cwd=shared)
    assert told.returncode == 0 and "depth" in told.stdout
