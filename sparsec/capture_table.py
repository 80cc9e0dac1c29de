"""Rung 2: symbolic_trace, and one table that turns modules and functions with weights into ATen calls.

Each rule is an ordinary function over the arguments of the module, function or method it replaces; it is traced into
the graph. A rule that answers NotImplemented leaves its node as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

aten = torch.ops.aten

Rule = Callable[..., Any]
Const = Callable[[str], Any]


def _list(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value] * count


# Modules: rule(module, constant, *inputs), where constant(name) reads a parameter or buffer of the module.


def _linear(m: nn.Linear, c: Const, x: Any) -> Any:
    return aten.linear.default(x, c("weight"), c("bias"))


def _conv(m: Any, c: Const, x: Any) -> Any:
    count = len(m.kernel_size)
    padding = m.padding
    if m.padding_mode != "zeros":
        mode = m.padding_mode
        x = aten.pad.default(x, list(m._reversed_padding_repeated_twice), mode)
        padding = 0
    return _call_conv(count, x, c("weight"), c("bias"), m.stride, padding, m.dilation, m.groups)


def _call_conv(
    count: int, x: Any, w: Any, b: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    op = (aten.conv1d, aten.conv2d, aten.conv3d)[count - 1]
    stride, dilation = _list(stride, count), _list(dilation, count)
    if isinstance(padding, str):
        return op.padding(x, w, b, stride, padding, dilation, groups)
    return op.default(x, w, b, stride, _list(padding, count), dilation, groups)


def _batch_norm(m: Any, c: Const, x: Any) -> Any:
    if m.training or m.running_mean is None:
        return NotImplemented
    op = aten._native_batch_norm_legit_no_training.default
    momentum = 0.1 if m.momentum is None else m.momentum
    return op(x, c("weight"), c("bias"), c("running_mean"), c("running_var"), momentum, m.eps)[0]


def _layer_norm(m: nn.LayerNorm, c: Const, x: Any) -> Any:
    return aten.layer_norm.default(x, list(m.normalized_shape), c("weight"), c("bias"), m.eps)


def _embedding(m: nn.Embedding, c: Const, x: Any) -> Any:
    if m.max_norm is not None:
        raise RuntimeError("an embedding with max_norm writes its weight on every call; no graph can hold that")
    return aten.embedding.default(c("weight"), x, -1 if m.padding_idx is None else m.padding_idx)


def _dropout(m: Any, c: Const, x: Any) -> Any:
    return NotImplemented if m.training and m.p > 0 else x


def _plain(op: Any) -> Rule:
    return lambda m, c, x: op(x)


MODULES: dict[type, Rule] = {
    nn.Linear: _linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.Dropout3d: _dropout,
    nn.AlphaDropout: _dropout,
    nn.Identity: lambda m, c, x, *rest, **named: x,
    nn.ReLU: _plain(aten.relu.default),
    nn.ReLU6: lambda m, c, x: aten.hardtanh.default(x, 0.0, 6.0),
    nn.Hardtanh: lambda m, c, x: aten.hardtanh.default(x, m.min_val, m.max_val),
    nn.GELU: lambda m, c, x: aten.gelu.default(x, approximate=m.approximate),
    nn.SiLU: _plain(aten.silu.default),
    nn.Tanh: _plain(aten.tanh.default),
    nn.Sigmoid: _plain(aten.sigmoid.default),
    nn.Hardswish: _plain(aten.hardswish.default),
    nn.Flatten: lambda m, c, x: aten.flatten.using_ints(x, m.start_dim, m.end_dim),
}

# Functions and methods: rule(*args, **kwargs) with the signature of what it replaces.


def _f_embedding(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **named: Any
) -> Any:
    if max_norm is not None or rest or any(named.values()):
        return NotImplemented
    return aten.embedding.default(weight, input, -1 if padding_idx is None else padding_idx)


def _f_layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return aten.layer_norm.default(input, normalized_shape, weight, bias, eps)


def _f_batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: Any = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if training or running_mean is None:
        return NotImplemented
    op = aten._native_batch_norm_legit_no_training.default
    return op(input, weight, bias, running_mean, running_var, momentum, eps)[0]


def _f_dropout(input: Any, p: float = 0.5, training: Any = True, inplace: bool = False) -> Any:
    return NotImplemented if training else input


def _f_gelu(input: Any, *, approximate: str = "none") -> Any:
    return aten.gelu.default(input, approximate=approximate)


def _f_hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return aten.hardtanh.default(input, min_val, max_val)


def _f_conv(count: int) -> Rule:
    def conv(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        return _call_conv(count, input, weight, bias, stride, padding, dilation, groups)

    return conv


def _f_einsum(equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str):
        return NotImplemented
    flat = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    return aten.einsum.default(equation, list(flat))


def _f_addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return aten.addmm.default(input, mat1, mat2, beta=beta, alpha=alpha)


def _unary(op: Any) -> Rule:
    return lambda input, inplace=False: op(input)


def _f_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return aten.linear.default(input, weight, bias)


def _f_matmul(input: Any, other: Any) -> Any:
    return aten.matmul.default(input, other)


def _f_mm(input: Any, mat2: Any) -> Any:
    return aten.mm.default(input, mat2)


def _f_bmm(input: Any, mat2: Any) -> Any:
    return aten.bmm.default(input, mat2)


_RELU, _TANH, _SIGMOID = _unary(aten.relu.default), _unary(aten.tanh.default), _unary(aten.sigmoid.default)

FUNCTIONS: dict[Any, Rule] = {
    F.linear: _f_linear,
    torch.conv1d: _f_conv(1),
    torch.conv2d: _f_conv(2),
    torch.conv3d: _f_conv(3),
    F.conv1d: _f_conv(1),
    F.conv2d: _f_conv(2),
    F.conv3d: _f_conv(3),
    F.embedding: _f_embedding,
    F.layer_norm: _f_layer_norm,
    F.batch_norm: _f_batch_norm,
    F.dropout: _f_dropout,
    torch.matmul: _f_matmul,
    operator.matmul: _f_matmul,
    torch.mm: _f_mm,
    torch.bmm: _f_bmm,
    torch.addmm: _f_addmm,
    torch.einsum: _f_einsum,
    torch.functional.einsum: _f_einsum,
    F.relu: _RELU,
    torch.relu: _RELU,
    F.relu6: lambda input, inplace=False: aten.hardtanh.default(input, 0.0, 6.0),
    F.hardtanh: _f_hardtanh,
    F.gelu: _f_gelu,
    F.silu: _unary(aten.silu.default),
    F.hardswish: _unary(aten.hardswish.default),
    torch.tanh: _TANH,
    F.tanh: _TANH,
    torch.sigmoid: _SIGMOID,
    F.sigmoid: _SIGMOID,
}

METHODS: dict[str, Rule] = {
    "matmul": _f_matmul,
    "__matmul__": _f_matmul,
    "mm": _f_mm,
    "bmm": _f_bmm,
    "addmm": _f_addmm,
    "relu": _RELU,
    "tanh": _TANH,
    "sigmoid": _SIGMOID,
}

IN_PLACE: dict[Any, Rule] = {
    torch.relu_: _RELU,
    F.relu_: _RELU,
    "relu_": _RELU,
    "tanh_": _TANH,
    "sigmoid_": _SIGMOID,
    "add_": lambda x, other, alpha=1: aten.add.Tensor(x, other, alpha=alpha),
    "sub_": lambda x, other, alpha=1: aten.sub.Tensor(x, other, alpha=alpha),
    "mul_": lambda x, other: aten.mul.Tensor(x, other),
    "div_": lambda x, other: aten.div.Tensor(x, other),
    operator.iadd: lambda x, other: aten.add.Tensor(x, other),
    operator.isub: lambda x, other: aten.sub.Tensor(x, other),
    operator.imul: lambda x, other: aten.mul.Tensor(x, other),
    operator.itruediv: lambda x, other: aten.div.Tensor(x, other),
}
"""Calls that write their first argument; `trace.to_aten` proves that nothing else sees the write, or refuses."""

ARITHMETIC: dict[Any, Any] = {
    operator.add: aten.add.Tensor,
    torch.add: aten.add.Tensor,
    "add": aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    torch.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    torch.mul: aten.mul.Tensor,
    "mul": aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    torch.div: aten.div.Tensor,
}
"""Python's operators on what is surely a tensor; a size plus a number stays what it is."""


def rule_of(node: fx.Node, root: nn.Module) -> Rule | None:
    """The rule for a node of a traced graph, if the table has one."""
    if node.op == "call_module":
        return MODULES.get(type(root.get_submodule(str(node.target))))
    if node.op == "call_method":
        return METHODS.get(str(node.target)) or IN_PLACE.get(str(node.target))
    if node.op == "call_function":
        target: Any = node.target
        return FUNCTIONS.get(target) or IN_PLACE.get(target)
    return None


def writes_input(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node changes its first argument in place."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        inplace = node.kwargs.get("inplace", False)
        return node.target in IN_PLACE or inplace is True or _positional_inplace(node)
    return False


def _positional_inplace(node: fx.Node) -> bool:
    known: dict[Any, int] = {F.relu: 1, F.relu6: 1, F.silu: 1, F.hardswish: 1, F.hardtanh: 3, F.dropout: 3}
    where = known.get(node.target)
    return where is not None and len(node.args) > where and node.args[where] is True
