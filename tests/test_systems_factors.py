"""Published factorisation systems, each with the check that its paper invites."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from factor_tools import weight

from sparsec.factors import (
    CP,
    Butterfly,
    Circulant,
    LowRank,
    Monarch,
    Separable,
    SparseProduct,
    Tucker,
)
from sparsec.factors._base import relative_error
from sparsec.factors._cp_fit import cp_als, sensitivity, stabilise
from sparsec.factors.select import effective_rank, mode_spectra, pack_ranks, tucker_parameters
from sparsec.factors.sketch import cur, nystrom
from sparsec.factors.tucker import hooi


def hadamard(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return h


def fourier(n: int) -> torch.Tensor:
    k = torch.arange(n, dtype=torch.float64)
    return torch.polar(torch.ones(n, n, dtype=torch.float64), -2 * math.pi * k[:, None] * k / n)


def reversed_digits(n: int) -> torch.Tensor:
    bits = n.bit_length() - 1
    return torch.tensor([int(format(i, f"0{bits}b")[::-1], 2) for i in range(n)])


# Monarch (Dao et al., ICML 2022) -------------------------------------------------------------------------------------


def test_monarch_projection():
    n, b = 64, 8
    planted = Monarch(b).reconstruct({"right": weight((b, b, 1, b)), "left": weight((b, b, b, 1), seed=1)}, (n, n))
    assert Monarch(b).fit(planted).error < 1e-12
    grid = torch.arange(n).reshape(b, b).T.flatten()
    assert Monarch(b).fit(fourier(n)[:, grid]).error < 1e-12
    assert Monarch(b).fit(fourier(n)).error > 0.9  # the permutation is part of the claim
    assert Monarch(b).flops((n, n), 3) == 3 * 2 * 2 * n * b  # 2 n sqrt(n) products


def test_monarch_error_is_what_the_svds_discard():
    dense, b = weight((32, 24)), 4
    slices = dense.reshape(8, b, b, 6).permute(1, 2, 0, 3)
    s = torch.linalg.svdvals(slices).square()
    assert Monarch(b).fit(dense).error == pytest.approx(float((s[..., 1:].sum() / s.sum()).sqrt()), rel=1e-12)


def test_monarch_gains_on_structure_not_on_noise():
    n = 64
    parameters = 2 * n * 8
    rank = parameters // (2 * n)
    noise = weight((n, n))
    assert Monarch(8).fit(noise).error == pytest.approx(LowRank(rank).fit(noise).error, abs=0.03)
    column = torch.exp(-0.1 * torch.arange(n, dtype=torch.float64))
    convolution = column[(torch.arange(n)[:, None] - torch.arange(n)[None, :]) % n] * hadamard(n)
    for structured in (hadamard(n), convolution):
        assert Monarch(8).fit(structured).error < 0.7 * LowRank(rank).fit(structured).error


# FAuST (Le Magoarou and Gribonval, 2016) -----------------------------------------------------------------------------


def test_faust_hadamard():
    h, shape = hadamard(32), (32, 32)
    factor = SparseProduct((2,) * 5)
    fit = factor.fit(h)
    stored = sum(t.numel() for k, t in fit.buffers.items() if k.startswith("values"))
    assert fit.error < 1e-4 and stored == 320
    assert all(int((fit.buffers[f"values_{j}"] != 0).sum()) == 64 for j in range(1, 6))
    assert h.numel() / stored == 3.2  # the relative complexity gain
    assert factor.flops(shape, 1) == 2 * 320
    x = weight((7, 32))
    torch.testing.assert_close(factor.apply(x, fit.buffers, shape), x @ h.T)


def test_faust_compresses_a_product_better_than_an_svd():
    s1, s2 = (torch.nn.functional.hardshrink(weight((24, 24), seed=s), 1.3) for s in (3, 4))
    dense = s2 @ s1
    factor = SparseProduct((5, 5))
    nonzeros = 2 * 24 * 5
    assert factor.fit(dense).error < 0.75 * LowRank(nonzeros // 48).fit(dense).error


def test_butterfly_is_the_fast_transform():
    n = 32
    for transform in (fourier(n)[reversed_digits(n)], hadamard(n)):
        fit = Butterfly().fit(transform)
        assert fit.error < 1e-12
        assert Butterfly().flops((n, n), 1) == 2 * 2 * n * 5  # 2 n log2 n products
    assert Butterfly().fit(fourier(n)).error > 0.1  # the bit reversal is part of the claim


def test_butterfly_holds_the_cosine_transform():
    """DCT-II is the real part of a scaled Fourier transform of reordered inputs (Makhoul, 1980): one butterfly."""
    n = 32
    k, rows = torch.arange(n, dtype=torch.float64), reversed_digits(n)
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
    turned = torch.polar(torch.ones(n, dtype=torch.float64), -math.pi * k / (2 * n))
    fit = Butterfly().fit((turned[:, None] * fourier(n))[rows])
    cosine = torch.cos(math.pi * k[:, None] * (2 * k + 1) / (2 * n))
    torch.testing.assert_close(Butterfly().reconstruct(fit.buffers, (n, n)).real, cosine[rows][:, order])
    assert fit.error < 1e-12 and Butterfly().flops((n, n), 1) < 2 * n * n


# Stable CPD (Phan et al., ECCV 2020) ---------------------------------------------------------------------------------


def test_stable_cpd_on_a_border_rank_tensor():
    """a b b + b a b + b b a is a limit of rank two tensors; ALS answers with components that cancel."""
    a, b = weight((3, 6), seed=1), weight((3, 6), seed=2)
    terms = [(a[0], a[1], b[2]), (a[0], b[1], a[2]), (b[0], a[1], a[2])]
    tensor = sum(torch.einsum("a,b,c->abc", *t) for t in terms)
    factors = cp_als(tensor, 3)
    built = torch.einsum("ar,br,cr->abc", *factors)
    bound = float((tensor - built).norm())
    plain = _plain_als(tensor, 3, bound)
    stable = stabilise(tensor, plain, bound)
    assert float((tensor - torch.einsum("ar,br,cr->abc", *stable)).norm()) <= bound * (1 + 1e-4)
    assert sensitivity(stable) * 10 <= sensitivity(plain)
    e = [float(f.square().sum()) for f in stable]
    noise = _sampled_change(stable)
    assert e and noise == pytest.approx(sensitivity(stable), rel=0.1)


def _plain_als(tensor: torch.Tensor, rank: int, bound: float) -> list[torch.Tensor]:
    """Textbook ALS from a random start, run until it meets the bound."""
    factors = [weight((n, rank), seed=11 + m) for m, n in enumerate(tensor.shape)]
    for _ in range(20000):
        for m in range(3):
            others = [f for at, f in enumerate(factors) if at != m]
            z = torch.einsum("ar,br->abr", *others).reshape(-1, rank)
            factors[m] = torch.linalg.lstsq(z, torch.movedim(tensor, m, 0).reshape(len(factors[m]), -1).T).solution.T
        if float((tensor - torch.einsum("ar,br,cr->abc", *factors)).norm()) <= bound:
            break
    sizes = torch.stack([f.norm(dim=0) for f in factors])
    return [f * sizes.prod(dim=0).pow(1 / 3) / s for f, s in zip(factors, sizes)]


def _sampled_change(factors: list[torch.Tensor]) -> float:
    """The definition of sensitivity: mean squared change under small noise, over its variance."""
    sigma, generator = 1e-4, torch.Generator().manual_seed(0)
    whole, total = torch.einsum("ar,br,cr->abc", *factors), 0.0
    for _ in range(400):
        moved = [f + sigma * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in factors]
        total += float((torch.einsum("ar,br,cr->abc", *moved) - whole).square().sum())
    return total / 400 / sigma**2


def test_stable_cpd_of_a_convolution():
    shape, rank = (16, 12, 3, 3), 8
    dense = weight(shape)
    assert CP(108).fit(dense).error < 1e-5  # full rank
    fit = CP(rank).fit(dense)
    assert sum(t.numel() for t in fit.buffers.values()) == rank * (16 + 12 + 9)


# Optimal Tucker core shapes (Ghadiri et al., ICML 2023) --------------------------------------------------------------


def test_tucker_packing():
    """Within 5 % of the greedy choice by true loss, from one decomposition a mode instead of one a trial."""
    generator = torch.Generator().manual_seed(7)
    sizes, budget = (10, 9, 8, 7), 500
    tensor = torch.randn(sizes, generator=generator, dtype=torch.float64)
    for m, n in enumerate(sizes):  # spectra that fall at different speeds
        decay = torch.exp(-(0.15 + 0.15 * m) * torch.arange(n, dtype=torch.float64))
        turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        tensor = torch.movedim(torch.tensordot(turn * decay, tensor, dims=([1], [m])), 0, m)
    whole = float(tensor.norm()) ** 2

    def loss(ranks: tuple[int, ...]) -> float:
        return 1 - float(hooi(tensor, ranks)[0].norm()) ** 2 / whole

    spectra = mode_spectra(tensor)
    packed = pack_ranks(spectra, budget)
    assert tucker_parameters(sizes, packed) <= budget
    trials, greedy = 0, (1, 1, 1, 1)
    while True:
        grown = [tuple(r + (m == at) for at, r in enumerate(greedy)) for m in range(4)]
        fits = (all(a <= n for a, n in zip(r, sizes)) and tucker_parameters(sizes, r) <= budget for r in grown)
        grown = [r for r, fit in zip(grown, fits) if fit]
        if not grown:
            break
        trials += len(grown)
        greedy = min(grown, key=loss)
    assert loss(packed) <= 1.05 * loss(greedy)
    # each true loss takes an SVD of every mode for the start alone; packing takes one for every mode in all
    assert trials >= 10
    tails = [float(s[r:].sum()) / whole for s, r in zip(spectra, packed)]
    assert max(tails) * (1 - 1e-9) <= loss(packed) <= sum(tails) * (1 + 1e-9)


def test_packing_is_exact():
    """The same as trying every core shape."""
    generator = torch.Generator().manual_seed(5)
    spectra = [torch.rand(n, generator=generator).sort(descending=True).values.numpy() for n in (5, 4, 6)]
    for budget in (18, 40, 77, 300):
        every = itertools.product(*(range(1, len(s) + 1) for s in spectra))
        fits = [r for r in every if tucker_parameters((5, 4, 6), r) <= budget]
        gain = [sum(float(s[:k].sum()) for s, k in zip(spectra, r)) for r in fits]
        packed = pack_ranks(spectra, budget)
        assert packed in fits and gain[fits.index(packed)] == pytest.approx(max(gain), rel=1e-6)


# Survey of low rank forms (2023): effective rank; every form is in the battery of test_factors.py ---------------------


def test_effective_rank_of_planted_spectra():
    turn = torch.linalg.qr(weight((20, 20))).Q
    for rank in (1, 5, 20):
        assert effective_rank(turn[:, :rank] @ turn[:rank]) == pytest.approx(rank, rel=1e-9)
    s = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert effective_rank((turn[:, :3] * s) @ turn[:3]) == pytest.approx(2**1.5, rel=1e-9)
    assert effective_rank(torch.zeros(3, 4)) == 0.0


# A-priori compressed CNNs: one-way filters ---------------------------------------------------------------------------


def test_one_way_filters():
    shape = (6, 4, 5, 3)
    dense = weight(shape)
    assert Separable(3).fit(dense).error < 1e-12  # min(kx, ky) terms are the full convolution
    for terms in (1, 2):
        fit = Separable(terms).fit(dense)
        assert sum(t.numel() for t in fit.buffers.values()) == 6 * 4 * terms * (5 + 3)
        s = torch.linalg.svdvals(dense).square()
        assert fit.error == pytest.approx(float((s[..., terms:].sum() / s.sum()).sqrt()), rel=1e-9)
    stencil = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)  # the wave equation's u_xx + u_yy: two one-way terms
    laplace = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    laplace[0, 0, :, 1] += stencil
    laplace[0, 0, 1, :] += stencil
    assert Separable(2).fit(laplace).error < 1e-12 < 0.1 < Separable(1).fit(laplace).error


# Tubal factorisation: the t-product is a block-circulant product -----------------------------------------------------


def test_tubal_product():
    m, n, cols, depth = 3, 4, 5, 6
    a, b = weight((m, n, depth)), weight((n, cols, depth), seed=1)
    spectral = torch.einsum("ikf,kjf->ijf", torch.fft.fft(a), torch.fft.fft(b))
    product = torch.fft.ifft(spectral).real
    factor, shape = Circulant(depth), (m * depth, n * depth)
    x = b.permute(1, 0, 2).reshape(cols, n * depth)
    got = factor.apply(x, {"columns": a}, shape).reshape(cols, m, depth).permute(1, 0, 2)
    torch.testing.assert_close(got, product)
    torch.testing.assert_close(x @ factor.reconstruct({"columns": a}, shape).T, got.permute(1, 0, 2).reshape(cols, -1))
    assert factor.fit(factor.reconstruct({"columns": a}, shape)).error < 1e-12


def test_gradient_descent_from_small_values_finds_the_tubal_rank():
    """f(U) = ||U * U^T - T||^2 / 4 from a tiny overparametrised start stays near the planted tubal rank."""
    n, rank, depth = 8, 2, 4
    planted = torch.fft.fft(weight((n, rank, depth)))
    target = torch.einsum("ikf,jkf->ijf", planted, planted.conj())
    u = torch.fft.fft(1e-4 * weight((n, n, depth), seed=1))
    scale = float(torch.linalg.matrix_norm(target.permute(2, 0, 1), 2).max())
    for _ in range(150):
        residual = torch.einsum("ikf,jkf->ijf", u, u.conj()) - target
        u = u - 0.3 / scale * torch.einsum("ijf,jkf->ikf", residual, u)
    s = torch.linalg.svdvals(u.permute(2, 0, 1))
    assert float(s[:, rank:].max()) < 0.01 * float(s[:, rank - 1].min())


# Meta-factorisation (Karpowicz, 2021) --------------------------------------------------------------------------------


def test_generalised_nystrom_and_cur():
    low = weight((20, 5)) @ weight((5, 16), seed=1)
    buffers = nystrom(low, weight((16, 6), seed=2), weight((20, 8), seed=3))
    factor = LowRank(6)
    assert relative_error(low, factor.reconstruct(buffers, (20, 16))) < 1e-9
    dense = weight((20, 16))
    rows, columns = torch.tensor([1, 4, 7]), torch.tensor([0, 9, 15])
    built = LowRank(3).reconstruct(cur(dense, rows, columns), (20, 16))
    torch.testing.assert_close(built[rows], dense[rows])
    torch.testing.assert_close(built[:, columns], dense[:, columns])


# SlimmeRF: nested ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [LowRank(8), CP(8, outs=(12,), ins=(4, 4)), Tucker(4, (12,), (4, 4))], ids=str)
def test_slimmed_ranks_without_a_new_fit(factor):
    dense = weight((12, 16)) * torch.logspace(0, -2, 16, dtype=torch.float64)
    buffers = factor.fit(dense).buffers
    errors = []
    for rank in (1, 2, 4):
        smaller, cut = factor.slice(buffers, rank)
        errors.append(relative_error(dense, smaller.reconstruct(cut, (12, 16))))
    assert errors[0] > errors[1] > errors[2]
