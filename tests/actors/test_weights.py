"""How weights travel, between small actors that do nothing else: bit for bit, else with an error that says who."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from actors.weights import ObjectStoreChannel, Packet, Transfer, Turns, WeightsChannel, pack, unpack
from actors.weights_group import Offer, ProcessGroupChannel, choose_backend
from actors.weights_roles import WeightsReceiver, WeightsSender

# Ray's workers cannot import test modules: what is defined here travels by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TIMEOUT_S = 60.0
CHANNELS = [ObjectStoreChannel, ProcessGroupChannel]


def weights(number: int, size: int = 1) -> dict[str, Tensor]:
    """All layouts and dtypes that a model may have; `size` scales the largest."""
    generator = torch.Generator().manual_seed(number)
    return {
        "wide": torch.randn(size * 1000, 16, generator=generator),
        "half": torch.randn(33, 7, generator=generator).bfloat16(),
        "scalar": torch.tensor(number + 0.5),
        "turned": torch.randn(4, 6, dtype=torch.float64, generator=generator).t(),
        "none": torch.zeros(0, 3),
    }


class Sender(WeightsSender):
    """Holds `weights(number)` for each number it is told; one that `lies` sends others than it vouched for."""

    def __init__(self) -> None:
        super().__init__(lambda: self.state)
        self.state, self.lies = weights(0), False

    def hold(self, number: int, size: int = 1, lies: bool = False) -> None:
        self.state, self.lies = weights(number, size), lies

    @ray.method(num_returns=2)
    def pack_weights(self, number: int) -> tuple[Packet, int]:
        packet, num_bytes = super().pack_weights(number)
        return self._spoil(packet), num_bytes

    def offer_weights(self, number: int) -> Offer:
        offer = super().offer_weights(number)
        self._weights_offered = self._spoil(self._weights_offered)
        return offer

    def _spoil(self, packet: Packet) -> Packet:
        other = np.where(packet.arrays["wide"] > 0, 0, packet.arrays["wide"])
        return replace(packet, arrays={**packet.arrays, "wide": other}) if self.lies else packet


class Receiver(WeightsReceiver):
    def __init__(self) -> None:
        super().__init__(self._take)
        self.state: Mapping[str, Tensor] = {}
        self.number = -1
        self.is_open = asyncio.Event()

    def _take(self, state: Mapping[str, Tensor], number: int) -> None:
        if "wide" not in state:
            raise ValueError("weights of another model")
        self.state, self.number = state, number

    async def find_wrong(self, number: int, size: int = 1) -> list[str]:
        """Which of the weights held are not `weights(number)`, bit for bit."""
        right = weights(number, size)
        assert self.number == number and self.state.keys() == right.keys(), (self.number, list(self.state))
        return [
            name
            for name, weight in right.items()
            if self.state[name].dtype != weight.dtype or not torch.equal(self.state[name], weight)
        ]

    async def wait_until_open(self) -> None:
        await asyncio.wait_for(self.is_open.wait(), TIMEOUT_S)

    async def open(self) -> None:
        self.is_open.set()

    async def pid(self) -> int:
        return os.getpid()


@dataclass
class Stage:
    sender: Any
    receivers: list[Any]

    def send(self, channel: WeightsChannel, number: int, receivers: list[Any] | None = None) -> Transfer:
        """Change the weights and send them, to the first two receivers unless told otherwise."""
        self.sender.hold.remote(number)
        return channel.start(self.sender, number, self.receivers[:2] if receivers is None else receivers, TIMEOUT_S)


def find_wrong(receivers: list[Any], number: int, size: int = 1) -> list[list[str]]:
    found: list[list[str]] = ray.get([r.find_wrong.remote(number, size) for r in receivers], timeout=TIMEOUT_S)
    return found


@pytest.fixture(scope="module")
def stage(ray_session: None) -> Iterator[Stage]:
    """A sender and three receivers; they outlive what the tests do to them."""
    receiver = ray.remote(num_cpus=0)(Receiver)
    stage = Stage(ray.remote(num_cpus=0)(Sender).remote(), [receiver.remote() for _ in range(3)])
    yield stage
    for actor in (stage.sender, *stage.receivers):
        ray.kill(actor)


@pytest.fixture(params=CHANNELS, ids=["object store", "process group"])
def channel(request: pytest.FixtureRequest, stage: Stage) -> Iterator[WeightsChannel]:
    channel: WeightsChannel = request.param()
    yield channel
    channel.close()


def test_weights_are_packed_bit_for_bit_and_damage_is_found() -> None:
    state = weights(9)
    packet = pack(state, 9)
    arrived = unpack(packet)
    assert packet.version.number == 9 and arrived.keys() == state.keys()
    for name, weight in state.items():
        assert arrived[name].dtype == weight.dtype and torch.equal(arrived[name], weight)
    damaged = replace(packet, arrays={**packet.arrays, "wide": packet.arrays["wide"] + 1})
    with pytest.raises(ValueError, match="weights version 9 arrived damaged"):
        unpack(damaged)


def test_a_copy_does_not_change_with_the_weights() -> None:
    state = weights(1)
    packet = pack(state, 1, copy=True)
    for weight in state.values():
        weight.zero_()
    assert torch.equal(unpack(packet)["wide"], weights(1)["wide"])


def test_weights_travel_bit_for_bit_again_and_again(stage: Stage, channel: WeightsChannel) -> None:
    for number in (1, 2):
        transfer = stage.send(channel, number)
        version = transfer.wait()
        assert version.number == number and version.digest == pack(weights(number), number).version.digest
        assert find_wrong(stage.receivers[:2], number) == [[], []]
        metrics = transfer.metrics()
        num_mb = sum(weight.nbytes for weight in weights(number).values()) / 1e6
        assert metrics["publish/mb"] == pytest.approx(num_mb) and metrics["publish/ms"] > 0
        assert metrics["publish/gb_per_s"] == pytest.approx(num_mb / metrics["publish/ms"])


def test_two_on_their_way_arrive_in_order(stage: Stage, channel: WeightsChannel) -> None:
    transfers = [stage.send(channel, number) for number in (3, 4)]
    assert [transfer.wait().number for transfer in transfers] == [3, 4]
    assert find_wrong(stage.receivers[:2], 4) == [[], []]


def test_weights_do_not_overtake_each_other(stage: Stage) -> None:
    """Ray may begin the later of two calls first: then it waits for the other."""
    receiver, gate = stage.receivers[0], stage.receivers[2]
    turns = Turns()
    turns.call(receiver, lambda earlier: gate.wait_until_open.remote())
    later = turns.call(receiver, partial(receiver.load_weights.remote, [pack(weights(4), 4)]))
    ray.get(receiver.load_weights.remote([pack(weights(3), 3)]), timeout=TIMEOUT_S)
    assert find_wrong([receiver], 3) == [[]]
    gate.open.remote()
    ray.get(later, timeout=TIMEOUT_S)
    assert find_wrong([receiver], 4) == [[]]


def test_damage_is_named_and_nothing_of_it_is_loaded(stage: Stage, channel: WeightsChannel) -> None:
    stage.send(channel, 5).wait()
    stage.sender.hold.remote(6, lies=True)
    transfer = channel.start(stage.sender, 6, stage.receivers[:2], TIMEOUT_S)
    message = r"sending weights version 6 to 2 rollout actors: .*rollout actor 0 \(Actor\(Receiver, \w+\)\): .*damaged"
    with pytest.raises(ValueError, match=message):
        transfer.wait()
    assert find_wrong(stage.receivers[:2], 5) == [[], []]
    stage.send(channel, 7).wait()
    assert find_wrong(stage.receivers[:2], 7) == [[], []]


def test_one_may_join_and_one_may_leave(stage: Stage, channel: WeightsChannel) -> None:
    for number, members in ((8, [0, 1]), (9, [0, 1, 2]), (10, [2, 1, 0]), (11, [2])):
        receivers = [stage.receivers[i] for i in members]
        stage.send(channel, number, receivers).wait()
        assert find_wrong(receivers, number) == [[]] * len(members)
    with pytest.raises(ValueError, match="version 12 has nobody to go to"):
        stage.send(channel, 12, [])


def test_one_that_comes_late_gets_what_was_published_last(stage: Stage, channel: WeightsChannel) -> None:
    late = stage.receivers[2]
    assert channel.pull(late, TIMEOUT_S) is None
    stage.send(channel, 13).wait()
    stage.sender.hold.remote(14)  # learned since, not published
    transfer = channel.pull(late, TIMEOUT_S)
    assert transfer is not None and transfer.wait().number == 13 and transfer.metrics()["publish/mb"] > 0
    assert find_wrong([late], 13) == [[]]
    channel.close()
    assert channel.pull(late, TIMEOUT_S) is None


def test_one_that_was_killed_is_named_and_the_others_go_on(stage: Stage, channel: WeightsChannel) -> None:
    victim = ray.remote(num_cpus=0)(Receiver).remote()
    stage.send(channel, 15, [stage.receivers[0], victim, stage.receivers[1]]).wait()
    pid = ray.get(victim.pid.remote(), timeout=TIMEOUT_S)
    os.kill(pid, signal.SIGSTOP)  # in the middle of it: it takes part no more, and the pipes to it fill up
    stage.sender.hold.remote(16, size=500)
    transfer = channel.start(stage.sender, 16, [stage.receivers[0], victim, stage.receivers[1]], TIMEOUT_S)
    time.sleep(1.0)
    ray.get(stage.receivers[0].pid.remote(), timeout=TIMEOUT_S / 2)  # one that waits for weights does other things
    os.kill(pid, signal.SIGKILL)
    died = "an actor died while sending weights version 16 to 3 rollout actors was under way"
    start_s = time.monotonic()
    with pytest.raises(ConnectionError, match=re.escape(f"{died}: rollout actor 1 ({victim!r})") + "$"):
        transfer.wait()
    assert time.monotonic() - start_s < TIMEOUT_S / 2
    stage.send(channel, 17).wait()
    assert find_wrong(stage.receivers[:2], 17) == [[], []]


@pytest.mark.parametrize("has_met", [True, False])
def test_one_that_does_not_answer_is_named_and_waited_for_no_longer(
    stage: Stage, channel: WeightsChannel, has_met: bool
) -> None:
    if has_met:
        stage.send(channel, 18).wait()
    pid = ray.get(stage.receivers[1].pid.remote(), timeout=TIMEOUT_S)
    stage.sender.hold.remote(19, size=500)
    os.kill(pid, signal.SIGSTOP)
    try:
        transfer = channel.start(stage.sender, 19, stage.receivers[:2], 3.0)
        message = r"waited 3 s for sending weights version 19 to 2 rollout actors: no answer from rollout actor 1 \("
        with pytest.raises(TimeoutError, match=message):
            transfer.wait()
    finally:
        os.kill(pid, signal.SIGCONT)
    stage.send(channel, 20).wait()
    assert find_wrong(stage.receivers[:2], 20) == [[], []]


def test_a_sender_that_died_is_named(stage: Stage, channel: WeightsChannel) -> None:
    sender = ray.remote(num_cpus=0)(Sender).remote()
    channel.start(sender, 21, stage.receivers[:1], TIMEOUT_S)
    ray.kill(sender)
    with pytest.raises(ConnectionError, match=r"sending weights version 22 to 1 .*: the sender \(Actor\(Sender"):
        channel.start(sender, 22, stage.receivers[:1], TIMEOUT_S).wait()


def test_gpus_of_their_own_speak_nccl() -> None:
    assert choose_backend(["cuda a", "cuda b"]) == "nccl"
    assert choose_backend(["cuda a", "cuda a"]) == choose_backend(["cuda a", "host"]) == "gloo"
