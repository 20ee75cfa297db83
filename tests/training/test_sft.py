"""Fine-tuning as one worker, in this process: the loss, its splits, resume, warm start, validation."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayllm.config.chat_schema import SFTConfig, TaskConfig
from rayllm.config.schema import OptimConfig
from rayllm.data.conversation_rows import ConversationRows
from rayllm.data.conversations import Mixture, render_mixture
from rayllm.data.loader import DataPosition, StepBatch, TokenBatch
from rayllm.evals.rows import evaluate_loss
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.optim.schedule import FinetuneSchedule
from rayllm.runs.checkpoint import open_checkpoint, save_checkpoint
from rayllm.runs.load import load
from rayllm.runs.places import open_store
from rayllm.runs.tracking import read_metrics
from rayllm.runtime import Runtime
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.loop import Callbacks, Intervals, fit, forward_backward
from rayllm.training.sft import check_start, mixture_path, run_worker
from rayllm.types import Conversation, Message

TOKENIZER = Tokenizer.byte_level()
SHAPE = GPTConfig(
    sequence_len=48, vocab_size=TOKENIZER.vocab_size, num_layers=2, num_heads=2, num_kv_heads=1, d_model=32
)
ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Far faster for so small a model on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Sums:
    """`3+4=` is answered by `7`, with the wordiness of its number."""

    def __init__(self, num_examples: int, first: int = 0) -> None:
        self.name, self._num_examples, self._first = "sums", num_examples, first

    def __len__(self) -> int:
        return self._num_examples

    def conversation(self, example_idx: int) -> Conversation:
        i = self._first + example_idx
        answer = f"{i % 10 + i // 10}" + "!" * (i % 7)
        return Conversation((Message("user", f"{i % 10}+{i // 10}="), Message("assistant", answer)))

    def evaluate(self, example_idx: int, answer: str) -> float:
        raise ValueError("not asked for here")


def build_model(dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(SHAPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model.to(dtype)


def save_base(root: Path, *, has_optimizer: bool = True) -> Path:
    """A base checkpoint whose optimizer has moments, unlike a fresh one's."""
    model = build_model()
    optimizer = build_optimizer(model, OptimConfig())
    for name, buffer in optimizer.named_state().items():
        buffer.fill_(7 if name.endswith("num_steps") else 0.01)
    return save_checkpoint(
        root,
        7,
        model_state=model.state_dict(),
        optimizer_state=optimizer.named_state() if has_optimizer else None,
        state={"stage": "base", "model": SHAPE.to_dict(), "tokenizer_fingerprint": TOKENIZER.fingerprint},
        tokenizer=TOKENIZER,
        keep=1,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "checkpoints")


Start = Callable[..., tuple[SFTConfig, Path]]


@pytest.fixture
def start(base: Path, tmp_path: Path) -> Start:
    """A recipe and a run directory with its conversations, rendered as the driver does it."""

    def build(name: str, **changes: Any) -> tuple[SFTConfig, Path]:
        settings: dict[str, Any] = {
            "checkpoint": str(base),
            "tasks": (TaskConfig(),),
            "tokens_per_step": 48 * 8,
            "rows_per_micro_batch": 3,
            "eval_every": 4,
            "save_every": 2,
            "keep_checkpoints": 100,
            "lr_fraction": 0.2,
        }
        config = SFTConfig(out=str(tmp_path / name), **{**settings, **changes})
        path = Path(config.out)
        tokens = {"max_tokens": (config.sequence_len or 48) + 1, "seed": config.seed, "belongs_to": {}}
        (path / "conversations").mkdir(parents=True)
        (path / "run.json").write_text("{}")
        render_mixture(mixture_path(path, "train"), [(Sums(90), 2)], TOKENIZER, **tokens)
        render_mixture(mixture_path(path, "val"), [(Sums(10, 90), 1)], TOKENIZER, **tokens)
        return config, path

    return build


def weights(run_path: Path) -> dict[str, bytes]:
    state = load_file(open_checkpoint(run_path).path / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def losses(run_path: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read_metrics(run_path / "metrics.jsonl") if "train/loss" in r}


# A run


def test_a_run_learns_and_leaves_a_chat_checkpoint(start: Start, base: Path) -> None:
    config, path = start("run")
    outcome = run_worker(config, path, ALONE)
    num_steps = math.ceil(len(ConversationRows(Mixture.load(mixture_path(path, "train")), 48).rows) / 8)
    assert sorted(losses(path)) == list(range(1, num_steps + 1))
    records = read_metrics(path / "metrics.jsonl")
    validation = {r["step"]: r["val/loss"] for r in records if "val/loss" in r}
    assert list(validation) == [*range(0, num_steps, 4), num_steps]
    assert outcome.step == num_steps
    assert validation[num_steps] == outcome.metrics["val/loss"] < validation[0] - 1
    assert 0 < outcome.metrics["val/loss_stderr"] < 0.5
    assert sum(r.get("name") == "sample" for r in records) == 3
    checkpoint = open_checkpoint(path)
    assert checkpoint.step == num_steps
    assert checkpoint.state["stage"] == "sft" and checkpoint.state["metrics"] == outcome.metrics
    model, tokenizer = load(path)
    assert model.config == SHAPE and tokenizer.fingerprint == TOKENIZER.fingerprint


def test_a_run_that_is_cut_off_ends_with_the_same_bits(start: Start, tmp_path: Path) -> None:
    config, path = start("whole")
    run_worker(config, path, ALONE)
    for step in (2, 6):
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(path, cut)
        for checkpoint in (cut / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step_")) > step:
                shutil.rmtree(checkpoint)
        run_worker(config, cut, ALONE)
        assert weights(cut) == weights(path)
        assert losses(cut) == losses(path)


def test_a_run_with_its_checkpoints_at_a_url_goes_on_from_there(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLLM_CACHE_DIR", str(tmp_path / "cache"))
    config, path = start("whole")
    run_worker(config, path, ALONE)
    config, path = start("elsewhere", checkpoints=f"memory://{tmp_path.name}/sft")
    run_worker(config, path, ALONE)
    for entry in (store := open_store(config.checkpoints)).find():
        if entry.step > 4:
            store.discard(entry.name)
    run_worker(config, path, ALONE)  # the directory has the metrics of all its steps, and no checkpoint
    assert not (path / "checkpoints").exists()
    assert weights(config.checkpoints) == weights(tmp_path / "whole") and losses(path) == losses(tmp_path / "whole")


def test_max_steps_ends_a_run_early_with_its_rates_at_their_end(start: Start) -> None:
    config, path = start("run", max_steps=3)
    run_worker(config, path, ALONE)
    rates = [r["train/lr_multiplier"] for r in read_metrics(path / "metrics.jsonl") if "train/loss" in r]
    assert rates == pytest.approx([0.2, 0.2, 0.1])


@pytest.mark.parametrize("isolate", [True, False])
def test_the_first_loss_is_that_of_the_answers_alone(start: Start, isolate: bool) -> None:
    """Against a loop over conversations: each answer's tokens after all that they see, alone or in the row."""
    config, path = start(f"run_{isolate}", max_steps=1, isolate=isolate)
    run_worker(config, path, ALONE)
    model, rows = build_model(), ConversationRows(Mixture.load(mixture_path(path, "train")), 48)
    total, count = 0.0, 0
    for row in rows.rows[:8]:
        before: list[int] = []
        for conversation_idx in row:
            ids, mask = rows.mixture.tokens(conversation_idx)
            for idx in range(len(ids)):
                if mask[idx]:
                    with torch.no_grad():
                        logits_V = model(torch.tensor([[*before, *ids[:idx].tolist()]]))[0, -1]
                    total -= float(logits_V.log_softmax(-1)[int(ids[idx])])
                    count += 1
            before += [] if isolate else ids.tolist()
    assert losses(path)[1] == pytest.approx(total / count, rel=1e-5)


# Warm start, lengths, input


def test_the_optimizer_is_warm_only_where_the_recipe_and_the_checkpoint_have_it_so(
    start: Start, tmp_path: Path
) -> None:
    cold_base = save_base(tmp_path / "cold base" / "checkpoints", has_optimizer=False)
    ends = {}
    for name, changes in {
        "warm": {},
        "cold": {"warm_start_optimizer": False},
        "no state": {"checkpoint": str(cold_base)},
    }.items():
        config, path = start(name, max_steps=2, **changes)
        run_worker(config, path, ALONE)
        ends[name] = weights(path)
    assert ends["cold"] == ends["no state"] != ends["warm"]
    counts = open_checkpoint(tmp_path / "warm").load_optimizer_state()
    assert counts is not None and int(counts["lm_head.weight/num_steps"]) == 9


def test_rows_may_be_longer_and_shorter_than_the_base_models(start: Start) -> None:
    for sequence_len in (24, 96):
        config, path = start(f"run-{sequence_len}", sequence_len=sequence_len, max_steps=1)
        run_worker(config, path, ALONE)
        assert open_checkpoint(path).state["model"]["sequence_len"] == 48, "the model stays what it is"


def test_bad_input_is_told_with_its_cure(start: Start, tmp_path: Path) -> None:
    config, path = start("run", sequence_len=481, tokens_per_step=481)
    with pytest.raises(ValueError, match=r"sequence_len=481 is more than the 480 positions .* --sequence_len=48, or"):
        check_start(config, path)
    config, path = start("other", tokens_per_step=100)
    with pytest.raises(ValueError, match=r"tokens_per_step=100 must be a multiple of sequence_len \* .*=96"):
        check_start(config, path)
    config, path = start("third", checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        check_start(config, path)


# Gradients


@pytest.fixture
def packed(start: Start) -> ConversationRows:
    return ConversationRows(Mixture.load(mixture_path(start("packed")[1], "train")), 48)


def gradient(batches: list[StepBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradient of one step that these ranks share, in float64, added up as DDP would."""
    num_targets = sum(int((m.targets_BT >= 0).sum()) for batch in batches for m in batch.micro_batches)
    model, total = build_model(torch.float64), 0.0

    class OfAll(Runtime):
        def sum_on_host(self, values: Any) -> list[float]:
            return [float(num_targets), 0.0]

    for batch in batches:
        loss, _, _ = forward_backward(model, batch, OfAll(0, 1, torch.device("cpu"), torch.float64))
        total += float(loss)
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("rows_per_micro_batch", "world_size"), [(8, 1), (3, 1), (1, 1), (8, 2), (3, 2), (2, 4)])
def test_any_split_gives_one_gradient(packed: ConversationRows, rows_per_micro_batch: int, world_size: int) -> None:
    def last_step(rows_per_micro_batch: int, rank: int, world_size: int) -> StepBatch:
        # The last step is the hard one: short, so that ranks get rows of padding alone.
        position = DataPosition(0, len(packed.rows) - 5)
        return next(
            packed.step_batches(
                rows_per_step=8,
                rows_per_micro_batch=rows_per_micro_batch,
                rank=rank,
                world_size=world_size,
                position=position,
                prefetch=0,
            )
        )

    expected_loss, expected = gradient([last_step(8, 0, 1)])
    loss, grads = gradient([last_step(rows_per_micro_batch, rank, world_size) for rank in range(world_size)])
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-14)


def test_a_step_without_a_target_changes_nothing_and_is_no_nan() -> None:
    model = build_model()
    before = {name: param.clone() for name, param in model.named_parameters()}
    nothing = TokenBatch(torch.zeros(2, 8, dtype=torch.int64), torch.full((2, 8), -1))
    told: list[dict[str, float]] = []
    fit(
        model,
        build_optimizer(model, OptimConfig()),
        FinetuneSchedule(1, OptimConfig(), 1.0),
        iter([StepBatch((nothing, nothing), DataPosition())]),
        ALONE,
        Callbacks(lambda _, metrics: told.append(metrics), dict, lambda _: None, lambda *_: None),
        Intervals(1, None, None, None),
        num_steps=1,
        matrix_weight_decay=0.1,
        flops_per_token=1.0,
    )
    (metrics,) = [metrics for metrics in told if "train/loss" in metrics]
    assert metrics["train/loss"] == metrics["train/grad_norm"] == 0.0
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


# Schedule and validation


def test_the_schedule_of_fine_tuning() -> None:
    optim = OptimConfig(warmup_steps=0, warmdown_ratio=0.5, final_lr_fraction=0)
    rates = [FinetuneSchedule(1000, optim, 0.8).at(step) for step in range(1000)]
    assert [r.lr_multiplier for r in rates[:501]] == [0.8] * 501
    assert rates[750].lr_multiplier == pytest.approx(0.4) and rates[999].lr_multiplier == pytest.approx(0.0016)
    assert rates[0].momentum == 0.85 and rates[150].momentum == pytest.approx(0.9)
    assert [r.momentum for r in rates[300:]] == pytest.approx([0.95] * 700)
    assert {r.weight_decay_share for r in rates} == {1.0}
    slow = FinetuneSchedule(100, OptimConfig(warmup_steps=10, warmdown_ratio=0.5, final_lr_fraction=0.2), 1.0)
    assert slow.at(0).lr_multiplier == pytest.approx(0.1) and slow.at(100).lr_multiplier == pytest.approx(0.2)


def test_validation_loss_is_the_mean_over_tokens_with_an_error_over_rows(packed: ConversationRows) -> None:
    model = build_model()
    loss = evaluate_loss(model, packed.batches(rows_per_batch=3), ALONE)
    sums, counts = [], []
    with torch.no_grad():
        for batch in packed.batches(rows_per_batch=1):
            sums.append(float(model(batch.inputs_BT, batch.targets_BT, reduction="sum")))
            counts.append(int((batch.targets_BT >= 0).sum()))
    mean = sum(sums) / sum(counts)
    assert loss.value == pytest.approx(mean, rel=1e-6)
    assert (loss.num_rows, loss.denominator) == (len(sums), sum(counts))
    variance = sum((x - mean * y) ** 2 for x, y in zip(sums, counts, strict=True)) * len(sums) / (len(sums) - 1)
    assert loss.stderr == pytest.approx(math.sqrt(variance) / sum(counts), rel=1e-4)
