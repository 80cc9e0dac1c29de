"""The layers that a sparsifier works on: what `where=` selects, each weight once, seen as an (out, in) matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec.errors import SpecError, nearest
from sparsec.spec import REGEX, matches, normal_key, unmatched

Where = str | type | Callable[[str, nn.Module], bool]
"""A spec pattern (site name, `"re:..."`, module type) or a function of (name, module)."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that may be pruned. `weight` is the parameter itself, `site` the name of the module that owns it."""

    site: str
    kind: str
    weight: torch.Tensor
    transposed: bool = False  # stored as (in, out)
    groups: int = 1  # of a convolution
    bias: torch.Tensor | None = None

    @property
    def op(self) -> str:
        """The op of its report row."""
        kinds = {"Conv1d": "conv1d", "Conv2d": "conv2d", "Conv3d": "conv3d", "Embedding": "embedding"}
        return kinds.get(self.kind, "linear")

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor shaped like the weight as (out * offsets, in): n:m groups lie along the last dimension."""
        matrix = tensor.t() if self.transposed else tensor
        return matrix.movedim(1, -1).reshape(-1, matrix.shape[1])

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`."""
        shape = self.weight.t().shape if self.transposed else self.weight.shape
        matrix = rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return matrix.t() if self.transposed else matrix

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor shaped like the weight as (out, offsets * in), channels fastest: one row per output, as `Stats` has
        its features. For linear layers this is `rows`."""
        return self.rows(tensor).reshape(self.outputs, -1)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `matrix`."""
        inputs = self.weight.shape[0] if self.transposed else self.weight.shape[1]
        return self.from_rows(matrix.reshape(-1, inputs))

    @property
    def outputs(self) -> int:
        """Rows of `matrix`."""
        return int(self.weight.shape[1] if self.transposed else self.weight.shape[0])


def find_layers(model: nn.Module, where: Where | Iterable[Where] | None = None) -> list[Layer]:
    """The layers that `where` selects, in module order, tied weights once.

    None takes every Linear, convolution and transformers' Conv1D, but no weight that an embedding shares. Regexes look
    at those kinds too; an exact name, a type or a function may also pick embeddings and other modules with a weight of
    two or more dimensions.

    Raises SpecError for a pattern that selects nothing, with the nearest names.
    """
    known = _candidates(model)
    usual = _usual(known)
    if where is None:
        chosen = usual
        if not chosen:
            raise SpecError(f"{type(model).__name__} has no Linear or convolution to prune; name modules with where=")
    else:
        chosen = {}
        for pattern in _patterns(where):
            chosen.update(_selected(pattern, known, usual))
    layers: dict[Any, Layer] = {}
    for name in (n for n in known if n in chosen):
        weight = known[name].weight
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride()) if weight.numel() else name
        layers.setdefault(key, _layer(name, known[name]))
    return list(layers.values())


def _layer(name: str, module: Any) -> Layer:
    groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
    bias = module._parameters.get("bias")
    kind = type(module).__name__
    return Layer(name or "<root>", kind, module.weight, _is_conv1d(module), groups, bias)


def _candidates(model: nn.Module) -> dict[str, Any]:
    """Qualified name -> module, for every module with a floating weight of two or more dimensions."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2 and (weight.is_floating_point() or weight.is_complex()):
            found[name] = module
    return found


def _usual(known: dict[str, Any]) -> dict[str, Any]:
    shared = {id(m.weight) for m in known.values() if isinstance(m, nn.Embedding)}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {n: m for n, m in known.items() if (isinstance(m, kinds) or _is_conv1d(m)) and id(m.weight) not in shared}


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer with an (in, out) weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _patterns(where: Any) -> list[Where]:
    if isinstance(where, (str, type)) or callable(where):
        return [where]
    if not isinstance(where, Iterable):
        raise SpecError(f"where={where!r}; valid: a site name, 're:...', a module type, a function, or a list of these")
    found = list(where)
    if not found:
        raise SpecError("where=[] selects nothing; leave it out to prune every Linear and convolution")
    return found


def _selected(pattern: Any, known: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    if callable(pattern) and not isinstance(pattern, type):
        found = {n: m for n, m in known.items() if pattern(n, m)}
        if not found:
            raise SpecError(f"where={pattern!r} is true for no module; {nearest('', known)}")
        return found
    key = normal_key(pattern)
    table = usual if key.startswith(REGEX) else known
    found = {n: m for n, m in table.items() if matches(key, n or "<root>", _type(m))}
    if not found:
        raise SpecError("where: " + unmatched(key, [n or "<root>" for n in table], [_type(m) for m in table.values()]))
    return found


def _type(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
