"""fold: batch norm and constant offsets go into the weight before them, exactly in meaning, and the recipe replays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graph_tools import aten, build, calls, captured
from torch import fx, nn
from torch.nn import functional as F

from sparsec.driver import Context, Options, run_passes
from sparsec.graph import constants, evaluate
from sparsec.passes.fold import Fold
from sparsec.passes.normalise import Normalise


def folded(gm: fx.GraphModule, **options: Any) -> fx.GraphModule:
    run_passes(gm, [Normalise(), Fold()], Context(options=Options(**options)))
    return gm


def settle(model: nn.Module) -> nn.Module:
    """Statistics as training leaves them: not zero, not one, and over several magnitudes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.01, 4.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def wide_error(model: nn.Module, gm: fx.GraphModule, *args: torch.Tensor) -> tuple[float, float]:
    """Largest error of folded and of original fp32 results against float64."""
    exact = copy.deepcopy(model).double()(*(a.double() for a in args))
    return (gm(*args) - exact).abs().max().item(), (model(*args) - exact).abs().max().item()


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()], (2, 4, 7, 7)),
    "conv2d grouped": (lambda: [nn.Conv2d(4, 8, 3, groups=4, stride=2), nn.BatchNorm2d(8)], (2, 4, 7, 7)),
    "conv2d same": (lambda: [nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)], (2, 4, 7, 7)),
    "conv2d plain norm": (lambda: [nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)], (2, 4, 3, 3)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, eps=0.1)], (1, 2, 4, 4, 4)),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()], (5, 4)),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("case", MODELS)
def test_batch_norm_goes_into_the_weight(case: str, traced: bool) -> None:
    make, shape = MODELS[case]
    model, x = settle(nn.Sequential(*make())), torch.randn(shape)
    gm = folded(captured(model) if traced else captured(model, x))
    kept = traced and case == "linear"  # without shapes nobody knows that channels come last
    assert any("norm" in c for c in calls(gm)) == kept
    ours, theirs = wide_error(model, gm, x)
    assert ours <= 4 * theirs + 1e-6


@pytest.mark.parametrize("case", MODELS)
def test_the_recipe_replays_on_other_weights(case: str) -> None:
    make, shape = MODELS[case]
    x = torch.randn(shape)
    gm = folded(captured(settle(nn.Sequential(*make())), x))
    other = settle(nn.Sequential(*make()))
    state = other.state_dict()
    recipes = {name: c for name, c in constants(gm).items() if c.recipe is not None}
    assert len(recipes) == 2
    for name, origin in recipes.items():
        value = evaluate(origin, [state[source] for source in origin.sources])
        assert value.dtype is torch.float32
        setattr(gm, name, nn.Parameter(value))
    ours, theirs = wide_error(other, gm, x)
    assert ours <= 4 * theirs + 1e-6


def test_zeros_of_the_weight_stay_zeros() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    with torch.no_grad():
        model[0].weight[torch.rand_like(model[0].weight) < 0.7] = 0.0
    pattern = model[0].weight != 0
    gm = folded(captured(model, torch.randn(1, 4, 5, 5)))
    weight = gm.get_parameter(next(n for n in constants(gm) if n.endswith("weight_folded")))
    assert torch.equal(weight != 0, pattern)


def test_scale_is_computed_in_float64() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)))
    gm = folded(captured(model, torch.randn(1, 4, 3, 3)))
    conv, norm = (copy.deepcopy(m).double() for m in model)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    name = next(n for n in constants(gm) if n.endswith("weight_folded"))
    torch.testing.assert_close(
        gm.get_parameter(name), (conv.weight * scale.view(-1, 1, 1, 1)).float(), rtol=6e-8, atol=0
    )


class Refusal(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(6, 4)
        self.rows = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> Any:
        if self.kind == "read twice":
            y = self.conv(x)
            return self.norm(y) + y
        if self.kind == "shared weight":
            return self.norm(self.conv(x)) + self.conv(x + 1)
        if self.kind == "not a weight op":
            return self.norm(F.relu(self.conv(x)))
        if self.kind == "channels not last":
            return self.rows(self.fc(x.reshape(4, 4, 6)))
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    "kind", ["read twice", "shared weight", "not a weight op", "channels not last", "infinite scale", "training"]
)
def test_what_must_not_be_folded_is_not(kind: str) -> None:
    model, x = settle(Refusal(kind)), torch.randn(1, 4, 4, 6)
    if kind == "infinite scale":
        model.norm.weight.data[1] = float("inf")
    gm = folded(captured(model, x), training=kind == "training")
    assert any("batch_norm" in c for c in calls(gm))
    torch.testing.assert_close(gm(x), model(x), equal_nan=True)


def test_training_statistics_are_not_constants() -> None:
    gm = build(
        lambda x, w, m, v: aten.batch_norm.default(aten.conv2d.default(x, w), None, None, m, v, True, 0.1, 1e-5, False),
        "x",
        w=torch.randn(3, 2, 1, 1),
        m=torch.zeros(3),
        v=torch.ones(3),
    )
    assert calls(folded(gm)) == ["conv2d", "batch_norm"]


def test_norm_in_one_call_is_folded() -> None:
    gm = build(
        lambda x, w, m, v: aten.batch_norm.default(
            aten.conv2d.default(x, w), None, None, m, v, False, 0.1, 1e-5, False
        ),
        "x",
        w=torch.randn(3, 2, 1, 1),
        m=torch.randn(3),
        v=torch.rand(3) + 0.5,
    )
    gm.requires_grad_(False)
    x = torch.randn(2, 2, 4, 4)
    expected = gm(x)
    assert calls(folded(gm)) == ["conv2d"]
    torch.testing.assert_close(gm(x), expected)
    assert set(constants(gm)) == {"w_folded", "m_folded"}


def test_a_constant_offset_becomes_the_bias() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b + x @ self.w

    model, x = Offset(), torch.randn(2, 3, 6)
    gm = folded(captured(model, x))
    assert calls(gm) == ["linear"]
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda x, w, b: aten.add.Tensor(aten.linear.default(x, w), b, alpha=2),
        lambda x, w, b: aten.add.Tensor(aten.linear.default(x, w, b), b),
        lambda x, w, b: aten.add.Tensor(aten.linear.default(x, w), aten.unsqueeze.default(b, 0)),
        lambda x, w, b: (lambda y: (aten.add.Tensor(y, b), y))(aten.linear.default(x, w)),
    ],
)
def test_other_offsets_stay(body: Any) -> None:
    gm = build(body, "x", w=torch.randn(4, 6), b=torch.randn(4))
    assert "add" in calls(folded(gm))
