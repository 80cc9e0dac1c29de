"""Structured sparse fine-tuning: train a slice of a layer's inputs and keep only that slice's activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsec.errors import SpecError


class PartialLinear(nn.Module):
    """A linear layer of which only the weights of some inputs train (Yang et al., S2FT, NeurIPS 2024).

    `slice` is the parameter [outputs, len(columns)]; the rest is frozen. Backward keeps the activations of `columns`
    alone, so what it saves shrinks in proportion. Any columns will do: no permutation has to bring them together.
    """

    columns: torch.Tensor
    frozen: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, columns: Sequence[int]) -> None:
        super().__init__()
        index = torch.as_tensor(list(columns), dtype=torch.long)
        if len(index) != len(index.unique()) or (
            len(index) and not 0 <= index.min() <= index.max() < linear.in_features
        ):
            raise SpecError(f"PartialLinear: columns are distinct and in [0, {linear.in_features})")
        self.register_buffer("columns", index)
        self.register_buffer("frozen", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.slice = nn.Parameter(linear.weight.detach()[:, index].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Partial.apply(x, self.slice, self.frozen, self.columns)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def adapter(self) -> torch.Tensor:
        """What training has changed: [outputs, len(columns)], to be added to those columns."""
        return self.slice.detach() - self.frozen[:, self.columns]

    def merged(self) -> nn.Linear:
        """An ordinary linear layer with the trained weight."""
        frozen = self.frozen
        linear = nn.Linear(frozen.shape[1], frozen.shape[0], bias=self.bias is not None, dtype=frozen.dtype)
        with torch.no_grad():
            linear.weight.copy_(frozen)
            linear.weight[:, self.columns] = self.slice
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


class _Partial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, part: torch.Tensor, frozen: torch.Tensor, columns: torch.Tensor) -> Any:
        weight = frozen.index_copy(1, columns, part)
        ctx.save_for_backward(x[..., columns], part, frozen, columns)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        seen, part, frozen, columns = ctx.saved_tensors
        (grad,) = grads
        back = grad @ frozen.index_copy(1, columns, part) if ctx.needs_input_grad[0] else None
        own = grad.flatten(0, -2).T @ seen.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return back, own, None, None
