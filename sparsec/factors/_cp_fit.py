"""Fits of a CP decomposition: exact, by alternating least squares, and the correction that keeps its error."""

from __future__ import annotations

from math import prod

import torch

_SWEEPS = 100
_STALLED = 1e-8
_SEEDS = (0xC9, 0xC10)
_EXACT = 1e-20  # squared relative error from which a fit counts as exact
_CORRECTIONS = 60
_GAIN = 1e-4
_BISECTIONS = 60
_STAGES, _STAGE_SWEEPS = 30, 8
_HOPELESS = 0.97  # damped fits that gain less than this in four stages will not get there
_SMALL = 1 << 20  # entries times rank up to which damped fits are tried


def exact_cp(tensor: torch.Tensor, rank: int) -> list[torch.Tensor] | None:
    """The decomposition into fibres along the longest mode, where `rank` has room for all of them; else None."""
    longest = max(range(tensor.dim()), key=lambda m: tensor.shape[m])
    others = [n for m, n in enumerate(tensor.shape) if m != longest]
    count = prod(others)
    if rank < count:
        return None
    fibres = torch.movedim(tensor, longest, 0).reshape(tensor.shape[longest], count)
    places = torch.unravel_index(torch.arange(count), tuple(others)) if others else ()
    units = [torch.nn.functional.one_hot(p, n).T.to(tensor) for p, n in zip(places, others)]
    units.insert(longest, fibres)
    return [torch.nn.functional.pad(u, (0, rank - count)) for u in units]


def cp_als(tensor: torch.Tensor, rank: int, sweeps: int = _SWEEPS) -> list[torch.Tensor]:
    """Factors (size_m, rank) by alternating least squares; the best of a start from the SVDs and of random ones."""
    starts = [_from_svd(tensor, rank), *(_random(tensor, rank, seed) for seed in _SEEDS)]
    runs = [_als(tensor, start, sweeps) for start in starts]
    return min(runs, key=lambda r: r[1])[0]


def sensitivity(factors: list[torch.Tensor]) -> float:
    """Expected squared change of the tensor, over sigma^2, when every factor entry gets noise of variance sigma^2.

    sum_m size_m sum_r prod_{l != m} ||factor_l[:, r]||^2 (Phan et al., 2020, equation 5, for any order).
    """
    energy = torch.stack([f.abs().square().sum(dim=0) for f in factors])
    return sum(len(f) * float(_others(energy, m).sum()) for m, f in enumerate(factors))


def stabilise(tensor: torch.Tensor, factors: list[torch.Tensor], bound: float | None = None) -> list[torch.Tensor]:
    """The error-preserving correction: smaller sensitivity with ||tensor - [[factors]]|| at most `bound`.

    `bound` None is the error that the factors have; factors that miss it come back as they are. Close to a tensor whose
    border rank is below its rank the correction itself moves slowly, so fits that were damped from the start, with the
    damping lowered until they meet the bound, compete with it. The least sensitive result wins.
    """
    whole = float(tensor.square().sum())
    own = _squared_error(tensor, factors, whole)
    limit = own if bound is None else bound**2
    if own > limit * (1 + 1e-9) or own <= _EXACT * whole:
        return factors
    found = [_corrected(tensor, factors, limit, whole)]
    if tensor.numel() * factors[0].shape[1] <= _SMALL:
        for start in (found[0], *(_random(tensor, factors[0].shape[1], seed) for seed in _SEEDS)):
            if (damped := _damped(tensor, start, limit, whole)) is not None:
                found.append(_corrected(tensor, damped, limit, whole))
    return min(found, key=sensitivity)


def _corrected(tensor: torch.Tensor, factors: list[torch.Tensor], limit: float, whole: float) -> list[torch.Tensor]:
    """Each turn solves one factor exactly: of all with a squared error of at most `limit`, the least sensitive one."""
    current = [f.clone() for f in factors]
    before = sensitivity(current)
    for _ in range(_CORRECTIONS):
        for mode in range(len(current)):
            current[mode] = _constrained(tensor, current, mode, _penalty(current, mode), limit, whole)
        after = sensitivity(current)
        if before - after <= _GAIN * before:
            break
        before = after
    return current


def _damped(
    tensor: torch.Tensor, factors: list[torch.Tensor], limit: float, whole: float
) -> list[torch.Tensor] | None:
    """Least squares plus mu times the sensitivity, mu halved until the squared error is within `limit`, or None."""
    size = torch.stack([f.norm(dim=0) for f in factors]).prod(dim=0).sum()
    scale = float(whole**0.5 / size.clamp_min(1e-300)) ** (1.0 / len(factors))
    current = [f * scale for f in factors]
    mu = 0.1 * whole / max(sensitivity(current), 1e-300)
    errors: list[float] = []
    for _ in range(_STAGES):
        for _ in range(_STAGE_SWEEPS):
            for mode in range(len(current)):
                damping = torch.diag(mu * _penalty(current, mode) + 1e-300)
                target = _mttkrp(tensor, current, mode)
                current[mode] = torch.linalg.solve(_gram(current, mode) + damping, target.mT).mT
            current = balance(current)
        errors.append(_squared_error(tensor, current, whole))
        if errors[-1] <= limit:
            return current
        if len(errors) > 4 and errors[-1] > _HOPELESS * errors[-5]:
            return None
        mu /= 2
    return None


def balance(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The size of each component shared evenly by the factors."""
    sizes = torch.stack([f.norm(dim=0) for f in factors])
    share = sizes.prod(dim=0).pow(1.0 / len(factors))
    return [f * (share / s.clamp_min(1e-300)).to(f.dtype) for f, s in zip(factors, sizes)]


def _penalty(factors: list[torch.Tensor], mode: int) -> torch.Tensor:
    """The sensitivity as a quadratic of factor `mode`: the weight of each column's squared norm, (rank,)."""
    energy = torch.stack([f.square().sum(dim=0) for f in factors])
    rest = [len(factors[m]) * _others(energy, m, mode) for m in range(len(factors)) if m != mode]
    return torch.stack(rest).sum(dim=0)


def _constrained(
    tensor: torch.Tensor, factors: list[torch.Tensor], mode: int, weights: torch.Tensor, limit: float, whole: float
) -> torch.Tensor:
    """min sum_r weights_r ||f_r||^2 over factor `mode`, subject to a squared error of at most `limit`."""
    gram = _gram(factors, mode)
    target = _mttkrp(tensor, factors, mode)
    # with the columns scaled by weights^(1/2) the problem is a ridge regression, diagonal in the Gram's eigenvectors
    scale = weights.clamp_min(1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
    values = values.clamp_min(0)
    image = (target * scale) @ vectors
    energy = image.square().sum(dim=0)
    tiny = float(values.max()) * 1e-15

    def error(mu: float) -> float:
        damped = values + mu + tiny
        return whole - float((energy * (2 / damped - values / damped.square())).sum())

    low, high = 0.0, float(values.max()) + 1e-300
    if error(0.0) > limit:
        return factors[mode]
    while error(high) < limit and high < 1e300:
        high *= 8
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-12
        low, high = (middle, high) if error(middle) <= limit else (low, middle)
        if low > 0 and high <= low * (1 + 1e-9):
            break
    found: torch.Tensor = ((image / (values + low + tiny)) @ vectors.mT) * scale
    return found


def _als(tensor: torch.Tensor, factors: list[torch.Tensor], sweeps: int) -> tuple[list[torch.Tensor], float]:
    """The factors after alternating least squares, and their squared error."""
    whole = float(tensor.abs().square().sum())
    current, before = list(factors), float("inf")
    after = before
    for _ in range(sweeps):
        for mode in range(len(current)):
            gram = _gram(current, mode)
            target = _mttkrp(tensor, current, mode)
            ridge = 1e-12 * gram.diagonal().real.mean() + 1e-300
            eye = torch.eye(gram.shape[0], dtype=gram.dtype)
            current[mode] = torch.linalg.solve(gram + ridge * eye, target.mT).mT
            if mode + 1 < len(current):
                norms = current[mode].norm(dim=0).clamp_min(1e-300)
                current[mode] = current[mode] / norms
        after = _squared_error(tensor, current, whole)
        if before - after <= _STALLED * whole or after <= 1e-24 * whole:
            break
        before = after
    return current, after


def _squared_error(tensor: torch.Tensor, factors: list[torch.Tensor], whole: float) -> float:
    letters = "abcdefghijklmnop"[: tensor.dim()]
    terms = ",".join(c + "r" for c in letters)
    if tensor.numel() <= 1 << 24:
        return float((tensor - torch.einsum(f"{terms}->{letters}", *factors)).abs().square().sum())
    inner = float((_mttkrp(tensor, factors, 0) * factors[0].conj()).sum().real)
    own = float((_gram(factors, 0) * (factors[0].mH @ factors[0])).sum().real)
    return max(whole - 2 * inner + own, 0.0)


def _mttkrp(tensor: torch.Tensor, factors: list[torch.Tensor], mode: int) -> torch.Tensor:
    """The unfolding of `mode` times the Khatri-Rao product of the other factors, (size, rank)."""
    letters = "abcdefghijklmnop"[: tensor.dim()]
    running, left = tensor, letters
    # the largest mode first: it costs the same whichever it is, and leaves the least
    for m in sorted((m for m in range(tensor.dim()) if m != mode), key=lambda m: -tensor.shape[m]):
        kept = left.replace(letters[m], "").replace("r", "") + "r"
        running = torch.einsum(f"{left},{letters[m]}r->{kept}", running, factors[m].conj())
        left = kept
    return running


def _gram(factors: list[torch.Tensor], mode: int) -> torch.Tensor:
    """Hadamard product of the other factors' Gram matrices, laid out for F gram = mttkrp."""
    found = None
    for m, f in enumerate(factors):
        if m != mode:
            own = (f.mH @ f).mT
            found = own if found is None else found * own
    return torch.ones(factors[0].shape[1], factors[0].shape[1]).to(factors[0]) if found is None else found


def _others(energy: torch.Tensor, *without: int) -> torch.Tensor:
    """Product over the rows of `energy` (modes, rank) but the given ones."""
    rows = [m for m in range(energy.shape[0]) if m not in without]
    return energy[rows].prod(dim=0)


def _from_svd(tensor: torch.Tensor, rank: int) -> list[torch.Tensor]:
    fill = _random(tensor, rank, _SEEDS[0])
    found = []
    for m, size in enumerate(tensor.shape):
        flat = torch.movedim(tensor, m, 0).reshape(size, -1)
        vectors = torch.linalg.eigh(flat @ flat.mH).eigenvectors.flip(1)[:, :rank]
        found.append(torch.cat([vectors, fill[m][:, vectors.shape[1] :]], dim=1))
    return found


def _random(tensor: torch.Tensor, rank: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(n, rank, generator=generator, dtype=torch.float64).to(tensor) for n in tensor.shape]
    return [f / f.norm(dim=0) for f in found]
