"""Our model, optimizer and engine against numbers computed by nanochat on the same weights (tests/parity)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rayllm
from rayllm.config.schema import ImportNanochatConfig, OptimConfig, SamplingConfig
from rayllm.engine.engine import Engine
from rayllm.model.gpt import GPT
from rayllm.optim.groups import build_optimizer
from rayllm.runs import import_nanochat
from rayllm.text.chat import render_conversation, render_for_completion
from rayllm.text.tokenizer import Tokenizer
from rayllm.types import Conversation, Prompt

REFERENCE = Path(__file__).parents[1] / "parity" / "mha"


@pytest.fixture(scope="module")
def imported_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "model"
    import_nanochat.run(ImportNanochatConfig(source=str(REFERENCE), out=str(out)))
    return out


@pytest.fixture
def loaded(imported_path: Path) -> tuple[GPT, Tokenizer]:
    return rayllm.load(imported_path)


@pytest.fixture(scope="module")
def forward() -> dict[str, torch.Tensor]:
    arrays = np.load(REFERENCE / "forward.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((REFERENCE / "expected.json").read_text(encoding="utf-8"))


def test_logits_match_reference(loaded, forward) -> None:
    model, _ = loaded
    with torch.no_grad():
        logits_BTV = model(forward["tokens"].long())
    assert logits_BTV.shape == (3, 256, model.config.vocab_size)
    torch.testing.assert_close(logits_BTV[:, -1], forward["logits_last"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_BTV[:, 256 // 3], forward["logits_mid"], atol=1e-4, rtol=0)


def test_nll_matches_reference(loaded, forward, expected) -> None:
    model, _ = loaded
    tokens_BT, targets_BT = forward["tokens"].long(), forward["targets"].long()
    with torch.no_grad():
        nll_BT = model(tokens_BT, targets_BT, reduction="none")
        mean = model(tokens_BT, targets_BT)
    assert (targets_BT == -1).any(), "the reference holds ignored targets"
    torch.testing.assert_close(nll_BT, forward["token_nll"], atol=1e-4, rtol=0)
    assert mean.item() == pytest.approx(expected["loss"], abs=1e-5)


def test_gradients_match_reference(loaded, forward, expected) -> None:
    model, _ = loaded
    model(forward["tokens"].long(), forward["targets"].long()).backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-3)


def test_greedy_tokens_match_reference(loaded, expected) -> None:
    model, tokenizer = loaded
    continuation = [token for token, _ in expected["greedy"]["continuation"]]
    sampling = SamplingConfig(temperature=0, max_tokens=len(continuation))
    engine = Engine(model, tokenizer, num_slots=1, max_len=model.config.sequence_len)
    ((completion,),) = engine.generate([Prompt("", tuple(expected["greedy"]["prompt"]))], sampling)
    assert list(completion.token_ids) == continuation


def test_optimizer_trajectory_matches_reference(loaded, expected) -> None:
    model, _ = loaded
    rates = OptimConfig(matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, scalar_lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, rates)
    batches = np.load(REFERENCE / "train_batches.npz")
    losses = []
    for tokens in batches[batches.files[0]]:
        tokens_BT = torch.from_numpy(tokens).long()
        loss = model(tokens_BT, tokens_BT.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["optimizer"]["losses"], abs=1e-3)
    norms = {name: p.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(expected["optimizer"]["param_norms_after"], rel=1e-3)


def test_conversation_matches_reference(loaded, expected) -> None:
    _, tokenizer = loaded
    case = expected["conversation"]
    ids, mask = render_conversation(tokenizer, Conversation.from_dict(case["conversation"]))
    assert (ids, mask) == (case["ids"], case["mask"])
    assert render_for_completion(tokenizer, Conversation.from_dict(case["completion_of"])) == case["completion_ids"]
