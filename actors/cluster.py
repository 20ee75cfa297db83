"""Entering a Ray cluster and counting what it has. The only place that starts, joins or stops Ray."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import GetTimeoutError, RayActorError

# Ray's own settings, unless the user has set them: answers in a quarter of a second, fewer lines of noise, no word
# home from a laptop, and workers as urgent as any program, which beside one busy other would else hardly start.
# They are read when Ray's processes start.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


DeviceT = TypeVar("DeviceT", bound=str)
_API_SERVER = "RAY_API_SERVER_ADDRESS"
DASHBOARD_PORT = 8265


@dataclass(frozen=True)
class Cluster:
    """The Ray this process is in. `is_own`: started by us on this machine, so it never grows."""

    is_own: bool

    def count_nodes(self) -> int:
        return sum(node["Alive"] for node in ray.nodes())

    def count(self, resource: str) -> int:
        """Total of a resource ("CPU", "GPU") over the nodes alive now."""
        return int(ray.cluster_resources().get(resource, 0))

    def most_on_a_node(self, resource: str) -> int:
        """The most of a resource that one actor can have."""
        return int(max((node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"]), default=0))

    def wait_for_room(
        self, bundles: Sequence[Mapping[str, float]], timeout_s: float, cure: str = "ask for fewer workers or less each"
    ) -> None:
        """Return once the cluster's nodes have the resources of all `bundles`, each on one node.

        A cluster that can grow is asked to and waited for, with a line that says for what. Raises ValueError
        when our own one-machine cluster is too small, TimeoutError when the other stays so.
        """

        def lacking() -> str:
            return tell_what_lacks(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])

        if not lacking():
            return
        if self.is_own:
            raise ValueError(f"this machine is too small: {len(bundles)} workers need {lacking()}; {cure}")
        print(f"ray: waiting up to {timeout_s:.0f} s for {lacking()} ...", file=sys.stderr)
        request_resources(bundles=[dict(b) for b in bundles])
        deadline = time.monotonic() + timeout_s
        try:
            while missing := lacking():
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"after {timeout_s:.0f} s the cluster still lacks {missing}; {cure}, or add nodes"
                    )
                time.sleep(1.0)
        finally:
            request_resources(bundles=[])


def tell_what_lacks(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> str:
    """In words: what `nodes`, with nothing on them, would lack to hold `bundles`, none of them split; empty if nothing.

    The largest are placed first, each on the first node that has room for it.
    """
    names = sorted({name for bundle in bundles for name in bundle})
    rooms = [{name: node.get(name, 0.0) for name in names} for node in nodes]
    homeless = []
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0), b.get("CPU", 0)), reverse=True):
        # Shares such as a third add up to a little more than the whole.
        room = next((r for r in rooms if all(r[name] + 1e-6 >= n for name, n in bundle.items())), None)
        if room is None:
            homeless.append(bundle)
            continue
        for name, amount in bundle.items():
            room[name] -= amount
    if not homeless:
        return ""
    wanted, have = ({name: sum(x.get(name, 0) for x in xs) for name in names} for xs in (bundles, nodes))
    if short := [f"{wanted[n]:g} {n} (there are {have[n]:g})" for n in names if wanted[n] > have[n] + 1e-6]:
        return ", ".join(short)
    each = " and ".join(f"{amount:g} {name}" for name, amount in sorted(homeless[0].items()))
    largest = ", ".join(f"{max(node.get(name, 0) for node in nodes):g} {name}" for name in sorted(homeless[0]))
    return f"{len(homeless)} x {each}, each on one node (the largest nodes have {largest})"


@dataclass(frozen=True)
class Placement:
    """What each actor of a group gets. `num_threads` is torch's, 0 for torch's own choice."""

    num_cpus: float
    num_gpus: float
    num_threads: int

    def decide(self, device: DeviceT) -> DeviceT | Literal["cuda", "cpu"]:
        """What an actor computes on where it was left the choice ("auto"): it may see GPUs that are not its."""
        return device if device != "auto" else "cuda" if self.num_gpus else "cpu"

    def options(self) -> dict[str, float]:
        """For `ActorClass.options`."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


@dataclass(frozen=True)
class ActorGroup:
    """Actors that are alike; `num_cpus` each, None for a fair share."""

    num_actors: int
    num_cpus: int | None
    device: str


def place_in_turns(ray_cluster: Cluster, groups: Sequence[ActorGroup], timeout_s: float) -> list[Placement]:
    """Resources of groups of actors that work one after the other, on the same devices; waits for a growing cluster.

    On GPUs an actor of each group shares one. On CPUs each group computes with all cores in its turn, so that each
    claims its share of them and runs as many threads as it can use.
    """
    # More than a half for the first: two of one group then never land on one GPU.
    shares = (0.6, 0.4) if len(groups) == 2 else (1 / len(groups),) * len(groups)
    num_gpus = max(g.num_actors for g in groups if g.device != "cpu") if any(g.device != "cpu" for g in groups) else 0
    has_gpus = ray_cluster.count("GPU") >= num_gpus > 0
    return _place(ray_cluster, groups, timeout_s, has_gpus, shares, takes_turns=True)


def place_apart(ray_cluster: Cluster, groups: Sequence[ActorGroup], timeout_s: float) -> list[Placement]:
    """Resources of groups of actors that work at the same time, each on devices of its own; waits for a growing
    cluster. On CPUs the cores are shared out evenly among all actors, unless a group says how many it wants."""
    has_gpus = has_gpus_for_all(ray_cluster, groups)
    return _place(ray_cluster, groups, timeout_s, has_gpus, (1.0,) * len(groups), takes_turns=False)


def has_gpus_for_all(ray_cluster: Cluster, groups: Sequence[ActorGroup]) -> bool:
    """Whether there is a GPU for each actor that may have one."""
    return ray_cluster.count("GPU") >= sum(g.num_actors for g in groups if g.device != "cpu") > 0


def _place(
    ray_cluster: Cluster,
    groups: Sequence[ActorGroup],
    timeout_s: float,
    has_gpus: bool,
    gpu_shares: Sequence[float],
    *,
    takes_turns: bool,
) -> list[Placement]:
    num_cores, num_actors = ray_cluster.count("CPU"), sum(g.num_actors for g in groups)
    most = ray_cluster.most_on_a_node("CPU")
    placements = []
    for group, gpu_share in zip(groups, gpu_shares, strict=True):
        if group.device == "cuda" or (group.device == "auto" and has_gpus):
            placements.append(Placement(float(group.num_cpus or 1), gpu_share, 0))
            continue
        share = num_cores / (len(groups) * group.num_actors if takes_turns else num_actors)
        claim = group.num_cpus or min(share, most)
        claim = float(int(claim)) if claim >= 1 else int(claim * 100) / 100  # Ray takes fractions below 1 only
        num_threads = min(num_cores // group.num_actors, most) if takes_turns else int(claim)
        placements.append(Placement(claim, 0, group.num_cpus or max(1, num_threads)))
    bundles = [
        {"CPU": p.num_cpus} | ({"GPU": p.num_gpus} if p.num_gpus else {})
        for group, p in zip(groups, placements, strict=True)
        for _ in range(group.num_actors)
    ]
    ray_cluster.wait_for_room(bundles, timeout_s)
    return placements


def wait_for(refs: list[Any], timeout_s: float, what: str) -> list[Any]:
    """The results of actor calls. Raises TimeoutError or ConnectionError (an actor died), saying what for."""
    try:
        results: list[Any] = ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise TimeoutError(f"waited {timeout_s:g} s for {what}") from error
    except RayActorError as error:
        cause = " ".join(str(error).split("\n")[0].split())
        raise ConnectionError(
            f"an actor died while {what} was under way ({cause}); the same command goes on from the last checkpoint"
        ) from error
    return results


@contextmanager
def connect() -> Iterator[Cluster]:
    """Be inside a Ray cluster; on leaving, shut down what this call started and nothing else.

    Joins the Ray this process is in already; else the cluster of RAY_ADDRESS (as set in a submitted job); else
    starts a local one with its dashboard. Raises ConnectionError when RAY_ADDRESS does not answer.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"  # "local" never attaches to some other Ray of this machine
    if ray.is_initialized():
        yield Cluster(is_own=address == "local")
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    print(f"ray: {'starting on this machine' if address == 'local' else f'joining {address}'} ...", file=sys.stderr)
    try:
        with _reserve_port(DASHBOARD_PORT) if address == "local" else nullcontext() as port:
            settings: dict[str, Any] = {}
            if port:
                settings["dashboard_port"] = port
                # Without this, Ray's own processes may find the dashboard of another Ray, or of one long gone.
                os.environ[_API_SERVER] = f"http://127.0.0.1:{port}"
            try:
                context = ray.init(address=address, logging_level="ERROR", **settings)
            except ray.exceptions.AuthenticationError as error:
                raise ValueError(f"Ray's token is missing or wrong; see RAY_AUTH_TOKEN_PATH ({error})") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own aborts the process before it has cleaned up
        if context.dashboard_url:
            print(f"ray: dashboard at http://{context.dashboard_url}", file=sys.stderr)
        yield Cluster(is_own=address == "local")
    finally:
        ray.shutdown()
        if address == "local":
            os.environ.pop(_API_SERVER, None)


@contextmanager
def _reserve_port(first: int) -> Iterator[int]:
    """The first port from `first` on that nothing listens on, and no other Ray of ours is about to.

    A dashboard that finds its port taken keeps `ray.init` waiting for a minute and is then left out.
    """
    for port in range(first, first + 1000):
        with (
            Path(tempfile.gettempdir(), f"rayllm-{os.getuid()}-port-{port}.lock").open("w") as lock,
            socket.socket() as probe,
        ):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                yield port
                return
    raise ConnectionError(f"no free port from {first} to {first + 999} for Ray's dashboard")
