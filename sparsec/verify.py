"""The never-wrong law: a site's kernel against its float64 oracle, within a bound of the actual reduction.

The bound is `c * eps * sum(|a * b|)` with c = 8 + 2 sqrt(n), n the longest row: rounding errors of a sum of n products
grow like sqrt(n) with overwhelming probability (Higham and Mary 2019, "A new approach to probabilistic rounding error
analysis", theorem 2.4), and fused multiply-adds, blocking and the epilogue are within the constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsec.codegen.kernel import Step
from sparsec.errors import SpecError

_ROWS = 1024  # rows of x that are checked at a time: bounds the float64 copies
SAMPLE = 256
"""Rows that `compile` checks per site: the first, the last and evenly spaced ones between. Rows are independent, so
this covers every output feature, every panel position and the remainder at a fixed cost."""
_SLOPES = {"gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1, "hardswish": 1.5}
"""Largest slope of the steps that stretch an error; `scale` is counted as it comes, the others have 1 at most."""
_SLACK = 1.2  # for what steps round themselves


@dataclass(frozen=True)
class Verdict:
    """Outcome of one check. `worst` is the largest error as a share of its bound; at most 1 passes."""

    ok: bool
    worst: float
    sentence: str


def apply_steps(steps: Sequence[Step], y: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The meaning of an epilogue, in torch: the oracle of every kernel and the dense baseline of every site."""
    for step in steps:
        if step.name == "add":
            if residual is None:
                raise SpecError("the epilogue adds a residual, but none was given")
            y = y + residual
        else:
            y = _STEPS[step.name](y, *step.params)
    return y


_STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "clamp": lambda y, low, high: torch.clamp(y, low, high),
    "scale": lambda y, factor: y * factor,
}


def product(x: torch.Tensor, weight: torch.Tensor, stored: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T, where a position that is not stored contributes nothing even times Inf or NaN.

    `stored` (bool, like weight) are the positions a format holds, by default those that are not zero: a format of
    blocks also stores the zeros inside its blocks, and those multiply as they do in the dense product.
    """
    bad = ~torch.isfinite(x).all(1)
    if not bool(bad.any()):
        return x @ weight.t()
    kept = weight != 0 if stored is None else stored
    y = torch.where(torch.isfinite(x), x, torch.zeros((), dtype=x.dtype)) @ weight.t()
    y[bad] = _with_infinities(x[bad], torch.where(kept, weight, torch.zeros((), dtype=weight.dtype)), kept)
    return y


def _with_infinities(x: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`product` of rows that hold an Inf or NaN: the finite terms are summed, the kinds of the others counted.

    A sum is NaN when a term is, or when it has infinite terms of both signs; otherwise the infinity it has, if any.
    """
    none = torch.zeros((), dtype=x.dtype)
    y = torch.where(torch.isfinite(x), x, none) @ torch.where(torch.isfinite(weight), weight, none).t()

    def terms(*pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        left, right = (torch.cat([pair[side].float() for pair in pairs], 1) for side in (0, 1))
        return left @ right.t() > 0

    x_up, x_down, w_up, w_down = x == torch.inf, x == -torch.inf, weight == torch.inf, weight == -torch.inf
    up, down, zero = (x > 0) & ~x_up, (x < 0) & ~x_down, (weight == 0) & kept
    rises = terms((x_up, weight > 0), (x_down, weight < 0), (up, w_up), (down, w_down))
    falls = terms((x_up, weight < 0), (x_down, weight > 0), (up, w_down), (down, w_up))
    invalid = terms(
        (x.isnan(), kept), (torch.ones_like(x), weight.isnan()), (x_up | x_down, zero), (x == 0, w_up | w_down)
    )
    y = torch.where(rises, torch.full_like(y, torch.inf), torch.where(falls, torch.full_like(y, -torch.inf), y))
    return torch.where(invalid | (rises & falls), torch.full_like(y, torch.nan), y)


def sample(rows: int, limit: int = SAMPLE) -> torch.Tensor | slice:
    """Which of `rows` rows to check when only `limit` are to be: a quarter at each end, the rest evenly between."""
    if rows <= limit:
        return slice(None)
    edge = limit // 4
    middle = torch.linspace(edge, rows - edge - 1, limit - 2 * edge).long()
    return torch.cat([torch.arange(edge), middle, torch.arange(rows - edge, rows)])


def check(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    steps: Sequence[Step] = (),
    residual: torch.Tensor | None = None,
    stored: torch.Tensor | None = None,
    blur: torch.Tensor | None = None,
) -> Verdict:
    """Compare `y`, a kernel's (..., out) output, with epilogue(x @ weight^T + bias) in float64.

    x (..., in) and weight (out, in) in the kernel's dtype, `stored` as in `product`. NaN must meet NaN and an infinity
    the same infinity. `blur` [batch] is the error that the kernel may make in each activation of a row of x, where it
    quantises them (`Format.blur`); rows that are not finite are then NaN.
    """
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if y.shape != (x.shape[0], weight.shape[0]):
        return Verdict(
            False, float("inf"), f"output has shape {tuple(y.shape)}, expected {(x.shape[0], weight.shape[0])}"
        )
    worst, place = 0.0, (0, 0)
    for start in range(0, x.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        rest = residual.reshape(y.shape)[part] if residual is not None else None
        want = expected(x[part], weight, bias, steps, rest, stored, blur[part] if blur is not None else None)
        part_worst, (row, column) = _worst(want.ratio(y[part]))
        if part_worst > worst:
            worst, place = part_worst, (start + row, column)
    return _verdict(worst, place)


def check_products(
    y: torch.Tensor,
    products: tuple[torch.Tensor, torch.Tensor, int],
    bias: torch.Tensor | None,
    steps: Sequence[Step] = (),
    residual: torch.Tensor | None = None,
) -> Verdict:
    """As `check`, for a weight that is a chain of operands and whose oracle is the chain in float64.

    `products` are the product (batch, out), the same of absolute operands, and how many sums it rounds like: what
    `sparsec.factors.chain.Factored.products` gives. A chain's rounding error is bounded by its absolute operands, and
    an infinity in x meets every one of them.
    """
    exact, size, longest = products
    y = y.reshape(-1, y.shape[-1])
    if y.shape != exact.shape:
        return Verdict(False, float("inf"), f"output has shape {tuple(y.shape)}, expected {tuple(exact.shape)}")
    rest = residual.reshape(y.shape) if residual is not None else None
    return _verdict(*_worst(_bounded(y.dtype, exact.clone(), size.clone(), longest, bias, steps, rest).ratio(y)))


def _worst(ratio: torch.Tensor) -> tuple[float, tuple[int, int]]:
    """The largest entry and where it is."""
    if not ratio.numel():
        return 0.0, (0, 0)
    flat = int(ratio.argmax())
    return float(ratio.max()), (flat // ratio.shape[1], flat % ratio.shape[1])


def _verdict(worst: float, place: tuple[int, int]) -> Verdict:
    row, column = place
    sentence = f"largest error is {worst:.3g} of its bound"
    if worst > 1:
        sentence += f", at row {row} of the input and output feature {column}"
    return Verdict(worst <= 1, worst, sentence)


@dataclass(frozen=True)
class Expected:
    """What a kernel should give: `value` (batch, out) in float64, `bound` the error allowed to each entry."""

    value: torch.Tensor
    bound: torch.Tensor

    def ratio(self, y: torch.Tensor) -> torch.Tensor:
        """Error of `y` (batch, out) over bound, elementwise; Inf where a non-finite value does not meet its like."""
        got = y.double()
        same = (got == self.value) | (got.isnan() & self.value.isnan())
        # A sum that overflows the stored dtype is an infinity there and a large number in the oracle.
        same |= (got == self.value.to(y.dtype).double()) & got.isinf()
        ratio = (got - self.value).abs() / self.bound
        ratio = torch.where(ratio.isnan(), torch.full_like(ratio, float("inf")), ratio)
        return torch.where(same, torch.zeros_like(ratio), ratio)


def expected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    steps: Sequence[Step] = (),
    residual: torch.Tensor | None = None,
    stored: torch.Tensor | None = None,
    blur: torch.Tensor | None = None,
) -> Expected:
    """The float64 oracle of `check` for x (batch, in) and its bound; the kernel's dtype is that of x."""
    wide = weight.double()
    longest = int(torch.count_nonzero(weight, dim=1).max()) if weight.numel() else 0
    exact = product(x.double(), wide, stored)
    # The bound needs few digits, so its absolute product is taken in float32; beside an Inf or NaN it is not used.
    none = torch.zeros(())
    size = torch.where(torch.isfinite(x), x.abs().float(), none) @ weight.abs().float().t()
    size = size.double()
    more = None
    if blur is not None:
        exact[~torch.isfinite(x).all(1)] = float("nan")
        more = blur.double()[:, None] * wide.abs().sum(1)
    return _bounded(x.dtype, exact, size, longest, bias, steps, residual, more)


def _bounded(
    dtype: torch.dtype,
    exact: torch.Tensor,
    size: torch.Tensor,
    longest: int,
    bias: torch.Tensor | None,
    steps: Sequence[Step],
    residual: torch.Tensor | None,
    more: torch.Tensor | None = None,
) -> Expected:
    """A product behind its epilogue: `size` is sum(|a * b|), `more` what it may be off by besides rounding."""
    if bias is not None:
        exact += bias.double()
        size += bias.double().abs()
    for step in steps:
        if step.name == "scale":
            size *= abs(step.params[0])
            more = more * abs(step.params[0]) if more is not None else None
        elif step.name == "add" and residual is not None:
            size += residual.double().abs()
    want = apply_steps(steps, exact, residual.double() if residual is not None else None)
    accumulate = torch.finfo(torch.float32 if dtype != torch.float64 else torch.float64).eps
    rounding = torch.finfo(dtype)
    count = longest + (bias is not None) + len(steps)
    stretch = _SLACK * math.prod(_SLOPES.get(step.name, 1.0) for step in steps)
    bound = stretch * (8 + 2 * count**0.5) * accumulate * size + 2 * rounding.eps * want.abs() + rounding.tiny
    return Expected(want, bound if more is None else bound + stretch * more)
