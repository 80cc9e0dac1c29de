"""The entry of every TVM kernel: the checks of its arguments, the choice of threads and widths, the start of tasks."""

from __future__ import annotations

import textwrap

from sparsec.codegen.tvm_shape import ONE_THREAD, Panels, sizes_of


def entry(s: Panels, cycles: str, rows: str, bound: str = "") -> str:
    """`main`: checks what it is given, and starts as many tasks as `cycles` of work are worth, at most `threads`.

    The plan is asked for the width of panels with `rows`, an expression that may name `batch` and `tasks`. `bound` is
    how many 32-bit numbers `share` is handed besides its scratch memory.
    """
    spec, scratch = s.spec, s.scratch()
    buffers = [(n, "float32", size) for n, size in sizes_of(spec).items()] + list(s.arguments)
    width = "T.int64(0)"
    for limit, routine, nc in reversed(spec.plan):
        chosen = f"T.int64({nc if routine == 'panel' else 1})"
        width = f"T.if_then_else({rows} <= T.int64({limit}), {chosen}, {width})" if limit else chosen
    call = ", ".join([f"{n}.data" for n, _, _ in buffers] + list(s.symbols) + ["batch"])
    lines = [f'T.func_attr({{"global_symbol": "{spec.symbol}"}})']
    lines += [f"{name} = T.int64()" for name in ("batch", *s.symbols)]
    itemsize = {"float32": 4, "int16": 2, "int32": 4, "uint8": 1}
    lines += [f'{n} = T.match_buffer({n}_, {size}, "{dtype}", align={itemsize[dtype]})' for n, dtype, size in buffers]
    for check in s.checks:
        lines += [f'assert {check}, ("ValueError", ["the last pointer does not match the size of values"])']
    bounds = f'    bounds = T.alloc_buffer((tasks * {bound},), "int32")'
    lines += [
        "if batch > T.int64(0):",
        f"    tasks = T.Bind(T.if_then_else({cycles} < T.int64({ONE_THREAD}), T.int64(1), threads))",
        f"    nc = T.Bind({width})",
        f'    scratch = T.alloc_buffer((tasks * T.int64({scratch}),), "float32")',
        *([bounds] if bound else []),
        "    if tasks == T.int64(1):",
        f"        Module.share({call}, scratch.data, {'bounds.data, ' if bound else ''}nc, T.int64(0), T.int64(1))",
        "    else:",
        "        for t in T.parallel(tasks):",
        f"            Module.share({call}, T.address_of(scratch[t * T.int64({scratch})]), "
        f"{f'T.address_of(bounds[t * {bound}]), ' if bound else ''}nc, t, tasks)",
    ]
    parameters = [f"{n}_: T.handle" for n, _, _ in buffers] + ["threads: T.int64"]
    head = f"@T.prim_func(s_tir=True)\ndef main({', '.join(parameters)}):\n"
    return head + textwrap.indent("\n".join(lines), "    ") + "\n"
