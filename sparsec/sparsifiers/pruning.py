"""sparsify: a pruned copy of a model, with a record of what was pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sparsec import codes
from sparsec.errors import InputError, SpecError
from sparsec.report import Row
from sparsec.sparsifiers.batches import Calibration
from sparsec.sparsifiers.blocks import prune_by_blocks
from sparsec.sparsifiers.calibration import NOTHING, Watch, quiet
from sparsec.sparsifiers.jobs import run_jobs
from sparsec.sparsifiers.layers import Layer, Where, find_layers
from sparsec.sparsifiers.parts import Problem, Solution, Sparsifier, zero_entries
from sparsec.sparsifiers.stats import Stats

if TYPE_CHECKING:
    from sparsec.sparsifiers.structured import Structured

RECORD = "_sparsec_report"
"""Attribute of a pruned model: its report rows as plain dicts, so that it can be pickled anywhere."""


def sparsify(
    model: nn.Module,
    sparsifier: Sparsifier | Mapping[str, Any] | str | Path,
    *,
    data: Any = None,
    where: Where | Iterable[Where] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """A copy of `model` whose selected weights have the zeros that `sparsifier` chooses; the model is not touched.

    `sparsifier` is one of `sparsec.sparsifiers`, or a recipe: a dict, or the path of a YAML file (`where` then belongs
    into it). `where` selects layers by site name, `"re:..."`, module type, a function of (name, module), or a list of
    these; by default every Linear, convolution and transformers' Conv1D. Tied weights are pruned once, and existing
    zeros count. `data` feeds methods that calibrate: an iterable of batches (tuple = args, dict = kwargs, tensor), or
    `Calibration(batches, ...)` to say more. Layers that the data never reaches stay as they are; `sparsec.report` of
    the copy says so, and lists the pruned ones.

    `inplace` prunes the model itself, for one that does not fit into memory twice; an error then leaves the layers
    pruned so far pruned.

    Raises SpecError for a `where` that selects nothing, and for a model that cannot be copied; InputError for
    calibration data that is empty, not finite, or not what the model takes.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"sparsify takes an nn.Module, got {type(model).__name__}")
    if isinstance(sparsifier, (Mapping, str, Path)):
        from sparsec.sparsifiers.recipes import run_recipe

        if where is not None:
            raise SpecError("a recipe says itself which layers it prunes; write where: into its stages")
        return run_recipe(model, sparsifier, data=data, inplace=inplace)
    if not isinstance(sparsifier, Sparsifier):
        hint = "; write an instance, e.g. Magnitude(0.9)" if isinstance(sparsifier, type) else ""
        raise SpecError(f"sparsify takes a sparsifier such as Magnitude(0.9), got {sparsifier!r}{hint}")
    if sparsifier.needs_data and data is None:
        raise SpecError(f"{type(sparsifier).__name__} calibrates; pass data=, an iterable of batches")
    pruned = model if inplace else copied(model)
    layers = find_layers(pruned, where)
    work = _Work(pruned, sparsifier, Calibration.of(data) if sparsifier.needs_data else None)
    work.run(layers)
    rows = {row["site"]: row for row in getattr(pruned, RECORD, [])} | {x.site: work.rows[x.site] for x in layers}
    setattr(pruned, RECORD, list(rows.values()))
    return pruned


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Raises SpecError for a model that has none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise SpecError(f"{type(model).__name__} cannot be copied, and sparsify never changes it: {error}") from error


class _Work:
    """One call of sparsify: calibrate, allocate, solve the layers' jobs, write the results, note the rows."""

    def __init__(self, model: nn.Module, sparsifier: Sparsifier, calibration: Calibration | None) -> None:
        self.model = model
        self.sparsifier = sparsifier
        self.calibration = calibration
        self.executor: Executor | None = calibration.executor if calibration is not None else None
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self, layers: Sequence[Layer]) -> None:
        from sparsec.sparsifiers.structured import Structured

        if isinstance(self.sparsifier, Structured):
            self.structured(self.sparsifier, layers)
            return
        if self.calibration is None:
            self.prune(layers, {x.site: None for x in layers}, self.sparsifier.zeros(layers))
            return
        needs, mode = self.sparsifier.needs, self.calibration.mode
        if self.sparsifier.allocator.needs_scores:
            if mode == "blocks":
                raise SpecError(
                    f"{self.sparsifier.allocator!r} compares the scores of all layers, which block by block does not "
                    "have; use mode='whole'"
                )
        elif mode != "whole":
            budget = dict(zip((x.site for x in layers), self.sparsifier.zeros(layers)))
            reason = prune_by_blocks(
                self.model, layers, needs, self.calibration,
                lambda part, stats: self.prune(part, stats, [budget[x.site] for x in part]),
            )  # fmt: skip
            if reason is None:
                if all(row["code"] == codes.NEVER_CALLED for row in self.rows.values()):
                    raise InputError(NOTHING)
                return
            if mode == "blocks":
                raise SpecError(f"Calibration(mode='blocks'): {reason}; use mode='whole'")
        stats = self.watched(layers, self.calibration)
        ran = [x for x in layers if stats[x.site] is not None]
        known = dict(zip((x.site for x in ran), self.sparsifier.zeros(ran, stats)))
        self.prune(layers, stats, [known.get(x.site, 0) for x in layers])

    def watched(self, layers: Sequence[Layer], calibration: Calibration) -> dict[str, Stats | None]:
        """The statistics of one pass through the unpruned model."""
        watch = Watch(self.model, layers, self.sparsifier.needs, calibration)
        with quiet(self.model), watch:
            watch.run(calibration.batches())
        return watch.finish()

    def structured(self, sparsifier: Structured, layers: Sequence[Layer]) -> None:
        """Whole units of dependency groups: they cross layers, so they are chosen for all at once."""
        sparsifier.check(self.model)
        stats = {} if self.calibration is None else self.watched(layers, self.calibration)
        before = {x.site: x.weight.detach().clone() for x in layers}
        sparsifier.zero(self.model, sparsifier.choose(layers, stats))
        for layer in layers:
            if self.calibration is not None and stats[layer.site] is None:
                self.rows[layer.site] = _row(layer, codes.NEVER_CALLED, codes.sentence(codes.NEVER_CALLED), 0.0)
                continue
            old = before[layer.site].double()
            error = float((layer.weight.detach().double() - old).norm() / old.norm().clamp(min=1e-300))
            reason = codes.sentence(codes.PRUNED, sparsifier=repr(sparsifier))
            self.rows[layer.site] = _row(layer, codes.PRUNED, reason, error)

    def prune(self, layers: Sequence[Layer], stats: Mapping[str, Stats | None], zeros: Sequence[int]) -> None:
        """Solve the jobs of some layers and write their weights."""
        problems = []
        for layer, count in zip(layers, zeros):
            if self.calibration is not None and stats[layer.site] is None:
                self.rows[layer.site] = _row(layer, codes.NEVER_CALLED, codes.sentence(codes.NEVER_CALLED), 0.0)
            else:
                problems.append(Problem(layer, stats[layer.site], count))
        solutions = run_jobs(self.sparsifier, problems, self.executor)
        with torch.no_grad():
            for problem, solution in zip(problems, solutions):
                layer = problem.layer
                error = _write(layer, solution)
                reason = codes.sentence(codes.PRUNED, sparsifier=repr(self.sparsifier))
                self.rows[layer.site] = _row(layer, codes.PRUNED, "; ".join((reason, *solution.notes)), error)


def _write(layer: Layer, solution: Solution) -> float:
    """Install the solution; returns the norm of the change over the norm of the weight."""
    before = layer.weight.detach()
    gone = (solution.weight.to(before) - before).abs().to("cpu", torch.float32).reshape(-1).numpy()
    whole = float(np.linalg.norm(before.abs().to("cpu", torch.float32).reshape(-1).numpy()))
    lost = float(np.linalg.norm(gone[np.isfinite(gone)]))
    layer.weight.copy_(solution.weight)
    layer.weight.masked_fill_(~solution.kept, 0)
    if solution.bias is not None and layer.bias is not None:
        layer.bias.copy_(solution.bias)
    return lost / whole if whole else 0.0


def _row(layer: Layer, code: str, reason: str, error: float) -> dict[str, Any]:
    """The report row of a layer; `error` is relative to the weight it had, in the Frobenius norm."""
    weight = layer.weight
    size = weight.numel() * weight.element_size()
    row = Row(
        site=layer.site, op=layer.op, shape=tuple(weight.shape),
        density=1 - int(zero_entries(weight).sum()) / max(1, weight.numel()), nbytes=size, dense_nbytes=size,
        code=code, reason=reason, error=error,
    )  # fmt: skip
    return row.to_dict()
