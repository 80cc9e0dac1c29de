"""Packed weights and kernels of a saved model: checked against each other, and fitted to the machine that loads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sparsec.codegen import build, catalog, render
from sparsec.codegen.kernel import KernelSpec, Problem
from sparsec.errors import DeviceError, FormatError, LoadError, SpecError
from sparsec.factors.stored import Stored, parse_stored
from sparsec.formats import Format, parse
from sparsec.install import Installed
from sparsec.recipes import Constant
from sparsec.save_graph import decode_constant, encode_constant
from sparsec.save_values import integer, sequence, table, text, torch_value
from sparsec.target import Target

_SIZE = 2**31 - 1
_BUCKETS = ("sparsec::linear_buckets", "sparsec::conv_buckets")
_PREPACKED = "sparsec::linear_prepacked"
_POOL = "sparsec::max_pool"


def encode_installed(record: Installed, literal: Callable[[torch.Tensor], str]) -> dict[str, Any]:
    """The JSON form of one packed weight."""
    return {
        "format": record.format.text(), "shape": list(record.shape), "dtype": str(record.dtype).removeprefix("torch."),
        "buffers": list(record.buffers), "origin": encode_constant(record.origin, literal),
        "kernels": [list(pair) for pair in record.kernels],
    }  # fmt: skip


def decode_installed(
    data: Any, root: Mapping[str, torch.Tensor], literal: Callable[[Any], torch.Tensor], fitted: dict[str, KernelSpec]
) -> Installed:
    """The inverse of `encode_installed`. Buffers are validated, and `fitted` learns which kernel each text becomes."""
    table(data, "installed", ("format", "shape", "dtype", "buffers", "origin", "kernels"))
    shape = tuple(integer(s, "shape", high=_SIZE) for s in sequence(data["shape"], "shape"))
    if not 2 <= len(shape) <= 5 or max(shape[0], math.prod(shape[1:])) > _SIZE:
        raise LoadError(f"installed: {shape} is no shape of a weight")
    dtype = torch_value("dtype", data["dtype"])
    fmt = _format(data["format"], shape[0], math.prod(shape[1:]))
    names = tuple(text(n, "buffer", 1000) for n in sequence(data["buffers"], "buffers"))
    if len(names) != len(fmt.buffers) or not all(n in root for n in names) or len(set(names)) != len(names):
        raise LoadError(f"installed: {list(names)!r:.100} are not the buffers {', '.join(fmt.buffers)} of {fmt.name}")
    kernels = []
    for pair in sequence(data["kernels"], "kernels"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise LoadError("installed: kernels are pairs of a site and a KernelSpec text")
        site, old = text(pair[0], "site", 10_000), text(pair[1], "kernel", 10_000)
        fitted[old] = fit(old, fmt, shape, dtype)
        kernels.append((site, fitted[old].text()))
    if not kernels:
        raise LoadError("installed: a packed weight that no kernel reads")
    origin: Constant = decode_constant(data["origin"], literal)
    record = Installed(fmt, shape, dtype, names, origin, tuple(kernels))
    _validate(record, root)
    return record


def _format(data: Any, rows: int, cols: int) -> Format:
    try:
        written = text(data, "format", 1000)
        fmt: Format = parse_stored(written) or parse(written)
        if fmt.resolve(rows, cols) != fmt:
            raise LoadError(f"format {data!r:.100} has open fields")
    except (SpecError, ArithmeticError) as error:
        raise LoadError(f"installed: {error}") from error
    return fmt


def _validate(record: Installed, root: Mapping[str, torch.Tensor]) -> None:
    buffers = {key: root[name] for key, name in zip(record.format.buffers, record.buffers, strict=True)}
    site = record.kernels[0][0]
    if buffers[record.format.buffers[0]].dtype != record.dtype:
        raise LoadError(f"site {site!r}: its values are not {record.dtype}")
    try:
        record.format.validate(buffers, *record.matrix)
    except (FormatError, SpecError) as error:
        raise LoadError(f"site {site!r}: {error}") from error
    except (ArithmeticError, ValueError, IndexError, MemoryError, RuntimeError) as error:  # sizes beyond any buffer
        raise LoadError(f"site {site!r}: {type(error).__name__}: {error!s:.200}") from error


def fit(source: str, fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> KernelSpec:
    """The kernel of a text, for the weight it is used on and for this machine; LoadError unless all of it agrees.

    A kernel for an instruction set that this machine lacks becomes one for the best set that machine and variant have:
    storage does not depend on it.
    """
    try:
        spec = KernelSpec.parse(source)
        render.check(spec)
        variant = catalog.variant(spec.variant)
    except (SpecError, OverflowError, RecursionError) as error:
        raise LoadError(f"kernel: {error!s:.300}") from error
    features = fmt.features if isinstance(fmt, Stored) else (shape[0], math.prod(shape[1:]))
    wanted = (fmt.text(), *features, str(dtype).removeprefix("torch."), variant.op)
    given = (spec.format, spec.out_features, spec.in_features, spec.dtype, spec.op)
    if spec.text() != source or given != wanted:
        raise LoadError(f"kernel {source[:120]!r} does not fit its weight: {wanted} expected")
    if spec.fields != catalog.fields_of(fmt):
        raise LoadError(f"kernel {source[:120]!r}: its fields are not those of {fmt.text()}")
    if (spec.op == "conv") != (spec.conv is not None) or (spec.conv is not None and spec.conv.kernel != shape[2:]):
        raise LoadError(f"kernel {source[:120]!r}: its geometry is not that of a {shape} weight")
    numbers = [n for _, n in spec.tile] + [n for line in spec.plan for n in (line[0], line[2])]
    if not all(0 <= n <= _SIZE for n in numbers) or len(spec.plan) > 64 or len(spec.epilogue) > 64:
        raise LoadError(f"kernel {source[:120]!r}: its plan or tile is out of range")
    target = _target(spec)
    problem = Problem(
        op=spec.op, out_features=spec.out_features, in_features=spec.in_features, dtype=spec.dtype, nnz=0,
        bias=spec.bias, epilogue=spec.epilogue, conv=spec.conv,
    )  # fmt: skip
    reason = variant.refuse(problem, fmt, target)
    if reason:
        raise LoadError(f"kernel {spec.variant}: {reason}")
    if spec.isa in target.isas and spec.isa in variant.isas:
        return spec
    return dataclasses.replace(spec, isa=variant.isa(target) or spec.isa)


def _target(spec: KernelSpec) -> Target:
    if spec.device != "cuda":
        here = Target.probe()
        return here if catalog.variant(spec.variant).serves(here) else dataclasses.replace(here, kind="tvm")
    target = Target.parse("cuda")
    if not target.isas:
        raise DeviceError("the model was saved for CUDA, and this process sees no CUDA device; compile it for the CPU")
    return target


def bind(graph: fx.Graph, installed: Sequence[Installed], fitted: Mapping[str, KernelSpec]) -> None:
    """Tie every sparsec call of a graph to the validated weight it reads, and give it the fitted kernel.

    A kernel follows indices without looking: a call whose buffers, kernel and weight do not belong together is refused,
    and so is whatever writes a packed buffer.
    """
    packed = {record.buffers: record for record in installed}
    owned = {name for record in installed for name in record.buffers}
    for node in graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if name == "aten::copy_" and getattr(node.args[0], "target", None) in owned:
            raise LoadError(f"node {node.name!r} writes a packed buffer")
        if not name.startswith("sparsec::"):
            continue
        if name == _PREPACKED:
            _check_prepacked(node)
            continue
        if name == _POOL:
            _check_pool(node)
            continue
        bound = [*node.args]
        at = 5 if name in _BUCKETS else 4
        if node.kwargs or len(bound) != len(node.target._schema.arguments) or not isinstance(bound[1], (list, tuple)):
            raise LoadError(f"node {node.name!r}: a sparsec call takes all its arguments by position")
        if not all(isinstance(b, fx.Node) and b.op == "get_attr" for b in bound[1]):
            raise LoadError(f"node {node.name!r}: packed buffers are attributes of the model")
        record = packed.get(tuple(str(b.target) for b in bound[1]))
        spec = fitted.get(bound[at]) if isinstance(bound[at], str) else None
        if record is None or spec is None or spec.text() not in [t for _, t in record.kernels]:
            raise LoadError(f"node {node.name!r} reads buffers or a kernel that belong to no packed weight")
        if name in _BUCKETS and (len(bound[6]) % 2 or not all(type(n) is int and n >= 0 for n in bound[6])):
            raise LoadError(f"node {node.name!r}: {bound[6]!r:.60} are no batch ranges")
        bound[at] = spec.text()
        node.args = tuple(bound)


def _check_prepacked(node: fx.Node) -> None:
    """A prepacked site reads a plain weight, whose shape the op itself compares; its text says no more than a plan."""
    if node.kwargs or len(node.args) != 5 or not isinstance(node.args[4], str):
        raise LoadError(f"node {node.name!r}: a sparsec call takes all its arguments by position")
    if getattr(node.args[1], "op", None) != "get_attr":
        raise LoadError(f"node {node.name!r}: the weight of a prepacked site is an attribute of the model")
    try:
        spec = KernelSpec.parse(node.args[4])
    except SpecError as error:
        raise LoadError(f"node {node.name!r}: {error}") from error
    batch = dict(spec.tile).get("batch", 0)
    named = spec.variant == _PREPACKED.removeprefix("sparsec::") and spec.format == "dense"
    if not named or not 1 <= batch <= _SIZE or len(spec.epilogue) > 64:
        raise LoadError(f"node {node.name!r}: {node.args[4][:120]!r} is not the plan of a prepacked site")


def _check_pool(node: fx.Node) -> None:
    """A pooling follows no stored index: its kernel is made from these numbers and the shape of what it reads."""
    lists = node.args[1:]
    pairs = all(isinstance(v, (list, tuple)) and len(v) == 2 and all(type(n) is int for n in v) for v in lists)
    if node.kwargs or len(lists) != 4 or not pairs:
        raise LoadError(f"node {node.name!r}: a pooling has four pairs of integers")


def make(specs: Sequence[KernelSpec], libraries: Mapping[str, bytes]) -> None:
    """Build the kernels from templates; those with a prebuilt library (given only when trusted) are loaded from it."""
    for device in dict.fromkeys(spec.device for spec in specs):
        mine = [s for s in specs if s.device == device and not _prebuilt(s, libraries.get(s.symbol))]
        if mine:
            build.build_kernels(mine, _target(mine[0]))


def _prebuilt(spec: KernelSpec, library: bytes | None) -> bool:
    """Load a trusted library in place of a build; False when there is none for this very kernel."""
    from sparsec.codegen.cache import open_cache

    found = catalog.backend(catalog.variant(spec.variant).language)
    if library is None or found.name != "c":
        return False
    source = found.render(spec)
    with open_cache().workspace() as folder:
        place = folder / f"{spec.symbol.removeprefix('k_')}-given.so"  # named like an entry of the cache
        place.write_bytes(library)
        build.adopt(spec, found.load(place, source))
    return True
