"""conv_rewrite: each rule is proved on random shapes, and each refusal says why."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_tools import calls, captured
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparsec
from sparsec.driver import Context, Options, run_passes
from sparsec.graph import constants, evaluate
from sparsec.passes.conv_rewrite import ConvRewrite, rewrites
from sparsec.passes.fold import Fold
from sparsec.passes.normalise import Normalise

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVG = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def rewritten(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> fx.GraphModule:
    gm = captured(model, *inputs)
    run_passes(gm, [Normalise(), Fold(), ConvRewrite()], Context(options=Options(**options)))
    return gm


def reason(gm: fx.GraphModule, rule: str) -> str | None:
    """Why the last convolution was refused by a rule; "" where it was not, None where the rule has no say."""
    found = [r.reason for r in rewrites(gm) if r.rule == rule]
    return found[-1] if found else None


def same(model: nn.Module, gm: fx.GraphModule, *inputs: torch.Tensor) -> None:
    """Against float64, as close as the model itself."""
    exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
    ours, theirs = gm(*inputs), model(*inputs)
    assert ours.shape == theirs.shape
    assert (ours - exact).abs().max() <= 4 * (theirs - exact).abs().max() + 1e-5 * exact.abs().max()


def flops(call: Callable[..., Any], *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


def draw(seed: int) -> tuple[random.Random, int, int, int]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    return rng, rng.randint(1, 3), rng.choice([1, 3, 4, 6]), rng.choice([1, 2, 5, 8])


@pytest.mark.parametrize("seed", range(6))
def test_a_kernel_as_deep_as_its_input_loses_a_dimension(seed: int) -> None:
    rng, n, inp, out = draw(seed)
    groups = 2 if inp % 2 == 0 and out % 2 == 0 and seed % 2 else 1
    depth, stride, padding = rng.randint(2, 5), rng.randint(1, 2), rng.randint(0, 1)
    conv = nn.Conv3d(
        inp, out, (depth, 3, 2), (rng.randint(1, 3), stride, 1), (0, padding, 1), groups=groups, bias=seed > 1
    )
    x = torch.randn(n, inp, depth, rng.randint(4, 7), rng.randint(4, 7))
    gm = rewritten(conv, x)
    assert calls(gm) == ["flatten", "conv2d", "unsqueeze"] and reason(gm, "depth") == ""
    same(conv, gm, x)


def test_a_kernel_that_covers_all_becomes_a_product() -> None:
    torch.manual_seed(0)
    for rank in (1, 2, 3):
        size = (4, 3, 2)[:rank]
        conv, x = CONV[rank](5, 7, size), torch.randn(2, 5, *size)
        gm = rewritten(conv, x)
        assert "linear" in calls(gm) and not any("conv" in c for c in calls(gm))
        same(conv, gm, x)


@pytest.mark.parametrize("seed", range(6))
def test_one_pixel_over_channels_last_becomes_a_product(seed: int) -> None:
    rng, n, inp, out = draw(seed)
    rank = seed % 3 + 1
    conv = CONV[rank](inp + 1, out, 1, bias=seed % 2 == 0)
    x = torch.randn(n, *(rng.randint(2, 6) for _ in range(rank)), inp + 1).movedim(-1, 1)
    gm = rewritten(conv, x)
    assert calls(gm) == ["permute", "linear", "permute"] and reason(gm, "matmul") == ""
    same(conv, gm, x)


@pytest.mark.parametrize("seed", range(8))
def test_average_pooling_goes_before_a_pointwise_convolution(seed: int) -> None:
    rng, n, inp, out = draw(seed)
    rank = seed % 3 + 1
    padding = seed % 2
    pool = AVG[rank](2 + padding, 2, padding, ceil_mode=seed > 4, count_include_pad=False)
    model = nn.Sequential(CONV[rank](inp + 1, out, 1, bias=seed % 3 > 0), pool)
    x = torch.randn(n, inp + 1, *(rng.randint(5, 8) for _ in range(rank)))
    gm = rewritten(model, x)
    assert calls(gm)[-2:] == [f"avg_pool{rank}d", f"conv{rank}d"] and reason(gm, "pool") == ""
    same(model, gm, x)
    assert flops(gm, x) < flops(model, x)


class Head(nn.Module):
    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor], kernel: int = 1) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(6, 20, kernel), pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(x))


@pytest.mark.parametrize(
    "pool",
    [
        lambda y: y.mean((2, 3)),
        lambda y: y.mean((-1, -2), keepdim=True),
        lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1),
        lambda y: F.adaptive_avg_pool2d(y, (3, 2)),
    ],
)
def test_global_pooling_too(pool: Any) -> None:
    torch.manual_seed(0)
    model, x = Head(pool), torch.randn(2, 6, 8, 7)
    gm = rewritten(model, x)
    assert reason(gm, "pool") == ""
    same(model, gm, x)
    assert flops(gm, x) * 9 < flops(model, x)


@pytest.mark.parametrize("seed", range(6))
def test_average_pooling_without_overlap_is_merged(seed: int) -> None:
    rng, n, inp, out = draw(seed)
    rank, size = seed % 3 + 1, 2 + seed % 2
    model = nn.Sequential(CONV[rank](inp, out, 3, padding=rng.randint(0, 2), bias=seed > 2), AVG[rank](size))
    x = torch.randn(n, inp, *(rng.randint(5, 9) for _ in range(rank)))
    gm = rewritten(model, x)
    assert calls(gm) == [f"conv{rank}d"] and reason(gm, "merge") == ""
    same(model, gm, x)
    assert flops(gm, x) < flops(model, x)
    (origin,) = [c for c in constants(gm).values() if c.recipe is not None]
    other = torch.randn_like(model[0].weight)
    again = evaluate(origin, [other])
    spread = F.conv_transpose1d if rank == 1 else F.conv_transpose2d if rank == 2 else F.conv_transpose3d
    box = torch.full((1, 1, *[size] * rank), 1 / size**rank)
    want = spread(other.flatten(0, 1)[:, None], box).unflatten(0, other.shape[:2]).squeeze(2)
    assert torch.allclose(again, want, atol=1e-6)


def test_a_sparse_kernel_is_not_spread() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, 0, 1, 1] = 1.0  # 4 nonzeros, 16 when spread: no gain left
    assert "the merged kernel multiplies 16 times" in str(reason(rewritten(model, torch.randn(1, 4, 8, 8)), "merge"))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(1, 2), nn.AvgPool2d(1, (2, 3))])
def test_pooling_of_one_pixel_is_a_stride(pool: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3, stride=(1, 2), padding=1), pool), torch.randn(2, 3, 11, 12)
    gm = rewritten(model, x)
    assert calls(gm) == ["conv2d"] and reason(gm, "stride") == ""
    same(model, gm, x)
    assert flops(gm, x) * 3 < flops(model, x)


class Position(nn.Module):
    """A convolution of a learned map, as relative position encodings have it."""

    def __init__(self, out: int = 4, kernel: int = 3) -> None:
        super().__init__()
        self.place, self.conv = nn.Parameter(torch.randn(1, 4, 6, 6)), nn.Conv2d(4, out, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.place).sum(1, keepdim=True)


def test_convolution_of_a_constant_is_folded_and_its_recipe_replays() -> None:
    torch.manual_seed(0)
    model, x = Position(), torch.randn(3, 2, 6, 6)
    gm = rewritten(model, x)
    assert not any("conv" in c for c in calls(gm)) and reason(gm, "constant") == ""
    same(model, gm, x)
    other = Position().state_dict()
    (origin,) = [c for c in constants(gm).values() if c.recipe is not None]
    want = F.conv2d(other["place"], other["conv.weight"], other["conv.bias"], padding=1)
    assert torch.allclose(evaluate(origin, [other[s] for s in origin.sources]), want)
    large = rewritten(Position(64, 1), x)
    assert "conv2d" in calls(large) and "the result has" in str(reason(large, "constant"))


IMAGE = (2, 6, 8, 8)
REFUSALS: dict[str, tuple[nn.Module, tuple[int, ...], str, str]] = {
    "depth": (nn.Conv3d(6, 2, (2, 3, 3)), (1, 6, 4, 5, 5), "depth", "not as deep"),
    "padded depth": (nn.Conv3d(6, 2, (4, 3, 3), padding=(1, 0, 0)), (1, 6, 4, 5, 5), "depth", "not as deep"),
    "planes": (nn.Conv2d(6, 4, 1), IMAGE, "matmul", "channels come first"),
    "strided": (nn.Conv2d(6, 4, 1, stride=2), IMAGE, "matmul", "every second pixel"),
    "grouped": (nn.Conv2d(6, 4, 1, groups=2), IMAGE, "matmul", "2 groups"),
    "bias and padding": (nn.Sequential(nn.Conv2d(6, 4, 1), nn.AvgPool2d(3, 2, 1)), IMAGE, "pool", "scale the bias"),
    "no smaller": (nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.AvgPool2d(3, 1, 1)), IMAGE, "pool", "smaller"),
    "wide kernel": (Head(lambda y: y.mean((2, 3)), 3), IMAGE, "pool", "more than one pixel"),
    "overlap": (nn.Sequential(nn.Conv2d(6, 4, 3), nn.AvgPool2d(3, 2)), IMAGE, "merge", "overlap"),
    "stride": (nn.Sequential(nn.Conv2d(6, 4, 3, stride=2), nn.AvgPool2d(2)), IMAGE, "merge", "a stride or a dilation"),
    "divisor": (nn.Sequential(nn.Conv2d(6, 4, 3), nn.AvgPool2d(1, 2, divisor_override=2)), IMAGE, "stride", "divides"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why_and_change_nothing(case: str) -> None:
    model, shape, rule, words = REFUSALS[case]
    x = torch.randn(shape)
    gm = rewritten(model, x)
    assert words in str(reason(gm, rule))
    before = captured(model, x)
    run_passes(before, [Normalise()], Context())
    assert calls(gm) == calls(before)
    assert torch.equal(gm(x), model(x))


def test_a_copy_is_not_worth_it() -> None:
    conv, x = nn.Conv3d(3, 2, (4, 3, 3)), torch.randn(1, 3, 4, 5, 5)
    gm = rewritten(conv, x.to(memory_format=torch.channels_last_3d))
    assert "would copy" in str(reason(gm, "depth")) and calls(gm) == ["conv3d"]


def test_what_others_read_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return y, F.avg_pool2d(y, 2)

    gm = rewritten(Both(), torch.randn(IMAGE))
    assert reason(gm, "pool") is None and calls(gm) == ["conv2d", "avg_pool2d"]


def test_unknown_batch_sizes_are_fine() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv3d(3, 4, (4, 3, 3)), nn.ReLU()), torch.randn(2, 3, 4, 6, 6)
    gm = captured(model, x, shapes="batch")
    run_passes(gm, [Normalise(), Fold(), ConvRewrite()], Context())
    assert "conv2d" in calls(gm)
    other = torch.randn(5, 3, 4, 6, 6)
    assert torch.allclose(gm(other), model(other), atol=1e-5)


def test_a_training_capture_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.AvgPool2d(2))
    gm = rewritten(model, torch.randn(IMAGE), training=True)
    assert calls(gm) == ["conv2d", "avg_pool2d"] and rewrites(gm) == ()


def test_compiled_models_round_trip_their_weights() -> None:
    """Sites keep their names, sparse ones become products, and the state dict is the original's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 8, (3, 3, 3)), nn.Flatten(1, 2), nn.Conv2d(8, 16, 4), nn.Flatten(), nn.Linear(16, 3)
    )
    with torch.no_grad():
        model[2].weight.mul_(torch.rand_like(model[2].weight) < 0.2)
    model.eval()
    x = torch.randn(2, 2, 3, 6, 6)
    fast = sparsec.compile(model, None, (x,), tune="off", min_speedup=0)
    rows = {r.site: r for r in sparsec.report(fast).rows}
    assert rows["2"].op == "linear" and rows["2"].decision == "sparse" and rows["0"].op == "conv2d"
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    state = sparsec.dense_state_dict(fast)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()) and len(state) == len(
        model.state_dict()
    )
    other = {k: v * 2 for k, v in model.state_dict().items()}
    sparsec.load_dense_state_dict(fast, other)
    twin = copy.deepcopy(model)
    twin.load_state_dict(other)
    assert torch.allclose(fast(x), twin(x), atol=1e-4)
