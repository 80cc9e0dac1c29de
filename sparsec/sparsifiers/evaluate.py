"""What pruning costs and gains: layer errors, cosine of outputs, accuracy per class, accuracy against speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec.errors import InputError, SpecError
from sparsec.sparsifiers.batches import Calibration
from sparsec.sparsifiers.calibration import Watch, quiet
from sparsec.sparsifiers.hessian import layer_error
from sparsec.sparsifiers.layers import Where, find_layers


def layer_errors(
    dense: nn.Module, pruned: nn.Module, data: Any, *, where: Where | Iterable[Where] | None = None
) -> dict[str, float | None]:
    """Site -> ||(W - W') X||_F / ||W X||_F over the dense model's own inputs X; None for a layer that never ran."""
    calibration = Calibration.of(data)
    layers = find_layers(dense, where)
    after = {x.site: x for x in find_layers(pruned, [x.site for x in layers])}
    watch = Watch(dense, layers, ("gram",), calibration)
    with quiet(dense), watch:
        watch.run(calibration.batches())
    found: dict[str, float | None] = {}
    for layer, (site, stats) in zip(layers, watch.finish().items()):
        if stats is None:
            found[site] = None
            continue
        weight = layer.matrix(layer.weight.detach()).double().cpu()
        change = weight - layer.matrix(after[site].weight.detach()).double().cpu()
        grams = stats.get("gram").double()
        lost = sum(layer_error(c, g) for c, g in zip(change.chunk(len(grams)), grams))
        whole = sum(layer_error(w, g) for w, g in zip(weight.chunk(len(grams)), grams))
        found[site] = (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
    return found


@torch.no_grad()
def output_cosine(dense: nn.Module, pruned: nn.Module, data: Any, read: Callable[[Any, Any], torch.Tensor]) -> float:
    """Mean cosine of the two models' outputs over all rows; `read(output, batch)` gives rows [n, features]."""
    calibration = Calibration.of(data)
    total, count = 0.0, 0
    with quiet(dense), quiet(pruned):
        for batch in calibration.batches():
            args, kwargs = calibration.call(dense, batch)
            a, b = (read(m(*args, **kwargs), batch).double() for m in (dense, pruned))
            if a.shape != b.shape or a.dim() != 2:
                raise InputError(f"read must give rows [n, features] of both models, got {a.shape} and {b.shape}")
            total += float(torch.nn.functional.cosine_similarity(a, b, dim=1).sum())
            count += len(a)
    if not count:
        raise InputError("there is no data to compare outputs on")
    return total / count


@dataclass(frozen=True)
class ClassGaps:
    """Accuracy per class before and after; the gap is before - after, the excess what a class loses over the mean."""

    dense: tuple[float, ...]
    pruned: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def gaps(self) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(self.dense, self.pruned))

    @property
    def overall(self) -> float:
        """Gap over all samples."""
        return sum(g * n for g, n in zip(self.gaps, self.counts)) / max(1, sum(self.counts))

    @property
    def worst_excess(self) -> float:
        """The largest gap of a class minus the overall gap."""
        return max(g for g, n in zip(self.gaps, self.counts) if n) - self.overall

    def __str__(self) -> str:
        head = f"{'class':>5} {'count':>6} {'dense':>7} {'pruned':>7} {'gap':>7}"
        rows = zip(range(len(self.counts)), self.counts, self.dense, self.pruned, self.gaps)
        lines = [f"{c:>5} {n:>6} {a:>7.1%} {b:>7.1%} {g:>+7.1%}" for c, n, a, b, g in rows]
        return "\n".join([head, *lines, f"  all {sum(self.counts):>6} {'':>15} {self.overall:>+7.1%}"])


def class_gaps(labels: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor) -> ClassGaps:
    """Accuracies per class of two models' predicted labels. All three are integer vectors of one length."""
    if not labels.shape == dense.shape == pruned.shape or labels.dim() != 1 or not len(labels):
        raise InputError("class_gaps takes three label vectors of one length, not empty")
    rows = []
    for label in range(int(labels.max()) + 1):
        own = labels == label
        count = int(own.sum())
        rows.append(
            (
                float((dense == label)[own].sum()) / max(1, count),
                float((pruned == label)[own].sum()) / max(1, count),
                count,
            )
        )
    return ClassGaps(*(tuple(column) for column in zip(*rows)))


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cohen's kappa of two models' predicted labels: 1 agrees everywhere, 0 as chance would."""
    observed = float((a == b).double().mean())
    kinds = int(max(a.max(), b.max())) + 1
    chance = float((a.bincount(minlength=kinds) / len(a) * (b.bincount(minlength=kinds) / len(b))).sum())
    return (observed - chance) / (1 - chance) if chance < 1 else 1.0


@dataclass(frozen=True)
class Point:
    """One pruned model: its name, its quality (accuracy, cosine), and its speed-up over dense."""

    name: str
    quality: float
    speedup: float


@dataclass(frozen=True)
class Tradeoff:
    """Quality against measured speed-up: `print(tradeoff)` for the table, `tradeoff.svg()` for the plot."""

    points: tuple[Point, ...]
    label: str = "accuracy"

    def __post_init__(self) -> None:
        if not self.points:
            raise SpecError("a trade-off needs points")

    @property
    def best(self) -> tuple[Point, ...]:
        """The points that no other beats in both, fastest first."""
        return tuple(
            p for p in sorted(self.points, key=lambda p: -p.speedup) if not any(_beats(q, p) for q in self.points)
        )

    def __str__(self) -> str:
        width = max(len("model"), *(len(p.name) for p in self.points))
        head = f"  {'model':<{width}} {self.label:>10} {'speed-up':>9}"
        lines = [
            f"{'*' if p in self.best else ' '} {p.name:<{width}} {p.quality:>10.4f} {p.speedup:>8.2f}x"
            for p in sorted(self.points, key=lambda p: p.speedup)
        ]
        return "\n".join([head, *lines, "* no other is both better and faster"])

    def svg(self, width: int = 640, height: int = 400) -> str:
        """The plot as SVG text: speed-up to the right, quality upwards, the best points joined."""
        from sparsec.sparsifiers.plot import scatter

        rows = [(p.name, p.speedup, p.quality, p in self.best) for p in self.points]
        return scatter(rows, "speed-up over dense", self.label, width, height)


def _beats(a: Point, b: Point) -> bool:
    better = a.quality >= b.quality and a.speedup >= b.speedup
    return better and (a.quality > b.quality or a.speedup > b.speedup)


def random_search(
    model: nn.Module, candidates: Sequence[nn.Module], loss: Callable[[nn.Module], float]
) -> tuple[nn.Module, Mapping[int, float]]:
    """The candidate of least loss before training, and all losses: the baseline of sparse architecture search."""
    losses = {i: float(loss(c)) for i, c in enumerate(candidates)}
    if not losses:
        raise SpecError("random_search needs candidates")
    return candidates[min(losses, key=lambda i: (losses[i], i))], losses
