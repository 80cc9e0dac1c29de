"""Metamorphic relations: what must hold between several runs of a kernel, whatever its oracle says.

A relation takes a `Trial`, one problem that was run, and returns what is wrong, "" when it holds, or None where it says
nothing (a format that cannot hold the changed weight, values that overflow).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparsec import verify
from sparsec.formats import Format, Quantized
from sparsec.ops.linear import OVERLOAD

_HOMOGENEOUS = {"relu", "scale", "add"}  # f(2 y) = 2 f(y), exactly
_BROKEN = 1.0  # an error above its bound


@dataclass(frozen=True)
class Trial:
    """One problem of a kernel: operands, what came out, and what should have.

    x (..., in), weight (out, in), bias (out), residual and y (..., out); `other` is the format and the text of a second
    kernel for the same sizes, dtype and epilogue.
    """

    format: Format
    text: str
    steps: tuple[str, ...]
    threads: int
    tame: bool  # values whose products neither overflow nor vanish
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    y: torch.Tensor
    expected: verify.Expected
    seed: int
    other: tuple[Format, str] | None = None

    def order(self, count: int) -> torch.Tensor:
        """A random permutation, the same in every process."""
        return torch.from_numpy(np.random.default_rng((self.seed, 4)).permutation(count))

    def again(self, weight: torch.Tensor | None = None, **change: object) -> torch.Tensor | None:
        """The output with something changed; None where the format cannot hold the changed weight."""
        trial = dataclasses.replace(self, weight=self.weight if weight is None else weight, **change)  # type: ignore[arg-type]
        if weight is not None and trial.format.refuse(weight) is not None:
            return None
        return launch(trial.format, trial.text, trial.threads, trial.x, trial.weight, trial.bias, trial.residual)

    def off(self, y: torch.Tensor, rows: slice = slice(None), cols: slice | torch.Tensor = slice(None)) -> str:
        """By how much `y` misses the given rows and columns of what was expected, or ""."""
        want = verify.Expected(self.expected.value[rows][:, cols], self.expected.bound[rows][:, cols])
        ratio = want.ratio(y.reshape(want.value.shape))
        worst = float(ratio.max()) if ratio.numel() else 0.0
        return f"off by {worst:.3g} of the bound" if worst > _BROKEN else ""


def launch(
    fmt: Format,
    text: str,
    threads: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Pack, validate and run, on `threads` threads."""
    buffers = fmt.pack(weight)
    fmt.validate(buffers, *weight.shape)
    return run_packed(text, threads, x, list(buffers.values()), bias, residual)


def run_packed(
    text: str,
    threads: int,
    x: torch.Tensor,
    buffers: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """One call of a kernel on `threads` threads; torch's own number is put back."""
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            y: torch.Tensor = OVERLOAD(x, buffers, bias, residual, text)
            return y
    finally:
        if before != threads:
            torch.set_num_threads(before)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal bit for bit, but for the sign and payload of NaN."""
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def repeat(t: Trial) -> str | None:
    """The same call gives the same bits."""
    found = t.again()
    return None if found is None or same(found, t.y) else "two calls with the same threads differ"


def threads(t: Trial) -> str | None:
    """Another number of threads stays within the bound."""
    found = t.again(threads=t.threads % 3 + 1)
    return None if found is None else t.off(found)


def _scaled(t: Trial, weight: torch.Tensor | None, x: torch.Tensor, factor: float) -> str | None:
    if not t.tame or not set(t.steps) <= _HOMOGENEOUS:
        return None
    bias, residual = (None if o is None else o * factor for o in (t.bias, t.residual))
    changed = ((t.weight, weight), (t.x, x), (t.bias, bias), (t.residual, residual))
    if any(a is not None and b is not None and not _scales(a, b) for a, b in changed):
        return None
    found = t.again(weight, x=x, bias=bias, residual=residual)
    if found is None:
        return None
    want = t.y * factor
    below = found.abs() < 2 * max(factor, 1.0) * torch.finfo(t.y.dtype).tiny  # float16 rounds these in fixed steps
    step = max(factor, 1.0) * torch.finfo(t.y.dtype).tiny * torch.finfo(t.y.dtype).eps
    near = below & ((found - want).abs() <= step)
    return "" if same(found[~near], want[~near]) else f"a factor of {factor} does not come out as it went in"


def _scales(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same significands: products with a power of two that neither overflowed nor lost bits."""
    return same(one.frexp().mantissa, other.frexp().mantissa)


def scaled_input(t: Trial) -> str | None:
    """A power of two on the input, the bias and the residual comes out exactly."""
    return _scaled(t, None, t.x * 4.0, 4.0)


def scaled_weight(t: Trial) -> str | None:
    """A power of two on the weight, the bias and the residual comes out exactly."""
    return _scaled(t, t.weight * 0.5, t.x, 0.5)


def _by_rows(t: Trial) -> bool:
    """Whether what is stored of an entry depends on its row alone: codes of groups depend on what is beside them."""
    return t.format.exact or isinstance(t.format, Quantized)


def permuted_rows(t: Trial) -> str | None:
    """Outputs follow their weight rows."""
    if not _by_rows(t):
        return None
    order = t.order(t.weight.shape[0])
    found = t.again(
        t.weight[order], bias=None if t.bias is None else t.bias[order],
        residual=None if t.residual is None else t.residual[..., order],
    )  # fmt: skip
    return None if found is None or not t.tame else t.off(found, cols=order)


def permuted_columns(t: Trial) -> str | None:
    """The order of the input features does not matter."""
    if not _by_rows(t):
        return None
    order = t.order(t.weight.shape[1])
    found = t.again(t.weight[:, order], x=t.x[..., order])
    return None if found is None or not t.tame else t.off(found)


def fewer_rows(t: Trial) -> str | None:
    """Rows of the input are independent: a few alone, perhaps through another routine of the plan, give the same."""
    x = t.x.reshape(-1, t.x.shape[-1])
    if x.shape[0] < 2:
        return None
    rng = np.random.default_rng((t.seed, 5))
    low = int(rng.integers(x.shape[0]))
    part = slice(low, low + 1 + int(rng.integers(x.shape[0] - low)))
    rest = None if t.residual is None else t.residual.reshape(-1, t.weight.shape[0])[part]
    found = t.again(x=x[part], residual=rest)
    return None if found is None else t.off(found, rows=part)


def other_format(t: Trial) -> str | None:
    """The same weight in another format, through another kernel."""
    if t.other is None or not t.tame or not t.format.exact or not t.other[0].exact:
        return None
    found = t.again(t.weight, format=t.other[0], text=t.other[1])
    return None if found is None else t.off(found)


def transposed(t: Trial) -> str | None:
    """For a square weight without epilogue, <u, x W^T> = <u W, x>."""
    rows, cols = t.weight.shape
    if rows != cols or t.steps or t.bias is not None or not t.tame or not t.format.exact:
        return None
    x = t.x.reshape(-1, cols)
    u = torch.from_numpy(np.random.default_rng((t.seed, 6)).standard_normal(tuple(x.shape))).to(x.dtype)
    z = t.again(t.weight.t().contiguous(), x=u)
    if z is None:
        return None
    y, size = t.y.reshape(-1, rows).double(), u.double().abs() * (x.double().abs() @ t.weight.double().abs().t())
    gap = ((u.double() * y).sum(1) - (z.double() * x.double()).sum(1)).abs()
    rounding = torch.finfo(x.dtype).eps * ((u.double() * y).abs().sum(1) + (z.double() * x.double()).abs().sum(1))
    bound = 4 * (8 + 2 * cols**0.5) * torch.finfo(torch.float32).eps * size.sum(1) + 2 * rounding + 1e-30
    return "" if bool((gap <= bound).all()) else f"the two products are {float((gap / bound).max()):.3g} bounds apart"


RELATIONS: dict[str, Callable[[Trial], str | None]] = {
    "repeat": repeat,
    "threads": threads,
    "scaled input": scaled_input,
    "scaled weight": scaled_weight,
    "permuted rows": permuted_rows,
    "permuted columns": permuted_columns,
    "fewer rows": fewer_rows,
    "other format": other_format,
    "transposed": transposed,
}
"""Name -> relation."""
