"""The ops without Python: taken when the case is plain, left when it is not, with the same bits and the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_ops import COLS, make
from torch import nn

import sparsec
from sparsec.codegen import dispatch
from sparsec.errors import InputError, SpecError
from sparsec.ops import conv as conv_op
from sparsec.ops import linear as linear_op
from sparsec.sparsifiers import Magnitude

pytestmark = pytest.mark.skipif(dispatch._library() is None, reason="no compiler that builds torch's C shim")


@pytest.fixture(scope="module")
def plain() -> Any:
    text, buffers, _, bias = make()
    with torch.no_grad():
        linear_op.OVERLOAD(torch.zeros(1, COLS), buffers, bias, None, text)  # loads the kernel
    return text, buffers, bias


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Fills up when Python answers."""
    handles: dict[str, Any] = {}
    monkeypatch.setattr(linear_op, "_HANDLES", handles)
    monkeypatch.setattr(conv_op, "_HANDLES", handles)
    return handles


@pytest.mark.parametrize("lead", [(), (1,), (5,), (0,), (2, 3), (2, 0, 3)])
def test_plain_calls_never_enter_python(plain: Any, in_python: dict[str, Any], lead: tuple[int, ...]) -> None:
    text, buffers, bias = plain
    x = torch.randn(*lead, COLS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = linear_op.OVERLOAD(x, buffers, bias, None, text)
        assert not in_python
        assert torch.equal(y, linear_op._linear(x, buffers, bias, None, text)) and y.is_contiguous()


def test_what_is_not_plain_is_answered_in_python(plain: Any, in_python: dict[str, Any]) -> None:
    text, buffers, bias = plain
    x = torch.randn(COLS, 3).t()
    with torch.no_grad():
        strided = linear_op.OVERLOAD(x, buffers, bias, None, text)
    assert in_python.pop(text)
    assert torch.equal(strided, linear_op.OVERLOAD(x.contiguous(), buffers, bias, None, text))
    assert in_python  # a gradient could have been wanted


def test_dense_ranges_are_answered_in_python(plain: Any, in_python: dict[str, Any]) -> None:
    text, buffers, bias = plain
    dense = torch.zeros(len(bias), COLS)
    x = torch.ones(4, COLS)
    with torch.no_grad():
        assert torch.equal(linear_op.BUCKETS(x, buffers, dense, bias, None, text, [2, 4]), bias.expand(4, -1))
        inside = linear_op.BUCKETS(x, buffers, dense, bias, None, text, [5, 0])
        assert not in_python
        assert torch.equal(inside, linear_op.OVERLOAD(x, buffers, bias, None, text))


def test_convolutions(in_python: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = sparsec.sparsify(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).eval(), Magnitude(0.9))
    x = torch.randn(2, 8, 9, 7)
    compiled = sparsec.compile(model, None, (x,), tune="off")
    in_python.clear()
    with torch.no_grad():
        y = compiled(x)
    assert not in_python
    torch.testing.assert_close(y, model(x).detach())


def test_errors_of_a_compiled_model_keep_their_type() -> None:
    torch.manual_seed(0)
    model = sparsec.sparsify(nn.Sequential(nn.Linear(32, 32)).eval(), Magnitude(0.9))
    compiled = sparsec.compile(model, None, (torch.randn(4, 32),), tune="off")
    with pytest.raises(InputError, match="a gradient is wanted"):
        compiled(torch.randn(4, 32, requires_grad=True))


def test_memory_stays(plain: Any) -> None:
    text, buffers, bias = plain
    cases = [(torch.randn(4, COLS), 20000), (torch.randn(COLS, 4).t(), 2000)]
    with torch.no_grad():
        for x, calls in cases:
            for _ in range(500):
                linear_op.OVERLOAD(x, buffers, bias, None, text)
            before = _resident()
            for _ in range(calls):
                linear_op.OVERLOAD(x, buffers, bias, None, text)
            assert _resident() - before < 400 << 10  # 200 bytes a call would be 4 MB and 400 kB


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_number_that_was_never_given() -> None:
    with pytest.raises(SpecError, match="no kernel text has the number"):
        dispatch.text(1 << 40)


def test_a_compiler_without_cpp_leaves_the_ops_in_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_command", lambda *_: ("false",))
    assert dispatch._install() is None
    monkeypatch.setattr(dispatch.toolchain, "run", lambda *_: pytest.fail("asked again"))
    assert dispatch._install() is None
