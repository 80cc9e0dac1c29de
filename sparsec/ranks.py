"""Ranks for a whole network: `choose_ranks(model, LowRank, parameters=0.3)` is the spec of least loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsec.errors import SpecError
from sparsec.factors import Factor
from sparsec.factors.select import COSTS, Option, choose, choose_for_error, dense_cost, low_rank_options, tail_energy
from sparsec.spec import Spec

if TYPE_CHECKING:
    from sparsec.sparsifiers.layers import Layer, Where

SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Ranks that are offered, as parts of the smaller side of a weight; rounded to whole vectors of 8 where it has them."""


def choose_ranks(
    model: nn.Module,
    family: Callable[[int], Factor],
    *,
    error: float | None = None,
    parameters: float | None = None,
    flops: float | None = None,
    nbytes: float | None = None,
    milliseconds: float | None = None,
    where: Where | Iterable[Where] | None = None,
    data: Any = None,
    ranks: Sequence[int] | None = None,
    batch: int = 1,
) -> Spec:
    """A Spec that gives every selected layer `family(rank)` at a rank of its own, or None where it stays dense.

        spec = sparsec.choose_ranks(model, sparsec.LowRank, parameters=0.3, data=batches)
        fast = sparsec.compile(model, spec, example_inputs)

    Exactly one limit: `error`, the largest relative error over all selected layers together, at the fewest parameters;
    or a budget for all of them together, at the least error: `parameters`, `flops` (on `batch` rows), `nbytes` (in
    float32) or `milliseconds` (of `batch` rows: compiled and measured on this machine). A budget below 1 is a share of
    what the dense layers cost. A multiple-choice knapsack over one fit for each layer and rank decides.

    `family` maps a rank to a Factor: `LowRank`, or `lambda r: LowRank(r) + Sparse(0.95)`; for convolutions for example
    `lambda r: Tucker((r, r))`, with `error`, `parameters` or `nbytes`. `where` selects layers as in `sparsify`; `ranks`
    are those to try in place of eight shares of each weight's smaller side. With `data`, batches as in `sparsify`, the
    errors that count are those of the layers' outputs on it.

    Raises SpecError for no limit or several, for one that no choice meets, and for layers that cannot be counted.
    """
    from sparsec.sparsifiers.layers import find_layers

    cost, limit = _limit(
        error=error, parameters=parameters, flops=flops, nbytes=nbytes, milliseconds=milliseconds
    )  # fmt: skip
    layers = find_layers(model, where)
    _check(layers, cost)
    grams = _grams(model, layers, data)
    offers: dict[str, list[Option]] = {}
    clock = _Clock(batch) if cost == "milliseconds" else None
    whole = 0.0
    for layer in layers:
        weight, gram = layer.weight.detach(), grams.get(layer.site)
        weight = weight.t() if layer.transposed else weight
        found = low_rank_options(
            weight, family, ranks or _ranks(weight), "parameters" if clock else cost, batch=batch, gram=gram
        )
        if clock is not None:
            found = [
                Option(o.factor, clock(tuple(weight.shape), o.factor, layer.bias is not None), o.loss) for o in found
            ]
        offers[layer.site] = found
        whole += float(tail_energy(weight, gram)[0])
    if error is not None:
        picked = choose_for_error(offers, limit * whole**0.5)
    else:
        dense = sum(o[0].cost for o in offers.values())
        picked = choose(offers, limit * dense if limit < 1 else limit)
    return Spec({site: option.factor for site, option in picked.items()})


def _limit(**limits: float | None) -> tuple[str, float]:
    """What is counted, and how much of it is allowed."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(f"{n}=" for n in limits)
        raise SpecError(f"choose_ranks takes exactly one of {names} got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise SpecError(f"{name}={value!r} must be a positive number")
    return ("parameters" if name == "error" else name), float(value)


def _check(layers: Sequence[Layer], cost: str) -> None:
    for layer in layers:
        if layer.groups != 1:
            raise SpecError(f"layer {layer.site!r} is a convolution of {layer.groups} groups; leave it out with where=")
        if layer.weight.dim() > 2 and cost in ("flops", "milliseconds"):
            raise SpecError(
                f"layer {layer.site!r} is a convolution, whose {cost} depend on its image; "
                "give parameters=, nbytes= or error=, or leave it out with where="
            )


def _ranks(weight: torch.Tensor) -> list[int]:
    least = min(weight.shape[:2]) if weight.dim() > 2 else min(weight.shape)
    step = 8 if least >= 64 else 1
    return sorted({max(1, int(share * least) // step * step) for share in SHARES})


def _grams(model: nn.Module, layers: Sequence[Layer], data: Any) -> dict[str, torch.Tensor]:
    """X^T X of the layers' inputs, features as factors have them: channels before offsets. None seen: left out."""
    if data is None:
        return {}
    from sparsec.sparsifiers.calibration import calibrate

    sites = ["" if layer.site == "<root>" else layer.site for layer in layers]
    stats = calibrate(model, data, needs=("gram",), where=lambda name, module: name in sites)
    found = {}
    for layer in layers:
        known = stats.get(layer.site)
        if known is None:
            continue
        gram = known.get("gram")[0]
        if layer.weight.dim() > 2:
            offsets = prod(layer.weight.shape[2:])
            order = torch.arange(gram.shape[0]).reshape(offsets, -1).t().reshape(-1)
            gram = gram[order][:, order]
        found[layer.site] = gram
    return found


class _Clock:
    """Milliseconds of a linear layer as `compile` would run it, measured once for each shape and factor."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._known: dict[Any, float] = {}

    def __call__(self, shape: tuple[int, ...], factor: Factor | None, bias: bool) -> float:
        key = (shape, factor, bias)
        if key not in self._known:
            if factor is None:
                self._known[key] = dense_cost(torch.empty(shape), "milliseconds", self.batch)
            else:
                self._known[key] = self._compiled(shape, factor, bias)
        return self._known[key]

    def _compiled(self, shape: tuple[int, ...], factor: Factor, bias: bool) -> float:
        from sparsec.api import analyze

        layer = nn.Linear(shape[1], shape[0], bias).eval().requires_grad_(False)
        (row,) = analyze(layer, factor, (torch.randn(self.batch, shape[1]),)).rows
        us = row.us
        if us is None:
            raise SpecError(f"{factor.text()} was not timed on {shape}: {row.reason}")
        return us / 1e3


__all__ = ["COSTS", "choose_ranks"]
