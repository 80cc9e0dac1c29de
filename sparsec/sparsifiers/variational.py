"""Variational dropout: train a noise level per weight, and prune what is mostly noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsec.sparsifiers.allocators import Allocator
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.parts import Sparsifier, Target, target_allocator
from sparsec.sparsifiers.scores import Score
from sparsec.sparsifiers.stats import Stats


class VariationalLinear(nn.Linear):
    """A linear layer with Gaussian noise of trained variance on its weights (Molchanov et al., Variational Dropout
    Sparsifies Deep Neural Networks, ICML 2017): alpha = sigma^2 / w^2, noise drawn at the outputs, none in eval()."""

    log_sigma2: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear, log_sigma2: float = -10.0) -> VariationalLinear:
        """A copy of a linear layer with this first noise level."""
        found = cls(linear.in_features, linear.out_features, linear.bias is not None)
        found.load_state_dict(linear.state_dict(), strict=True)
        found.log_sigma2 = nn.Parameter(torch.full_like(linear.weight, log_sigma2))
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = super().forward(x)
        if not self.training:
            return mean
        spread = (x.square() @ self.log_sigma2.exp().T).clamp(min=1e-16).sqrt()
        return mean + spread * torch.randn_like(mean)

    @property
    def log_alpha(self) -> torch.Tensor:
        return (self.log_sigma2 - (self.weight.square() + 1e-16).log()).clamp(-10, 10)

    def penalty(self) -> torch.Tensor:
        """The divergence from the log-uniform prior, by Molchanov's fit; add it to the loss, over the data's size."""
        a = self.log_alpha
        value = 0.63576 * torch.sigmoid(1.87320 + 1.48695 * a) - 0.5 * torch.nn.functional.softplus(-a) - 0.63576
        return -value.sum()


@dataclass(frozen=True)
class NegLogAlpha(Score):
    """-log alpha of layers that were trained as VariationalLinear: their signal-to-noise ratio. `noise` holds
    (site, log_sigma2 tensors)."""

    noise: tuple[tuple[str, torch.Tensor], ...]

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return (layer.weight.detach().square() + 1e-16).log() - dict(self.noise)[layer.site].detach()


@dataclass(frozen=True, repr=False)
class VariationalDropout(Sparsifier):
    """Drop the entries of largest alpha of a model whose linear layers are VariationalLinear."""

    sparsity: Target
    noise: tuple[tuple[str, torch.Tensor], ...] = ()

    @classmethod
    def trained(cls, sparsity: Target, model: nn.Module) -> VariationalDropout:
        """With the noise levels that `model` has learnt."""
        found = [(n, m.log_sigma2) for n, m in model.named_modules() if isinstance(m, VariationalLinear)]
        return cls(sparsity, tuple(found))

    @property
    def score(self) -> Score:
        return NegLogAlpha(self.noise)

    @property
    def allocator(self) -> Allocator:
        return target_allocator("VariationalDropout", self.sparsity)

    def __repr__(self) -> str:
        return f"VariationalDropout({self.sparsity!r})"
