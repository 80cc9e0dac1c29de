"""Choosing ranks: errors are met, budgets are kept, and the knapsack equals trying everything."""

from __future__ import annotations

import itertools

import pytest
import torch
from factor_tools import gram, weight

from sparsec.errors import InputError, SpecError
from sparsec.factors import Kronecker, LowRank, Monarch, TensorNetwork
from sparsec.factors.select import (
    Option,
    choose,
    choose_for_error,
    low_rank_options,
    rank_for_error,
    tail_energy,
    tucker_parameters,
    tucker_ranks,
)
from sparsec.factors.tensor_network import search


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_rank_for_error_is_the_smallest(error, whitened):
    dense = weight((20, 30))
    g = gram(30) if whitened else None
    rank = rank_for_error(dense, error, g)
    assert LowRank(rank).fit(dense, g).error <= error + 1e-7
    if rank > 1:
        assert LowRank(rank - 1).fit(dense, g).error > error - 1e-9
    with pytest.raises(SpecError, match="at least 0"):
        rank_for_error(dense, -1.0)


def test_tail_energy_is_the_error_of_every_rank():
    dense = weight((9, 6))
    tails = tail_energy(dense)
    assert len(tails) == 7 and tails[0] == pytest.approx(float(dense.square().sum()))
    for rank in range(1, 6):
        assert LowRank(rank).fit(dense).error == pytest.approx((tails[rank] / tails[0]) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_knapsack_equals_enumeration(seed):
    generator = torch.Generator().manual_seed(seed)
    options = {}
    for name in "abcd":
        costs = torch.randint(1, 40, (5,), generator=generator).tolist()
        losses = torch.rand(5, generator=generator).tolist()
        options[name] = [Option(LowRank(i + 1), float(c), x) for i, (c, x) in enumerate(zip(costs, losses))]
    for budget in (40.0, 60.0, 100.0, 1000.0):
        every = [p for p in itertools.product(*options.values()) if sum(o.cost for o in p) <= budget]
        if not every:
            with pytest.raises(SpecError, match="below the cheapest"):
                choose(options, budget)
            continue
        found = choose(options, budget)
        assert sum(o.cost for o in found.values()) <= budget
        # costs are whole numbers below the 4096 levels, so rounding may cost at most a level a weight
        best = min(sum(o.loss for o in p) for p in every if sum(o.cost for o in p) <= budget * (1 - 4 / 4096))
        assert sum(o.loss for o in found.values()) <= best + 1e-12


def test_a_network_under_each_budget():
    torch.manual_seed(0)
    weights = {"thin": weight((16, 16)), "low": weight((24, 4)) @ weight((4, 24), seed=1) + 0.01 * weight((24, 24))}
    for cost in ("parameters", "flops", "nbytes", "milliseconds"):
        options = {
            n: low_rank_options(w, LowRank, [1, 2, 4, 8], cost, batch=4) for n, w in weights.items()
        }
        assert all(o[0].factor is None and o[0].loss == 0.0 for o in options.values())
        if cost == "milliseconds":  # a measured number: only that it is one, and that the choice obeys it
            budget = sum(max(o.cost for o in offered) for offered in options.values())
        else:
            budget = 0.7 * sum(o[0].cost for o in options.values())
        found = choose(options, budget)
        assert sum(o.cost for o in found.values()) <= budget and all(o.cost > 0 for o in found.values())
        if cost == "parameters":  # the weight that is nearly of rank 4 pays
            assert found["low"].factor == LowRank(4) and found["thin"].factor is None
    worst = {n: max(o, key=lambda v: v.loss).loss for n, o in options.items()}
    assert set(worst) == set(weights)


def test_least_cost_for_an_error():
    weights = {n: weight((12, 12), seed=i) for i, n in enumerate("ab")}
    options = {n: low_rank_options(w, LowRank, range(1, 6)) for n, w in weights.items()}
    found = choose_for_error(options, 8.0)
    assert sum(o.loss for o in found.values()) <= 64.0
    feasible = [p for p in itertools.product(*options.values()) if sum(o.loss for o in p) <= 64.0 * 0.99]
    assert sum(o.cost for o in found.values()) <= min(sum(o.cost for o in p) for p in feasible)


def test_options_skip_what_the_shape_refuses():
    offered = low_rank_options(weight((8, 12)), lambda r: Monarch(4, r), [1, 2, 3, 9])
    assert [o.factor for o in offered] == [None, Monarch(4, 1), Monarch(4, 2)]
    offered = low_rank_options(weight((8, 12)), lambda t: Kronecker((2, 3), t), [1, 6])
    assert offered[-1].loss == pytest.approx(0.0, abs=1e-18)
    with pytest.raises(SpecError, match="'seconds' is unknown"):
        low_rank_options(weight((8, 12)), LowRank, [1], "seconds")
    with pytest.raises(InputError, match="batch=0"):
        low_rank_options(weight((8, 12)), LowRank, [1], batch=0)


def test_tucker_ranks_keep_the_budget():
    tensor = weight((6, 5, 4))
    ranks = tucker_ranks(tensor, 60)
    assert tucker_parameters((6, 5, 4), ranks) <= 60
    with pytest.raises(SpecError, match="smallest core needs 16"):
        tucker_ranks(tensor, 15)


def test_networks_refuse():
    for edges, words in [
        ((), "triples"),
        (((0, 1),), "triples"),
        (((1, 0, 2),), "later one"),
        (((0, 1, 0),), "rank of 0-1=0"),
        (((0, 1, 2), (0, 1, 3)), "pair twice"),
    ]:
        with pytest.raises(SpecError, match=words):
            TensorNetwork(edges)
    assert "ends at mode 7" in (TensorNetwork(((0, 7, 2),)).refuse((24, 36)) or "")
    with pytest.raises(SpecError, match="2 to 8 modes"):
        search(torch.ones(3), 0.1)
