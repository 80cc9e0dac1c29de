"""fold: batch norm and constant offsets into the weights before them. The order of rounding changes, nothing else."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsec.aten import arguments, opname, set_argument
from sparsec.driver import Context, Pass
from sparsec.graph import constant_nodes, fold_constants, get_constant, move_to_front, trace_into

aten = torch.ops.aten


class Fold(Pass):
    """`batch_norm(conv(x, W, b)) --> conv(x, W * s, (b - mean) * s + beta)`, `linear(x, W) + b --> linear(x, W, b)`.

    With s = gamma / sqrt(var + eps), computed in float64 and rounded once. It is written as ATen calls on the
    constants, so that the recipe of the new weight replays when other weights are loaded. Zeros stay zeros. Statistics
    of a training capture are no constants, so there it does nothing.
    """

    name = "fold"
    requires = ("normalised",)
    ensures = ("folded",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.options.training:
            return 0
        known = constant_nodes(gm)
        changes = 0
        for node in list(gm.graph.nodes):
            norm = _norm(gm, node, known)
            if norm is not None:
                _fold_norm(gm, norm)
                changes += 1
            elif _fold_offset(gm, node, known):
                changes += 1
        fold_constants(gm)
        return changes


_CARRIERS = {"aten::conv1d": 3, "aten::conv2d": 4, "aten::conv3d": 5, "aten::linear": 2}
"""Op -> rank its output must have for channels to be dimension 1."""

_NORMS = ("aten::batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::native_batch_norm")
_OPERANDS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class _Norm:
    node: fx.Node
    output: tuple[fx.Node, ...]  # the nodes that are the normalised tensor
    carrier: fx.Node  # the weight op it is folded into
    operands: dict[str, fx.Node | None]
    eps: float


def _norm(gm: fx.GraphModule, node: fx.Node, known: dict[fx.Node, None]) -> _Norm | None:
    """What to fold when `node` is a batch norm in eval mode behind a weight op that nobody else reads."""
    if opname(node) not in _NORMS:
        return None
    bound = arguments(node)
    if bound.get("training", False):
        return None
    output: tuple[fx.Node, ...] = (node,)
    if opname(node) != "aten::batch_norm":  # gives (y, mean, rstd)
        output = tuple(node.users)
        if any(u.target is not operator.getitem or u.args[1] != 0 for u in output):
            return None
    carrier = bound["input"]
    operands = {name: bound[name] for name in _OPERANDS}
    if operands["running_mean"] is None or operands["running_var"] is None:
        return None
    if any(n is not None and (n not in known or n.op != "get_attr") for n in operands.values()):
        return None
    if not _carries(carrier, known) or not _finite_scale(gm, operands, bound["eps"]):
        return None
    return _Norm(node, output, carrier, operands, bound["eps"])


def _carries(carrier: Any, known: dict[fx.Node, None]) -> bool:
    """Whether a node is a weight op with constants of its own, one reader, and channels in dimension 1."""
    if not isinstance(carrier, fx.Node) or opname(carrier) not in _CARRIERS or len(carrier.users) != 1:
        return False
    bound = arguments(carrier)
    weight, bias = bound["weight"], bound["bias"]
    if weight not in known or weight.op != "get_attr" or len(weight.users) != 1:
        return False
    if bias is not None and bias not in known:
        return False
    value = carrier.meta.get("val")
    if value is None:  # an unbatched linear is possible, an unbatched convolution before a norm is not
        return opname(carrier) != "aten::linear"
    return bool(value.dim() == _CARRIERS[opname(carrier)]) and value.dtype.is_floating_point


def _finite_scale(gm: fx.GraphModule, operands: dict[str, fx.Node | None], eps: float) -> bool:
    """Zero times an infinite scale would turn pruned positions into NaN."""
    read = {
        k: get_constant(gm, str(n.target)).double() for k, n in operands.items() if n is not None and n.op == "get_attr"
    }
    if "running_var" not in read:
        return False
    scale = (read["running_var"] + eps).rsqrt() * read.get("weight", torch.ones((), dtype=torch.float64))
    return bool(torch.isfinite(scale).all())


def _fold_norm(gm: fx.GraphModule, norm: _Norm) -> None:
    bound = arguments(norm.carrier)
    weight, bias = bound["weight"], bound["bias"]
    gamma, beta = norm.operands["weight"], norm.operands["bias"]
    mean, var = norm.operands["running_mean"], norm.operands["running_var"]
    dtype = get_constant(gm, str(weight.target)).dtype
    rank = get_constant(gm, str(weight.target)).dim()
    for operand in (gamma, beta, mean, var):
        move_to_front(operand)  # statistics may be read behind the carrier
    scale = trace_into(norm.carrier, _scale, var, gamma, norm.eps)
    set_argument(norm.carrier, "weight", trace_into(norm.carrier, _scaled, weight, scale, rank, dtype))
    set_argument(norm.carrier, "bias", trace_into(norm.carrier, _shifted, bias, mean, scale, beta, dtype))
    for out in norm.output:
        out.replace_all_uses_with(norm.carrier)
    if norm.output != (norm.node,):
        for out in norm.output:
            gm.graph.erase_node(out)
    gm.graph.erase_node(norm.node)


def _wide(x: Any) -> Any:
    return aten._to_copy.default(x, dtype=torch.float64)


def _scale(var: Any, gamma: Any, eps: float) -> Any:
    scale = aten.rsqrt.default(aten.add.Tensor(_wide(var), eps))
    return scale if gamma is None else aten.mul.Tensor(scale, _wide(gamma))


def _scaled(weight: Any, scale: Any, rank: int, dtype: torch.dtype) -> Any:
    scale = aten.view.default(scale, [-1] + [1] * (rank - 1))
    return aten._to_copy.default(aten.mul.Tensor(_wide(weight), scale), dtype=dtype)


def _shifted(bias: Any, mean: Any, scale: Any, beta: Any, dtype: torch.dtype) -> Any:
    centred = aten.neg.default(_wide(mean)) if bias is None else aten.sub.Tensor(_wide(bias), _wide(mean))
    shifted = aten.mul.Tensor(centred, scale)
    return aten._to_copy.default(shifted if beta is None else aten.add.Tensor(shifted, _wide(beta)), dtype=dtype)


def _fold_offset(gm: fx.GraphModule, node: fx.Node, known: dict[fx.Node, None]) -> bool:
    """`add(linear(x, W), b) --> linear(x, W, b)` for a constant vector b of the output's length."""
    if opname(node) != "aten::add" or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return False
    for carrier, offset in (node.args, node.args[::-1]):
        if not isinstance(carrier, fx.Node) or not isinstance(offset, fx.Node) or offset.op != "get_attr":
            continue
        if opname(carrier) != "aten::linear" or len(carrier.users) != 1 or offset not in known:
            continue
        weight = arguments(carrier)["weight"]
        if arguments(carrier)["bias"] is not None or weight.op != "get_attr":
            continue
        wide, vector = get_constant(gm, str(weight.target)), get_constant(gm, str(offset.target))
        if vector.shape == wide.shape[:1] and vector.dtype == wide.dtype:
            move_to_front(offset)
            carrier.args = (*carrier.args[:2], offset)
            node.replace_all_uses_with(carrier)
            gm.graph.erase_node(node)
            return True
    return False
