"""The linear templates, run: each format, dtype and instruction set here against float64, and at the edges."""

from __future__ import annotations

import ctypes
import functools
import mmap

import pytest
import torch
import torch.nn.functional as F

from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec, Plan, Step
from sparsec.codegen.render import render
from sparsec.errors import SpecError
from sparsec.formats import BSR, CSR, Bitmask, Format
from sparsec.target import Target

ISAS = tuple(isa for isa in ("avx512bf16", "avx512", "avx2", "portable") if isa in Target.probe().isas)
PLAN: Plan = ((1, "gemv", 1), (8, "panel", 8), (0, "panel", 32))
BATCHES = (0, 1, 2, 7, 8, 9, 31, 32, 33, 71)
FORMATS: tuple[tuple[Format, int, int], ...] = (
    (CSR(index_bits=16, block=16), 37, 53),
    (CSR(index_bits=32), 32, 40),
    (Bitmask(64, 64), 35, 150),
    (Bitmask(16), 18, 17),
    (BSR(4, 1), 34, 23),
    (BSR(3, 16), 20, 60),
)
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def _spec(fmt: Format, out: int, inp: int, **change: object) -> KernelSpec:
    resolved = fmt.resolve(out, inp)
    dtype = change.get("dtype", "float32")
    values: dict[str, object] = {
        "op": "linear",
        "variant": f"linear_{fmt.name}" + ("_bf16" if dtype == "bfloat16" else ""),
        "format": resolved.text(),
        "dtype": "float32",
        "out_features": out,
        "in_features": inp,
        "isa": ISAS[0],
        "bias": True,
        "plan": PLAN,
        "fields": tuple(resolved.fields().items()),
        "tile": (("panel_bytes", 2048), ("one_thread", 500)),
    }
    return KernelSpec(**{**values, **change})  # type: ignore[arg-type]


def _grid() -> list[tuple[Format, KernelSpec]]:
    """Every format on the best and the baseline instruction set; of the rest, and in bf16, what differs there."""
    bf16 = [FORMATS[0], FORMATS[2], FORMATS[5]]
    cases = [(case, isa, "float32") for isa in dict.fromkeys((ISAS[0], ISAS[-1])) for case in FORMATS]
    cases += [(case, ISAS[0], "bfloat16") for case in bf16] + [(bf16[1], ISAS[-1], "bfloat16")]
    cases += [(FORMATS[0], isa, "float32") for isa in ISAS[1:-1]] + [(bf16[1], isa, "bfloat16") for isa in ISAS[1:-1]]
    return [(fmt, _spec(fmt, out, inp, isa=isa, dtype=dtype)) for (fmt, out, inp), isa, dtype in cases]


def _name(value: object) -> str:
    if isinstance(value, KernelSpec):
        return f"{value.isa}-{value.dtype}"
    return value.text() if isinstance(value, Format) else str(value)


def _kernel(spec: KernelSpec) -> Kernel:
    return build_kernels([spec], Target.probe())[spec]


@functools.cache
def _built() -> dict[KernelSpec, Kernel]:
    return build_kernels([spec for _, spec in _grid()], Target.probe())


def _weight(fmt: Format, spec: KernelSpec, density: float) -> torch.Tensor:
    """Random blocks of the format's size, the first and the last row empty, one row full."""
    r, c = getattr(fmt, "r", 1), getattr(fmt, "c", 1)
    kept = torch.rand(-(-spec.out_features // r), -(-spec.in_features // c)) < density
    kept[0], kept[-1], kept[kept.shape[0] // 2] = False, False, True
    mask = kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[: spec.out_features, : spec.in_features]
    weight = torch.randn(spec.out_features, spec.in_features)
    return torch.where(mask, weight + weight.sign(), torch.zeros(())).to(DTYPES[spec.dtype])


def _pack(fmt: Format, weight: torch.Tensor) -> list[torch.Tensor]:
    return list(fmt.resolve(*weight.shape).pack(weight).values())


def _assert_near(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: str) -> None:
    """The bound of the actual reduction: c * eps * sum |x w|, and one rounding to the dtype of y."""
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    bound = 16 * 2.0**-24 * size + ROUNDING[dtype] * exact.abs()
    assert torch.all((y.double() - exact).abs() <= bound)


@pytest.mark.parametrize(("fmt", "spec"), _grid(), ids=_name)
def test_kernel_equals_float64_at_every_batch(fmt: Format, spec: KernelSpec) -> None:
    kernel, dtype = _built()[spec], DTYPES[spec.dtype]
    bias = torch.randn(spec.out_features).to(dtype)
    for density in (0.0, 0.3, 1.0):
        weight = _weight(fmt, spec, density)
        buffers = _pack(fmt, weight)
        for batch in BATCHES:
            x = torch.randn(batch, spec.in_features).to(dtype)
            y = torch.full((batch, spec.out_features), float("nan"), dtype=dtype)
            kernel.call(x, y, bias, None, *buffers)
            _assert_near(y, x, weight, bias, spec.dtype)


@pytest.mark.parametrize(("fmt", "spec"), _grid(), ids=_name)
def test_pruned_positions_ignore_inf_and_nan_while_stored_ones_pass_them_on(fmt: Format, spec: KernelSpec) -> None:
    kernel, dtype = _built()[spec], DTYPES[spec.dtype]
    weight, bias = _weight(fmt, spec, 0.3), torch.zeros(spec.out_features, dtype=dtype)
    column = spec.in_features // 2
    r, c = getattr(fmt, "r", 1), getattr(fmt, "c", 1)
    block = weight[:, column // c * c : column // c * c + c]
    stored = torch.stack([block[i // r * r : i // r * r + r].ne(0).any() for i in range(spec.out_features)])
    assert 0 < stored.sum() < spec.out_features
    for batch in (1, 5, 40):
        x = torch.randn(batch, spec.in_features).to(dtype)
        clean, dirty = torch.empty(2, batch, spec.out_features, dtype=dtype)
        kernel.call(x, clean, bias, None, *_pack(fmt, weight))
        x[:, column] = float("nan")
        x[0, column] = float("inf")
        kernel.call(x, dirty, bias, None, *_pack(fmt, weight))
        assert torch.equal(clean[:, ~stored], dirty[:, ~stored])
        assert not dirty[:, stored].isfinite().any()


STEPS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("isa", ISAS[:1] + ISAS[-1:])
def test_epilogues_are_accurate_to_a_few_units_in_the_last_place(isa: str) -> None:
    """Through a diagonal weight the accumulator is x itself, so only the step is measured."""
    n = 48
    fmt, eye = CSR(), torch.eye(n)
    x = torch.cat([torch.linspace(-12, 12, 40 * n), torch.logspace(-6, 2, 10 * n), -torch.logspace(-6, 1, 10 * n)])
    x = x.view(-1, n)
    plan: Plan = ((0, "gemv", 1),)
    specs = {s: _spec(fmt, n, n, isa=isa, bias=False, plan=plan, epilogue=(Step(s),)) for s in STEPS}
    kernels = build_kernels(list(specs.values()), Target.probe())
    for step, function in STEPS.items():
        y = torch.empty_like(x)
        kernels[specs[step]].call(x, y, None, None, *_pack(fmt, eye))
        error = (y.double() - function(x.double())).abs()
        assert torch.all(error <= 6 * 2.0**-24 * x.double().abs() + 1e-37)


def test_steps_run_in_order_with_bias_first_and_residual_where_it_is_written() -> None:
    steps = (Step("scale", (0.5,)), Step("add"), Step("clamp", (-1.0, 2.0)))
    fmt, spec = FORMATS[0][0], _spec(*FORMATS[0], epilogue=steps)
    weight, bias = _weight(fmt, spec, 0.5), torch.randn(spec.out_features)
    for batch in (1, 5, 40):
        x, residual = torch.randn(batch, spec.in_features), torch.randn(batch, spec.out_features)
        y = torch.empty_like(residual)
        _kernel(spec).call(x, y, bias, residual, *_pack(fmt, weight))
        expected = (0.5 * (x @ weight.T + bias) + residual).clamp(-1, 2)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        x[0], residual[0, 0] = float("nan"), float("nan")
        _kernel(spec).call(x, y, bias, residual, *_pack(fmt, weight))
        assert y[0, 0].isnan()  # clamp passes NaN on


class _Fence:
    """Copies of tensors that end at an unreadable page, so that one element too many is a crash."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._maps: list[tuple[mmap.mmap, int]] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        page, nbytes = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
        size = (-(-nbytes // page) + 1) * page
        area = mmap.mmap(-1, size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert self._libc.mprotect(start + size - page, page, 0) == 0
        self._maps.append((area, start))
        copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=size - page - nbytes)
        return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(("fmt", "spec"), _grid(), ids=_name)
def test_nothing_is_touched_behind_the_end_of_a_tensor(fmt: Format, spec: KernelSpec) -> None:
    kernel, dtype, fence = _built()[spec], DTYPES[spec.dtype], _Fence()
    weight = _weight(fmt, spec, 0.4)
    weight[-1, -1] = weight[-2, -1] = 1.5
    buffers = [fence.copy(b) for b in _pack(fmt, weight)]
    bias = fence.copy(torch.randn(spec.out_features).to(dtype))
    for batch in BATCHES[1:]:
        x = fence.copy(torch.randn(batch, spec.in_features).to(dtype))
        y = fence.copy(torch.zeros(batch, spec.out_features, dtype=dtype))
        kernel.call(x, y, bias, None, *buffers)
        _assert_near(y, x, weight, bias, spec.dtype)


def test_one_thread_and_two_give_the_same_bits() -> None:
    fmt, spec = FORMATS[0][0], _spec(*FORMATS[0])
    weight, bias, x = _weight(fmt, spec, 0.5), torch.randn(spec.out_features), torch.randn(71, spec.in_features)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = torch.empty(71, spec.out_features)
            _kernel(spec).call(x, y, bias, None, *_pack(fmt, weight))
            results.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_entry_refuses_what_the_kernel_was_not_compiled_for() -> None:
    fmt, spec = FORMATS[0][0], _spec(*FORMATS[0])
    v, i, p = _pack(fmt, _weight(fmt, spec, 0.5))
    x, y, b = torch.randn(4, 53), torch.empty(4, 37), torch.zeros(37)
    cases: tuple[tuple[tuple[object, ...], str], ...] = (
        ((x, y, b, None, v, i), "expected x, y, bias, residual, values, indices, pointers"),
        ((x.double(), y, b, None, v, i, p), "x must be a contiguous CPU tensor of float32"),
        ((x, y.T.contiguous().T, b, None, v, i, p), "y must be a contiguous CPU tensor of float32"),
        ((x[:, :50].contiguous(), y, b, None, v, i, p), "x must hold rows of 53 elements"),
        ((x, y[:3], b, None, v, i, p), "y must hold 37 elements for each row of x"),
        ((x, y, None, None, v, i, p), "bias must be a contiguous CPU tensor of 37 x float32"),
        ((x, y, b, y, v, i, p), "compiled without a residual"),
        ((x, y, b, None, v, i.int(), p), "indices must be a contiguous CPU tensor of int16"),
        ((x, y, b, None, v[:-1], i, p), "indices has the wrong number of elements"),
        ((x, y, b, None, v, i, p[:-1]), "pointers has the wrong number of elements"),
        ((x, y, b, None, v[:-1], i[:-1], p), "the last of pointers does not match the number of entries"),
    )
    for args, message in cases:
        with pytest.raises(ValueError, match=message):
            _kernel(spec).call(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": ()}, "last line of a plan"),
        ({"plan": ((1, "gemv", 1),)}, "last line of a plan"),
        ({"plan": ((0, "stream", 64),)}, "unknown routine stream"),
        ({"plan": ((0, "panel", 24),)}, "panels are 4, 8, 16"),
        ({"dtype": "int8", "variant": "linear_csr"}, "float32 and bfloat16 and float16, not int8"),
        ({"out_features": 0}, "at least one output"),
        ({"epilogue": (Step("add"), Step("add"))}, "one residual"),
        ({"fields": (("index_bits", 8), ("block", 16))}, "16 or 32 bits"),
    ],
)
def test_templates_refuse_specs_they_cannot_print(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        render(_spec(*FORMATS[0], **change))
