"""Dependency groups as a granularity, and HESSO: whole units go, and the zeroed model shrinks to its equal."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structure_models import make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsec
from sparsec.errors import SpecError
from sparsec.sparsifiers import Calibration, Hesso, Structured, dependency_groups, shrink, sparsify
from sparsec.sparsifiers.scores import Taylor
from sparsec.sparsifiers.structure import Group


@cache
def analysed(name: str) -> tuple[nn.Module, tuple[Any, ...], tuple[Group, ...]]:
    model, example = make(name)
    return model, example, tuple(dependency_groups(model, example))


def square(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.square().mean()


@pytest.mark.parametrize("name", ["residual", "concat", "inverted", "attention"])
@pytest.mark.parametrize("scope", ["group", "global"])
def test_sparsify_by_groups_zeroes_what_shrink_removes(name: str, scope: str) -> None:
    model, example, groups = analysed(name)
    before = copy.deepcopy(model.state_dict())
    data = Calibration([example], loss=square)
    pruned = sparsify(model, Structured(0.5, groups, rank=Taylor(), scope=scope), data=data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    usable = [g for g in groups if g.prunable]
    empty = [g.empty(pruned) for g in usable]
    if scope == "group":
        assert [len(g.chosen) for g in empty] == [round(0.5 * g.size) for g in usable]
    else:
        assert sum(len(g.chosen) for g in empty) == round(0.5 * sum(g.size for g in usable))
        assert all(len(g.chosen) < g.size for g in empty)
    small = shrink(pruned, [g for g in empty if g.chosen])
    assert float((small(*example) - pruned(*example)).detach().abs().max()) < 1e-6
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert len(sparsec.report(pruned).rows) == len(pruned._sparsec_report)


def test_units_are_ranked_by_the_mean_score_of_all_their_entries() -> None:
    model, _, groups = analysed("plain")
    pruned = sparsify(model, Structured(0.25, groups))
    first = next(g for g in groups if g.name == "first")
    state = model.state_dict()
    own, read = state["first.weight"].abs(), state["second.weight"].abs()
    worth = (own.flatten(1).sum(1) + read.sum((0, 2, 3))) / (own[0].numel() + read[:, 0].numel())
    assert sorted(first.empty(pruned).chosen) == sorted(worth.argsort()[:2].tolist())
    gone = list(first.empty(pruned).chosen)
    for key in ("first.weight", "first.bias", "norm.weight", "norm.bias"):
        assert bool((pruned.state_dict()[key][gone] == 0).all())
    rows = {r["site"]: r for r in pruned._sparsec_report}
    assert rows["first"]["density"] == 0.75 and "Structured(0.25" in rows["first"]["reason"]


def test_bad_groups_are_typed_errors() -> None:
    model, example, groups = analysed("plain")
    for make_it, message in (
        (lambda: Structured(1.0, groups), "sparsity=1.0"),
        (lambda: Structured(0.5, ()), "a prunable one among them"),
        (lambda: Structured(0.5, (3,)), "got 3"),  # type: ignore[arg-type]
        (lambda: Structured(0.5, groups, scope="all"), "scope='all'; valid: 'group', 'global'"),
        (lambda: sparsify(analysed("residual")[0], Structured(0.5, groups)), "no '"),
        (lambda: sparsify(model, Structured(0.5, groups, rank=Taylor())), "Structured calibrates; pass data="),
        (lambda: Hesso(model, groups, 0.99), "leaves no unit in some"),
        (lambda: Hesso(model, groups, 0.5, periods=0), "periods is positive"),
        (lambda: Hesso(analysed("residual")[0], groups, 0.5), "no '"),
    ):
        with pytest.raises(SpecError, match=message):
            make_it()
    assert example


# HESSO on digits


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def fit(model: nn.Module, steps: int, pruner: Hesso | None = None) -> float:
    x, y = digits()
    adam = torch.optim.Adam(model.train().parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        part = torch.randint(1300, (64,), generator=generator)
        adam.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        adam.step()
        if pruner is not None:
            pruner.step()
    with torch.no_grad():
        return float((model.eval()(x[1300:]).argmax(1) == y[1300:]).float().mean())


def test_hesso_halves_a_digits_network_within_two_points() -> None:
    x, _ = digits()
    dense = fit(network(), 360)
    model = network()
    groups = [g for g in dependency_groups(model, x[:2]) if g.prunable]
    pruner = Hesso(model, groups, 0.5, begin=60, periods=10, steps=10)
    accuracy = fit(model, 360, pruner)
    assert pruner.done and sum(len(g.chosen) for g in pruner.chosen) == round(0.5 * sum(g.size for g in groups))
    assert [g.empty(model).chosen for g in pruner.chosen] == [g.chosen for g in pruner.chosen]  # exactly zero
    small = shrink(model, pruner.chosen)
    zeroed, sample = copy.deepcopy(model).double(), x[:50].double()
    assert float((copy.deepcopy(small).double()(sample) - zeroed(sample)).detach().abs().max()) < 1e-6
    assert dense > 0.95 and accuracy >= dense - 0.02
    first, second = small[0].out_channels, small[4].out_channels
    assert first + second == 28
    expected = {small: (first, second), model: (24, 32)}
    for net, (a, b) in expected.items():
        with FlopCounterMode(display=False) as flops:
            net(x[:1])
        assert flops.get_total_flops() == 2 * (64 * 9 * a + 16 * 9 * a * b + 4 * b * 10)
        assert sum(p.numel() for p in net.parameters()) == 12 * a + 9 * a * b + 3 * b + 40 * b + 10


def test_hesso_leaves_the_others_to_their_optimiser() -> None:
    x, _ = digits()
    plain, pruned = network(), network()
    groups = [g for g in dependency_groups(pruned, x[:2]) if g.prunable]
    fit(plain, 5)
    fit(pruned, 5, Hesso(pruned, groups, 0.5, begin=100))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), pruned.parameters(), strict=True))
    sizes, pruner = [], Hesso(pruned, groups[:1], 0.5, steps=6)
    for _ in range(6):
        pruner.step()
        sizes.append(sum(float(g.gather(pruned)[list(g.chosen)].norm()) for g in pruner.chosen))
    ratios = [b / a for a, b in itertools.pairwise(sizes)]
    assert ratios[:4] == pytest.approx([4 / 5, 3 / 4, 2 / 3, 1 / 2], rel=1e-5) and sizes[-1] == 0
