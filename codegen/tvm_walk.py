"""How TVM kernels read a format: expressions of TVMScript for where entries begin, what they weigh and multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import SpecError


@dataclass(frozen=True)
class Walk:
    """How a format is read, as expressions of TVMScript.

    A group g of `rows` rows owns the units from `begin(g, b0)` to `begin(g, b1)` in its K blocks b0 to b1. A unit p is
    `rows` by `inner` values; its `weight(g, p, i, c)` multiplies input `column(g, p, c)`. `flat_weight` and
    `flat_column` are the same for the entries 0 to `count(r)` of one row r.
    """

    rows: int
    inner: int
    block: int  # inputs per K block
    blocks: int
    padded: int  # inputs rounded up to whole units
    begin: Callable[[str, str], str]
    weight: Callable[[str, str, str, str], str]
    column: Callable[[str, str, str], str]
    count: Callable[[str], str]
    flat_weight: Callable[[str, str], str]
    flat_column: Callable[[str, str], str]
    arguments: tuple[tuple[str, str, str], ...]  # name, dtype, shape
    symbols: tuple[str, ...] = ()
    check: str = ""
    stored: str = ""  # how many values there are, for the choice of threads
    before: Callable[[str], str] | None = None  # stored units before a row group; None where all rows hold as many


def walk(spec: KernelSpec) -> Walk:
    """The reader of a spec's format. Raises SpecError for a format that has none."""
    name = spec.format.partition("(")[0]
    if name not in _WALKS:
        raise SpecError(f"{spec.variant}: no TVM kernel reads {spec.format}; there are some for {', '.join(_WALKS)}")
    return _WALKS[name](spec, dict(spec.fields))


def indexed(bits: int, text: str) -> str:
    """A stored index as int32; 16-bit ones are unsigned in signed tensors."""
    return f'T.Cast("int32", T.reinterpret("uint16", {text}))' if bits == 16 else text


def _csr(spec: KernelSpec, f: dict[str, int]) -> Walk:
    block, blocks = f["block"], -(-spec.in_features // f["block"])
    bits, last = f["index_bits"], spec.out_features * blocks
    return Walk(
        rows=1, inner=1, block=block, blocks=blocks, padded=spec.in_features,
        begin=lambda g, b: f"pointers[{g} * {blocks} + {b}]",
        weight=lambda g, p, i, c: f"values[{p}]",
        column=lambda g, p, c: indexed(bits, f"indices[{p}]"),
        count=lambda r: f"pointers[({r} + 1) * {blocks}] - pointers[{r} * {blocks}]",
        flat_weight=lambda r, e: f"values[pointers[{r} * {blocks}] + {e}]",
        flat_column=lambda r, e: indexed(bits, f"indices[pointers[{r} * {blocks}] + {e}]"),
        arguments=(
            ("values", spec.dtype, "(stored,)"), ("indices", f"int{bits}", "(stored,)"),
            ("pointers", "int32", f"({last + 1},)"),
        ),
        symbols=("stored",), stored="stored",
        check=f'T.Cast("int64", pointers[{last}]) == stored',
        before=lambda g: f"pointers[{g} * {blocks}]",
    )  # fmt: skip


def _bsr(spec: KernelSpec, f: dict[str, int]) -> Walk:
    r, c, bits = f["r"], f["c"], f["index_bits"]
    groups, padded = -(-spec.out_features // r), -(-spec.in_features // c) * c

    def unit(row: str, e: str) -> str:
        return f"pointers[T.truncdiv({row}, {r})] + T.truncdiv({e}, {c})"

    return Walk(
        rows=r, inner=c, block=padded, blocks=1, padded=padded,
        begin=lambda g, b: f"pointers[{g} + {b}]",
        weight=lambda g, p, i, j: f"values[{p}, {i}, {j}]",
        column=lambda g, p, j: f"{indexed(bits, f'indices[{p}]')} * {c} + {j}",
        count=lambda row: f"(pointers[T.truncdiv({row}, {r}) + 1] - pointers[T.truncdiv({row}, {r})]) * {c}",
        flat_weight=lambda row, e: f"values[{unit(row, e)}, T.truncmod({row}, {r}), T.truncmod({e}, {c})]",
        flat_column=lambda row, e: f"{indexed(bits, f'indices[{unit(row, e)}]')} * {c} + T.truncmod({e}, {c})",
        arguments=(
            ("values", spec.dtype, f"(stored, {r}, {c})"), ("indices", f"int{bits}", "(stored,)"),
            ("pointers", "int32", f"({groups + 1},)"),
        ),
        symbols=("stored",), stored=f"stored * T.int64({r * c})",
        check=f'T.Cast("int64", pointers[{groups}]) == stored',
        before=lambda g: f"pointers[{g}]",
    )  # fmt: skip


def _nm(spec: KernelSpec, f: dict[str, int]) -> Walk:
    n, m, groups = f["n"], f["m"], -(-spec.in_features // f["m"])
    shape = f"({spec.out_features}, {groups}, {n})"

    def place(row: str, e: str) -> str:
        return f'T.Cast("int32", places[{row}, T.truncdiv({e}, {n}), T.truncmod({e}, {n})])'

    return Walk(
        rows=1, inner=n, block=groups * m, blocks=1, padded=groups * m,
        begin=lambda g, b: f"({b}) * {groups}",
        weight=lambda g, p, i, s: f"values[{g}, {p}, {s}]",
        column=lambda g, p, s: f'{p} * {m} + T.Cast("int32", places[{g}, {p}, {s}])',
        count=lambda row: f"{groups * n}",
        flat_weight=lambda row, e: f"values[{row}, T.truncdiv({e}, {n}), T.truncmod({e}, {n})]",
        flat_column=lambda row, e: f"T.truncdiv({e}, {n}) * {m} + {place(row, e)}",
        arguments=(("values", spec.dtype, shape), ("places", "uint8", shape)),
        stored=f"T.int64({spec.out_features * groups * n})",
    )  # fmt: skip


def _fan_in(spec: KernelSpec, f: dict[str, int]) -> Walk:
    count, bits, inp = f["k"], f["index_bits"], spec.in_features
    shape = f"({spec.out_features}, {count})"
    return Walk(
        rows=1, inner=1, block=inp, blocks=1, padded=inp,
        begin=lambda g, b: f"({b}) * {count}",
        weight=lambda g, p, i, c: f"values[{g}, {p}]",
        column=lambda g, p, c: indexed(bits, f"indices[{g}, {p}]"),
        count=lambda row: f"{count}",
        flat_weight=lambda row, e: f"values[{row}, {e}]",
        flat_column=lambda row, e: indexed(bits, f"indices[{row}, {e}]"),
        arguments=(("values", spec.dtype, shape), ("indices", f"int{bits}", shape)),
        stored=f"T.int64({spec.out_features * count})",
    )  # fmt: skip


_WALKS = {"csr": _csr, "bsr": _bsr, "nm": _nm, "fan_in": _fan_in}
