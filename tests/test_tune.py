"""The clock: order, what is stored, and what a disturbed run may say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparsec.codegen import tune
from sparsec.codegen.kernel import Problem
from sparsec.codegen.tune import Timing

PROBLEM = Problem("linear", 64, 32, "float32", 200, batches=(8,), threads=2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each sample takes, in the order of the calls; contenders do nothing themselves."""
    script: list[float] = []
    samples: Iterator[float] = iter(())

    def sample(run: object, repeat: int) -> float:
        nonlocal samples
        run()  # type: ignore[operator]
        value = next(samples, None)
        if value is None:
            samples = iter(script)
            value = next(samples)
        return value

    monkeypatch.setattr(tune, "_sample", sample)
    monkeypatch.setattr(tune, "_calibrate", lambda run: 1)
    return script


def test_contenders_take_turns(clock: list[float]) -> None:
    clock.extend([1e-3, 2e-3])
    calls: list[str] = []
    timing = tune.measure([lambda: calls.append("a"), lambda: calls.append("b")])
    assert calls == ["a", "b"] * tune.ROUNDS
    assert timing == Timing((1000.0, 2000.0), tune.ROUNDS, True)


def test_a_disturbed_run_adds_rounds_and_answers_with_the_best(clock: list[float]) -> None:
    clock.extend([1e-3, 9e-3, 5e-3, 1e-3, 20e-3])
    timing = tune.measure([lambda: None])
    assert timing.rounds == tune.MAX_ROUNDS and not timing.steady and timing.us == (1000.0,)


def test_stored_timings_come_back_and_disturbed_ones_are_not_stored() -> None:
    key = tune.decision_key(PROBLEM, 8, ["one"], "this machine")
    tune.remember(key, Timing((1.0, 2.0), 9, steady=False))
    assert tune.recall(key, 2) is None
    tune.remember(key, Timing((1.0, 2.0), 9))
    assert tune.recall(key, 2) == Timing((1.0, 2.0), 9)
    assert tune.recall(key, 3) is None


def test_the_key_holds_what_a_timing_depends_on() -> None:
    base = tune.decision_key(PROBLEM, 8, ["one"], "m")
    assert base == tune.decision_key(PROBLEM, 8, ["one"], "m")
    others = [
        tune.decision_key(PROBLEM, 9, ["one"], "m"),
        tune.decision_key(PROBLEM, 8, ["two"], "m"),
        tune.decision_key(PROBLEM, 8, ["one"], "n"),
        tune.decision_key(Problem("linear", 64, 32, "float32", 900, threads=2), 8, ["one"], "m"),
        tune.decision_key(Problem("linear", 64, 32, "float32", 200, threads=1), 8, ["one"], "m"),
    ]
    assert len({base, *others}) == 6


def test_real_functions_are_timed() -> None:
    timing = tune.measure([lambda: sum(range(10)), lambda: sum(range(200))])
    assert len(timing.us) == 2 and all(us > 0 for us in timing.us)
