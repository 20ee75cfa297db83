"""How weights travel from the learners to the rollout actors: one packet in Ray's object store, one copy a node."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from actors.cluster import wait_for
from rayllm.types import WeightsVersion


@dataclass(frozen=True)
class Packet:
    """A model's weights as plain arrays (bfloat16 as its bits), which the object store shares without a copy."""

    version: WeightsVersion
    arrays: Mapping[str, np.ndarray]
    dtypes: Mapping[str, str]


def pack(state: Mapping[str, Tensor], number: int) -> Packet:
    """Weights on any device to a packet, with their digest."""
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in state.items()}
    arrays = {name: _to_array(weight) for name, weight in state.items()}
    return Packet(WeightsVersion(number, _digest(arrays)), arrays, dtypes)


def unpack(packet: Packet) -> dict[str, Tensor]:
    """The weights of a packet, sharing its memory: to be read only. Raises ValueError when they were damaged."""
    digest = _digest(packet.arrays)
    if digest != packet.version.digest:
        raise ValueError(
            f"weights version {packet.version.number} arrived damaged: digest {digest}, not {packet.version.digest}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor do we write to it
        with_bits = {name: torch.from_numpy(array) for name, array in packet.arrays.items()}
    return {name: bits.view(getattr(torch, packet.dtypes[name])) for name, bits in with_bits.items()}


class WeightsChannel(Protocol):
    """Brings the weights of one actor to others."""

    def start(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> Any: ...

    def broadcast(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> WeightsVersion:
        """`source.pack_weights(number)` to every receiver's `load_weights`; returns when all have them.

        Raises TimeoutError, naming version and receivers, when that takes longer than `timeout_s`.
        """
        ...


class ObjectStoreChannel:
    """Through Ray's object store: shared memory on one node, one transfer to each other node."""

    def start(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> Any:
        channel = self

        class Transfer:
            def wait(self) -> WeightsVersion:
                return channel.broadcast(source, number, receivers, timeout_s)

            def metrics(self) -> dict[str, float]:
                return {}

        return Transfer()

    def broadcast(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> WeightsVersion:
        packet = source.pack_weights.remote(number)
        # In a list, so that each receiver fetches the packet itself and sees the store's own memory.
        loads = [receiver.load_weights.remote([packet]) for receiver in receivers]
        what = f"sending weights version {number} to {len(receivers)} rollout actors"
        versions: list[WeightsVersion] = wait_for(loads, timeout_s, what)
        return versions[0]


def _to_array(weight: Tensor) -> np.ndarray:
    weight = weight.detach().cpu().contiguous()
    bits = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    array: np.ndarray = bits.numpy()
    return array


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def build_channel(kind: str) -> WeightsChannel:
    return ObjectStoreChannel()


Transfer = Any
