"""How much an entry is worth keeping: real tensors shaped like the weight, larger is better."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from sparsec.errors import SpecError
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.stats import Stats


@dataclass(frozen=True)
class Score:
    """Base. `needs` names the statistics it reads; a score without any ignores `stats`."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        raise NotImplementedError

    def seen(self, stats: Stats | None) -> Stats:
        """The statistics. Raises SpecError when there are none."""
        if stats is None:
            raise SpecError(f"{self!r} calibrates; pass data=, an iterable of batches")
        return stats


@dataclass(frozen=True)
class AbsValue(Score):
    """|w|."""

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return layer.weight.detach().abs()


@dataclass(frozen=True)
class Uniform01(Score):
    """A random number, the same for a layer of this name and size whatever else is pruned."""

    seed: int = 0

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        generator = site_generator(self.seed, layer.site)
        return torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64).to(layer.weight.device)


def site_generator(seed: int, site: str) -> torch.Generator:
    """A generator that depends on the seed and the site's name alone."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + zlib.crc32(site.encode())) % 2**63)


@dataclass(frozen=True)
class TimesNorm(Score):
    """|w_ij| * ||x_j||: the score of Wanda (Sun et al., A Simple and Effective Pruning Approach, ICLR 2024)."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("norm",)

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        matrix = layer.matrix(layer.weight.detach()).abs()
        return layer.from_matrix(matrix * self.seen(stats).per_output("norm", layer.outputs).to(matrix))


@dataclass(frozen=True)
class OBS(Score):
    """w^2 / [H^-1]_jj^power, H = x x^T / rows, damped. power=2 is the group saliency of GQSA (2024), power=1 the
    increase of the error of Optimal Brain Surgeon (Hassibi and Stork, 1993)."""

    power: int = 2
    damp: float = 0.01

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",)

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        from sparsec.sparsifiers.hessian import damped

        seen = self.seen(stats)
        matrix = layer.matrix(layer.weight.detach()).float()
        diagonals = [
            torch.cholesky_inverse(damped(g, seen.rows, self.damp).factor).diagonal() for g in seen.get("gram")
        ]
        diagonal = torch.stack(diagonals).repeat_interleave(layer.outputs // len(diagonals), dim=0)
        return layer.from_matrix(matrix.square() / diagonal.to(matrix) ** self.power)


@dataclass(frozen=True)
class AbsGradient(Score):
    """|E[g]|: entries whose change matters most to first order."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("grad",)

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return self.seen(stats).get("grad").abs()


@dataclass(frozen=True)
class Saliency(AbsGradient):
    """|w * E[g]|: SNIP's connection sensitivity (Lee et al., 2019), also the first-order Taylor score."""

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return (layer.weight.detach().double() * self.seen(stats).get("grad")).abs()


@dataclass(frozen=True)
class GradientFlow(Score):
    """w * (H g): what GraSP (Wang et al., 2020) keeps, the entries whose removal would lower the gradient flow most."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hessian_grad",)

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return layer.weight.detach().double() * self.seen(stats).get("hessian_grad")


@dataclass(frozen=True)
class Fisher(Score):
    """E[g^2], the diagonal of the Fisher information: FISH (Sung et al., 2021). Whether over the data's labels or the
    model's own (`log_likelihoods`) is the loss's choice."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("fisher",)

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return self.seen(stats).get("fisher")


@dataclass(frozen=True)
class Taylor(Score):
    """|loss change| when w becomes 0: |-w g| to first order, |-w g + w^2 F / 2| to second, with the diagonal Fisher
    for the Hessian (Molchanov et al., 2019)."""

    order: int = 1

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise SpecError(f"Taylor: order={self.order!r}; valid: 1, 2")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("grad",) if self.order == 1 else ("grad", "fisher")

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        weight, seen = layer.weight.detach().double(), self.seen(stats)
        change = -weight * seen.get("grad")
        if self.order == 2:
            change = change + 0.5 * weight.square() * seen.get("fisher")
        return change.abs()


@dataclass(frozen=True)
class SNR(Score):
    """|w| / sigma, with the posterior variance of a Laplace approximation: sigma^2 = 1 / (samples * F + precision)."""

    precision: float = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("fisher",)

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        seen = self.seen(stats)
        return layer.weight.detach().double().abs() * (seen.samples * seen.get("fisher") + self.precision).sqrt()


@dataclass(frozen=True)
class Cosine(Score):
    """Contributions to cos(w_row, -g_row): summed over a row (granularity `Filter`) they are the cosine, negated, so
    that a filter whose gradient step points at zero goes first."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("grad",)

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        weight = layer.matrix(layer.weight.detach().double())
        grad = layer.matrix(self.seen(stats).get("grad"))
        sizes = weight.norm(dim=1, keepdim=True) * grad.norm(dim=1, keepdim=True)
        return layer.from_matrix(-weight * grad / sizes.clamp(min=1e-300))


@dataclass(frozen=True)
class EdgeDegree(Score):
    """TEDDY's score of graph edges (Seo et al., ICLR 2024) for a square weight read as an adjacency matrix."""

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return edge_degrees(layer.weight.detach())


def edge_degrees(adjacency: torch.Tensor) -> torch.Tensor:
    """(g_i / d_i) (g_j / d_j) of every edge, 0 elsewhere, with g_i the mean of d_u^-1/2 over the neighbours u of i and
    d the degrees. Self-loops get infinity: they stay. `adjacency` is square; its nonzeros are the edges."""
    if adjacency.dim() != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise SpecError(f"an adjacency matrix is square, this is {tuple(adjacency.shape)}")
    edges = (adjacency != 0).double()
    degree = edges.sum(1).clamp(min=1)
    smooth = (edges @ degree.rsqrt()) / degree / degree
    scores = edges * smooth[:, None] * smooth[None, :]
    loops = edges.diagonal() > 0
    scores.diagonal()[loops] = torch.inf
    return scores


@dataclass(frozen=True)
class SketchProbability(Score):
    """Sampling weights of the sketching view of pruning at initialisation (Bar and Giryes, 2023): |w| ||x|| with data,
    w^2 without. Use it with the `Sample` selector."""

    with_data: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("norm",) if self.with_data else ()

    def __call__(self, layer: Layer, stats: Stats | None = None) -> torch.Tensor:
        return TimesNorm()(layer, stats) if self.with_data else layer.weight.detach().double().square()
