"""What a person sees of a training run: a bar on a terminal, plain lines elsewhere, read from `metrics.jsonl`.

The driver draws while workers, perhaps on other machines, write the file: nothing but the file lies between them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TextIO

from rayllm.runs.tracking import parse_record


@dataclass(frozen=True)
class _Screen:
    """Where progress is shown, after which name, and the log of all else; without one it is shown, too."""

    stream: TextIO
    name: str = ""
    log: TextIO | None = None


_screen: ContextVar[_Screen | None] = ContextVar("screen", default=None)


@contextmanager
def only_progress(stream: TextIO, name: str, log: TextIO) -> Iterator[None]:
    """Within it, a follower that is given no stream draws on this one, after a name, nothing but where the run is; the
    bar vanishes at its end. What else there is to say, validations and samples, goes to `log`."""
    token = _screen.set(_Screen(stream, name, log))
    try:
        yield
    finally:
        _screen.reset(token)


class ProgressFollower:
    """Follows a metrics file in a background thread while its `with` block runs.

    Records that stand in the file at the start give the step to begin at and nothing else. The file may be missing
    yet, and a resumed run may replace it with a shorter one.
    """

    def __init__(
        self,
        metrics_path: Path,
        num_steps: int,
        stream: TextIO | None = None,
        *,
        poll_every_s: float = 0.2,
        line_every_s: float = 10.0,
    ):
        screen = (stream is None and _screen.get()) or _Screen(stream or sys.stderr)
        self._log = screen.log
        self._tail = MetricsTail(Path(metrics_path))
        self._pace = Pace(num_steps)
        self._view: _View = (
            _Bar(screen.stream, num_steps, screen.name)
            if screen.stream.isatty()
            else _Lines(screen.stream, line_every_s, screen.name)
        )
        self._poll_every_s = poll_every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> ProgressFollower:
        self._tail.poll()
        self._pace.step = self._tail.last_step
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._tail.close()

    def _follow(self) -> None:
        try:
            self._view.show(self._pace)
            while not self._ended.wait(self._poll_every_s):
                self._draw_new_records()
            self._draw_new_records()  # what was written since the last look
            self._view.close(self._pace)
        except (OSError, ValueError):
            if not _is_closed(self._view.stream):
                raise
            # The terminal or pipe went away; that is no reason to disturb the run.

    def _draw_new_records(self) -> None:
        records = self._tail.poll()
        if self._tail.was_replaced:
            self._pace.restart(self._tail.last_step)
        for record in records:
            if "text" in record:
                if record.get("name") == "sample":
                    self._say(f"{self._pace.place(record['step'])}  sample: {_printable(str(record['text']))}")
                continue
            self._pace.add(record)
            if any(key.startswith("val/") for key in record):
                self._say(f"{self._pace.place(record['step'])}  {render_validation(record)}")
        if records:
            self._view.show(self._pace)

    def _say(self, line: str) -> None:
        if self._log is None:
            self._view.say(line)
        else:
            print(line, file=self._log, flush=True)


class MetricsTail:
    """Reads the records that a metrics file gained since the last poll, also over a replacement of the file."""

    def __init__(self, path: Path):
        self.last_step = 0
        self.was_replaced = False
        """Whether the last poll found a new or shortened file in the place of the one before."""
        self._path = path
        self._file: IO[bytes] | None = None
        self._torn = b""
        self._seen: set[int] = set()

    def poll(self) -> list[dict[str, Any]]:
        """Records never returned before, in order; a shortened file's kept records are not new."""
        self.was_replaced = self._reopen_if_replaced()
        if self._file is None:
            return []
        *lines, self._torn = (self._torn + self._file.read()).split(b"\n")
        records = []
        for line in lines:
            record = parse_record(line.decode("utf-8", errors="replace"))
            if record is None:
                continue
            self.last_step = record["step"]
            if (key := hash(line)) not in self._seen:  # a line holds its time: no two are the same
                self._seen.add(key)
                records.append(record)
        return records

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _reopen_if_replaced(self) -> bool:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return False
        if self._file is not None:
            # The open file keeps its inode from being used again.
            same = os.fstat(self._file.fileno()).st_ino == found.st_ino
            if same and found.st_size >= self._file.tell():
                return False
            self._file.close()
        replaced = self._file is not None
        self._file, self._torn, self.last_step = self._path.open("rb"), b"", 0
        return replaced


class Pace:
    """Where the run is, its newest training metrics, and when it will end."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.step = 0
        self.metrics: dict[str, float] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=100)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a new record of metrics."""
        self.step = record["step"]
        if "train/loss" in record:
            self.metrics = {key: value for key, value in record.items() if key.startswith("train/")}
            self._marks.append((float(record.get("time_s", 0.0)), self.step))

    def restart(self, step: int) -> None:
        """Training has gone back to `step`."""
        self.step = step
        self._marks.clear()

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the speed of the last records, validation and checkpoints included."""
        if len(self._marks) < 2:
            return None
        (start_s, start), (end_s, end) = self._marks[0], self._marks[-1]
        if end <= start or end_s <= start_s:
            return None
        return (self.num_steps - end) * (end_s - start_s) / (end - start)

    def place(self, step: int) -> str:
        """`step 120/732`."""
        return f"step {step}/{self.num_steps}"

    def render_metrics(self) -> list[str]:
        """`reward 0.41`, `loss 4.812`, `lr 0.71`, `3,410 tok/s`, `mfu 31%`, `eta 12m30s`, as far as they are known."""
        formats = {
            "train/reward": lambda reward: f"reward {reward:.2f}",
            "train/loss": lambda loss: f"loss {loss:.3f}",
            "train/lr_multiplier": lambda lr: f"lr {lr:.2f}",
            "train/tokens_per_s": lambda speed: f"{speed:,.0f} tok/s",
            "train/mfu": lambda mfu: f"mfu {100 * mfu:.{0 if mfu >= 0.1 else 1}f}%",
        }
        rendered = [render(self.metrics[key]) for key, render in formats.items() if self.metrics.get(key) is not None]
        return rendered + ([] if self.eta_s is None else [f"eta {render_duration(self.eta_s)}"])


def render_duration(seconds: float) -> str:
    """`45s`, `12m30s`, `3h05m`."""
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest_s:02d}s" if minutes else f"{rest_s}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def render_validation(record: Mapping[str, Any]) -> str:
    """`val bpb 1.2345 +- 0.0051`; several metrics with commas between them."""
    shown = []
    for key, value in record.items():
        if key.startswith("val/") and not key.endswith("_stderr"):
            error = record.get(f"{key}_stderr")
            shown.append(f"{key.removeprefix('val/')} {value:.4f}" + ("" if error is None else f" +- {error:.4f}"))
    return f"val {', '.join(shown)}"


def _printable(text: str) -> str:
    """On one line, and harmless: an untrained model also writes control sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_closed(stream: TextIO) -> bool:
    if stream.closed:
        return True
    try:
        stream.flush()
    except OSError:
        return True
    return False


class _View(Protocol):
    stream: TextIO

    def show(self, pace: Pace) -> None:
        """Progress was made."""

    def say(self, line: str) -> None:
        """Something that must be seen."""

    def close(self, pace: Pace) -> None:
        """The end."""


class _Lines:
    """For logs: a line now and then."""

    def __init__(self, stream: TextIO, line_every_s: float, name: str):
        self.stream = stream
        self._name = name
        self._line_every_s = line_every_s
        self._shown_at_s = -float("inf")
        self._last_line = ""

    def show(self, pace: Pace) -> None:
        if pace.metrics and time.monotonic() - self._shown_at_s >= self._line_every_s:
            self._shown_at_s = time.monotonic()
            self._say_progress(pace)

    def say(self, line: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(line.encode(encoding, errors="replace").decode(encoding) + "\n")
        self.stream.flush()

    def close(self, pace: Pace) -> None:
        if pace.metrics:
            self._say_progress(pace)

    def _say_progress(self, pace: Pace) -> None:
        line = "  ".join([*filter(None, [self._name]), pace.place(pace.step), *pace.render_metrics()])
        if line != self._last_line:
            self.say(line)
        self._last_line = line


class _Bar:
    """For terminals: one bar that moves, everything else above it."""

    def __init__(self, stream: TextIO, num_steps: int, name: str):
        from tqdm import tqdm

        self.stream = stream
        self._bar = tqdm(
            desc=f"{name} " if name else None,
            total=num_steps,
            file=stream,
            leave=not name,
            dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def show(self, pace: Pace) -> None:
        self._bar.n = pace.step
        self._bar.set_postfix_str(", ".join(pace.render_metrics()))

    def say(self, line: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        self._bar.write(line.encode(encoding, errors="replace").decode(encoding), file=self.stream)

    def close(self, pace: Pace) -> None:
        self.show(pace)
        self._bar.close()
