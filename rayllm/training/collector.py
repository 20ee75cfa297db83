"""Python's garbage collector, kept out of training steps: one of its passes stops a worker for up to a second, and
with it all that wait for its gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collector_kept_out() -> Iterator[Callable[[], object]]:
    """Within, garbage is collected only where the function that this hands out is called: in pauses.

    What is alive at the start is not looked through again. The collector is as before when the block ends.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
