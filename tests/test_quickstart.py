"""The quickstart recipe, smaller, through real actors and the real broadcast: RL teaches, and what it teaches comes
from the rewards and by the broadcast."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from actors import cluster, quickstart, rl
from actors.rollout import RolloutPool, SampleRequest, Sampling
from actors.weights import ObjectStoreChannel
from rayllm.config.load import load_config
from rayllm.config.quickstart_schema import QuickstartConfig
from rayllm.config.rl_schema import GuardConfig, RLConfig
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.run_dir import open_run
from rayllm.runs.tracking import read_metrics
from rayllm.types import RolloutGroup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

Gains = dict[tuple[int, int], tuple[float, float]]

SMALLER = (
    "--pretrain.horizon.value=110",
    "--rl.num_steps=24",
    "--rl.eval_every=null",
    "--rl.save_every=null",
    "--chat_eval.tasks=[{split: test, num_examples: 256}]",
)


@pytest.fixture(scope="module")
def small(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> QuickstartConfig:
    """The recipe after its run."""
    out = tmp_path_factory.mktemp("life") / "quickstart"
    config = load_config(QuickstartConfig, "quickstart", [f"--out={out}", *SMALLER])
    quickstart.run(config)
    return quickstart.place(config)


def validations(out: str) -> list[tuple[float, float]]:
    records = read_metrics(Path(out) / "metrics.jsonl")
    return [(r["val/pass@1"], r["val/pass@1_stderr"]) for r in records if "val/pass@1" in r]


def test_rl_gains_ten_points(small: QuickstartConfig) -> None:
    summary = json.loads((Path(small.out) / "summary.json").read_text(encoding="utf-8"))
    before, after = (summary["pass_at_1"][name] for name in ("sft", "rl"))
    gain, error = after["value"] - before["value"], math.hypot(before["stderr"], after["stderr"])
    assert before["num_problems"] == after["num_problems"] == 256
    assert gain >= 0.10 and gain - 1.96 * error > 0.05, summary
    assert set(summary["stages"]) >= {"tokenizer", "tokenize", "pretrain", "sft", "rl"}
    assert (Path(small.out) / "report.html").exists()


def teach(config: RLConfig, out: Path, **ports: Any) -> list[tuple[float, float]]:
    """RL from the same chat model with another pool or channel; returns its validations."""
    config = replace(config, out=str(out))
    with open_run(out, stage="rl", config=config, plan={}) as run_dir, cluster.connect() as ray_cluster:
        rl.teach(config, run_dir, open_checkpoint(config.checkpoint), ray_cluster, resumes=False, **ports)
    return validations(str(out))


@pytest.fixture(scope="module")
def gains(
    small: QuickstartConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int], tuple[float, float]]:
    """Gain of validation pass@1 and its standard error by (seed, max_staleness), from one chat model."""
    home = tmp_path_factory.mktemp("seeds")
    measured: Gains = {}
    for seed, max_staleness in ((11, 0), (12, 0), (13, 0), (11, 1), (12, 1)):
        config = replace(small.rl, seed=seed, max_staleness=max_staleness, num_steps=40)
        measured[seed, max_staleness] = gain(teach(config, home / f"seed_{seed}_{max_staleness}"))
    for (seed, max_staleness), (value, error) in measured.items():
        print(f"seed {seed}, max_staleness {max_staleness}: {value:+.1%} +- {error:.1%}")
    return measured


def gain(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return scores[-1][0] - scores[0][0], math.hypot(scores[-1][1], scores[0][1])


def test_every_seed_gains_on_policy_and_one_step_ahead(gains: Gains) -> None:
    for run, (value, error) in gains.items():
        assert value >= 0.10 and value - 1.96 * error > 0.05, (run, gains)
    assert statistics.mean(value for value, _ in gains.values()) >= 0.20, gains


def test_ten_times_the_rates_end_near_the_best(small: QuickstartConfig, tmp_path: Path) -> None:
    """The guard goes back to the best weights where the policy has left them."""
    config = replace(small.rl, lr_fraction=10 * small.rl.lr_fraction, eval_every=4, num_steps=16)
    scores = teach(config, tmp_path / "fast")
    ends_with = open_checkpoint(tmp_path / "fast").state["metrics"]
    best, error = max(scores)
    assert isinstance(ends_with, dict) and ends_with["val/pass@1"] >= best - 2 * error, scores
    records = read_metrics(tmp_path / "fast" / "metrics.jsonl")
    print("went back to", [r["guard/rolled_back_to"] for r in records if "guard/rolled_back_to" in r], scores)


class NoTransfer:
    def wait(self) -> None:
        """There is nothing to wait for."""

    def metrics(self) -> dict[str, float]:
        return {}


class SilentChannel(ObjectStoreChannel):
    """Brings no weights to anyone."""

    def start(self, source: Any, number: int, receivers: Sequence[Any], timeout_s: float) -> Any:
        return NoTransfer()


def test_without_the_broadcast_there_is_no_gain(small: QuickstartConfig, tmp_path: Path) -> None:
    first, last = teach(replace(small.rl, num_steps=8), tmp_path / "silent", channel=SilentChannel())
    assert last == first == validations(small.rl.out)[0]


class ShuffledSampling:
    """Gives the rewards of a request to other answers of it."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self.num_examples = sampling, sampling.num_examples
        self.cancel = sampling.cancel

    def wait(self) -> list[RolloutGroup]:
        groups = self._sampling.wait()
        rewards = [rollout.reward for group in groups for rollout in group.rollouts]
        random.Random(groups[0].prompt.prompt_id).shuffle(rewards)
        drawn = iter(rewards)
        return [
            replace(group, rollouts=tuple(replace(rollout, reward=next(drawn)) for rollout in group.rollouts))
            for group in groups
        ]


class ShuffledPool(RolloutPool):
    def start(self, request: SampleRequest) -> Any:
        sampling = super().start(request)
        return ShuffledSampling(sampling) if request.task.split == "train" else sampling


def test_with_shuffled_rewards_there_is_no_gain(small: QuickstartConfig, tmp_path: Path) -> None:
    unguarded = replace(small.rl, guard=GuardConfig(max_drop=None), num_steps=16)
    first, last = teach(unguarded, tmp_path / "shuffled", pool_class=ShuffledPool)
    assert last[0] - first[0] < 0.05, (first, last)


def test_killed_at_any_step_it_ends_with_the_same_weights(
    small: QuickstartConfig, commands: Callable[[str, Any], Any], tmp_path: Path
) -> None:
    """SIGKILL to everything at some moment after the second checkpoint; the same command goes on."""
    held_out = replace(small.rl.validation, num_examples=16)
    config = replace(small.rl, num_steps=6, save_every=1, keep_checkpoints=9, validation=held_out)
    whole = tmp_path / "whole"
    teach(config, whole)
    killed = replace(config, out=str(tmp_path / "killed"))
    first = commands("rl", killed)
    first.wait_for(tmp_path / "killed" / "checkpoints" / "step_000002")
    first.kill()
    assert 2 <= open_checkpoint(killed.out).step < 6
    again = commands("rl", killed)
    output, _ = again.process.communicate(timeout=240)
    assert again.process.returncode == 0 and "resuming" in output, output
    states = [load_file(open_checkpoint(out).path / "model.safetensors") for out in (whole, killed.out)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.numpy().tobytes() == states[1][name].numpy().tobytes(), name
