"""HESSO: prune groups while the model trains, fading the least important to exactly zero, then shrink it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sparsec.errors import SpecError
from sparsec.sparsifiers.allocators import check_sparsity
from sparsec.sparsifiers.group_scores import hesso_scores
from sparsec.sparsifiers.schedules import Decay
from sparsec.sparsifiers.structure_groups import Group
from sparsec.sparsifiers.structure_shrink import fits


class Hesso:
    """Structured pruning during training (Chen et al., HESSO, 2024), in place, under the user's own optimiser.

        pruner = Hesso(model, dependency_groups(model, example), 0.5, begin=100, periods=5, steps=20)
        for x, y in batches:
            loss(model(x), y).backward(); optimizer.step(); pruner.step(); optimizer.zero_grad()
        small = shrink(model, pruner.chosen)

    Every `steps` steps from `begin` on, `periods` times, the units of least `hesso_scores` of all prunable groups join
    the redundant ones, an equal number each time; their parameters are multiplied by (T-t-1)/(T-t) at step t of their
    period, T = `steps`, whose product is exactly 0, and stay zero from then on. The others train as they would. In the
    end round(share * units) units are zero, and every group has one left at least.

    Raises SpecError for a share outside [0, 1), groups of another model, or a share that would empty every group.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        share: float,
        *,
        begin: int = 0,
        periods: int = 1,
        steps: int = 10,
    ) -> None:
        self.groups = [g for g in groups if g.prunable]
        self.total = sum(g.size for g in self.groups)
        self.target = round(check_sparsity("Hesso", share) * self.total)
        if begin < 0 or periods < 1:
            raise SpecError(f"Hesso: begin={begin!r}, periods={periods!r}; begin is not negative, periods is positive")
        if self.target > self.total - len(self.groups):
            raise SpecError(
                f"Hesso: {share:g} of {self.total} units leaves no unit in some of {len(self.groups)} groups"
            )
        fits(model, self.groups)
        self.begin, self.periods, self.decay = begin, periods, Decay(steps)
        self.now = 0
        self._params = dict(model.named_parameters(remove_duplicate=False))
        self._gone: list[set[int]] = [set() for _ in self.groups]
        self._fading: list[tuple[int, int]] = []
        self._started = 0

    @property
    def chosen(self) -> list[Group]:
        """The groups with their redundant units chosen: what `shrink` takes, once `done`."""
        return [g.select(gone) for g, gone in zip(self.groups, self._gone, strict=True) if gone]

    @property
    def done(self) -> bool:
        """Whether every unit of the target is exactly zero."""
        return self.now >= self.begin + self.periods * self.decay.steps

    @torch.no_grad()
    def step(self) -> None:
        """Call after every optimiser step, while the gradients of that step are still there."""
        since = self.now - self.begin
        if since >= 0 and since % self.decay.steps == 0 and since // self.decay.steps < self.periods:
            self._choose(since // self.decay.steps)
            self._started = self.now
        fading = set(self._fading)
        for number, gone in enumerate(self._gone):
            now = {u for u in gone if (number, u) in fading}
            self._scale(number, now, self.decay.factor(self.now - self._started))
            self._scale(number, gone - now, 0.0)  # an optimiser's momentum must not revive them
        self.now += 1

    def _choose(self, period: int) -> None:
        wanted = self.target * (period + 1) // self.periods - sum(map(len, self._gone))
        rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        places: list[tuple[int, int]] = []
        for number, group in enumerate(self.groups):
            weights, grads = self._units(group, False), self._units(group, True)
            for unit in range(group.size):
                if unit not in self._gone[number]:
                    rows.append([(weights[unit], grads[unit])])
                    places.append((number, unit))
        self._fading = []
        if wanted <= 0:
            return
        for index in hesso_scores(rows).argsort(stable=True).tolist():
            number, unit = places[index]
            if len(self._gone[number]) + 1 < self.groups[number].size and len(self._fading) < wanted:
                self._gone[number].add(unit)
                self._fading.append((number, unit))

    def _units(self, group: Group, grads: bool) -> torch.Tensor:
        """Every parameter entry (or its gradient) of each unit: [units, entries]."""
        parts = []
        for part in group.slices:
            found = self._params.get(part.parameter)
            if found is not None:
                value = found if not grads else torch.zeros_like(found) if found.grad is None else found.grad
                parts.append(value.detach().movedim(part.dim, 0)[torch.tensor(part.indices)].flatten(1))
        return torch.cat(parts, 1)

    def _scale(self, number: int, units: set[int], factor: float) -> None:
        if not units:
            return
        for part in self.groups[number].slices:
            found = self._params.get(part.parameter)
            if found is not None:
                index = torch.tensor([i for u in sorted(units) for i in part.indices[u]], device=found.device)
                kept = found.detach().index_select(part.dim, index) * factor
                found.index_copy_(part.dim, index, kept)


__all__ = ["Hesso"]
