"""A step that ended a run, kept and seen again: `python -m rayllm.training.replay RUN [--step=N]`.

    diverged/step_000123.rank0.safetensors    the micro-batches of one worker, and as metadata the step, the rank and
                                              the number of workers

The replay runs them through the newest checkpoint, which is of an earlier step, and prints the loss of each micro-batch
and the norm of the gradient of each group of parameters. To see the very weights of that step, run the stage's command
again: it goes on from that checkpoint with the same batches (bit for bit in float32 on CPUs).
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rayllm.config.schema import OptimConfig
from rayllm.data.loader import DataPosition, StepBatch, TokenBatch
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.runs.atomic import write_atomic
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.load import load_weights, model_config
from rayllm.runtime import Runtime, build_runtime
from rayllm.training.health import DivergedError
from rayllm.training.loop import forward_backward

_FILE = re.compile(r"step_(\d+)\.rank(\d+)\.safetensors")


@dataclass(frozen=True)
class SavedBatch:
    """A step's micro-batches, of all workers one after the other."""

    step: int
    reason: str
    batch: StepBatch


def save_batch(run_path: Path, error: DivergedError, rank: int, world_size: int) -> Path:
    """Write this worker's batch of a diverged step into the run directory; returns the file. Raises OSError."""
    folder = run_path / "diverged"
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{i:04d}.{field.name}": tensor.clone()  # inputs and targets may be views of one tensor
        for i, micro_batch in enumerate(error.batch.micro_batches)
        for field in fields(micro_batch)
        if isinstance(tensor := getattr(micro_batch, field.name), Tensor)
    }
    about = {"step": error.batch_step, "rank": rank, "world_size": world_size, "reason": f"{error}"}
    path = folder / f"step_{error.batch_step:06d}.rank{rank}.safetensors"
    write_atomic(path, save(tensors, metadata={key: str(value) for key, value in about.items()}))
    return path


def load_batch(run_path: Path, step: int | None = None) -> SavedBatch:
    """What all workers saved of a step, by default of the last that was.

    Raises FileNotFoundError where there is none, ValueError where a worker's part is missing.
    """
    found = [(int(m[1]), int(m[2]), p) for p in (run_path / "diverged").glob("*") if (m := _FILE.fullmatch(p.name))]
    steps = {at for at, _, _ in found}
    if not steps or (step is not None and step not in steps):
        has = f"it has steps {', '.join(map(str, sorted(steps)))}" if steps else "a run that diverges saves one"
        raise FileNotFoundError(
            f"no batch {'' if step is None else f'of step {step} '}in {run_path / 'diverged'}: {has}"
        )
    chosen = max(steps) if step is None else step
    parts = [(rank, *_read(path)) for at, rank, path in sorted(found) if at == chosen]
    about = parts[0][1]
    if (have := [rank for rank, _, _ in parts]) != list(range(int(about["world_size"]))):
        raise ValueError(f"step {chosen} was of {about['world_size']} workers, and there are the parts of {have} only")
    micro_batches = tuple(micro_batch for _, _, mine in parts for micro_batch in mine)
    return SavedBatch(chosen, about["reason"], StepBatch(micro_batches, DataPosition()))


def _read(path: Path) -> tuple[dict[str, str], list[TokenBatch]]:
    with safe_open(path, framework="pt") as file:
        columns: dict[str, dict[str, Any]] = {}
        for key in sorted(file.keys()):
            i, _, name = key.partition(".")
            columns.setdefault(i, {})[name] = file.get_tensor(key)
        return file.metadata(), [TokenBatch(**columns[i]) for i in sorted(columns)]


@dataclass(frozen=True)
class Replay:
    """Of one step under the weights of `checkpoint_step`: mean losses, and gradient norms by group."""

    checkpoint_step: int
    loss: float
    micro_batch_losses: list[float]
    grad_norms: dict[str, float]


def replay(run_path: Path, saved: SavedBatch, runtime: Runtime) -> Replay:
    """Run a saved step forward and backward through the run's newest checkpoint."""
    checkpoint = open_checkpoint(run_path)
    model = GPT(model_config(checkpoint), compute_dtype=runtime.dtype)
    load_weights(model, checkpoint)
    model.to(runtime.device)
    with torch.no_grad():
        losses = [
            float(model(b.inputs_BT.to(runtime.device), b.targets_BT.to(runtime.device)))
            for b in saved.batch.micro_batches
        ]
    loss, _, _ = forward_backward(model, saved.batch, runtime)
    norms = {
        _label(group): math.hypot(*(float(p.grad.norm()) for p in group["params"] if p.grad is not None))
        for group in build_optimizer(model, OptimConfig()).param_groups
    }
    return Replay(checkpoint.step, float(loss), losses, norms)


def _label(group: dict[str, Any]) -> str:
    first, *others = group["names"]
    return f"{group['kind']}  {first}" + (f" and {len(others)} more" if others else "")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rayllm.training.replay", description="see a diverged step again")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--step", type=int, help="which step (default: the last one saved)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(arguments)
    saved = load_batch(options.run, options.step)
    seen = replay(options.run, saved, build_runtime(options.device, options.dtype))
    print(f"step {saved.step} ({saved.reason}), with the weights of step {seen.checkpoint_step}")
    print(f"loss {seen.loss:.6g}; of each micro-batch: {', '.join(f'{loss:.6g}' for loss in seen.micro_batch_losses)}")
    for label, norm in seen.grad_norms.items():
        print(f"{norm:>14.6g}  gradient norm of {label}")


if __name__ == "__main__":
    main()
