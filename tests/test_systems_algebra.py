"""Published systems of tensor algebra, each with the property that makes it what it is, in exact counts."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import pytest
import torch

import sparsec
from sparsec.algebra import KhatriRao, Sparse, Symmetric, plan, plan_many, rule, rules
from sparsec.algebra.attention import attention_flops, grid_means, kronecker_attention
from sparsec.algebra.brauer import dense_matrix, equivariant, pairings, partitions, skew_form
from sparsec.algebra.proof import prove
from sparsec.errors import InputError, SpecError

D = torch.float64


def R(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed + sum(shape)))


# -- equivariant polynomials for graph networks (Puny et al. 2023) -------------------------------------------------


def motifs(most: int) -> list[nx.Graph]:
    return [g for g in nx.graph_atlas_g() if 2 <= g.number_of_nodes() <= most and nx.is_connected(g)]


def counted(graph: nx.Graph, output: str = "") -> str:
    edges = ["abcde"[u] + "abcde"[w] for u, w in graph.edges]
    return ",".join(edges) + "->" + output


def brute(graph: nx.Graph, x: torch.Tensor, output: str = "") -> torch.Tensor:
    """The sum over all assignments of nodes, written down."""
    n = x.shape[0]
    made = torch.zeros([n] * len(output), dtype=D)
    for assignment in itertools.product(range(n), repeat=graph.number_of_nodes()):
        term = math.prod(float(x[assignment[u], assignment[w]]) for u, w in graph.edges)
        made[tuple(assignment["abcde".index(c)] for c in output)] += term
    return made


def test_all_motifs_of_five_nodes_cost_a_twentieth_and_share():
    x = torch.tensor(nx.to_numpy_array(nx.gnp_random_graph(20, 0.4, seed=1)))
    adjacency = Symmetric(x)
    found = motifs(5)
    assert [sum(g.number_of_nodes() == k for g in found) for k in (2, 3, 4, 5)] == [1, 2, 6, 21]
    expressions = [(counted(g), *[adjacency] * g.number_of_edges()) for g in found]
    made = plan_many(expressions)
    # a term of e factors takes e - 1 products and an addition
    assert made.naive == sum(20 ** g.number_of_nodes() * g.number_of_edges() for g in found)
    assert made.flops < made.naive / 20
    assert made.flops < sum(plan(*e).flops for e in expressions)
    counts = dict(zip((counted(g) for g in found), made(adjacency)))
    power = {k: torch.linalg.matrix_power(x, k).trace() for k in (3, 4, 5)}
    for k in (3, 4, 5):
        cycle = next(counted(g) for g in found if nx.is_isomorphic(g, nx.cycle_graph(k)))
        assert counts[cycle] == power[k]
    clique = next(counted(g) for g in found if g.number_of_edges() == 6 and g.number_of_nodes() == 4)
    cliques = sum(1 for c in nx.enumerate_all_cliques(nx.from_numpy_array(x.numpy())) if len(c) == 4)
    assert counts[clique] == 24 * cliques


@pytest.mark.parametrize("output", ["", "a", "ab"])
def test_polynomials_equal_brute_force_and_permute_with_the_graph(output: str):
    x = R(5, 5)
    x = x + x.T
    adjacency = Symmetric(x)
    found = [g for g in motifs(4) if g.number_of_nodes() <= 4]
    made = plan_many([(counted(g, output), *[adjacency] * g.number_of_edges()) for g in found])
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    turned = made(Symmetric(x[order][:, order]))
    for graph, got, other in zip(found, made(adjacency), turned):
        torch.testing.assert_close(got, brute(graph, x, output), rtol=1e-9, atol=1e-9)
        index = (order,) if len(output) == 1 else (order[:, None], order[None]) if output else ()
        torch.testing.assert_close(other, got[index] if index else got, rtol=1e-9, atol=1e-9)


def test_four_cycles_on_sixty_nodes_in_two_products():
    made = plan("ab,bc,cd,da->", *(R(60, 60, seed=i) for i in range(4)))
    assert made.naive == 4 * 60**4 and made.flops == 2 * 2 * 60**3 + 2 * 60**2
    assert made.naive == 51_840_000 and made.flops < 8.8e5


def test_polynomials_separate_what_message_passing_cannot():
    """Two triangles and a hexagon have equal degrees everywhere (1-WL), and different closed walks."""
    graphs = [nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3)), nx.cycle_graph(6)]
    first, second = (torch.tensor(nx.to_numpy_array(g)) for g in graphs)
    assert torch.equal(first.sum(0), second.sum(0))
    triangles = [plan("ab,bc,ca->a", s, s, s)(s, s, s) for s in (Symmetric(first), Symmetric(second))]
    assert triangles[0].tolist() == [2.0] * 6 and triangles[1].tolist() == [0.0] * 6


def test_sparse_graphs_are_walked_by_their_edges():
    x = torch.tensor(nx.to_numpy_array(nx.cycle_graph(200)))
    op = Sparse(x)
    made = plan("ab,bf->af", op, R(200, 8))
    assert made.flops == 2 * 400 * 8 and torch.equal(made(op, R(200, 8)), x @ R(200, 8))


# -- Brauer layers (Pearce-Crump 2023) -----------------------------------------------------------------------------

CASES = [("O", n, k, m) for n in (3, 4) for k in range(4) for m in range(4) if (k + m) % 2 == 0]
CASES += [("S", 3, k, m) for k in range(3) for m in range(3)] + [("Sp", 4, k, m) for k, m in ((2, 2), (1, 3), (3, 1))]


@pytest.mark.parametrize("group,n,k,m", CASES)
def test_diagrams_equal_their_matrices(group: str, n: int, k: int, m: int):
    made = equivariant(group, n, k, m, batch=2)
    v = R(2, *[n] * k).float()
    for number, diagram in enumerate(made.diagrams):
        one = torch.zeros(len(made.diagrams))
        one[number] = 1.0
        want = v.reshape(2, -1) @ dense_matrix(group, diagram, n, k, m).T
        torch.testing.assert_close(made.apply(one, v).reshape(2, -1), want, rtol=1e-4, atol=1e-4)


def test_layers_commute_with_their_group():
    n = 4
    q = torch.linalg.qr(R(n, n))[0].float()
    p = torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    form = skew_form(n)
    generator = R(n, n).float()
    s = torch.linalg.matrix_exp(0.3 * form @ (generator + generator.T))  # the Lie algebra of Sp is form * symmetric
    torch.testing.assert_close(s.T @ form @ s, form, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(s @ form @ s.T, form, rtol=1e-4, atol=1e-4)
    for group, g in (("O", q), ("S", p), ("Sp", s)):
        made = equivariant(group, n, 2, 2)
        v = R(1, n, n).float()
        c = R(len(made.diagrams)).float()
        left = made.apply(c, torch.einsum("zij,ai,bj->zab", v, g, g))
        right = torch.einsum("zij,ai,bj->zab", made.apply(c, v), g, g)
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
        other = torch.einsum("zij,ai,bj->zab", made.apply(c, v), 2 * g, g)
        assert not torch.allclose(left, other, rtol=1e-2, atol=1e-2)


def test_brauer_layers_add_where_matrices_multiply():
    for n in (3, 4):
        made = equivariant("O", n, 3, 3)
        assert len(made.diagrams) == 15 and made.dense_flops == 2 * 15 * n**6
        assert made.plan.flops <= 9 * n**2  # nine traces, no product; shared traces are taken once
        assert {s.mode for s in made.plan.steps} == {"sum"}
    assert [len(list(pairings(range(k)))) for k in (0, 2, 4, 6)] == [1, 1, 3, 15]
    assert [len(list(partitions(range(k), k))) for k in (1, 2, 3, 4)] == [1, 2, 5, 15]


def test_brauer_refusals():
    with pytest.raises(InputError, match="must be even"):
        equivariant("O", 3, 2, 1)
    with pytest.raises(SpecError, match="none of 'O', 'Sp', 'S'"):
        equivariant("U", 3, 2, 2)
    with pytest.raises(InputError, match="even n"):
        equivariant("Sp", 3, 2, 2)
    made = equivariant("O", 3, 2, 2)
    with pytest.raises(InputError, match="3 coefficients"):
        made.apply(torch.ones(2), torch.ones(1, 3, 3))


# -- Kronecker attention (Gao et al. 2020) -------------------------------------------------------------------------


def test_kronecker_attention_counts_and_equals_attention_on_the_means():
    h = w = 64
    full = plan("ic,jc,jd->id", (h * w, 8), (h * w, 8), (h * w, 8))
    scores = 2 * (h * w) ** 2 * 8 * 2
    means = 2 * (h * w) * (h + w) * 8 * 2
    assert scores / means == h * w / (h + w) == 32
    assert full.flops <= scores  # without the softmax attention is associative, and the planner knows
    assert attention_flops(h, w, 8, full=True) == scores and attention_flops(h, w, 8, full=False) == means
    x = R(2, 30, 4)
    context = torch.cat([x.reshape(2, 6, 5, 4).mean(2), x.reshape(2, 6, 5, 4).mean(1)], 1)
    want = torch.softmax(x @ context.mT / 2, -1) @ context
    torch.testing.assert_close(kronecker_attention(x, x, x, 6, 5), want)
    both = torch.softmax(context @ context.mT / 2, -1) @ context
    summed = both[:, :6, None] + both[:, None, 6:]
    torch.testing.assert_close(kronecker_attention(x, x, x, 6, 5, queries=False), summed.reshape(2, 30, 4))
    project = R(4, 4)  # projections commute with the means
    torch.testing.assert_close(grid_means(x @ project, 6, 5), grid_means(x, 6, 5) @ project)
    for bad in ((6, 4), (0, 30), (-6, -5)):
        with pytest.raises(InputError, match="a grid of"):
            kronecker_attention(x, x, x, *bad)
    with pytest.raises(InputError, match="must agree"):
        kronecker_attention(x[..., :3], x, x, 6, 5)


class OnGrid(torch.nn.Module):
    """Self-attention on an 8 x 8 grid, full or against the means."""

    def __init__(self, means: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.means = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16), means

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.means:
            return self.out(kronecker_attention(q, k, v, 8, 8))
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_kronecker_attention_takes_the_place_of_attention_only_by_hand():
    torch.manual_seed(0)
    full, swapped = OnGrid(means=False).eval(), OnGrid(means=True).eval()
    swapped.load_state_dict(full.state_dict())
    x = torch.randn(2, 64, 16)
    with torch.no_grad():
        compiled = [sparsec.compile(m, None, (x,), tune="off") for m in (full, swapped)]
        for made, model in zip(compiled, (full, swapped)):
            torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(full(x), swapped(x), atol=1e-3)  # another function: no rule and no pass may do it
    assert not [r.name for r in rules() if "attention" in r.name or "kronecker_attention" in r.statement]


# -- tensor attention (Alman and Song 2023) ------------------------------------------------------------------------


def taylor(x: torch.Tensor, degree: int) -> torch.Tensor:
    """Features with <f(a), f(b)> = sum_{g <= degree} <a, b>^g / g!."""
    made = [torch.ones(x.shape[0], 1, dtype=D)]
    power = made[0]
    for g in range(1, degree + 1):
        power = (power[:, :, None] * x[:, None]).reshape(x.shape[0], -1)
        made.append(power / math.sqrt(math.factorial(g)))
    return torch.cat(made, 1)


def test_tensor_attention_through_the_khatri_rao_gram():
    assert prove(rule("khatri_rao_gram")).holds
    n, d = 12, 2
    q, k1, k2, v1, v2 = (0.5 * torch.tanh(R(n, d, seed=i)) for i in range(5))
    exact = torch.exp(torch.einsum("ir,jr,kr->ijk", q, k1, k2) / d)
    want = torch.einsum("ijk,jd,kd->id", exact, v1, v2) / exact.sum((1, 2))[:, None]
    errors = []
    for degree in (1, 2, 3):
        # <q, k1 * k2>: features of k1 * k2 are products of the features' monomials, so both sides stay n x r
        u1, u2, u3 = taylor(q / d, degree), taylor(k1, degree), taylor(k2, degree)
        scale = torch.cat([torch.full((d**g,), math.sqrt(math.factorial(g)), dtype=D) for g in range(degree + 1)])
        keys = KhatriRao((u2 * scale).T.contiguous().T, u3)
        made = plan("ir,xr,xd->id", u1, keys, KhatriRao(v1, v2))
        top = made(u1, keys, KhatriRao(v1, v2))
        rows = u1.shape[1]
        assert made.flops <= 2 * 2 * n * rows * d + rows * d + 2 * n * rows * d  # no n x n^2 anywhere
        below = u1 @ ((u2 * scale).sum(0) * u3.sum(0))
        errors.append(float((top / below[:, None] - want).abs().max()))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 1e-3


def test_tensor_attention_grows_linearly():
    flops = []
    for n in (100, 200, 400):
        made = plan("ir,xr,xd->id", (n, 7), KhatriRao((n, 7), (n, 7)), KhatriRao((n, 4), (n, 4)))
        flops.append(made.flops)
    assert flops[2] < 4.05 * flops[0] and flops[1] < 2.05 * flops[0]


# -- MG-TFNO (Kossaifi et al. 2023) --------------------------------------------------------------------------------


def test_spectral_convolution_contracts_its_factors_in_the_best_order():
    batch, width, modes, rank = 4, 32, 12, 4
    core = torch.complex(R(rank, rank, rank, rank), R(rank, rank, rank, rank, seed=1))
    u, w = (torch.complex(R(width, rank, seed=s), R(width, rank, seed=s + 1)) for s in (2, 4))
    p, q = (torch.complex(R(modes, rank, seed=s), R(modes, rank, seed=s + 1)) for s in (6, 8))
    x = torch.complex(R(batch, width, modes, modes), R(batch, width, modes, modes, seed=9))
    made = plan("bcxy,ijkl,ci,oj,xk,yl->boxy", x, core, u, w, p, q)
    weight = torch.einsum("ijkl,ci,oj,xk,yl->coxy", core, u, w, p, q)
    rebuilt = plan("bcxy,coxy->boxy", x, weight)
    torch.testing.assert_close(made(x, core, u, w, p, q), torch.einsum("bcxy,coxy->boxy", x, weight), rtol=1e-9,
                               atol=1e-7)  # fmt: skip
    assert made.flops < rebuilt.flops
    parameters = core.numel() + u.numel() + w.numel() + p.numel() + q.numel()
    assert weight.numel() / parameters > 150


# -- F-INR (Vemuri et al. 2025) ------------------------------------------------------------------------------------


def test_separable_fields_need_a_net_per_axis():
    rank, n = 5, 9

    def net(seed: int, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(t[:, None] * R(1, rank, seed=seed) * 3 + R(rank, seed=seed + 1))

    axes = [torch.linspace(0, 1, n, dtype=D) for _ in range(3)]
    factors = [net(10 * i, t) for i, t in enumerate(axes)]
    evaluations = sum(len(t) for t in axes)
    made = plan("xr,yr,zr->xyz", *factors)
    grid = made(*factors)
    points = torch.cartesian_prod(*axes)
    each = (net(0, points[:, 0]) * net(10, points[:, 1]) * net(20, points[:, 2])).sum(1).reshape(n, n, n)
    torch.testing.assert_close(grid, each)
    assert evaluations == 3 * n and len(points) == n**3
    assert made.flops == n * n * rank + 2 * n**3 * rank < made.naive
    # two layers of width 64 for each axis, on the axes or on every point of a 64^3 grid
    n, width, rank = 64, 64, 16
    net = 2 * (width * width + width * rank)
    drawn = plan("xr,yr,zr->xyz", *[(n, rank)] * 3)
    assert 3 * n**3 * net + 3 * n**3 * rank > 20 * (3 * n * net + drawn.flops)
    monolithic = 2 * 3 * (width * width + width * rank)  # one network of as many values
    assert n**3 * monolithic > 5 * (3 * n * net + drawn.flops)
    n, rank = 9, 5
    train = plan("xr,rys,sz->xyz", R(n, rank), R(rank, n, rank), R(rank, n))
    tucker = plan("abc,xa,yb,zc->xyz", R(rank, rank, rank), *factors)
    assert train.flops < train.naive and tucker.flops < tucker.naive / 10
