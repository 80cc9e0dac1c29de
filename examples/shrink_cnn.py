"""Remove half of the channels of a residual CNN on scikit-learn's digits, really, and fine-tune once."""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import sparsec


class Net(nn.Module):
    """A stem, two residual blocks, a pooled linear head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner = nn.ModuleList(nn.Conv2d(width, 2 * width, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(width * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        for inner, outer in zip(self.inner, self.outer):
            x = F.relu(x + outer(F.relu(inner(x))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    adam = torch.optim.Adam(model.train().parameters(), 2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            adam.step()
    model.eval()


def describe(name: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name:16} accuracy {right:6.1%}, {count:6d} parameters, {min(times) * 1e3:5.1f} ms for {len(x)} images")


def main(quick: bool) -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    model = Net(12 if quick else 24)
    train(model, x[:1300], y[:1300], 4 if quick else 12)
    describe("dense", model, x[1300:], y[1300:])
    groups = sparsec.dependency_groups(model, x[:2])
    for group in groups:
        print(" ", group)
    small = sparsec.shrink(model, [g.smallest(0.5) for g in groups if g.prunable])
    describe("half the channels", small, x[1300:], y[1300:])
    train(small, x[:1300], y[:1300], 3 if quick else 6)
    describe("fine-tuned", small, x[1300:], y[1300:])


if __name__ == "__main__":
    main("--quick" in sys.argv)
