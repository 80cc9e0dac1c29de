"""Factors in convolutions, tables, batches and state dicts equal their reconstruction there."""

from __future__ import annotations

import pytest
import torch
from factor_tools import BATTERY, case, fitted, gram, weight
from torch.utils.flop_counter import FlopCounterMode

from sparsec.errors import FormatError, InputError
from sparsec.factors import CP, BlockTerm, Kronecker, LowRank, Monarch, Separable, Sparse, TensorTrain, Tucker
from sparsec.factors.uses import apply_batch, conv_flops, convolve, fit_batch, rows, to_dense, to_factored

CONVS = [entry for entry in BATTERY if len(entry[1]) > 2]
GEOMETRY = [(1, 0, 1), (2, 1, 1), (1, 2, 2)]


@pytest.mark.parametrize(("factor", "shape"), CONVS, ids=map(case, CONVS))
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_convolutions(factor, shape, geometry):
    dims = len(shape) - 2
    stride, padding, dilation = geometry
    x = weight((2, shape[1], *(8, 7, 6)[:dims]), seed=3)
    buffers = fitted(factor, shape).buffers
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]
    want = conv(x, factor.reconstruct(buffers, shape), None, stride, padding, dilation)
    got = convolve(factor, x, buffers, shape, stride, padding, dilation)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize(
    "factor",
    [
        LowRank(3),
        CP(4),
        Tucker((4, 3)),
        Tucker((4, 3, 2, 2)),
        TensorTrain((2, 3, 3)),
        Separable(2),
        BlockTerm(2, (3, 2)),
        Kronecker((2, 2), 3),
        Monarch(2),
    ],
    ids=lambda f: f.text(),
)
def test_convolution_flops_are_counted(factor, geometry):
    shape = (6, 4, 3, 3)
    x = torch.zeros(2, 4, 9, 8, dtype=torch.float64)
    buffers = fitted(factor, shape).buffers
    with FlopCounterMode(display=False) as counter:
        convolve(factor, x, buffers, shape, *geometry)
    building = 0
    if isinstance(factor, (Kronecker, Monarch)):  # mixes window and channels: reconstructed first
        with FlopCounterMode(display=False) as building_counter:
            factor.reconstruct(buffers, shape)
        building = building_counter.get_total_flops()
    assert counter.get_total_flops() - building == conv_flops(factor, shape, 2, (9, 8), *geometry)


def test_tucker_2_formula():
    """1x1, window, 1x1 in the published count of multiplications."""
    out, width, k, r_out, r_in, h, w = 16, 12, 3, 5, 4, 10, 10
    products = h * w * (width * r_in) + 8 * 8 * (r_in * r_out * k * k + r_out * out)
    assert conv_flops(Tucker((r_out, r_in)), (out, width, k, k), 1, (h, w)) == 2 * products


@pytest.mark.parametrize(("factor", "shape"), BATTERY, ids=map(case, BATTERY))
def test_rows_of_a_table(factor, shape):
    buffers = fitted(factor, shape).buffers
    index = torch.tensor([[0, shape[0] - 1, 1], [1, 0, shape[0] // 2]])
    want = factor.reconstruct(buffers, shape).flatten(1)[index]
    torch.testing.assert_close(rows(factor, index, buffers, shape), want, rtol=1e-10, atol=1e-10)


def test_rows_form_no_table():
    """A lookup costs what its rows cost."""
    shape, factor = (4096, 64), LowRank(4)
    buffers = {k: torch.zeros(s) for k, s in factor.shapes(shape).items()}
    with FlopCounterMode(display=False) as counter:
        rows(factor, torch.arange(10), buffers, shape)
    assert counter.get_total_flops() == 2 * 10 * 4 * 64


@pytest.mark.parametrize("bad", [[-1], [24]])
def test_rows_out_of_range(bad):
    with pytest.raises(InputError, match="valid: 0 to 23"):
        rows(LowRank(5), torch.tensor(bad), fitted(LowRank(5), (24, 36)).buffers, (24, 36))


@pytest.mark.parametrize(
    "factor", [LowRank(3), Monarch(4, 2), Kronecker((2, 3), 2), Sparse(0.5)], ids=lambda f: f.text()
)
@pytest.mark.parametrize("grams", [None, "one", "each"])
def test_batches_of_matrices(factor, grams):
    dense = weight((3, 8, 12))
    g = {None: None, "one": gram(12), "each": torch.stack([gram(12, seed=s) for s in range(3)])}[grams]
    fit = fit_batch(factor, dense, g)
    built = torch.stack([factor.reconstruct({k: t[i] for k, t in fit.buffers.items()}, (8, 12)) for i in range(3)])
    x = weight((3, 5, 12), seed=2)
    torch.testing.assert_close(apply_batch(factor, x, fit.buffers, (8, 12)), torch.bmm(x, built.mT))
    inner = torch.eye(12, dtype=torch.float64) if g is None else g
    squared = (((dense - built) @ inner) * (dense - built)).sum() / ((dense @ inner) * dense).sum()
    assert fit.error == pytest.approx(float(squared.sqrt()), rel=1e-9)
    with pytest.raises(FormatError, match="batch, out, in"):
        fit_batch(factor, dense[0])


def test_state_dicts_go_both_ways():
    state = {"a.weight": weight((24, 36)), "a.bias": weight((24,)), "b.weight": weight((6, 4, 3, 3))}
    factors = {"a.weight": Monarch(6, 4), "b.weight": Tucker((6, 4))}
    shapes = {k: tuple(state[k].shape) for k in factors}
    packed = to_factored(state, factors)
    assert set(packed) == {"a.weight.right", "a.weight.left", "a.bias"} | {
        f"b.weight.{k}" for k in ("core", "mode_0", "mode_1")
    }
    back = to_dense(packed, factors, shapes)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor)
    packed["a.weight.left"] = packed["a.weight.left"][:1]
    with pytest.raises(FormatError, match="'left' has shape"):
        to_dense(packed, factors, shapes)
    with pytest.raises(InputError, match="no weight 'c'"):
        to_factored(state, {"c": LowRank(2)})


def test_bad_inputs_of_a_convolution():
    buffers = fitted(CP(4), (6, 4, 3, 3)).buffers
    for x in (torch.zeros(2, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(2, 4, 8)):
        with pytest.raises(InputError, match="expected \\(batch, 4"):
            convolve(CP(4), x, buffers, (6, 4, 3, 3))
    with pytest.raises(InputError, match="stride"):
        convolve(CP(4), torch.zeros(2, 4, 8, 8), buffers, (6, 4, 3, 3), stride=(1, 2, 3))
