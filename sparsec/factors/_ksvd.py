"""K-SVD with orthogonal matching pursuit: rows of a matrix as sparse combinations of few atoms."""

from __future__ import annotations

import math

import torch

_SEED = 0xD1C7
_ROUNDS = 32
_TRIAL = 5  # rounds before these, with fewer nonzeros: before one of the starts is chosen, and after
_EARLY = (0.65, 0.85)
_STALLED = 1e-4
_PURSUIT_STEPS = 16  # more nonzeros than this are taken several at a time
_EXCHANGES = (1, 4, 16)  # atoms offered to a row at once
_REFITS = 3  # least squares for all atoms, then for all coefficients, a round
_RIDGE = 1e-10
_ENTRIES = 1 << 22  # of the systems of equations held at once: 32 MiB


def ksvd(signals: torch.Tensor, atoms: int, nonzeros: int) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """signals (n, d) ~ codes (n, atoms) dictionary (atoms, d), at most `nonzeros` in each row of codes.

    Returns codes, dictionary with unit rows, and the squared error after every round, which never rises (Aharon, Elad
    and Bruckstein, 2006). A round offers every row new atoms, by pursuit and by exchange, which are taken where they do
    better; makes each atom and its coefficients the leading singular pair of what the others leave, by one power
    iteration; and solves least squares for all atoms at once and for all coefficients (Engan, Aase and Husoy, 1999).
    Rows that lie near one subspace want its singular vectors to start from, others the rows themselves: after a few
    rounds of each start the best one goes on. The first rounds take fewer nonzeros, which leaves better atoms.
    """
    starts = [_start(signals, atoms, _SEED), _start(signals, atoms, _SEED + 1), _leading(signals, atoms, nonzeros)]
    runs = [_Run(signals, start) for start in starts]
    for run in runs:
        run.go(_TRIAL, math.ceil(_EARLY[0] * nonzeros))
    best = min(runs, key=lambda run: run.errors[-1])
    best.go(_TRIAL, math.ceil(_EARLY[1] * nonzeros))
    best.go(_ROUNDS, nonzeros)
    return best.codes, best.dictionary, best.errors


class _Run:
    """K-SVD from one start."""

    def __init__(self, signals: torch.Tensor, dictionary: torch.Tensor) -> None:
        self.signals, self.dictionary = signals, dictionary
        self.codes = torch.zeros(signals.shape[0], len(dictionary), dtype=signals.dtype)
        self.best = signals.square().sum(dim=1)
        self.errors = [float(self.best.sum())]

    def go(self, rounds: int, nonzeros: int) -> None:
        """Up to `rounds` more with so many nonzeros, at least those of before; fewer rounds where the error stalls."""
        counts = [0, *sorted({min(e, len(self.dictionary) - nonzeros) for e in _EXCHANGES} - {0})]
        for _ in range(rounds):
            for count in tuple(counts):
                if count:
                    found = exchange(self.signals, self.dictionary, self.codes, nonzeros, count)
                else:
                    found = pursuit(self.signals, self.dictionary, nonzeros)
                if not self._offer(found):  # what nobody takes is not offered again
                    counts.remove(count)
            residual = self.signals - self.codes @ self.dictionary
            _update(self.codes, self.dictionary, residual)
            self.best = residual.square().sum(dim=1)
            for _ in range(_REFITS):
                self._refit(nonzeros)
            self.errors.append(float(self.best.sum()))
            if self.errors[-2] - self.errors[-1] <= _STALLED * self.errors[-2]:
                break

    def _offer(self, found: torch.Tensor) -> int:
        """Rows of new codes where they do better than the old ones, and how many they are."""
        error = (self.signals - found @ self.dictionary).square().sum(dim=1)
        better = error < self.best
        self.codes = torch.where(better[:, None], found, self.codes)
        self.best = torch.where(better, error, self.best)
        return int(better.sum())

    def _refit(self, nonzeros: int) -> None:
        """All atoms for these codes, then all coefficients on their supports; kept if the error falls."""
        used = (self.codes != 0).any(dim=0)
        part = self.codes[:, used]
        gram = part.mT @ part
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        root, failed = torch.linalg.cholesky_ex(gram + ridge)
        if int(failed) or not len(gram):
            return
        atoms = torch.cholesky_solve(part.mT @ self.signals, root)
        sizes = atoms.norm(dim=1, keepdim=True)
        if not bool((sizes > 0).all()):
            return
        dictionary = self.dictionary.clone()
        dictionary[used] = atoms / sizes
        support = self.codes.abs().topk(nonzeros, dim=1).indices
        values = least_squares(dictionary @ dictionary.mT, self.signals @ dictionary.mT, support)
        codes = torch.zeros_like(self.codes).scatter_(1, support, values)
        error = (self.signals - codes @ dictionary).square().sum(dim=1)
        if float(error.sum()) < float(self.best.sum()):
            self.codes, self.dictionary, self.best = codes, dictionary, error


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


def exchange(
    signals: torch.Tensor, dictionary: torch.Tensor, codes: torch.Tensor, nonzeros: int, count: int
) -> torch.Tensor:
    """Codes after every row was given the `count` atoms that correlate most with its residual and gave up as many.

    A coefficient c of the joint least squares costs c^2 / (G^-1)_cc to give up, G the Gram matrix of the row's atoms:
    those that cost least go (subspace pursuit, Dai and Milenkovic, 2009, with the exact cost of one removal).
    """
    gram, target = dictionary @ dictionary.mT, signals @ dictionary.mT
    held = codes.abs().topk(nonzeros, dim=1).indices
    correlation = (target - codes @ gram).abs().scatter(1, held, -1.0)
    support = torch.cat([held, correlation.topk(count, dim=1).indices], dim=1)
    kept = []
    for part, aims in _parts(support, target):
        root = _root(gram, part)
        found = torch.cholesky_solve(aims.gather(1, part)[..., None], root)[..., 0]
        cost = found.square() / torch.cholesky_inverse(root).diagonal(dim1=1, dim2=2)
        kept.append(part.gather(1, torch.nan_to_num(cost).topk(nonzeros, dim=1).indices))
    support = torch.cat(kept)
    return torch.zeros_like(codes).scatter_(1, support, least_squares(gram, target, support))


def least_squares(gram: torch.Tensor, target: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Coefficients (n, s) of each row on its own `support` (n, s) of atoms."""
    found = [
        torch.cholesky_solve(aims.gather(1, part)[..., None], _root(gram, part))[..., 0]
        for part, aims in _parts(support, target)
    ]
    return torch.nan_to_num(torch.cat(found))


def _parts(support: torch.Tensor, target: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in parts whose systems of equations fit in memory together."""
    rows = max(1, _ENTRIES // max(1, support.shape[1] ** 2))
    return list(zip(support.split(rows), target.split(rows)))


def _root(gram: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Cholesky roots (n, s, s) of the Gram matrices of each row's atoms."""
    own = gram[support[:, :, None], support[:, None, :]]
    ridge = _RIDGE * own.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] + 1e-300
    root: torch.Tensor = torch.linalg.cholesky_ex(own + ridge * torch.eye(support.shape[1], dtype=gram.dtype)).L
    return root


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


def _start(signals: torch.Tensor, atoms: int, seed: int) -> torch.Tensor:
    """Unit atoms: signals picked one far from the span of another, then random ones."""
    generator = torch.Generator().manual_seed(seed)
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
    filler = _start(signals, atoms, _SEED)[len(start) :]
    sizes = start.norm(dim=1, keepdim=True)
    scale = float(sizes.max()) if sizes.numel() else 0.0
    kept = sizes[:, 0] > 1e-12 * scale if scale > 0 else torch.zeros(len(start), dtype=torch.bool)
    unit = torch.where(kept[:, None], start / sizes.clamp_min(1e-300), _start(signals, atoms, _SEED)[: len(start)])
    return torch.cat([unit, filler])
