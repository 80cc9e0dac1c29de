"""Co-permutation: outputs do not change, and blocks of four rows keep more magnitude on every layer that moves."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from structure_models import ZOO, Plain, make
from torch import nn

import sparsec
from sparsec.errors import SpecError
from sparsec.sparsifiers.structure import Group, KeptMagnitude, co_permute, dependency_groups, permute
from sparsec.sparsifiers.structure_permute import _clustered, _Matrices, _swapped
from sparsec.sparsifiers.structure_shrink import outputs

NETWORKS = ["residual", "concat", "inverted", "attention", "llama"]


@cache
def permuted(name: str) -> tuple[nn.Module, tuple[Any, ...], nn.Module, dict[str, tuple[int, ...]]]:
    model, example = make(name)
    return (model, example, *co_permute(model, example))


@cache
def analysed(name: str) -> tuple[nn.Module, tuple[Any, ...], list[Group]]:
    model, example = make(name)
    return model, example, dependency_groups(model, example)


def largest_difference(a: nn.Module, b: nn.Module, example: tuple[Any, ...]) -> float:
    pairs = zip(outputs(a, (example, {})), outputs(b, (example, {})), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_and_every_moved_layer_keeps_more(name: str):
    if name == "llama":
        pytest.importorskip("transformers")
    model, example, moved, orders = permuted(name)
    assert orders and largest_difference(model, moved, example) < 1e-5
    before, after, score = _Matrices(model).found, _Matrices(moved).found, KeptMagnitude()
    groups = {g.name: g for g in analysed(name)[2]}
    raised = []
    for group in orders:
        for part in groups[group].slices:
            key = (part.parameter, part.dim)
            if key in before:
                assert score(after[key]) >= score(before[key]), key
                raised.append(score(after[key]) > score(before[key]))
                assert not torch.equal(after[key], before[key])
    assert all(raised), f"{raised.count(False)} of {len(raised)} layers stayed level"
    free = [g for g in groups.values() if g.permutable and g.kind == "channels" and g.size > 4]
    assert {g.name for g in free} <= set(orders), "a group of channels found no better order"


def test_float32_within_1e_5():
    model, example = make("residual", torch.float32)
    moved, orders = co_permute(model, example)
    assert orders and largest_difference(model, moved, example) < 1e-5


@pytest.mark.parametrize("name", list(ZOO))
def test_any_order_that_the_groups_allow_changes_nothing(name: str):
    model, example, groups = analysed(name)
    rng = np.random.default_rng(0)
    orders = {g.name: tuple(int(u) for u in rng.permutation(g.size)) for g in groups if g.permutable}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moved = permute(model, groups, orders)
    assert largest_difference(model, moved, example) < 1e-9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    changed = [k for k, v in moved.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) > len(before) // 2
    inverse = {name: tuple(int(i) for i in np.argsort(order)) for name, order in orders.items()}
    back = permute(moved, groups, inverse)
    assert all(torch.equal(v, before[k]) for k, v in back.state_dict().items())


def test_planted_patterns_are_gathered():
    """Rows of four kinds in a shuffled order: four by one blocks at 75 % then lose nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 4)).double()
    kinds = torch.randperm(16) % 4
    with torch.no_grad():
        mask = torch.zeros(16, 16, dtype=torch.bool)
        for row, kind in enumerate(kinds.tolist()):
            mask[row, kind * 4 : kind * 4 + 4] = True
        model[0].weight.copy_(torch.where(mask, 1 + torch.rand(16, 16, dtype=torch.float64), 0.0))
    score = KeptMagnitude(4, 0.25)
    assert score(model[0].weight.detach()) < 0.8
    moved, orders = co_permute(model, torch.randn(3, 16, dtype=torch.float64), score)
    assert score(moved[0].weight.detach()) == pytest.approx(1)
    assert all(len(set(kinds[list(orders["0"][i : i + 4])].tolist())) == 1 for i in range(0, 16, 4))


def test_a_score_of_ones_own_decides():
    model, example = make("plain")
    calls: list[torch.Size] = []

    def flat(matrix: torch.Tensor) -> float:
        calls.append(matrix.shape)
        return 0.0

    moved, orders = co_permute(model, example, flat)
    assert orders == {} and calls and largest_difference(model, moved, example) == 0
    assert {tuple(s) for s in calls} == {(8, 27), (6, 72)}


def test_swaps_reach_what_greedy_misses():
    rows = torch.rand(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gram = (rows @ rows.t()).numpy()

    def value(order: list[int]) -> float:
        return sum(gram[np.ix_(order[i : i + 4], order[i : i + 4])].sum() for i in (0, 4))

    halves = [[*c, *(set(range(8)) - set(c))] for c in itertools.combinations(range(8), 4)]
    best = max(value(order) for order in halves)
    start = list(range(8))
    found = _swapped(gram, _clustered(gram, 4), 4)
    assert sorted(found) == start and value(found) >= value(_clustered(gram, 4))
    assert value(found) >= best - 0.02 * abs(best) and value(found) > value(start)


def test_kept_magnitude_counts_blocks():
    matrix = torch.tensor([[1.0, 0], [1, 0], [0, 3], [0, 1], [5, 0]])
    assert KeptMagnitude(2, 0.5)(matrix) == pytest.approx((5 + 4 + 2) / 11)
    assert KeptMagnitude(2, 1.0)(matrix) == pytest.approx(1) and KeptMagnitude()(torch.zeros(4, 2)) == 1


def test_bad_input_is_a_typed_error():
    model, example, groups = analysed("plain")
    with pytest.raises(SpecError, match="score"):
        co_permute(model, example, "l2")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="finite"):
        co_permute(model, example, lambda matrix: float("nan"))
    with pytest.raises(SpecError):
        co_permute(model, None)
    for orders in ({"first": (0,)}, {"first": (0,) * 8}, {"nothing": (0,)}, {"head": (1, 0, 2, 3, 4)}):
        with pytest.raises(SpecError, match="cannot permute group"):
            permute(model, groups, orders)
    assert isinstance(sparsec.co_permute(Plain(), (torch.randn(1, 3, 8, 8),))[0], Plain)
