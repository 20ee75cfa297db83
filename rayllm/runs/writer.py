"""Checkpoints written while training goes on: the tensors are copied to host memory, and a thread does the rest."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rayllm.runs.checkpoint import write_checkpoint
from rayllm.runs.places import Place, below, open_store

if TYPE_CHECKING:
    from torch import Tensor

    from rayllm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one run to a folder or URL, one at a time, and keeps the newest `keep`.

    `save` takes as long as a copy of the state, and host memory for one until it is written. What goes wrong in the
    thread is raised by the next `save`, `flush` or `close`. A process that ends without `close` finishes the write
    first; one that is killed leaves a folder without its marker, which counts for nothing and goes with the next save.
    """

    def __init__(self, root: Place, tokenizer: Tokenizer, keep: int, *, timeout_s: float = 1800.0) -> None:
        self._root, self._tokenizer, self._keep = root, tokenizer, keep
        self._timeout_s = timeout_s
        self._thread: threading.Thread | None = None
        self._step = 0
        self._failure: Exception | None = None

    def save(
        self,
        step: int,
        *,
        model_state: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor] | None,
        state: Mapping[str, object],
    ) -> None:
        """Begin to write the checkpoint of a step; first waits for the one before it.

        The tensors may change as soon as this returns. Raises what went wrong with the one before it, and
        TimeoutError where that is still not written after `timeout_s`.
        """
        self.flush()
        copies = _copy_to_host(model_state)
        moments = None if optimizer_state is None else _copy_to_host(optimizer_state)
        self._step = step
        # A daemon, so that a disk that hangs cannot hold the process for ever; atexit gives it its time.
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, moments, dict(state)), name=f"checkpoint-{step}", daemon=True
        )
        atexit.register(self._finish_at_exit)
        self._thread.start()

    def flush(self) -> None:
        """Return once all that was saved is whole in its place; raises as `save` does."""
        if self._thread is not None:
            self._thread.join(self._timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(
                    f"the checkpoint {below(self._root, f'step_{self._step:06d}')} is still not written after "
                    f"{self._timeout_s:g} s: see whether its disk or network hangs"
                )
            self._thread = None
            atexit.unregister(self._finish_at_exit)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """`flush`, as the last thing."""
        self.flush()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(
        self,
        step: int,
        model_state: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor] | None,
        state: Mapping[str, object],
    ) -> None:
        try:
            write_checkpoint(
                open_store(self._root),
                step,
                model_state=model_state,
                optimizer_state=optimizer_state,
                state=state,
                tokenizer=self._tokenizer,
                keep=self._keep,
            )
        except Exception as error:  # noqa: BLE001, raised by the next call in the thread that trains
            _log.error("%s", error)
            self._failure = error

    def _finish_at_exit(self) -> None:
        """The failure, if any, is in the log already."""
        if self._thread is not None:
            self._thread.join(self._timeout_s)


def _copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share nothing with the originals, which the next step changes in place."""
    import torch

    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
