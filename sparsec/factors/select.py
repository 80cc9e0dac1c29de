"""Which rank for which weight: by error, parameters, FLOPs, bytes or milliseconds, for one or a whole network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter

import numpy as np
import torch

from sparsec.errors import InputError, SpecError
from sparsec.factors._base import Factor, Shape, accept_gram
from sparsec.factors._linalg import whitening
from sparsec.factors.low_rank import LowRank

COSTS = ("parameters", "flops", "nbytes", "milliseconds")
_BUCKETS = 4096
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Option:
    """What one weight may become: a factor (None: stay dense), what it costs, and its squared error."""

    factor: Factor | None
    cost: float
    loss: float


def effective_rank(weight: torch.Tensor) -> float:
    """exp(H(s / sum s)) of singular values s, from 1 to min(out, in) (Roy and Vetterli, EUSIPCO 2007); 0 for zeros."""
    s = torch.linalg.svdvals(weight.detach().flatten(1).double())
    total = float(s.sum())
    if total == 0.0:
        return 0.0
    p = s[s > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def rank_for_error(weight: torch.Tensor, error: float, gram: torch.Tensor | None = None) -> int:
    """The smallest rank of a LowRank whose relative error (of the output when `gram` is given) is at most `error`."""
    if not error >= 0.0:
        raise SpecError(f"error={error!r} must be a relative error of at least 0, such as 0.1")
    tails = tail_energy(weight, gram)
    return int(np.argmax(tails <= error**2 * tails[0] + 1e-24 * tails[0])) or 1


def tail_energy(weight: torch.Tensor, gram: torch.Tensor | None = None) -> np.ndarray:
    """Squared error of the best LowRank at every rank from 0 to full, float64 [min(out, in) + 1]."""
    flat = weight.detach().flatten(1).double()
    if gram is not None and (root := whitening(accept_gram(gram, flat))) is not None:
        flat = flat @ root
    energy = torch.linalg.svdvals(flat).square().numpy()
    return np.append(np.cumsum(energy[::-1])[::-1], 0.0)


# Tucker core shapes --------------------------------------------------------------------------------------------------


def tucker_parameters(sizes: Shape, ranks: Shape) -> int:
    """Values of a Tucker decomposition: prod r_n + sum I_n r_n."""
    return prod(ranks) + sum(n * r for n, r in zip(sizes, ranks, strict=True))


def tucker_ranks(tensor: torch.Tensor, parameters: int) -> Shape:
    """The core shape of at most `parameters` values for a Tucker decomposition of `tensor`, without trying any.

    Tucker packing (Ghadiri, Fahrbach, Fu and Mirrokni, ICML 2023): the squared error of a core of shape r lies between
    the largest and the sum of the modes' tail energies, so maximise the sum over modes of the leading r_n squared
    singular values of each unfolding, subject to prod r_n + sum I_n r_n <= parameters. The search is exact: all ranks
    of the smaller modes, and for each the most that the largest mode can have. One SVD a mode.
    """
    sizes = tuple(tensor.shape)
    if parameters < tucker_parameters(sizes, (1,) * len(sizes)):
        least = tucker_parameters(sizes, (1,) * len(sizes))
        raise SpecError(f"{parameters} parameters do not suffice for a {sizes} tensor; the smallest core needs {least}")
    return pack_ranks(mode_spectra(tensor), parameters)


def mode_spectra(tensor: torch.Tensor) -> list[np.ndarray]:
    """Squared singular values of every unfolding, falling, [size] each."""
    wide = tensor.detach().double()
    found = []
    for m, size in enumerate(wide.shape):
        flat = torch.movedim(wide, m, 0).reshape(size, -1)
        found.append(torch.linalg.eigvalsh(flat @ flat.mT).flip(0).clamp_min(0).numpy())
    return found


def pack_ranks(spectra: Sequence[np.ndarray], parameters: int) -> Shape:
    """The ranks that maximise the sum of leading entries within the budget; ties take fewer parameters."""
    sizes = [len(s) for s in spectra]
    largest = max(range(len(sizes)), key=lambda m: sizes[m])
    others = [m for m in range(len(sizes)) if m != largest]
    gains = [np.cumsum(s) for s in spectra]
    shape = tuple(sizes[m] for m in others)
    best: tuple[float, int, Shape] | None = None
    for start in range(0, prod(shape), _CHUNK):
        places = np.arange(start, min(prod(shape), start + _CHUNK))
        ranks = [p + 1 for p in np.unravel_index(places, shape)]
        core = np.prod(np.stack([np.asarray(r, np.int64) for r in ranks]), axis=0) if ranks else np.ones(1, np.int64)
        ends = sum((sizes[m] * r for m, r in zip(others, ranks)), np.zeros(len(places), np.int64))
        top = np.minimum((parameters - ends) // (core + sizes[largest]), sizes[largest])
        gain = sum((gains[m][r - 1] for m, r in zip(others, ranks)), np.zeros(len(places)))
        gain = np.where(top >= 1, gain + gains[largest][np.maximum(top, 1) - 1], -np.inf)
        values = core * top + ends + sizes[largest] * top
        at = int(np.lexsort((values, -gain))[0])
        found = dict(zip(others, (int(r[at]) for r in ranks))) | {largest: int(top[at])}
        candidate = (float(gain[at]), -int(values[at]), tuple(found[m] for m in range(len(sizes))))
        best = candidate if best is None or candidate > best else best
    return best[2] if best is not None else ()


# Whole networks ------------------------------------------------------------------------------------------------------


def low_rank_options(
    weight: torch.Tensor,
    family: Callable[[int], Factor],
    ranks: Sequence[int],
    cost: str = "parameters",
    *,
    batch: int = 1,
    gram: torch.Tensor | None = None,
    importance: float = 1.0,
) -> list[Option]:
    """Options for one weight: the dense one, then `family(rank)` for each rank that the factor accepts.

    Losses are `importance` times the squared error that the fit leaves, in the norm of `gram` when given. `cost` is one
    of "parameters", "flops" (on `batch` rows), "nbytes" (float32) and "milliseconds" (measured, median of 5).
    """
    shape = tuple(weight.shape)
    tails = tail_energy(weight, gram)
    whole = float(tails[0])
    options = [Option(None, dense_cost(weight, cost, batch), 0.0)]
    for rank in ranks:
        factor = family(rank)
        if factor.refuse(shape) is not None:
            continue
        if isinstance(factor, LowRank):  # one decomposition tells the errors of all ranks
            buffers = {name: torch.zeros(s, dtype=weight.dtype) for name, s in factor.shapes(shape).items()}
            loss = float(tails[factor.rank])
        else:
            fit = factor.fit(weight, gram)
            buffers, loss = fit.buffers, fit.error**2 * whole
        spent = factor_cost(factor, shape, cost, batch, buffers)
        options.append(Option(factor, spent, importance * loss))
    return options


def factor_cost(factor: Factor, shape: Shape, cost: str, batch: int, buffers: dict[str, torch.Tensor]) -> float:
    """What the factor costs, in the unit of `cost`."""
    if cost == "parameters":
        return float(sum(t.numel() for t in buffers.values() if t.is_floating_point()))
    if cost == "flops":
        return float(factor.flops(shape, batch))
    if cost == "nbytes":
        return float(factor.nbytes(shape, 4))
    if cost == "milliseconds":
        x = torch.zeros(batch, prod(shape[1:]), dtype=next(iter(buffers.values())).dtype)
        return _milliseconds(lambda: factor.apply(x, buffers, shape))
    raise SpecError(f"cost={cost!r} is unknown; valid: {', '.join(COSTS)}")


def choose(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """One option for every weight: the least total loss whose total cost is within `budget`.

    A multiple-choice knapsack by dynamic programming over 4096 levels of cost, costs rounded up so that the budget
    holds; what rounding leaves is spent by single exchanges. Raises SpecError when not even the cheapest fit.
    """
    names = list(options)
    cheapest = sum(min(o.cost for o in options[n]) for n in names)
    if cheapest > budget * (1 + 1e-12):
        raise SpecError(f"a budget of {budget:g} is below the cheapest choice of {cheapest:g}; offer smaller ranks")
    floor = {n: min(o.cost for o in options[n]) for n in names}
    room = budget - cheapest
    unit = room / _BUCKETS if room > 0 else 1.0
    losses = np.zeros(_BUCKETS + 1)
    picks: list[np.ndarray] = []
    for name in names:
        best = np.full(_BUCKETS + 1, np.inf)
        pick = np.zeros(_BUCKETS + 1, np.int32)
        for at, option in enumerate(options[name]):
            steps = int(np.ceil((option.cost - floor[name]) / unit - 1e-9))
            if steps > _BUCKETS:
                continue
            moved = np.full(_BUCKETS + 1, np.inf)
            moved[steps:] = losses[: _BUCKETS + 1 - steps] + option.loss
            better = moved < best
            best[better], pick[better] = moved[better], at
        losses = best
        picks.append(pick)
    level = int(np.argmin(losses))
    found: dict[str, Option] = {}
    for name, pick in zip(reversed(names), reversed(picks)):
        option = options[name][int(pick[level])]
        level -= int(np.ceil((option.cost - floor[name]) / unit - 1e-9))
        found[name] = option
    return _improved({n: found[n] for n in names}, options, budget)


def choose_for_error(options: Mapping[str, Sequence[Option]], error: float) -> dict[str, Option]:
    """One option for every weight: the least total cost whose total loss is at most `error` squared."""
    swapped = {n: [Option(o.factor, o.loss, o.cost) for o in offered] for n, offered in options.items()}
    return {n: Option(o.factor, o.loss, o.cost) for n, o in choose(swapped, error**2).items()}


def _improved(
    found: dict[str, Option], options: Mapping[str, Sequence[Option]], budget: float
) -> dict[str, Option]:
    """Single exchanges that lower the loss within the budget, the largest gain first."""
    spent = sum(o.cost for o in found.values())
    while True:
        gains = [
            (found[n].loss - o.loss, n, o)
            for n, offered in options.items()
            for o in offered
            if o.loss < found[n].loss and spent - found[n].cost + o.cost <= budget
        ]
        if not gains:
            return found
        _, name, option = max(gains, key=lambda g: g[0])
        spent += option.cost - found[name].cost
        found[name] = option


def dense_cost(weight: torch.Tensor, cost: str, batch: int) -> float:
    """What the dense weight costs, in the unit of `cost`."""
    if cost not in COSTS:
        raise SpecError(f"cost={cost!r} is unknown; valid: {', '.join(COSTS)}")
    if batch < 1:
        raise InputError(f"batch={batch!r} must be at least 1")
    size = weight.numel()
    if cost == "milliseconds":
        flat = weight.detach().flatten(1)
        x = torch.zeros(batch, flat.shape[1], dtype=flat.dtype)
        return _milliseconds(lambda: torch.nn.functional.linear(x, flat))
    return float({"parameters": size, "flops": 2 * batch * size, "nbytes": 4 * size}[cost])


def _milliseconds(run: Callable[[], object]) -> float:
    """Median of five calls after one that warms up."""
    run()
    times = []
    for _ in range(5):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return sorted(times)[2] * 1e3
