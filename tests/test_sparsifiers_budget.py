"""A budget in measured milliseconds: the allocator under given reports, and through a real compile with given times."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.errors import SpecError
from sparsec.report import Report, Row
from sparsec.sparsifiers import Magnitude, Sensitivity, sparsify
from sparsec.sparsifiers.layers import find_layers

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def chain(count: int, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def report(model: nn.Sequential, level: float, dense_us: list[float], gains: list[float]) -> Report:
    """Times as a machine might give them: the more zeros the faster, dense where the kernel loses."""
    rows = []
    for layer, dense, gain in zip(find_layers(model), dense_us, gains, strict=True):
        sparse = dense * (1 - level) / gain + 0.02 * dense
        decision = "sparse" if sparse < dense else "dense"
        rows.append(Row(layer.site, decision=decision, dense_us=dense, sparse_us=sparse))
    return Report(rows)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.95))
def test_what_is_spent_is_the_budget_within_5_percent(seed: int, share: float) -> None:
    """36 layers, as MiniLM has, of three speeds."""
    model, rng = chain(36, 8), np.random.default_rng(seed)
    dense = rng.uniform(50, 500, 3).tolist() * 12
    gains = rng.uniform(0.5, 1.2, 3).tolist() * 12
    timings = {level: report(model, level, dense, gains) for level in LEVELS}
    least = timings[LEVELS[-1]].totals().us / 1e3
    budget = least + share * (sum(dense) / 1e3 - least)
    method = Magnitude(Sensitivity(budget, "ms", timings=timings))
    layers, allocator = find_layers(model), method.allocator
    zeros = method.zeros(layers)
    assert isinstance(allocator, Sensitivity)
    chosen = [min(allocator.all_levels, key=lambda s: abs(round(s * 64) - z)) for z in zeros]
    spent = sum(allocator.cost(x, s) for x, s in zip(layers, chosen, strict=True))
    assert 0.95 * budget <= spent <= budget * (1 + 1e-9)


def test_the_choice_is_the_same_every_time_and_the_best_of_all() -> None:
    model = chain(4)
    timings = {level: report(model, level, [400, 300, 200, 100], [1, 0.8, 1.2, 0.9]) for level in (0.5, 0.9)}
    method = Sensitivity(0.45, "ms", timings=timings)
    layers, levels = find_layers(model), method.all_levels
    score = lambda layer: layer.weight.detach().abs()  # noqa: E731
    found = method.zeros(layers, score)
    assert found == method.zeros(layers, score)

    def lost(choice: tuple[float, ...]) -> float:
        total = 0.0
        for layer, level in zip(layers, choice, strict=True):
            values = layer.weight.detach().abs().flatten().sort().values
            total += float(values[: round(level * len(values))].sum() / values.sum())
        return total

    options = [c for c in itertools.product(levels, repeat=4) if sum(map(method.cost, layers, c)) <= 0.45]
    best = min(options, key=lost)
    chosen = tuple(z / 1024 for z in found)
    assert lost(tuple(min(levels, key=lambda s: abs(s - c)) for c in chosen)) <= lost(best) + 0.01


def test_a_compiled_model_takes_what_was_budgeted() -> None:
    """The whole way, analyze, choose, prune, compile, on the cost model's milliseconds, which never vary."""
    model, x = chain(8, 256), torch.randn(16, 256)
    levels = (0.5, 0.7, 0.95)
    timings = {s: sparsec.analyze(sparsify(model, Magnitude(s)), None, x, tune="model") for s in levels}
    least, most = (t.totals().us / 1e3 for t in (timings[0.95], timings[0.5]))
    assert least < 0.5 * most
    for share in (0.3, 0.8):
        budget = least + share * (most - least)
        pruned = sparsify(model, Magnitude(Sensitivity(budget, "ms", timings=timings)))
        compiled = sparsec.compile(pruned, None, x, tune="model")
        measured = sparsec.report(compiled).totals().us / 1e3
        assert 0.95 * budget <= measured <= 1.05 * budget
        torch.testing.assert_close(compiled(x), pruned(x), rtol=1e-4, atol=1e-4)


def test_a_module_that_is_used_twice_costs_twice() -> None:
    model = chain(2)
    rows = [
        Row("0", decision="sparse", dense_us=10, sparse_us=4),
        Row("0#2", decision="sparse", dense_us=12, sparse_us=5),
    ]
    timings = {0.5: Report([*rows, Row("1", decision="dense", dense_us=7, sparse_us=9)])}
    method = Sensitivity(1.0, "ms", timings=timings)
    first, second = find_layers(model)
    assert method.cost(first, 0.5) == pytest.approx(9e-3) and method.cost(first, 0.0) == pytest.approx(22e-3)
    assert method.cost(second, 0.5) == method.cost(second, 0.0) == pytest.approx(7e-3)


def test_budgets_that_cannot_be_met_are_errors() -> None:
    model = chain(2)
    timings = {0.5: report(model, 0.5, [100, 100], [1, 1])}
    with pytest.raises(SpecError, match=r"budget 0.05 ms; the sparsest levels need 0.104"):
        sparsify(model, Magnitude(Sensitivity(0.05, "ms", timings=timings)))
    untimed = {0.5: Report([Row("0"), Row("1")])}
    with pytest.raises(SpecError, match="the report has no time for '0'; analyze with example inputs"):
        sparsify(model, Magnitude(Sensitivity(1.0, "ms", timings=untimed)))
    with pytest.raises(SpecError, match="no site '0'"):
        sparsify(model, Magnitude(Sensitivity(1.0, "ms", timings={0.5: Report([Row("a")])})))
