"""When a policy has left its best."""

from __future__ import annotations

from rayllm.config.rl_schema import GuardConfig
from rayllm.training.guard import CollapseGuard


def validation(score: float, stderr: float = 0.02) -> dict[str, float]:
    return {"val/pass@1": score, "val/pass@1_stderr": stderr}


def test_a_fall_beyond_chance_is_a_reason_and_less_is_not() -> None:
    guard = CollapseGuard(GuardConfig())
    for score, is_best in ((0.4, True), (0.38, False), (0.5, True), (0.47, False), (0.5, False)):
        assert guard.look_at_validation(validation(score)) is None
        assert guard.is_best(validation(score)) is is_best
    reason = guard.look_at_validation(validation(0.45))
    assert reason is not None and "45.0%" in reason and "50.0%" in reason
    assert guard.best == validation(0.5)


def test_a_score_that_is_no_number_is_never_the_best_and_always_a_reason() -> None:
    guard = CollapseGuard(GuardConfig(), validation(0.5))
    assert not guard.is_best(validation(float("nan")))
    assert guard.look_at_validation(validation(float("nan"))) is not None


def test_each_watch_can_be_switched_off() -> None:
    off = CollapseGuard(GuardConfig(max_drop=None, max_kl=None, min_entropy=None), validation(0.9))
    assert off.look_at_validation(validation(0.0)) is None
    assert off.look_at_step({"train/mismatch_kl": 99.0, "train/entropy": 0.0}) is None


def test_distance_and_entropy_are_watched() -> None:
    guard = CollapseGuard(GuardConfig(max_kl=0.5, min_entropy=0.1))
    assert guard.look_at_step({"train/mismatch_kl": 0.1, "train/entropy": 0.2}) is None
    assert guard.look_at_step({}) is None, "a step without a signal tells nothing"
    assert "0.6 nats" in str(guard.look_at_step({"train/mismatch_kl": 0.6, "train/entropy": 0.2}))
    assert "0.05 nats" in str(guard.look_at_step({"train/mismatch_kl": 0.1, "train/entropy": 0.05}))
    assert guard.look_at_step({"train/mismatch_kl": float("nan")}) is not None
