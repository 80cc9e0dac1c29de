"""restructure: weights that are computed from smaller ones; what is rewritten, what is left alone and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tools import calls, captured
from torch import nn
from torch.nn import functional as F

import sparsec
from sparsec.algebra.rules import rule
from sparsec.codegen import tune
from sparsec.driver import Context, Options, run_passes
from sparsec.errors import SpecError
from sparsec.graph import KEY
from sparsec.passes.normalise import Normalise
from sparsec.passes.restructure import RULES, Restructure
from sparsec.passes.rewrite import Applied
from sparsec.report import Report


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Parameters by name, and a function of them and of the inputs."""

    def __init__(self, body: Callable[..., torch.Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("turn", (torch.arange(16)[:, None] - torch.arange(16)[None]) % 16)

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.body(self, *x)


def circulant(m: Any) -> torch.Tensor:
    return m.c[:, :, m.turn].permute(0, 2, 1, 3).reshape(m.c.shape[0] * 16, m.c.shape[1] * 16)


def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.unsqueeze(1) * b.unsqueeze(0)).reshape(-1, a.shape[1])


def filtered(m: Any, x: torch.Tensor, **walk: Any) -> torch.Tensor:
    weight = torch.outer(m.g, m.h)[None, None].expand(3, 1, 5, 4)
    return F.conv2d(x, weight, m.bias if hasattr(m, "bias") else None, groups=3, **walk)


CASES: dict[str, tuple[str, Callable[[], Net], tuple[tuple[int, ...], ...], str]] = {
    "a linear": (
        "kron_vec", lambda: Net(lambda m, x: F.linear(x, torch.kron(m.a, m.b), m.bias), a=(4, 3), b=(5, 6), bias=(20,)),
        ((2, 7, 18),), f"{2 * 20 * 18} --> {2 * 5 * 3 * 6 + 2 * 4 * 5 * 3} flops a row",
    ),
    "a product, the other order": (
        "kron_vec", lambda: Net(lambda m, x: x @ torch.kron(m.a, m.b), a=(9, 2), b=(4, 8)), ((7, 36),),
        f"{2 * 36 * 16} --> {2 * 9 * 2 * 4 + 2 * 2 * 4 * 8} flops a row",
    ),
    "a product of two": (
        "kron_mixed_product", lambda: Net(lambda m, a, b: torch.kron(a, b) @ torch.kron(m.c, m.d), c=(3, 5), d=(2, 4)),
        ((6, 3), (4, 2)), f"{2 * 24 * 6 * 20} --> {2 * 6 * 3 * 5 + 2 * 4 * 2 * 4 + 24 * 20} flops",
    ),
    "a Gram matrix": (
        "khatri_rao_gram", lambda: Net(lambda m, a, b: joined(a, b).t() @ joined(m.c, m.d), c=(5, 3), d=(6, 3)),
        ((5, 2), (6, 2)), f"{30 * 5 + 2 * 30 * 6} --> {2 * 6 * 11 + 6} flops",
    ),
    "a Gram matrix of einsums": (
        "khatri_rao_gram",
        lambda: Net(lambda m, a, b: joined(a, b).t() @ torch.einsum("ir,jr->ijr", a, b).reshape(30, 2)),
        ((5, 2), (6, 2)), f"{30 * 4 + 2 * 30 * 4} --> {2 * 4 * 11 + 4} flops",
    ),
    "a diagonal": (
        "diag_absorbed", lambda: Net(lambda m, x: F.linear(x, torch.diag(m.d), m.bias), d=(12,), bias=(12,)),
        ((7, 12),), f"{2 * 144} --> 24 flops a row",
    ),
    "a diagonal on the left": (
        "diag_absorbed", lambda: Net(lambda m, x: torch.diag_embed(m.d) @ x, d=(12,)), ((12, 5),),
        f"{2 * 144 * 5} --> 60 flops",
    ),
    "circulant blocks": (
        "block_circulant_fft", lambda: Net(lambda m, x: F.linear(x, circulant(m), m.bias), c=(3, 4, 16), bias=(48,)),
        ((7, 64),), f"{2 * 48 * 64} --> {160 * 7 + 8 * 12 * 9} flops a row",
    ),
    "a blur": (
        "separable_filter", lambda: Net(filtered, g=(5,), h=(4,), bias=(3,)), ((2, 3, 12, 11),),
        "40 --> 18 flops a pixel",
    ),
    "a strided blur": (
        "separable_filter",
        lambda: Net(lambda m, x: filtered(m, x, stride=(1, 2), padding=(2, 1), dilation=(1, 2)), g=(5,), h=(4,)),
        ((2, 3, 12, 11),), "40 --> 28 flops a pixel",
    ),
}  # fmt: skip


def restructured(
    net: nn.Module, *args: torch.Tensor, rules: Any = tuple(RULES), tune: str = "off", shapes: Any = None
) -> tuple[Any, list[Applied]]:
    gm = captured(net, *args, shapes=shapes)
    context = Context(report=Report(), options=Options(tune=tune))
    run_passes(gm, [Restructure(rules), Normalise()], context)
    entries = list(gm.meta[KEY].get("rewrites", ()))
    assert context.report.notes == [str(e) for e in entries]
    return gm, entries


def close(net: nn.Module, other: Callable[..., torch.Tensor], *args: torch.Tensor) -> None:
    exact = copy.deepcopy(net).double()(*(a.double() for a in args))
    allowed = 16 * (net(*args) - exact).abs().max().item() + 1e-5
    assert (other(*args) - exact).abs().max().item() <= allowed


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_known_structure_is_used(case: str, tmp_path: Path) -> None:
    name, make, shapes, detail = CASES[case]
    net, args = make().eval(), [torch.randn(s) for s in shapes]
    passes = sparsec.DEFAULT.insert_before("normalise", Restructure())
    cm = sparsec.compile(net, {"_default": None}, tuple(args), passes=passes, tune="off")
    assert f"rewrite: <root> rewritten by {name}: {detail}" in sparsec.report(cm).notes
    close(net, cm, *args)
    assert torch.equal(sparsec.load(sparsec.save(cm, tmp_path / "net"))(*args), cm(*args))
    state = sparsec.dense_state_dict(cm)
    assert list(state) == list(net.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    other = make().eval()
    sparsec.load_dense_state_dict(cm, other.state_dict())
    close(other, cm, *args)


@torch.no_grad()
def test_rules_follow_each_other() -> None:
    """A product of Kronecker products is one, and that is two small linears, which are sites."""
    net = Net(lambda m, x: x @ (torch.kron(m.a, m.b) @ torch.kron(m.c, m.d)), a=(3, 4), b=(6, 5), c=(4, 2), d=(5, 7))
    x = torch.randn(9, 18)
    gm, entries = restructured(net.eval(), x)
    assert [e.rules for e in entries if not e.refused] == [("kron_mixed_product",), ("kron_vec",)]
    assert calls(gm).count("linear") == 2 and "kron" not in calls(gm)
    close(net, gm, x)


REFUSED: dict[str, tuple[str, Callable[[], Net], tuple[tuple[int, ...], ...], str]] = {
    "small factors": (
        "kron_vec", lambda: Net(lambda m, x: F.linear(x, torch.kron(m.a, m.b)), a=(1, 1), b=(5, 6)), ((7, 6),),
        "would not pay",
    ),
    "other cuts": (
        "kron_mixed_product", lambda: Net(lambda m, a, b: torch.kron(a, b) @ torch.kron(m.c, m.d), c=(2, 5), d=(3, 4)),
        ((6, 3), (4, 2)), "cut the inner index differently: 3 x 2 and 2 x 3",
    ),
    "other rows": (
        "khatri_rao_gram", lambda: Net(lambda m, a, b: joined(a, b).t() @ joined(m.c, m.d), c=(6, 3), d=(5, 3)),
        ((5, 2), (6, 2)), "5 and 6 rows, so their products do not align",
    ),
    "small blocks": (
        "block_circulant_fft", lambda: Net(lambda m, x: F.linear(x, m.c[m.turn[:4, :4] % 4]), c=(4,)), ((7, 4),),
        "would not pay",
    ),
    "channels": (
        "separable_filter",
        lambda: Net(lambda m, x: F.conv2d(x, torch.outer(m.g, m.h)[None, None].expand(2, 3, 5, 4)), g=(5,), h=(4,)),
        ((1, 3, 9, 9),), "not the filter of single channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_alone_says_why(case: str) -> None:
    name, make, shapes, says = REFUSED[case]
    net, args = make().eval(), [torch.randn(s) for s in shapes]
    plain, _ = restructured(net, *args, rules=[])
    gm, entries = restructured(net, *args)
    assert [(e.rules, e.refused) for e in entries] == [((name,), True)] and says in entries[0].detail
    assert calls(gm) == calls(plain) and torch.equal(gm(*args), plain(*args))


def ones() -> Net:
    net = Net(lambda m, x: F.linear(x, 2.0 * m.a), a=(32, 32))
    nn.init.ones_(net.a)
    return net


NO_PATTERN: dict[str, tuple[Callable[[], Net], tuple[tuple[int, ...], ...]]] = {
    "a weight like any other": (lambda: Net(lambda m, x: F.linear(x, m.a), a=(12, 18)), ((7, 18),)),
    "an off-diagonal": (lambda: Net(lambda m, x: x @ torch.diag(m.d, 1), d=(11,)), ((7, 12),)),
    "blocks turned the other way": (
        lambda: Net(lambda m, x: F.linear(x, circulant(m).flip(0)), c=(3, 4, 16)), ((7, 64),),
    ),
    "a circulant by its values alone": (ones, ((7, 32),)),
    "sums of outer products": (
        lambda: Net(lambda m, x: F.conv2d(x, (torch.outer(m.g, m.h) + m.k)[None, None]), g=(5,), h=(4,), k=(5, 4)),
        ((1, 1, 9, 9),),
    ),
    "columns that differ": (
        lambda: Net(lambda m, a, b: joined(a, b).t() @ m.c, c=(30, 3)), ((5, 2), (6, 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_PATTERN)
def test_other_weights_are_no_candidates(case: str) -> None:
    make, shapes = NO_PATTERN[case]
    net, args = make().eval(), [torch.randn(s) for s in shapes]
    gm, entries = restructured(net, *args)
    assert entries == []
    close(net, gm, *args)


@pytest.mark.parametrize("case", ["a linear", "circulant blocks", "a blur", "a Gram matrix", "a diagonal on the left"])
@pytest.mark.parametrize(("us", "taken"), [((100.0, 80.0), True), ((100.0, 99.0), False)])
def test_the_clock_decides(case: str, us: tuple[float, float], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(contenders: Any) -> Any:
        seen.append([c() for c in contenders])
        return type("Timing", (), {"us": us})

    monkeypatch.setattr(tune, "measure", measured)
    name, make, shapes, _ = CASES[case]
    _, entries = restructured(make().eval(), *(torch.randn(s) for s in shapes), tune="measure")
    (entry,) = [e for e in entries if e.rules == (name,)]
    assert entry.refused != taken and f"{us[0]:.1f} --> {us[1]:.1f} us" in entry.detail
    assert seen[0][0].shape == seen[0][1].shape


def test_open_sizes_must_pay_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(100.0, 50.0), (100.0, 50.0), (100.0, 99.0)])
    monkeypatch.setattr(tune, "measure", lambda c: type("Timing", (), {"us": next(times)}))
    net = Net(lambda m, x: F.linear(x, torch.kron(m.a, m.b)), a=(4, 3), b=(5, 6)).eval()
    _, entries = restructured(net, torch.randn(7, 18), tune="measure", shapes="batch")
    assert entries[0].refused and "at 256 rows" in entries[0].detail
    gm, entries = restructured(net, torch.randn(7, 18), shapes="batch")
    assert not entries[0].refused
    for rows in (2, 11):
        close(net, gm, torch.randn(rows, 18))


def test_the_pass() -> None:
    assert all(rule(name).statement for name in RULES) and Restructure.exact
    assert repr(Restructure()) == "Restructure()" and repr(Restructure(["kron_vec"])) == "Restructure(['kron_vec'])"
    with pytest.raises(SpecError, match="no rule is called 'kron'"):
        Restructure(["kron"])
    with pytest.raises(SpecError, match="'shared' reads no structure"):
        Restructure(["shared"])
    net = Net(lambda m, x: x @ torch.diag(m.d), d=(12,)).eval()
    gm = captured(net, torch.randn(3, 12))
    run_passes(gm, [Restructure()], Context(options=Options(training=True)))
    assert "diag" in calls(gm)
    gm, entries = restructured(net, torch.randn(3, 12), rules=["kron_vec"])
    assert entries == []
