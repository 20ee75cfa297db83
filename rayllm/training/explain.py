"""The `explain` stage: one group of an RL step, token by token, with terms that add up to the loss that was logged.

Reads what the run wrote (`rollouts/`, `metrics.jsonl`, `config.yaml`) and the tokenizer of its checkpoint; no torch.
`explain_page.py` lays it out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from rayllm.config.load import load_config
from rayllm.config.rl_schema import ExplainConfig, RLConfig
from rayllm.runs.checkpoint import latest_checkpoint, open_checkpoint
from rayllm.runs.run_dir import read_run
from rayllm.runs.tracking import read_metrics
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.explain_page import render_page
from rayllm.training.rollout_batch import collate_groups, is_valid, token_versions
from rayllm.training.saved_rollouts import read_groups
from rayllm.types import Prompt, Rollout, RolloutGroup

TERMS = ("policy", "kl", "entropy")
_FILE = re.compile(r"step_(\d+)\.jsonl\.gz")
_MAX_LISTED = 12


@dataclass(frozen=True)
class ExplainedToken:
    """`terms` are its parts of the loss, already divided by the step's number of loss tokens; it, `logp` and `weight`
    are None where the learners had no use for the token."""

    t: int
    token_id: int
    is_sampled: bool
    version: int
    sampler_logp: float
    logp: float | None = None
    weight: float | None = None
    terms: Mapping[str, float] | None = None


@dataclass(frozen=True)
class ExplainedSample:
    """One completion. `advantage` is None where it was left out, and `left_out` says why."""

    rollout: Rollout
    advantage: float | None
    left_out: str
    tokens: Sequence[ExplainedToken]

    @property
    def loss(self) -> float:
        """What it adds to the step's loss."""
        return fsum(term for token in self.tokens for term in (token.terms or {}).values())


@dataclass(frozen=True)
class ExplainedGroup:
    """A prompt and its completions."""

    prompt: Prompt
    samples: Sequence[ExplainedSample]

    @property
    def loss(self) -> float:
        """What it adds to the step's loss."""
        return fsum(sample.loss for sample in self.samples)

    @property
    def is_learned(self) -> bool:
        """Whether the learners had a use for any token of it, if only for KL and entropy."""
        return any(token.terms for sample in self.samples for token in sample.tokens)

    @property
    def has_signal(self) -> bool:
        """Whether any completion was better or worse than the others."""
        return any(sample.advantage for sample in self.samples)


@dataclass(frozen=True)
class ExplainedStep:
    """All that a run kept of a step. `logged_loss` is None where nothing was learned (`rollout_only`)."""

    number: int
    config: RLConfig
    groups: Sequence[ExplainedGroup]
    num_loss_tokens: float
    logged_loss: float | None

    @property
    def loss(self) -> float:
        """The sum of all terms."""
        return fsum(group.loss for group in self.groups)

    @property
    def adds_up(self) -> bool:
        """Whether the terms give the logged loss, but for the rounding of sums in float32."""
        parts = (t for g in self.groups for s in g.samples for token in s.tokens for t in (token.terms or {}).values())
        return abs(self.loss - (self.logged_loss or 0.0)) <= 1e-5 * fsum(map(abs, parts)) + 1e-12


def run(config: ExplainConfig) -> None:
    """Print one group of a step of `config.run`. Raises FileNotFoundError or ValueError, with the cure."""
    if not config.run:
        raise ValueError("explain: which run? `rayllm explain runs/rl --step=40`")
    step, tokenizer = explain_step(config.run, config.step), find_tokenizer(config.run)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in render_page(step, choose_group(step, config.group), tokenizer, color=color):
        print(line)


def explain_step(run_path: str | Path, number: int | None = None) -> ExplainedStep:
    """Step `number` (counted from 1) of a run, or the newest whose rollouts were kept.

    Raises FileNotFoundError or ValueError where there is no such run, or not that step in it.
    """
    run_path = Path(run_path).expanduser()
    if (stage := read_run(run_path).stage) != "rl":
        raise ValueError(f"{run_path} is a run of the stage {stage}; give the run directory of `rayllm rl`")
    config = load_config(RLConfig, str(run_path / "config.yaml"))
    files = _saved_steps(run_path, config)
    number = max(files) if number is None else number
    if number not in files:
        raise ValueError(f"the rollouts of step {number} were not kept; write --step= one of {_list_steps(files)}")
    records = read_metrics(run_path / "metrics.jsonl") if (run_path / "metrics.jsonl").exists() else []
    record = next((r for r in reversed(records) if r["step"] == number and "train/num_tokens" in r), None)
    if record is None:
        raise ValueError(
            f"{run_path}/metrics.jsonl has no record of step {number}: the run went on from an earlier checkpoint and "
            "has not come there again; let it, or explain an earlier step"
        )
    num_loss_tokens = record["train/num_tokens"]
    groups = [
        ExplainedGroup(group.prompt, tuple(_samples(group, terms, config, number - 1, num_loss_tokens)))
        for group, terms in read_groups(files[number])
    ]
    return ExplainedStep(number, config, groups, num_loss_tokens, record.get("train/loss"))


def choose_group(step: ExplainedStep, group_idx: int | None) -> int:
    """The group asked for, or the first with a signal, or else the first. Raises ValueError where it is not there."""
    if group_idx is None:
        group_idx = next((i for i, group in enumerate(step.groups) if group.has_signal), 0)
    if group_idx >= len(step.groups):
        has = f"{len(step.groups)} groups, 0 to {len(step.groups) - 1}" if step.groups else "no groups"
        raise ValueError(f"group={group_idx} is out of range: step {step.number} has {has}")
    return group_idx


def find_tokenizer(run_path: str | Path) -> Tokenizer:
    """That of the run's newest checkpoint, or of the one that it started from."""
    own = latest_checkpoint(Path(run_path).expanduser())
    if own is None:
        own = open_checkpoint(load_config(RLConfig, str(Path(run_path).expanduser() / "config.yaml")).checkpoint)
    return own.load_tokenizer()


def _saved_steps(run_path: Path, config: RLConfig) -> dict[int, Path]:
    found = ((_FILE.fullmatch(file.name), file) for file in (run_path / "rollouts").glob("*"))
    files = {int(match[1]): file for match, file in found if match}
    if files:
        return files
    if config.samples_every is None:
        why = "its recipe has samples_every: null; run the same command with --samples-every=10"
    else:
        why = f"it writes them every samples_every={config.samples_every} steps, and after the last"
    raise FileNotFoundError(f"{run_path} has no rollouts to explain (rollouts/step_*.jsonl.gz): {why}")


def _list_steps(steps: Mapping[int, Path]) -> str:
    names = [str(step) for step in sorted(steps)]
    if len(names) > _MAX_LISTED:
        names = [*names[: _MAX_LISTED // 2], "...", *names[-_MAX_LISTED // 2 :]]
    return ", ".join(names)


def _samples(
    group: RolloutGroup,
    terms: Sequence[Mapping[str, Sequence[float]] | None],
    config: RLConfig,
    version: int,
    num_loss_tokens: float,
) -> Iterator[ExplainedSample]:
    taught = collate_groups([group], config.loss, version=version, max_tokens=config.max_tokens).groups
    advantages = {sample.sample_idx: sample.advantage for part in taught for sample in part.samples}
    num_valid = sum(map(is_valid, group.rollouts))
    for sample_idx, (rollout, found) in enumerate(zip(group.rollouts, terms, strict=True)):
        left_out = ""
        if not is_valid(rollout):
            left_out = f"failed, {rollout.completion.error or 'no verdict'}"
        elif num_valid < 2:
            left_out = "no other valid sample to be held against"
        elif config.loss.overlong == "mask" and rollout.completion.finish_reason == "length":
            left_out = "cut off at max_tokens, masked"
        advantage = None if left_out else advantages.get(sample_idx, 0.0)
        yield ExplainedSample(rollout, advantage, left_out, tuple(_tokens(rollout, found or {}, num_loss_tokens)))


def _tokens(rollout: Rollout, terms: Mapping[str, Sequence[float]], num_loss_tokens: float) -> Iterator[ExplainedToken]:
    completion = rollout.completion
    places = {int(t): place for place, t in enumerate(terms.get("t", ()))}
    versions = token_versions(completion) or [0] * len(completion.token_ids)
    for t, token_id in enumerate(completion.token_ids):
        given = (t, token_id, completion.sampled_mask[t], versions[t], completion.logprobs[t])
        if (place := places.get(t)) is None:
            yield ExplainedToken(*given)
            continue
        parts = {name: terms[name][place] / num_loss_tokens for name in TERMS}
        yield ExplainedToken(*given, logp=terms["logp"][place], weight=terms["weight"][place], terms=parts)
