"""Weights by a torch.distributed broadcast: NCCL where all are on CUDA devices of their own, gloo else.

The group is apart from torch's default one, in which the learners add up their gradients. It is built anew, under a
name of its own, whenever who is in it changes or a broadcast in it failed.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from actors.weights import Transfer, Turns, send_packet
from rayllm.types import WeightsVersion

# The actors give up a little before the driver does, so that it hears from the living who did not come.
_ACTORS_SHARE = 0.9
_ENDED = "ended"


@dataclass(frozen=True)
class Meeting:
    """One group: its name, unlike that of any other, and its size, the sender (rank 0) included."""

    name: str
    world_size: int


@dataclass(frozen=True)
class Offer:
    """What the sender is about to broadcast, in the order of the sorted names, and where it is to be met."""

    version: WeightsVersion
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    address: tuple[str, int]

    def empty(self, device: torch.device) -> dict[str, Tensor]:
        """Memory to receive into."""
        return {
            name: torch.empty(self.shapes[name], dtype=getattr(torch, self.dtypes[name]), device=device)
            for name in sorted(self.shapes)
        }


class ProcessGroupChannel:
    """By a broadcast in a process group of the sender and all receivers.

    The sender is busy until all have the weights, and keeps a copy of them in its memory for those that come late.
    """

    def __init__(self) -> None:
        self._meeting, self._ranks = Meeting("", 0), dict[Any, int]()
        self._source: Any = None
        self._number = 0
        self._last: Transfer | None = None
        self._turns = Turns()

    def start(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> Transfer:
        is_same = source == self._source and self._ranks.keys() == set(receivers)
        if not is_same or self._last is None or not self._last.has_arrived:
            self._meeting = Meeting(uuid.uuid4().hex, 1 + len(receivers))
            self._source, self._ranks = source, {receiver: 1 + i for i, receiver in enumerate(receivers)}
        meeting, actors_timeout_s = self._meeting, timeout_s * _ACTORS_SHARE
        offer = source.offer_weights.remote(number)
        sent = source.send_weights.remote(number, meeting, actors_timeout_s)
        loads = [
            self._turns.call(
                receiver,
                partial(receiver.receive_weights.remote, [offer], meeting, self._ranks[receiver], actors_timeout_s),
            )
            for receiver in receivers
        ]
        self._last, self._number = Transfer(number, source, receivers, loads, sent, timeout_s), number
        return self._last

    def pull(self, receiver: Any, timeout_s: float) -> Transfer | None:
        if self._source is None:
            return None
        packet, num_bytes = self._source.pack_offered.remote()
        return send_packet(self._number, self._source, packet, num_bytes, [receiver], self._turns, timeout_s)

    def close(self) -> None:
        for actor in (self._source, *self._ranks):
            if actor is not None:
                actor.leave_group.remote()
        self._source, self._ranks, self._last = None, {}, None


class Group:
    """This process in the group of a meeting. Raises TimeoutError, naming who, when another does not come before
    `deadline_s` (of `time.monotonic`), ConnectionError when it went away."""

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        meet: Callable[[datetime.timedelta], Store],
        device: torch.device,
        deadline_s: float,
    ) -> None:
        self.meeting, self.is_open = meeting, True
        with _named_errors("meeting the sender", deadline_s):
            self._store = PrefixStore(meeting.name, meet(_time_left(deadline_s)))
        self._is_sender = rank == 0
        try:
            devices = _tell_devices(self._store, meeting, rank, device, deadline_s)
            backend = choose_backend(devices)
            self.device = device if backend == "nccl" else torch.device("cpu")
            with _named_errors(f"building a {backend} group of {meeting.world_size}", deadline_s):
                self._group = _build(backend, self._store, rank, meeting.world_size, _time_left(deadline_s))
        except OSError:
            self._end()
            raise

    def broadcast(self, weights: Mapping[str, Tensor], deadline_s: float) -> None:
        """From rank 0's memory into all others', each tensor in turn; contiguous and on `device`. Raises as the
        constructor does; the group is closed then, which the others notice."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            for name in sorted(weights):
                with _named_errors(f"broadcasting {name}", deadline_s):
                    left = options.timeout = _time_left(deadline_s)
                    # As bytes: the backends do not know all dtypes.
                    self._group.broadcast([weights[name].reshape(-1).view(torch.uint8)], options).wait(left)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Leave; what the others have under way fails then, but for what was sent already."""
        self._end()
        self._group.abort()
        del self._group

    def _end(self) -> None:
        """The sender leaves word, so that one who comes too late does not wait for a group that is no more."""
        self.is_open = False
        if self._is_sender:
            self._store.set(_ENDED, "")


def choose_backend(devices: Sequence[str]) -> Literal["nccl", "gloo"]:
    """By the names that the members give their devices; NCCL wants a GPU for each."""
    has_own_gpus = all(name.startswith("cuda") for name in devices) and len(set(devices)) == len(devices)
    return "nccl" if has_own_gpus else "gloo"


def _tell_devices(store: Store, meeting: Meeting, rank: int, device: torch.device, deadline_s: float) -> list[str]:
    """Each member's device, by rank. It is here that all wait for all."""
    has_nccl = device.type == "cuda" and dist.is_nccl_available()
    store.set(f"device/{rank}", f"cuda {torch.cuda.get_device_properties(device).uuid}" if has_nccl else "host")
    devices = []
    for other in range(meeting.world_size):
        with _named_errors(f"waiting for {'rollout actor ' + str(other - 1) if other else 'the sender'}", deadline_s):
            store.set_timeout(_time_left(deadline_s))
            devices.append(store.get(f"device/{other}").decode())
    if store.check([_ENDED]):
        raise ConnectionError("the others met and went on, this actor came too late")
    return devices


def _build(backend: str, store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> Any:
    if backend == "nccl":
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timeout
        # A wait that raises. Without it a watchdog ends the whole process when a broadcast fails. Read when built.
        with _environment("TORCH_NCCL_BLOCKING_WAIT", "1"):
            return nccl(store, rank, world_size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    # The address at which Ray's nodes reach each other; left alone, gloo takes what the host's own name stands for.
    options._devices = [gloo.create_device(hostname=ray.util.get_node_ip_address())]
    return gloo(store, rank, world_size, options)


def open_store(host: str, port: int, timeout: datetime.timedelta, *, serves: bool = False) -> Store:
    """Where the members of a group meet: the server itself, at a free port for port 0, or a client of it."""
    tcp: Any = vars(dist)["TCPStore"]  # torch's types hide it
    store: Store = tcp(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)
    return store


@contextmanager
def _named_errors(doing: str, deadline_s: float) -> Iterator[None]:
    """torch's errors as TimeoutError or ConnectionError that say what for."""
    try:
        yield
    except RuntimeError as error:
        cause = str(error).split("\n")[0]
        if time.monotonic() > deadline_s - 0.1:  # torch counts whole milliseconds
            raise TimeoutError(f"{doing} took too long ({cause})") from error
        raise ConnectionError(f"{doing} failed ({cause})") from error


def _time_left(deadline_s: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(0.001, deadline_s - time.monotonic()))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
