"""Sum: any factors and sparse formats added, such as low rank plus sparse; fitted to each other's residuals in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from sparsec import formats
from sparsec.errors import FormatError, SpecError
from sparsec.factors._base import Factor, Shape, relative_error
from sparsec.factors._contraction import Contraction
from sparsec.factors.sparse import Sparse
from sparsec.formats import Buffers, Format

_SWEEPS = 8
_STALLED = 1e-3  # a sweep that lowers the error by less than this part of it is the last


@dataclass(frozen=True, init=False)
class Sum(Factor):
    """W = the sum of its terms: `Sum(LowRank(64), Sparse(0.95))`, or `LowRank(64) + Sparse(0.95)`.

    A format that says how much it keeps may stand for itself (`LowRank(64) + NM(2, 4)`); one that does not needs to be
    told (`LowRank(64) + Sparse(0.95, CSR())`). Sums of sums are flattened. Buffers carry their term's place:
    `"0_left"`. The fit takes the terms in turn, each fitted to what the others leave (GoDec, Zhou and Tao, 2011), until
    a sweep gains less than a thousandth; the best sweep wins.
    """

    terms: tuple[Factor, ...]

    name: ClassVar[str] = "sum"

    def __new__(cls, *parts: Factor | Format, terms: tuple[Factor | Format, ...] = ()) -> Any:
        """Two formats and no factor are a format: one stores what lies in its order, the other the rest, exactly."""
        if len(parts) == 2 and not terms and all(isinstance(part, Format) for part in parts):
            return formats.Sum(*parts)  # type: ignore[arg-type]  # both were just looked at
        return super().__new__(cls)

    def __init__(self, *parts: Factor | Format, terms: tuple[Factor | Format, ...] = ()) -> None:
        flat: list[Factor] = []
        for part in (*parts, *terms):
            if isinstance(part, Sum):
                flat.extend(part.terms)
            elif isinstance(part, Factor):
                flat.append(part)
            elif isinstance(part, Format):
                flat.append(Sparse(format=part))
            else:
                raise SpecError(f"Sum: {part!r} is neither a factor such as LowRank(64) nor a format such as NM(2, 4)")
        if len(flat) < 2:
            raise SpecError(f"Sum: {len(flat)} term(s); a sum has at least two")
        object.__setattr__(self, "terms", tuple(flat))

    def resolve(self, shape: Shape) -> Sum:
        return Sum(*(t.resolve(shape) for t in self.terms))

    def refuse(self, shape: Shape) -> str | None:
        for term in self.terms:
            if (reason := term.refuse(shape)) is not None:
                return f"{term.text()}: {reason}"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        return {f"{at}_{k}": s for at, term in enumerate(self.terms) for k, s in term.shapes(shape).items()}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        found = []
        for at, term in enumerate(self.terms):
            for c in term.contract(shape):
                renamed = tuple(replace(o, names=tuple(f"{at}_{n}" for n in o.names)) for o in c.operands)
                found.append(replace(c, operands=renamed))
        return tuple(found)

    def reconstruct(self, buffers: Buffers, shape: Shape) -> torch.Tensor:
        parts = [t.reconstruct(own, shape) for t, own in self.parts(buffers, shape)]
        return sum(parts[1:], parts[0])

    def apply(self, x: torch.Tensor, buffers: Buffers, shape: Shape) -> torch.Tensor:
        parts = [t.apply(x, own, shape) for t, own in self.parts(buffers, shape)]
        return sum(parts[1:], parts[0])

    def flops(self, shape: Shape, batch: int) -> int:
        return sum(t.flops(shape, batch) for t in self.terms)

    def nbytes(self, shape: Shape, itemsize: int) -> int:
        return sum(t.nbytes(shape, itemsize) for t in self.terms)

    def validate(self, buffers: Buffers, shape: Shape) -> None:
        expected = tuple(self.resolve(shape).shapes(shape))
        if tuple(buffers) != expected:
            raise FormatError(f"{self.name}: buffers are {tuple(buffers)}, expected {expected} in this order")
        for term, own in self.parts(buffers, shape):
            term.validate(own, shape)

    def accept(self, dense: torch.Tensor) -> torch.Tensor:
        for term in self.terms:
            wide = term.accept(dense)
        return wide

    def parts(self, buffers: Buffers, shape: Shape) -> list[tuple[Factor, Buffers]]:
        """Each resolved term with its own buffers under their own names."""
        found = []
        for at, term in enumerate(self.terms):
            chosen = term.resolve(shape)
            found.append((chosen, {k: buffers[f"{at}_{k}"] for k in chosen.shapes(shape)}))
        return found

    def solve(self, weight: torch.Tensor) -> Buffers:
        return self._alternate(weight, None)

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        return self._alternate(weight, gram)

    def slice(self, buffers: Buffers, rank: Any) -> tuple[Factor, Buffers]:
        raise SpecError(f"{self.text()}: the terms were fitted to each other; fit the smaller sum instead")

    def _alternate(self, weight: torch.Tensor, gram: torch.Tensor | None) -> Buffers:
        shape = tuple(weight.shape)
        built: list[torch.Tensor] = [torch.zeros_like(weight) for _ in self.terms]
        found: list[Buffers] = [{} for _ in self.terms]
        best: Buffers = {}
        least = float("inf")
        for _ in range(_SWEEPS):
            for at, term in enumerate(self.terms):
                rest = weight - sum((b for i, b in enumerate(built) if i != at), torch.zeros_like(weight))
                found[at] = term.solve(rest) if gram is None else term.solve_gram(rest, gram)
                built[at] = term.reconstruct(found[at], shape)
            error = relative_error(weight, sum(built[1:], built[0]), gram)
            stalled = error > least * (1.0 - _STALLED)
            if error < least or not best:
                least = error
                best = {f"{at}_{k}": t for at, own in enumerate(found) for k, t in own.items()}
            if stalled or error == 0.0:
                break
        return best
