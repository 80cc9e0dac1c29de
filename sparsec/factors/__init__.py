"""Structured factorisations of dense weights: one frozen descriptor per file, found by name with `factor_class`."""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsec.errors import SpecError, nearest
from sparsec.factors._base import Factor, Fit, Shape
from sparsec.factors._contraction import Contraction, Operand

if TYPE_CHECKING:
    from sparsec.factors._text import parse
    from sparsec.factors.block_diagonal import BlockDiagonal
    from sparsec.factors.block_term import BlockTerm
    from sparsec.factors.butterfly import Butterfly
    from sparsec.factors.circulant import Circulant
    from sparsec.factors.cp import CP
    from sparsec.factors.dictionary import Dictionary
    from sparsec.factors.kronecker import Kronecker
    from sparsec.factors.low_rank import LowRank
    from sparsec.factors.monarch import Monarch
    from sparsec.factors.product import Product
    from sparsec.factors.separable import Separable
    from sparsec.factors.sparse import Sparse
    from sparsec.factors.sparse_product import SparseProduct
    from sparsec.factors.sums import Sum
    from sparsec.factors.tensor_network import TensorNetwork
    from sparsec.factors.tensor_ring import TensorRing
    from sparsec.factors.tensor_train import TensorTrain
    from sparsec.factors.tucker import Tucker

_BUILT_IN = {  # class -> its module, which is also its name in canonical text; loaded when first asked for
    "LowRank": "low_rank",
    "Monarch": "monarch",
    "Kronecker": "kronecker",
    "BlockDiagonal": "block_diagonal",
    "Butterfly": "butterfly",
    "Tucker": "tucker",
    "TensorTrain": "tensor_train",
    "CP": "cp",
    "TensorRing": "tensor_ring",
    "BlockTerm": "block_term",
    "Separable": "separable",
    "Sparse": "sparse",
    "TensorNetwork": "tensor_network",
    "Circulant": "circulant",
    "Dictionary": "dictionary",
    "SparseProduct": "sparse_product",
    "Product": "product",
    "Sum": "sums",
}
_NAMES = {"sum" if module == "sums" else module: cls for cls, module in _BUILT_IN.items()}
_REGISTERED: dict[str, type[Factor]] = {}


def factor_names() -> list[str]:
    """The names of all factors in canonical text."""
    return [*_NAMES, *_REGISTERED]


def factor_class(name: str) -> type[Factor]:
    """The class behind a name in canonical text: `factor_class("low_rank") is LowRank`. Raises SpecError."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _NAMES:
        raise SpecError(f"unknown factor {name!r}; {nearest(name, factor_names())}")
    found: type[Factor] = getattr(import_module(f"sparsec.factors.{_BUILT_IN[_NAMES[name]]}"), _NAMES[name])
    return found


def register_factor(cls: type[Factor]) -> None:
    """Add a user's factor under `cls.name`. Raises SpecError for a bad or taken name."""
    from sparsec.formats import FORMATS

    if not re.fullmatch(r"[a-z][a-z0-9_]*", cls.name):
        raise SpecError(f"{cls.__name__}.name is {cls.name!r}, not a lower-case identifier such as 'low_rank'")
    if cls.name in factor_names() or cls.name in FORMATS:
        raise SpecError(f"the name {cls.name!r} is taken by another factor or format; choose another")
    _REGISTERED[cls.name] = cls


def __getattr__(name: str) -> Any:
    if name in _BUILT_IN:
        return getattr(import_module(f"sparsec.factors.{_BUILT_IN[name]}"), name)
    if name == "parse":
        return import_module("sparsec.factors._text").parse
    raise AttributeError(f"module 'sparsec.factors' has no attribute {name!r}")


__all__ = [
    "CP",
    "BlockDiagonal",
    "BlockTerm",
    "Butterfly",
    "Circulant",
    "Contraction",
    "Dictionary",
    "Factor",
    "Fit",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Operand",
    "Product",
    "Separable",
    "Shape",
    "Sparse",
    "SparseProduct",
    "Sum",
    "TensorNetwork",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "factor_class",
    "factor_names",
    "parse",
    "register_factor",
]
