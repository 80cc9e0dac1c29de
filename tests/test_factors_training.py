"""Adapters, frozen matrices, dropped ranks, and ranks that follow the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from factor_tools import weight

from sparsec.errors import InputError, SpecError
from sparsec.factors import CP, Kronecker, LowRank, Monarch
from sparsec.factors.adapters import Adapter, FreezeScore, masked_ranks, rank_dropout, to_freeze, trainable_share
from sparsec.factors.rank_adaptive import Low, step
from sparsec.factors.tucker import hooi

# AFLoRA (Liu et al., 2024) -------------------------------------------------------------------------------------------


def adapter(rank: int = 3, out: int = 7, width: int = 9) -> Adapter:
    return Adapter(weight((rank, width)), weight((out, rank), seed=1), weight((rank,), seed=2), weight((out,), seed=3))


def test_merged_equals_unmerged():
    own, base, x = adapter(), weight((7, 9), seed=4), weight((2, 5, 9), seed=5)
    torch.testing.assert_close(own.apply(x, base), x @ own.merge(base).T)
    built = LowRank(3).reconstruct(own.buffers(), (7, 9))
    torch.testing.assert_close(base + built, own.merge(base))
    with pytest.raises(InputError, match="scale_down has shape"):
        Adapter(own.down, own.up, own.scale_up, own.scale_up)


def test_freezing_follows_the_cubic_schedule():
    shares = [trainable_share(t, 10, 20) for t in range(31)]
    assert shares[:11] == [1.0] * 11 and shares[20:] == [0.0] * 11
    assert shares[15] == 0.125 and all(b <= a for a, b in itertools.pairwise(shares))
    scores = {f"layer{i}": float(s) for i, s in enumerate([3, 1, 2, 5, 4, 0, 7, 6])}
    assert to_freeze(scores, 10, 10, 20) == []
    assert to_freeze(scores, 15, 10, 20) == ["layer5", "layer1", "layer2", "layer0", "layer4", "layer3", "layer7"]
    assert len(to_freeze(scores, 20, 10, 20)) == 8
    with pytest.raises(SpecError, match="no interval"):
        trainable_share(1, 5, 5)


def test_frozen_matrices_stay_and_few_parameters_train():
    torch.manual_seed(0)
    base, target = weight((8, 8), torch.float32), weight((8, 8), torch.float32, seed=9)
    names = ("down", "up", "scale_down", "scale_up")
    shapes = ((2, 8), (8, 2), (2,), (8,))
    starts = [0.3 * weight(s, torch.float32, seed=20 + i) for i, s in enumerate(shapes)]
    values = {n: s.requires_grad_(True) for n, s in zip(names, starts)}
    scores = {n: FreezeScore() for n in ("down", "up")}
    x = weight((64, 8), torch.float32, seed=30)
    trained, snapshots = 0, {}
    steps, start, end = 60, 10, 40
    for t in range(steps):
        loss = (Adapter(**values).apply(x, base) - x @ target.T).square().mean()
        grads = dict(zip(names, torch.autograd.grad(loss, [values[n] for n in names])))
        now = {n: scores[n].update(values[n], grads[n]) for n in scores}
        frozen = set(to_freeze(now, t, start, end)) | set(snapshots)
        snapshots |= {n: values[n].detach().clone() for n in frozen - set(snapshots)}
        for n in names:
            if n not in frozen:
                trained += values[n].numel()
                values[n] = (values[n] - 0.02 * grads[n]).detach().requires_grad_(True)
    assert set(snapshots) == {"down", "up"}
    assert all(torch.equal(values[n], kept) for n, kept in snapshots.items())
    everything = sum(v.numel() for v in values.values())
    assert trained / steps < 0.75 * everything  # the vectors alone are 10 of 42


# Tensor dropout (Kolbeinsson et al., 2021) ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factor", [LowRank(4), CP(4, outs=(6,), ins=(4, 5)), Kronecker((3, 4), terms=4)], ids=lambda f: f.text()
)
def test_the_expected_weight_is_the_weight(factor):
    """The mean over every mask, weighted by its probability."""
    shape, keep = (6, 20), 0.7
    buffers = factor.fit(weight(shape)).buffers
    built = torch.zeros(shape, dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=4):
        chance = keep ** sum(bits) * (1 - keep) ** (4 - sum(bits))
        masked = masked_ranks(factor, buffers, shape, torch.tensor(bits, dtype=torch.float64) / keep)
        built += chance * factor.reconstruct(masked, shape)
    torch.testing.assert_close(built, factor.reconstruct(buffers, shape))
    dropped = rank_dropout(factor, buffers, shape, keep, torch.Generator().manual_seed(0))
    assert not torch.allclose(factor.reconstruct(dropped, shape), factor.reconstruct(buffers, shape))
    assert all(torch.equal(buffers[k], t) for k, t in rank_dropout(factor, buffers, shape, 1.0).items())


def test_a_regression_layer_of_full_rank_is_the_linear_layer():
    """flatten + linear as <X, [[U]]>: the CP of a (classes, channels, height, width) weight."""
    dense, x = weight((5, 24)), weight((3, 2, 3, 4), seed=1)
    factor = CP(24, outs=(5,), ins=(2, 3, 4))
    y = factor.apply(x.flatten(1), factor.fit(dense).buffers, (5, 24))
    torch.testing.assert_close(y, x.flatten(1) @ dense.T)


def test_rank_dropout_refuses():
    with pytest.raises(SpecError, match="keep=0"):
        rank_dropout(LowRank(2), {}, (4, 4), 0)
    with pytest.raises(SpecError, match="no rank index"):
        rank_dropout(Monarch(2) + LowRank(2), {}, (4, 4), 0.5)


# Rank-adaptive spectral pruning (Zangrando et al., 2024) -------------------------------------------------------------


def low(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Low:
    core, bases = hooi(weight(shape), ranks)
    return Low(core, tuple(bases))


def test_full_rank_is_gradient_descent():
    target = weight((5, 4, 3), seed=1)

    def gradient(w):
        return w**3 - target

    start = low((5, 4, 3), (5, 4, 3))
    for rate in (1e-2, 1e-3):
        plain = start.dense() - rate * gradient(start.dense())
        difference = (step(start, gradient, rate).dense() - plain).norm()
        assert float(difference) <= 1e-10 + 10 * rate**2


def test_descent_stays_orthonormal_and_finds_the_planted_ranks():
    target = low((8, 7, 6), (2, 2, 2)).dense()
    current = low((8, 7, 6), (5, 5, 5))
    losses = []
    for _ in range(60):
        current = step(current, lambda w: w - target, 0.3, tolerance=1e-3)
        losses.append(float((current.dense() - target).norm() / target.norm()))
        for basis in current.bases:
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype))
    assert current.ranks == (2, 2, 2) and losses[-1] < 0.02
    fixed = low((8, 7, 6), (2, 2, 2))
    for _ in range(80):
        fixed = step(fixed, lambda w: w - weight((8, 7, 6), seed=3), 0.3)
    assert fixed.ranks == (2, 2, 2)
    best = Low(*(lambda c, b: (c, tuple(b)))(*hooi(weight((8, 7, 6), seed=3), (2, 2, 2)))).dense()
    other = weight((8, 7, 6), seed=3)
    assert float((fixed.dense() - other).norm()) <= 1.1 * float((best - other).norm())


@pytest.mark.parametrize(("rate", "tolerance"), [(0.0, None), (-1.0, None), (0.1, -1.0)])
def test_steps_refuse(rate, tolerance):
    with pytest.raises(SpecError, match="positive"):
        step(low((3, 3), (2, 2)), lambda w: w, rate, tolerance)
