"""annotate: find every site, measure its weight, and say early why some of them must stay dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsec import codes
from sparsec.aten import WEIGHT_OPS, arguments, opname
from sparsec.codegen.kernel import DTYPES
from sparsec.driver import Context, Pass
from sparsec.formats import VALUE_DTYPES
from sparsec.graph import KEY, Fact, Structure, constants, fact, get_constant, mutated, owner, site_names, sites
from sparsec.report import Row
from sparsec.spec import Spec
from sparsec.structure import measure

_OPS = ("linear", "conv1d", "conv2d", "conv3d", "embedding")  # every other weight op is a "matmul" or a "bmm"
_WHOLE = (
    *("gru", "lstm", "rnn_tanh", "rnn_relu", "bilinear", "embedding_bag"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
)  # ATen calls that hold weights in a way no pass rewrites
KERNEL_OPS = ("linear", "conv1d", "conv2d", "conv3d")
"""Ops that have sparse kernels; sites of the others stay dense."""


class Annotate(Pass):
    """linear(x, w) --> linear(x, w) with a Fact: site, shapes, nonzeros, structures, and a refusal if there is one.

    Raises SpecError when a pattern of the spec matches no site of the model. In a region that is left to the caller,
    who sees all regions (`check_spec`).
    """

    name = "annotate"
    requires = ("normalised",)
    ensures = ("annotated",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        found = _weight_nodes(gm)
        names = _names(found)
        measured: dict[Any, tuple[int, tuple[Structure, ...]]] = {}
        count = 0
        for node, weight in found.items():
            old = fact(node)
            name = str(weight.target) if weight is not None else ""
            if old is not None and old.weight == name and old.bias == _bias_name(node):
                continue
            new = _fact(gm, node, weight, names[node], measured)
            node.meta[KEY] = new if old is None else _merge(old, new)
            count += 1
        if ctx.report is not None:
            for module in opaque_modules(gm):
                ctx.report.put(module.row())
        if ctx.spec is not None and "region" not in gm.meta.get(KEY, {}):
            check_spec(ctx.spec, [gm])
        return count


@dataclass(frozen=True)
class Opaque:
    """Something with weights that is no site, a module or an ATen call that stays whole: it stays dense."""

    path: str
    kind: str  # module type
    op: str
    nbytes: int
    code: str
    reason: str

    def row(self) -> Row:
        return Row(site=self.path, op=self.op, nbytes=self.nbytes, dense_nbytes=self.nbytes, code=self.code,
                   reason=self.reason, error=0.0)  # fmt: skip


def opaque_modules(gm: fx.GraphModule) -> list[Opaque]:
    """What has weights and stays whole: recurrent layers, attention and quantised modules, transposed convolutions."""
    found: dict[str, Opaque] = {}
    for node in gm.graph.nodes:
        if _short(node) in _WHOLE:
            weights = [n for n in node.all_input_nodes if n.op == "get_attr"]
            size = sum(_nbytes(get_constant(gm, str(n.target))) for n in weights)
            path, kind = owner(node)[0] or "<root>", owner(node)[1]
            reason = codes.sentence(codes.NO_KERNEL, op=_short(node))
            if weights:
                found.setdefault(path, Opaque(path, kind, _short(node), size, codes.NO_KERNEL, reason))
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        tensors = list(module.parameters()) + list(module.buffers())
        packed = _quantised(module)
        if not packed and not any(p.dim() > 1 for p in module.parameters()):
            continue
        path, kind = owner(node)[0] or str(node.target), type(module).__name__
        code = codes.QUANTISED if packed else codes.NO_KERNEL
        reason = codes.sentence(code, **({"detail": kind} if packed else {"op": kind}))
        found[path] = Opaque(path, kind, "module", sum(_nbytes(t) for t in tensors), code, reason)
    return list(found.values())


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_spec(spec: Spec, graphs: Iterable[fx.GraphModule], others: Iterable[str] = ()) -> None:
    """Raise SpecError for the first pattern of `spec` that matches no site of any of the annotated graphs.

    `others` are modules that were not captured: naming one is no mistake.
    """
    names: list[str] = list(others)
    types: list[str] = [""] * len(names)
    for gm in graphs:
        for _, known in sites(gm):
            names.append(known.site)
            types.append(known.module)
        for module in opaque_modules(gm):
            names.append(module.path)
            types.append(module.kind)
    spec.check(names, types)


def _weight_nodes(gm: fx.GraphModule) -> dict[fx.Node, fx.Node | None]:
    """Site node -> its weight's get_attr, or None where the weight is computed at run time.

    A product is a site only if an operand is a constant of the state dict: attention multiplies two activations, and
    rotary embeddings multiply by a table.
    """
    written = mutated(gm)
    table = constants(gm)
    found: dict[fx.Node, fx.Node | None] = {}
    for node in gm.graph.nodes:
        kind = WEIGHT_OPS.get(opname(node))
        if kind is None:
            continue
        bound = arguments(node)
        operands = [bound[name] for name in reversed(kind.weights)]
        flat = [v for o in operands for v in (reversed(o) if isinstance(o, list | tuple) else (o,))]
        known = [v for v in flat if isinstance(v, fx.Node) and v.op == "get_attr" and v.target not in written]
        if _short(node) in _OPS:
            found[node] = known[0] if known else None
            continue
        known = [v for v in known if str(v.target) not in table or table[str(v.target)].sources]
        known = [v for v in known if get_constant(gm, str(v.target)).dim() > 1]
        if known:
            found[node] = known[0]
    return found


def _names(found: dict[fx.Node, fx.Node | None]) -> dict[fx.Node, str]:
    """Site names; nodes that carry a fact keep theirs, and nothing is named twice."""
    kept = {node: known.site for node in found if (known := fact(node)) is not None}
    taken = set(kept.values())
    names = dict(kept)
    for node, name in site_names(found).items():
        if node in kept:
            continue
        base, ordinal = owner(node)[0] or "<root>", 1
        while name in taken:
            ordinal += 1
            name = f"{base}#{ordinal}"
        taken.add(name)
        names[node] = name
    return names


def _fact(
    gm: fx.GraphModule,
    node: fx.Node,
    weight: fx.Node | None,
    site: str,
    measured: dict[Any, tuple[int, tuple[Structure, ...]]],
) -> Fact:
    bound = arguments(node)
    op = _op(gm, node, weight)
    kind = WEIGHT_OPS[opname(node)]
    bias = bound.get(kind.bias) if kind.bias else None
    constant_bias = isinstance(bias, fx.Node) and bias.op == "get_attr"
    bias_name = _bias_name(node)
    base = Fact(site=site, op=op, module=owner(node)[1], weight="", bias=bias_name, shape=(0, 0), dtype="float32")
    if weight is None:
        return _computed(base, bound["weight"])
    tensor = get_constant(gm, str(weight.target)).detach()
    transposed = _short(node) in ("addmm", "mm", "matmul") and weight is bound.get("mat2", bound.get("other"))
    refusal = _refusal(op, tensor)
    if refusal is None and isinstance(bias, fx.Node) and not constant_bias:
        refusal = codes.NOT_CONSTANT, codes.sentence(codes.NOT_CONSTANT, detail=f"the bias comes from {bias.name!r}")
    key = (str(weight.target), op, transposed)
    if key not in measured:
        measured[key] = _measure(op, tensor, transposed)
    nnz, structures = measured[key]
    return Fact(
        site=site, op=op, module=base.module, weight=str(weight.target), bias=base.bias, shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."), nnz=nnz, structures=structures, refusal=refusal,
    )  # fmt: skip


def _op(gm: fx.GraphModule, node: fx.Node, weight: fx.Node | None) -> str:
    """linear, a convolution, embedding; "bmm" for x[b] W[b] with a constant (batch, in, out), "matmul" for others."""
    short = _short(node)
    if short in _OPS:
        return short
    x = node.args[0] if short in ("bmm", "matmul") and len(node.args) == 2 and node.args[1] is weight else None
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if weight is None or not isinstance(value, torch.Tensor) or value.dim() != 3:
        return "matmul"
    shape = tuple(get_constant(gm, str(weight.target)).shape)
    return "bmm" if len(shape) == 3 and value.shape[0] == shape[0] else "matmul"


def _computed(base: Fact, source: Any) -> Fact:
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    shape, dtype = base.shape, base.dtype
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if all(isinstance(s, int) for s in value.shape) and value.dim():
            shape = tuple(value.shape)
    detail = f"it comes from {source.name!r}" if isinstance(source, fx.Node) else "it is no tensor of the model"
    reason = codes.sentence(codes.NOT_CONSTANT, detail=detail)
    return Fact(site=base.site, op=base.op, module=base.module, weight="", bias=base.bias, shape=shape, dtype=dtype,
                refusal=(codes.NOT_CONSTANT, reason))  # fmt: skip


def _refusal(op: str, tensor: torch.Tensor) -> tuple[str, str] | None:
    """(code, sentence) when a site with this weight must stay dense, whatever the spec says."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized:
        return codes.QUANTISED, codes.sentence(codes.QUANTISED, detail=dtype)
    if tensor.is_complex():
        return codes.COMPLEX, codes.sentence(codes.COMPLEX, dtype=dtype)
    if tensor.layout is not torch.strided or dtype not in DTYPES:
        shown = dtype if tensor.layout is torch.strided else f"{dtype} in layout {tensor.layout}"
        return codes.DTYPE, codes.sentence(codes.DTYPE, dtype=shown, known=", ".join(DTYPES))
    if tensor.device.type not in ("cpu", "cuda"):
        return codes.DEVICE, codes.sentence(codes.DEVICE, device=tensor.device)
    if op not in KERNEL_OPS:
        return codes.NO_KERNEL, codes.sentence(codes.NO_KERNEL, op=op)
    return None


def _measure(op: str, tensor: torch.Tensor, transposed: bool) -> tuple[int, tuple[Structure, ...]]:
    """Nonzeros and structures of the (out, in) matrix; nonzeros alone for dtypes that no format stores."""
    if tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_meta:
        return -1, ()
    if tensor.dtype not in VALUE_DTYPES or 0 in tensor.shape:
        return int(torch.count_nonzero(tensor.float() if tensor.is_floating_point() else tensor)), ()
    kernel = tensor[0, 0].numel() if op.startswith("conv") else 1
    matrix = tensor.transpose(-1, -2) if transposed and tensor.dim() == 2 else tensor
    return measure(matrix.reshape(matrix.shape[0], -1), kernel)


def _bias_name(node: fx.Node) -> str | None:
    """The root attribute that is the bias of a weight op; None for none and for one that is computed."""
    kind = WEIGHT_OPS[opname(node)]
    bias = arguments(node).get(kind.bias) if kind.bias else None
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _merge(old: Fact, new: Fact) -> Fact:
    """What the weight says anew, with what other passes have added to the site."""
    return dataclasses.replace(old, weight=new.weight, bias=new.bias, shape=new.shape, dtype=new.dtype, nnz=new.nnz,
                               structures=new.structures, refusal=new.refusal)  # fmt: skip


def _short(node: fx.Node) -> str:
    return opname(node).removeprefix("aten::")


def _quantised(module: nn.Module) -> bool:
    return any(".quantized" in type(m).__module__ for m in module.modules())
