"""sparsify: a pruned copy of a model, with a record of what was pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsec import codes
from sparsec.errors import SpecError
from sparsec.report import Row
from sparsec.sparsifiers.layers import Layer, Where, find_layers
from sparsec.sparsifiers.parts import Sparsifier, zero_entries

RECORD = "_sparsec_report"
"""Attribute of a pruned model: its report rows as plain dicts, so that it can be pickled anywhere."""


def sparsify(
    model: nn.Module, sparsifier: Sparsifier, *, data: Any = None, where: Where | Iterable[Where] | None = None
) -> nn.Module:
    """A copy of `model` whose selected weights have the zeros that `sparsifier` chooses; the model is not touched.

    `where` selects layers by site name, `"re:..."`, module type, a function of (name, module), or a list of these; by
    default every Linear, convolution and transformers' Conv1D. Biases stay, tied weights are pruned once, and existing
    zeros count. `data` feeds methods that calibrate. `sparsec.report` of the copy lists the pruned layers.

    Raises SpecError for a `where` that selects nothing, and for a model that cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"sparsify takes an nn.Module, got {type(model).__name__}")
    if not isinstance(sparsifier, Sparsifier):
        hint = "; write an instance, e.g. Magnitude(0.9)" if isinstance(sparsifier, type) else ""
        raise SpecError(f"sparsify takes a sparsifier such as Magnitude(0.9), got {sparsifier!r}{hint}")
    if sparsifier.needs_data and data is None:
        raise SpecError(f"{type(sparsifier).__name__} calibrates; pass data=, an iterable of batches")
    try:
        pruned = copy.deepcopy(model)
    except Exception as error:
        raise SpecError(f"{type(model).__name__} cannot be copied, and sparsify never changes it: {error}") from error
    layers = find_layers(pruned, where)
    rows: dict[str, dict[str, Any]] = {row["site"]: row for row in getattr(pruned, RECORD, [])}
    with torch.no_grad():
        for layer, kept in zip(layers, sparsifier.masks(layers, data)):
            rows[layer.site] = _row(layer, sparsifier, _prune(layer.weight, kept))
    setattr(pruned, RECORD, list(rows.values()))
    return pruned


def _prune(weight: torch.Tensor, kept: torch.Tensor) -> float:
    """Set what is not kept to zero in place; returns the norm of that over the norm of the whole."""
    sizes = weight.detach().abs().to("cpu", torch.float32).reshape(-1).numpy()
    whole, lost = float(np.linalg.norm(sizes)), float(np.linalg.norm(sizes[~kept.cpu().reshape(-1).numpy()]))
    weight.masked_fill_(~kept, 0)
    return lost / whole if whole else 0.0


def _row(layer: Layer, sparsifier: Sparsifier, error: float) -> dict[str, Any]:
    """The report row of a pruned layer; `error` is relative to the weight it had, in the Frobenius norm."""
    weight = layer.weight
    size = weight.numel() * weight.element_size()
    return Row(
        site=layer.site, op=layer.op, shape=tuple(weight.shape),
        density=1 - int(zero_entries(weight).sum()) / max(1, weight.numel()), nbytes=size, dense_nbytes=size,
        code=codes.PRUNED, reason=codes.sentence(codes.PRUNED, sparsifier=repr(sparsifier)), error=error,
    ).to_dict()  # fmt: skip
