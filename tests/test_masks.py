"""Masked outputs: equal to mask * conv in every geometry, dtype and layout; masks that travel through a network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsec
from sparsec.errors import InputError, SpecError
from sparsec.masks import MaskedConv, propagate
from sparsec.ops.masked import MASKED_CONV, Patches

CONVS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(5, 7, 3, padding=1), (2, 5, 9, 11)),
    "wide": (lambda: nn.Conv2d(70, 130, 3, padding=1), (1, 70, 12, 9)),
    "columns of every tile": (lambda: nn.Conv2d(3, 64 + 32 + 16 + 5, 1, bias=False), (3, 3, 13, 8)),
    "stride and dilation": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 0), dilation=(2, 1)),
        (2, 4, 15, 14),
    ),
    "larger than half the kernel": (lambda: nn.Conv2d(4, 6, 5, padding=4), (1, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(12, 20, 3, padding=1, groups=4), (2, 12, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(37, 37, 3, stride=2, padding=1, groups=37), (2, 37, 11, 10)),
    "same, even kernel": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (1, 3, 9, 8)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (1, 3, 9, 8)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (1, 3, 9, 8)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (1, 3, 9, 8)),
    "1d": (lambda: nn.Conv1d(6, 9, 5, padding=2), (3, 6, 40)),
    "3d": (lambda: nn.Conv3d(3, 5, 3, padding=1, stride=(1, 2, 1)), (2, 3, 5, 6, 7)),
    "unbatched": (lambda: nn.Conv2d(5, 7, 3), (5, 9, 11)),
    "no images": (lambda: nn.Conv2d(5, 7, 3), (0, 5, 9, 11)),
}


def case(name: str, kept: float = 0.7) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = CONVS[name]
    conv, x = make(), torch.randn(shape)
    size = conv(x).shape[-(conv.weight.dim() - 2) :]
    return conv, x, torch.rand(size) < kept


@pytest.mark.parametrize("name", CONVS)
def test_equals_mask_times_convolution(name: str) -> None:
    conv, x, mask = case(name)
    want = copy.deepcopy(conv).double()(x.double()) * mask
    masked = sparsec.mask_outputs(conv, {"<root>": mask})
    with torch.no_grad():
        got = masked(x)
        assert got.numel() == 0 or (got - want).abs().max() < 1e-5
        assert bool((got[..., ~mask] == 0).all())
        if x.dim() in (4, 5):
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            other = masked(x.to(memory_format=last))
            assert torch.allclose(other, got, atol=1e-6)
            assert other.is_contiguous(memory_format=last) or masked.around or not x.numel()  # F.pad gives planes
        for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 0.03)):
            wide = sparsec.mask_outputs(conv, {"<root>": mask}).to(dtype)(x.to(dtype))
            assert wide.dtype is dtype and (not wide.numel() or (wide - want).abs().max() <= bound * want.abs().max())


@pytest.mark.parametrize("kept", [0.0, 1.0])
@pytest.mark.parametrize("name", ["3x3", "wide", "depthwise", "1d"])
def test_empty_and_full_masks(name: str, kept: float) -> None:
    conv, x, mask = case(name, kept)
    got = sparsec.mask_outputs(conv, {"<root>": mask})(x)
    assert (got - conv(x) * mask).abs().max() < 1e-5 and (kept == 1 or not got.any())


@pytest.mark.parametrize("name", ["3x3", "stride and dilation", "grouped", "reflect", "3d"])
def test_gradients_are_those_of_mask_times_convolution(name: str) -> None:
    conv, x, mask = case(name)
    masked = sparsec.mask_outputs(conv, {"<root>": mask})
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    masked(a).square().sum().backward()
    (conv(b) * mask).square().sum().backward()
    for p, q in zip((a, *masked.parameters()), (b, *conv.parameters())):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4 * float(q.grad.abs().max()))


def test_only_kept_pixels_are_in_the_product() -> None:
    """The rows of the product are the kept pixels, and nothing else is read."""
    mask = torch.rand(14, 14, generator=torch.Generator().manual_seed(0)) >= 0.3
    patches = Patches.build(mask, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1))
    assert len(patches.target) == int(mask.sum()) and patches.source.shape == (int(mask.sum()), 9)
    assert patches.target.tolist() == mask.reshape(-1).nonzero().reshape(-1).tolist()
    x = torch.randn(1, 2, 8, 8)
    alone = torch.zeros(8, 8, dtype=torch.bool)
    alone[1, 1] = True
    x[..., 4:, :] = float("nan")  # far from the one kept pixel
    y = MASKED_CONV(x, torch.randn(3, 2, 3, 3), None, alone, [1, 1], [1, 1], [1, 1], 1)
    assert bool(y.isfinite().all())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.same = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.last = nn.Conv2d(24, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.down(x)
        x = torch.cat([x, F.hardswish(self.same(x) + x)], 1)
        return self.head(F.relu(self.last(self.pool(x))).mean((2, 3)))


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Network().eval(), torch.randn(2, 3, 20, 24)


def test_a_network_keeps_its_class_names_and_weights() -> None:
    model, x = network()
    masks = {"stem": torch.rand(20, 24) < 0.5, "last": torch.rand(5, 6) < 0.5}
    before = copy.deepcopy(model.state_dict())
    masked = sparsec.mask_outputs(model, masks)
    assert isinstance(masked, Network) and isinstance(masked.stem, MaskedConv) and "of 480 pixels" in repr(masked.stem)
    assert isinstance(model.stem, nn.Conv2d) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    masked.load_state_dict(before)
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, i, o, mask=mask: o * mask) for n, mask in masks.items()
    ]
    want = model(x)
    [h.remove() for h in hooks]
    assert torch.allclose(masked(x), want, atol=1e-5)
    exported = torch.export.export(masked, (x,)).module()
    assert torch.allclose(exported(x), want, atol=1e-5)
    again = copy.deepcopy(masked)
    assert torch.allclose(again(x), want, atol=1e-5)


def test_a_mask_that_is_written_into_is_read_again() -> None:
    conv, x, mask = case("3x3")
    masked = sparsec.mask_outputs(conv, {"<root>": mask})
    masked(x)
    masked.mask.logical_not_()
    assert torch.allclose(masked(x), conv(x) * ~mask, atol=1e-5)


def test_masks_are_resized_through_strides_and_pooling() -> None:
    model, x = network()
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    found = propagate(model, x, {"stem": mask})
    assert {n: tuple(m.shape) for n, m in found.items()} == {
        "stem": (20, 24), "down": (10, 12), "same": (10, 12), "last": (5, 6)
    }  # fmt: skip
    assert torch.equal(found["down"], mask[::2, ::2]) and torch.equal(found["same"], found["down"])
    assert torch.equal(found["last"], mask[::4, ::4])  # a 3 x 3 window with padding 1 is centred on 2 o
    sparsec.mask_outputs(model, found)(x)
    assert propagate(model, x, {"stem": torch.ones(20, 24, dtype=torch.bool)}).keys() == {"stem"}


def test_any_keeps_what_sees_a_kept_pixel() -> None:
    model, x = network()
    mask = torch.zeros(20, 24, dtype=torch.bool)
    mask[0, 0] = True
    found = propagate(model, x, {"stem": mask}, "any")
    assert found["down"].nonzero().tolist() == [[0, 0]]
    assert found["same"].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    want = F.max_pool2d(found["same"][None].float(), 3, 2, 1)[0] > 0
    assert torch.equal(found["last"], want)


def test_needed_drops_only_what_nobody_reads() -> None:
    model, x = network()
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[:2, :2] = True
    found = propagate(model, x, {"last": mask}, "needed")
    assert torch.equal(found["last"], mask) and set(found) == {"last", "same", "down", "stem"}
    assert found["same"].nonzero().amax(0).tolist() == [3, 3] and found["down"].nonzero().amax(0).tolist() == [4, 4]
    assert found["stem"].nonzero().amax(0).tolist() == [9, 9]
    one = sparsec.mask_outputs(model, {"last": mask})(x)
    assert torch.allclose(sparsec.mask_outputs(model, found)(x), one, atol=1e-5)
    pixels = sum(int(m.sum()) for m in found.values())
    assert pixels == 4 + 16 + 25 + 100


def test_a_strided_pointwise_convolution_needs_every_second_pixel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1, stride=2)).eval()
    x = torch.randn(1, 3, 9, 8)
    found = propagate(model, x, {}, "needed")
    assert set(found) == {"0"} and int(found["0"].sum()) == 5 * 4 and bool(found["0"][::2, ::2].all())
    assert torch.allclose(sparsec.mask_outputs(model, found)(x), model(x), atol=1e-6)


def test_adaptive_pooling_has_windows_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d((3, 2)), nn.Conv2d(3, 2, 1)).eval()
    x = torch.randn(1, 2, 7, 6)
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    found = propagate(model, x, {"2": mask}, "needed")
    assert found["0"].nonzero().tolist() == [[i, j] for i in range(3) for j in range(3)]
    want = sparsec.mask_outputs(model, {"2": mask})(x)
    assert torch.allclose(sparsec.mask_outputs(model, found)(x), want, atol=1e-6)
    assert propagate(model, x, {"0": found["0"]})["2"].tolist() == [[True, False], [False, False], [False, False]]


def test_what_no_rule_understands_keeps_everything() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).flip(3))

    mask = torch.zeros(4, 4, dtype=torch.bool)
    for rule, name in (("centre", "a"), ("any", "a"), ("needed", "b")):
        mask[1, 1] = True
        assert set(propagate(Odd(), torch.randn(1, 2, 4, 4), {name: mask}, rule)) == {name}


def test_bad_input_is_a_typed_error() -> None:
    model, x = network()
    good = torch.ones(20, 24, dtype=torch.bool)
    for masks, message in (
        ({"stm": good}, "'stem'"),
        ({"norm": good}, "is a BatchNorm2d"),
        ({"head": good}, "is a Linear"),
        ({"stem": good.float()}, "bool tensor with 2 dimensions, got torch.float32"),
        ({"stem": good[0]}, "with 2 dimensions"),
        ({"stem": [[True]]}, "got list"),
    ):
        for call in (lambda m=masks: sparsec.mask_outputs(model, m), lambda m=masks: propagate(model, x, m)):
            with pytest.raises(SpecError, match=message):
                call()
    with pytest.raises(InputError, match=r"must be bool \(20, 24\)"):
        sparsec.mask_outputs(model, {"stem": good[:19]})(x)
    with pytest.raises(InputError, match="has 4 channels"):
        sparsec.mask_outputs(model, {"stem": good})(x[:, :1].expand(-1, 4, -1, -1))
    with pytest.raises(InputError, match="they must agree"):
        sparsec.mask_outputs(model, {"stem": good}).stem(x.double())
    with pytest.raises(InputError, match="its output has"):
        propagate(model, x, {"stem": good[:19]})
    with pytest.raises(SpecError, match="rule='nearest'"):
        propagate(model, x, {"stem": good}, "nearest")
    turned = nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)))
    with pytest.raises(SpecError, match="ConvTranspose2d"):
        sparsec.mask_outputs(turned, {"0": good})
    with pytest.raises(SpecError, match="parametrisation"):
        sparsec.mask_outputs(turned, {"1": good})
    with pytest.raises(InputError, match="does not fit a weight"):
        MASKED_CONV(x, torch.ones(2, 3, 1), None, good, [1], [0], [1], 1)
    with pytest.raises(InputError, match="must be positive"):
        MASKED_CONV(x, torch.ones(2, 3, 1, 1), None, good, [0, 1], [0, 0], [1, 1], 1)
    with pytest.raises(InputError, match="bias must be"):
        MASKED_CONV(x, torch.ones(2, 3, 1, 1), torch.ones(3), good, [1, 1], [0, 0], [1, 1], 1)
