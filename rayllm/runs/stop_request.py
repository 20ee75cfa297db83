"""How a run is asked to save and end: by a file in its directory, and by SIGTERM to one of its processes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_sigterm_came = threading.Event()


class StopRequest:
    """The file `stop` of a run directory: empty, or with a line in it once someone has asked.

    It is opened anew for each look: a network file system shows other machines' writes then, not before.
    """

    def __init__(self, run_path: Path, *, look_every_s: float = 0.25) -> None:
        self._path = run_path / "stop"
        self._look_every_s = look_every_s
        self._next_look_s = 0.0
        self._was_asked = False

    def clear(self) -> None:
        """Forget earlier requests; the run's owner does so before its workers start."""
        self._path.write_bytes(b"")

    def ask(self) -> None:
        self._path.write_text("asked\n", encoding="utf-8")

    def is_asked(self) -> bool:
        """Whether someone has; looks at the disk a few times a second at most."""
        now_s = time.monotonic()
        if not self._was_asked and now_s >= self._next_look_s:
            self._next_look_s = now_s + self._look_every_s
            self._was_asked = self._path.exists() and self._path.read_bytes() != b""
        return self._was_asked


def note_sigterm() -> None:
    """From now on the first SIGTERM to this process is noted; the next one does what it would have done before.

    To be called in the main thread.
    """
    handle_first_sigterm(_sigterm_came.set)


def sigterm_came() -> bool:
    """Whether this process has noted one."""
    return _sigterm_came.is_set()


def handle_first_sigterm(act: Callable[[], object]) -> Callable[[], object]:
    """Have the first SIGTERM call `act`, and later ones do what one would do now; returns what undoes this."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None: one that Python did not set

    def restore() -> None:
        signal.signal(signal.SIGTERM, before)

    def handle(signum: int, frame: FrameType | None) -> None:
        restore()
        act()

    signal.signal(signal.SIGTERM, handle)
    return restore


@contextmanager
def asking_on_sigterm(request: StopRequest, say: Callable[[], object]) -> Iterator[None]:
    """Within, the first SIGTERM asks the run to stop and calls `say`. Outside of the main thread: as it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def act() -> None:
        request.ask()
        say()

    restore = handle_first_sigterm(act)
    try:
        yield
    finally:
        restore()
