"""Stored: a fitted factor as the storage of a weight; what the formats of linears, convolutions and others share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from sparsec.errors import FormatError, SpecError
from sparsec.factors._base import Factor, Shape, canonical
from sparsec.formats import Buffers, Format

_T = TypeVar("_T", bound="Stored")


@dataclass(frozen=True)
class Stored(Format):
    """A weight of shape `weight` held as `factor`, which is resolved; as a matrix it is (first size, all others).

    Not formats of a Spec: `passes.factor` makes them for the factors in one, each for one kind of product.
    """

    factor: Factor

    exact: ClassVar[bool] = False

    if TYPE_CHECKING:  # a field of some, a property of others; here it would become that field's default

        @property
        def weight(self) -> Shape:
            """The shape of the weight that the site reads."""

    @property
    def seen(self) -> Shape:
        """The shape that the factor sees."""
        return self.weight

    @property
    def shape(self) -> Shape:
        """Of the matrix."""
        return self.weight[0], prod(self.weight[1:])

    @property
    def features(self) -> Shape:
        """(out, in) of a kernel's KernelSpec."""
        return self.shape

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the factor
        return tuple(self.factor.shapes(self.seen))

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if tuple(dense.shape) != self.shape:
            return f"it has shape {tuple(dense.shape)}, {self.text()} is for {self.shape}"
        try:
            for part in self.parts(dense):
                self.factor.accept(part)
        except FormatError as error:
            return str(error)
        return None

    def parts(self, dense: torch.Tensor) -> list[torch.Tensor]:
        """The weights, each of the shape `seen`, that the factor is fitted to."""
        return [dense.reshape(self.seen)]

    def fit(self, dense: torch.Tensor, gram: torch.Tensor | None = None) -> Buffers:
        """The buffers of a fit to the matrix `dense`, as this format keeps them; `gram` as in `Factor.fit`."""
        (part,) = self.parts(dense)
        return self.store(self.factor.fit(part, gram).buffers)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        """Fit the factor to the matrix `dense`; a lossy step. Raises FormatError when the factor refuses."""
        if mask is not None:
            raise FormatError(f"{self.text()} has no pattern: leave the mask out")
        if (reason := self.refuse(dense)) is not None:
            raise FormatError(reason)
        return self.fit(dense)

    def store(self, fitted: Buffers) -> Buffers:
        """The buffers of a fit, as this format keeps them."""
        return {key: fitted[key] for key in self.buffers}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        dtype = buffers[self.buffers[0]].dtype
        return self.factor.reconstruct(widened(buffers), self.seen).reshape(rows, cols).to(dtype)

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return torch.ones(rows, cols, dtype=torch.bool)

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        if (rows, cols) != self.shape:
            raise FormatError(f"{self.text()} holds a weight of {self.shape}, not of {(rows, cols)}")
        self.check(buffers)

    def check(self, buffers: Buffers) -> None:
        """Raise FormatError unless these are buffers of the factor, as this format keeps them."""
        self.factor.validate(buffers, self.seen)

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return self.factor.nbytes(self.seen, itemsize)

    def stored(self, dense: torch.Tensor) -> int:
        rows, cols = self.shape
        return self.nbytes(rows, cols, 0, 1)

    def fields(self) -> dict[str, Any]:
        """Nothing: kernels that are no templates read the factor itself."""
        return {}

    def resolve(self: _T, rows: int, cols: int) -> _T:
        return self

    def text(self) -> str:
        inner = ",".join(f"{f.name}={canonical(getattr(self, f.name))}" for f in dataclasses.fields(self))
        return f"{self.name}({inner})"

    def sizes(self) -> tuple[int, ...]:
        """Every number that the text gives beside the factor's own."""
        raise SpecError(f"{type(self).__name__} does not define sizes()")

    @classmethod
    def parse(cls: type[_T], text: str) -> _T:
        """The inverse of `text`. Raises SpecError for other text, and for weights that the factor cannot hold."""
        from sparsec.factors._text import read

        made = read(text, {cls.name: cls})
        if not isinstance(made, cls) or not isinstance(made.factor, Factor):
            raise SpecError(f"not the text of a factored weight: {text[:120]!r}")
        try:
            good = all(type(n) is int and 0 <= n < 2**33 for n in made.sizes()) and made.text() == text
            refusal = made.factor.refuse(made.seen) if good else "its sizes are no sizes"
        except (TypeError, IndexError, ValueError) as error:
            raise SpecError(f"not the text of a factored weight: {text[:120]!r} ({error})") from error
        if refusal or made.factor.resolve(made.seen) != made.factor:
            raise SpecError(f"not the text of a factored weight: {text[:120]!r} {refusal or 'has open fields'}")
        return made


def parse_stored(text: str) -> Stored | None:
    """The storage that a text names, or None where it names none of these. Raises SpecError for bad text of one."""
    from sparsec.factors.batch_chain import FactoredBatch
    from sparsec.factors.chain import Factored
    from sparsec.factors.conv_chain import FactoredConv
    from sparsec.factors.rows_chain import FactoredRows

    known: tuple[type[Stored], ...] = (Factored, FactoredConv, FactoredRows, FactoredBatch)
    found = next((cls for cls in known if text.startswith(f"{cls.name}(")), None)
    return None if found is None else found.parse(text)


def widened(buffers: Buffers) -> Buffers:
    """Values in float64, indices as they are."""
    return {key: t.double() if t.is_floating_point() else t for key, t in buffers.items()}


def sums(steps: float, terms: int = 1) -> int:
    """The n with 8 + 2 sqrt(n) = `steps`, sum_s (8 + 2 sqrt(n_s)) over the stages of a chain, and one for each term."""
    return int(((steps - 8) / 2) ** 2) + terms
