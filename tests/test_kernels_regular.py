"""Kernels of regular and grouped formats, run: n:m, fan-in and row-grouped CSR against float64, and at the edges."""

from __future__ import annotations

import functools

import pytest
import torch
from test_kernels_linear import BATCHES, ISAS, PLAN, _assert_near, _Fence

from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec
from sparsec.codegen.render import render
from sparsec.errors import SpecError
from sparsec.formats import NM, SELL, CSRGroups, FanIn, Format, Window
from sparsec.target import Target
from sparsec.testing import _obey

FORMATS: tuple[tuple[Format, int, int], ...] = (
    (NM(2, 4), 37, 150),
    (NM(1, 4), 18, 131),
    (NM(2, 16), 33, 300),
    (NM(3, 8), 20, 61),
    (NM(4, 32), 17, 290),
    (FanIn(6), 37, 300),
    (FanIn(9, 32), 18, 60),
    (CSRGroups(16), 37, 53),
    (CSRGroups(), 34, 300),
    (SELL(16, 8), 37, 53),
    (SELL(), 34, 300),
    (Window(32), 37, 53),
    (Window(64), 34, 300),
    (Window(32), 18, 64),
)


def _spec(fmt: Format, out: int, inp: int, isa: str = ISAS[0], dtype: str = "float32") -> KernelSpec:
    resolved = fmt.resolve(out, inp)
    plan = {"sell": PLAN[1:], "window": ((0, "gemv", 1),)}.get(fmt.name, PLAN)
    return KernelSpec(
        op="linear", variant=f"linear_{fmt.name}" + ("_bf16" if dtype == "bfloat16" else ""), format=resolved.text(),
        dtype=dtype, out_features=out, in_features=inp, isa=isa, bias=True, plan=plan,
        fields=tuple(resolved.fields().items()), tile=(("panel_bytes", 2048), ("one_thread", 500)),
    )  # fmt: skip


def _grid() -> list[tuple[Format, KernelSpec]]:
    """Every format on the best and the baseline instruction set, one of each kind on the others and in bf16."""
    kinds = [FORMATS[1], FORMATS[5], FORMATS[7], FORMATS[9], FORMATS[11]]
    cases = [(case, isa, "float32") for isa in dict.fromkeys((ISAS[0], ISAS[-1])) for case in FORMATS]
    cases += [(case, isa, "float32") for case in kinds for isa in ISAS[1:-1]]
    cases += [(case, ISAS[0], "bfloat16") for case in kinds]
    return [(fmt, _spec(fmt, out, inp, isa, dtype)) for (fmt, out, inp), isa, dtype in cases]


def _name(value: object) -> str:
    return f"{value.isa}-{value.dtype}" if isinstance(value, KernelSpec) else value.text()  # type: ignore[attr-defined]


@functools.cache
def _built() -> dict[KernelSpec, Kernel]:
    return build_kernels([spec for _, spec in _grid()], Target.probe())


def _weight(fmt: Format, spec: KernelSpec, density: float) -> torch.Tensor:
    """Random entries that the format has slots for, the first and the last row empty, one row as full as it may be."""
    kept = torch.rand(spec.out_features, spec.in_features) < density
    kept[0], kept[-1], kept[kept.shape[0] // 2] = False, False, True
    kept = torch.from_numpy(_obey(fmt, kept.numpy()))
    weight = torch.randn(spec.out_features, spec.in_features)
    return torch.where(kept, weight + weight.sign(), torch.zeros(())).to(DTYPES[spec.dtype])


def _pack(fmt: Format, weight: torch.Tensor) -> list[torch.Tensor]:
    return list(fmt.resolve(*weight.shape).pack(weight).values())


@pytest.mark.parametrize(("fmt", "spec"), _grid(), ids=_name)
def test_kernel_equals_float64_at_every_batch_and_reads_nothing_past_an_end(fmt: Format, spec: KernelSpec) -> None:
    kernel, dtype, fence = _built()[spec], DTYPES[spec.dtype], _Fence()
    bias = fence.copy(torch.randn(spec.out_features).to(dtype))
    for density in (0.0, 0.3, 1.0):
        weight = _weight(fmt, spec, density)
        if density:
            weight[-1, -1] = 1.5
        buffers = [fence.copy(b) if b.numel() else b for b in _pack(fmt, weight)]
        for batch in BATCHES[1:]:
            x = fence.copy(torch.randn(batch, spec.in_features).to(dtype))
            y = fence.copy(torch.full((batch, spec.out_features), float("nan"), dtype=dtype))
            kernel.call(x, y, bias, None, *buffers)
            _assert_near(y, x, weight, bias, spec.dtype)
    empty = torch.empty(0, spec.out_features, dtype=dtype)
    kernel.call(torch.empty(0, spec.in_features, dtype=dtype), empty, bias, None, *buffers)


@pytest.mark.parametrize(("fmt", "spec"), _grid(), ids=_name)
def test_stored_positions_pass_inf_and_nan_on_and_others_ignore_them(fmt: Format, spec: KernelSpec) -> None:
    kernel, dtype = _built()[spec], DTYPES[spec.dtype]
    weight, bias = _weight(fmt, spec, 0.3), torch.zeros(spec.out_features, dtype=dtype)
    column = spec.in_features // 2
    weight[:, column] = 0
    weight[3] = 0
    weight[3, column] = 2.0
    resolved = fmt.resolve(*weight.shape)
    buffers = resolved.pack(weight)
    stored = resolved.positions(buffers, *weight.shape)[:, column]
    assert 0 < stored.sum() < spec.out_features
    for batch in (1, 5, 40):
        x = torch.randn(batch, spec.in_features).to(dtype)
        clean, dirty = torch.empty(2, batch, spec.out_features, dtype=dtype)
        kernel.call(x, clean, bias, None, *buffers.values())
        x[:, column] = float("nan")
        x[0, column] = float("inf")
        kernel.call(x, dirty, bias, None, *buffers.values())
        assert torch.equal(clean[:, ~stored], dirty[:, ~stored])
        assert not dirty[:, stored].isfinite().any()


@pytest.mark.parametrize("which", [0, 5, 7, 9, 12])
def test_one_thread_and_three_give_the_same_bits(which: int) -> None:
    fmt, out, inp = FORMATS[which]
    spec = _spec(fmt, out, inp)
    weight, bias, x = _weight(fmt, spec, 0.5), torch.randn(out), torch.randn(71, inp)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = torch.empty(71, out)
            _built()[spec].call(x, y, bias, None, *_pack(fmt, weight))
            results.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, {"values": lambda t: t[:-1]}, "values has the wrong number of elements"),
        (0, {"places": lambda t: t.to(torch.int8)}, "places must be a contiguous CPU tensor of uint8"),
        (5, {"indices": lambda t: t[:-1]}, "indices has the wrong number of elements"),
        (7, {"values": lambda t: t[:-1]}, "the last of pointers does not match"),
        (7, {"counts": lambda t: t[:-1]}, "counts has the wrong number of elements"),
        (7, {"starts": lambda t: t[:-1]}, "starts has the wrong number of elements"),
        (9, {"indices": lambda t: t[:-1]}, "indices has the wrong number of elements"),
        (9, {"rows": lambda t: t[:-1]}, "rows has the wrong number of elements"),
        (9, {"pointers": lambda t: t + 1}, "the last of pointers does not match"),
        (11, {"places": lambda t: t[:-1]}, "places has the wrong number of elements"),
        (11, {"starts": lambda t: t[:-1]}, "starts has the wrong number of elements"),
        (7, {"indices": lambda t: t[:-1]}, "the last of starts does not match the number of entries"),
    ],
)
def test_entry_refuses_buffers_of_other_sizes(which: int, change: dict[str, object], message: str) -> None:
    fmt, out, inp = FORMATS[which]
    spec = _spec(fmt, out, inp)
    buffers = fmt.resolve(out, inp).pack(_weight(fmt, spec, 0.5))
    ((key, alter),) = change.items()
    buffers[key] = alter(buffers[key])  # type: ignore[operator]
    x, y, bias = torch.randn(4, inp), torch.empty(4, out), torch.zeros(out)
    with pytest.raises(ValueError, match=message):
        _built()[spec].call(x, y, bias, None, *buffers.values())


@pytest.mark.parametrize(
    ("which", "fields", "message"),
    [
        (0, (("n", 4), ("m", 4)), "n:m needs"),
        (0, (("n", 4), ("m", 64)), "n:m needs"),
        (5, (("k", 0), ("index_bits", 16)), "fan-in is 1 to"),
        (5, (("k", 4), ("index_bits", 8)), "16 or 32 bits"),
        (7, (("block", 256),), "1 to 255 columns"),
        (9, (("block", 256), ("window", 8)), "1 to 255 columns"),
        (9, (("block", 16), ("window", 6)), "multiples of 4 rows"),
        (11, (("reach", 48),), "32 or 64 inputs"),
    ],
)
def test_templates_refuse_fields_they_cannot_print(
    which: int, fields: tuple[tuple[str, int], ...], message: str
) -> None:
    fmt, out, inp = FORMATS[which]
    values = {**_spec(fmt, out, inp).__dict__, "fields": fields}
    with pytest.raises(SpecError, match=message):
        render(KernelSpec(**values))
