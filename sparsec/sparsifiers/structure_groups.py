"""Groups of parameter slices that must go together, found by following labels through the captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sparsec.errors import SpecError, nearest
from sparsec.graph import opname, owner
from sparsec.sparsifiers.structure_labels import MOVE, PRUNE, Axis, Relations, Value, compress, place, varying
from sparsec.sparsifiers.structure_products import PRODUCTS
from sparsec.sparsifiers.structure_rules import RULES
from sparsec.sparsifiers.structure_trace import Trace


@dataclass(frozen=True)
class Slice:
    """What each unit of a group owns of one parameter (or buffer): `indices[u]` along dimension `dim`.

    `tied` are further state-dict names of the same tensor.
    """

    parameter: str
    dim: int
    indices: tuple[tuple[int, ...], ...]
    tied: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Resize:
    """A node whose tensor shrinks with its units: `units` holds, for each index along `dim`, the unit it goes with."""

    op: str
    path: str
    where: str
    shape: tuple[int, ...]
    dim: int
    units: np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Origin:
    """What an analysis was made of: the model as it was given, its example, and every tensor that carries units."""

    model: nn.Module
    example: Any
    axes: tuple[Axis, ...]
    resizes: tuple[Resize, ...]


@dataclass(frozen=True)
class Group:
    """Units of equal make-up, e.g. the channels of a layer with everything that must go with each of them.

    `kind` is "channels" or "heads". `blocked` says why units cannot be removed ("" when they can), `fixed` why they
    cannot even be permuted. `chosen` are the units that `shrink` and `zero` take away; `select` and `smallest` set it.
    """

    name: str
    kind: str
    slices: tuple[Slice, ...]
    blocked: str = ""
    fixed: str = ""
    chosen: tuple[int, ...] = ()
    ids: tuple[int, ...] = field(default=(), repr=False)
    origin: Origin | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """How many units there are."""
        return len(self.slices[0].indices)

    @property
    def prunable(self) -> bool:
        """Whether units can be removed exactly."""
        return not self.blocked and self.size > 1

    @property
    def permutable(self) -> bool:
        """Whether units can change places exactly."""
        return not self.fixed and self.size > 1

    def select(self, units: Iterable[int]) -> Group:
        """This group with the units to take away. Raises SpecError when that cannot be done, and says where."""
        wanted = sorted({_unit(u, self) for u in units})
        if self.blocked and wanted:
            raise SpecError(f"group {self.name!r} cannot be pruned: it {self.blocked}")
        if len(wanted) >= self.size:
            raise SpecError(f"group {self.name!r} has {self.size} units, and at least one must stay; got {len(wanted)}")
        return replace(self, chosen=tuple(wanted))

    def smallest(
        self,
        amount: float | int,
        score: str | Callable[[torch.Tensor], torch.Tensor] = "l2",
        model: nn.Module | None = None,
    ) -> Group:
        """This group with the units of smallest score chosen: a fraction below 1, or a number of units.

        `score` is "l1", "l2" or a function of the (units, entries) float64 matrix of `gather`; `model` may be a later
        state of the analysed model (default: that model itself).
        """
        count = round(amount * self.size) if isinstance(amount, float) else amount
        if isinstance(amount, bool) or (isinstance(amount, float) and not 0 <= amount < 1) or count < 0:
            raise SpecError(f"smallest takes a fraction in [0, 1) or a number of units, got {amount!r}")
        rows = self.gather(model)
        if score == "l1":
            scores = rows.abs().sum(1)
        elif score == "l2":
            scores = rows.square().sum(1)
        elif callable(score):
            scores = torch.as_tensor(score(rows))
        else:
            raise SpecError(f"score={score!r} is no score; {nearest(str(score), ('l1', 'l2'))}, or a function")
        if scores.shape != (self.size,) or bool(scores.isnan().any()):
            raise SpecError(f"a score gives one number per unit ({self.size}), got shape {tuple(scores.shape)} or NaN")
        count = min(count, self.size - 1)
        return self.select(torch.sort(scores, stable=True).indices[:count].tolist())

    def empty(self, model: nn.Module) -> Group:
        """This group with the units chosen that are zero throughout in `model`, whatever made them so; one stays."""
        zeros = (self.gather(model) == 0).all(1).nonzero()[:, 0].tolist()
        return self.select(zeros[: self.size - 1])

    def gather(self, model: nn.Module | None = None) -> torch.Tensor:
        """Every parameter entry of each unit, as a float64 matrix (units, entries); buffers are left out."""
        source = model if model is not None else self.origin.model if self.origin is not None else None
        if source is None:
            raise SpecError(f"group {self.name!r} does not know its model; pass model=")
        params = dict(source.named_parameters(remove_duplicate=False))
        rows = []
        for part in self.slices:
            if part.parameter in params:
                index = torch.tensor(part.indices)
                taken = params[part.parameter].detach().to("cpu", torch.float64).movedim(part.dim, 0)[index]
                rows.append(taken.reshape(self.size, -1))
        return torch.cat(rows, 1)

    def __str__(self) -> str:
        state = f"fixed: {self.fixed}" if self.fixed else f"blocked: {self.blocked}" if self.blocked else ""
        state = state or ("prunable" if self.prunable else "a single unit, which must stay")
        taken = f", {len(self.chosen)} chosen" if self.chosen else ""
        parts = ", ".join(f"{s.parameter}[dim {s.dim}]" for s in self.slices)
        return f"{self.name}: {self.size} {self.kind}{taken}; {parts}; {state}"


def _unit(value: Any, group: Group) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < group.size:
        raise SpecError(f"group {group.name!r} has units 0 .. {group.size - 1}, got {value!r}")
    return int(value)


def dependency_groups(model: nn.Module, example_inputs: Any) -> list[Group]:
    """The groups of slices of `model` that must be removed (or permuted) together, in the order of its parameters.

    The model is captured in eval mode on `example_inputs` (a tuple, one tensor, or a dict of keywords) and only read.
    A group that touches an input, an output, a count of its own units or an operator without a rule is in the list too,
    with the reason and its place in `blocked` or `fixed`.

    Raises CaptureError when the model cannot be captured as one graph, InputError when it fails on the example,
    SpecError without example inputs. The idea of minimal removable structures is that of OTO (HESSO).
    """
    from sparsec.capture import capture_whole

    if example_inputs is None or (isinstance(example_inputs, (tuple, list, dict)) and not example_inputs):
        raise SpecError("dependency_groups needs example_inputs: shapes decide which channels meet")
    captured = capture_whole(model, example_inputs)
    trace = Trace(captured.gm, {**RULES, **PRODUCTS}).run()
    units = _settle(trace)
    resizes = tuple(_resizes(trace, units))
    return _assemble(trace, units, Origin(model, captured.example, tuple(trace.relations.axes), resizes))


def _settle(trace: Trace) -> np.ndarray[Any, Any]:
    """Unite until what goes away is the same in every row of every tensor: units vary along one dimension only."""
    relations = trace.relations
    several = [(node, v.labels) for node, v in _labelled(trace) if v.labels is not None and len(varying(v.labels)) > 1]
    while True:
        units = relations.units()
        kept = _kept(relations, units)
        changed = False
        for node, labels in several:
            relations.node = node
            dims = varying(compress(kept[labels]))
            if len(dims) > 1:  # what this decides, decides for later tensors too: solve again first
                relations.collapse(labels, [d for d in varying(labels) if d != dims[0]])
                changed = True
                break
        for node, labels, dim in trace.picks:
            relations.node = node
            if not changed and dim in varying(compress(kept[labels])):
                relations.block(labels, MOVE, "is read at one fixed position")
                changed = True
        if not changed:
            return units


def _kept(relations: Relations, units: np.ndarray[Any, Any]) -> torch.Tensor:
    """Atom -> unit, 0 for those that may not even move: they stay everywhere and need no agreement."""
    stay = np.zeros(int(units.max()) + 1, dtype=bool)
    stay[list(relations.blocked(units, MOVE))] = True
    return torch.from_numpy(np.where(stay[units], 0, units))


def _labelled(trace: Trace) -> Iterator[tuple[fx.Node, Value]]:
    for node, value in trace.values.items():
        if isinstance(value, Value) and value.labels is not None:
            yield node, value


def _resizes(trace: Trace, units: np.ndarray[Any, Any]) -> Iterator[Resize]:
    kept = _kept(trace.relations, units)
    for node, value in _labelled(trace):
        labels = compress(kept[value.labels])
        for dim in varying(labels):
            line = labels
            for other in range(labels.dim()):
                line = line if other == dim else line.narrow(other, 0, 1)
            shape = tuple(labels.shape)
            yield Resize(opname(node), owner(node)[0], place(node), shape, dim, line.reshape(-1).numpy())


def _assemble(trace: Trace, units: np.ndarray[Any, Any], origin: Origin) -> list[Group]:
    relations = trace.relations
    blocked, fixed = relations.blocked(units, PRUNE), relations.blocked(units, MOVE)
    heads = {u for labels in trace.heads for u in np.unique(units[labels.numpy()]).tolist()}
    signature = _signatures(relations.axes, origin.resizes, units)
    together: dict[Any, list[int]] = {}
    for unit in np.unique(units[1:]).tolist():
        key = (int(signature[unit]), blocked.get(unit), fixed.get(unit))
        together.setdefault(key, []).append(unit)
    where = _positions(relations.axes, units)
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for (_, why_blocked, why_fixed), members in together.items():
        if all(relations.axes[n].first in relations.windows for n in where[members[0]]):
            continue
        slices = _slices([where[u] for u in members], relations.axes)
        stem = _stem([relations.axes[n] for n in where[members[0]]], relations)
        taken[stem] = taken.get(stem, 0) + 1
        name = stem if taken[stem] == 1 else f"{stem}#{taken[stem]}"
        kind = "heads" if members[0] in heads else "channels"
        groups.append(Group(name, kind, slices, why_blocked or "", why_fixed or "", (), tuple(members), origin))
    return groups


def _signatures(axes: Sequence[Axis], resizes: Sequence[Resize], units: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A hash per unit of how often it occurs in every parameter and every tensor: equal units can change places."""
    total = np.zeros(int(units.max()) + 1, dtype=np.uint64)
    lines = [units[a.first : a.first + a.size] for a in axes] + [r.units for r in resizes]
    with np.errstate(over="ignore"):
        for key, line in enumerate(lines):
            found, counts = np.unique(line, return_counts=True)
            mixed = (np.uint64(key + 1) << np.uint64(32)) + counts.astype(np.uint64)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            total[found] += mixed ^ (mixed >> np.uint64(31))
    return total


def _positions(axes: Sequence[Axis], units: np.ndarray[Any, Any]) -> dict[int, dict[int, list[int]]]:
    """Unit -> axis number -> its indices along that axis."""
    found: dict[int, dict[int, list[int]]] = {}
    for number, axis in enumerate(axes):
        for position, unit in enumerate(units[axis.first : axis.first + axis.size].tolist()):
            found.setdefault(unit, {}).setdefault(number, []).append(position)
    return found


def _slices(members: Sequence[dict[int, list[int]]], axes: Sequence[Axis]) -> tuple[Slice, ...]:
    return tuple(
        Slice(axes[n].parameter, axes[n].dim, tuple(tuple(m[n]) for m in members), axes[n].tied) for n in members[0]
    )


def _stem(axes: Sequence[Axis], relations: Relations) -> str:
    """The first module that makes the units, else the first that owns any of them."""
    makers = [a for a in axes if a.first in relations.produced]
    name = (makers or list(axes))[0].parameter
    return name.rpartition(".")[0] or name
