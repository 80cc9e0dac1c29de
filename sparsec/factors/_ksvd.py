"""K-SVD with orthogonal matching pursuit: rows of a matrix as sparse combinations of few atoms."""

from __future__ import annotations

import torch

_SEED = 0xD1C7
_ROUNDS = 30
_TRIAL = 4  # of them, before one of two starts is chosen
_STALLED = 1e-4
_PURSUIT_STEPS = 16  # more nonzeros than this are taken several at a time


def ksvd(signals: torch.Tensor, atoms: int, nonzeros: int) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """signals (n, d) ~ codes (n, atoms) dictionary (atoms, d), at most `nonzeros` in each row of codes.

    Returns codes, dictionary with unit rows, and the squared error after every round, which never rises (Aharon, Elad
    and Bruckstein, 2006): codes by pursuit unless the old ones did better, then each atom and its coefficients as the
    leading singular pair of what the others leave, by one power iteration. Rows that lie near one subspace want its
    singular vectors to start from, others the rows themselves: after a few rounds of both the better one goes on.
    """
    runs = [_Run(signals, start, nonzeros) for start in (_start(signals, atoms), _leading(signals, atoms, nonzeros))]
    for run in runs:
        run.go(_TRIAL)
    best = min(runs, key=lambda run: run.errors[-1])
    best.go(_ROUNDS - _TRIAL)
    return best.codes, best.dictionary, best.errors


class _Run:
    """K-SVD from one start."""

    def __init__(self, signals: torch.Tensor, dictionary: torch.Tensor, nonzeros: int) -> None:
        self.signals, self.dictionary, self.nonzeros = signals, dictionary, nonzeros
        self.codes = torch.zeros(signals.shape[0], len(dictionary), dtype=signals.dtype)
        self.best = signals.square().sum(dim=1)
        self.errors = [float(self.best.sum())]

    def go(self, rounds: int) -> None:
        """Up to `rounds` more, fewer where the error stalls."""
        for _ in range(rounds):
            found = pursuit(self.signals, self.dictionary, self.nonzeros)
            error = (self.signals - found @ self.dictionary).square().sum(dim=1)
            self.codes = torch.where((error < self.best)[:, None], found, self.codes)
            residual = self.signals - self.codes @ self.dictionary
            _update(self.codes, self.dictionary, residual)
            self.best = residual.square().sum(dim=1)
            self.errors.append(float(self.best.sum()))
            if self.errors[-2] - self.errors[-1] <= _STALLED * self.errors[-2]:
                break


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


def _leading(signals: torch.Tensor, atoms: int, nonzeros: int) -> torch.Tensor:
    """Unit atoms: as many leading singular vectors as a row may take, then the rows that these serve worst."""
    right = torch.linalg.svd(signals, full_matrices=False).Vh[: min(nonzeros, atoms)]
    rest = signals - signals @ right.mT @ right
    worst = rest.square().sum(dim=1).argsort(descending=True, stable=True)[: atoms - len(right)]
    start = torch.cat([right, rest[worst]])
    filler = _start(signals, atoms)[len(start) :]
    sizes = start.norm(dim=1, keepdim=True)
    scale = float(sizes.max()) if sizes.numel() else 0.0
    kept = sizes[:, 0] > 1e-12 * scale if scale > 0 else torch.zeros(len(start), dtype=torch.bool)
    unit = torch.where(kept[:, None], start / sizes.clamp_min(1e-300), _start(signals, atoms)[: len(start)])
    return torch.cat([unit, filler])
