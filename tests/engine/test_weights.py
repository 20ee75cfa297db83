"""New weights under way: what runs goes on under them, or ends first."""

from __future__ import annotations

import pytest
import torch

from rayllm.config.schema import SamplingConfig
from rayllm.engine.request import Request
from rayllm.engine.sampling import stable_seed

SAMPLING = SamplingConfig(max_tokens=60, seed=2)


def test_what_runs_goes_on_under_the_new_weights(lab) -> None:
    """Swapped at any point, once in the middle of a prompt, once twice in a row."""
    models = {version: lab.model(seed, torch.float64) for version, seed in ((0, 5), (3, 7), (4, 11), (9, 5))}
    engine = lab.engine(lab.model(5, torch.float64), chunk_len=16, num_slots=3, calculator=lambda code: "out")
    handles = [engine.submit(Request(lab.prompt(text), SAMPLING, 2)) for text in ("one", "another", "x" * 100)]
    for num_steps, version in ((4, 3), (13, 4), (0, 9)):
        for _ in range(num_steps):
            engine.step()
        engine.load(models[version].state_dict(), version)
        assert engine.weights_version == version
    lab.run(engine)
    for handle in handles:
        for i, completion in enumerate(handle.completions()):
            assert sum(count for _, count in completion.weights_versions) == len(completion.token_ids)
            seed = stable_seed(2, handle.request.prompt.prompt_id, i)
            lab.check(completion, handle.request.prompt.token_ids, SAMPLING, seed, models)
    first = handles[0].completions()[0].weights_versions
    assert [version for version, _ in first] == [0, 3, 9] and first[0] == (0, 4)


def test_to_drain_ends_what_runs_and_starts_the_rest_under_the_new_weights(lab) -> None:
    models = {0: lab.model(5, torch.float64), 1: lab.model(7, torch.float64)}
    engine = lab.engine(lab.model(5, torch.float64), num_slots=2)
    sampling = SamplingConfig(max_tokens=30, seed=2)
    texts = ["one", "another", "third", "fourth", "one"]
    handles = [engine.submit(Request(lab.prompt(text), sampling)) for text in texts]
    for _ in range(5):
        engine.step()
    engine.load(models[1].state_dict(), 1, drain=True)
    assert engine.weights_version == 0, "not before they have ended"
    lab.run(engine)
    assert engine.weights_version == 1
    versions = [[version for version, _ in handle.completions()[0].weights_versions] for handle in handles]
    assert versions == [[0], [0], [1], [1], [1]]
    for handle in handles:
        seed = stable_seed(2, handle.request.prompt.prompt_id, 0)
        lab.check(handle.completions()[0], handle.request.prompt.token_ids, sampling, seed, models)


def test_while_it_drains_no_prompt_is_computed_in_vain(lab) -> None:
    engine = lab.engine(lab.model(5), num_slots=2)
    engine.submit(Request(lab.prompt("one"), SAMPLING))
    engine.step()
    engine.load(lab.model(7).state_dict(), 1, drain=True)
    engine.submit(Request(lab.prompt("another"), SAMPLING))
    for _ in range(5):
        engine.step()
        assert len(engine._scheduler.prefixes) == 1
    lab.run(engine)
    assert engine.weights_version == 1


def test_to_drain_an_idle_engine_is_to_load(lab) -> None:
    engine = lab.engine(lab.model(5))
    engine.load(lab.model(7).state_dict(), 1, drain=True)
    assert engine.weights_version == 1


def test_weights_that_wait_for_the_last_sequence_are_taken_with_its_end(lab) -> None:
    """Who steps an engine only while it has work must not find the old version for ever."""
    engine = lab.engine(lab.scripted({}))
    engine.submit(Request(lab.prompt("a"), SAMPLING))
    engine.step()
    engine.load(lab.scripted({}).state_dict(), 1, drain=True)
    lab.run(engine)
    assert engine.weights_version == 1


@pytest.mark.parametrize("drain", [False, True])
def test_what_is_cached_of_old_weights_is_never_used(lab, drain: bool) -> None:
    engine, new = lab.engine(lab.model(5, torch.float64)), lab.model(7, torch.float64)
    prompt = lab.prompt("the very same prompt, twenty tokens and more")
    ((old,),) = engine.generate([prompt], SAMPLING)
    running = engine.submit(Request(prompt, SamplingConfig(max_tokens=10)))
    engine.step()
    engine.load(new.state_dict(), 1, drain=drain)
    longer = lab.prompt("the very same prompt, twenty tokens and more, and more")
    for again in (prompt, longer):
        ((completion,),) = engine.generate([again], SAMPLING)
        lab.check(completion, again.token_ids, SAMPLING, stable_seed(2, again.prompt_id, 0), {1: new})
        assert completion.token_ids != old.token_ids
    assert running.is_done


def test_weights_of_another_model_change_nothing(lab) -> None:
    model = lab.model(5)
    engine = lab.engine(lab.model(5))
    handle = engine.submit(Request(lab.prompt("a"), SAMPLING))
    for _ in range(9):
        engine.step()
    state = lab.model(7).state_dict()
    missing = {name: weight for name, weight in state.items() if name != "smear_lambda"}
    wider = {**state, "transformer.h.1.mlp.c_fc.weight": torch.zeros(129, 32)}
    for bad, told in (
        (missing, r"1 tensors differ, e.g. smear_lambda: expected \(1,\), got None"),
        (wider, r"1 tensors differ, e.g. transformer.h.1.mlp.c_fc.weight: expected \(128, 32\), got \(129, 32\)"),
        ({**state, "extra": torch.zeros(2)}, r"e.g. extra: expected None, got \(2,\)"),
    ):
        for drain in (False, True):
            with pytest.raises(ValueError, match=told):
                engine.load(bad, 4, drain=drain)
    assert engine.weights_version == 0
    lab.run(engine)
    ((expected,),) = lab.engine(model).generate([lab.prompt("a")], SAMPLING)
    assert handle.completions() == [expected]
