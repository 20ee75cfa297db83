"""The two ends on which weights travel, for actors to inherit: the learner that sends, the rollout actor that receives.

Their methods are called by the channels, on all actors at once; the driver waits for none of them.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from actors.weights import Packet, check_weights, pack, unpack
from actors.weights_group import Group, Meeting, Offer, open_store
from rayllm.types import WeightsVersion

_OPEN_TIMEOUT = datetime.timedelta(seconds=60)  # to listen on a port of one's own takes no time


class WeightsSender:
    """Sends what `get_state` returns at the time of the call: weights on any device."""

    def __init__(self, get_state: Callable[[], Mapping[str, Tensor]]) -> None:
        self._weights_to_send = get_state
        self._weights_offered: Packet | None = None
        self._weights_store: Any = None  # the TCPStore of all meetings
        self._weights_group: Group | None = None

    @ray.method(num_returns=2)
    def pack_weights(self, number: int) -> tuple[Packet, int]:
        """For the object store: the weights as version `number`, and their size in bytes."""
        packet = pack(self._weights_to_send(), number)
        return packet, packet.num_bytes

    def offer_weights(self, number: int) -> Offer:
        """For a process group: what the next `send_weights` will send. It is copied, so that it stays as it is."""
        packet = self._weights_offered = pack(self._weights_to_send(), number, copy=True)
        shapes = {name: tuple(array.shape) for name, array in packet.arrays.items()}
        store = self._open_weights_store(_OPEN_TIMEOUT)
        return Offer(packet.version, shapes, packet.dtypes, (store.host, store.port))

    def send_weights(self, number: int, meeting: Meeting, timeout_s: float) -> int:
        """Broadcast what was offered to all of the meeting; returns its size in bytes.

        Raises TimeoutError or ConnectionError, saying for whom or what, and ValueError when it was not offered.
        """
        deadline_s = time.monotonic() + timeout_s
        packet = self._weights_offered
        if packet is None or packet.version.number != number:
            raise ValueError(f"weights version {number} cannot be sent: it was not offered")
        device = next(iter(self._weights_to_send().values())).device
        group = _join(self._weights_group, meeting, 0, self._open_weights_store, device, deadline_s)
        self._weights_group = group
        group.broadcast(
            {name: torch.from_numpy(array).to(group.device) for name, array in packet.arrays.items()}, deadline_s
        )
        return packet.num_bytes

    @ray.method(num_returns=2)
    def pack_offered(self) -> tuple[Packet, int]:
        """For one that comes late: what was offered last, whatever was learned since, and its size in bytes."""
        if self._weights_offered is None:
            raise ValueError("no weights were offered yet: a newcomer's own are the newest")
        return self._weights_offered, self._weights_offered.num_bytes

    def leave_group(self) -> None:
        """Close the group; the next broadcast builds another."""
        _leave(self._weights_group)
        self._weights_group = None

    def _open_weights_store(self, timeout: datetime.timedelta) -> Any:
        """Where the members of all groups meet: a server in this process, from the first broadcast on."""
        if self._weights_store is None:
            self._weights_store = open_store(ray.util.get_node_ip_address(), 0, timeout, serves=True)
        return self._weights_store


class WeightsReceiver:
    """Hands the weights that come to `load(weights, version)`, one version at a time, in the event loop.

    `load` may keep the weights, but not write to them: those from the object store are shared with other actors.
    What takes long (fetching, checking) leaves the event loop to others. `device` is where they are wanted.
    """

    def __init__(self, load: Callable[[Mapping[str, Tensor], int], None], device: torch.device | str = "cpu") -> None:
        self._weights_load, self._weights_device = load, torch.device(device)
        self._weights_lock = asyncio.Lock()
        self._weights_group: Group | None = None

    async def load_weights(self, packets: Sequence[Any], earlier: Sequence[Any] = ()) -> WeightsVersion:
        """Take one packet, or a reference to one, once the `earlier` calls have ended. Raises ValueError when it is
        damaged or of another model."""
        await asyncio.gather(*earlier, return_exceptions=True)
        async with self._weights_lock:
            packet = packets[0] if isinstance(packets[0], Packet) else await packets[0]
            state = await asyncio.to_thread(unpack, packet)
            self._weights_load(state, packet.version.number)
            version: WeightsVersion = packet.version
            return version

    async def receive_weights(
        self, offers: Sequence[Any], meeting: Meeting, rank: int, timeout_s: float, earlier: Sequence[Any] = ()
    ) -> WeightsVersion:
        """Take part as `rank` in the broadcast of one offer, or of a reference to one, once the `earlier` calls have
        ended.

        Raises TimeoutError or ConnectionError, saying for whom or what, and as `load_weights` does.
        """
        deadline_s = time.monotonic() + timeout_s
        await asyncio.gather(*earlier, return_exceptions=True)
        async with self._weights_lock:
            try:
                async with asyncio.timeout(timeout_s):
                    offer: Offer = offers[0] if isinstance(offers[0], Offer) else await offers[0]
            except TimeoutError as error:
                raise TimeoutError(f"the sender offered nothing within {timeout_s:g} s") from error
            state = await asyncio.to_thread(self._receive, offer, meeting, rank, deadline_s)
            self._weights_load(state, offer.version.number)
            return offer.version

    async def leave_group(self) -> None:
        """Close the group; the next broadcast builds another."""
        async with self._weights_lock:
            _leave(self._weights_group)
            self._weights_group = None

    def _receive(self, offer: Offer, meeting: Meeting, rank: int, deadline_s: float) -> dict[str, Tensor]:
        def meet(timeout: datetime.timedelta) -> Store:
            return open_store(*offer.address, timeout)

        group = _join(self._weights_group, meeting, rank, meet, self._weights_device, deadline_s)
        self._weights_group = group
        state = offer.empty(group.device)
        group.broadcast(state, deadline_s)
        check_weights(state, offer.version)
        return state


def _join(
    group: Group | None,
    meeting: Meeting,
    rank: int,
    meet: Callable[[datetime.timedelta], Store],
    device: torch.device,
    deadline_s: float,
) -> Group:
    """The group one is in, where it is that of the meeting, else a new one."""
    if group is not None and group.is_open and group.meeting == meeting:
        return group
    _leave(group)
    return Group(meeting, rank, meet, device, deadline_s)


def _leave(group: Group | None) -> None:
    if group is not None and group.is_open:
        group.close()
