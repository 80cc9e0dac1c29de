"""Every score against its definition, written out entry by entry; the ratios of SNIP and GraSP."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsec.sparsifiers import Calibration, Compose, GlobalShare, Random, Stats, calibrate, sparsify
from sparsec.sparsifiers.layers import Layer, find_layers
from sparsec.sparsifiers.scores import (
    OBS,
    SNR,
    AbsGradient,
    AbsValue,
    Cosine,
    EdgeDegree,
    Fisher,
    GradientFlow,
    Saliency,
    Score,
    SketchProbability,
    Taylor,
    TimesNorm,
    Uniform01,
)

ALL = ("gram", "grad", "fisher", "hessian_grad")


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(output, batch[1])


@pytest.fixture(scope="module")
def seen() -> tuple[nn.Sequential, Layer, Stats]:
    """A small network of float64, and everything that calibration knows about its first layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = Calibration([(torch.randn(40, 5).double(), torch.arange(40) % 3)], loss=loss, double=True)
    stats = calibrate(model, data, needs=ALL)["0"]
    assert stats is not None
    return model, find_layers(model)[0], stats


def _obs(w: torch.Tensor, s: Stats, i: int, j: int, power: int) -> float:
    hessian = s.get("gram")[0].double() / s.rows
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(5))
    return float(w[i, j] ** 2 / inverse[j, j] ** power)


def _cosine(w: torch.Tensor, s: Stats, i: int, j: int) -> float:
    g = s.get("grad")
    return float(-w[i, j] * g[i, j] / (w[i].norm() * g[i].norm()))


Entry = Callable[[torch.Tensor, Stats, int, int], float]
DEFINITIONS: list[tuple[Score, Entry]] = [
    (AbsValue(), lambda w, s, i, j: abs(float(w[i, j]))),
    (AbsGradient(), lambda w, s, i, j: abs(float(s.get("grad")[i, j]))),
    (Saliency(), lambda w, s, i, j: abs(float(w[i, j] * s.get("grad")[i, j]))),
    (Fisher(), lambda w, s, i, j: float(s.get("fisher")[i, j])),
    (TimesNorm(), lambda w, s, i, j: abs(float(w[i, j])) * math.sqrt(float(s.get("gram")[0, j, j]))),
    (OBS(1), lambda w, s, i, j: _obs(w, s, i, j, 1)),
    (OBS(2), lambda w, s, i, j: _obs(w, s, i, j, 2)),
    (GradientFlow(), lambda w, s, i, j: float(w[i, j] * s.get("hessian_grad")[i, j])),
    (Taylor(1), lambda w, s, i, j: abs(float(w[i, j] * s.get("grad")[i, j]))),
    (
        Taylor(2),
        lambda w, s, i, j: abs(float(-w[i, j] * s.get("grad")[i, j] + w[i, j] ** 2 * s.get("fisher")[i, j] / 2)),
    ),
    (SNR(2.0), lambda w, s, i, j: abs(float(w[i, j])) * math.sqrt(40 * float(s.get("fisher")[i, j]) + 2)),
    (Cosine(), _cosine),
    (SketchProbability(), lambda w, s, i, j: float(w[i, j]) ** 2),
    (
        SketchProbability(with_data=True),
        lambda w, s, i, j: abs(float(w[i, j])) * math.sqrt(float(s.get("gram")[0, j, j])),
    ),
]


@pytest.mark.parametrize(("score", "entry"), DEFINITIONS, ids=lambda v: repr(v) if isinstance(v, Score) else "")
def test_a_score_is_its_definition(score: Score, entry: Entry, seen: tuple[nn.Sequential, Layer, Stats]) -> None:
    _, layer, stats = seen
    weight = layer.weight.detach()
    expected = torch.tensor([[entry(weight, stats, i, j) for j in range(5)] for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(score(layer, stats).double(), expected, rtol=1e-5, atol=1e-12)


def test_first_order_scores_predict_the_loss() -> None:
    """|w g| is the change of the loss when one small weight becomes zero, to first order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 5).double(), torch.arange(30) % 3
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    stats = calibrate(model, Calibration([(x, y)], loss=loss), needs=("grad",))["0"]
    score = Taylor()(find_layers(model)[0], stats)
    before = loss(model(x), (x, y))
    for i, j in ((0, 0), (2, 3), (3, 1)):
        kept = model[0].weight.data[i, j].clone()
        model[0].weight.data[i, j] = 0
        assert float((loss(model(x), (x, y)) - before).abs()) == pytest.approx(float(score[i, j]), rel=1e-2)
        model[0].weight.data[i, j] = kept


@pytest.mark.parametrize("by", [Saliency(), GradientFlow()], ids=["SNIP", "GraSP"])
def test_ratios_of_snip_and_grasp_place_random_masks(by: Score, seen: tuple[nn.Sequential, Layer, Stats]) -> None:
    """The layers' shares of zeros are those of one threshold over the other score; the places are random."""
    model = seen[0]
    data = Calibration([(torch.randn(40, 5).double(), torch.arange(40) % 3)], loss=loss)
    stats = calibrate(model, data, needs=by.needs)
    layers = find_layers(model)
    scores = [by(x, stats[x.site]).flatten() for x in layers]
    threshold = torch.cat(scores).sort().values[19]  # half of 40 entries
    expected = [int((s <= threshold).sum()) for s in scores]
    pruned = sparsify(model, Random(GlobalShare(0.5, by=by)), data=data)
    found = [int((x.weight == 0).sum()) for x in find_layers(pruned)]
    assert found == expected and sum(found) == 20
    own = sparsify(model, Compose(GlobalShare(0.5), by), data=data)
    assert [int((x.weight == 0).sum()) for x in find_layers(own)] == expected
    assert any(not torch.equal(a == 0, b == 0) for a, b in zip(pruned.parameters(), own.parameters(), strict=True))


def test_scores_without_data_need_none() -> None:
    layer = Layer("a", "Linear", torch.rand(4, 4))
    for score in (AbsValue(), Uniform01(3), EdgeDegree(), SketchProbability()):
        assert score.needs == () and score(layer).shape == (4, 4)
    assert not torch.equal(Uniform01(3)(layer), Uniform01(4)(layer))
