"""The optimizer among real processes: any number gives the numbers of one, and goes on from what any saved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from rayllm.config.schema import OptimConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.muon import muon_flops
from rayllm.optim.optimizer import MuonAdamW
from rayllm.optim.sharding import assign_by_cost

TIMEOUT_S = 200
HALF = 2
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCES = {"float32": 1e-6, "float64": 1e-12}
Tensors = dict[str, torch.Tensor]
Outcome = dict[str, Any]

FOUR = pytest.param(4, marks=pytest.mark.slow)


def build_model(dtype: torch.dtype) -> GPT:
    """Tables of 128 rows, which three workers cannot share evenly; shapes of one, two and five matrices."""
    model = GPT(GPTConfig(sequence_len=16, vocab_size=120, num_layers=3, num_heads=2, num_kv_heads=1, d_model=32))
    model.init_weights(0)
    model.to(dtype)
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.add_(draw(param, seed=i), alpha=0.2)
    return model


def draw(param: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(param.dtype)


def take_steps(model: GPT, optimizer: MuonAdamW, steps: range) -> None:
    """Steps on made-up gradients, the same on every worker, as DDP leaves them; rates change, as a schedule's do."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - 0.1 * step)
            if group["kind"] == "muon":
                group["momentum"] = 0.85 + 0.01 * step
        for i, param in enumerate(model.parameters()):
            param.grad = draw(param, seed=1000 * step + i)
        optimizer.step(track_update_rms=True)


def train(rank: int, world_size: int, dtype: torch.dtype, saved: Outcome | None = None) -> Outcome:
    """Take `HALF` steps from the start, or from what was saved after those."""
    model = build_model(dtype)
    optimizer = build_optimizer(model, OptimConfig(), rank=rank, world_size=world_size)
    if saved is not None:
        model.load_state_dict(saved["weights"])
        optimizer.load_named_state(saved["state"])
    take_steps(model, optimizer, range(HALF) if saved is None else range(HALF, 2 * HALF))
    return {
        "weights": model.state_dict(),
        "state": optimizer.gather_named_state(),
        "update_rms": optimizer.update_rms(),
        "state_bytes": optimizer.state_bytes,
    }


def train_with_ddp(rank: int, world_size: int) -> Outcome:
    """Three steps on real gradients: each worker has its share of 12 rows."""
    model = build_model(torch.float64)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    optimizer = build_optimizer(model, OptimConfig(), rank=rank, world_size=world_size)
    for step in range(3):
        tokens_BT = torch.randint(120, (12, 16), generator=torch.Generator().manual_seed(step))[rank::world_size]
        replica(tokens_BT, tokens_BT.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": model.state_dict()}


def stand_still(rank: int, world_size: int) -> bool:
    """Whether a step on zeros leaves weights and state as they were."""
    model = build_model(torch.float32)
    optimizer = build_optimizer(model, OptimConfig(), rank=rank, world_size=world_size)
    take_steps(model, optimizer, range(1))
    before = {**{k: v.clone() for k, v in model.state_dict().items()}, **optimizer.gather_named_state()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    after = {**model.state_dict(), **optimizer.gather_named_state()}
    return all(torch.equal(before[name], after[name]) for name in before)


def do_all(rank: int, world_size: int, saved: dict[str, Outcome] | None) -> dict[str, Any]:
    """All of the above, as starting processes takes the most time; `saved` goes on from another outcome of this."""
    torch.set_num_threads(1)
    outcomes: dict[str, Any] = {name: train(rank, world_size, dtype) for name, dtype in DTYPES.items()}
    for name, dtype in DTYPES.items():
        start = outcomes if saved is None and world_size == 1 else saved
        if start is not None:
            outcomes[f"resumed {name}"] = train(rank, world_size, dtype, start[name])
    return {**outcomes, "ddp": train_with_ddp(rank, world_size), "still": stand_still(rank, world_size)}


def _worker(rank: int, world_size: int, folder: str, saved: dict[str, Outcome] | None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(do_all(rank, world_size, saved), Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


class Runs:
    """The outcomes of each number of workers, by worker; each number runs once. All but 1 and 2 go on from 2's."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, {}

    def __getitem__(self, world_size: int) -> list[dict[str, Any]]:
        if world_size not in self._runs:
            self._runs[world_size] = self._run(world_size)
        return self._runs[world_size]

    def _run(self, world_size: int) -> list[dict[str, Any]]:
        if world_size == 1:
            num_threads = torch.get_num_threads()
            alone = do_all(0, 1, None)
            torch.set_num_threads(num_threads)
            return [alone]
        folder = self._folder / str(world_size)
        folder.mkdir()
        saved = None if world_size == 2 else self[2][0]
        context = mp.spawn(_worker, (world_size, str(folder), saved), nprocs=world_size, join=False)
        deadline = time.monotonic() + TIMEOUT_S
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for {world_size} workers"
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sharding"))


def assert_close(one: Tensors, other: Tensors, tolerance: float) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world_size", [2, 3, FOUR])
def test_any_number_of_workers_gives_the_numbers_of_one(world_size, runs) -> None:
    for name, tolerance in TOLERANCES.items():
        expected = runs[1][0][name]
        outcomes = [outcome[name] for outcome in runs[world_size]]
        for key in ("weights", "state", "update_rms"):
            assert_close(outcomes[0][key], expected[key], tolerance)
        assert all(outcome["state"] == {} for outcome in outcomes[1:]), "worker 0 alone is given the whole"
        for outcome in outcomes[1:]:
            for key in ("weights", "update_rms"):
                assert_close(outcome[key], outcomes[0][key], 0)


@pytest.mark.parametrize("world_size", [2, FOUR])
def test_after_ddp_s_backward_too(world_size, runs) -> None:
    outcomes = [outcome["ddp"]["weights"] for outcome in runs[world_size]]
    assert_close(outcomes[0], runs[1][0]["ddp"]["weights"], 1e-9)
    for outcome in outcomes[1:]:
        assert_close(outcome, outcomes[0], 0)


@pytest.mark.parametrize("world_size", [1, 3, FOUR])
def test_saved_by_two_goes_on_with_any_number(world_size, runs) -> None:
    for name, tolerance in TOLERANCES.items():
        expected = runs[1][0][f"resumed {name}"]
        if world_size == 1:
            outcome = train(0, 1, DTYPES[name], runs[2][0][name])
        else:
            outcome = runs[world_size][0][f"resumed {name}"]
        assert_close(outcome["weights"], expected["weights"], tolerance)
        assert_close(outcome["state"], expected["state"], tolerance)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_without_signal_changes_nothing(world_size, runs) -> None:
    assert all(outcome["still"] for outcome in runs[world_size])


@pytest.mark.parametrize("world_size", [2, 3, FOUR])
def test_each_worker_keeps_its_share_of_the_state(world_size, runs) -> None:
    """Besides it, little: padding of a stack that is one matrix short, and what is too small to share."""
    whole = runs[1][0]["float32"]["state_bytes"]
    for outcome in runs[world_size]:
        assert outcome["float32"]["state_bytes"] < whole / world_size + 0.15 * whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_work_is_balanced_over_shapes(world_size) -> None:
    shapes = [(256, 256)] * 16 + [(1024, 256)] * 4 + [(256, 1024)] * 4 + [(4, 12)] * 2
    costs = [muon_flops(torch.Size(shape), torch.float32) for shape in shapes]
    owners = assign_by_cost(costs, world_size)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(world_size)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / world_size + max(costs)
    if world_size <= 2:
        assert max(loads) <= 1.01 * sum(costs) / world_size
