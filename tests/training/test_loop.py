"""The loop's gradient does not depend on how a step is split; its callbacks come when they are due."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayllm.config.schema import OptimConfig
from rayllm.data.loader import DataPosition, StepBatch, TokenBatch
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.schedule import PretrainSchedule
from rayllm.runtime import Runtime, build_runtime
from rayllm.training.loop import Callbacks, Intervals, fit, forward_backward

NUM_ROWS, NUM_TOKENS, VOCAB = 8, 12, 60


def build_model() -> GPT:
    model = GPT(
        GPTConfig(sequence_len=16, vocab_size=VOCAB, num_layers=2, num_heads=2, num_kv_heads=1, d_model=24)
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def build_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very unequal numbers of targets, as in SFT."""
    generator = torch.Generator().manual_seed(1)
    inputs_BT = torch.randint(VOCAB, (NUM_ROWS, NUM_TOKENS), generator=generator)
    targets_BT = inputs_BT.roll(-1, 1)
    for row in range(NUM_ROWS):
        targets_BT[row, : row + 3] = -1
    return inputs_BT, targets_BT


def split_batch(rows: list[list[int]]) -> StepBatch:
    inputs_BT, targets_BT = build_rows()
    return StepBatch(tuple(TokenBatch(inputs_BT[r], targets_BT[r]) for r in rows), DataPosition())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    return Runtime(rank, world_size, torch.device("cpu"), torch.float64)


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, torch.Tensor]]:
    model = build_model()
    inputs_BT, targets_BT = build_rows()
    loss = model(inputs_BT, targets_BT)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize(
    "rows",
    [[[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2], [3, 4, 5], [6, 7]], [[7, 2], [0], [6, 5, 1, 3], [4]]],
    ids=["whole", "uneven", "shuffled"],
)
def test_any_split_into_micro_batches_gives_one_gradient(rows, expected) -> None:
    model = build_model()
    loss, num_loss_tokens, _ = forward_backward(model, split_batch(rows), runtime())
    assert num_loss_tokens == int((build_rows()[1] != -1).sum())
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-9, atol=1e-13)


def _worker(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    replica = torch.nn.parallel.DistributedDataParallel(build_model())
    mine = list(range(rank, NUM_ROWS, world_size))
    loss, num_loss_tokens, num_stopping = forward_backward(
        replica, split_batch([mine[:1], mine[1:]]), runtime(rank, world_size), wants_stop=rank == 1
    )
    assert num_stopping == 1, "on every worker"
    total = runtime(rank, world_size).sum_over_workers(loss)
    torch.save((float(total), num_loss_tokens, gradients(replica)), Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_one_gradient(world_size, expected, tmp_path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(_worker, args=(world_size, str(tmp_path)), nprocs=world_size)
    for rank in range(world_size):
        loss, num_loss_tokens, grads = torch.load(tmp_path / f"rank{rank}.pt")
        assert num_loss_tokens == int((build_rows()[1] != -1).sum())
        assert loss == pytest.approx(expected[0], rel=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[1][name], rtol=1e-9, atol=1e-13)


def test_callbacks_come_when_due_and_after_the_last_step() -> None:
    model = build_model()
    calls: list[tuple[str, int]] = []

    def endless():
        while True:
            yield split_batch([[0, 1]])

    fit(
        model,
        build_optimizer(model, OptimConfig()),
        PretrainSchedule(5, OptimConfig()),
        endless(),
        runtime(),
        Callbacks(
            report=lambda step, metrics: calls.append(("val" if "val/x" in metrics else "train", step)),
            evaluate=lambda: {"val/x": 1.0},
            sample=lambda step: calls.append(("sample", step)),
            save=lambda step, position: calls.append(("save", step)),
        ),
        Intervals(log_every=2, eval_every=3, sample_every=None, save_every=4),
        num_steps=5,
        matrix_weight_decay=0.0,
        flops_per_token=1.0,
    )
    assert calls == [
        ("val", 0), ("train", 2), ("val", 3), ("train", 4), ("save", 4),
        ("train", 5), ("val", 5), ("sample", 5), ("save", 5),
    ]  # fmt: skip


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved() -> None:
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    saved: list[int] = []
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        fit(
            model,
            build_optimizer(model, OptimConfig()),
            PretrainSchedule(3, OptimConfig()),
            iter([split_batch([[0]])] * 3),
            runtime(),
            Callbacks(lambda *_: None, dict, lambda _: None, lambda step, _: saved.append(step)),
            Intervals(1, None, None, 1),
            num_steps=3,
            matrix_weight_decay=0.0,
            flops_per_token=1.0,
        )
    assert saved == []


def test_a_device_or_dtype_that_is_not_here_is_named() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda is not to be had by 2 workers here"):
            build_runtime("cuda", world_size=2)
    assert build_runtime("cpu").dtype == torch.float32
    assert build_runtime("cpu", "bfloat16").dtype == torch.bfloat16
