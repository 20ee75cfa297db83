"""What feeds the loop: batches in the order of admission, sampled ahead, replaced, replayed, given up."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.ray_metrics import RayMetrics
from actors.rollout import SampleRequest
from actors.stream import RolloutStream
from rayllm.config.rl_schema import GuardConfig, RLConfig
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.tracking import read_metrics
from rayllm.training.saved_rollouts import load_groups
from rayllm.types import Completion, Prompt, Rollout, RolloutGroup

Recipe = Callable[..., RLConfig]
Teach = Callable[..., dict[str, float]]


class FakePool:
    """Answers at once, by the newest weights that have arrived; every third problem's samples are all right."""

    def __init__(self) -> None:
        self.version = 0
        self.requests: list[SampleRequest] = []
        self.num_cancelled = 0

    def start(self, request: SampleRequest) -> Any:
        pool, version = self, self.version
        self.requests.append(request)

        class Sampling:
            num_examples = len(request.example_ids)

            def wait(self) -> list[RolloutGroup]:
                return [
                    pool.group(i, seed, version) for i, seed in zip(request.example_ids, request.seeds, strict=True)
                ]

            def cancel(self) -> None:
                pool.num_cancelled += 1

        return Sampling()

    def group(self, example_id: int, seed: int, version: int) -> RolloutGroup:
        completion = Completion((1,), (True,), (-1.0,), "stop", ((version, 1),))
        rewards = (1.0, 1.0) if example_id % 3 == 0 else (1.0, 0.0)
        return RolloutGroup(Prompt(f"{example_id}/{seed}", (2,)), tuple(Rollout(completion, r) for r in rewards))

    def publish(self, source: Any, number: int) -> Any:
        pool = self

        class Transfer:
            def wait(self) -> None:
                pool.version = number

            def metrics(self) -> dict[str, float]:
                return {"publish/ms": 1.0}

        return Transfer()


class Learners:
    source = None


def drive(config: RLConfig, num_steps: int, stream: RolloutStream, first_step: int = 0) -> list[list[RolloutGroup]]:
    batches = []
    for step in range(first_step, num_steps):
        stream.settle()
        groups, _ = stream.take(step)
        batches.append(groups)
        stream.publish(Learners(), step + 1)
    return batches


def names(batches: list[list[RolloutGroup]]) -> list[str]:
    return [group.prompt.prompt_id for batch in batches for group in batch]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_batches_are_the_same_however_far_ahead_they_are_sampled(recipe: Recipe, k: int) -> None:
    config = recipe(Path("unused"), max_staleness=k, num_steps=9)
    pool = FakePool()
    batches = drive(config, 9, RolloutStream(config, pool, 0, 0))  # type: ignore[arg-type]
    on_policy = replace(config, max_staleness=0)
    assert names(batches) == names(drive(on_policy, 9, RolloutStream(on_policy, FakePool(), 0, 0)))  # type: ignore[arg-type]
    ages = [step - group.rollouts[0].completion.weights_versions[0][0] for step, b in enumerate(batches) for group in b]
    assert max(ages) == k and ages[: config.prompts_per_step] == [0] * config.prompts_per_step
    assert sum(len(r.example_ids) for r in pool.requests) == 9 * config.prompts_per_step, "nothing for nobody"


def test_groups_that_teach_nothing_are_replaced_within_the_budget(recipe: Recipe) -> None:
    config = recipe(Path("unused"), sampling_budget=2, num_steps=6)
    stream = RolloutStream(config, FakePool(), 0, 0)  # type: ignore[arg-type]
    groups, metrics = stream.take(0)
    assert len(groups) == config.prompts_per_step
    assert all(len({r.reward for r in group.rollouts}) == 2 for group in groups)
    assert stream.num_prompts == metrics["train/num_groups"] + metrics["train/num_replaced_groups"]

    class Easy(FakePool):
        def group(self, example_id: int, seed: int, version: int) -> RolloutGroup:
            return super().group(0, seed, version)

    stream = RolloutStream(config, Easy(), 0, 0)  # type: ignore[arg-type]
    groups, metrics = stream.take(0)
    assert groups == [] and metrics["train/num_replaced_groups"] == 2 * config.prompts_per_step, "the budget is the end"


def test_a_resumed_stream_goes_on_with_the_problems_that_follow(recipe: Recipe) -> None:
    for settings in ({}, {"max_staleness": 1}, {"sampling_budget": 3}):
        config = recipe(Path("unused"), num_steps=8, **settings)
        whole = RolloutStream(config, FakePool(), 0, 0)  # type: ignore[arg-type]
        batches = drive(config, 4, whole)
        num_prompts = whole.num_prompts
        batches += drive(config, 8, whole, first_step=4)
        again = RolloutStream(config, FakePool(), 4, num_prompts)  # type: ignore[arg-type]
        assert names(drive(config, 8, again, first_step=4)) == names(batches[4:])


def test_what_was_sampled_ahead_can_be_given_up(recipe: Recipe) -> None:
    config, pool = recipe(Path("unused"), max_staleness=2, num_steps=9), FakePool()
    stream = RolloutStream(config, pool, 0, 0)  # type: ignore[arg-type]
    drive(config, 2, stream)
    stream.restart()
    stream.settle()
    assert pool.num_cancelled > 0
    (groups,) = [stream.take(2)[0]]
    fresh = {group.rollouts[0].completion.weights_versions[0][0] for group in groups}
    assert fresh == {2}, "sampled anew, by the weights of now"


def staleness(out: Path) -> list[dict[int, float]]:
    return [
        {int(key.rpartition("/")[2]): share for key, share in record.items() if key.startswith("train/staleness/")}
        for record in read_metrics(out / "metrics.jsonl")
        if "train/reward" in record
    ]


def metric(out: Path, key: str) -> list[float]:
    return [record[key] for record in read_metrics(out / "metrics.jsonl") if key in record]


@pytest.mark.usefixtures("ray_session")
def test_one_step_ahead_learns_as_well(recipe: Recipe, teach: Teach, tmp_path: Path) -> None:
    out = tmp_path / "ahead"
    score = teach(recipe(out, max_staleness=1, test_at_end=True, weights="process_group"))
    ages = staleness(out)
    assert ages[0] == {0: 1.0} and all(max(age) <= 1 for age in ages)
    assert sum(1 for age in ages if age.get(1, 0) > 0.5) >= 10, "it is one step ahead"
    passed = metric(out, "val/pass@1")
    assert score["val/pass@1"] == passed[-1] > passed[0] + 0.25
    assert max(metric(out, "train/importance_max")) > 1, "what is stale is corrected"
    assert metric(out, "test/pass@4")
    for key in (
        "train/mismatch_kl",
        "train/entropy",
        "train/grad_norm/lm_head",
        "learn/mfu",
        "rollout/tokens_per_s",
        "publish/ms",
    ):
        assert metric(out, key), key
    idle = [metric(out, f"time/{who}_idle_share") for who in ("rollouts", "learners")]
    assert all(0 <= share <= 1 for shares in idle for share in shares)


@pytest.mark.usefixtures("ray_session")
def test_groups_can_be_sampled_without_learning_and_learned_from_without_sampling(
    recipe: Recipe, teach: Teach, tmp_path: Path
) -> None:
    sampled = tmp_path / "sampled"
    teach(recipe(sampled, rollout_only=True, num_steps=3, samples_every=1))
    assert not list(sampled.glob("checkpoints/step_*")) and len(list(sampled.glob("rollouts/*.jsonl.gz"))) == 3
    groups = load_groups(sampled / "rollouts" / "step_000002.jsonl.gz")
    assert len(groups) == 4 and "Rewards" in (sampled / "samples" / "step_000002.md").read_text()

    learned = tmp_path / "learned"
    teach(recipe(learned, replay=str(sampled), num_steps=3, samples_every=1))
    assert open_checkpoint(learned).step == 3
    assert metric(learned, "train/reward") == metric(sampled, "train/reward")
    assert metric(learned, "train/grad_norm")[0] > 0 and not metric(learned, "val/pass@1")
    assert load_groups(learned / "rollouts" / "step_000002.jsonl.gz") == groups


@pytest.mark.usefixtures("ray_session")
def test_a_collapsed_policy_goes_back_to_its_best(
    recipe: Recipe, teach: Teach, ascii_pool: Any, ascii_worker: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Forgetful(ascii_worker):  # type: ignore[misc]
        """Nothing that the fourth and fifth weights say is right."""

        def _judge(self, task: Any, example_id: int, completion: Completion) -> Rollout:
            rollout = super()._judge(task, example_id, completion)
            return replace(rollout, reward=0.0) if completion.weights_versions[0][0] in (4, 5) else rollout

    class Pool(ascii_pool):  # type: ignore[misc]
        @staticmethod
        def actor_class() -> Any:
            return ray.remote(Forgetful)

    out = tmp_path / "collapsed"
    config = recipe(out, num_steps=8, eval_every=2, guard=GuardConfig(max_drop=2.0))
    teach(config, pool_class=Pool)
    assert metric(out, "guard/rolled_back_to") in ([0.0], [2.0])
    assert "rates halved" in capfd.readouterr().err
    rates = metric(out, "train/lr_multiplier")
    assert rates[4] < 0.6 * rates[3], "half the rates from the fifth step on"


@pytest.mark.usefixtures("ray_session")
def test_metrics_are_rays_own_too() -> None:
    """Where Prometheus asks the node for them."""
    sink = RayMetrics("tiny")
    sink.log(7, {"val/pass@1": 0.25, "train/update_rms/matrices 64x16": 0.5})
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    found: dict[str, str] = {}  # of this run: other tests of the session have gauges, too
    while len(found) < 3:
        assert time.monotonic() < deadline, f"waited 60 s for three gauges on the node's metrics port, got {found}"
        time.sleep(0.5)
        text = urllib.request.urlopen(url, timeout=20).read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_rayllm_") and 'run="tiny"' in line]
        found = {line.partition("{")[0]: line.rpartition(" ")[2] for line in lines}
    names = ("val_pass_at_1", "train_update_rms_matrices_64x16", "step")
    assert [float(found[f"ray_rayllm_{name}"]) for name in names] == [0.25, 0.5, 7.0]
