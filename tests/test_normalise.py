"""normalise: one spelling for weight ops, constant expressions as attributes with recipes, no-ops gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_tools import aten, build, calls, captured, shaped
from torch import fx, nn
from torch.nn import functional as F

from sparsec.driver import Context, Options, run_passes
from sparsec.errors import PassError
from sparsec.graph import (
    Constant,
    constants,
    drop_dead_constants,
    evaluate,
    fold_constants,
    invert,
    invertible,
    remove_constant,
    ties,
)
from sparsec.passes.normalise import Normalise


def normalised(gm: fx.GraphModule, **options: Any) -> fx.GraphModule:
    run_passes(gm, [Normalise()], Context(options=Options(**options)))
    return gm


class Calls(nn.Module):
    """A model whose forward is `body(self, x)`, with a few parameters to choose from."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.w = nn.Parameter(torch.randn(6, 6))
        self.wide = nn.Parameter(torch.randn(6, 10))
        self.b = nn.Parameter(torch.randn(6))
        self.b10 = nn.Parameter(torch.randn(10))
        self.register_buffer("mask", (torch.rand(6, 6) > 0.5).float(), persistent=False)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "addmm": (lambda m, x: torch.addmm(m.b10, x, m.wide), ("wide",)),
    "mm": (lambda m, x: torch.mm(x, m.wide), ("wide",)),
    "matmul": (lambda m, x: x @ m.wide, ("wide",)),
    "matmul 3d": (lambda m, x: x.reshape(2, 2, 6) @ m.wide, ("wide",)),
    "matmul 1d": (lambda m, x: x[0] @ m.wide, ("wide",)),
    "transposed": (lambda m, x: x @ m.fc.weight.t(), ("fc.weight",)),
    "T": (lambda m, x: x @ m.fc.weight.T, ("fc.weight",)),
    "mT": (lambda m, x: x @ m.fc.weight.mT, ("fc.weight",)),
    "permute": (lambda m, x: x @ m.fc.weight.permute(1, 0), ("fc.weight",)),
    "einsum io": (lambda m, x: torch.einsum("bi,io->bo", x, m.wide), ("wide",)),
    "einsum oi": (lambda m, x: torch.einsum("...i,oi->...o", x, m.fc.weight), ("fc.weight",)),
    "einsum swapped": (lambda m, x: torch.einsum("oi,bi->bo", m.fc.weight, x), ("fc.weight",)),
    "normed": (lambda m, x: F.linear(x, m.wide.t() / m.wide.t().norm(dim=1, keepdim=True)), ("wide",)),
    "cast": (lambda m, x: F.linear(x, m.w.half().float()), ("w",)),
    "masked": (lambda m, x: F.linear(x, m.w * m.mask), ("w",)),
    "triangle": (lambda m, x: F.linear(x, m.w * torch.tril(torch.ones(6, 6))), ("w",)),
    "scaled bias": (lambda m, x: F.linear(x, m.w, m.b * 2), ("w",)),
    "two sources": (lambda m, x: F.linear(x, m.w + m.wide[:, :6]), ("w", "wide")),
    "keywords": (lambda m, x: F.linear(x, weight=m.w, bias=m.b), ("w",)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_with_a_constant_become_linear(case: str) -> None:
    body, sources = PRODUCTS[case]
    model, x = Calls(body), torch.randn(4, 6)
    gm = normalised(captured(model, x))
    assert [c for c in calls(gm) if c not in ("view", "select")] == ["linear"]
    node = next(n for n in gm.graph.nodes if n.op == "call_function" and "linear" in str(n.target))
    assert not node.kwargs
    assert node.args[1].op == "get_attr"
    torch.testing.assert_close(gm(x), model(x))
    origin = constants(gm)[node.args[1].target]
    assert origin.sources == sources
    fresh = Calls(body)
    fresh.mask.copy_(model.mask)
    values = [fresh.state_dict()[name] for name in sources]
    setattr(gm, node.args[1].target, nn.Parameter(evaluate(origin, values)))
    if len(node.args) > 2:
        bias = constants(gm)[node.args[2].target]
        setattr(gm, node.args[2].target, nn.Parameter(evaluate(bias, [fresh.state_dict()[n] for n in bias.sources])))
    torch.testing.assert_close(gm(x), fresh(x))


KEPT: dict[str, Callable[..., Any]] = {
    "scaled addmm": lambda m, x: torch.addmm(m.b10, x, m.wide, beta=2),
    "wide bias": lambda m, x: torch.addmm(m.wide[:4, :6], x, m.w),
    "both vary": lambda m, x: x @ x.t(),
    "constant left": lambda m, x: m.w @ x.t(),
    "einsum outer": lambda m, x: torch.einsum("bi,oi->boi", x, m.w),
    "einsum inner first": lambda m, x: torch.einsum("ib,io->bo", x.t(), m.w),
}


@pytest.mark.parametrize("case", KEPT)
def test_other_products_stay(case: str) -> None:
    model, x = Calls(KEPT[case]), torch.randn(4, 6)
    gm = normalised(captured(model, x))
    assert "linear" not in calls(gm)
    torch.testing.assert_close(gm(x), model(x))


def test_transposes_are_views_and_go_back_exactly() -> None:
    model, x = Calls(lambda m, x: torch.addmm(m.b10, x, m.wide)), torch.randn(4, 6)
    gm = normalised(captured(model, x))
    name = next(n.target for n in gm.graph.nodes if n.op == "get_attr" and "folded" in str(n.target))
    origin, value = constants(gm)[name], getattr(gm, name)
    assert value.untyped_storage().data_ptr() == model.wide.untyped_storage().data_ptr()
    assert "wide" not in dict(gm.named_parameters())
    assert invertible(origin)
    assert torch.equal(invert(origin, value), model.wide)
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("dims", [(1, 2, 0), (2, 0, 1), (0, 2, 1), (-1, 0, 1)])
def test_inverse_of_chained_permutations(dims: tuple[int, ...]) -> None:
    gm = build(
        lambda x, w: aten.conv1d.default(x, aten.transpose.int(aten.permute.default(w, list(dims)), -1, 0)),
        "x",
        w=torch.randn(2, 3, 4),
    )
    weight = gm.w.detach()
    assert fold_constants(gm) == 1
    assert torch.equal(gm.w_folded, weight.permute(dims).transpose(-1, 0))
    assert torch.equal(invert(constants(gm)["w_folded"], gm.w_folded), weight)


def test_what_is_not_a_permutation_does_not_go_back() -> None:
    model, x = Calls(PRODUCTS["normed"][0]), torch.randn(4, 6)
    gm = normalised(captured(model, x))
    origin = next(c for c in constants(gm).values() if c.recipe is not None)
    assert not invertible(origin)
    assert invert(origin, torch.ones(10, 6)) is None
    with pytest.raises(PassError, match=r"takes 1 tensors, got 2"):
        evaluate(origin, [torch.ones(1), torch.ones(1)])


def test_equal_expressions_are_folded_once_and_tied_weights_stay_one() -> None:
    model = Calls(lambda m, x: (x @ m.w, x @ m.w, m.fc(x), m.other(x)))
    model.other = nn.Linear(6, 10)
    model.other.weight = model.fc.weight
    gm = normalised(captured(model, torch.randn(4, 6)))
    reads = [n.target for n in gm.graph.nodes if n.op == "get_attr"]
    assert len(reads) == len(set(reads))
    weights = [n.args[1].target for n in gm.graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
    assert weights[0] == weights[1]
    assert weights[2] == weights[3]
    assert constants(gm)[weights[2]].sources == ("fc.weight", "other.weight")


def test_folding_a_tied_weight_remembers_the_tie() -> None:
    gm = build(lambda x, w: aten.linear.default(x, aten.neg.default(w)), "x", w=torch.ones(2, 2))
    constants(gm)["w"] = Constant(("a.weight", "b.weight"))
    fold_constants(gm)
    assert constants(gm)["w_folded"].sources == ("a.weight",)
    assert ties(gm) == {"b.weight": "a.weight"}


def test_recipes_of_recipes_read_the_original() -> None:
    gm = build(lambda x, w, v: aten.linear.default(x, aten.mul.Tensor(w, v)), "x", w=torch.ones(2, 2), v=torch.ones(2))
    constants(gm)["v"] = Constant(())
    with torch.no_grad():
        gm.v.fill_(3.0)
    fold_constants(gm)
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    with gm.graph.inserting_before(node):
        node.update_arg(1, gm.graph.call_function(aten.t.default, (node.args[1],)))
    fold_constants(gm)
    (origin,) = constants(gm).values()
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert origin.sources == ("w",)
    assert torch.equal(evaluate(origin, [w]), 3 * w.t())


def test_what_else_reads_a_source_keeps_it() -> None:
    model, x = Calls(lambda m, x: (x @ m.wide, x * m.wide.sum())), torch.randn(4, 6)
    gm = normalised(captured(model, x))
    assert "wide" in dict(gm.named_parameters())
    torch.testing.assert_close(gm(x), model(x))


def test_random_written_and_training_constants_stay() -> None:
    gm = normalised(captured(Calls(lambda m, x: F.linear(x, m.w * torch.rand(6, 6))), torch.randn(4, 6)))
    assert "rand" in calls(gm)

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.eye(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, self.w.t())
            self.w.mul_(0.5)
            return y

    model, x = Moving(), torch.randn(4, 6)
    gm = normalised(captured(model, x))
    gm.w.copy_(torch.eye(6))
    assert torch.equal(gm(x), x)
    assert torch.equal(gm(x), x / 2)

    gm = captured(Calls(lambda m, x: F.linear(x, m.w * 2)), torch.randn(4, 6))
    assert calls(normalised(gm, training=True)) == ["mul", "linear"]


def test_unreachable_constants_can_be_dropped_and_read_ones_cannot() -> None:
    gm = build(lambda x, w, v: aten.linear.default(x, w), "x", w=torch.ones(2, 2), v=torch.ones(2))
    with pytest.raises(PassError, match=r"constant 'w' is still read by node 'w'"):
        remove_constant(gm, "w")
    assert drop_dead_constants(gm) == ["v"]
    assert set(constants(gm)) == {"w"}
    gm.graph.lint()


# no-ops


def noop_calls(body: Callable[..., Any], x: torch.Tensor) -> list[str]:
    model = Calls(body)
    gm = normalised(captured(model, x))
    torch.testing.assert_close(gm(x), model(x))
    return calls(gm)


def test_noops_disappear() -> None:
    x = torch.randn(4, 6)
    assert noop_calls(lambda m, x: F.dropout(x * 2, 0.5, training=False).float().contiguous() + 1, x) == ["mul", "add"]
    assert noop_calls(lambda m, x: (x * 2).view(4, 6).expand(4, 6).clone() + 1, x) == ["mul", "add"]
    assert noop_calls(lambda m, x: (x * 2).clone(), x) == ["mul"]
    traced = captured(nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.ReLU()))
    assert calls(normalised(traced)) == ["linear", "relu"]


def test_what_changes_layout_or_type_stays() -> None:
    x = torch.randn(4, 6)
    assert noop_calls(lambda m, x: (x * 2).t().contiguous() + 1, x) == ["mul", "t", "clone", "add"]
    assert noop_calls(lambda m, x: (x * 2).half().float() + 1, x) == ["mul", "_to_copy", "_to_copy", "add"]
    assert noop_calls(lambda m, x: x[:1].expand(4, 6).clone() + 1, x) == ["slice", "expand", "clone", "add"]


def double(x: Any) -> Any:
    return aten.mul.Tensor(x, 2)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, w: aten.clone.default(x),
        lambda x, w: aten.clone.default(w),
        lambda x, w: aten.view.default(aten.clone.default(aten.view.default(x, [-1])), [4, 6]),
        lambda x, w: (lambda y: (y, aten.clone.default(y)))(double(x)),
        lambda x, w: (lambda y: (aten.view.default(y, [24]), aten.clone.default(y)))(double(x)),
        lambda x, w: aten.alias.default(aten.clone.default(aten.clone.default(x))),
    ],
)
def test_outputs_never_share_memory_that_they_did_not_share(body: Callable[..., Any]) -> None:
    x = torch.randn(4, 6)
    gm = normalised(shaped(build(body, "x", w=torch.randn(4, 6)), x))
    out = gm(x)
    out = out if isinstance(out, tuple) else (out,)
    places = [t.untyped_storage().data_ptr() for t in (*out, x, gm.w if hasattr(gm, "w") else torch.empty(1))]
    assert len(set(places)) == len(places)


def test_copies_of_fresh_results_go() -> None:
    x = torch.randn(4, 6)
    gm = shaped(build(lambda x: aten.view.default(aten.clone.default(double(x)), [24]), "x"), x)
    assert calls(normalised(gm)) == ["mul", "view"]
    gm = shaped(build(lambda x: double(aten.clone.default(x)), "x"), x)
    assert calls(normalised(gm)) == ["mul"]


def test_copies_stay_where_the_graph_writes() -> None:
    class Swap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            old = self.last.clone()
            self.last.copy_(x)
            return old * 1.0

    x = torch.randn(4, 6)
    gm = normalised(captured(Swap(), x))
    assert torch.equal(gm(x), torch.zeros(4, 6))
    assert torch.equal(gm(2 * x), x)


# views around a flattened product


class Conv1D(nn.Module):
    """GPT-2's linear: addmm on a flattened input with an untransposed weight."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inp, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = (*x.size()[:-1], self.bias.numel())
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


@pytest.mark.parametrize("shapes", [None, "batch"])
def test_views_around_a_product_disappear(shapes: Any) -> None:
    model, x = nn.Sequential(Conv1D(6, 8), nn.ReLU(), Conv1D(8, 6)), torch.randn(2, 3, 6)
    gm = normalised(captured(model, x, shapes=shapes))
    assert calls(gm) == ["linear", "relu", "linear"]
    torch.testing.assert_close(gm(x), model(x))
    if shapes:
        x = torch.randn(5, 3, 6)
        torch.testing.assert_close(gm(x), model(x))


def test_views_that_move_rows_stay() -> None:
    model = Calls(lambda m, x: m.fc(x.reshape(8, 6)).reshape(4, 2, 10))
    x = torch.randn(2, 4, 6)
    gm = normalised(captured(model, x))
    assert calls(gm) == ["view", "linear", "view"]
    assert gm(x).shape == (4, 2, 10)


def test_normalising_twice_changes_nothing() -> None:
    gm = captured(Calls(PRODUCTS["normed"][0]), torch.randn(4, 6))
    history = run_passes(gm, [Normalise(), Normalise()], Context())
    assert history[1].changes > 0
    assert history[2].changes == 0
    assert history[2].code == history[1].code


# traced graphs


TRACED = ["addmm", "mm", "matmul", "transposed", "T", "permute", "einsum io", "einsum oi", "normed", "cast", "masked",
          "triangle", "scaled bias", "two sources"]  # fmt: skip


@pytest.mark.parametrize("case", TRACED)
def test_constant_expressions_of_traced_graphs_are_spelled_out(case: str) -> None:
    body, sources = PRODUCTS[case]
    model, x = Calls(body), torch.randn(4, 6)
    gm = captured(model)
    run_passes(gm, [Normalise()], Context(capture="trace"))
    assert calls(gm) == ["linear"]
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert node.args[1].op == "get_attr"
    assert constants(gm)[node.args[1].target].sources == sources
    torch.testing.assert_close(gm(x), model(x))


def noisy(w: torch.Tensor) -> torch.Tensor:
    return w * torch.rand_like(w)


def looked_at(w: torch.Tensor) -> torch.Tensor:
    return w * w.max().item()


def rewritten(w: torch.Tensor) -> torch.Tensor:
    return w.clone().fill_(2.0)


def opaque(function: Callable[..., Any]) -> fx.GraphModule:
    """linear(x, function(w)) as a traced graph may hold it, normalised."""
    gm = build(lambda x, w: aten.linear.default(x, w), "x", w=torch.randn(6, 6))
    linear = next(n for n in gm.graph.nodes if n.op == "call_function")
    with gm.graph.inserting_before(linear):
        linear.update_arg(1, gm.graph.call_function(function, (linear.args[1],)))
    run_passes(gm, [Normalise()], Context(capture="trace"))
    return gm


def test_recipes_may_look_at_values() -> None:
    gm = opaque(looked_at)
    (origin,) = constants(gm).values()
    fresh = torch.randn(6, 6)
    assert calls(gm) == ["linear"]
    torch.testing.assert_close(evaluate(origin, [fresh]), looked_at(fresh))


@pytest.mark.parametrize("function", [noisy, rewritten])
def test_what_cannot_be_a_recipe_stays_opaque(function: Callable[..., Any]) -> None:
    gm = opaque(function)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [function, aten.linear.default]
    assert set(constants(gm)) == {"w"}
