"""Worker, driver and node killed at random steps: the run ends with the undisturbed run's weights, bit for bit.

Each round draws its step from a seed, which it prints; a node is a raylet of its own with one worker on it.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayllm.config.schema import PretrainConfig, WorkersConfig
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Recipe = Callable[..., PretrainConfig]
HANG_LIMIT_S = 300.0
NUM_STEPS, SAVE_EVERY = 40, 5
ROUNDS = (0, 1)

# Every kind of round has two workers of one core: so has the run that they are compared with.
WORKERS = WorkersConfig(num_workers=2, device="cpu", dtype="float32", cpus_per_worker=1)


def build(tiny_recipe: Recipe, out: Path) -> PretrainConfig:
    return tiny_recipe(out, num_steps=NUM_STEPS, save_every=SAVE_EVERY, eval_every=None, workers=WORKERS)


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read_metrics(out / "metrics.jsonl") if "train/loss" in r}


def weights(out: Path) -> dict[str, bytes]:
    state = load_file(open_checkpoint(out).path / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def finish(command: Any) -> str:
    output, _ = command.process.communicate(timeout=HANG_LIMIT_S)
    assert command.process.returncode == 0, output
    return str(output)


def wait_for_random_step(command: Any, out: Path, kind: str, seed: int) -> None:
    step = random.Random(f"{kind} {seed}").randrange(2, NUM_STEPS - 5)
    print(f"{kind} round, seed {seed}: kills after step {step}")
    command.wait_for(out / "metrics.jsonl")
    deadline = time.monotonic() + HANG_LIMIT_S
    while max(losses(out), default=0) < step:
        assert command.process.poll() is None, f"ended early:\n{command.process.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited {HANG_LIMIT_S} s for step {step}"
        time.sleep(0.01)


def assert_same(out: Path, undisturbed: Path) -> None:
    assert weights(out) == weights(undisturbed)
    assert losses(out) == losses(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tiny_recipe: Recipe, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from actors import fit

    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    fit.run(build(tiny_recipe, out))
    return out


def test_a_worker_is_killed(
    undisturbed: Path, tiny_recipe: Recipe, commands: Any, side_by_side: Any, tmp_path: Path
) -> None:
    def play(seed: int) -> None:
        out = tmp_path / f"run_{seed}"
        command = commands("pretrain", build(tiny_recipe, out))
        wait_for_random_step(command, out, "worker", seed)
        os.kill(random.Random(seed).choice(sorted(command.processes("RayTrainWorker"))), signal.SIGKILL)
        assert "starting them again from the last checkpoint (1 of at most 3 times)" in finish(command)
        assert_same(out, undisturbed)

    side_by_side(play, ROUNDS)


def test_the_driver_is_killed(
    undisturbed: Path, tiny_recipe: Recipe, commands: Any, side_by_side: Any, tmp_path: Path
) -> None:
    """The same command goes on; so does one with another number of workers, on the same rows."""

    def kill(seed: int) -> None:
        config = build(tiny_recipe, tmp_path / f"run_{seed}")
        command = commands("pretrain", config)
        wait_for_random_step(command, Path(config.out), "driver", seed)
        command.process.kill()
        command.kill()  # and its Ray, which would notice that sooner or later and might meanwhile train to the end
        assert NUM_STEPS not in losses(Path(config.out))
        assert not Path(config.out, "checkpoints", f"step_{NUM_STEPS:06d}").exists()
        shutil.copytree(config.out, tmp_path / f"alone_{seed}")

    def go_on(num_workers: int) -> None:
        for seed in ROUNDS:
            out = tmp_path / f"{'alone' if num_workers == 1 else 'run'}_{seed}"
            workers = replace(WORKERS, num_workers=num_workers)
            finish(commands("pretrain", replace(build(tiny_recipe, out), workers=workers)))

    side_by_side(kill, ROUNDS)
    side_by_side(go_on, (1, 2))
    for seed in ROUNDS:
        assert_same(tmp_path / f"run_{seed}", undisturbed)
        alone = tmp_path / f"alone_{seed}"
        assert losses(alone) == pytest.approx(losses(undisturbed), abs=1e-3)
        mine, theirs = open_checkpoint(alone), open_checkpoint(undisturbed)
        assert (mine.step, mine.state["position"]) == (theirs.step, theirs.state["position"])


_NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "include_dashboard": False,
    "dashboard_port": int(sys.argv[1]), "dashboard_agent_listen_port": int(sys.argv[2]),
})
node = cluster.add_node(num_cpus=1)
print("address", cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(node, allow_graceful=False)
    node = cluster.add_node(num_cpus=1)
    print("replaced", node.node_id, flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster of two nodes of one core on this machine, held by a process of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            ports = [str(probe.getsockname()[1]) for probe in (one, other)]
        self._log = (folder / "nodes.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NODES, *ports],
            env={**os.environ, "RAY_TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.address = self._answer("address")

    def kill_one_and_add_another(self) -> None:
        """SIGKILL to every process of the node without the head."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._answer("replaced")

    def _answer(self, what: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(what):
                return line.split()[1]
        self._log.seek(0)
        raise AssertionError(f"the nodes ended before they said {what}:\n{self._log.read()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        finally:
            self._process.kill()
            self._log.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Not in pytest's folder: the paths of Ray's sockets may have 107 characters, no more.
    folder = Path(tempfile.mkdtemp(prefix="rayllm-"))
    with pytest.MonkeyPatch.context() as patched:
        (folder / "token").write_text(secrets.token_hex(32), encoding="utf-8")
        patched.setenv("RAY_AUTH_MODE", "token")
        patched.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Nodes(folder)
        patched.setenv("RAY_ADDRESS", cluster.address)
        try:
            yield cluster
        finally:
            cluster.close()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("seed", ROUNDS)
def test_a_node_is_killed(
    undisturbed: Path, nodes: Nodes, tiny_recipe: Recipe, commands: Any, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "run"
    command = commands("pretrain", build(tiny_recipe, out))
    wait_for_random_step(command, out, "node", seed)
    nodes.kill_one_and_add_another()
    assert "starting them again from the last checkpoint" in finish(command)
    assert_same(out, undisturbed)
