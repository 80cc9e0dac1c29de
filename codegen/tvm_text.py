"""KernelSpec to TVMScript before scheduling: what is computed, in loops and blocks, without a word about vectors.

A linear kernel is a module of small functions. `pack`, `rows` and `finish` make one panel of the batch: activations are
transposed so that a vector holds one input of several batch rows, rows of the weight are multiplied with them, and the
sums go back transposed through the epilogue. `gemv` reduces rows one by one. `share` is the work of one task, `main`
the entry that checks its arguments and starts the tasks. The size of the batch is a run-time value: one kernel serves
all.

TVM tells LLVM that buffers of different names never overlap, also when one function hands its `sums` to the next. A
fence, which is a call that LLVM cannot see into, keeps their loads and stores in order.
"""

from __future__ import annotations

import textwrap

from sparsec.codegen import tvm_panel
from sparsec.codegen.kernel import KernelSpec
from sparsec.codegen.tvm_entry import entry
from sparsec.codegen.tvm_epilogue import const, steps
from sparsec.codegen.tvm_shape import (
    FENCE_CALL,
    LINE,
    ROW_COST,
    STACK,
    Shape,
    function,
    lines_of,
    outputs_of,
    pointer,
    shape_of,
    weights_of,
)
from sparsec.errors import SpecError


def text_of(spec: KernelSpec) -> str:
    """The unscheduled module of a spec. Raises SpecError."""
    shape = shape_of(spec)
    parts = [tvm_panel.turn(w) for w in sorted({shape.vector(nc) for nc in shape.widths})]
    for nc in shape.widths:
        made = (tvm_panel.pack, tvm_panel.rows, tvm_panel.finish, tvm_panel.panel)
        parts += [make(shape, nc) for make in made]
    if any(routine == "gemv" for _, routine, _ in spec.plan):
        parts.append(_gemv(shape))
    if shape.walk.before is not None:
        parts.append(_row_at(shape))
    parts += [_share(shape), _main(shape)]
    return "@I.ir_module\nclass Module:\n" + "\n".join(textwrap.indent(part, "    ") for part in parts)


def blocks_of(spec: KernelSpec) -> dict[str, list[str]]:
    """The blocks of every function that has loops worth scheduling, in the order of the text."""
    shape = shape_of(spec)
    found: dict[str, list[str]] = {}
    for nc in shape.widths:
        pad = ["pad"] if shape.walk.padded != spec.in_features else []
        found[f"pack_{nc}"] = ["edge", "ragged", *pad]
        found[f"rows_{nc}"] = ["fma", "keep"]
        found[f"finish_{nc}"] = ["store", "edge"]
    if any(routine == "gemv" for _, routine, _ in spec.plan):
        found["gemv"] = ["dot"]
    return found


def _gemv(s: Shape) -> str:
    (weights, _, weight_buffers), (outputs, _, output_buffers) = weights_of(s), outputs_of(s)
    k, inp, out, w = s.walk, s.spec.in_features, s.spec.out_features, min(8, s.lanes)

    def product(entry: str) -> str:
        weight, column = k.flat_weight("row", entry), k.flat_column("row", entry)
        if k.padded == inp:
            return f"{weight} * x[vb, {column}]"
        inside = f"{weight} * x[vb, T.min({column}, {inp - 1})]"  # what is stored past the last input is padding
        return f"T.Select({column} >= {inp}, {const(0.0)}, {inside})"

    lines = steps(s.spec.epilogue, lambda i: f"acc[{i}]", "residual[vb, row]")
    first = f"acc[0] = ({' + '.join(f'acc[{i}]' for i in range(w))}){' + bias[row]' if s.spec.bias else ''}"
    body = f"""
        x = T.decl_buffer((batch, {inp}), "float32", data=x_data)
        {lines_of([*weight_buffers, *output_buffers], 8)}
        for b, r in T.grid(batch, r1 - r0):
            with T.sblock("row"):
                vb = T.axis.spatial(batch, b)
                vr = T.axis.spatial({out}, r)
                T.reads()
                T.writes(y[vb, 0:{out}])
                row = T.Bind(r0 + vr)
                count = T.Bind({k.count("row")})
                acc = T.alloc_buffer(({w},), "float32", {STACK})
                for e, l in T.grid(T.truncdiv(count, {w}), {w}):
                    with T.sblock("dot"):
                        ve, vl = T.axis.remap("RS", [e, l])
                        T.reads()
                        T.writes(acc[vl])
                        with T.init():
                            acc[vl] = {const(0.0)}
                        acc[vl] = acc[vl] + {product(f"(ve * {w} + vl)")}
                for e in T.serial(T.truncmod(count, {w})):
                    acc[0] = acc[0] + {product(f"(T.truncdiv(count, {w}) * {w} + e)")}
                {lines_of([first, *lines, "y[vb, row] = acc[0]"], 16)}
    """
    more = ["batch: T.int64", "r0: T.int32", "r1: T.int32"]
    return function("gemv", [pointer("x"), *outputs, *weights, *more], body)


def _row_at(s: Shape) -> str:
    """bound[slot] = the first row of share `part` of `of`, by stored entries and not by number of rows."""
    before, out, groups = s.walk.before, s.spec.out_features, s.groups
    if before is None:
        raise SpecError(f"{s.spec.variant}: rows without pointers are shared out by number")
    cost = ROW_COST * s.walk.rows
    parameters, _, declared = weights_of(s)

    def done(g: str) -> str:
        return f'(T.Cast("int64", {before(g)}) + T.int64({cost}) * T.Cast("int64", {g}))'

    body = f"""
        {lines_of(declared, 8)}
        bound = T.decl_buffer((2,), "int32", data=bound_data)
        span = T.alloc_buffer((2,), "int32", {STACK})
        span[0] = 0
        span[1] = {groups}
        while span[0] < span[1]:
            middle = T.Bind(T.truncdiv(span[0] + span[1], 2))
            if {done("middle")} * of < {done(str(groups))} * part:
                span[0] = middle + 1
            else:
                span[1] = middle
        row = T.Bind(T.truncdiv(span[0] * {s.walk.rows} + {s.align - 1}, {s.align}) * {s.align})
        bound[slot] = T.if_then_else(part <= T.int64(0), 0, T.if_then_else(part >= of, {out}, T.min(row, {out})))
    """
    more = [pointer("bound", "int32"), "slot: T.int32", "part: T.int64", "of: T.int64"]
    return function("row_at", [*parameters, *more], body)


def _bounds(s: Shape, lower: str, upper: str, of: str) -> list[str]:
    """Statements that fill bound[0] and bound[1] with the rows of [lower, upper) of `of` equal pieces."""
    if s.walk.before is not None:
        _, names, _ = weights_of(s)
        return [
            f"Module.row_at({', '.join(names)}, bound_data, {i}, {part}, {of})" for i, part in enumerate((lower, upper))
        ]
    out, units = s.spec.out_features, s.padded_rows // s.align

    def cut(part: str) -> str:
        share = f"T.truncdiv(T.int64({units}) * T.max(T.int64(0), T.min({part}, {of})), {of})"
        return f'T.Cast("int32", T.min(T.int64({out}), {share} * T.int64({s.align})))'

    return [f"bound[{i}] = {cut(part)}" for i, part in enumerate((lower, upper))]


def _share(s: Shape) -> str:
    """The batch is one line on which a panel is as long as it is wide; each task takes an equal piece of it.

    Sizes go through a buffer, not through bound variables: TVM's analyzer would expand each division in the next.
    """
    (weights, weight_names, _), (outputs, output_names, _) = weights_of(s), outputs_of(s)
    names = ", ".join(["x_data", *output_names, *weight_names, "batch"])
    lines = ['bound = T.decl_buffer((2,), "int32", data=bound_data)', f'n = T.alloc_buffer((8,), "int64", {STACK})']
    gemv = any(routine == "gemv" for _, routine, _ in s.spec.plan)
    if gemv:
        rows = [*_bounds(s, "t", "(t + T.int64(1))", "tasks"), FENCE_CALL]
        lines += ["if nc == T.int64(1):", *("    " + line for line in rows)]
        lines += [f"    Module.gemv({names}, bound[0], bound[1])"]
    if s.widths:
        tail = f"T.int64({s.widths[-1]})"
        for nc in s.widths[-2::-1]:
            tail = f"T.if_then_else(n[0] <= T.int64({nc}), T.int64({nc}), {tail})"
        rest, narrow, whole, start, stop, origin, at, wide = (f"n[{i}]" for i in range(8))
        panels = [
            f"{rest} = T.truncmod(batch, nc)",
            f"{narrow} = {tail}",
            f"{whole} = batch - {rest}",
            f"{wide} = {whole} + T.if_then_else({rest} == T.int64(0), T.int64(0), {narrow})",  # the length of the line
            f"{start} = T.truncdiv({wide} * t, tasks)",
            f"{stop} = T.truncdiv({wide} * (t + T.int64(1)), tasks)",
            f"{origin} = T.truncdiv({start}, nc) * nc",
            f"for p in T.serial(T.truncdiv({stop} - {origin} + nc - T.int64(1), nc)):",
            f"    {at} = {origin} + p * nc",
            f"    {wide} = T.if_then_else({at} < {whole}, nc, {narrow})",
            *("    " + line for line in _bounds(s, f"({start} - {at})", f"({stop} - {at})", wide)),
            f"    {FENCE_CALL}",
            "    if bound[0] < bound[1]:",
        ]
        live = f'T.Cast("int32", T.min(nc, batch - {at}))'
        for nc in s.widths:
            panels += [f"        if {wide} == T.int64({nc}):"]
            panels += [f"            Module.panel_{nc}({names}, scratch_data, {at}, {live}, bound[0], bound[1])"]
        lines += ["else:", *("    " + line for line in panels)] if gemv else panels
    more = ["batch: T.int64", pointer("scratch"), pointer("bound", "int32")]
    more += ["nc: T.int64", "t: T.int64", "tasks: T.int64"]
    return function("share", [pointer("x"), *outputs, *weights, *more], "\n".join(lines))


def _main(s: Shape) -> str:
    vectors = f"T.int64(1) + T.truncdiv(batch + T.int64({s.lanes - 1}), T.int64({s.lanes}))"
    each = f"T.if_then_else(batch > T.int64(1), {vectors}, T.int64(1))"
    cycles = f"({s.walk.stored} + T.int64({(s.spec.out_features + s.spec.in_features) // 4})) * {each}"
    return entry(s, cycles, "batch", f"T.int64({LINE})")
