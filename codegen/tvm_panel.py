"""The functions that make one panel of a batch: `turn`, `pack`, `rows`, `finish`, and `panel` that calls them."""

from __future__ import annotations

from sparsec.codegen.tvm_epilogue import SLOTS, const, steps
from sparsec.codegen.tvm_shape import (
    FENCE_CALL,
    STACK,
    Panels,
    Shape,
    function,
    lines_of,
    outputs_of,
    pointer,
    weights_of,
)


def turn(size: int) -> str:
    """b[j, i] = a[i, j] of a square of lines `sa` and `sb` floats long, by shuffles of whole vectors.

    Stage d of log2(size) swaps the off-diagonal d x d squares of every 2d x 2d one (Eklundh's transposition). Written
    out and not tensorized: that schedule primitive crashes with apache-tvm-ffi 0.1.15.
    """

    def at(half: int, line: int) -> str:
        return f"kept[T.Ramp({(half * size + line) * size}, 1, {size})]"

    lines = [f'kept = T.alloc_buffer(({2 * size * size},), "float32", {STACK})']
    lines += [f"{at(0, i)} = a[T.Ramp({i} * sa, 1, {size})]" for i in range(size)]
    step, half = size // 2, 0
    while step:
        low = [size + lane - step if lane & step else lane for lane in range(size)]
        high = [size + lane if lane & step else lane + step for lane in range(size)]
        for i in (i for i in range(size) if not i & step):
            pair = f"[{at(half, i)}, {at(half, i + step)}]"
            lines.append(f"{at(1 - half, i)} = T.Shuffle({pair}, {low})")
            lines.append(f"{at(1 - half, i + step)} = T.Shuffle({pair}, {high})")
        step, half = step // 2, 1 - half
    lines += [f"b[T.Ramp({i} * sb, 1, {size})] = {at(half, i)}" for i in range(size)]
    sizes = [f'{n} = T.decl_buffer(({size - 1} * s{n} + {size},), "float32", data={n}_data)' for n in "ab"]
    parameters = [pointer("a"), "sa: T.int32", pointer("b"), "sb: T.int32"]
    return function(f"turn_{size}", parameters, "\n".join(sizes + lines))


def pack(s: Panels, nc: int) -> str:
    inp, w, kp = s.spec.in_features, s.vector(nc), s.packed(nc)
    body = f"""
        x = T.decl_buffer((batch, {inp}), "float32", data=x_data)
        packed = T.decl_buffer(({kp}, {nc}), "float32", data=packed_data)
        for ct, kt in T.grid(T.truncdiv(live, {w}), T.truncdiv(count, {w})):
            Module.turn_{w}(
                T.address_of(x[first + T.Cast("int64", ct * {w}), k0 + kt * {w}]), {inp},
                T.address_of(packed[kt * {w}, ct * {w}]), {nc},
            )
        for k, c in T.grid(T.truncmod(count, {w}), T.truncdiv(live, {w}) * {w}):
            with T.sblock("edge"):
                vk = T.axis.spatial({kp}, T.truncdiv(count, {w}) * {w} + k)
                vc = T.axis.spatial({nc}, c)
                packed[vk, vc] = x[first + T.Cast("int64", vc), k0 + vk]
        for c, k in T.grid({nc} - T.truncdiv(live, {w}) * {w}, count):
            with T.sblock("ragged"):
                vc = T.axis.spatial({nc}, T.truncdiv(live, {w}) * {w} + c)
                vk = T.axis.spatial({kp}, k)
                packed[vk, vc] = T.if_then_else(vc < live, x[first + T.Cast("int64", vc), k0 + vk], {const(0.0)})
    """
    if s.padded != inp:
        body += f"""
        for k, c in T.grid({s.padded - inp}, {nc}):
            with T.sblock("pad"):
                vk, vc = T.axis.remap("SS", [k, c])
                packed[{inp} + vk, vc] = {const(0.0)}
        """
    parameters = [pointer("x"), pointer("packed"), "batch: T.int64", "first: T.int64", "live: T.int32"]
    return function(f"pack_{nc}", [*parameters, "k0: T.int32", "count: T.int32"], body)


def rows(s: Shape, nc: int) -> str:
    k, g, rows = s.walk, s.tile(nc), s.walk.rows
    parameters, _, declared = weights_of(s)
    row = f"vg * {rows} + vq * {g} + vi" if rows > 1 else "vg"
    unit, inside = "begin + vp", f"vq * {g} + vi"
    weight = k.weight("group", unit, inside, "vc")
    product = f"{weight} * packed[{k.column('group', unit, 'vc')} - k0, vj]"
    body = f"""
        {lines_of(declared, 8)}
        packed = T.decl_buffer(({s.packed(nc)}, {nc}), "float32", data=packed_data)
        sums = T.decl_buffer(({s.chunk(nc)}, {nc}), "float32", data=sums_data)
        for g, q in T.grid(T.truncdiv(r1 - r0 + {rows - 1}, {rows}), {rows // g}):
            with T.sblock("group"):
                vg = T.axis.spatial({s.groups}, g)
                vq = T.axis.spatial({rows // g}, q)
                T.reads()
                T.writes(sums[vg * {rows}:vg * {rows} + {rows}, 0:{nc}])
                group = T.Bind(T.truncdiv(r0, {rows}) + vg)
                begin = T.Bind({k.begin("group", "b0")})
                acc = T.alloc_buffer(({g * nc},), "float32", {STACK})
                for p, c, i, j in T.grid({k.begin("group", "b1")} - begin, {k.inner}, {g}, {nc}):
                    with T.sblock("fma"):
                        vp, vc, vi, vj = T.axis.remap("RRSS", [p, c, i, j])
                        T.reads()
                        T.writes(acc[vi * {nc} + vj])
                        with T.init():
                            acc[vi * {nc} + vj] = T.if_then_else(b0 == 0, {const(0.0)}, sums[{row}, vj])
                        acc[vi * {nc} + vj] = acc[vi * {nc} + vj] + {product}
                for i, j in T.grid({g}, {nc}):
                    with T.sblock("keep"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        sums[{row}, vj] = acc[vi * {nc} + vj]
    """
    more = [pointer("packed"), pointer("sums"), *(f"{n}: T.int32" for n in ("k0", "b0", "b1", "r0", "r1"))]
    return function(f"rows_{nc}", [*parameters, *more], body)


def finish(s: Panels, nc: int) -> str:
    parameters, _, declared = outputs_of(s)
    w, out = s.vector(nc), s.spec.out_features

    def store(column: str, row: str, value: str, lane: str, indent: int) -> str:
        batch = f'first + T.Cast("int64", {column})'
        lines = steps(s.spec.epilogue, lambda i: f"kept[{i * w} + {lane}]", f"residual[{batch}, {row}]")
        first = f"kept[{lane}] = {value}{f' + bias[{row}]' if s.spec.bias else ''}"
        return lines_of([first, *lines, f"y[{batch}, {row}] = kept[{lane}]"], indent)

    full = store(f"vct * {w} + vc", f"r0 + vrt * {w} + vl", f"tile[vc * {w} + vl]", "vl", 24)
    edge = store("vc", f"r0 + T.truncdiv(rows, {w}) * {w} + vr", f"sums[T.truncdiv(rows, {w}) * {w} + vr, vc]", "0", 16)
    kept = f'kept = T.alloc_buffer(({SLOTS * w},), "float32", {STACK})'
    body = f"""
        {lines_of(declared, 8)}
        sums = T.decl_buffer(({s.chunk(nc)}, {nc}), "float32", data=sums_data)
        tile = T.decl_buffer(({w * w},), "float32", data=tile_data)
        rows = T.Bind(T.min(r1, {out}) - r0)
        for rt, ct in T.grid(T.truncdiv(rows, {w}), T.truncdiv(live + {w - 1}, {w})):
            with T.sblock("tile"):
                vrt = T.axis.spatial({-(-out // w)}, rt)
                vct = T.axis.spatial({nc // w}, ct)
                T.reads()
                T.writes(y[0:batch, 0:{out}])
                {kept}
                Module.turn_{w}(T.address_of(sums[vrt * {w}, vct * {w}]), {nc}, tile_data, {w})
                {FENCE_CALL}
                for c, l in T.grid(T.min({w}, live - vct * {w}), {w}):
                    with T.sblock("store"):
                        vc = T.axis.spatial({w}, c)
                        vl = T.axis.spatial({w}, l)
                        T.reads()
                        T.writes(y[0:batch, 0:{out}])
                        {full}
                {FENCE_CALL}
        for c, r in T.grid(live, T.truncmod(rows, {w})):
            with T.sblock("edge"):
                vc = T.axis.spatial({nc}, c)
                vr = T.axis.spatial({w}, r)
                T.reads()
                T.writes(y[0:batch, 0:{out}])
                {kept}
                {edge}
    """
    more = [pointer("sums"), pointer("tile"), "batch: T.int64", "first: T.int64", "live: T.int32", "r0: T.int32"]
    return function(f"finish_{nc}", [*parameters, *more, "r1: T.int32"], body)


def panel(s: Shape, nc: int) -> str:
    (weights, weight_names, _), (outputs, output_names, _) = weights_of(s), outputs_of(s)
    kp, chunk, inp = s.packed(nc), s.chunk(nc), s.spec.in_features
    blocks, step = s.walk.blocks, s.step(nc)
    sums = f"T.address_of(scratch[{kp * nc}])"
    data = f"scratch_data, {sums}"
    rows = f"Module.rows_{nc}({', '.join(weight_names)}, {data}, at, b0, b1, c0, c1)"
    pack = f'Module.pack_{nc}(x_data, scratch_data, batch, first, live, at, T.min({kp}, {inp} - at))'
    tile = f"T.address_of(scratch[{s.scratch() - s.lanes**2}])"
    finish = f"Module.finish_{nc}({', '.join(output_names)}, {sums}, {tile}, batch, first, live, c0, c1)"
    bounds = [f"c0 = T.Bind(r0 + ch * {chunk})", f"c1 = T.Bind(T.min(r1, c0 + {chunk}))"]
    if step >= blocks:
        whole = rows.replace("at, b0, b1", f"0, 0, {blocks}")
        lines = [pack.replace("at, T.min", "0, T.min").replace("- at", "- 0")]
        lines += [f"for ch in T.serial(T.truncdiv(r1 - r0 + {chunk - 1}, {chunk})):"]
        lines += ["    " + line for line in (*bounds, FENCE_CALL, whole, FENCE_CALL, finish, FENCE_CALL)]
    else:
        lines = [f"for ch in T.serial(T.truncdiv(r1 - r0 + {chunk - 1}, {chunk})):", *("    " + b for b in bounds)]
        lines += [f"    for st in T.serial({-(-blocks // step)}):"]
        inner = [f"b0 = T.Bind(st * {step})", f"b1 = T.Bind(T.min({blocks}, b0 + {step}))"]
        inner += [f"at = T.Bind(b0 * {s.walk.block})", pack, FENCE_CALL, rows, FENCE_CALL]
        lines += ["        " + line for line in inner]
        lines += ["    " + finish, f"    {FENCE_CALL}"]
    body = f'scratch = T.decl_buffer(({s.scratch()},), "float32", data=scratch_data)\n' + "\n".join(lines)
    more = ["batch: T.int64", pointer("scratch"), "first: T.int64", "live: T.int32", "r0: T.int32", "r1: T.int32"]
    return function(f"panel_{nc}", [pointer("x"), *outputs, *weights, *more], body)
