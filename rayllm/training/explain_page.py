"""A step of RL explained, as lines of at most 100 columns: prompt, completions, a row for each token, and the sums."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator
from math import fsum
from typing import TYPE_CHECKING

from rayllm.config.help import BOLD, DIM, paint
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.rollout_batch import is_valid

if TYPE_CHECKING:
    from rayllm.training.explain import ExplainedGroup, ExplainedSample, ExplainedStep, ExplainedToken

WIDTH = 100
GREEN, RED = "\033[32m", "\033[31m"  # as in rayllm.text.chat.visualize: what is learned, and what is not
_MAX_TOKEN_WIDTH = 40


def render_page(step: ExplainedStep, group_idx: int, tokenizer: Tokenizer, *, color: bool = False) -> Iterator[str]:
    """The lines about one group of a step, and how all its groups add up to the logged loss."""
    group, table = step.groups[group_idx], TokenTable(step, tokenizer, color)
    yield paint(f"Step {step.number}, group {group_idx} of {len(step.groups)}: {group.prompt.prompt_id}", BOLD, color)
    yield f"{step.num_loss_tokens:,.0f} loss tokens; weights trained: v{step.number - 1}"
    if step.config.updates_per_batch > 1:
        yield f"Of {step.config.updates_per_batch} updates on the batch the first is shown; train/loss is its loss."
    yield ""
    yield f"Prompt, {len(group.prompt.token_ids)} tokens:"
    yield from _wrap(_decode(tokenizer, group.prompt.token_ids))
    for sample_idx, sample in enumerate(group.samples):
        yield ""
        yield from _sample(sample_idx, sample, table, tokenizer, color)
    yield ""
    yield from _sums(step, group_idx, color)


class TokenTable:
    """The columns: text, who drew it, log-probabilities, weight, and the terms of the loss that the recipe has."""

    def __init__(self, step: ExplainedStep, tokenizer: Tokenizer, color: bool) -> None:
        loss = step.config.loss
        parts = ["kl"] * (loss.kl_coef > 0) + ["entropy"] * (loss.entropy_coef > 0)
        self._parts = ["policy", *parts] if parts else []
        self._tokenizer, self._color = tokenizer, color
        self._token_width = min(_MAX_TOKEN_WIDTH, WIDTH - 42 - 11 * (len(self._parts) + 1))

    def header(self) -> str:
        cells = ("t", "token", "drawn by", "sampler", "learner", "weight", *self._parts, "loss")
        return paint(self._join(*cells), DIM, self._color)

    def row(self, token: ExplainedToken) -> str:
        """Of a token that a tool wrote there is no more than its text."""
        text = self._join(str(token.t), f'"{_token_text(self._tokenizer, token.token_id)}"', *self._cells(token))
        return paint(text, GREEN if token.is_sampled else RED, self._color)

    def total(self, label: str, loss: float) -> str:
        """A sum, below the column of the loss."""
        return f"{label}{_term(loss):>{self._width - len(label)}}"

    @property
    def _width(self) -> int:
        return 42 + self._token_width + 11 * (len(self._parts) + 1)

    def _cells(self, token: ExplainedToken) -> list[str]:
        if not token.is_sampled:
            return ["tool", "", "", "", *("" for _ in self._parts), ""]
        drawn = [f"v{token.version}", f"{token.sampler_logp:.4f}"]
        if token.terms is None or token.logp is None or token.weight is None:
            return [*drawn, "-", "-", *("-" for _ in self._parts), "-"]
        terms = [_term(token.terms[name]) for name in self._parts] + [_term(fsum(token.terms.values()))]
        return [*drawn, f"{token.logp:.4f}", f"{token.weight:.4f}", *terms]

    def _join(self, t: str, token: str, drawn_by: str, sampler: str, learner: str, weight: str, *terms: str) -> str:
        text = _fit(token, self._token_width)
        row = f"{t:>5} {text} {drawn_by:>8}{sampler:>9}{learner:>9}{weight:>9}" + "".join(f"{s:>11}" for s in terms)
        return row.rstrip()


def _sample(
    sample_idx: int, sample: ExplainedSample, table: TokenTable, tokenizer: Tokenizer, color: bool
) -> Iterator[str]:
    completion, reward = sample.rollout.completion, sample.rollout.reward
    verdict = "no reward" if reward is None else f"reward {reward:g}"
    advantage = f"left out ({sample.left_out})" if sample.advantage is None else f"advantage {sample.advantage:+.4f}"
    about = f"{len(completion.token_ids)} tokens, {completion.finish_reason}"
    title, *more = textwrap.wrap(_visible(f"Sample {sample_idx}: {verdict}, {advantage}; {about}"), WIDTH)
    yield paint(title, BOLD, color)
    yield from more
    if not sample.tokens:
        return
    yield from _wrap(_decode(tokenizer, completion.token_ids))
    yield table.header()
    yield from map(table.row, sample.tokens)
    yield table.total(f"Sum of sample {sample_idx}", sample.loss)


def _sums(step: ExplainedStep, group_idx: int, color: bool) -> Iterator[str]:
    yield paint(f"All groups of step {step.number}", BOLD, color)
    for i, group in enumerate(step.groups):
        rewards = [s.rollout.reward or 0.0 for s in group.samples if is_valid(s.rollout)]
        mean = f"mean reward {fsum(rewards) / len(rewards):.3f}" if rewards else "no reward"
        taught = _term(group.loss) if group.is_learned else _why_silent(group, step)
        mark = ">" if i == group_idx else " "
        yield f"{mark}{i:>4} {_fit(_visible(group.prompt.prompt_id), 42)} {mean:<18} {taught:>31}".rstrip()
    if step.logged_loss is None:
        yield "Nothing was learned in this step (rollout_only): there is no loss to add up to."
        return
    verdict = "they add up" if step.adds_up else "they do NOT add up"
    difference = step.loss - step.logged_loss
    yield f"Sum {step.loss:+.8e}, train/loss {step.logged_loss:+.8e}, difference {difference:+.0e}: {verdict}"


def _why_silent(group: ExplainedGroup, step: ExplainedStep) -> str:
    if step.logged_loss is None:
        return "-"
    advantages = [s.advantage for s in group.samples if s.advantage is not None]
    return "even, nothing to teach" if advantages else "dropped, no sample is left"


def _term(value: float) -> str:
    return f"{value + 0.0:+.3e}"  # no -0


def _decode(tokenizer: Tokenizer, token_ids: tuple[int, ...]) -> str:
    """Their text; an imported model may know ids that its tokenizer has no text for."""
    return tokenizer.decode([i for i in token_ids if i < tokenizer.vocab_size])


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
    if token_id >= tokenizer.vocab_size:
        return f"<{token_id}>"
    return _visible(tokenizer.decode_bytes([token_id]).decode(errors="backslashreplace"))


def _visible(text: str, kept: str = "") -> str:
    """What would move the cursor is spelled out, so that no text can steer the terminal."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def _wrap(text: str) -> Iterator[str]:
    for line in _visible(text, kept="\n").split("\n"):
        parts = textwrap.wrap(line, WIDTH - 2, drop_whitespace=False, break_on_hyphens=False)
        yield from (f"  {part}".rstrip() for part in parts or [""])


def _fit(text: str, width: int) -> str:
    """Cut or padded to so many columns; East Asian characters take two."""
    widths = [2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text]
    if sum(widths) > width:
        kept = 0
        while sum(widths[: kept + 1]) <= width - 2:
            kept += 1
        text, widths = text[:kept] + "..", [*widths[:kept], 1, 1]
    return text + " " * (width - sum(widths))
