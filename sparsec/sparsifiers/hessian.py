"""Second-order pruning of one matrix: damped inverse Hessian, and the column sweep of SparseGPT and GPTQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsec.errors import InputError, SpecError
from sparsec.sparsifiers.granularity import Granularity

TRIES = 8


@dataclass(frozen=True, eq=False)
class Damped:
    """Lower Cholesky `factor` of H = gram / rows + damp * mean(diagonal) * I, after the `damp` that made it positive
    definite; `dead` marks features that are always zero, whose diagonal counts as 1."""

    factor: torch.Tensor
    damp: float
    dead: torch.Tensor


def damped(gram: torch.Tensor, rows: int, damp: float) -> Damped:
    """Factor the Hessian of a layer's inputs; damping grows tenfold until that succeeds.

    Raises InputError when it never does, which takes non-finite statistics.
    """
    if damp < 0:
        raise SpecError(f"damp={damp!r} is negative")
    hessian = gram / rows
    dead = hessian.diagonal() == 0
    mean = float(hessian.diagonal().mean()) or 1.0
    hessian.diagonal()[dead] = mean
    eps, tried = torch.finfo(hessian.dtype).eps, damp
    for _ in range(TRIES):
        shifted = hessian.clone()
        shifted.diagonal().add_(tried * mean)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if not info and bool((factor.diagonal() > 0).all()):
            return Damped(factor, tried, dead)
        tried = max(10 * tried, 100 * eps)
    raise InputError(f"the input statistics cannot be factored even with damping {tried:g}; are they finite?")


def upper_inverse(found: Damped) -> torch.Tensor:
    """Upper triangular U with H^-1 = U^T U."""
    inverse = torch.cholesky_inverse(found.factor)
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if info:  # rounding: once more in double precision
        inverse = torch.cholesky_inverse(found.factor.double())
        factor = torch.linalg.cholesky(inverse, upper=True).to(found.factor.dtype)
    return factor


Quantise = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
"""(column of weights, its index, the columns from it on as they are now) -> the values that can be stored."""


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    zeros: int,
    *,
    granularity: Granularity | None = None,
    kept: torch.Tensor | None = None,
    block: int = 128,
    quantise: Quantise | None = None,
    outlier: float | None = None,
    dead: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune (and quantise) columns from left to right, each error spread over the columns to its right.

    SparseGPT (Frantar and Alistarh, 2023): in each block of columns the entries of least w^2 / U_jj^2 are dropped, by
    `granularity`, those of `dead` columns first; or `kept` is the mask to use. `weight` is [outputs, columns]; zeros in
    it stay zero. With `quantise`
    the survivors are rounded too; entries whose e_j^2 exceeds `outlier` are not (SpQR, Dettmers et al., 2023).

    Returns the new weight and the mask of what is kept.
    """
    # columns of the weight are rows here: every step reads and writes contiguous memory
    work, cols = weight.T.clone(memory_format=torch.contiguous_format), weight.shape[1]
    unit = (granularity.columns or 1) if granularity is not None else 1
    block = max(unit, block // unit * unit)
    already = work == 0
    mask = ~already if kept is None else kept.T & ~already
    dropped = 0
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        part, u = work[start:stop], upper[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if kept is None and granularity is not None and (j == 0 if unit == 1 else j % unit == 0):
                end = stop - start if unit == 1 else min(j + unit, stop - start)
                here = slice(start + j, start + end)
                scores = (part[j:end] / u.diagonal()[j:end, None]).square_()
                first = already[here] if dead is None else already[here] | dead[here, None]
                scores.masked_fill_(first, -torch.inf)
                due = zeros * (start + end) // cols - dropped
                chosen = granularity.keep_matrix(scores.T.contiguous(), max(0, min(due, scores.numel())))
                mask[here] &= chosen.T
                dropped += int((~mask[here]).sum())
            column = part[j].clone()
            new = column * mask[start + j]
            if quantise is not None:
                rounded = quantise(new, start + j, (part[j:] * mask[start + j : stop]).T)
                if outlier is not None:
                    rounded = torch.where(((new - rounded) / u[j, j]).square() > outlier, new, rounded)
                new = rounded
            torch.div(column - new, u[j, j], out=errors[j])
            part[j:].addr_(u[j, j:], errors[j], alpha=-1)
            part[j] = new
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return work.masked_fill_(~mask, 0).T.contiguous(), mask.T.contiguous()


def layer_error(change: torch.Tensor, gram: torch.Tensor) -> float:
    """||change x||^2 summed over the rows behind `gram`; `change` is [outputs, features]."""
    change = change.to(gram.dtype)
    return float(((change @ gram) * change).sum())
