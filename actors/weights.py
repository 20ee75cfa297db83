"""How weights travel from the learners to the rollout actors: what a channel promises, and the one by Ray's object
store. `weights_group.py` holds the one by torch.distributed, `weights_roles.py` what the actors do."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError
from torch import Tensor

from rayllm.types import WeightsVersion

GRACE_S = 5.0  # what the other actors are given to say what they know, once one has failed


@dataclass(frozen=True)
class Packet:
    """A model's weights as plain arrays (bfloat16 as its bits), which the object store shares without a copy."""

    version: WeightsVersion
    arrays: Mapping[str, np.ndarray]
    dtypes: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def pack(state: Mapping[str, Tensor], number: int, *, copy: bool = False) -> Packet:
    """Weights on any device to a packet, with their digest; with `copy`, one that does not change with them."""
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in state.items()}
    arrays = {name: _to_array(weight, copy=copy) for name, weight in state.items()}
    return Packet(WeightsVersion(number, _digest(arrays)), arrays, dtypes)


def unpack(packet: Packet) -> dict[str, Tensor]:
    """The weights of a packet, sharing its memory: to be read only. Raises ValueError when they were damaged."""
    _check(packet.arrays, packet.version)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor do we write to it
        with_bits = {name: torch.from_numpy(array) for name, array in packet.arrays.items()}
    return {name: bits.view(getattr(torch, packet.dtypes[name])) for name, bits in with_bits.items()}


def check_weights(state: Mapping[str, Tensor], version: WeightsVersion) -> None:
    """Raises ValueError when these weights, on any device, are not those of the version."""
    _check({name: _to_array(weight) for name, weight in state.items()}, version)


class WeightsChannel(Protocol):
    """Brings the weights of one actor (a `WeightsSender`) to others (`WeightsReceiver`s)."""

    def start(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> Transfer:
        """Begin to bring what `source` holds now to all receivers, as version `number`; returns at once."""
        ...

    def pull(self, receiver: Any, timeout_s: float) -> Transfer | None:
        """Begin to bring the newest weights that were started to one that came late; None where there are none yet,
        so that what the receiver began with is the newest. Always by the object store: nobody waits for anybody."""
        ...

    def close(self) -> None:
        """Forget the newest weights and leave what the actors share; the actors live on."""
        ...


class Transfer:
    """One version of the weights on its way: the actor calls that bring it, and what they say in the end.

    `loads` are the receivers' calls, which give a WeightsVersion; `sent` is the source's, which gives bytes.
    """

    def __init__(
        self, number: int, source: Any, receivers: Sequence[Any], loads: Sequence[Any], sent: Any, timeout_s: float
    ) -> None:
        if not receivers:
            raise ValueError(f"weights version {number} has nobody to go to: there is no rollout actor")
        self._number, self._timeout_s = number, timeout_s
        self._what = f"sending weights version {number} to {len(receivers)} rollout actors"
        names = [f"rollout actor {i} ({actor!r})" for i, actor in enumerate(receivers)]
        self._calls = dict(zip(names, loads, strict=True)) | {f"the sender ({source!r})": sent}
        self._start_s, self._ends_s = time.monotonic(), list[float]()
        for ref in self._calls.values():  # their ends are noted when they come: `wait` may be called much later
            ref.future().add_done_callback(lambda _: self._ends_s.append(time.monotonic()))
        self._metrics: dict[str, float] | None = None

    @property
    def has_arrived(self) -> bool:
        """Whether `wait` has seen it arrive everywhere."""
        return self._metrics is not None

    def wait(self) -> WeightsVersion:
        """Return once all receivers have the weights.

        Each of these names the version and the receivers: TimeoutError when it takes longer than `timeout_s` from the
        start, ConnectionError when an actor died, ValueError when weights arrived damaged or are of another model.
        """
        try:
            *versions, num_bytes = ray.get(list(self._calls.values()), timeout=self._left_s())
        except RayError as error:
            raise self._explain(error) from error
        wrong = [
            f"{name} has {version}"
            for name, version in zip(self._calls, versions, strict=False)
            if version.number != self._number or version.digest != versions[0].digest
        ]
        if wrong:
            raise ValueError(f"{self._what} brought other ones: {'; '.join(wrong)}")
        end_s = max(self._ends_s) if len(self._ends_s) == len(self._calls) else time.monotonic()
        ms = 1000 * (end_s - self._start_s)
        self._metrics = {"publish/ms": ms, "publish/mb": num_bytes / 1e6, "publish/gb_per_s": num_bytes / 1e6 / ms}
        version: WeightsVersion = versions[0]
        return version

    def metrics(self) -> dict[str, float]:
        """After `wait`: milliseconds from the start to the last receiver's answer, megabytes of one copy of the
        weights, and their quotient."""
        assert self._metrics is not None, "wait() comes first"
        return dict(self._metrics)

    def _left_s(self) -> float:
        return max(0.0, self._start_s + self._timeout_s - time.monotonic())

    def _explain(self, first: RayError) -> Exception:
        """The one error to raise, once the actors had a moment to say what each knows."""
        refs = list(self._calls.values())
        grace_s = min(GRACE_S, self._left_s()) if _says(first, TimeoutError) else GRACE_S
        ray.wait(refs, num_returns=len(refs), timeout=grace_s)
        errors = {name: error for name, ref in self._calls.items() if (error := _error_of(ref)) is not None}
        silent = [name for name, error in errors.items() if isinstance(error, GetTimeoutError)]
        dead = [name for name, error in errors.items() if _says(error, RayActorError) and not _is_told(error)]
        heard = [f"no answer from {', '.join(silent)}"] if silent else []
        heard += [f"{name}: {_one_line(error)}" for name, error in errors.items() if _is_told(error)]
        told = "; ".join(heard)
        if dead:
            return ConnectionError(f"an actor died while {self._what} was under way: {', '.join(dead)}")
        if any(_says(error, ValueError) for error in errors.values()):
            return ValueError(f"{self._what}: {told}")
        if any(_says(error, TimeoutError) for error in errors.values()):
            return TimeoutError(f"waited {self._timeout_s:g} s for {self._what}: {told}")
        if any(_says(error, ConnectionError, RayActorError, ObjectLostError) for error in errors.values()):
            return ConnectionError(f"{self._what} failed: {told}")
        return first


class Turns:
    """Which of the calls to a receiver must end before the next may begin. Ray begins the calls of an async actor in
    any order, and weights must not overtake each other."""

    def __init__(self) -> None:
        self._last: dict[Any, Any] = {}

    def call(self, receiver: Any, begin: Callable[[list[Any]], Any]) -> Any:
        """The reference that `begin` returns, given those of calls that must end before."""
        last = self._last.get(receiver)
        is_over = last is None or bool(ray.wait([last], timeout=0)[0])
        ref = self._last[receiver] = begin([] if is_over else [last])
        return ref


class ObjectStoreChannel:
    """Through Ray's object store: shared memory on one node, one transfer to each other node. The newest weights stay
    in the store, for those that come late: one copy of them."""

    def __init__(self) -> None:
        self._newest: tuple[int, Any, Any, Any] | None = None
        self._turns = Turns()

    def start(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> Transfer:
        packet, num_bytes = source.pack_weights.remote(number)
        self._newest = number, source, packet, num_bytes
        return send_packet(*self._newest, receivers, self._turns, timeout_s)

    def pull(self, receiver: Any, timeout_s: float) -> Transfer | None:
        return None if self._newest is None else send_packet(*self._newest, [receiver], self._turns, timeout_s)

    def close(self) -> None:
        self._newest = None


def send_packet(
    number: int, source: Any, packet: Any, num_bytes: Any, receivers: Sequence[Any], turns: Turns, timeout_s: float
) -> Transfer:
    """Bring a packet of `source` to receivers; `packet` and `num_bytes` are references to it and to its size."""
    # In a list, so that each receiver fetches the packet itself and sees the store's own memory.
    loads = [turns.call(receiver, partial(receiver.load_weights.remote, [packet])) for receiver in receivers]
    return Transfer(number, source, receivers, loads, num_bytes, timeout_s)


def _error_of(ref: Any) -> RayError | None:
    try:
        ray.get(ref, timeout=0)
    except RayError as error:
        return error
    return None


def _is_told(error: RayError) -> bool:
    """Whether an actor raised it, and so lives."""
    return isinstance(error, RayTaskError)


def _says(error: RayError, *kinds: type[Exception]) -> bool:
    """Whether an error, or what an actor raised, is of these kinds."""
    return isinstance(error, kinds) or isinstance(getattr(error, "cause", None), kinds)


def _one_line(error: RayError) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


def _check(arrays: Mapping[str, np.ndarray], version: WeightsVersion) -> None:
    digest = _digest(arrays)
    if digest != version.digest:
        raise ValueError(f"weights version {version.number} arrived damaged: digest {digest}, not {version.digest}")


def _to_array(weight: Tensor, *, copy: bool = False) -> np.ndarray:
    weight = weight.detach().to("cpu", copy=copy).contiguous()
    bits = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    array: np.ndarray = bits.numpy()
    return array


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()
