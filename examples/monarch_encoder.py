"""A small transformer encoder whose feed-forward layers become Monarch matrices: projected, timed and checked.

A Monarch matrix is a product of two block-diagonal matrices around a transpose: 2 n^1.5 products for n inputs instead
of n^2. A dense weight is projected onto the nearest one in closed form (Dao et al., Monarch, ICML 2022).
"""

from __future__ import annotations

import torch
from torch import nn

import sparsec

WIDTH, BLOCKS = 256, 16


class Layer(nn.Module):
    """Attention and a feed-forward network, each with its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def nearly_monarch(layer: nn.Linear) -> None:
    """A weight as training with this structure leaves it: a Monarch matrix and a little noise."""
    shape = tuple(layer.weight.shape)
    factor = sparsec.Monarch(BLOCKS)
    with torch.no_grad():
        buffers = {k: torch.randn(s) / s[-1] ** 0.5 for k, s in factor.shapes(shape).items()}
        exact = factor.reconstruct(buffers, shape)
        layer.weight.copy_(exact + 1e-3 * exact.std() * torch.randn(shape))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer()).eval()
    for layer in model:
        nearly_monarch(layer.up)
        nearly_monarch(layer.down)
    x = torch.randn(4, 64, WIDTH)
    spec = {r"re:.*\.(up|down)": sparsec.Monarch(BLOCKS), "_default": None}
    fast = sparsec.compile(model, spec, (x,), tolerance=0.01)
    report = sparsec.report(fast)
    print(report)
    for row in report.rows:
        if row.decision == "factored":
            print(f"{row.site}: {row.reason}")
    rebuilt = nn.Sequential(Layer(), Layer()).eval()
    rebuilt.load_state_dict(sparsec.dense_state_dict(fast))
    with torch.no_grad():
        far, near = (fast(x) - model(x)).abs().max(), (fast(x) - rebuilt(x)).abs().max()
    print(f"largest difference to the model {far:.1e}, to its Monarch projection {near:.1e}")


if __name__ == "__main__":
    main()
