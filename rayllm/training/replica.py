"""The model as one worker trains it: its attention kernel, compiled or not, in step with the other replicas."""

from __future__ import annotations

import shutil
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from rayllm.config.schema import WorkersConfig
from rayllm.model.backends import choose_attention
from rayllm.model.gpt import GPT
from rayllm.runtime import Runtime


def prepare_model(model: GPT, workers: WorkersConfig, runtime: Runtime) -> None:
    """Set up a model, on its device already, for training as the recipe says; tells the choices on stderr.

    Raises ValueError where the recipe asks for what this machine cannot do, with the cure.
    """
    name, model.attend = choose_attention(workers.attention, runtime.device, runtime.dtype)
    model.recompute_blocks = workers.recompute_blocks
    is_compiled = _is_compiled(workers.compile, runtime.device)
    if is_compiled:
        model.compile_rows()
    if runtime.rank == 0:
        dtype = str(runtime.dtype).removeprefix("torch.")
        print(
            f"training on {runtime.world_size} x {runtime.device.type}: {dtype}, attention {name}"
            f"{', compiled' if is_compiled else ''}{', blocks recomputed' if workers.recompute_blocks else ''}",
            file=sys.stderr,
        )


def replicate(model: GPT, runtime: Runtime) -> torch.nn.Module:
    """The replica to run forward and backward: gradients of several workers are averaged while backward still runs."""
    if runtime.world_size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _is_compiled(wanted: str, device: torch.device) -> bool:
    if wanted != "on":
        return wanted == "auto" and device.type == "cuda"
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("workers.compile=on needs a C++ compiler on a CPU: install g++, or write compile=off")
    return True
