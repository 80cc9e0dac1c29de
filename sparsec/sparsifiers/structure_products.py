"""How products move labels: linear layers, convolutions, embeddings, products of activations, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsec.graph import opname, owner
from sparsec.sparsifiers.structure_labels import FIXED, MOVE, Value, Weight, along, spread, varying
from sparsec.sparsifiers.structure_trace import Result, Rule, Trace, shape_of, value_of

# Products with a parameter


def _contract(t: Trace, value: Value, inputs: torch.Tensor | None, outputs: torch.Tensor | None, shape: Any) -> Value:
    """`x @ w` over the last dimension of x: its labels meet the atoms `inputs`, the result carries `outputs`."""
    labels = value.labels
    if labels is None:
        t.relations.block(inputs, MOVE, "reads a dimension that is fixed")
        return _produced(t, outputs, -1, shape)
    last = labels.dim() - 1
    dims = varying(labels)
    if set(dims) - {last}:  # the same weight for every unit of an outer dimension
        labels = t.relations.collapse(labels, [d for d in dims if d == last])
        t.relations.block(inputs, MOVE, "is a weight that all units of an outer dimension share")
        t.relations.block(outputs, MOVE, "is a weight that all units of an outer dimension share")
        return value_of(labels.narrow(last, 0, 1).expand(shape))
    if inputs is None:
        t.relations.block(labels, MOVE, "feeds a single input")
    else:
        t.relations.unify(along(labels, last), inputs)
    return _produced(t, outputs, -1, shape)


def _produced(t: Trace, outputs: torch.Tensor | None, dim: int, shape: Any) -> Value:
    if outputs is None:
        return FIXED
    t.relations.produced[int(outputs[0])] = None
    return Value(spread(outputs, dim, shape), zero=True)


def _biased(t: Trace, node: fx.Node, product: Value, bias: Any) -> Value:
    if not isinstance(bias, fx.Node):
        return product
    kept = t.get(bias)
    zero = product.zero and isinstance(kept, Weight)
    return t.join(shape_of(node), [(product, shape_of(node)), (kept, shape_of(bias))], zero)


def linear(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    weight = t.get(args["weight"])
    if not isinstance(weight, Weight):
        return t.refuse(node, "the weight of a linear layer is computed, not a parameter")
    outputs, inputs = weight.atoms
    product = _contract(t, t.carried(t.get(args["input"])), inputs, outputs, shape_of(node))
    return _biased(t, node, product, args["bias"])


def matmul(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    first, second = (("mat1", "mat2") if "mat1" in names else ("batch1", "batch2") if "batch1" in names
                     else ("self", "mat2") if "mat2" in names else ("self", "other"))  # fmt: skip
    added = args["self"] if first != "self" else None
    if added is not None and (args["beta"] != 1 or args["alpha"] != 1):
        return t.refuse(node, "a scaled addmm is not understood")
    a, b = t.get(args[first]), t.get(args[second])
    rank_a, rank_b = len(shape_of(args[first])), len(shape_of(args[second]))
    if rank_a < 2 or rank_b < 2:
        return t.refuse(node, "a product with a vector is not understood")
    shape = shape_of(node)
    if isinstance(b, Weight) and rank_b == 2:
        product = _contract(t, t.carried(a), b.atoms[0], b.atoms[1], shape)
    elif isinstance(a, Weight) and rank_a == 2:
        turned = t.carried(b)
        turned = Value(turned.labels.mT, zero=turned.zero) if turned.labels is not None else turned
        product = _contract(t, turned, a.atoms[1], a.atoms[0], (*shape[:-2], shape[-1], shape[-2]))
        product = Value(product.labels.mT, zero=product.zero) if product.labels is not None else product
    else:
        result = _batched(t, node, t.carried(a), t.carried(b), shape_of(args[first]), shape_of(args[second]))
        if not isinstance(result, Value):
            return result
        product = result
    return _biased(t, node, product, added)


def embedding(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    weight = t.get(args["weight"])
    if not isinstance(weight, Weight) or t.labels(args["indices"]) is not None:
        return t.refuse(node, "an embedding whose weight or indices are computed is not understood")
    t.relations.block(weight.atoms[0], MOVE, "rows of an embedding are named by the inputs")
    return _produced(t, weight.atoms[1], -1, shape_of(node))


# Convolutions


def conv(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    """`out, in/groups, *kernel`; a grouped one keeps equally many channels per group, a depthwise one loses groups."""
    weight, groups = t.get(args["weight"]), args["groups"]
    value, shape = t.carried(t.get(args["input"])), shape_of(node)
    if not isinstance(weight, Weight):
        return t.refuse(node, "the weight of a convolution is computed, not a parameter")
    for atoms in weight.atoms[2:]:
        if atoms is not None:
            t.relations.windows[int(atoms[0])] = None
            t.relations.block(atoms, MOVE, "is a position of a convolution's window")
    dim = len(shape) - (len(weight.shape) - 1)
    whole = None if value.labels is None else t.relations.carrier(value.labels)
    if whole is not None and varying(whole) not in ([], [dim]):
        return t.refuse(node, "is a convolution over units that are not its channels")
    labels = None if whole is None else along(whole, dim)
    transposed = "transpose" in opname(node)
    outputs, inputs = (weight.atoms[1], weight.atoms[0]) if transposed else (weight.atoms[0], weight.atoms[1])
    if transposed and groups != 1:
        return t.refuse(node, "a grouped transposed convolution is not understood")
    if groups == 1:
        _meet_inputs(t, labels, inputs)
    elif weight.shape[1] == 1:  # depthwise: channel g feeds the outputs g * m .. g * m + m - 1
        _depthwise(t, labels, outputs, groups)
    else:
        _grouped(t, labels, inputs, outputs, groups)
    return _biased_channels(t, args["bias"], _produced(t, outputs, dim, shape), dim)


def _meet_inputs(t: Trace, labels: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
    if labels is None:
        t.relations.block(inputs, MOVE, "reads a dimension that is fixed")
    elif inputs is None:
        t.relations.block(labels, MOVE, "feeds a single input")
    else:
        t.relations.unify(labels, inputs)


def _depthwise(t: Trace, labels: torch.Tensor | None, outputs: torch.Tensor | None, groups: int) -> None:
    if outputs is None:
        return
    if labels is None:
        t.relations.block(outputs, MOVE, "is a depthwise convolution over channels that are fixed")
        return
    rows = outputs.view(groups, -1)
    t.relations.unify(labels.view(groups, 1).expand(rows.shape), rows)


def _grouped(
    t: Trace, labels: torch.Tensor | None, inputs: torch.Tensor | None, outputs: torch.Tensor | None, groups: int
) -> None:
    """Index i of every group goes together, on both sides: the groups stay, and stay equal."""
    if outputs is not None:
        rows = outputs.view(groups, -1)
        t.relations.unify(rows[:1].expand(rows.shape), rows)
    if labels is None or inputs is None:
        _meet_inputs(t, labels, inputs)
        return
    t.relations.unify(labels.view(groups, -1), inputs.view(1, -1))


def _biased_channels(t: Trace, bias: Any, product: Value, dim: int) -> Value:
    if not isinstance(bias, fx.Node):
        return product
    labels = t.labels(bias)
    if labels is None:
        return Value(product.labels)
    if product.labels is None:
        t.relations.block(labels, MOVE, "is added to fixed channels")
        return product
    t.relations.unify(along(product.labels, dim), along(labels, 0))
    return product


# Products of activations


def _batched(t: Trace, node: fx.Node, a: Value, b: Value, a_shape: Any, b_shape: Any) -> Result:
    """`a @ b`, both computed. Units of batch dimensions (heads) take whole matrices with them."""
    shape = shape_of(node)
    batch = len(shape) - 2
    sides = [_aligned(v, s, len(shape)) for v, s in ((a, a_shape), (b, b_shape))]
    if any(labels is not None and min(varying(labels), default=batch) < batch for labels, _ in sides):
        return value_of(_heads(t, sides, shape[:-2]).expand(shape), a.zero or b.zero)
    left, right = sides[0][0], sides[1][0]
    if any(_varies(side, batch) and _varies(side, batch + 1) for side in (left, right)):
        return t.refuse(node, "a product whose factor is prunable in both dimensions")
    if _varies(left, batch + 1) or _varies(right, batch):
        _contracted(t, node, left, right, a.zero or b.zero)
    rows, columns = _varies(left, batch), _varies(right, batch + 1)
    if rows and columns:
        return t.refuse(node, "a product whose rows and columns are both prunable")
    if rows and left is not None:
        return value_of(left.narrow(-1, 0, 1).expand(shape), a.zero)
    if columns and right is not None:
        return value_of(right.narrow(-2, 0, 1).expand(shape), b.zero)
    return FIXED


def _varies(labels: torch.Tensor | None, dim: int) -> bool:
    return labels is not None and dim in varying(labels)


def _contracted(t: Trace, node: fx.Node, a: torch.Tensor | None, b: torch.Tensor | None, zero: bool) -> None:
    if a is None or b is None or not _varies(a, a.dim() - 1) or not _varies(b, b.dim() - 2):
        for labels in (a, b):
            t.relations.block(labels, MOVE, "is contracted with a tensor whose dimension is fixed")
        return
    t.relations.unify(along(a, -1), along(b, -2))
    if not zero:
        t.inexact(a, "a product of activations sums over these units, which are not 0 when pruned")


def _aligned(value: Value, shape: Any, rank: int) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    full = (1,) * (rank - len(shape)) + tuple(shape)
    return (None if value.labels is None else value.labels.reshape(full)), full


def _heads(t: Trace, sides: list[tuple[torch.Tensor | None, tuple[int, ...]]], batch: Any) -> torch.Tensor:
    """Unite the batch dimensions of several operands; whatever else varies goes with them. Labels (*batch, 1, 1)."""
    operands: list[tuple[Result, Any]] = []
    for labels, shape in sides:
        size = (*shape[:-2], 1, 1)
        if labels is None:
            operands.append((FIXED, size))
            continue
        labels = t.relations.collapse(labels, [d for d in varying(labels) if d >= len(batch)])
        operands.append((Value(labels.narrow(-1, 0, 1).narrow(-2, 0, 1)), size))
    joined = t.join((*batch, 1, 1), operands)
    if joined.labels is None:
        return torch.zeros((*batch, 1, 1), dtype=torch.long)
    t.heads.append(joined.labels)
    return joined.labels


def attention(t: Trace, node: fx.Node, args: dict[str, Any]) -> Result:
    """Scaled dot-product attention; with `enable_gqa` each key and value head serves a run of query heads."""
    shape, rank = shape_of(node), len(shape_of(node))
    values = {k: t.carried(t.get(args[k])) for k in ("query", "key", "value")}
    sides = {k: _aligned(v, shape_of(args[k]), rank) for k, v in values.items()}
    if args.get("enable_gqa"):
        for key in ("key", "value"):
            labels, own = sides[key]
            repeats = shape[-3] // own[-3]
            full = (*own[:-3], shape[-3], *own[-2:])
            sides[key] = (None if labels is None else labels.repeat_interleave(repeats, -3), full)
    mask = args.get("attn_mask")
    batch = rank - 2
    if not any(labels is not None and min(varying(labels), default=batch) < batch for labels, _ in sides.values()):
        return _single_head(t, node, values, args)
    labels = _heads(t, list(sides.values()), shape[:-2])
    if isinstance(mask, fx.Node):
        value, own = t.get(mask), shape_of(mask)
        own = (1,) * (rank - len(own)) + own
        known = t.carried(value)
        kept = None if known.labels is None else known.labels.reshape(own)
        labels = _heads(t, [(labels, (*shape[:-2], 1, 1)), (kept, own)], shape[:-2])
    if owner(node)[1] == "MultiheadAttention":
        t.inexact(labels, "nn.MultiheadAttention derives its head width from its embedding, so that heads cannot go")
    return value_of(labels.expand(shape), values["value"].zero)


def _single_head(t: Trace, node: fx.Node, values: dict[str, Value], args: dict[str, Any]) -> Result:
    """One head: keys meet queries over the width; the values' width passes through."""
    query, key, value = (values[k].labels for k in ("query", "key", "value"))
    if t.labels(args.get("attn_mask")) is not None or _varies(value, len(shape_of(node)) - 2):
        return t.refuse(node)
    last = len(shape_of(node)) - 1
    if _varies(query, last) and _varies(key, last) and query is not None and key is not None:
        t.relations.unify(along(query, -1), along(key, -1))
        zero = values["query"].zero or values["key"].zero
        if args.get("scale") is None or not zero:
            t.inexact(query, "attention divides by the root of the width of its one head")
    else:
        for labels in (query, key):
            t.relations.block(labels, MOVE, "meets a query or key whose dimension is fixed")
    return FIXED if value is None else value_of(along(value, -1).expand(shape_of(node)), values["value"].zero)


PRODUCTS: dict[str, Rule] = {
    "aten::linear": linear,
    "aten::embedding": embedding,
    "aten::scaled_dot_product_attention": attention,
    **{f"aten::{name}": matmul for name in ("mm", "addmm", "bmm", "baddbmm", "matmul")},
    **{f"aten::conv{n}d": conv for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": conv for n in (1, 2, 3)},
}
