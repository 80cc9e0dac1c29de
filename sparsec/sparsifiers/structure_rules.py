"""How operators without products move labels: elementwise, views, joins and splits, pooling, reductions, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsec.graph import opname
from sparsec.sparsifiers.structure_labels import FIXED, Value, Weight, along, compress, varying
from sparsec.sparsifiers.structure_trace import Result, Rule, Trace, shape_of, value_of

# Elementwise

KEEP_ZERO = frozenset(
    f"aten::{name}" for name in (
        "relu", "relu6", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "selu", "celu", "mish", "neg", "abs",
        "sqrt", "sin", "erf", "sign", "clone", "_to_copy", "alias", "detach", "contiguous", "dropout",
        "lift_fresh_copy", "square", "threshold", "hardshrink", "softshrink", "floor", "ceil", "round",
    )
)  # fmt: skip
SAME = ("clone", "_to_copy", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "to", "dropout")


def pointwise(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    operands = [(t.get(n), shape_of(n)) for n in node.all_input_nodes]
    if any(not isinstance(value, (Value, Weight)) for value, _ in operands):
        return t.refuse(node)
    return t.join(shape_of(node), operands, _zero(t, node, args))


def _zero(t: Trace, node: fx.Node, args: dict[str, Any]) -> bool:
    """Whether the result is 0 where the pruned operands are."""
    name = opname(node)
    known = [_is_zero(t.get(n)) for n in node.all_input_nodes]
    if name in KEEP_ZERO:
        return all(known)
    if name == "aten::mul":
        return any(known)
    if name in ("aten::add", "aten::sub"):
        return all(known) and isinstance(args.get("other"), fx.Node)
    if name == "aten::div":
        return _is_zero(t.get(args["self"]))
    if name == "aten::hardtanh":
        return all(known) and args["min_val"] <= 0 <= args["max_val"]
    if name == "aten::pow":
        return all(known) and isinstance(args.get("exponent"), (int, float)) and args["exponent"] > 0
    return False


def _is_zero(value: Result) -> bool:
    return isinstance(value, Weight) or (isinstance(value, Value) and value.zero)


def same(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.get(node.args[0])
    return value if isinstance(value, (Value, Weight)) else t.refuse(node)


def glu(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.carried(t.get(args["self"]))
    if value.labels is None:
        return FIXED
    halves = value.labels.chunk(2, args["dim"])
    shape = shape_of(node)
    return t.join(shape, [(Value(compress(half)), shape) for half in halves], value.zero)


# Views


def reshape(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.carried(t.get(args["self"]))
    return FIXED if value.labels is None else value_of(value.labels.reshape(shape_of(node)), value.zero)


def expand(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value, shape = t.carried(t.get(args["self"])), shape_of(node)
    if value.labels is not None:
        return value_of(value.labels.expand(shape), value.zero)
    own = shape_of(args["self"])
    offset = len(shape) - len(own)
    fixed = {d + offset for d, size in enumerate(own) if size > 1 and d not in value.wild}
    return Value(wild=frozenset(range(len(shape))) - fixed)


def filled(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    return Value(wild=frozenset(range(len(shape_of(node)))))


def move(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    """Operators that only move elements do the same to the labels."""
    value = t.get(args["self"])
    if isinstance(value, Weight) and opname(node) in TRANSPOSES:
        order = node.target(_index_dims(value.shape), *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return _permuted(value, order)
    value = t.carried(value)
    if value.labels is None:
        return FIXED
    moved = node.target(value.labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    if opname(node) in ("aten::slice", "aten::narrow"):  # a slice of one index is a position
        dim = (args.get("dim") or 0) % value.labels.dim()
        if moved.shape[dim] == 1 and dim in varying(value.labels):
            t.picks.append((node, value.labels, dim))
    if isinstance(moved, (list, tuple)):
        return [value_of(part, value.zero) for part in moved]
    return value_of(moved, value.zero)


def select(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.carried(t.get(args["self"]))
    if value.labels is not None and args["dim"] % value.labels.dim() in varying(value.labels):
        t.picks.append((node, value.labels, args["dim"] % value.labels.dim()))
    return move(t, node, args)


def split(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    """Parts of one size must keep one size, because models ask for a number of parts or for their width."""
    parts = move(t, node, args)
    value = t.carried(t.get(args["self"]))
    if value.labels is None:
        return [FIXED for _ in node.meta["val"]]
    dim = (args.get("dim") or 0) % value.labels.dim()
    sizes = {v.shape[dim] for v in node.meta["val"]}
    if len(sizes) == 1 and dim in varying(value.labels):
        pieces = [piece.labels for piece in parts]
        if any(piece is None for piece in pieces):
            return t.refuse(node, "a part of a split tensor is fixed")
        for piece in pieces[1:]:
            t.relations.unify(pieces[0], piece)
    return parts


def unbind(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.carried(t.get(args["self"]))
    if value.labels is None:
        return [FIXED for _ in node.meta["val"]]
    if args["dim"] % value.labels.dim() in varying(value.labels):
        t.picks.append((node, value.labels, args["dim"] % value.labels.dim()))
    return move(t, node, args)


TRANSPOSES = ("aten::t", "aten::transpose", "aten::permute", "aten::numpy_T", "aten::mT", "aten::swapaxes")


def _index_dims(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of the same rank whose sizes name the dimensions: dimension d has size d + 1."""
    return torch.empty([d + 1 for d in range(len(shape))], device="meta")


def _permuted(value: Weight, probe: torch.Tensor) -> Weight:
    order = [size - 1 for size in probe.shape]
    return Weight(value.name, tuple(value.atoms[d] for d in order), tuple(value.shape[d] for d in order))


# Joins


def cat(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    items = list(args["tensors"])
    dim = args["dim"] % len(shape_of(node))
    return _concatenate(t, node, [t.get(n) for n in items], [shape_of(n) for n in items], dim)


def stack(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    items, dim = list(args["tensors"]), args["dim"] % len(shape_of(node))
    values = [t.carried(t.get(n)) for n in items]
    raised = [v if v.labels is None else Value(v.labels.unsqueeze(dim), zero=v.zero) for v in values]
    shapes = [(*shape_of(n)[:dim], 1, *shape_of(n)[dim:]) for n in items]
    return _concatenate(t, node, raised, shapes, dim)


def _concatenate(t: Trace, node: fx.Node, values: list[Result], shapes: list[tuple[int, ...]], dim: int) -> Result:
    """Along `dim` labels follow one another; in every other dimension the parts must keep the same indices."""
    filled = [i for i, shape in enumerate(shapes) if 0 not in shape]
    values, shapes = [values[i] for i in filled], [shapes[i] for i in filled]
    parts = [t.carried(v) for v in values]
    whole = [v.labels if v.labels is not None else torch.zeros(s, dtype=torch.long) for v, s in zip(parts, shapes)]
    for i, labels in enumerate(whole):
        dims = varying(labels)
        if dim in dims and len(dims) > 1:  # the outermost dimension carries the units
            whole[i] = t.relations.collapse(labels, [d for d in dims if d != dims[0]])
    across = [i for i, labels in enumerate(whole) if set(varying(labels)) - {dim}]
    if across:
        base = whole[across[0]]
        if len(across) < len(whole):
            return t.refuse(node, "is concatenated with tensors whose dimension is fixed")
        for labels in whole[1:]:
            t.relations.unify(base.narrow(dim, 0, 1), labels.narrow(dim, 0, 1))
        whole = [base.narrow(dim, 0, 1).expand(s) for s in shapes]
    return value_of(torch.cat(whole, dim), all(v.zero for v in parts if v.labels is not None))


def pad(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.carried(t.get(args["self"]))
    if value.labels is None:
        return FIXED
    labels, widths = value.labels, list(args["pad"] if "pad" in args else args["padding"])
    constant = "constant" in opname(node) or args.get("mode") == "constant"
    for i in range(len(widths) // 2):
        dim = labels.dim() - 1 - i
        before, after = widths[2 * i], widths[2 * i + 1]
        shape = list(labels.shape)
        shape[dim] += before + after
        if not (before or after):
            continue
        if dim not in varying(labels):
            labels = labels.narrow(dim, 0, 1).expand(shape)
        elif constant and before >= 0 and after >= 0:
            ends = [torch.zeros([*shape[:dim], n, *shape[dim + 1 :]], dtype=torch.long) for n in (before, after)]
            labels = torch.cat([ends[0], labels, ends[1]], dim)
        else:
            return t.refuse(node, "a prunable dimension is padded by its own values or cropped")
    return value_of(labels, value.zero and not args.get("value"))


def index(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    """Fixed positions of dimensions that do not vary: any position reads the same labels."""
    source = args["self"]
    given = args["indices"] if "indices" in args else args["index"]
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    real = [n for n in given if isinstance(n, fx.Node)]
    value = t.get(source)
    if any(t.labels(n) is not None for n in real) or any(n.meta["val"].dtype == torch.bool for n in real):
        return t.refuse(node, "is indexed by something that is not fixed")
    value = t.carried(value, _unindexed(value, given)) if "indices" in args else t.carried(value)
    if value.labels is None:
        return FIXED
    labels = value.labels
    if "indices" in args:
        touched = [d for d, n in enumerate(given) if isinstance(n, fx.Node)]
        zeros = [torch.zeros(shape_of(n), dtype=torch.long) if isinstance(n, fx.Node) else None for n in given]
        moved = torch.ops.aten.index.Tensor(labels, zeros)
    else:
        touched = [args["dim"] % labels.dim()]
        if opname(node) == "aten::gather":
            return t.refuse(node)
        moved = labels.index_select(args["dim"], torch.zeros(shape_of(real[0]), dtype=torch.long))
    if set(touched) & set(varying(labels)):
        return t.refuse(node, "is indexed along a prunable dimension")
    return value_of(moved, value.zero)


def _unindexed(value: Result, given: list[Any]) -> int | None:
    """The dimension of an indexed parameter that can carry units."""
    if not isinstance(value, Weight):
        return None
    free = [d for d, a in enumerate(value.atoms) if a is not None and not (d < len(given) and given[d] is not None)]
    return free[-1] if free else None


# Pooling and reductions


def spatial(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    """Pooling and resampling: the last 1, 2 or 3 dimensions change size, each channel for itself."""
    value = t.carried(t.get(node.args[0]))
    outputs = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    labels = value.labels
    if labels is None:
        return FIXED
    count = next(int(c) for c in opname(node).replace("_with_indices", "")[::-1] if c in "123")
    labels = t.relations.carrier(labels)
    last = range(labels.dim() - count, labels.dim())
    if set(last) & set(varying(labels)):
        return t.refuse(node, "is pooled along a prunable dimension")
    for dim in last:
        labels = labels.narrow(dim, 0, 1)
    results = [value_of(labels.expand(tuple(o.shape)), value.zero) for o in outputs]
    return results if isinstance(node.meta["val"], (list, tuple)) else results[0]


SUMS = ("aten::sum", "aten::linalg_vector_norm", "aten::norm")
POSITIONS = ("aten::argmax", "aten::argmin", "aten::max", "aten::min")


def reduce(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    if "other" in args:  # the elementwise maximum of two tensors
        return pointwise(t, node, args)
    value = t.carried(t.get(args["self"]))
    several = isinstance(node.meta["val"], (list, tuple))
    shape = tuple(node.meta["val"][0].shape) if several else shape_of(node)
    labels = value.labels
    if labels is None:
        return [FIXED, FIXED] if several else FIXED
    dims = args.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(labels.dim()))
    dims = [d % labels.dim() for d in dims]
    inside = [d for d in varying(labels) if d in dims]
    outside = [d for d in varying(labels) if d not in dims]
    if inside and outside and min(outside) < min(inside):
        labels, inside = t.relations.collapse(labels, inside), []
    if inside and (outside or (opname(node) in POSITIONS)):
        return t.refuse(node, "is reduced over a prunable dimension whose positions matter")
    if inside:
        power = args.get("ord", args.get("p", 1))  # of a norm; None is 2
        if not (opname(node) in SUMS and value.zero and (power is None or power > 0)):
            t.inexact(labels, f"{opname(node)} counts the units of this dimension")
        return [FIXED, FIXED] if several else FIXED
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    result = value_of(labels.reshape(shape), value.zero)
    return [result, result] if several else result


def softmax(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.carried(t.get(args["self"]))
    if value.labels is None:
        return FIXED
    labels, dim = value.labels, args["dim"] % value.labels.dim()
    dims = varying(labels)
    if dim in dims and min(dims) < dim:
        labels = t.relations.collapse(labels, [dim])
    elif dim in dims:
        t.inexact(labels, f"{opname(node)} normalises over this dimension")
    return value_of(labels)


def scan(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    value = t.carried(t.get(args["self"]))
    if value.labels is None:
        return FIXED
    if args["dim"] % value.labels.dim() in varying(value.labels):
        return t.refuse(node, f"{opname(node)} runs along a prunable dimension")
    return Value(value.labels)


# Norms


def channelwise(t: Trace, node: fx.Node, source: Any, params: Sequence[Any], zero: bool, dim: int = 1) -> Value:
    """One parameter per index of dimension `dim`: batch norm, instance norm, group norm, PReLU."""
    shape = shape_of(source)
    operands: list[tuple[Result, Sequence[int]]] = [(t.carried(t.get(source)), shape)]
    for param in params:
        if isinstance(param, fx.Node):
            labels = t.labels(param)
            if labels is not None:
                view = [1] * len(shape)
                view[dim] = labels.numel()
                operands.append((Value(along(labels, 0).view(view)), view))
    return t.join(shape, operands, zero)


def batch_norm(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    source = args["input"]
    params = [args.get(k) for k in ("weight", "bias", "running_mean", "running_var")]
    zero = isinstance(args.get("weight"), fx.Node) or (opname(node) == "aten::instance_norm" and t.get(source).zero)
    result = channelwise(t, node, source, params, zero)
    count = len(node.meta["val"]) if isinstance(node.meta["val"], (list, tuple)) else 0
    return [result] + [FIXED] * (count - 1) if count else result


def prelu(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    return channelwise(t, node, args["self"], [args["weight"]], t.carried(t.get(args["self"])).zero)


def group_norm(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    source, groups = args["input"], args["num_groups"]
    value = t.carried(t.get(source))
    if value.labels is not None:
        labels = t.relations.carrier(value.labels)
        channels = labels.shape[1]
        if varying(labels) not in ([], [1]):
            return t.refuse(node, "is a group norm over units that are not its channels")
        if groups == 1:
            t.inexact(labels, "group norm with one group normalises over all channels")
        elif groups < channels:  # a whole norm group can go: each is normalised for itself
            rows = along(labels, 1).view(groups, -1)
            t.relations.unify(rows[:, :1], rows)
    return channelwise(t, node, source, [args.get("weight"), args.get("bias")], isinstance(args.get("weight"), fx.Node))


def layer_norm(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    source = args["input"]
    value, shape = t.carried(t.get(source)), shape_of(source)
    if value.labels is not None:
        dims = varying(value.labels)
        inside = [d for d in dims if d >= len(shape) - len(args["normalized_shape"])]
        if inside and len(inside) < len(dims):
            value = Value(t.relations.collapse(value.labels, inside))
        elif inside:
            name = opname(node).removeprefix("aten::")
            t.inexact(value.labels, f"{name} divides by a mean over these channels, which removing them changes")
    params = [args.get("weight"), args.get("bias")]
    return t.join(shape, [(value, shape), *((t.get(p), shape_of(p)) for p in params if isinstance(p, fx.Node))])


def _names(rule: Rule, *names: str) -> dict[str, Rule]:
    return {f"aten::{name}": rule for name in names}


RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    **_names(pointwise, "where", "masked_fill", "lerp", "addcmul", "addcdiv"),
    **_names(same, *SAME),
    **_names(glu, "glu"),
    **_names(reshape, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    **_names(expand, "expand"),
    **_names(filled, "full", "zeros", "ones"),
    **_names(
        move, "t", "transpose", "permute", "numpy_T", "mT", "swapaxes", "movedim", "slice", "narrow", "flip", "roll",
        "repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "tile",
    ),
    **_names(select, "select"),
    **_names(split, "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split"),
    **_names(unbind, "unbind"),
    **_names(cat, "cat", "concat"),
    **_names(stack, "stack"),
    **_names(
        pad, "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"
    ),
    **_names(index, "index", "index_select"),
    **_names(
        spatial, "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
        "_adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d",
        "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
    ),
    **_names(
        reduce, "mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "norm", "logsumexp",
        "argmax", "argmin", "prod", "any", "all",
    ),
    **_names(softmax, "softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax"),
    **_names(scan, "cumsum", "cumprod"),
    **_names(batch_norm, "_native_batch_norm_legit_no_training", "batch_norm", "instance_norm"),
    **_names(prelu, "prelu"),
    **_names(group_norm, "group_norm"),
    **_names(layer_norm, "layer_norm", "rms_norm"),
}  # fmt: skip
