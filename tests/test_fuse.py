"""fuse: which elementwise tails are found, which are refused, and that replaying the steps gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_tools import aten, build, captured
from torch import fx, nn
from torch.nn import functional as F

from sparsec.aten import opname
from sparsec.codegen.kernel import Step
from sparsec.driver import Context, Options, Pass, run_passes
from sparsec.errors import PassError
from sparsec.graph import KEY, Fact, epilogue_nodes, fact, replace_weight_op, site_names, sites
from sparsec.passes.fuse import Fuse
from sparsec.passes.normalise import Normalise


class Sites(Pass):
    """Every linear and convolution is a site, without a look at its weight."""

    name = "annotate"
    requires = ("normalised",)
    ensures = ("annotated",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        found = [n for n in gm.graph.nodes if opname(n) in ("aten::linear", "aten::conv2d")]
        for node, name in site_names(found).items():
            kind = opname(node).removeprefix("aten::")
            node.meta[KEY] = Fact(name, kind, "", str(node.args[1].target), None, (4, 4), "float32")
        return len(found)


def fused(gm: fx.GraphModule, **options: Any) -> list[Fact]:
    run_passes(gm, [Normalise(), Sites(), Fuse()], Context(options=Options(**options)))
    return [known for _, known in sites(gm)]


def apply(step: Step, y: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """What a kernel does for a step."""
    table: dict[str, Callable[..., torch.Tensor]] = {
        "relu": torch.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
        "hardswish": F.hardswish,
        "clamp": torch.clamp,
        "scale": torch.mul,
        "add": lambda v: v + residual,
    }
    return table[step.name](y, *step.params)


class Tail(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self.fc(x), x)


def gelu_new(y: torch.Tensor) -> torch.Tensor:
    return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))


def gelu_fast(y: torch.Tensor) -> torch.Tensor:
    return 0.5 * y * (1.0 + torch.tanh(y * 0.7978845608 * (1.0 + 0.044715 * y * y)))


TAILS: dict[str, tuple[Callable[..., Any], tuple[Step, ...]]] = {
    "relu": (lambda y, x: F.relu(y), (Step("relu"),)),
    "relu in place": (lambda y, x: F.relu_(y), (Step("relu"),)),
    "clamp_min 0": (lambda y, x: y.clamp_min(0), (Step("relu"),)),
    "clamp from 0": (lambda y, x: y.clamp(min=0.0), (Step("relu"),)),
    "gelu": (lambda y, x: F.gelu(y), (Step("gelu"),)),
    "gelu tanh": (lambda y, x: F.gelu(y, approximate="tanh"), (Step("gelu_tanh"),)),
    "gelu_new": (lambda y, x: gelu_new(y), (Step("gelu_tanh"),)),
    "gelu_fast": (lambda y, x: gelu_fast(y), (Step("gelu_tanh"),)),
    "gelu_python": (lambda y, x: y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0))), (Step("gelu"),)),
    "quick_gelu": (
        lambda y, x: y * torch.sigmoid(1.702 * y),
        (Step("scale", (1.702,)), Step("silu"), Step("scale", (1 / 1.702,))),
    ),
    "silu": (lambda y, x: F.silu(y), (Step("silu"),)),
    "silu written": (lambda y, x: torch.sigmoid(y) * y, (Step("silu"),)),
    "tanh": (lambda y, x: torch.tanh(y), (Step("tanh"),)),
    "hardswish": (lambda y, x: F.hardswish(y), (Step("hardswish"),)),
    "relu6": (lambda y, x: F.relu6(y), (Step("clamp", (0.0, 6.0)),)),
    "hardtanh": (lambda y, x: F.hardtanh(y), (Step("clamp", (-1.0, 1.0)),)),
    "hardtanh wide": (lambda y, x: F.hardtanh(y, -2.0, 3.0), (Step("clamp", (-2.0, 3.0)),)),
    "clamp": (lambda y, x: y.clamp(-1, 2), (Step("clamp", (-1.0, 2.0)),)),
    "scale": (lambda y, x: 3 * y, (Step("scale", (3.0,)),)),
    "divide by 8": (lambda y, x: y / 8, (Step("scale", (0.125,)),)),
    "residual": (lambda y, x: y + x, (Step("add"),)),
    "residual left": (lambda y, x: x + y, (Step("add"),)),
    "chain": (
        lambda y, x: F.relu(x + F.gelu(y * 2.0)).clamp(0.0, 1.0),
        (Step("scale", (2.0,)), Step("gelu"), Step("add"), Step("relu"), Step("clamp", (0.0, 1.0))),
    ),
    "one add of two": (lambda y, x: (y + x) + x, (Step("add"),)),
}


@pytest.mark.parametrize("case", TAILS)
def test_tails_are_found_and_mean_the_same(case: str) -> None:
    body, steps = TAILS[case]
    model, x = Tail(body), torch.randn(5, 6)
    gm = captured(model, x)
    (known,) = fused(gm)
    assert known.epilogue == steps
    node = next(n for n, _ in sites(gm))
    absorbed, residual = epilogue_nodes(gm, node)
    assert tuple(n.name for n in absorbed) == known.absorbed
    assert (residual is None) == (known.residual is None) == (Step("add") not in steps)
    values = Trace(gm)
    values.run(x)
    y = values.seen[node]
    for step in steps:
        y = apply(step, y, values.seen.get(residual))
    torch.testing.assert_close(y, values.seen[absorbed[-1]], atol=1e-6, rtol=1e-5)


class Trace(fx.Interpreter):
    """Keeps every value of a run."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[fx.Node | None, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


NOTHING: dict[str, Callable[..., Any]] = {
    "read twice": lambda y, x: (F.relu(y), y),
    "inner value read": lambda y, x: (lambda s: (y * s, s))(torch.sigmoid(y)),
    "broadcast": lambda y, x: y + x[:1],
    "grows": lambda y, x: y[:1] + x,
    "twice itself": lambda y, x: y + y,
    "scaled add": lambda y, x: torch.add(y, x, alpha=2),
    "computed later": lambda y, x: y + F.softmax(y, -1),
    "tensor scale": lambda y, x: y * x,
    "inexact divide": lambda y, x: y / 3,
    "zero divide": lambda y, x: y / 0.0,
    "one bound": lambda y, x: y.clamp(min=0.5),
    "infinite bound": lambda y, x: y.clamp(0.0, math.inf),
    "other constant": lambda y, x: 0.5 * y * (1.0 + torch.erf(y / 1.5)),
    "wrong cube": lambda y, x: 0.5 * y * (1.0 + torch.tanh(0.7978845608 * (y + 0.05 * torch.pow(y, 3.0)))),
    "other type": lambda y, x: y + x.double(),
    "floor": lambda y, x: torch.div(y, 2.0, rounding_mode="floor"),
    "not elementwise": lambda y, x: F.softmax(y, -1),
    "nothing": lambda y, x: y,
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_is_not_a_tail_is_left(case: str) -> None:
    (known,) = fused(captured(Tail(NOTHING[case]), torch.randn(5, 6)))
    assert (known.epilogue, known.absorbed, known.residual) == ((), (), None)


def test_residual_must_be_ready_before_the_site() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.add(F.relu(self.a(x)), F.gelu(self.b(x)))

    gm = captured(Two(), torch.randn(3, 6))
    first, second = fused(gm)
    assert [s.name for s in first.epilogue] == ["relu"]
    assert [s.name for s in second.epilogue] == ["gelu", "add"]
    assert second.residual == first.absorbed[-1]


def test_lowering_in_order_keeps_residuals_right() -> None:
    """The first site's tail disappears before the second site, which reads it, is rewritten."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.a(x))
            return F.gelu(self.b(y)) + y

    model, x = Two(), torch.randn(3, 6)
    gm = captured(model, x)
    tails = {known.site: known.epilogue for known in fused(gm)}

    def run_site(x: Any, w: Any, b: Any, residual: torch.Tensor | None, site: str) -> torch.Tensor:
        y = F.linear(x, w, b)
        for step in tails[site]:
            y = apply(step, y, residual)
        return y

    for node, known in list(sites(gm)):
        absorbed, residual = epilogue_nodes(gm, node)
        new = replace_weight_op(gm, node, run_site, (*node.args, residual, known.site), absorbed=absorbed)
        assert fact(new) is known
        assert new.meta["val"].shape == (3, 6)
    gm.graph.lint()
    gm.recompile()
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [run_site, run_site]
    torch.testing.assert_close(gm(x), model(x))


def test_a_missing_absorbed_node_is_named() -> None:
    gm = captured(Tail(lambda y, x: F.relu(y)), torch.randn(3, 6))
    fused(gm)
    node = next(n for n, _ in sites(gm))
    relu = next(iter(node.users))
    relu.replace_all_uses_with(node)
    gm.graph.erase_node(relu)
    with pytest.raises(PassError, match=r"site 'fc': absorbed node 'relu' is gone; run `fuse` after the pass"):
        epilogue_nodes(gm, node)


def test_refused_and_training_sites_have_no_tail() -> None:
    gm = captured(Tail(lambda y, x: F.relu(y)), torch.randn(3, 6))
    assert fused(gm, training=True)[0].epilogue == ()

    class Refuse(Pass):
        def run(self, gm: fx.GraphModule, ctx: Context) -> int:
            for node, known in sites(gm):
                node.meta[KEY] = Fact(**{**known.__dict__, "refusal": ("SPC0302", "quantised")})
            return 1

    run_passes(gm, [Normalise(), Sites(), Refuse(), Fuse()], Context())
    assert next(known for _, known in sites(gm)).epilogue == ()


def test_fusing_again_forgets_the_old_tail() -> None:
    gm = captured(Tail(lambda y, x: F.relu(y)), torch.randn(3, 6))
    assert [s.name for s in fused(gm)[0].epilogue] == ["relu"]
    node = next(n for n, _ in sites(gm))
    next(iter(node.users)).target = aten.abs.default
    run_passes(gm, [Normalise(), Sites(), Fuse()], Context())
    known = fact(node)
    assert (known.epilogue, known.absorbed) == ((), ())


def test_without_shapes_activations_are_found_and_residuals_are_not() -> None:
    gm = build(lambda x, w: aten.add.Tensor(aten.gelu.default(aten.linear.default(x, w)), x), "x", w=torch.randn(6, 6))
    assert [s.name for s in fused(gm)[0].epilogue] == ["gelu"]


def test_dynamic_sizes_match_by_their_expression() -> None:
    model = Tail(lambda y, x: F.gelu(y) + x)
    (known,) = fused(captured(model, torch.randn(4, 6), shapes="batch"))
    assert [s.name for s in known.epilogue] == ["gelu", "add"]


def test_convolutions_have_tails_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6())
    (known,) = fused(captured(model, torch.randn(1, 3, 5, 5)))
    assert known.epilogue == (Step("clamp", (0.0, 6.0)),)
