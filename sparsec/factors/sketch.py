"""Low rank from products with a few vectors or from a weight's own rows and columns: generalised Nystrom and CUR."""

from __future__ import annotations

import torch

from sparsec.errors import InputError
from sparsec.formats import Buffers


def nystrom(weight: torch.Tensor, right: torch.Tensor, left: torch.Tensor) -> Buffers:
    """LowRank buffers of A X (Y^H A X)^+ Y^H A for A (out, in), X = `right` (in, k) and Y = `left` (out, l).

    Exact when rank(A) = rank(Y^H A X), so for random X and Y as soon as k and l reach A's rank; any factorisation of
    this kind is a choice of X and Y (Karpowicz, A theory of meta-factorization, 2021). Costs products of A with thin
    matrices only. Raises InputError for shapes that do not meet.
    """
    if weight.dim() != 2 or right.shape[:1] != weight.shape[1:] or left.shape[:1] != weight.shape[:1]:
        raise InputError(
            f"nystrom needs right ({weight.shape[-1]}, k) and left ({weight.shape[0]}, l) for a {tuple(weight.shape)} "
            f"weight, got {tuple(right.shape)} and {tuple(left.shape)}"
        )
    columns, rows = weight @ right, left.mH @ weight
    core = left.mH @ columns  # (l, k)
    # a cut at the square root of the precision keeps the pseudo-inverse from amplifying rounding
    inverse = torch.linalg.pinv(core, rtol=torch.finfo(weight.dtype).eps ** 0.5)
    return {"right": (inverse @ rows).contiguous(), "left": columns.contiguous()}


def cur(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Buffers:
    """LowRank buffers of C U R with the weight's own columns C and rows R, U = (rows of C)^+.

    Chosen rows and columns are reproduced when the block where they meet has the rank of both.
    """
    eye_in = torch.eye(weight.shape[1], dtype=weight.dtype)[:, columns]
    eye_out = torch.eye(weight.shape[0], dtype=weight.dtype)[:, rows]
    return nystrom(weight, eye_in, eye_out)
