"""Soft shrinkage: the proximal step of the l1 norm in place of a hard cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.sparsifiers.parts import Apply, Problem, Solution, Sparsifier


@dataclass(frozen=True)
class SoftShrink(Apply):
    """Survivors move towards zero by the magnitude t of the largest dropped entry: sign(w) (|w| - t), the prox of
    t ||w||_1 when the score is the magnitude. A survivor no larger than t, which other scores allow, stays as it is."""

    def __call__(self, problem: Problem, parts: Sparsifier) -> Solution:
        weight, kept = problem.layer.weight.detach(), parts.select(problem).kept
        dropped = weight.abs().masked_fill(kept, 0)
        cut = dropped.max() if dropped.numel() else torch.zeros((), dtype=weight.dtype)
        shrunk = weight.sign() * (weight.abs() - cut)
        return Solution(torch.where(weight.abs() > cut, shrunk, weight).masked_fill(~kept, 0), kept)
