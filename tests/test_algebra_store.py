"""Stored plans: the same plan comes back from JSON, runs the same, and nothing that is wrong gets in."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from sparsec.algebra import (
    Circulant,
    Delta,
    Diagonal,
    Hankel,
    KhatriRao,
    Kron,
    Sparse,
    Symmetric,
    Toeplitz,
    from_dict,
    plan,
    plan_many,
)
from sparsec.algebra.plan import Plan
from sparsec.errors import LoadError


def stored(made: Any) -> Any:
    return from_dict(json.loads(json.dumps(made.to_dict())))


def values(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)


SQUARE = values(6, 6)
CASES: dict[str, tuple[Any, ...]] = {
    "chain": ("ij,jk,kl->il", values(4, 50), values(50, 50), values(50, 3)),
    "delta": ("ab,bcd,cde->ae", values(3, 4), Delta(4, 3), values(4, 4, 2)),
    "kron": ("bi,ji->bj", values(5, 24), Kron(values(3, 4), values(2, 6))),
    "khatri_rao": ("zi,ir->zr", values(5, 12), KhatriRao(values(3, 7), values(4, 7))),
    "diagonal": ("bi,ij->bj", values(5, 8), Diagonal(values(8))),
    "toeplitz": ("bi,ji->bj", values(5, 600), Toeplitz(values(600), values(600))),
    "hankel": ("bi,ji->bj", values(5, 8), Hankel(values(8), values(8))),
    "circulant": ("bi,ji->bj", values(5, 512), Circulant(values(512))),
    "sparse": ("bi,oi->bo", values(5, 8), Sparse(torch.where(values(9, 8) > 0.5, values(9, 8), 0.0))),
    "symmetric": ("ij,jk,kl->il", *[Symmetric(SQUARE + SQUARE.T)] * 3),
    "complex": ("ij,jk->ik", values(4, 5).to(torch.complex128), values(5, 3)),
    "nothing": ("a,b->", values(3), values(4)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_comes_back_and_computes_the_same(name: str) -> None:
    einsum, *operands = CASES[name]
    made = plan(einsum, *operands)
    found = stored(made)
    assert isinstance(found, Plan) and found == made and repr(found) == repr(made)
    assert found.flops == made.flops and found.peak == made.peak
    assert torch.equal(found(*operands), made(*operands))


def test_shared_expressions_come_back() -> None:
    a, b = values(6, 6), values(6, 6)
    made = plan_many([("ij,jk,kl->il", a, b, b), ("ij,jk->ik", a, b)])
    found = stored(made)
    assert found == made and not found.single
    assert all(torch.equal(x, y) for x, y in zip(found(a, b), made(a, b)))


@pytest.mark.parametrize(
    ("einsum", "operands"),
    [
        ("bi,ij,jk->bk", (("batch", 16), (16, 16), (16, 16))),
        ("bi,ij,jo->bo", (("b", "i"), ("i", 8), (8, "o"))),
        ("bi,ji->bj", (("batch", 512), Circulant(values(512).float()))),
    ],
    ids=["one size", "three sizes", "transform"],
)
def test_plans_for_unknown_sizes_come_back(einsum: str, operands: tuple[Any, ...]) -> None:
    made = plan(einsum, *operands)
    found = stored(made)
    assert found == made and found.costs == made.costs and repr(found) == repr(made)
    sizes = {s.name: 24 if s.name != "o" else 5 for s in made.symbols}
    assert found.at(**sizes) == made.at(**sizes)
    assert found.at(**sizes).flops == made.at(**sizes).flops


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("version",), 0, "has version 1, this is 0"),
        (("plan",), None, "no Plan"),
        (("plan", "steps"), {}, "no list"),
        (("plan", "steps", 0, "mode"), "exec", "none of sum"),
        (("plan", "steps", 0, "sources"), [7], "one or two values"),
        (("plan", "steps", 0, "sources"), [0, 3], "not there yet"),
        (("plan", "steps", 0, "sources"), [0, -1], "no integer from 0"),
        (("plan", "steps", 0, "flops"), "__import__('os')", "no number"),
        (("plan", "steps", 0, "flops"), {"cost": ["exec", "batch"]}, "none of Add"),
        (("plan", "steps", 0, "flops"), {"cost": ["Pow", 9, ["Pow", 9, 99]]}, "power that no plan has"),
        (("plan", "steps", 0, "flops"), {"cost": ["/", 1, 0]}, "divides by zero"),
        (("plan", "steps", 0, "flops"), {"cost": "a.b"}, "no name of a size"),
        (("plan", "steps", 0, "flops"), {"tree": 1}, "no cost"),
        (("plan", "reads", 0, "operand"), 9, "beyond the 3"),
        (("plan", "reads", 0, "kind"), "pickle", "none of dense"),
        (("plan", "reads", 0, "extra"), 1, "no Leaf has the fields"),
        (("plan", "reads", 0, "axes"), KeyError, "no Leaf has the fields"),
        (("plan", "kinds", 0), "object", "none of Dense"),
        (("plan", "same"), [0, 1], "do not fit together"),
        (("plan", "same"), [2, 1, 2], "do not fit together"),
        (("plan", "outputs"), [], "no step makes"),
        (("plan", "outputs", 0, "value"), 99, "no step makes"),
        (("plan", "outputs", 0, "network", "equation", "output"), 3, "no str"),
        (("plan", "single"), 1, "no bool"),
        (("plan", "memory"), 0, "no integer from 1"),
    ],
)
def test_what_is_wrong_is_refused(path: tuple[Any, ...], value: Any, says: str) -> None:
    data = json.loads(json.dumps(plan(CASES["chain"][0], *CASES["chain"][1:]).to_dict()))
    with pytest.raises(LoadError, match=says):
        from_dict(changed(data, path, value))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("symbols",), [], "no symbols"),
        (("plans",), [], "no symbols or no plans"),
        (("symbols", 0), "other", "'batch', which is no size"),
        (("symbols", 0), "os.system", "no name"),
        (("symbols",), KeyError, "symbols"),
    ],
)
def test_wrong_buckets_are_refused(path: tuple[Any, ...], value: Any, says: str) -> None:
    data = plan("bi,ij,jk->bk", ("batch", 16), (16, 16), (16, 16)).to_dict()
    with pytest.raises(LoadError, match=says):
        from_dict(changed(json.loads(json.dumps(data)), path, value))


@pytest.mark.parametrize("data", [None, [], "plan", {}, {"version": 1}])
def test_other_values_are_refused(data: Any) -> None:
    with pytest.raises(LoadError):
        from_dict(data)


def test_deep_costs_are_refused_instead_of_followed() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = ["Add", 1, deep]
    data = plan(CASES["chain"][0], *CASES["chain"][1:]).to_dict()
    with pytest.raises(LoadError, match="nested deeper"):
        from_dict(changed(data, ("plan", "naive"), {"cost": deep}))
