"""Sparsifiers inside a training loop: gradual pruning, sparse updates, selective decay, fair accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsec.errors import InputError, SpecError
from sparsec.sparsifiers.layers import Layer, Where, find_layers
from sparsec.sparsifiers.parts import Sparsifier
from sparsec.sparsifiers.schedules import Decay, Schedule
from sparsec.sparsifiers.stats import Stats


class Gradual:
    """Prune a model while it trains, following a schedule; changes the model in place.

        pruner = Gradual(model, Magnitude, Cubic(0.9, begin=100, end=800, every=50))      # GMP
        for x, y in batches:
            ...; optimizer.step(); pruner.step()

    `method` makes a sparsifier of a sparsity, or of an allocator when `allocate` turns the sparsity into one
    (`allocate=ERK`). At every due step masks are chosen anew among what is left; after every step what is masked is set
    back to zero, so an optimiser's momentum cannot revive it. With `decay`, newly dropped entries shrink to zero over
    its steps. `stats` feeds methods that calibrate; refresh it as often as you like.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Callable[[Any], Sparsifier],
        schedule: Schedule,
        *,
        where: Where | Iterable[Where] | None = None,
        allocate: Callable[[float], Any] | None = None,
        decay: Decay | None = None,
        stats: Mapping[str, Stats | None] | None = None,
    ) -> None:
        self.layers = find_layers(model, where)
        self.method = method
        self.schedule = schedule
        self.allocate = allocate
        self.decay = decay
        self.stats = dict(stats or {})
        self.now = 0
        self.masks = {x.site: torch.ones_like(x.weight, dtype=torch.bool) for x in self.layers}
        self._fading: list[tuple[int, dict[str, torch.Tensor]]] = []

    @property
    def sparsity(self) -> float:
        """Share of entries that are masked now."""
        total = sum(m.numel() for m in self.masks.values())
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / max(1, total)

    @torch.no_grad()
    def step(self) -> bool:
        """Call after every optimiser step. Returns whether masks were chosen anew."""
        due = self.schedule.due(self.now)
        if due:
            self._choose()
        self._apply()
        self.now += 1
        return due

    def _choose(self) -> None:
        target = self.schedule.sparsity(self.now)
        sparsifier = self.method(self.allocate(target) if self.allocate is not None else target)
        seen = []
        for layer in self.layers:  # what is fading already counts as gone
            weight = layer.weight.detach().masked_fill(~self.masks[layer.site], 0)
            seen.append(replace(layer, weight=weight))
        fresh = {}
        for layer, kept in zip(seen, sparsifier.masks(seen, self.stats)):
            fresh[layer.site] = self.masks[layer.site] & ~kept
            self.masks[layer.site] = kept & self.masks[layer.site]
        if self.decay is not None:
            self._fading.append((self.now, fresh))

    def _apply(self) -> None:
        alive: dict[str, torch.Tensor] = {}
        for start, fresh in self._fading:
            factor = self.decay.factor(self.now - start) if self.decay is not None else 0.0
            for layer in self.layers:
                if factor:
                    layer.weight[fresh[layer.site]] *= factor
                    alive[layer.site] = alive.get(layer.site, torch.zeros_like(fresh[layer.site])) | fresh[layer.site]
        if self.decay is not None:
            self._fading = [(s, f) for s, f in self._fading if self.decay.factor(self.now - s)]
        for layer in self.layers:
            gone = ~self.masks[layer.site]
            layer.weight.masked_fill_(gone & ~alive[layer.site] if layer.site in alive else gone, 0)


class SparseUpdate:
    """Train only the entries that `masks` (site -> bool, or a sparsifier's choice) marks: a FISH mask (Sung et al.,
    Training Neural Networks with Fixed Sparse Masks, NeurIPS 2021). All other parameters keep every bit.

    Call `step()` after the optimiser's. `delta()` is the trained difference: k values and k indices.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.masks = dict(masks)
        layers = {x.site: x for x in find_layers(model, list(masks))}
        missing = [site for site in masks if site not in layers]
        if missing:
            raise SpecError(f"SparseUpdate: no layer {missing[0]!r}")
        self.layers: dict[str, Layer] = layers
        owned = {layers[site].weight.data_ptr() for site in masks}
        self._base = {n: p.detach().clone() for n, p in model.named_parameters()}
        self._masked = {n: p.data_ptr() in owned for n, p in model.named_parameters()}
        self._start = {site: layers[site].weight.detach().clone() for site in masks}

    @classmethod
    def top(cls, model: nn.Module, scores: Mapping[str, torch.Tensor], share: float) -> SparseUpdate:
        """The best `share` of all scored entries, e.g. of the Fisher information, over all layers at once."""
        if not 0 < share <= 1:
            raise SpecError(f"SparseUpdate: share={share!r} is not in (0, 1]")
        flat = torch.cat([s.reshape(-1) for s in scores.values()])
        taken = torch.zeros(len(flat), dtype=torch.bool)
        taken[flat.argsort(descending=True, stable=True)[: max(1, round(share * len(flat)))]] = True
        parts = taken.split([s.numel() for s in scores.values()])
        return cls(model, {site: part.reshape(s.shape) for (site, s), part in zip(scores.items(), parts)})

    @torch.no_grad()
    def step(self) -> None:
        """Set every entry outside the masks back to its first value."""
        for name, parameter in self.model.named_parameters():
            if not self._masked[name]:
                parameter.copy_(self._base[name])
        for site, mask in self.masks.items():
            weight = self.layers[site].weight
            weight.copy_(torch.where(mask, weight, self._start[site]))

    def delta(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Site -> (flat int32 indices, trained values); 8 bytes an entry for float32 weights."""
        found = {}
        for site, mask in self.masks.items():
            places = mask.reshape(-1).nonzero()[:, 0]
            found[site] = places.to(torch.int32), self.layers[site].weight.detach().reshape(-1)[places].clone()
        return found


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write the entries of a `SparseUpdate.delta` into a model. Raises InputError for indices that do not fit."""
    layers = {x.site: x for x in find_layers(model, list(delta))}
    for site, (places, values) in delta.items():
        weight = layers[site].weight
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < weight.numel():
            raise InputError(f"delta of {site!r} has indices outside its {weight.numel()} entries")
        flat = weight.reshape(-1).clone()
        flat[places.long()] = values.to(flat)
        weight.copy_(flat.reshape(weight.shape))


@torch.no_grad()
def selective_decay(layers: Sequence[Layer], strength: float) -> None:
    """Add strength * w * max(0, 1 - |g| / mean|g|) to the gradients, after backward: entries whose gradient says that
    the loss does not depend on them shrink, the others get the plain update (after Tartaglione et al., 2021, with the
    loss's sensitivity in place of the outputs'). Strength 0 changes nothing."""
    for layer in layers:
        grad = layer.weight.grad
        if grad is not None and strength:
            size = grad.abs().mean()
            relevance = grad.abs() / size if float(size) else torch.zeros_like(grad)
            grad.add_(strength * layer.weight * (1 - relevance).clamp(min=0))


class Fairness:
    """Multipliers that keep every group's accuracy gap near the mean gap (Hashemizadeh et al., Balancing Act, ICLR
    2024): for each group g, psi_g = (gap_g - mean gap) - tolerance, lambda_g <- max(0, lambda_g + rate * psi_g).

    `dense` is the dense model's accuracy per group. `observe` takes predictions as they come and keeps the last
    `buffer` of each group; `loss` is the Lagrangian of per-sample losses, differentiable.
    """

    def __init__(self, dense: Sequence[float], tolerance: float = 0.01, rate: float = 0.1, buffer: int = 200) -> None:
        self.dense = torch.as_tensor(dense, dtype=torch.float64)
        self.tolerance = tolerance
        self.rate = rate
        self.buffer = buffer
        self.multipliers = torch.zeros(len(self.dense), dtype=torch.float64)
        self._right: list[list[bool]] = [[] for _ in self.dense]

    def observe(self, groups: torch.Tensor, correct: torch.Tensor) -> None:
        """Note which samples were right; then one ascent step on the multipliers."""
        for group, right in zip(groups.tolist(), correct.tolist()):
            self._right[group] = [*self._right[group], bool(right)][-self.buffer :]
        self.multipliers = (self.multipliers + self.rate * self.excess()).clamp(min=0)

    def excess(self) -> torch.Tensor:
        """psi_g of every group; 0 for groups not seen yet."""
        seen = torch.tensor([bool(r) for r in self._right])
        accuracy = torch.tensor([sum(r) / max(1, len(r)) for r in self._right], dtype=torch.float64)
        gaps = torch.where(seen, self.dense - accuracy, 0.0)
        mean = gaps[seen].mean() if bool(seen.any()) else torch.zeros(())
        return torch.where(seen, gaps - mean - self.tolerance, 0.0)

    def loss(self, losses: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Mean loss + sum_g lambda_g (mean loss of g - mean loss)."""
        total = mean = losses.mean()
        for group, factor in enumerate(self.multipliers.tolist()):
            own = losses[groups == group]
            if factor and len(own):
                total = total + factor * (own.mean() - mean)
        return total
