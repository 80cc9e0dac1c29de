"""Convolution over points and over kept pixels against the dense convolution of the same grid, as a table and as JSON.

Points lie at random cells, or on a sphere as a scanner sees one. `cold` builds the index and the rulebook in the call,
`warm` finds them; `train` is forward and backward. Masks drop pixels at random. Contenders take turns in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timing import exclusive, headline, idle, interleave, write_json

import sparsec
from sparsec.points import SparseTensor, sparse_conv, submanifold_conv

CHANNELS = (16, 32, 64)
SHARES = (0.1, 0.3, 0.5)
LAYERS = ((64, 56), (128, 28), (256, 14))
Calls = dict[str, Callable[[], Any]]


def cloud(kind: str, size: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(dense grid, mask) of 2 % random cells or of a sphere's surface."""
    mask = torch.rand(1, size, size, size) < 0.02
    if kind == "sphere":
        axis = torch.arange(size) - (size - 1) / 2
        radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
        mask = ((radius - size * 0.4).abs() < 0.5)[None]
    return torch.randn(1, channels, size, size, size) * mask[:, None], mask


def points(kind: str, size: int, channels: int) -> tuple[str, Calls]:
    dense, mask = cloud(kind, size, channels)
    made = SparseTensor.from_dense(dense, mask)
    weight = torch.randn(channels, channels, 3, 3, 3) / (27 * channels) ** 0.5

    def cold() -> SparseTensor:
        return submanifold_conv(SparseTensor(made.coords, made.features, made.shape, 1), weight)

    def train(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            call(*leaves).sum().backward()

    calls: Calls = {
        "dense": lambda: F.conv3d(dense, weight, padding=1),
        "submanifold": lambda: submanifold_conv(made, weight),
        "submanifold cold": cold,
        "regular": lambda: sparse_conv(made, weight, padding=1),
        "dense train": lambda: train(lambda x, w: F.conv3d(x, w, padding=1), dense),
        "submanifold train": lambda: train(
            lambda f, w: submanifold_conv(made.with_features(f), w).features, made.features
        ),
    }
    return f"{kind} {size}^3, {made.occupancy:.1%}, {channels} channels", calls


def masked(channels: int, size: int, images: int) -> tuple[str, Calls]:
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
    x = torch.randn(images, channels, size, size)
    last = x.to(memory_format=torch.channels_last)
    calls: Calls = {"dense": lambda: conv(x)}
    for share in SHARES:
        site = sparsec.mask_outputs(conv, {"<root>": torch.rand(size, size) >= share})
        calls[f"{share:.0%} masked"] = lambda site=site: site(x)  # type: ignore[misc]
        calls[f"{share:.0%} channels_last"] = lambda site=site: site(last)  # type: ignore[misc]
    return f"3x3, {channels} channels, {size} x {size}, batch {images}", calls


def cases(quick: bool) -> Iterator[tuple[str, Calls]]:
    size = 32 if quick else 48
    for kind in ("random", "sphere"):
        for channels in CHANNELS[1:2] if quick else CHANNELS:
            yield points(kind, size, channels)
    for channels, pixels in LAYERS[:1] if quick else LAYERS:
        for images in (1,) if quick else (1, 16):
            yield masked(channels, pixels, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one size of each kind")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write rows and machine to this file")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    print(f"{headline()}; float32, medians of {given.rounds} interleaved rounds")
    with exclusive(), torch.no_grad():
        idle()
        for title, calls in cases(given.quick):
            times = interleave(calls, given.rounds)
            print(f"\n{title}")
            for name, taken in times.items():
                base = times["dense train" if name.endswith("train") else "dense"]
                ratio = base.median / taken.median
                print(f"  {name:<24}{taken.median * 1e6:>11.0f} us {ratio:>8.2f}x")
                rows.append({"case": title, "call": name, "us": taken.median * 1e6, "ratio": ratio})
    write_json(given.json, "points", rows)


if __name__ == "__main__":
    main()
