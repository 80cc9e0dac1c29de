"""An image as a sum of products of functions of x and of y (F-INR), fitted and drawn through a contraction plan."""

import math
import sys
import time

import torch
from torch import nn

import sparsec


def picture(size: int) -> torch.Tensor:
    """A disc, a ramp and some waves, in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    disc = torch.sigmoid(40 * (0.5 - (x**2 + y**2).sqrt()))
    return 0.4 * disc + 0.2 * (x + 1) / 2 + 0.2 * (1 + torch.sin(9 * x + 4 * y)) / 2 + 0.2 * (1 + torch.cos(7 * y)) / 2


class Axis(nn.Module):
    """One coordinate to `rank` numbers: sines of growing frequency, then a small network."""

    def __init__(self, rank: int, width: int = 64, waves: int = 10) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, waves + 1).float())
        self.net = nn.Sequential(nn.Linear(2 * waves + 1, width), nn.GELU(), nn.Linear(width, rank))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        return self.net(torch.cat([t[:, None], torch.sin(angles), torch.cos(angles)], 1))


class Field(nn.Module):
    """u(x, y) = sum_r f_r(x) g_r(y): an N x N grid takes 2 N evaluations and one contraction."""

    def __init__(self, rank: int = 12) -> None:
        super().__init__()
        self.x, self.y = Axis(rank), Axis(rank)
        self.grid = sparsec.plan("yr,xr->yx", ("height", rank), ("width", rank))
        self.each = sparsec.plan("nr,nr->n", ("points", rank), ("points", rank))

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.grid(self.y(y), self.x(x))

    def pointwise(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.each(self.y(y), self.x(x))


def timed(run: object) -> float:
    run()
    begin = time.perf_counter()
    for _ in range(5):
        run()
    return (time.perf_counter() - begin) / 5


def main() -> None:
    steps = 300 if "--quick" in sys.argv else 1500
    torch.manual_seed(0)
    size = 64
    target, axis = picture(size), torch.linspace(-1, 1, size)
    field = Field()
    optimiser = torch.optim.Adam(field.parameters(), 5e-3)
    for _ in range(steps):
        loss = ((field(axis, axis) - target) ** 2).mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    with torch.no_grad():
        psnr = -10 * ((field(axis, axis) - target) ** 2).mean().log10()
        print(field.grid)
        fine = torch.linspace(-1, 1, 4 * size)
        ys, xs = (t.reshape(-1) for t in torch.meshgrid(fine, fine, indexing="ij"))
        same = torch.allclose(field(fine, fine).reshape(-1), field.pointwise(ys, xs), atol=1e-5)
        ratio = timed(lambda: field.pointwise(ys, xs)) / timed(lambda: field(fine, fine))
    print(f"PSNR {psnr:.1f} dB; grid equals points: {same}; {2 * len(fine)} instead of {2 * len(ys)} evaluations")
    print(f"a {4 * size} x {4 * size} grid is drawn {ratio:.0f}x faster than its points")


if __name__ == "__main__":
    main()
