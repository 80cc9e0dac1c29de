"""Published systems of tensor networks: the triple form, and structures that are searched for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from factor_tools import weight

from sparsec.errors import SpecError
from sparsec.factors import TensorNetwork, Tucker
from sparsec.factors.tensor_network import als, search, structure

# Implicit multiple tensor decomposition: the triple form is a network on a triangle ----------------------------------


def test_triple_decomposition():
    p, q, r = 2, 3, 2
    a, b, c = weight((6, r, q)), weight((5, r, p), seed=1), weight((4, q, p), seed=2)
    tensor = torch.einsum("irq,jrp,kqp->ijk", a, b, c)
    factor = TensorNetwork(((0, 1, r), (0, 2, q), (1, 2, p)), outs=(6,), ins=(5, 4))
    built = factor.reconstruct({"core_0": a, "core_1": b, "core_2": c}, (6, 20))
    torch.testing.assert_close(built.reshape(6, 5, 4), tensor)
    assert factor.fit(tensor.reshape(6, 20)).error < 1e-4
    cores = [weight(s, seed=9) for s in ((6, r, q), (5, r, p), (4, q, p))]
    losses = [als(tensor, cores, ["Aij", "Bik", "Cjk"], sweeps)[1] for sweeps in range(1, 12)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))


# Greedy tensor network structures (Hashemizadeh et al., 2020) --------------------------------------------------------


def planted(kind: str, seed: int) -> tuple[torch.Tensor, tuple[tuple[int, int, int], ...]]:
    """A five-way tensor with the structure of a train or a ring, and its bonds."""
    if kind == "train":
        sizes, equation = [(4, 2), (2, 4, 3), (3, 4, 3), (3, 4, 2), (2, 4)], "ai,ibj,jck,kdl,le->abcde"
        bonds = ((0, 1, 2), (1, 2, 3), (2, 3, 3), (3, 4, 2))
    else:
        sizes, equation = [(2, 5, 2)] * 5, "mai,ibj,jck,kdl,lem->abcde"
        bonds = ((0, 1, 2), (0, 4, 2), (1, 2, 2), (2, 3, 2), (3, 4, 2))
    generator = torch.Generator().manual_seed(seed)
    cores = [torch.randn(s, generator=generator).double() for s in sizes]
    return torch.einsum(equation, *cores), bonds


@pytest.mark.parametrize("kind", ["train", "ring"])
def test_greedy_structure_search(kind):
    """The planted bonds and ranks, exactly, in at least 8 of 10 tensors."""
    cases = [planted(kind, seed) for seed in range(10)]
    assert sum(search(tensor, 1e-4) == bonds for tensor, bonds in cases) >= 8


def test_tucker_is_recovered_where_no_bond_between_modes_says_it():
    """The planted core shape in at least 8 of 10 tensors, and the planted bonds of a train from the same call."""
    ranks, right = (2, 3, 2, 2, 2), 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        core = torch.randn(ranks, generator=generator, dtype=torch.float64)
        bases = [torch.randn(5, r, generator=generator, dtype=torch.float64) for r in ranks]
        found = structure(torch.einsum("abcde,va,wb,xc,yd,ze->vwxyz", core, *bases), 1e-4)
        right += found == Tucker(ranks, (5,), (5, 5, 5, 5))
    assert right >= 8
    tensor, bonds = planted("train", 3)
    assert structure(tensor, 1e-4) == TensorNetwork(bonds, (4,), (4, 4, 4, 4))
    for bad, error in ((torch.ones(3), 0.1), (torch.full((2, 2), torch.nan), 0.1), (torch.ones(2, 2), -1.0)):
        with pytest.raises(SpecError):
            structure(bad, error)


def picture(size: int) -> torch.Tensor:
    """A disc, a ramp and some waves."""
    line = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    disc = torch.sigmoid(40 * (0.5 - (x**2 + y**2).sqrt()))
    return 0.4 * disc + 0.1 * (x + 1) + 0.1 * (1 + torch.sin(9 * x + 4 * y)) + 0.1 * (1 + torch.cos(7 * y))


def train_by_svds(tensor: torch.Tensor, error: float) -> tuple[int, float]:
    """Parameters and relative error of TT-SVD (Oseledets, 2011), every cut allowed error / sqrt(d - 1)."""
    allowed = error / (tensor.dim() - 1) ** 0.5 * float(tensor.norm())
    built, rest, rank = torch.ones(1, 1, dtype=torch.float64), tensor, 1
    count = 0
    for size in tensor.shape[:-1]:
        u, s, right = torch.linalg.svd(rest.reshape(rank * size, -1), full_matrices=False)
        keep = max(1, int((s.square().flip(0).cumsum(0).flip(0).sqrt() > allowed).sum()))
        count += rank * size * keep
        built = torch.tensordot(built, u[:, :keep].reshape(rank, size, keep), 1)
        rest, rank = s[:keep, None] * right[:keep], keep
    built = torch.tensordot(built, rest, 1)
    return count + rest.numel(), float((built.reshape(tensor.shape) - tensor).norm() / tensor.norm())


def test_searched_networks_of_images_are_no_larger_than_trains():
    grey = picture(64).reshape(8, 8, 8, 8)
    colours = torch.stack([picture(64), picture(64).T, picture(64).flip(0)]).reshape(3, 8, 8, 8, 8)[:, ::2, :, ::2]
    for image in (grey, colours):
        parameters, error = train_by_svds(image, 0.2)
        bonds = search(image, error)
        cores = [n * math.prod(r for i, j, r in bonds if m in (i, j)) for m, n in enumerate(image.shape)]
        assert sum(cores) <= parameters
        fit = TensorNetwork(bonds, image.shape[:1], image.shape[1:]).fit(image.flatten(1))
        assert fit.error <= 1.02 * error  # from starts of its own
