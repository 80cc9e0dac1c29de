"""Methods: second order against its definitions, selectors, allocators, granularities, evaluation."""

from __future__ import annotations

import itertools
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsec.errors import InputError, SpecError
from sparsec.formats import NM
from sparsec.report import Report, Row
from sparsec.sparsifiers import (
    ER,
    ERK,
    Block,
    Calibration,
    Compose,
    DSnoT,
    Element,
    FanIn,
    Filter,
    GlobalShare,
    Grid,
    GroupedNM,
    GroupEnvelope,
    Kernel,
    Magnitude,
    NetTrim,
    OBSUpdate,
    Random,
    Refit,
    Sample,
    Sensitivity,
    SoftShrink,
    SparseGPT,
    Sparsifier,
    Threshold,
    Wanda,
    calibrate,
    sparsify,
)
from sparsec.sparsifiers.allocators import knapsack
from sparsec.sparsifiers.evaluate import (
    Point,
    Tradeoff,
    agreement,
    class_gaps,
    layer_errors,
    output_cosine,
    random_search,
)
from sparsec.sparsifiers.hessian import damped, sweep, upper_inverse
from sparsec.sparsifiers.layers import find_layers
from sparsec.sparsifiers.least_squares import refit
from sparsec.sparsifiers.scores import OBS, TimesNorm
from sparsec.sparsifiers.selectors import inclusion


def correlated(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Gaussian rows with a dense covariance and scales from 0.3 to 3."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(rows, features, generator=generator) @ (mix * torch.linspace(0.3, 3, features))


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


def error(dense: nn.Linear, pruned: Any, x: torch.Tensor) -> float:
    return float(((pruned.weight - dense.weight).detach() @ x.T).square().sum())


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(64, 48)


X = correlated(1000, 64)


# Second order


@pytest.mark.parametrize("target", [0.5, NM(2, 4)], ids=repr)
def test_on_correlated_inputs_second_order_beats_wanda_beats_magnitude(layer: nn.Linear, target: Any) -> None:
    methods = (Magnitude, Wanda, lambda t: SparseGPT(t, refit=False), SparseGPT)
    found = [sparsify(layer, m(target), data=[X]) for m in methods]
    assert all(zeros(p.weight) == 64 * 48 // 2 for p in found)
    errors = [error(layer, p, X) for p in found]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.8 * errors[0]
    if isinstance(target, NM):
        assert all(NM(2, 4).refuse(p.weight.detach()) is None for p in found)


def test_with_an_identity_hessian_it_is_magnitude(layer: nn.Linear) -> None:
    x = torch.linalg.qr(correlated(200, 64))[0] * 200**0.5
    for target in (0.5, NM(2, 4)):
        a, b = sparsify(layer, SparseGPT(target), data=[x]), sparsify(layer, Magnitude(target))
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(a.weight == 0, b.weight == 0)


def test_one_dropped_column_gets_the_exact_obs_update() -> None:
    """When only the first column goes, the sweep is Optimal Brain Surgeon: w - w_0 / [H^-1]_00 * H^-1_0:."""
    x, weight = correlated(500, 6).double(), torch.randn(3, 6).double()
    hessian = damped(x.T @ x, 500, 0.0)
    kept = torch.ones(3, 6, dtype=torch.bool)
    kept[:, 0] = False
    found, _ = sweep(weight, upper_inverse(hessian), 0, kept=kept, block=4)
    inverse = torch.linalg.inv(x.T @ x / 500)
    expected = weight - weight[:, :1] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(found, expected.masked_fill(~kept, 0))
    best = refit(weight, weight * kept, kept, x.T @ x / 500, steps=200, tolerance=1e-12)
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 40), sparsity=st.floats(0, 0.99), block=st.integers(1, 50),
    unit=st.sampled_from([Element(), Element("row")]),
)  # fmt: skip
def test_counts_of_the_sweep_are_exact(rows: int, cols: int, sparsity: float, block: int, unit: Any) -> None:
    layer = nn.Linear(cols, rows)
    pruned = sparsify(layer, SparseGPT(sparsity, block=block, unit=unit), data=[correlated(50, cols)])
    assert zeros(pruned.weight) == round(sparsity * rows * cols)


def test_existing_zeros_stay_and_count(layer: nn.Linear) -> None:
    half = sparsify(layer, Magnitude(0.5))
    for method in (SparseGPT(0.6), Wanda(0.6), Refit(SparseGPT(0.6)), DSnoT(Magnitude(0.6)), SparseGPT(NM(3, 4))):
        again = sparsify(half, method, data=[X]).weight
        assert bool((again[half.weight == 0] == 0).all()), method
    assert zeros(sparsify(half, SparseGPT(0.6), data=[X]).weight) >= round(0.6 * 64 * 48)


def test_a_singular_hessian_is_damped_and_said(layer: nn.Linear) -> None:
    x = X[:5].clone()
    x[:, 10] = 0
    pruned = sparsify(layer, SparseGPT(0.5, damp=0.0), data=[x])
    assert bool(pruned.weight.isfinite().all()) and zeros(pruned.weight) == 1536
    (row,) = pruned._sparsec_report
    assert "the Hessian is singular: damping raised from 0 to" in row["reason"]
    assert bool((pruned.weight[:, 10] == 0).all())  # a feature that is always zero goes first
    with pytest.raises(SpecError, match="damp=-1"):
        SparseGPT(0.5, damp=-1)


def test_obs_update_of_another_scores_mask(layer: nn.Linear) -> None:
    plain, updated = Wanda(0.5), Compose(0.5, TimesNorm(), Element("row"), update=OBSUpdate())
    a, b = sparsify(layer, plain, data=[X]), sparsify(layer, updated, data=[X])
    assert torch.equal(a.weight == 0, b.weight == 0)
    assert error(layer, b, X) < 0.7 * error(layer, a, X)


def test_joint_quantisation(layer: nn.Linear) -> None:
    pruned = sparsify(layer, SparseGPT(0.5, grid=Grid(4, group=16)), data=[X])
    weight = layer.weight.detach()
    for row, part in itertools.product(range(3), range(4)):
        assert len(pruned.weight[row, 16 * part : 16 * part + 16].unique()) <= 16
    nearest = Grid(4, group=16).nearest(sparsify(layer, Wanda(0.5), data=[X]).weight.detach())
    assert error(layer, pruned, X) < float(((nearest - weight) @ X.T).square().sum())
    only = sparsify(layer, SparseGPT(0.0, grid=Grid(3)), data=[X])
    rounded = Grid(3).nearest(weight)
    assert error(layer, only, X) < 0.8 * float(((rounded - weight) @ X.T).square().sum())


CONV_METHODS = [
    Wanda(0.5), SparseGPT(0.5), SparseGPT(NM(2, 4)), Refit(Wanda(NM(2, 4))), Refit(SparseGPT(0.5)), DSnoT(NM(2, 4)),
    Compose(0.5, OBS(), Block(1, 4)), SparseGPT(0.5, unit=Kernel()), NetTrim(0.5),
]  # fmt: skip


@pytest.mark.parametrize("method", CONV_METHODS, ids=repr)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(method: Sparsifier, groups: int) -> None:
    conv, x = nn.Conv2d(8, 6, 3, padding=1, groups=groups), correlated(3 * 8 * 7, 7).reshape(3, 8, 7, 7)
    pruned = sparsify(conv, method, data=[x])
    assert zeros(pruned.weight) == conv.weight.numel() // 2
    loss = float((pruned(x) - conv(x)).detach().square().sum())
    random = sparsify(conv, Random(0.5))
    assert loss < float((random(x) - conv(x)).detach().square().sum())
    if isinstance(method.sparsity if hasattr(method, "sparsity") else None, NM):
        rows = pruned.weight.detach().permute(0, 2, 3, 1).reshape(-1, 8 // groups)
        assert NM(2, 4).refuse(rows) is None


# Granularities and selectors


@pytest.mark.parametrize(
    ("unit", "count"),
    [
        (FanIn(), 8 * 24 // 2), (Block(1, 4), 96), (Block(4, 1), 96), (Block(2, 3), 96), (Filter(), 96),
        (Element("row"), 96), (Block(3, 5), None),
    ],
    ids=repr,
)  # fmt: skip
def test_units_are_dropped_whole(unit: Any, count: int | None) -> None:
    pruned = sparsify(nn.Linear(24, 8), Compose(0.5, unit=unit)).weight.detach()
    if count is not None:
        assert zeros(pruned) == count
    if isinstance(unit, (FanIn, Element)):
        assert ((pruned == 0).sum(1) == 12).all()
    if isinstance(unit, Block):
        for i, j in itertools.product(range(0, 8, unit.r), range(0, 24, unit.c)):
            block = pruned[i : i + unit.r, j : j + unit.c]
            assert zeros(block) in (0, block.numel())


def test_kernels_and_n_m_g() -> None:
    conv = sparsify(nn.Conv2d(4, 6, 3), Compose(0.5, unit=Kernel())).weight
    sums = (conv == 0).sum((2, 3))
    assert set(sums.unique().tolist()) == {0, 9} and int((sums == 9).sum()) == 12
    with pytest.raises(SpecError, match="no convolution and has no kernels"):
        sparsify(nn.Linear(4, 4), Compose(0.5, unit=Kernel()))
    layer = nn.Linear(6 * 2 * 4, 5)
    kept = sparsify(layer, Compose(0.5, unit=GroupedNM(2, 4, 2))).weight.detach().reshape(5, 12, 4) != 0
    for row in kept:
        _, counts = row.unique(dim=0, return_counts=True)
        assert counts.tolist() == [2] * 6
    plain = sparsify(layer, Magnitude(NM(2, 4))).weight.abs().sum()
    assert float((layer.weight.abs() * kept.reshape(5, -1)).sum() / plain) > 0.9
    with pytest.raises(SpecError, match="which chunks of 48"):
        sparsify(nn.Linear(24, 4), Compose(0.5, unit=GroupedNM(2, 4, 2)))


def test_threshold_and_soft_shrink(layer: nn.Linear) -> None:
    pruned = sparsify(layer, Compose(0.0, choose=Threshold(0.05))).weight
    assert torch.equal(pruned != 0, layer.weight.abs() >= 0.05)
    shrunk = sparsify(layer, Compose(0.5, update=SoftShrink())).weight
    cut = layer.weight.abs().flatten().kthvalue(64 * 48 // 2).values
    torch.testing.assert_close(shrunk, layer.weight.sign() * (layer.weight.abs() - cut).clamp(min=0))


@pytest.mark.parametrize("unit", [Element(), Block(1, 4), Filter()], ids=repr)
def test_samples_are_unbiased_and_of_the_budget(unit: Any) -> None:
    layer, x, draws = nn.Linear(8, 8, bias=False), torch.randn(8), 400
    found = []
    for seed in range(draws):
        pruned = sparsify(layer, Compose(0.5, unit=unit, choose=Sample(seed)))
        assert zeros(pruned.weight) == 32
        found.append(pruned(x).detach())
    products = torch.stack(found)
    sigma = products.std(0) / draws**0.5
    assert bool(((products.mean(0) - layer(x)).abs() <= 3 * sigma + 1e-6).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 100) | st.just(0.0), min_size=1, max_size=30), st.integers(0, 30))
def test_inclusion_probabilities(scores: list[float], count: int) -> None:
    found = inclusion(np.array(scores), count)
    assert found.min() >= 0 and found.max() <= 1 + 1e-12
    assert found.sum() == pytest.approx(min(count, sum(s > 0 for s in scores)), abs=1e-6)


def test_the_envelope_selects_exactly_its_units(layer: nn.Linear) -> None:
    for sparsity in (0.25, 0.5, 0.75):
        pruned = sparsify(layer, Compose(sparsity, unit=Filter(), choose=GroupEnvelope(0.1))).weight
        alive = pruned.abs().sum(1) > 0
        assert int(alive.sum()) == round((1 - sparsity) * 48)
        means = layer.weight.abs().mean(1)
        assert means[alive].min() >= means[~alive].max()
        assert torch.equal(pruned[alive], layer.weight[alive])
    shrunk = sparsify(layer, Compose(0.5, unit=Filter(), choose=GroupEnvelope(0.1, shrink=True))).weight
    alive = shrunk.abs().sum(1) > 0
    ratio = shrunk[alive] / layer.weight[alive]
    assert bool((ratio < 1).all()) and bool((ratio.std(1) < 1e-5).all())


# Allocators


SHAPES = [(300, 784), (100, 300), (10, 100), (3, 3)]


@pytest.mark.parametrize("allocator", [ER, ERK, GlobalShare], ids=lambda a: a.__name__)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(sparsity=st.floats(0, 0.999))
def test_budgets_are_exact(allocator: Any, sparsity: float) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.Conv2d(16, 8, 3), nn.Linear(40, 60), nn.Linear(60, 10), nn.Linear(3, 3)
    )
    pruned = sparsify(model, Random(allocator(sparsity)))
    total = sum(m.weight.numel() for m in model)
    assert sum(zeros(m.weight) for m in pruned) == round(sparsity * total)


def test_erdos_renyi_ratios() -> None:
    layers = find_layers(nn.ModuleList([nn.Linear(784, 300), nn.Linear(300, 100), nn.Conv2d(64, 64, 3)]))
    sizes = [x.weight.numel() for x in layers]
    for kind, raws in (
        (ER, [1084 / 784 / 300, 400 / 300 / 100, 128 / 64 / 64]),
        (ERK, [1084 / 784 / 300, 400 / 300 / 100, 134 / 64 / 64 / 9]),
    ):
        zero = kind(0.95).zeros(layers, lambda layer: layer.weight)
        densities = [1 - z / s for z, s in zip(zero, sizes)]
        ratios = [d / r for d, r in zip(densities, raws)]
        assert max(ratios) / min(ratios) < 1.001
    crowded = ERK(0.1).zeros(layers, lambda layer: layer.weight)
    assert min(crowded) == 0  # capped: a layer is full


def test_knapsack_is_optimal() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs, losses = rng.integers(1, 20, (4, 3)).astype(float), rng.random((4, 3))
        budget = float(costs.min(1).sum() + rng.integers(0, 30))
        room = int(budget - costs.min(1).sum())
        chosen = knapsack(costs, losses, budget, steps=max(1, room))
        choices = itertools.product(range(3), repeat=4)
        best = min(
            sum(losses[i, c] for i, c in enumerate(cs))
            for cs in choices
            if sum(costs[i, c] for i, c in enumerate(cs)) <= budget
        )
        assert sum(losses[i, c] for i, c in enumerate(chosen)) == pytest.approx(best)
        assert sum(costs[i, c] for i, c in enumerate(chosen)) <= budget


def report(level: float, ms: dict[str, tuple[float, float]]) -> Report:
    rows = [
        Row(s, decision="sparse", dense_us=1e3 * d, sparse_us=1e3 * d * (1 - level) * f) for s, (d, f) in ms.items()
    ]
    return Report(rows)


def test_a_millisecond_budget_spends_where_it_saves() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    times = {"0": (4.0, 1.0), "1": (1.0, 1.9)}  # the second layer's kernel saves little
    levels = (0.5, 0.9)
    timings = {level: report(level, times) for level in levels}
    pruned = sparsify(model, Magnitude(Sensitivity(2.5, "ms", timings=timings)))
    found = [round(zeros(m.weight) / 4096, 1) for m in pruned]
    spent = sum(d * (1 - s) * f if s else d for s, (d, f) in zip(found, times.values()))
    assert spent <= 2.5 and found[0] == 0.9
    with pytest.raises(SpecError, match=r"budget 0.1 ms; the sparsest levels need 0.59"):
        sparsify(model, Magnitude(Sensitivity(0.1, "ms", timings=timings)))


def test_weight_and_flop_budgets() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:, 8:] *= 1e-3
    pruned = sparsify(model, Magnitude(Sensitivity(5000)))
    counts = [4096 - zeros(m.weight) for m in pruned]
    assert sum(counts) <= 5000 and counts[0] < counts[1]
    flops = Sensitivity(2 * 4096 * 10, "flops", uses={"0": 10, "1": 1})
    layers = find_layers(model)
    assert flops.cost(layers[0], 0.5) == 2 * 2048 * 10 and flops.cost(layers[1], 0.5) == 2 * 2048


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compose(0.5, rank=3), "rank=3 is no Score"),
        (lambda: ERK(1.5), "ERK: sparsity=1.5"),
        (lambda: SparseGPT(1.0), "SparseGPT: sparsity=1.0"),
        (lambda: Wanda("0.5"), "Wanda: sparsity='0.5'"),
        (lambda: NetTrim(-0.1), "NetTrim: sparsity=-0.1"),
        (lambda: DSnoT(Compose(0.5, unit=Filter())), "swaps single entries"),
        (lambda: DSnoT(7.0), "sparsity=7.0.*did you mean 0.07"),
        (lambda: Sensitivity(1.0, "joules"), "unit='joules'; valid: 'weights'"),
        (lambda: Sensitivity(1.0, "ms"), "needs timings"),
        (lambda: Grid(1), "2 to 8 bits"),
        (lambda: Element("column"), "per='column'"),
        (lambda: Block(0, 4), "at least 1"),
    ],
)
def test_bad_parts(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_reprs_are_short() -> None:
    assert repr(Refit(SparseGPT(NM(2, 4), damp=0.1))) == "Refit(SparseGPT(NM(n=2, m=4), damp=0.1))"
    assert repr(Compose(0.5, unit=Block(1, 16))) == "Compose(0.5, unit=Block(r=1, c=16))"
    assert eval(repr(Refit(Wanda(0.5)))) == Refit(Wanda(0.5))


# Evaluation


def test_layer_errors_and_cosine() -> None:
    dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    pruned = sparsify(dense, Magnitude(0.5))
    found = layer_errors(dense, pruned, [X])
    hidden = dense[:2](X)
    first = (X @ (dense[0].weight - pruned[0].weight).T).norm() / (X @ dense[0].weight.T).norm()
    second = (hidden @ (dense[2].weight - pruned[2].weight).T).norm() / (hidden @ dense[2].weight.T).norm()
    assert found["0"] == pytest.approx(float(first), rel=1e-3) and found["2"] == pytest.approx(float(second), rel=1e-3)
    read = lambda output, batch: output  # noqa: E731
    cosine = output_cosine(dense, pruned, [X[:10], X[10:]], read)
    expected = torch.nn.functional.cosine_similarity(dense(X), pruned(X)).mean()
    assert cosine == pytest.approx(float(expected), abs=1e-6)
    assert output_cosine(dense, dense, [X], read) == pytest.approx(1)
    with pytest.raises(InputError, match="no data to compare"):
        output_cosine(dense, pruned, [], read)


def test_class_gaps_and_agreement() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    gaps = class_gaps(labels, labels, torch.tensor([0, 0, 0, 1, 0, 0]))
    assert gaps.gaps == (0.25, 1.0) and gaps.counts == (4, 2)
    assert gaps.overall == pytest.approx(0.5) and gaps.worst_excess == pytest.approx(0.5)
    assert "+100.0%" in str(gaps)
    assert agreement(labels, labels) == 1
    assert agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])) == pytest.approx(0)
    with pytest.raises(InputError, match="one length"):
        class_gaps(labels, labels[:2], labels)


def test_tradeoff_table_and_plot() -> None:
    points = (Point("dense", 0.98, 1.0), Point("90 % <b>", 0.95, 2.5), Point("bad", 0.90, 2.0))
    found = Tradeoff(points)
    assert [p.name for p in found.best] == ["90 % <b>", "dense"]
    lines = str(found).splitlines()
    assert [line[0] for line in lines[1:4]] == ["*", " ", "*"]
    root = ElementTree.fromstring(found.svg())
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}circle")) == 3 and len(root.findall(f"{space}polyline")) == 1
    assert "90 % <b>" in [t.text for t in root.findall(f"{space}text")]
    with pytest.raises(SpecError, match="needs points"):
        Tradeoff(())


def test_random_search_keeps_the_best_start() -> None:
    model, x = nn.Linear(6, 2), torch.randn(9, 6)
    candidates = [sparsify(model, Random(0.5, seed=s)) for s in range(5)]
    best, losses = random_search(model, candidates, lambda m: float((m(x) - model(x)).square().mean()))
    assert losses[candidates.index(best)] == min(losses.values())


def test_data_that_a_method_needs_not_is_ignored(layer: nn.Linear) -> None:
    assert torch.equal(sparsify(layer, Magnitude(0.5), data="anything").weight, sparsify(layer, Magnitude(0.5)).weight)
    stats = calibrate(layer, Calibration([X]))
    (mask,) = Wanda(0.5).masks(find_layers(layer), stats)
    assert torch.equal(mask, sparsify(layer, Wanda(0.5), data=[X]).weight != 0)
