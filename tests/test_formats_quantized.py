"""Quantized: codes within half a step, exact bytes, refusals, and the kernel against its own reconstruction."""

from __future__ import annotations

import pytest
import torch
from format_tools import Break, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_linear import BATCHES, ISAS, PLAN, _Fence

import sparsec
from sparsec import codes, verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import KernelSpec, Problem
from sparsec.errors import FormatError, SpecError
from sparsec.formats import CSR, CSRGroups, Quantized, parse
from sparsec.target import Target


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    cols=st.integers(0, 70),
    block=st.sampled_from([None, 1, 7, 255]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_codes_are_within_half_a_step(rows: int, cols: int, block: int | None, density: float) -> None:
    dense, fmt = weight(rows, cols, density), Quantized(CSRGroups(block)).resolve(rows, cols)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    again = fmt.unpack(buffers, rows, cols)
    assert torch.all((again - dense).abs() <= buffers["scales"][:, None] * 0.500001)
    assert torch.all(again[dense == 0] == 0)
    assert torch.all(fmt.positions(buffers, rows, cols) | (again == 0))
    assert parse(fmt.text()) == fmt


def test_bytes_are_near_their_estimate_and_a_quarter_of_fp32() -> None:
    dense, fmt = weight(256, 1024, 0.5), Quantized()
    size = nbytes(fmt.pack(dense))
    assert abs(size / fmt.nbytes(256, 1024, fmt.stored(dense), 4) - 1) < 0.03
    assert size < dense.numel() * 4 * 0.3


def test_weights_that_codes_cannot_stand_for_are_refused() -> None:
    with pytest.raises(FormatError, match="infinite or NaN"):
        Quantized().pack(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(FormatError, match="bfloat16 is not quantised"):
        Quantized().pack(torch.ones(2, 2).bfloat16())
    with pytest.raises(SpecError, match="bits=4"):
        Quantized(bits=4)
    with pytest.raises(SpecError, match="by CSRGroups"):
        Quantized(CSR())


BROKEN: list[tuple[Break, str]] = [
    (put("scales", 2, float("nan")), "'scales' must hold positive"),
    (put("scales", 2, 0.0), "'scales' must hold positive"),
    (swap("scales", shorter), "'scales' has shape"),
    (swap("values", lambda t: t[:-1].clone()), "expected a multiple of 4"),
    (swap("values", lambda t: t.float()), "'values' has dtype"),
    (put("offsets", 3, 5), "'offsets' at position 3"),
    (put("indices", 0, 200), "'indices' at position 0 holds 200"),
    (swap("counts", shorter), "'counts' has shape"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_damaged_buffers_are_refused(change: Break, words: str) -> None:
    fmt, buffers = Quantized(), Quantized().pack(weight(10, 40, 0.5))
    fmt.validate(buffers, 10, 40)
    with pytest.raises(FormatError, match=words):
        fmt.validate(change(buffers), 10, 40)


def _spec(out: int, inp: int, isa: str) -> tuple[Quantized, KernelSpec]:
    fmt = Quantized(CSRGroups(32)).resolve(out, inp)
    spec = KernelSpec(
        op="linear", variant="linear_quantized", format=fmt.text(), dtype="float32", out_features=out, in_features=inp,
        isa=isa, bias=True, plan=PLAN, fields=(("block", fmt._inner(out, inp).fields()["block"]), ("bits", 8)),
        tile=(("one_thread", 500),),
    )  # fmt: skip
    return fmt, spec


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avx2", "portable"])
def test_kernel_equals_its_reconstruction_at_every_batch(isa: str) -> None:
    if isa not in Target.probe().isas:
        pytest.skip(f"this processor has no {isa}")
    fence = _Fence()
    for out, inp in ((37, 301), (4, 3)):
        fmt, spec = _spec(out, inp, isa)
        kernel = build_kernels([spec], Target.probe())[spec]
        bias = fence.copy(torch.randn(out))
        for density in (0.0, 0.2, 1.0):
            dense = weight(out, inp, density)
            packed = fmt.pack(dense)
            buffers = [fence.copy(b) if b.numel() else b for b in packed.values()]
            for batch in BATCHES:
                x = torch.randn(batch, inp) * 10 ** torch.randn(batch, 1)
                x = fence.copy(x) if batch else x
                y = torch.full((batch, out), float("nan"))
                kernel.call(x, y, bias, None, *buffers)
                again = fmt.unpack(packed, out, inp)
                verdict = verify.check(y, x, again, bias, blur=fmt.blur(x))
                assert verdict.ok, verdict.sentence


def test_sums_of_codes_are_exact_integers() -> None:
    """Activations that are their own codes leave nothing to round but the two scales."""
    fmt, spec = _spec(37, 301, ISAS[-1])
    dense = weight(37, 301, 0.4).round()
    dense[:, 0] = 127.0
    x = torch.randint(-127, 128, (9, 301)).float()
    x[:, 0] = 127.0
    y = torch.empty(9, 37)
    build_kernels([spec], Target.probe())[spec].call(x, y, torch.zeros(37), None, *fmt.pack(dense).values())
    assert torch.equal(y, x @ dense.T)


def test_a_token_that_is_not_finite_gives_nan_and_no_other_token_does() -> None:
    fmt, spec = _spec(37, 301, ISAS[0] if ISAS[0] == "portable" else "portable")
    kernel, buffers = build_kernels([spec], Target.probe())[spec], fmt.pack(weight(37, 301, 0.4))
    for batch in (1, 5, 40):
        x, y = torch.randn(batch, 301), torch.empty(batch, 37)
        x[0, 7], x[batch // 2, 300] = float("inf"), float("nan")
        x[batch - 1] = 0 if batch > 1 else x[batch - 1]
        kernel.call(x, y, torch.zeros(37), None, *buffers.values())
        bad = ~x.isfinite().all(1)
        assert y[bad].isnan().all() and y[~bad].isfinite().all()
        assert batch == 1 or (y[batch - 1] == 0).all()


def test_compile_reports_the_error_and_respects_the_tolerance() -> None:
    model = torch.nn.Linear(40, 24).eval()
    with torch.no_grad():
        model.weight.copy_(weight(24, 40, 0.4))
    x = torch.randn(5, 40)
    compiled = sparsec.compile(model, {"<root>": Quantized()}, (x,), tune="off", min_speedup=0)
    row = sparsec.report(compiled).rows[0]
    again = sparsec.dense_state_dict(compiled)["weight"].detach()
    assert row.decision == "sparse" and row.variant == "linear_quantized"
    assert row.error == pytest.approx(
        float((again - model.weight.detach()).norm() / model.weight.detach().norm()), rel=1e-5
    )
    assert 0 < row.error < 0.01
    refused = sparsec.compile(model, {"<root>": Quantized()}, (x,), tune="off", min_speedup=0, tolerance=0.0)
    assert sparsec.report(refused).rows[0].code == codes.TOLERANCE
    torch.testing.assert_close(refused(x), model(x))


def test_more_products_than_32_bits_hold_are_refused() -> None:
    target, fmt = Target.probe(), Quantized()
    for inputs, refused in ((65536, False), (65537, True)):
        problem = Problem("linear", 4, inputs, "float32", 100)
        assert (catalog.variant("linear_quantized").refuse(problem, fmt, target) is not None) == refused
    assert "may overflow 32 bits" in (catalog.variant("linear_quantized").refuse(problem, fmt, target) or "")
