"""Prune a small network, compile it, and see what was done to every layer and why."""

import sys

import torch
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude

QUICK = "--quick" in sys.argv


def main() -> None:
    torch.manual_seed(0)
    width = 256 if QUICK else 1024
    layers = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Linear(width, 10)
    model, x = nn.Sequential(*layers).eval(), torch.randn(64, width)

    pruned = sparsec.sparsify(model, Magnitude(0.9))  # a copy; the smallest 90 % of each weight become zero
    compiled = sparsec.compile(pruned, example_inputs=(x,))

    print(sparsec.report(compiled))
    with torch.no_grad():
        print(f"largest difference: {(compiled(x) - pruned(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
