"""What stops a run, what is told, what is kept for replay, and that the collector stays out."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayllm.config.schema import OptimConfig
from rayllm.data.loader import DataPosition, StepBatch, TokenBatch
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.schedule import PretrainSchedule
from rayllm.runs.checkpoint import save_checkpoint
from rayllm.runtime import Runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training import replay
from rayllm.training.collector import collector_kept_out
from rayllm.training.health import (
    EXPLOSION_STEPS,
    MAX_KEPT_BATCHES,
    MIN_STEPS,
    DivergedError,
    LossWatch,
    StepWatch,
    Verdict,
)
from rayllm.training.loop import Callbacks, Intervals, fit, forward_backward, grad_norm

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32)
VOCAB = 60
UNIFORM = math.log(32768)


def watch(losses: list[float], grad_norms: list[float] | None = None) -> list[Verdict]:
    """The verdicts up to the first fault."""
    watch, verdicts = LossWatch(UNIFORM), []
    for i, loss in enumerate(losses):
        verdicts.append(watch.judge(loss, grad_norms[i] if grad_norms else 1.0))
        if verdicts[-1].fault:
            break
    return verdicts


def falling(num_steps: int, noise: float = 0.03, seed: int = 0) -> list[float]:
    """A loss as pretraining has it: from ln V, fast at first, then slowly, with noise."""
    draw = random.Random(seed)
    return [2.8 + (UNIFORM - 2.8) / (1 + i / 25) + draw.gauss(0, noise) for i in range(num_steps)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Far faster for so small a model on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# The rule


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_goes_well_is_left_alone(noise: float, seed: int) -> None:
    verdicts = watch(falling(3000, noise, seed), [2 / (1 + i / 100) + 0.2 for i in range(3000)])
    assert len(verdicts) == 3000
    assert all(v.is_steady and not v.spikes for v in verdicts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_fault_at_once(bad: float) -> None:
    assert watch([3.0, bad])[-1].fault == f"loss is {bad}"
    verdict = watch([3.0, 3.0], [1.0, bad])[-1]
    assert verdict.fault == f"gradient norm is {bad}" and verdict.num_faulty_steps == 1 and not verdict.is_steady


def test_a_loss_that_stays_above_guessing_is_a_fault_that_began_when_it_rose() -> None:
    healthy = falling(200)
    verdicts = watch(healthy + [UNIFORM + 1.5 + 0.1 * i for i in range(100)])
    assert len(verdicts) == len(healthy) + EXPLOSION_STEPS
    assert "loss is" in (verdicts[-1].fault or "") and verdicts[-1].num_faulty_steps == EXPLOSION_STEPS
    assert not any(v.is_steady for v in verdicts[len(healthy) :]), "nothing of it is worth saving"


def test_a_loss_that_explodes_from_the_first_step_is_a_fault() -> None:
    assert watch([UNIFORM, UNIFORM + 0.5] + [UNIFORM + 3] * 20)[-1].fault


def test_a_spike_is_told_and_does_not_stop_the_run() -> None:
    healthy = falling(300)
    high = [UNIFORM + 3] * (EXPLOSION_STEPS - 1)  # as bad as an explosion, and over a step sooner
    verdicts = watch(healthy + high + falling(300)[250:])
    assert not any(v.fault for v in verdicts)
    assert [i for i, v in enumerate(verdicts) if v.spikes] == list(range(300, 300 + len(high)))
    assert verdicts[300].spikes[0].startswith("loss 13.4") and "usually 3." in verdicts[300].spikes[0]
    assert verdicts[-1].is_steady


def test_a_spike_of_the_gradient_is_told_and_leaves_the_weights_worth_saving() -> None:
    verdicts = watch([3.0] * 300, [0.5] * 200 + [5.0] + [0.5] * 99)
    assert [i for i, v in enumerate(verdicts) if v.spikes] == [200]
    assert verdicts[200].spikes[0].startswith("gradient norm 5") and verdicts[200].is_steady


def test_a_loss_may_start_high_and_fall() -> None:
    """Fine-tuning on what the model never saw starts above ln V."""
    assert not any(v.fault for v in watch([UNIFORM + 6 - 0.02 * i for i in range(600)]))
    draw = random.Random(0)
    assert not any(v.fault for v in watch([UNIFORM + 4 + draw.gauss(0, 0.2) for _ in range(600)]))


def test_a_loss_that_settles_at_another_level_is_usual_again_after_a_while() -> None:
    verdicts = watch([2.0 + 0.01 * (i % 3) for i in range(300)] + [3.0 + 0.01 * (i % 3) for i in range(200)])
    assert not any(v.fault for v in verdicts)
    assert verdicts[300].spikes and not any(v.spikes for v in verdicts[-100:])


def test_nothing_is_unusual_before_there_is_a_usual() -> None:
    assert not any(v.spikes for v in watch([3.0] * (MIN_STEPS - 1) + [5.0]))
    assert watch([3.0] * MIN_STEPS + [5.0])[-1].spikes


# The steps between two looks


def build_model() -> GPT:
    model = GPT(GPTConfig(sequence_len=16, vocab_size=VOCAB, num_layers=2, num_heads=2, num_kv_heads=1, d_model=24))
    model.init_weights(0)
    return model


def batches(seed: int = 0) -> Iterator[StepBatch]:
    """Two micro-batches of unequal size a step, all different."""
    generator = torch.Generator().manual_seed(seed)
    for row_idx in range(10**6):
        tokens = [torch.randint(VOCAB, (num_rows, 17), generator=generator) for num_rows in (2, 1)]
        yield StepBatch(tuple(TokenBatch(t[:, :-1], t[:, 1:]) for t in tokens), DataPosition(0, row_idx))


class Poison:
    """Model weights that are made not finite in the course of a given step, by a hook of the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: GPT, step: int, value: float) -> None:
        self.calls, self.step, self.model, self.value = 0, step, model, value
        optimizer.register_step_post_hook(self)

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.step:
            with torch.no_grad():
                self.model.lm_head.weight[0, 0] = self.value


def train(
    intervals: Intervals,
    *,
    poison_step: int,
    poison: float = math.nan,
    num_steps: int = 12,
    saved: list[int] | None = None,
) -> None:
    model = build_model()
    optimizer = build_optimizer(model, OptimConfig(warmup_steps=0))
    Poison(optimizer, model, poison_step, poison)
    callbacks = Callbacks(
        lambda *_: None, dict, lambda _: None, lambda step, _: saved.append(step) if saved is not None else None
    )
    schedule = PretrainSchedule(num_steps, OptimConfig(warmup_steps=0))
    fit(
        model, optimizer, schedule, batches(), ALONE, callbacks, intervals,
        num_steps=num_steps, matrix_weight_decay=0.0, flops_per_token=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("log_every", [1, 4, 12])
def test_the_step_that_went_wrong_is_found_also_between_records(log_every: int) -> None:
    with pytest.raises(DivergedError, match="loss is nan at step 6") as caught:
        train(Intervals(log_every, None, None, None), poison_step=5)
    expected = [next(it) for it in [batches()] for _ in range(6)][-1]
    assert (caught.value.step, caught.value.batch_step) == (6, 6)
    assert caught.value.batch.position == expected.position
    for ours, theirs in zip(caught.value.batch.micro_batches, expected.micro_batches, strict=True):
        assert torch.equal(ours.inputs_BT, theirs.inputs_BT) and torch.equal(ours.targets_BT, theirs.targets_BT)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_weights_that_a_sane_step_broke_are_not_saved(poison: float) -> None:
    saved: list[int] = []
    with pytest.raises(DivergedError, match="weights or moments that are not finite at step 4"):
        train(Intervals(1, None, None, 2), poison_step=4, poison=poison, saved=saved)
    assert saved == [2]


def test_a_gradient_that_is_no_number_stops_a_run_whose_loss_is_one() -> None:
    """The softcap makes an infinite logit a finite loss."""
    with pytest.raises(DivergedError, match="gradient norm is nan at step 3"):
        train(Intervals(1, None, None, None), poison_step=2, poison=math.inf)


def test_a_batch_that_is_too_long_ago_is_replaced_by_the_oldest_kept() -> None:
    with pytest.raises(DivergedError, match="loss is nan at step 2") as caught:
        train(Intervals(100, None, None, None), poison_step=1, num_steps=100)
    assert caught.value.batch_step == 100 - MAX_KEPT_BATCHES + 1


def test_a_save_waits_until_the_loss_is_usual_again() -> None:
    """The rows of a few steps are replaced by what the model has learned is never there."""
    model = build_model()
    optimizer = build_optimizer(model, OptimConfig(warmup_steps=0))

    def steps() -> Iterator[StepBatch]:
        for step in range(1, 200):
            tokens = (torch.arange(17) % 2).repeat(4, 1) if step not in (80, 81, 82) else torch.full((4, 17), 7)
            yield StepBatch((TokenBatch(tokens[:, :-1], tokens[:, 1:]),), DataPosition(0, step))

    saved: list[int] = []
    spikes: dict[int, float] = {}
    fit(
        model, optimizer, PretrainSchedule(90, OptimConfig(warmup_steps=0)), steps(), ALONE,
        Callbacks(
            lambda step, metrics: spikes.update({step: metrics["train/spike"]} if "train/spike" in metrics else {}),
            dict, lambda _: None, lambda step, _: saved.append(step),
        ),
        Intervals(1, None, None, 20), num_steps=90, matrix_weight_decay=0.0, flops_per_token=1.0,
    )  # fmt: skip
    assert spikes[80] == 1.0 and spikes[70] == 0.0
    assert saved[:3] == [20, 40, 60] and saved[-1] == 90
    assert 80 not in saved and any(80 < step < 90 for step in saved), saved


def test_no_worker_waits_for_the_device_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number off the device is what makes a step wait; here reading one fails until the look."""
    model = build_model()
    steps = StepWatch(LossWatch(math.log(VOCAB)), ALONE)
    batch = next(batches())
    loss, _, _ = forward_backward(model, batch, ALONE)
    norm = grad_norm(model)
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
            patched.setattr(torch.Tensor, name, lambda *_: pytest.fail("read from the device"))
        steps.keep(1, batch, loss, norm)
        steps.keep(2, batch, loss, norm)
    look = steps.look()
    assert look.loss == pytest.approx(float(loss)) and look.grad_norm == pytest.approx(float(norm))


# Replay


def saved_run(tmp_path: Path, model: GPT) -> Path:
    tokenizer = Tokenizer.byte_level()
    save_checkpoint(
        tmp_path / "checkpoints", 4, model_state=model.state_dict(), optimizer_state=None,
        state={"stage": "base", "model": model.config.to_dict(), "tokenizer_fingerprint": tokenizer.fingerprint},
        tokenizer=tokenizer, keep=1,
    )  # fmt: skip
    return tmp_path


def test_what_the_workers_saved_is_replayed_as_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model()
    run = saved_run(tmp_path, model)
    stream = batches()
    parts = [next(stream), next(stream)]
    for rank, part in enumerate(parts):
        path = replay.save_batch(run, DivergedError("loss is nan", 7, 7, part), rank, 2)
    assert path == run / "diverged" / "step_000007.rank1.safetensors"
    saved = replay.load_batch(run)
    whole = StepBatch(parts[0].micro_batches + parts[1].micro_batches, DataPosition())
    assert (saved.step, saved.reason) == (7, "loss is nan at step 7")
    assert [m.inputs_BT.tolist() for m in saved.batch.micro_batches] == [
        m.inputs_BT.tolist() for m in whole.micro_batches
    ]

    seen = replay.replay(run, saved, ALONE)
    loss, _, _ = forward_backward(model, whole, ALONE)
    assert seen.checkpoint_step == 4 and len(seen.micro_batch_losses) == 4
    assert seen.loss == pytest.approx(float(loss), rel=1e-6)
    assert math.hypot(*seen.grad_norms.values()) == pytest.approx(float(grad_norm(model)), rel=1e-5)

    replay.main([str(run), "--device=cpu", "--dtype=float32"])
    printed = capsys.readouterr().out
    assert "step 7 (loss is nan at step 7), with the weights of step 4" in printed
    assert "gradient norm of adamw  lm_head.weight" in printed


def test_a_replay_needs_every_workers_part(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a run that diverges saves one"):
        replay.load_batch(tmp_path)
    replay.save_batch(tmp_path, DivergedError("loss is nan", 7, 7, next(batches())), 1, 2)
    with pytest.raises(ValueError, match=r"of 2 workers, and there are the parts of \[1\] only"):
        replay.load_batch(tmp_path)
    with pytest.raises(FileNotFoundError, match="no batch of step 8 .* it has steps 7"):
        replay.load_batch(tmp_path, 8)


# The collector


def test_the_collector_stays_out_and_is_as_before_afterwards() -> None:
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt), collector_kept_out() as collect:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
        assert collect() >= 1
        raise KeyboardInterrupt
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_loop_keeps_it_out_of_its_steps() -> None:
    seen: list[bool] = []
    model = build_model()
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.register_step_pre_hook(lambda *_: seen.append(gc.isenabled()))
    fit(
        model, optimizer, PretrainSchedule(3, OptimConfig()), batches(), ALONE,
        Callbacks(lambda *_: None, dict, lambda _: None, lambda *_: None), Intervals(1, None, None, None),
        num_steps=3, matrix_weight_decay=0.0, flops_per_token=1.0,
    )  # fmt: skip
    assert seen == [False] * 3 and gc.isenabled()


# A wish to stop


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_wish_to_stop_ends_the_run_after_the_step_that_begins_then_and_saves_it(log_every: int) -> None:
    asked, calls = iter([False, False, True]), []
    model = build_model()
    callbacks = Callbacks(
        lambda step, metrics: calls.append(("report", step)) if metrics else None,
        lambda: calls.append("evaluate") or {},
        lambda step: calls.append(("sample", step)),
        lambda step, position: calls.append(("save", step, position.row_idx)),
    )
    done = fit(
        model, build_optimizer(model, OptimConfig()), PretrainSchedule(9, OptimConfig()), batches(), ALONE,
        replace(callbacks, wants_stop=lambda: next(asked)), Intervals(log_every, 3, 3, None),
        num_steps=9, matrix_weight_decay=0.0, flops_per_token=1.0,
    )  # fmt: skip
    assert done == 3
    assert calls[-2:] == [("report", 3), ("save", 3, 2)], "evaluation and samples, due at this step, wait"
    assert calls.count("evaluate") == 1
