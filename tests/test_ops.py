"""The torch.library ops: opcheck, fake kernels, the checks before a kernel is reached, buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.kernel import KernelSpec, Problem, Step
from sparsec.errors import SpecError
from sparsec.formats import CSR
from sparsec.ops.linear import BUCKETS, OVERLOAD
from sparsec.target import Target

ROWS, COLS = 24, 40


def make(
    epilogue: tuple[Step, ...] = (), bias: bool = True
) -> tuple[str, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLS, generator=g) * (torch.rand(ROWS, COLS, generator=g) < 0.3)
    fmt = CSR().resolve(ROWS, COLS)
    problem = Problem("linear", ROWS, COLS, "float32", int(weight.count_nonzero()), bias, epilogue)
    spec = catalog.variant("linear_csr").specs(problem, fmt, Target.probe())[0]
    return spec.text(), list(fmt.pack(weight).values()), weight, torch.randn(ROWS, generator=g)


@pytest.fixture(scope="module")
def gelu() -> tuple[str, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    return make((Step("gelu"),))


@pytest.mark.parametrize("shape", [(5, COLS), (COLS,), (2, 3, COLS), (0, COLS)])
def test_opcheck(gelu: Any, shape: tuple[int, ...]) -> None:
    text, buffers, _, bias = gelu
    args = (torch.randn(shape), buffers, bias, None, text)
    results = torch.library.opcheck(OVERLOAD, args)
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_buckets(gelu: Any) -> None:
    text, buffers, weight, bias = gelu
    results = torch.library.opcheck(BUCKETS, (torch.randn(5, COLS), buffers, weight, bias, None, text, [1, 4]))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("batch", [1, 4, 5, 8, 9, 40])
def test_buckets_agree_with_dense_on_both_sides_of_every_boundary(gelu: Any, batch: int) -> None:
    text, buffers, weight, bias = gelu
    x = torch.randn(batch, COLS, generator=torch.Generator().manual_seed(batch))
    y = BUCKETS(x, buffers, weight, bias, None, text, [2, 4, 9, 0])
    assert verify.check(y, x, weight, bias, (Step("gelu"),)).ok
    dense = F.gelu(F.linear(x, weight, bias))
    took_dense = 2 <= batch <= 4 or batch >= 9
    assert took_dense == torch.equal(y, dense) or torch.equal(OVERLOAD(x, buffers, bias, None, text), dense)


def test_wrong_inputs_never_reach_the_kernel(gelu: Any) -> None:
    text, buffers, _, bias = gelu
    with pytest.raises(ValueError, match=r"shape \(2, 39\).*\(\.\.\., 40\)"):
        OVERLOAD(torch.randn(2, COLS - 1), buffers, bias, None, text)
    with pytest.raises(ValueError, match="float64.*cast the model before"):
        OVERLOAD(torch.randn(2, COLS).double(), buffers, bias, None, text)
    half = [buffers[0].bfloat16(), *buffers[1:]]
    with pytest.raises(ValueError, match="packed weight torch.bfloat16"):
        OVERLOAD(torch.randn(2, COLS), half, bias, None, text)
    with pytest.raises(ValueError, match="gradient"):
        OVERLOAD(torch.randn(2, COLS, requires_grad=True), buffers, bias, None, text)


def test_buffers_of_wrong_sizes_are_refused_by_the_kernel(gelu: Any) -> None:
    text, buffers, _, bias = gelu
    x = torch.randn(2, COLS)
    with pytest.raises(ValueError, match="indices|values|pointer"):
        OVERLOAD(x, [buffers[0][:-1].contiguous(), *buffers[1:]], bias, None, text)
    with pytest.raises(ValueError, match="pointers"):
        OVERLOAD(x, [*buffers[:2], buffers[2][:-1].contiguous()], bias, None, text)
    with pytest.raises(ValueError, match="bias"):
        OVERLOAD(x, buffers, bias[:-1].contiguous(), None, text)


def test_residual_of_wrong_shape() -> None:
    text, buffers, weight, bias = make((Step("add"),))
    x = torch.randn(3, COLS)
    rest = torch.randn(ROWS, 3).t()
    assert verify.check(OVERLOAD(x, buffers, bias, rest, text), x, weight, bias, (Step("add"),), rest).ok
    with pytest.raises(ValueError, match="residual"):
        OVERLOAD(x, buffers, bias, torch.randn(3, ROWS + 1), text)


def test_fake_kernel_needs_no_compiler(gelu: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    text, buffers, _, bias = gelu
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = OVERLOAD(torch.empty(3, 4, COLS), buffers, bias, None, text)
    assert y.shape == (3, 4, ROWS)


def test_text_round_trip_and_refusal() -> None:
    text = make()[0]
    assert KernelSpec.parse(text).text() == text
    for bad in ("", "[]", "{}", text[:-3], text.replace("float32", "float99")):
        with pytest.raises(SpecError):
            KernelSpec.parse(bad)


def test_strided_expanded_and_offset_inputs(gelu: Any) -> None:
    text, buffers, weight, bias = gelu
    for x in (
        torch.randn(COLS, 9).t(),
        torch.randn(9, 2 * COLS)[:, ::2],
        torch.randn(1, COLS).expand(9, COLS),
        torch.randn(9 * COLS + 1)[1:].view(9, COLS),
    ):
        assert verify.check(OVERLOAD(x, buffers, bias, None, text), x, weight, bias, (Step("gelu"),)).ok


def test_autocast_casts_the_activations_to_the_packed_dtype(gelu: Any) -> None:
    text, buffers, weight, bias = gelu
    x = torch.randn(6, COLS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        y = OVERLOAD(x.bfloat16(), buffers, bias, None, text)
        z = BUCKETS(x.bfloat16(), buffers, weight, bias, None, text, [1, 2])
    assert y.dtype == torch.float32 and torch.equal(y, z)
    assert verify.check(y, x.bfloat16().float(), weight, bias, (Step("gelu"),)).ok
