"""Published systems on convolution, each by what its paper claims that does not depend on a clock."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from graph_tools import calls, captured
from structure_models import conv_bn
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparsec
from sparsec.driver import Context, run_passes
from sparsec.ops.masked import Patches
from sparsec.passes.conv_rewrite import ConvRewrite
from sparsec.passes.normalise import Normalise
from sparsec.points import SparseTensor, focal_conv, rulebook, sparse_conv, submanifold_conv
from sparsec.sparsifiers import Block, Compose
from sparsec.sparsifiers.scores import AbsValue
from sparsec.sparsifiers.structure import KeptMagnitude, co_permute


class Network(nn.Module):
    """Residual, depthwise and concatenated: every way in which channels are tied together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = conv_bn(3, 32), conv_bn(32, 48, 1)
        self.depth, self.back = conv_bn(48, 48, 3, groups=48), conv_bn(48, 32, 1)
        self.side, self.head = nn.Conv2d(32, 16, 3, padding=1), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = x + self.back(F.relu(self.depth(F.relu(self.wide(x)))))
        return self.head(torch.cat([x, F.relu(self.side(x))], 1).mean((2, 3)))


DENSE = ("stem.0", "wide.0", "back.0", "side")


@cache
def rearranged(block: int, zeros: float) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, 3, 8, 8)
    return model, co_permute(model, (x,), KeptMagnitude(block, 1 - zeros))[0], x


@pytest.mark.parametrize("zeros", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_sparsebytenn_rearranged_channels_keep_more(block: int, zeros: float) -> None:
    """SparseByteNN: blocks of k outputs share a pattern; rearranged, they keep more of every layer, and the network
    computes the same."""
    model, moved, x = rearranged(block, zeros)
    assert (moved(x) - model(x)).abs().max() < 1e-5
    prune = Compose(zeros, AbsValue(), Block(block, 1))
    plain, better = (sparsec.sparsify(m, prune, where=list(DENSE)) for m in (model, moved))
    for name in DENSE:
        before, after = (m.get_submodule(name).weight.detach().double().abs().sum() for m in (plain, better))
        pattern = better.get_submodule(name).weight.detach().flatten(1) != 0
        more = before if len(pattern) > block else before * (1 - 1e-12)  # one block holds the same rows in any order
        assert after > more, name
        assert bool((pattern.unflatten(0, (-1, block)).sum(1) % block == 0).all()), "a block is kept or dropped whole"


def test_semi_structured_activation_sparsity_rows_are_the_kept_pixels() -> None:
    """Semi-structured activation sparsity: round((1 - s) H W) rows are gathered and multiplied, for every s."""
    x, conv = torch.randn(2, 8, 14, 14), nn.Conv2d(8, 12, 3, padding=1)
    for share in (0.1, 0.2, 0.3, 0.5):
        kept = round((1 - share) * 14 * 14)
        order = torch.randperm(14 * 14, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(14 * 14, dtype=torch.bool)
        mask[order[:kept]] = True
        mask = mask.view(14, 14)
        assert Patches.build(mask, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1)).source.shape == (kept, 9)
        with torch.no_grad():
            got = sparsec.mask_outputs(conv, {"<root>": mask})(x)
            assert (got - mask * conv(x)).abs().max() < 1e-5


def test_sparsessp_depth_goes_among_the_channels() -> None:
    """SparseSSP: a kernel as deep as the stack is a convolution in two dimensions over depth x channels. It costs the
    same, and a network that works so is cheaper than one in three dimensions throughout."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 8, 12, 12)
    folded = nn.Sequential(
        nn.Conv3d(2, 16, (8, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.Flatten(1, 2), nn.Conv2d(16, 8, 3)
    )
    deep = nn.Sequential(nn.Conv3d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 8, 3, padding=(1, 0, 0)))
    fast = captured(folded, x)
    run_passes(fast, [Normalise(), ConvRewrite()], Context())
    assert "conv3d" not in calls(fast) and (fast(x) - folded(x)).abs().max() < 1e-6
    counts = []
    for model in (fast, folded, deep):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        counts.append(counter.get_total_flops())
    print(f"{counts[0]} operations folded, {counts[1]} as conv3d, {counts[2]} in three dimensions throughout")
    assert counts[0] == counts[1] and counts[0] * 4 < counts[2]


def test_focal_sparse_convolution() -> None:
    """Focal sparse convolution at 5 % of 32^3: equal to dense convolution, between its two limits, and the work is that
    of the pairs, far below the grid's."""
    torch.manual_seed(0)
    mask = torch.rand(1, 32, 32, 32) < 0.05
    dense = torch.randn(1, 8, 32, 32, 32) * mask[:, None]
    points, weight = SparseTensor.from_dense(dense, mask), torch.randn(8, 8, 3, 3, 3) / 8
    want = F.conv3d(dense, weight, padding=1)
    assert (submanifold_conv(points, weight).dense() - want * mask[:, None]).abs().max() < 1e-5
    importance = torch.full((len(points.coords), 27), 0.5)
    assert (focal_conv(points, weight, importance, 0.0, weigh=False).dense() - want).abs().max() < 1e-5
    assert focal_conv(points, weight, importance, 1.0).coords is points.coords
    pairs, _ = rulebook.submanifold(points.index, (3, 3, 3), (1, 1, 1))
    grid = 32**3 * 27
    assert pairs.bounds[-1] * 100 < grid and len(sparse_conv(points, weight, padding=1).coords) < 32**3 * 0.8
