"""Rewrite rules: proved in finite fields, broken copies caught, refusals, and searches that use them."""

from __future__ import annotations

import random

import pytest
import torch

from sparsec import algebra
from sparsec.algebra import saturate
from sparsec.algebra.proof import mutants, prove, rewritten
from sparsec.algebra.ring import FOURIER, LINEAR, TRANSFORM, Ring, transform_lengths
from sparsec.algebra.rules import KINDS, Refusal, Rule, rule, rules
from sparsec.algebra.rules_layers import shift
from sparsec.algebra.search import fastest, fingerprint, optimise
from sparsec.algebra.terms import Term, evaluate, flops, v, variables, walk
from sparsec.errors import DependencyError, InputError, SpecError, VerifyError

RULES = rules()
NAMES = [r.name for r in RULES]


def each(test):
    return pytest.mark.parametrize("name", NAMES)(test)


@each
def test_rule_holds_on_a_hundred_shapes_in_three_rounds(name: str):
    proof = prove(rule(name), shapes=100, rounds=3)
    assert proof.holds, proof.failures
    assert (proof.shapes, proof.rounds) == (100, 3)


@each
def test_broken_copies_of_a_rule_are_caught(name: str):
    broken = list(mutants(rule(name)))
    assert len(broken) >= 3
    survivors = [what for what, mutant in broken if prove(mutant, stop=1).holds]
    assert not survivors


@each
def test_rule_says_what_it_is(name: str):
    found = rule(name)
    assert " --> " in found.__doc__ and found.kind in KINDS and found.kind in found.__doc__
    assert bool(found.condition) == (found.refused is not None)


@pytest.mark.parametrize("name", [r.name for r in RULES if r.refused])
def test_a_rule_whose_condition_fails_says_why(name: str):
    found = rule(name)
    rng = random.Random(0)
    for _ in range(20):
        outcome = rewritten(found, found.refused(rng))
        assert isinstance(outcome, Refusal) and len(outcome.reason) > 20


def test_rules_leave_other_terms_alone():
    for found in RULES:
        assert found.rewrite(v("x", 3, 4)) is None
        assert found.rewrite(v("x", 3, 4) @ v("w", 4, 5)) is None or found.name == "parallel_linears"


def test_a_wrong_rule_is_not_proved():
    wrong = Rule("wrong", "a @ b --> b @ a", "exact", lambda t: t.args[1] @ t.args[0] if t.op == "matmul" else None,
                 lambda r: v("a", 3, 3) @ v("b", 3, 3))  # fmt: skip
    assert "differ" in prove(wrong).failures[0]
    with pytest.raises(VerifyError, match="'wrong' changed the value"):
        optimise(v("a", 3, 3) @ v("b", 3, 3), engine="search", using=[wrong])


def test_rule_values_are_checked():
    with pytest.raises(SpecError, match="none of 'exact'"):
        Rule("a", "x --> y", "sometimes", lambda t: None, lambda r: v("x", 1))
    with pytest.raises(SpecError, match="before --> after"):
        Rule("a", "x is y", "exact", lambda t: None, lambda r: v("x", 1))
    with pytest.raises(SpecError, match="belongs to the kind"):
        Rule("a", "x --> y", "exact", lambda t: None, lambda r: v("x", 1), condition="on Sundays")
    with pytest.raises(SpecError, match="nearest: 'low_rank_left'"):
        rule("low_rank_leff")
    assert algebra.rules() == RULES


# -- rings and terms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12, 15, 40])
def test_transform_in_the_field(n: int):
    generator = torch.Generator().manual_seed(n)
    a, b = TRANSFORM.random((n,), generator), TRANSFORM.random((n,), generator)
    assert n in transform_lengths(40)
    assert torch.equal(TRANSFORM.dft(TRANSFORM.dft(a), inverse=True), a)
    product = TRANSFORM.dft(TRANSFORM.mul(TRANSFORM.dft(a), TRANSFORM.dft(b)), inverse=True)
    index = (torch.arange(n)[:, None] - torch.arange(n)[None]) % n
    assert torch.equal(product, TRANSFORM.matmul(a[index], b[:, None])[:, 0])


def test_fields_are_exact_and_refuse_what_they_lack():
    big = torch.full((3, 4000), LINEAR.prime - 1)
    assert LINEAR.matmul(big, big.T).tolist() == [[4000] * 3] * 3
    with pytest.raises(InputError, match="no root of unity of order 7"):
        TRANSFORM.dft(torch.arange(7))
    with pytest.raises(InputError, match="no root"):
        LINEAR.dft(torch.arange(4))
    assert FOURIER == 2013265921 and 7 not in transform_lengths(10)
    x = Ring(0).random((3, 4), torch.Generator().manual_seed(0))
    assert torch.allclose(Ring(0).dft(Ring(0).dft(x), inverse=True), x)


def test_terms_check_shapes_and_count():
    x, w = v("x", 3, 4), v("w", 4, 5)
    assert flops(x @ w) == 120 and flops(x @ w, frozenset("xw")) == 0
    assert flops((x @ w) + (x @ w)) == 120 + 15  # equal subterms are computed once
    twice = Term("node", (x @ w,), (1,)) + Term("node", (x @ w,), (2,))
    assert variables(twice) == {"x": (3, 4), "w": (4, 5)}
    with pytest.raises(InputError, match="matmul does not take shapes"):
        w @ x
    with pytest.raises(InputError, match="no operation is called"):
        Term("madmul", (x, w))
    with pytest.raises(InputError, match="has shapes"):
        variables(x @ v("x", 4, 4))
    values = {"x": torch.ones(3, 4, dtype=torch.float64), "w": torch.ones(4, 5, dtype=torch.float64)}
    assert evaluate(x @ w, values, Ring(0)).tolist() == [[4.0] * 5] * 3


# -- searches ------------------------------------------------------------------------------------------------------

X, U, W = v("x", 64, 1024), v("u", 1024, 16), v("w", 16, 1024)


def kron(a: str, b: str) -> Term:
    return Term("kron", (v(a, 32, 32), v(b, 32, 32)))


SEARCHES = {
    "association through low rank": (X @ (U @ W), ("u", "w"), 2 * 2 * 64 * 1024 * 16),
    "constants folded stay folded": (X @ (v("a", 1024, 512) @ v("b", 512, 1024)), ("a", "b"), 2 * 64 * 1024 * 1024),
    "common factor": ((X @ U) @ W + (X @ U) @ v("z", 16, 1024), ("u", "w", "z"), 2 * 2 * 64 * 1024 * 16),
    "mixed product": (kron("a", "b") @ kron("c", "d"), (), 2 * 2 * 32**3 + 1024**2),
    "vec trick": (v("y", 8, 1024) @ kron("a", "b"), ("a", "b"), 2 * 2 * 8 * 32**3),
    "gram": (Term("khatri_rao", (v("a", 50, 8), v("b", 60, 8))).T @ Term("khatri_rao", (v("c", 50, 8), v("d", 60, 8))),
             (), 2 * 64 * 110 + 64),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["search", "egglog"])
@pytest.mark.parametrize("name", SEARCHES)
def test_searches_find_the_cheap_form(name: str, engine: str):
    if engine == "egglog":
        pytest.importorskip("egglog")
    term, constant, want = SEARCHES[name]
    found = optimise(term, constant, engine="auto" if name == "vec trick" else engine)
    assert found.best.flops == want, found
    assert found.before == flops(term, frozenset(constant)) >= want
    assert found.engine == engine or name == "vec trick"
    if want < found.before:
        assert found.best.applied and all(a.partition(" ")[0] in (*NAMES, "add", "mul") for a in found.best.applied)


def test_provenance_replays():
    term = shift(shift(X @ v("a", 1024, 1024), v("p", 1024)) @ v("b", 1024, 64), v("q", 64))
    found = optimise(term, ("a", "b", "p", "q"), engine="search")
    assert found.best.applied == ("linears_folded",)
    assert rule("linears_folded").rewrite(term) == found.best.term
    assert "142675968 --> 8392704 flops by linears_folded" in str(found)


def test_budget_bounds_the_search_and_is_reported():
    many = X
    for i in range(6):
        many = many @ v(f"w{i}", 1024, 1024)
    found = optimise(many, engine="search", budget=10)
    assert found.explored <= 11 + len(list(walk(many))) and not found.complete
    assert optimise(X @ (U @ W), engine="search").complete


def test_refusals_are_kept():
    x, k = v("x", 8, 8), v("k", 3, 3)
    found = optimise(Term("conv", (x, k)), engine="search")
    assert found.best.term == Term("conv", (x, k)) and "factor it first" in found.refusals[0]


def test_missing_egglog(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saturate, "find_spec", lambda name: None)
    assert optimise(X @ (U @ W)).engine == "search"
    with pytest.raises(DependencyError, match="pip install egglog"):
        optimise(X @ (U @ W), engine="egglog")
    with pytest.raises(SpecError, match="none of 'auto'"):
        optimise(X, engine="z3")


def test_fingerprints_ignore_the_order_of_sums():
    a, b = v("a", 2, 2), v("b", 2, 2)
    assert fingerprint(a + b) == fingerprint(b + a) != fingerprint(a @ b)
    assert fingerprint(a @ b) != fingerprint(b @ a)


def test_the_clock_decides_between_candidates():
    found = optimise(X @ (U @ W), ("u", "w"), engine="search")
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in variables(X @ (U @ W)).items()}
    winner, times = fastest(found.candidates, values, ("u", "w"))
    assert winner in found.candidates and len(times) == len(found.candidates) == 2 and min(times) > 0
