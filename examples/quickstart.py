"""Prune a small network, compile it, and see what was done to every layer and why."""

import torch
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.Linear(1024, 10)).eval()
    x = torch.randn(64, 1024)

    pruned = sparsec.sparsify(model, Magnitude(0.9))  # a copy; the smallest 90 % of each weight become zero
    compiled = sparsec.compile(pruned, example_inputs=(x,))

    print(sparsec.report(compiled))
    with torch.no_grad():
        print(f"largest difference: {(compiled(x) - pruned(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
