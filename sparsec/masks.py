"""Masked outputs: convolutions that compute some pixels only, and how a mask travels through a network.

masks = {"layer1.conv": torch.rand(56, 56) >= 0.3}                      # True: computed; False: zero in every channel
fast = sparsec.mask_outputs(model, sparsec.masks.propagate(model, x, masks))
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from sparsec.aten import arguments, opname
from sparsec.capture import capture_whole
from sparsec.errors import InputError, SpecError, nearest
from sparsec.graph import owner
from sparsec.ops.masked import MASKED_CONV

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROOT = "<root>"


def mask_outputs(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of `model` whose named convolutions compute only the pixels where their mask is True; the rest are zero.

    Masks are bool, of the convolution's output size without batch and channels, (H, W) for Conv2d; all images and
    channels share them. Dropped pixels are neither gathered nor multiplied: the rows of the product are the kept ones
    (Semi-Structured Activation Sparsity, 2023). Parameters keep their names, so state dicts go both ways, and gradients
    are those of `mask * conv(x)`.

    Raises SpecError for a site that is no convolution of the model and for masks that are not bool or of another rank;
    a mask whose size is not the output's is an InputError at the call.
    """
    modules = dict(model.named_modules())
    found = {name: _convolution(modules, name, mask) for name, mask in masks.items()}
    twin = copy.deepcopy(model)
    for name in found:
        place = "" if name == ROOT else name
        masked = MaskedConv(twin.get_submodule(place), masks[name])
        if not place:
            return masked
        parent, _, child = place.rpartition(".")
        setattr(twin.get_submodule(parent), child, masked)
    return twin


def _convolution(modules: Mapping[str, nn.Module], name: str, mask: Any) -> nn.Module:
    """The module of a site, when it can be masked with `mask`."""
    module = modules.get("" if name == ROOT else name)
    convolutions = [n or ROOT for n, m in modules.items() if isinstance(m, _KINDS)]
    if module is None:
        raise SpecError(f"mask_outputs: the model has no module {name!r}; {nearest(name, convolutions)}")
    if not isinstance(module, _KINDS) or not any(type(module).forward is k.forward for k in _KINDS):
        raise SpecError(
            f"mask_outputs: {name!r} is a {type(module).__name__}; only Conv1d, Conv2d and Conv3d can be masked; "
            f"{nearest(name, convolutions)}"
        )
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise SpecError(f"mask_outputs: the weight of {name!r} is computed; remove its parametrisation first")
    d = module.weight.dim() - 2
    if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool or mask.dim() != d:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise SpecError(f"mask_outputs: the mask of {name!r} must be a bool tensor with {d} dimensions, got {got}")
    return module


class MaskedConv(nn.Module):
    """What `mask_outputs` puts in the place of a convolution."""

    mask: torch.Tensor

    def __init__(self, conv: nn.Module, mask: torch.Tensor) -> None:
        super().__init__()
        old: Any = conv
        self.weight, self.bias = old.weight, old.bias
        self.stride, self.dilation, self.groups = list(old.stride), list(old.dilation), old.groups
        self.padding_mode = "constant" if old.padding_mode == "zeros" else old.padding_mode
        before, after = _both_sides(old)
        plain = self.padding_mode == "constant" and before == after
        self.padding = list(before) if plain else [0] * len(before)
        self.around = () if plain else tuple(n for pair in zip(before[::-1], after[::-1]) for n in pair)
        device = old.weight.device
        self.register_buffer("mask", mask.detach().to(device).contiguous().clone(), persistent=False)
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = x.dim() == self.weight.dim() - 1
        x = x.unsqueeze(0) if single else x
        x = F.pad(x, self.around, mode=self.padding_mode) if self.around else x
        y: torch.Tensor = MASKED_CONV(
            x, self.weight, self.bias, self.mask, self.stride, self.padding, self.dilation, self.groups
        )
        return y.squeeze(0) if single else y

    def extra_repr(self) -> str:
        out, inp, *kernel = self.weight.shape
        return (
            f"{inp * self.groups}, {out}, kernel_size={tuple(kernel)}, stride={tuple(self.stride)}, "
            f"{int(self.mask.sum())} of {self.mask.numel()} pixels"
        )


def _both_sides(conv: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and behind, as torch understands "same" and "valid"."""
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return tuple(conv.padding), tuple(conv.padding)


# Propagation. What a window operator reads is, per axis, a relation between the places of output and input.


def propagate(
    model: nn.Module, example_inputs: Any, masks: Mapping[str, torch.Tensor], rule: str = "centre"
) -> dict[str, torch.Tensor]:
    """`masks`, and what follows from them for the other convolutions, by qualified name; every mask that drops a pixel.

    rule "centre": downstream, a pixel is kept if the pixel at the centre of its window is: the mask is resized through
    strides and pooling, and stays as sparse as it was. rule "any": it is kept if anything in its window is. Both change
    the network. rule "needed": upstream, and exact: pixels that no kept pixel reads are dropped, so that the outputs of
    the masked model stay what they are. A module that is called several times keeps what any call keeps.

    Raises SpecError for unknown rules and sites, InputError for masks that are not the size of the output,
    CaptureError when the model cannot be captured on `example_inputs`.
    """
    if rule not in _RULES:
        raise SpecError(f"rule={rule!r} is none of {', '.join(map(repr, _RULES))}")
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        _convolution(modules, name, mask)
    gm = capture_whole(model, example_inputs).gm
    sites = {n: owner(n)[0] or ROOT for n in gm.graph.nodes if opname(n) in _CONVS}
    for node, name in sites.items():
        if name in masks and _space(node) != tuple(masks[name].shape):
            raise InputError(
                f"the mask of {name!r} is {tuple(masks[name].shape)}, its output has {_space(node)} pixels"
            )
    found = _RULES[rule](gm, {n: masks[name] for n, name in sites.items() if name in masks})
    result: dict[str, torch.Tensor] = {}
    for node, name in sites.items():
        kept = found.get(node, torch.ones(_space(node), dtype=torch.bool))
        before = result.get(name)
        if before is not None and before.shape != kept.shape:
            kept = before = torch.ones_like(before)  # one module, two sizes: nothing can be left out
        result[name] = kept if before is None else before | kept
    result.update(masks)
    return {name: mask for name, mask in result.items() if name in masks or not bool(mask.all())}


Found = dict[fx.Node, torch.Tensor]


class _Axis(NamedTuple):
    """What the places of one axis read."""

    reads: torch.Tensor  # bool (out, in)
    centre: torch.Tensor  # bool (out, in): the middle of each window, or what is nearest to it inside the image


_CONVS = ("aten::conv1d", "aten::conv2d", "aten::conv3d")
_LOCAL = (  # an output pixel reads that pixel of the input; what torch tags as pointwise needs no line
    "aten::batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::dropout", "aten::feature_dropout",
    "aten::clone", "aten::alias", "aten::contiguous", "aten::_to_copy", "aten::prelu", "aten::relu6", "aten::hardtanh",
    "aten::hardswish", "aten::hardsigmoid", "aten::silu", "aten::mish", "aten::gelu", "aten::elu", "aten::selu",
    "aten::celu", "aten::leaky_relu", "aten::softplus",
)  # fmt: skip


def _downstream(gm: fx.GraphModule, given: Found, window: Callable[[_Axis], torch.Tensor]) -> Found:
    """Masks from the inputs to the outputs; `window` is what the rule looks at."""
    found: Found = {}
    for node in gm.graph.nodes:
        relation = _relation(node)
        mask: torch.Tensor | None = None
        if relation is not None:
            source = node.args[0]
            if source in found:
                mask = _along(found[source], [window(axis) for axis in relation])
        elif _local(node):
            inputs = [n for n in node.all_input_nodes if _space(n) == _space(node) and n.op != "get_attr"]
            if inputs and all(n in found for n in inputs):
                mask = torch.stack([found[n] for n in inputs]).any(0)
        if node in given:
            mask = given[node]
        if mask is not None:
            found[node] = mask
    return found


def _needed(gm: fx.GraphModule, given: Found) -> Found:
    """Which pixels of every node are read, from the outputs to the inputs; masks drop what they drop."""
    read: Found = {}
    for node in reversed(gm.graph.nodes):
        need = read.get(node)  # none: it has no pixels, or is read by what does not say which
        if need is not None and node in given:
            need = read[node] = need & given[node]
        relation = _relation(node)
        for source in node.all_input_nodes:
            size = _space(source)
            if not size:
                continue
            wanted = torch.ones(size, dtype=torch.bool)
            if need is not None and not bool(need.any()):
                wanted = ~wanted
            elif need is not None and relation is not None and source is node.args[0]:
                wanted = _along(need, [axis.reads.t() for axis in relation])
            elif need is not None and _local(node) and size == _space(node):
                wanted = need
            read[source] = read[source] | wanted if source in read else wanted
    return {n: mask for n, mask in read.items() if opname(n) in _CONVS}


_RULES: dict[str, Callable[[fx.GraphModule, Found], Found]] = {
    "centre": lambda gm, given: _downstream(gm, given, lambda axis: axis.centre),
    "any": lambda gm, given: _downstream(gm, given, lambda axis: axis.reads),
    "needed": _needed,
}


def _along(mask: torch.Tensor, relations: Sequence[torch.Tensor]) -> torch.Tensor:
    """The places that are related to a True one: one product of matrices per axis."""
    wide = mask.float()
    for axis, relation in enumerate(relations):
        wide = (wide.movedim(axis, -1) @ relation.float().t()).movedim(-1, axis)
    return wide > 0


def _space(node: fx.Node) -> tuple[int, ...]:
    """The sizes behind batch and channels; empty for what is no image."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) and value else value
    return tuple(int(s) for s in value.shape[2:]) if isinstance(value, torch.Tensor) and value.dim() > 2 else ()


def _local(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        name = opname(node.args[0])  # type: ignore[arg-type]
        return bool(node.args[1] == 0 and (name in _LOCAL or "_pool" in name))
    if not isinstance(node.target, torch._ops.OpOverload) or not _space(node):
        return False
    if opname(node) == "aten::cat":
        return bool(arguments(node)["dim"] == 1)
    return torch.Tag.pointwise in node.target.tags or opname(node) in _LOCAL


def _relation(node: fx.Node) -> list[_Axis] | None:
    """What each axis of a window operator reads; None for what has no windows."""
    name = opname(node)
    if name not in _CONVS and "_pool" not in name:
        return None
    source: Any = node.args[0]
    bound, out, inp = arguments(node), _space(node), _space(source)
    if not out or not inp or len(out) != len(inp):
        return None
    if "adaptive" in name:
        return [_adaptive(o, i) for o, i in zip(out, inp)]
    d = len(out)
    weight = bound.get("weight")
    kernel = list(weight.meta["val"].shape[2:]) if name in _CONVS else _list(bound["kernel_size"], d)  # type: ignore[union-attr]
    stride = _list(bound["stride"] or kernel, d)
    dilation = _list(bound.get("dilation", 1), d)
    padding = bound.get("padding", 0)
    if isinstance(padding, str):
        padding = [e * (k - 1) // 2 if padding == "same" else 0 for e, k in zip(dilation, kernel)]
    geometry = zip(out, inp, kernel, stride, _list(padding, d), dilation)
    return [_windows(*axis) for axis in geometry]


def _list(value: Any, d: int) -> list[int]:
    values = [value] * d if isinstance(value, int) else list(value)
    return values * d if len(values) == 1 else values


def _windows(out: int, inp: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
    first = torch.arange(out)[:, None] * stride - padding
    reads = first + torch.arange(kernel) * dilation
    return _Axis(_marked(reads, inp), _marked((first + (kernel - 1) * dilation // 2).clamp(0, inp - 1), inp))


def _marked(places: torch.Tensor, size: int) -> torch.Tensor:
    """bool (rows, size), True at those of the row's places that exist."""
    inside = (places >= 0) & (places < size)
    marked = torch.zeros(len(places), size, dtype=torch.bool)
    marked[torch.arange(len(places))[:, None].expand_as(places)[inside], places[inside]] = True
    return marked


def _adaptive(out: int, inp: int) -> _Axis:
    places, o = torch.arange(inp), torch.arange(out)[:, None]
    first, last = o * inp // out, -(-(o + 1) * inp // out) - 1
    return _Axis((places >= first) & (places <= last), places == (first + last) // 2)
