"""A Fourier neural operator on Burgers' equation whose spectral weights are Tucker factors, contracted by a plan."""

import math
import sys
import time

import torch
from torch import nn

import sparsec


def burgers(u: torch.Tensor, steps: int, viscosity: float = 0.02, until: float = 0.5) -> torch.Tensor:
    """u_t + u u_x = nu u_xx on a periodic interval: spectral derivatives, exponential steps for the linear part."""
    wave = torch.fft.rfftfreq(u.shape[-1], 1 / u.shape[-1]) * 2 * math.pi
    dt = until / steps
    decay = torch.exp(-viscosity * wave**2 * dt)
    keep = wave < wave.max() * 2 / 3
    spectrum = torch.fft.rfft(u)
    for _ in range(steps):
        flux = torch.fft.rfft(torch.fft.irfft(spectrum, u.shape[-1]) ** 2) * keep
        spectrum = decay * (spectrum - 0.5j * wave * dt * flux)
    return torch.fft.irfft(spectrum, u.shape[-1])


class SpectralConv(nn.Module):
    """y = F^-1(R . F x) on the lowest modes, with R (in, out, modes) in Tucker form (Kossaifi et al. 2023)."""

    def __init__(self, width: int, modes: int, rank: int, batch: int) -> None:
        super().__init__()
        sizes = {"core": (rank, rank, rank), "a": (width, rank), "b": (width, rank), "m": (modes, rank)}
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(*size, dtype=torch.complex64) / (width * rank) ** 0.25))
        self.modes = modes
        shapes = (batch, width, modes), *sizes.values()
        self.plan = sparsec.plan("bcx,ijk,ci,oj,xk->box", *shapes, dtype=torch.complex64)
        self.rebuilt = sparsec.plan("bcx,cox->box", shapes[0], (width, width, modes), dtype=torch.complex64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x)[..., : self.modes]
        return torch.fft.irfft(self.plan(spectrum, self.core, self.a, self.b, self.m), x.shape[-1])


class Operator(nn.Module):
    def __init__(self, width: int = 24, modes: int = 16, rank: int = 6, batch: int = 16) -> None:
        super().__init__()
        self.lift, self.lower = nn.Conv1d(2, width, 1), nn.Conv1d(width, 1, 1)
        self.spectral = nn.ModuleList(SpectralConv(width, modes, rank, batch) for _ in range(3))
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        grid = torch.linspace(0, 1, u.shape[-1]).expand(u.shape[0], 1, -1)
        x = self.lift(torch.cat([u, grid], 1))
        for spectral, mix in zip(self.spectral, self.mix):
            x = torch.nn.functional.gelu(spectral(x) + mix(x))
        return u + self.lower(x)


def main() -> None:
    steps, points = (60, 64) if "--quick" in sys.argv else (600, 128)
    torch.manual_seed(0)
    grid = torch.linspace(0, 1, points + 1)[:-1]
    waves = torch.randn(64, 4) @ torch.sin(2 * math.pi * torch.arange(1, 5)[:, None] * grid)
    u, target, model = waves[:, None] / 3, burgers(waves / 3, 400)[:, None], Operator()
    print(model.spectral[0].plan)
    first = model.spectral[0]
    saved, factors = first.rebuilt.flops / first.plan.flops, sum(p.numel() for p in first.parameters())
    print(f"weights of one layer: {24 * 24 * 16} dense, {factors} in factors; {saved:.2f}x fewer flops")
    optimiser, begin = torch.optim.Adam(model.parameters(), 5e-3), time.perf_counter()
    for _ in range(steps):
        batch = torch.randperm(48)[:16]
        loss = ((model(u[batch]) - target[batch]) ** 2).mean() / (target[batch] ** 2).mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    error = (model(u[48:]) - target[48:]).norm() / target[48:].norm()
    print(f"held-out error {error:.3f} after {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
