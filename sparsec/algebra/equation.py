"""Reading an einsum: the text, its labels, and the size of every label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.errors import InputError, SpecError

Size = Any
"""An int, or a sympy symbol for a size that is known only when the plan runs."""


@dataclass(frozen=True)
class Equation:
    """`ab,bc->ac`, taken apart: one string of labels per operand, and the labels of the result."""

    inputs: tuple[str, ...]
    output: str

    @staticmethod
    def parse(text: str, ranks: Sequence[int] | None = None) -> Equation:
        """Read an einsum in explicit or implicit form. `ranks` (dimensions per operand) resolve an ellipsis.

        Raises SpecError for malformed text, InputError when an operand has another number of dimensions.
        """
        if not isinstance(text, str):
            raise SpecError(f"an einsum is text such as 'ab,bc->ac', got {type(text).__name__}")
        left, arrow, right = text.replace(" ", "").partition("->")
        if "->" in right:
            raise SpecError(f"einsum {text!r} has two arrows; write it as 'inputs->output'")
        terms = left.split(",")
        if ranks is not None and len(terms) != len(ranks):
            raise InputError(f"einsum {text!r} names {len(terms)} operands, {len(ranks)} were given")
        if "..." in text:
            terms, right, arrow = _expand(text, terms, right, arrow, ranks)
        for term in (*terms, right):
            wrong = [c for c in term if not c.isalpha()]
            if wrong:
                raise SpecError(f"einsum {text!r}: {wrong[0]!r} is no label; labels are letters, one per dimension")
        if not arrow:
            joined = "".join(terms)
            right = "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
        unknown = [c for c in right if c not in left and c not in "".join(terms)]
        if unknown:
            raise SpecError(f"einsum {text!r}: output label {unknown[0]!r} is on no operand")
        if len(set(right)) != len(right):
            raise SpecError(f"einsum {text!r}: an output label occurs twice; use a Delta operand for a diagonal result")
        for position, (term, rank) in enumerate(zip(terms, ranks or ())):
            if len(term) != rank:
                raise InputError(
                    f"einsum {text!r}: operand {position} has {rank} dimensions, its labels {term!r} name {len(term)}"
                )
        return Equation(tuple(terms), right)

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label once, in order of appearance."""
        return tuple(dict.fromkeys("".join(self.inputs)))

    def sizes(self, shapes: Sequence[Sequence[Size]]) -> dict[str, Size]:
        """Label -> size. A size of 1 does not stretch. Raises InputError when two operands disagree."""
        found: dict[str, Size] = {}
        for position, (term, shape) in enumerate(zip(self.inputs, shapes, strict=True)):
            for label, size in zip(term, shape, strict=True):
                if label in found and found[label] != size:
                    raise InputError(
                        f"einsum {self}: label {label!r} is {found[label]} before and {size} on operand {position}"
                    )
                if isinstance(size, int) and size < 1:
                    raise InputError(f"einsum {self}: label {label!r} has size {size}; there is nothing to contract")
                found[label] = size
        return found

    def __str__(self) -> str:
        return f"{','.join(self.inputs)}->{self.output}"


def _expand(
    text: str, terms: list[str], right: str, arrow: str, ranks: Sequence[int] | None
) -> tuple[list[str], str, str]:
    """Replace `...` by letters that the text does not use, aligned at the right as in numpy."""
    if ranks is None:
        raise SpecError(f"einsum {text!r}: an ellipsis needs operands to tell how many dimensions it stands for")
    free = [c for c in map(chr, range(ord("A"), ord("z") + 1)) if c.isalpha() and c not in text]
    widths = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks)]
    if min(widths, default=0) < 0 or max(widths, default=0) > len(free):
        raise InputError(f"einsum {text!r}: an operand has fewer dimensions than labels beside its ellipsis")
    width = max(widths, default=0)
    dots = "".join(free[:width])
    filled = [t.replace("...", dots[width - w :]) for t, w in zip(terms, widths)]
    if not arrow:
        joined = "".join(terms).replace(".", "")
        right = "..." + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return filled, right.replace("...", dots), "->"
