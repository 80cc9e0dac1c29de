"""Train a small CNN on digits, prune 90 % of its weights, fine-tune, compile: accuracy kept, time saved."""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude


def network(width: int) -> nn.Sequential:
    """3x3, a residual-free middle of 3x3 and 1x1 convolutions, a pooled head."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for kernel in (3, 1, 3, 1):
        layers += [nn.Conv2d(width, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    """Adam; weights that are zero stay zero, so a pruned model keeps its pattern."""
    masks = {p: p != 0 for p in model.parameters() if p.dim() > 1}
    adam = torch.optim.Adam(model.train().parameters(), 2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            adam.step()
            with torch.no_grad():
                for parameter, mask in masks.items():
                    parameter.mul_(mask)
    model.eval()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def milliseconds(models: dict[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    """The best of twenty calls each, in turns."""
    best = dict.fromkeys(models, float("inf"))
    with torch.no_grad():
        for _ in range(20):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def main(quick: bool) -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    epochs = 2 if quick else 10
    dense = network(32 if quick else 96)
    train(dense, x[:1300], y[:1300], epochs)
    pruned = sparsec.sparsify(dense, Magnitude(0.9), where=r"re:(3|6|9|12)")
    before = accuracy(pruned, x[1300:], y[1300:])
    train(pruned, x[:1300], y[:1300], epochs)
    compiled = sparsec.compile(pruned, example_inputs=(x[:64],), tune="off" if quick else "measure")
    print(sparsec.report(compiled))
    with torch.no_grad():
        difference = (compiled(x[:64]) - pruned(x[:64])).abs().max()
    times = milliseconds({"dense": dense, "compiled": compiled}, x[:64])
    print(f"accuracy: dense {accuracy(dense, x[1300:], y[1300:]):.1%}, pruned {before:.1%}, ", end="")
    print(f"fine-tuned {accuracy(pruned, x[1300:], y[1300:]):.1%}; largest difference {difference:.1e}")
    print(f"64 images: dense {times['dense']:.2f} ms, compiled {times['compiled']:.2f} ms")


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
