"""A step explained: terms of every token that add up to the loss, and a page that one can read."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayllm.config.load import to_yaml
from rayllm.config.rl_schema import ExplainConfig, PolicyLossConfig, RLConfig
from rayllm.model.config import GPTConfig
from rayllm.model.gpt import GPT
from rayllm.runs.checkpoint import save_checkpoint
from rayllm.text.tokenizer import Tokenizer
from rayllm.training.accumulate import accumulate_gradient
from rayllm.training.explain import explain_step, run
from rayllm.training.policy import score_tokens, summed_policy_loss
from rayllm.training.policy_batch import micro_batches
from rayllm.training.policy_loss import PolicyLoss
from rayllm.training.rollout_batch import collate_groups
from rayllm.training.saved_rollouts import collect_terms, save_groups
from rayllm.types import Completion, FinishReason, Prompt, Rollout, RolloutGroup

TOKENIZER = Tokenizer.byte_level()
VERSION = 2
ALL_TERMS = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01, importance_cap=1.5)


def build_model(seed: int) -> GPT:
    model = GPT(GPTConfig(64, vocab_size=TOKENIZER.vocab_size, num_layers=1, num_heads=2, num_kv_heads=1, d_model=32))
    model.init_weights(0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    return model


def rollout(text: str, reward: float | None, version: int, reason: FinishReason = "stop") -> Rollout:
    tokens = tuple(TOKENIZER.encode(text))
    draw = random.Random(text)
    is_sampled = tuple(token_id != ord("=") for token_id in tokens)  # what a tool writes
    logprobs = tuple(-5.5 + draw.random() if s else 0.0 for s in is_sampled)
    return Rollout(Completion(tokens, is_sampled, logprobs, reason, ((version, len(tokens)),)), reward)


def groups() -> list[RolloutGroup]:
    """One even, one dropped, and two that teach, with fresh and stale tokens, a failure and a cut answer."""

    def group(name: str, *rollouts: Rollout) -> RolloutGroup:
        return RolloutGroup(Prompt(f"sums/train/{name}", tuple(TOKENIZER.encode(f"what is {name}?\n"))), rollouts)

    return [
        group("0+0", rollout("0", 1.0, VERSION), rollout("00", 1.0, VERSION)),
        group("1+1", rollout("2=2 \u00fc", 1.0, VERSION), rollout("three\n\x1b[2J", 0.0, 1), rollout("four", 0.0, 0)),
        group("2+2", rollout("4", None, VERSION), rollout("5", 0.0, VERSION)),
        group(
            "3+3", rollout("6 = six", 0.5, 1), rollout("seven" * 5, 0.0, 1, "length"), rollout("", None, 1, "failed")
        ),
    ]


def write_run(folder: Path, loss: PolicyLossConfig, step: int = VERSION + 1, **changes: Any) -> Path:
    """What a run leaves of one step: the learner's computation on a small model, two learners' micro-batches."""
    config = RLConfig(out=str(folder), loss=loss, max_tokens=40, **changes)
    model, reference, batch = build_model(1), build_model(2), collate_groups(groups(), loss, version=VERSION)
    losses: list[PolicyLoss] = []
    for rank in range(2):
        for share in micro_batches(batch, 40, "cpu", rank, 2):
            losses.append(PolicyLoss(share, loss, reference_logp_M=score_tokens(reference, share).logp_M))
    total = accumulate_gradient(model, losses, summed_policy_loss, num_loss_tokens=batch.num_loss_tokens)
    for part in losses:
        part.end_update()
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"run_id": "0" * 12, "stage": "rl", "created": "2027-01-15T08:00:00+00:00", "config_fingerprint": "f"}
    (folder / "run.json").write_text(json.dumps(identity))
    (folder / "config.yaml").write_text(to_yaml(config))
    record = {"step": step, "time_s": 1.0, **batch.metrics, "train/loss": float(total)}
    lines = [record, {"step": step, "time_s": 2.0, "val/pass@1": 0.5}]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    save_groups(folder / "rollouts" / f"step_{step:06d}.jsonl.gz", groups(), collect_terms(losses))
    state = {"stage": "rl", "model": model.config.to_dict(), "tokenizer_fingerprint": TOKENIZER.fingerprint}
    save_checkpoint(
        folder / "checkpoints",
        step,
        model_state=model.state_dict(),
        optimizer_state=None,
        state=state,
        tokenizer=TOKENIZER,
        keep=1,
    )
    return folder


def explain(capsys: pytest.CaptureFixture[str], folder: Path, **arguments: Any) -> list[str]:
    run(ExplainConfig(run=str(folder), **arguments))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "loss",
    [
        PolicyLossConfig(),
        PolicyLossConfig(advantage="mean_std", overlong="mask"),
        PolicyLossConfig(advantage="leave_one_out", overlong="penalty", overlong_buffer=30),
        ALL_TERMS,
    ],
    ids=["default", "masked", "penalty", "all terms"],
)
def test_the_terms_add_up_to_the_loss(tmp_path: Path, loss: PolicyLossConfig) -> None:
    step = explain_step(write_run(tmp_path / "rl", loss))
    assert step.logged_loss is not None and abs(step.logged_loss) > 1e-4 and step.adds_up
    assert step.loss == pytest.approx(step.logged_loss, rel=1e-5)
    assert sum(group.loss for group in step.groups) == pytest.approx(step.loss, rel=1e-9)
    learned = [t for group in step.groups for s in group.samples for t in s.tokens if t.terms]
    assert all(t.is_sampled and t.weight is not None and t.weight <= loss.importance_cap for t in learned)
    wrong = replace(step, logged_loss=step.logged_loss * 1.01)
    assert not wrong.adds_up


def test_advantages_and_terms_are_those_of_the_formula(tmp_path: Path) -> None:
    step = explain_step(write_run(tmp_path / "rl", PolicyLossConfig()))
    even, taught, dropped, half = step.groups
    assert [s.advantage for s in even.samples] == [0.0, 0.0] and not even.is_learned and taught.has_signal
    assert [s.advantage for s in taught.samples] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert [s.advantage for s in dropped.samples] == [None, None]
    assert [s.left_out.split(",")[0] for s in half.samples] == ["", "", "failed"]
    for sample in taught.samples:
        for token in sample.tokens:
            assert (token.terms is not None) == token.is_sampled
            if token.terms and token.version == VERSION:
                assert sample.advantage is not None and token.logp is not None and token.weight == 1.0
                expected = -sample.advantage * token.logp / step.num_loss_tokens
                assert token.terms["policy"] == pytest.approx(expected, rel=1e-5)
    assert any(token.weight != 1.0 for token in taught.samples[1].tokens)


def test_the_page_shows_every_token_and_the_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explain(capsys, write_run(tmp_path / "rl", PolicyLossConfig()))
    page = "\n".join(lines)
    assert lines[0] == "Step 3, group 1 of 4: sums/train/1+1"
    assert re.fullmatch(r"\d+ loss tokens; weights trained: v2", lines[1])
    assert "  what is 1+1?" in lines and max(map(len, lines)) <= 100
    assert "Sample 0: reward 1, advantage +0.6667; 6 tokens, stop" in lines
    assert re.search(r'^    0 "2" +v2 +-\d\.\d{4} +-\d\.\d{4} +1\.0000 +\+\d\.\d{3}e-\d\d$', page, re.MULTILINE)
    assert re.search(r'^    1 "=" +tool$', page, re.MULTILINE)
    assert re.search(r'^    4 "\\xc3" +v2 ', page, re.MULTILINE)  # half a character
    assert re.search(r'^    5 "\\n" +v1 ', page, re.MULTILINE) and "\x1b" not in page  # no text steers the terminal
    for sample_idx in range(3):
        assert re.search(rf"^Sum of sample {sample_idx} +[+-]\d\.\d{{3}}e-\d\d$", page, re.MULTILINE)
    assert re.search(r"^ +0 sums/train/0\+0 +mean reward 1.000 +even, nothing to teach$", page, re.MULTILINE)
    assert re.search(r"^> +1 sums/train/1\+1 +mean reward 0.333 +[+-]\d\.\d{3}e-\d\d$", page, re.MULTILINE)
    assert re.search(r"^ +2 sums/train/2\+2 +mean reward 0.000 +dropped, no sample is left$", page, re.MULTILINE)
    assert re.fullmatch(
        r"Sum [+-][\d.e-]+, train/loss [+-][\d.e-]+, difference [+-]\de[+-]\d\d: they add up", lines[-1]
    )


def test_groups_and_terms_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "rl", ALL_TERMS)
    assert explain(capsys, folder)[0].startswith("Step 3, group 1 of 4")  # not the even one, which has terms, too
    lines = explain(capsys, folder, step=3, group=3)
    assert lines[0].startswith("Step 3, group 3 of 4") and max(map(len, lines)) <= 100
    header = next(line for line in lines if line.split()[:1] == ["t"])
    assert header.split() == ["t", "token", "drawn", "by", "sampler", "learner", "weight", "policy", "kl", "entropy",
                              "loss"]  # fmt: skip
    assert "Sample 2: no reward, left out (failed, no verdict); 0 tokens, failed" in lines
    assert lines[-1].endswith("they add up")


def test_a_run_that_only_sampled_has_no_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "rl", PolicyLossConfig(), rollout_only=True)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics[0].pop("train/loss")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    save_groups(folder / "rollouts" / "step_000003.jsonl.gz", groups(), None)
    lines = explain(capsys, folder)
    assert lines[0].startswith("Step 3, group 1 of 4")
    assert lines[-1] == "Nothing was learned in this step (rollout_only): there is no loss to add up to."


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": 9}, ValueError, r"the rollouts of step 9 were not kept; write --step= one of 3, 7$"),
        ({"step": 7}, ValueError, r"metrics.jsonl has no record of step 7: .* or explain an earlier step$"),
        ({"step": 3, "group": 4}, ValueError, r"group=4 is out of range: step 3 has 4 groups, 0 to 3$"),
        ({"run": "nowhere"}, FileNotFoundError, r"nowhere is no run directory"),
        ({"run": ""}, ValueError, r"which run\? `rayllm explain runs/rl --step=40`"),
    ],
)
def test_errors_name_the_cure(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    folder = write_run(tmp_path / "rl", PolicyLossConfig())
    (folder / "rollouts" / "step_000007.jsonl.gz").write_bytes(
        (folder / "rollouts" / "step_000003.jsonl.gz").read_bytes()
    )
    with pytest.raises(error, match=message):
        run(ExplainConfig(**{"run": str(folder), **arguments}))


def test_a_run_without_rollouts_says_how_to_have_them(tmp_path: Path) -> None:
    for samples_every, message in (
        (None, r"samples_every: null; .*--samples-every=10$"),
        (5, r"samples_every=5 steps"),
    ):
        folder = write_run(tmp_path / str(samples_every), PolicyLossConfig(), samples_every=samples_every)
        (folder / "rollouts" / "step_000003.jsonl.gz").unlink()
        with pytest.raises(FileNotFoundError, match=message):
            run(ExplainConfig(run=str(folder)))
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"rl"', '"sft"'))
    with pytest.raises(ValueError, match="is a run of the stage sft; give the run directory of `rayllm rl`"):
        run(ExplainConfig(run=str(folder)))


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rl", PolicyLossConfig())
    command = [sys.executable, "-X", "importtime", "-m", "rayllm", "explain", str(folder), "--step", "3"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and answer.stdout.startswith("Step 3, group 1 of 4"), answer.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "ray"})
