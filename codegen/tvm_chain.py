"""KernelSpec of a chain to TVMScript before scheduling: factored weights, as in the C template `chain.c.jinja`.

A panel of the batch goes through all products while its intermediates stay in cache. Every buffer holds features that
lie a panel's width apart, so that vectors run along the batch whatever the sizes of the operands. `stage` is one
product, `pack` and `finish` are those of linear kernels, `panel` calls them in turn, and `share` is the work of one
task: some of the panels.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from math import prod

from sparsec.codegen import tvm_panel
from sparsec.codegen.kernel import KernelSpec
from sparsec.codegen.tvm_entry import entry
from sparsec.codegen.tvm_epilogue import const
from sparsec.codegen.tvm_rules import MAX_UNROLL
from sparsec.codegen.tvm_shape import (
    FENCE_CALL,
    STACK,
    Panels,
    function,
    lanes_of,
    lines_of,
    outputs_of,
    pointer,
    weights_of,
    widths_of,
)
from sparsec.codegen.tvm_walk import indexed
from sparsec.errors import SpecError


@dataclass(frozen=True)
class Chain(Panels):
    """The sizes that the text of one chain is made of: the fields of its factored format."""

    fields: dict[str, int]

    def stage(self, at: int) -> dict[str, int]:
        """The fields of one product, without its number."""
        start = f"s{at}_"
        return {name.removeprefix(start): value for name, value in self.fields.items() if name.startswith(start)}

    @property
    def stages(self) -> list[dict[str, int]]:
        return [self.stage(at) for at in range(self.fields["stages"])]

    @property
    def begins(self) -> list[int]:
        """Where each buffer of a panel begins, and where the last one ends, in features."""
        sizes = [self.fields[f"buffer{i}"] for i in range(self.fields["buffers"])]
        return [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    @property
    def arguments(self) -> tuple[tuple[str, str, str], ...]:
        found = [("values", "float32", f"({self.fields['values']},)")]
        for stage in (s for s in self.stages if s["sparse"]):
            at = stage["at"]
            found += [
                (f"values_{at}", "float32", f"(stored_{at},)"),
                (f"indices_{at}", f"int{stage['bits']}", f"(stored_{at},)"),
                (f"pointers_{at}", "int32", f"({stage['outputs'] + 1},)"),
            ]
        return tuple(found)

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(f"stored_{stage['at']}" for stage in self.stages if stage["sparse"])

    @property
    def checks(self) -> tuple[str, ...]:
        return tuple(
            f'T.Cast("int64", pointers_{stage["at"]}[{stage["outputs"]}]) == stored_{stage["at"]}'
            for stage in self.stages
            if stage["sparse"]
        )

    def group(self, nc: int, tile: int) -> int:
        """Outputs of a tile that share each loaded vector: as many as there are registers for."""
        fit = max(1, min(MAX_UNROLL, self.registers // (nc // self.vector(nc))))
        return max(g for g in (1, 2, 4, 8, 16) if tile % g == 0 and g <= fit)

    def scratch(self) -> int:
        """All buffers of the widest panel, and a tile that is being transposed."""
        return self.begins[-1] * self.widths[-1] + self.lanes**2


def shape_of(spec: KernelSpec) -> Chain:
    """The sizes for a spec. Raises SpecError for what these texts cannot say."""
    widths = widths_of(spec, "chain", ("panel",))
    fields = dict(spec.fields)
    if fields.get("stages", 0) < 1:
        raise SpecError(f"{spec.variant}: a chain needs the stages of a factored weight, and {spec.format} has none")
    return Chain(spec, lanes_of(spec), widths, fields)


def text_of(spec: KernelSpec) -> str:
    """The unscheduled module of a spec. Raises SpecError."""
    chain = shape_of(spec)
    parts = [tvm_panel.turn(w) for w in sorted({chain.vector(nc) for nc in chain.widths})]
    for nc in chain.widths:
        parts.append(tvm_panel.pack(chain, nc))
        for at, stage in enumerate(chain.stages):
            parts.append((_sparse if stage["sparse"] else _dense)(chain, at, nc))
        parts += [tvm_panel.finish(chain, nc), _panel(chain, nc)]
    vectors = f"T.truncdiv(batch + T.int64({chain.lanes - 1}), T.int64({chain.lanes}))"
    cycles = f"T.int64({chain.fields['work'] + (spec.out_features + spec.in_features) // 4}) * {vectors}"
    parts += [_share(chain), entry(chain, cycles, "T.truncdiv(batch + tasks - T.int64(1), tasks)")]
    return "@I.ir_module\nclass Module:\n" + "\n".join(textwrap.indent(part, "    ") for part in parts)


def blocks_of(spec: KernelSpec) -> dict[str, list[str]]:
    """The blocks of every function that has loops worth scheduling, in the order of the text."""
    chain = shape_of(spec)
    found: dict[str, list[str]] = {}
    for nc in chain.widths:
        found[f"pack_{nc}"] = ["edge", "ragged"]
        found |= {f"stage{at}_{nc}": ["fma", "keep"] for at in range(len(chain.stages))}
        found[f"finish_{nc}"] = ["store", "edge"]
    return found


def _feature(stage: dict[str, int], kind: str, index: str, side: str) -> str:
    """The feature that step `index` of the loops `kind` reads or writes: each digit of it times a stride."""
    count = stage[kind]
    terms, inner = [], 1
    for a in reversed(range(count)):
        digit = index if inner == 1 else f"T.truncdiv({index}, {inner})"
        if a > 0:
            digit = f"T.truncmod({digit}, {stage[f'{kind}{a}']})"
        terms.append(f"{digit} * {stage[f'{kind}{a}_{side}']}")
        inner *= stage[f"{kind}{a}"]
    return " + ".join(reversed(terms)) or "0"


def _ends(chain: Chain, stage: dict[str, int]) -> tuple[int, int]:
    """Where the buffers begin that a product reads and writes."""
    return chain.begins[stage["source"]], chain.begins[stage["target"]]


def _dense(chain: Chain, at: int, nc: int) -> str:
    """out = in times a dense operand: tiles of outputs, of which a group at a time is summed in registers."""
    stage = chain.stage(at)
    tile, tiles, depth, outputs = stage["tile"], stage["tiles"], stage["depth"], stage["outputs"]
    group, spectators = chain.group(nc, stage["tile"]), prod(stage[f"p{a}"] for a in range(stage["p"]))
    source, target = _ends(chain, stage)
    loops = (stage["blocks"], tiles, spectators, tile // group)
    number = f"vt * {tile} + vh * {group} + vr"
    read = f"{source} + {_feature(stage, 'g', 'vb', 'read')} + {_feature(stage, 'p', 'vs', 'read')}"
    write = f"{target} + {_feature(stage, 'g', 'vb', 'write')} + {_feature(stage, 'p', 'vs', 'write')}"
    value = f"values[{stage['at']} + ((vb * {tiles} + vt) * {depth} + vd) * {tile} + vh * {group} + vr]"
    place = f"features[to + {_feature(stage, 'n', f'({number})', 'write')}, vj]"
    kept = f"{place} = {f'{place} + ' if stage['resume'] else ''}acc[vr * {nc} + vj]"
    keep = [f"if {number} < {outputs}:", f"    {kept}"] if outputs % tile else [kept]
    body = f"""
        values = T.decl_buffer(({chain.fields["values"]},), "float32", data=values_data)
        features = T.decl_buffer(({chain.begins[-1]}, {nc}), "float32", data=scratch_data)
        for b, t, s, h in T.grid{loops}:
            with T.sblock("group"):
                vb, vt, vs, vh = T.axis.remap("SSSS", [b, t, s, h])
                T.reads()
                T.writes(features[0:{chain.begins[-1]}, 0:{nc}])
                begin = T.Bind({read})
                to = T.Bind({write})
                acc = T.alloc_buffer(({group * nc},), "float32", {STACK})
                for d, r, j in T.grid({depth}, {group}, {nc}):
                    with T.sblock("fma"):
                        vd, vr, vj = T.axis.remap("RSS", [d, r, j])
                        T.reads()
                        T.writes(acc[vr * {nc} + vj])
                        with T.init():
                            acc[vr * {nc} + vj] = {const(0.0)}
                        acc[vr * {nc} + vj] = acc[vr * {nc} + vj] + {value} * features[begin + vd * {stage["step"]}, vj]
                for r, j in T.grid({group}, {nc}):
                    with T.sblock("keep"):
                        vr, vj = T.axis.remap("SS", [r, j])
                        T.reads()
                        T.writes(features[0:{chain.begins[-1]}, 0:{nc}])
                        {lines_of(keep, 24)}
    """
    return function(f"stage{at}_{nc}", [pointer("values"), pointer("scratch")], body)


def _sparse(chain: Chain, at: int, nc: int) -> str:
    """out = in times a sparse operand, row by row."""
    stage = chain.stage(at)
    source, target = _ends(chain, stage)
    n = stage["at"]
    own = [a for a in chain.arguments if a[0].endswith(f"_{n}")]
    declared = [f'{name} = T.decl_buffer({size}, "{dtype}", data={name}_data)' for name, dtype, size in own]
    column = indexed(stage["bits"], f"indices_{n}[begin + ve]")
    place = f"features[{target} + vi, vj]"
    body = f"""
        {lines_of(declared, 8)}
        features = T.decl_buffer(({chain.begins[-1]}, {nc}), "float32", data=scratch_data)
        for i in T.serial({stage["outputs"]}):
            with T.sblock("group"):
                vi = T.axis.spatial({stage["outputs"]}, i)
                T.reads()
                T.writes(features[0:{chain.begins[-1]}, 0:{nc}])
                begin = T.Bind(pointers_{n}[vi])
                acc = T.alloc_buffer(({nc},), "float32", {STACK})
                for e, j in T.grid(pointers_{n}[vi + 1] - begin, {nc}):
                    with T.sblock("fma"):
                        ve, vj = T.axis.remap("RS", [e, j])
                        T.reads()
                        T.writes(acc[vj])
                        with T.init():
                            acc[vj] = {const(0.0)}
                        acc[vj] = acc[vj] + values_{n}[begin + ve] * features[{source} + {column}, vj]
                for j in T.serial({nc}):
                    with T.sblock("keep"):
                        vj = T.axis.spatial({nc}, j)
                        T.reads()
                        T.writes(features[0:{chain.begins[-1]}, 0:{nc}])
                        {place} = {f"{place} + " if stage["resume"] else ""}acc[vj]
    """
    parameters = [pointer(name, dtype) for name, dtype, _ in own] + [f"stored_{n}: T.int64", pointer("scratch")]
    return function(f"stage{at}_{nc}", parameters, body)


def _panel(chain: Chain, nc: int) -> str:
    """All products of one panel, the fence between each and the next: both name the same memory."""
    (weights, _, _), (outputs, output_names, _) = weights_of(chain), outputs_of(chain)
    inp, out = chain.spec.in_features, chain.spec.out_features
    at = f"T.address_of(scratch[{chain.begins[chain.fields['result']] * nc}])"
    tile = f"T.address_of(scratch[{chain.scratch() - chain.lanes**2}])"
    lines = [
        f'scratch = T.decl_buffer(({chain.scratch()},), "float32", data=scratch_data)',
        f"Module.pack_{nc}(x_data, scratch_data, batch, first, live, 0, {inp})",
    ]
    for i, stage in enumerate(chain.stages):
        n = stage["at"]
        own = f"values_{n}_data, indices_{n}_data, pointers_{n}_data, stored_{n}" if stage["sparse"] else "values_data"
        lines += [FENCE_CALL, f"Module.stage{i}_{nc}({own}, scratch_data)"]
    lines += [FENCE_CALL, f"Module.finish_{nc}({', '.join(output_names)}, {at}, {tile}, batch, first, live, 0, {out})"]
    more = ["batch: T.int64", pointer("scratch"), "first: T.int64", "live: T.int32"]
    return function(f"panel_{nc}", [pointer("x"), *outputs, *weights, *more], "\n".join([*lines, FENCE_CALL]))


def _share(chain: Chain) -> str:
    """Task t of `tasks` takes as many panels as the others; the last panel of a batch is as narrow as covers it."""
    (weights, weight_names, _), (outputs, output_names, _) = weights_of(chain), outputs_of(chain)
    names = ", ".join(["x_data", *output_names, *weight_names, "batch", "scratch_data"])
    first, rest, panels, start = (f"n[{i}]" for i in range(4))
    lines = [
        f'n = T.alloc_buffer((4,), "int64", {STACK})',
        f"{panels} = T.truncdiv(batch + nc - T.int64(1), nc)",
        f"{start} = T.truncdiv({panels} * t, tasks)",
        f"for p in T.serial(T.truncdiv({panels} * (t + T.int64(1)), tasks) - {start}):",
        f"    {first} = ({start} + p) * nc",
        f"    {rest} = T.min(nc, batch - {first})",
    ]
    narrower = 0
    for nc in chain.widths:
        lines += [f"    if T.int64({narrower}) < {rest} and {rest} <= T.int64({nc}):"]
        lines += [f'        Module.panel_{nc}({names}, {first}, T.Cast("int32", {rest}))']
        narrower = nc
    more = ["batch: T.int64", pointer("scratch"), "nc: T.int64", "t: T.int64", "tasks: T.int64"]
    return function("share", [pointer("x"), *outputs, *weights, *more], "\n".join(lines))
