"""K-SVD with orthogonal matching pursuit: rows of a matrix as sparse combinations of few atoms."""

from __future__ import annotations

import torch

_SEED = 0xD1C7
_ROUNDS = 30
_STALLED = 1e-4
_PURSUIT_STEPS = 16  # more nonzeros than this are taken several at a time


def ksvd(signals: torch.Tensor, atoms: int, nonzeros: int) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """signals (n, d) ~ codes (n, atoms) dictionary (atoms, d), at most `nonzeros` in each row of codes.

    Returns codes, dictionary with unit rows, and the squared error after every round, which never rises (Aharon, Elad
    and Bruckstein, 2006): codes by pursuit unless the old ones did better, then each atom and its coefficients as the
    leading singular pair of what the others leave, by one power iteration.
    """
    dictionary = _start(signals, atoms)
    codes = torch.zeros(signals.shape[0], atoms, dtype=signals.dtype)
    best = signals.square().sum(dim=1)
    errors = [float(best.sum())]
    for _ in range(_ROUNDS):
        found = pursuit(signals, dictionary, nonzeros)
        error = (signals - found @ dictionary).square().sum(dim=1)
        codes = torch.where((error < best)[:, None], found, codes)
        residual = signals - codes @ dictionary
        _update(codes, dictionary, residual)
        best = residual.square().sum(dim=1)
        errors.append(float(best.sum()))
        if errors[-2] - errors[-1] <= _STALLED * errors[-2]:
            break
    return codes, dictionary, errors


def pursuit(signals: torch.Tensor, dictionary: torch.Tensor, nonzeros: int) -> torch.Tensor:
    """Orthogonal matching pursuit of all rows at once: codes (n, atoms) with `nonzeros` entries in each row.

    Each step takes the atoms that correlate most with the residual and solves least squares on all taken; more than 16
    nonzeros are taken several a step (generalised OMP, Wang, Kwon and Shim, 2012).
    """
    count = signals.shape[0]
    gram, target = dictionary @ dictionary.mT, signals @ dictionary.mT
    each = -(-nonzeros // _PURSUIT_STEPS)
    support = torch.zeros(count, 0, dtype=torch.long)
    codes = torch.zeros_like(target)
    taken = torch.zeros(target.shape, dtype=torch.bool)
    while support.shape[1] < nonzeros:
        correlation = (target - codes @ gram).abs().masked_fill(taken, -1.0)
        fresh = correlation.topk(min(each, nonzeros - support.shape[1]), dim=1).indices
        support = torch.cat([support, fresh], dim=1)
        taken.scatter_(1, fresh, True)
        coefficients = least_squares(gram, target, support)
        codes = torch.zeros_like(target).scatter_(1, support, coefficients)
    return codes


def least_squares(gram: torch.Tensor, target: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Coefficients (n, s) of each row on its own `support` (n, s) of atoms."""
    own = gram[support[:, :, None], support[:, None, :]]
    ridge = 1e-10 * own.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] + 1e-300
    own = own + ridge * torch.eye(support.shape[1], dtype=gram.dtype)
    root, _ = torch.linalg.cholesky_ex(own)
    found: torch.Tensor = torch.cholesky_solve(target.gather(1, support)[..., None], root)[..., 0]
    return torch.nan_to_num(found)


def _update(codes: torch.Tensor, dictionary: torch.Tensor, residual: torch.Tensor) -> None:
    """Every atom in turn, in place; an atom that no row uses becomes the direction that is served worst."""
    for k in range(dictionary.shape[0]):
        users = codes[:, k].nonzero().flatten()
        if users.numel() == 0:
            worst = int(residual.square().sum(dim=1).argmax())
            size = residual[worst].norm()
            if float(size) > 0:
                dictionary[k] = residual[worst] / size
            continue
        own = residual[users] + codes[users, k, None] * dictionary[k]
        atom = codes[users, k] @ own
        size = atom.norm()
        if float(size) == 0.0:
            continue
        dictionary[k] = atom / size
        codes[users, k] = own @ dictionary[k]
        residual[users] = own - codes[users, k, None] * dictionary[k]


def _start(signals: torch.Tensor, atoms: int) -> torch.Tensor:
    """Unit atoms: signals picked one far from the span of another, then random ones."""
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(signals.shape[0], generator=generator)[:atoms]
    chosen = signals[order]
    missing = atoms - chosen.shape[0]
    filler = torch.randn(missing, signals.shape[1], generator=generator, dtype=signals.dtype)
    start = torch.cat([chosen, filler])
    noise = torch.randn(start.shape, generator=generator, dtype=signals.dtype)
    scale = signals.square().mean().sqrt() * 1e-6
    start = start + (scale if float(scale) > 0 else 1.0) * noise
    unit: torch.Tensor = start / start.norm(dim=1, keepdim=True)
    return unit
