"""RL through real actors: rewards go up, weights arrive with their version, and a resumed run is the same run."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from actors import rl
from actors.cluster import Placement, wait_for
from actors.learner import LearnerGroup
from actors.rollout import RolloutWorker, SampleRequest
from actors.stream import ProblemOrder
from actors.weights import ObjectStoreChannel, pack
from rayllm.config.chat_schema import RolloutConfig, TaskConfig
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import SamplingConfig
from rayllm.engine.request import Request
from rayllm.runs.checkpoint import open_checkpoint, save_checkpoint
from rayllm.runs.tracking import read_metrics
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.rollout_batch import collate_groups
from rayllm.types import Prompt

TOKENIZER = Tokenizer.byte_level()
Recipe = Callable[..., RLConfig]
Teach = Callable[..., dict[str, float]]


def weights(out: Path, step: int) -> dict[str, bytes]:
    state = load_file(out / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def metric(out: Path, key: str) -> list[float]:
    return [record[key] for record in read_metrics(out / "metrics.jsonl") if key in record]


@pytest.fixture(scope="module")
def taught(recipe: Recipe, ray_session: None, tmp_path_factory: pytest.TempPathFactory, teach: Teach) -> Path:
    out = tmp_path_factory.mktemp("runs") / "rl"
    teach(recipe(out))
    return out


def test_rewards_go_up(taught: Path) -> None:
    rewards, passed = metric(taught, "train/reward"), metric(taught, "val/pass@1")
    assert len(rewards) == 14 and len(passed) == 3
    assert rewards[0] < 0.6 and rewards[-1] > 0.8
    assert passed[-1] > passed[0] + 0.25
    assert all(loss != 0 for loss in metric(taught, "train/loss")[:2])
    for key in ("time/wait_for_rollouts_s", "time/learn_s", "time/publish_s", "val/pass@4_stderr", "val/greedy"):
        assert metric(taught, key), key


def test_a_resumed_run_is_the_same_run(taught: Path, recipe: Recipe, tmp_path: Path, teach: Teach) -> None:
    """Killed between any two steps is: there is nothing of it after the last checkpoint."""
    for killed_after in (1, 9):
        again = tmp_path / f"killed_{killed_after}"
        shutil.copytree(taught, again)
        for step in range(killed_after + 1, 15):
            shutil.rmtree(again / "checkpoints" / f"step_{step:06d}")
        teach(recipe(again))
        assert weights(again, 14) == weights(taught, 14)
        for key in ("train/reward", "train/loss", "val/pass@1"):
            assert metric(again, key) == metric(taught, key)


def test_two_learners_learn_what_one_does(taught: Path, recipe: Recipe, tmp_path: Path, teach: Teach) -> None:
    config = recipe(tmp_path / "two", tokens_per_micro_batch=40)
    teach(replace(config, learners=replace(config.learners, num_workers=2)))
    for key in ("train/loss", "train/grad_norm", "train/reward"):
        assert metric(tmp_path / "two", key)[0] == pytest.approx(metric(taught, key)[0], rel=1e-4), key
    assert metric(tmp_path / "two", "train/reward")[1] == metric(taught, "train/reward")[1]


def test_completions_carry_the_version_that_sampled_them(
    recipe: Recipe, start: Path, ray_session: None, ascii_pool: Any
) -> None:
    config, placement = recipe(Path("unused")), Placement(0, 0, 1)
    path = str(open_checkpoint(start).path)
    request = SampleRequest(config.task, (0, 1, 2), 8, SamplingConfig(max_tokens=6))
    pool = ascii_pool(path, config.rollouts, placement, ObjectStoreChannel())
    group = LearnerGroup(config, placement, path, resumes=False)
    try:
        before = pool.sample(request)
        group.step(collate_groups(before), 0)
        version = pool.publish(group.source, number=1).wait()
        after = pool.sample(request)
    finally:
        pool.close()
        group.close()
    for groups, number in ((before, 0), (after, 1)):
        for completion in (rollout.completion for g in groups for rollout in g.rollouts):
            assert completion.weights_versions == ((number, len(completion.token_ids)),)
    assert version.number == 1 and [g.prompt for g in before] == [g.prompt for g in after]
    assert [g.rollouts for g in before] != [g.rollouts for g in after]


def test_an_actor_that_dies_is_named_and_nothing_hangs(
    recipe: Recipe, start: Path, ray_session: None, ascii_pool: Any
) -> None:
    config, path = recipe(Path("unused")), str(open_checkpoint(start).path)
    pool = ascii_pool(path, config.rollouts, Placement(0, 0, 1), ObjectStoreChannel())
    request = SampleRequest(config.task, (0, 1), 2, SamplingConfig(max_tokens=3))
    try:
        pool.sample(request)
        ray.kill(pool.actors[1])
        with pytest.raises(ConnectionError, match=r"an actor died while sampling 2 prompts x 2 by 2 rollout actors"):
            pool.sample(request)
        with pytest.raises(TimeoutError, match=r"waited 0.001 s for sending weights"):
            wait_for([pool.actors[0].sample.remote(request)], 0.001, "sending weights")
    finally:
        pool.close()


def test_a_worker_samples_by_address_and_marks_what_failed(start: Path, ascii_worker: Any) -> None:
    worker = ascii_worker(str(open_checkpoint(start).path), RolloutConfig(num_slots=4, device="cpu"))
    request = SampleRequest(TaskConfig(num_examples=40), (3, 13, 7, 14), 2, SamplingConfig(max_tokens=6, seed=1))
    groups = asyncio.run(worker.sample(request))
    assert asyncio.run(worker.sample(request)) == groups
    shares = [asyncio.run(worker.sample(request.share(rank, 2))) for rank in range(2)]
    assert groups == [shares[0][0], shares[1][0], shares[0][1], shares[1][1]]
    assert [r.reward for j in (1, 3) for r in groups[j].rollouts] == [None] * 4
    assert all(r.reward in (0.0, 1.0) for g in (groups[0], groups[2]) for r in g.rollouts)


def test_a_prompt_without_room_is_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], untrained: Any
) -> None:
    short = untrained(tmp_path / "sft", 60)  # byte tokens: some problems are longer, some are not
    worker = RolloutWorker(str(open_checkpoint(short).path), RolloutConfig(num_slots=4, device="cpu"))
    request = SampleRequest(TaskConfig(), tuple(range(12)), 2, SamplingConfig(max_tokens=3))
    groups = asyncio.run(worker.sample(request))
    failed = [g for g in groups if all(r.reward is None for r in g.rollouts)]
    assert failed and all(len(g.prompt.token_ids) >= 60 for g in failed)
    assert all("leaves no room" in str(r.completion.error) for g in failed for r in g.rollouts)
    told = capsys.readouterr().err
    assert len(failed) > 1 and told.count("leaves no room for an answer: at most 59 fit (told once") == 1
    batch = collate_groups(groups)
    assert batch.metrics["train/num_dropped_groups"] == len(failed)
    assert batch.metrics["train/num_failed"] == 2 * len(failed)


def test_weights_that_are_no_numbers_fail_what_they_sample(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(start)
    worker = RolloutWorker(str(checkpoint.path), RolloutConfig(num_slots=4, num_prompts=2, device="cpu"))
    state = checkpoint.load_model_state()
    request = SampleRequest(TaskConfig(), (0, 1, 2), 2, SamplingConfig(max_tokens=3))
    before = asyncio.run(worker.sample(request))
    assert (
        asyncio.run(
            worker.load_weights([pack({**state, "lm_head.weight": state["lm_head.weight"] * torch.nan}, 1)])
        ).number
        == 1
    )
    rollouts = [rollout for group in asyncio.run(worker.sample(request)) for rollout in group.rollouts]
    assert [(r.completion.finish_reason, r.reward) for r in rollouts] == [("failed", None)] * 6
    assert capsys.readouterr().err.count("logits are not finite") == 1
    asyncio.run(worker.load_weights([pack(state, 0)]))
    assert asyncio.run(worker.sample(request)) == before


@pytest.mark.parametrize("new_weights", ["recompute", "drain"])
def test_what_runs_when_weights_change_does_as_the_recipe_says(start: Path, new_weights: Any) -> None:
    """They come when the third token of the first answer has been drawn; the second has not begun."""
    checkpoint = open_checkpoint(start)
    worker = RolloutWorker(str(checkpoint.path), RolloutConfig(num_slots=1, device="cpu", new_weights=new_weights))
    prompt = Prompt("p", tuple(TOKENIZER.encode("one and one is")))
    handle = worker.engine.submit(Request(prompt, SamplingConfig(max_tokens=6), num_samples=2))
    for _ in range(3):
        worker.engine.step()
    asyncio.run(worker.load_weights([pack(checkpoint.load_model_state(), 1)]))
    while not handle.is_done:
        worker.engine.step()
    first, second = (completion.weights_versions for completion in handle.completions())
    assert first == (((0, 3), (1, 3)) if new_weights == "recompute" else ((0, 6),))
    assert second == ((1, 6),)


def test_every_problem_comes_once_an_epoch_wherever_one_starts() -> None:
    order = ProblemOrder(num_problems=10, seed=3)
    taken = [order.at(n) for n in range(20)]
    examples = [example_id for example_id, _ in taken]
    assert sorted(examples[:10]) == sorted(examples[10:]) == list(range(10)) and examples[:10] != examples[10:]
    assert [epoch for _, epoch in taken] == [0] * 10 + [1] * 10
    assert ProblemOrder(10, 3).at(16) == taken[16]
    assert [ProblemOrder(10, 4).at(n) for n in range(20)] != taken
    with pytest.raises(ValueError, match="no problem"):
        ProblemOrder(0, 4)


def test_bad_input_is_said_before_ray_starts(recipe: Recipe, start: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(start, base)
    checkpoint = open_checkpoint(base)
    state = {**checkpoint.state, "stage": "base"}
    save_checkpoint(
        base / "checkpoints",
        6,
        model_state=checkpoint.load_model_state(),
        optimizer_state=None,
        state=state,
        tokenizer=TOKENIZER,
        keep=1,
    )
    with pytest.raises(ValueError, match="cannot chat yet"):
        rl.run(recipe(tmp_path / "a", checkpoint=str(base)))
    with pytest.raises(FileNotFoundError, match="no chat model at"):
        rl.run(recipe(tmp_path / "a", checkpoint=str(tmp_path / "nothing")))
    assert not (tmp_path / "a").exists()
