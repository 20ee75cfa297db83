"""Groups of rollouts on disk: to be read, to be explained token by token, to be learned from again.

samples/step_000040.md               prompts, completions and rewards, for people
rollouts/step_000040.jsonl.gz        one group a line, with what the learners made of each sampled token (`terms`)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayllm.runs.atomic import write_atomic
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Completion, Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:  # what is saved is read without torch
    from torch import Tensor

    from rayllm.training.policy_loss import PolicyLoss

TERM_NAMES = ("logp", "ratio", "weight", "policy", "kl", "entropy")
MAX_SHOWN_GROUPS, MAX_SHOWN_ROLLOUTS = 4, 4

TokenTerms = Mapping[str, np.ndarray]
"""What the learners made of tokens: `address` (M, 3) of (group, rollout, token), and the `TERM_NAMES`, (M,) each."""


def collect_terms(losses: Sequence[PolicyLoss]) -> dict[str, np.ndarray]:
    """The terms of the first update on a learner's micro-batches."""

    def join(tensors: Sequence[Tensor]) -> np.ndarray:
        return np.concatenate([t.detach().cpu().double().numpy() for t in tensors]) if tensors else np.zeros(0)

    with_terms = [loss for loss in losses if loss.first_terms]
    terms = {name: join([loss.first_terms[name] for loss in with_terms]) for name in TERM_NAMES}
    address = [loss.batch.address_M3.numpy() for loss in with_terms]
    return terms | {"address": np.concatenate(address) if address else np.zeros((0, 3), dtype=np.int64)}


def join_terms(parts: Sequence[TokenTerms]) -> dict[str, np.ndarray]:
    """Those of all learners as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in ("address", *TERM_NAMES)}


def save_groups(path: Path, groups: Sequence[RolloutGroup], terms: TokenTerms | None = None) -> None:
    """Write groups, one a line, gzipped. Raises OSError."""
    by_rollout: dict[tuple[int, int], dict[str, list[float]]] = {}
    if terms is not None:
        for m, (group_idx, sample_idx, t) in enumerate(terms["address"].tolist()):
            lists = by_rollout.setdefault((group_idx, sample_idx), {"t": [], **{name: [] for name in TERM_NAMES}})
            lists["t"].append(t)
            for name in TERM_NAMES:
                lists[name].append(float(terms[name][m]))
    lines = []
    for group_idx, group in enumerate(groups):
        rollouts = [
            {"reward": rollout.reward, **asdict(rollout.completion), "terms": by_rollout.get((group_idx, i))}
            for i, rollout in enumerate(group.rollouts)
        ]
        lines.append(json.dumps({"prompt": asdict(group.prompt), "rollouts": rollouts}))
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, gzip.compress("\n".join(lines).encode(), compresslevel=3, mtime=0))


def load_groups(path: Path) -> list[RolloutGroup]:
    """The groups of a file. Raises ValueError, naming file and line, where it is no such file."""
    return [group for group, _ in read_groups(path)]


def read_groups(path: Path) -> Iterator[tuple[RolloutGroup, list[dict[str, list[float]] | None]]]:
    """Each group, and the terms of each of its rollouts (None where the learners had no use for it)."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} holds no saved rollouts: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            raw = json.loads(line)
            rollouts = tuple(Rollout(_completion(r), r["reward"]) for r in raw["rollouts"])
            prompt = Prompt(raw["prompt"]["prompt_id"], tuple(raw["prompt"]["token_ids"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number} is no group of rollouts: {type(error).__name__} {error}"
            ) from error
        yield RolloutGroup(prompt, rollouts), [r.get("terms") for r in raw["rollouts"]]


def saved_files(place: str) -> list[Path]:
    """A file of saved rollouts, or those of a folder (or of a run's `rollouts/`), in the order of their steps. Raises
    FileNotFoundError where there is none."""
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.jsonl.gz")) or sorted((path / "rollouts").glob("*.jsonl.gz"))
    if not found:
        raise FileNotFoundError(
            f"{place} holds no saved rollouts (*.jsonl.gz): a run writes them to rollouts/ every samples_every steps"
        )
    return found


def render_samples(groups: Sequence[RolloutGroup], tokenizer: Tokenizer, step: int) -> str:
    """Markdown: of the first groups the prompt, and of each the first completions with their rewards."""
    parts = [f"# Step {step}", ""]
    for group in groups[:MAX_SHOWN_GROUPS]:
        rewards = ", ".join("failed" if r.reward is None else f"{r.reward:g}" for r in group.rollouts)
        parts += [
            f"## {group.prompt.prompt_id}",
            "",
            f"Rewards: {rewards}",
            "",
            *_fenced(tokenizer, group.prompt.token_ids),
        ]
        for i, rollout in enumerate(group.rollouts[:MAX_SHOWN_ROLLOUTS]):
            completion = rollout.completion
            verdict = "failed" if rollout.reward is None else f"reward {rollout.reward:g}"
            about = f"{len(completion.token_ids)} tokens, {completion.finish_reason}"
            error = f", {completion.error}" if completion.error else ""
            parts += ["", f"### Sample {i}: {verdict} ({about}{error})", ""]
            parts += _fenced(tokenizer, completion.token_ids)
        parts.append("")
    return "\n".join(parts)


def _fenced(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    return ["````text", tokenizer.decode(list(token_ids)), "````"]


def _completion(raw: Mapping[str, Any]) -> Completion:
    kept = raw["kept_ids"]
    return Completion(
        tuple(raw["token_ids"]),
        tuple(raw["sampled_mask"]),
        tuple(raw["logprobs"]),
        raw["finish_reason"],
        tuple((number, length) for number, length in raw["weights_versions"]),
        None if kept is None else tuple(tuple(ids) for ids in kept),
        raw["error"],
    )
