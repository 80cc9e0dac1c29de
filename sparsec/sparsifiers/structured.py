"""Dependency groups as a granularity: whole channels and heads go, with everything that must go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsec.errors import SpecError
from sparsec.sparsifiers.allocators import Allocator, EqualShare, check_sparsity
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.parts import Sparsifier
from sparsec.sparsifiers.scores import AbsValue, Score
from sparsec.sparsifiers.stats import Stats
from sparsec.sparsifiers.structure_groups import Group
from sparsec.sparsifiers.structure_shrink import fits

SCOPES = ("group", "global")
ABS_VALUE = AbsValue()


@dataclass(frozen=True, repr=False)
class Structured(Sparsifier):
    """Zero whole units of dependency groups: filters, channels, attention heads.

        groups = dependency_groups(model, example)
        pruned = sparsify(model, Structured(0.5, tuple(groups), rank=Taylor()), data=Calibration(batches, loss=loss))
        small = shrink(pruned, [g.empty(pruned) for g in groups if g.prunable])

    A unit is worth the mean of `rank` over the entries that it owns in the selected layers' weights. `scope` is
    "group", round(share * units) of each group, or "global", the same share of all units by one ranking, at least one
    unit of every group staying. Groups that no selected layer takes part in stay as they are.

    Raises SpecError for a share outside [0, 1), and for groups that do not fit the model.
    """

    share: float
    groups: tuple[Group, ...]
    rank: Score = ABS_VALUE
    scope: str = "group"

    def __post_init__(self) -> None:
        check_sparsity("Structured", self.share)
        object.__setattr__(self, "groups", tuple(self.groups))
        if self.scope not in SCOPES:
            raise SpecError(f"Structured: scope={self.scope!r}; valid: {', '.join(map(repr, SCOPES))}")
        wrong = next((g for g in self.groups if not isinstance(g, Group)), None)
        if wrong is not None or not any(g.prunable for g in self.groups):
            raise SpecError(f"Structured takes groups of dependency_groups, a prunable one among them, got {wrong!r}")

    @property
    def score(self) -> Score:
        return self.rank

    @property
    def allocator(self) -> Allocator:
        return EqualShare(self.share)

    def check(self, model: nn.Module) -> None:
        """Raise SpecError when a group does not fit the model."""
        fits(model, [g for g in self.groups if g.prunable])

    def choose(self, layers: Sequence[Layer], stats: Mapping[str, Stats | None] | None = None) -> list[Group]:
        """The groups with the units to take away chosen."""
        known, table = stats or {}, dict[str, torch.Tensor]()
        for layer in layers:
            if not self.needs or known.get(layer.site) is not None:
                name = "weight" if layer.site == "<root>" else f"{layer.site}.weight"
                table[name] = self.rank(layer, known.get(layer.site)).double()
        worth = {i: w for i, g in enumerate(self.groups) if g.prunable and (w := _worth(g, table)) is not None}
        if self.scope == "group":
            drop = {i: w.argsort(stable=True)[: round(self.share * len(w))].tolist() for i, w in worth.items()}
        else:
            drop = _globally(worth, self.share)
        return [self.groups[i].select(units[: self.groups[i].size - 1]) for i, units in drop.items() if units]

    def zero(self, model: nn.Module, chosen: Sequence[Group]) -> None:
        """Set the parameters of the chosen units to zero, in place."""
        params = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for group in chosen:
                for part in group.slices:
                    if part.parameter in params:
                        index = torch.tensor([i for u in group.chosen for i in part.indices[u]])
                        params[part.parameter].index_fill_(part.dim, index.to(params[part.parameter].device), 0)

    def __repr__(self) -> str:
        return f"Structured({self.share!r}, {len(self.groups)} groups, rank={self.rank!r}, scope={self.scope!r})"


def _worth(group: Group, table: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Mean score of each unit's entries, float64 [units]; None when no scored weight has any."""
    total, count = torch.zeros(group.size, dtype=torch.float64), 0
    for part in group.slices:
        if part.parameter in table:
            own = table[part.parameter].cpu().movedim(part.dim, 0)[torch.tensor(part.indices)].flatten(1)
            total, count = total + own.sum(1), count + own.shape[1]
    return total / count if count else None


def _globally(worth: Mapping[int, torch.Tensor], share: float) -> dict[int, list[int]]:
    ranked = sorted((value, i, u) for i, w in worth.items() for u, value in enumerate(w.tolist()))
    left, drop = round(share * len(ranked)), {i: list[int]() for i in worth}
    for _, i, unit in ranked:
        if left and len(drop[i]) + 1 < len(worth[i]):
            drop[i].append(unit)
            left -= 1
    return drop


__all__ = ["Structured"]
