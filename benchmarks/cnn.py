"""Whole convolutional networks, sparse against dense eager, torch.compile and the engines that are installed."""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import measure, missing
from speedups import figure
from timing import exclusive, headline, idle, interleave, write_json
from torch import nn

import sparsec
from sparsec.sparsifiers import Block, Compose, Magnitude, Sparsifier

Example = Callable[[int], torch.Tensor]


def mobilenet_v1() -> nn.Module:
    from transformers import MobileNetV1Config, MobileNetV1Model

    return MobileNetV1Model(MobileNetV1Config())


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2Model

    return MobileNetV2Model(MobileNetV2Config())


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig())


def efficientnet_b0() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetModel

    sizes = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
    return EfficientNetModel(EfficientNetConfig(**sizes))


def regnet_y() -> nn.Module:
    from transformers import RegNetConfig, RegNetModel

    config = RegNetConfig(hidden_sizes=[48, 120, 336, 888], depths=[2, 6, 17, 2], groups_width=24, layer_type="y")
    return RegNetModel(config)


def audio() -> nn.Module:
    """A stack of strided 1d convolutions over raw samples, in the manner of speech encoders."""
    layers: list[nn.Module] = []
    channels = 1
    for out, kernel, stride in ((64, 16, 4), (128, 5, 2), (256, 5, 2), (256, 3, 2), (256, 3, 2), (512, 3, 2)):
        layers += [nn.Conv1d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm1d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers)


def image(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def sound(batch: int) -> torch.Tensor:
    return torch.randn(batch, 1, 16000, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "mobilenet_v1": (mobilenet_v1, image),
    "mobilenet_v2": (mobilenet_v2, image),
    "resnet50": (resnet50, image),
    "efficientnet_b0": (efficientnet_b0, image),
    "regnet_y": (regnet_y, image),
    "audio": (audio, sound),
}


def prunable(model: nn.Module) -> str:
    """A pattern of the convolutions that are pruned: neither the one that reads the input nor depthwise ones."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, convolutions)]
    names = [n for n, m in found if m.in_channels > 3 and m.groups < m.in_channels]
    return "re:" + "|".join(re.escape(name) for name in names)


def values(output: Any) -> torch.Tensor:
    """The feature map of any of the networks."""
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def pruner(zeros: float, block: int) -> Sparsifier:
    """The sparsifier of a row: single weights, or `block` output channels of one input together."""
    return Magnitude(zeros) if block == 1 else Compose(zeros, unit=Block(block, 1))


class _Features(nn.Module):
    """The feature map alone, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return values(self.model(x))


def run(name: str, batch: int, zeros: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prune, compile, check and time one row of the table."""
    make, example = NETWORKS[name]
    torch.manual_seed(0)
    dense, x = make().eval(), example(batch)
    pruned = sparsec.sparsify(dense, pruner(zeros, options.block), where=prunable(dense))
    compiled = sparsec.compile(pruned, example_inputs=(x,))
    want = values(pruned(x))
    difference = ((values(compiled(x)) - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    calls: dict[str, Callable[[], Any]] = {"sparsec": lambda: compiled(x), "eager": lambda: pruned(x)}
    if options.compile:
        torch._dynamo.reset()
        inductor = torch.compile(pruned)
        calls["torch.compile"] = lambda: inductor(x)
    ms: dict[str, float]
    if options.peers:
        ms = measure(_Features(pruned), (x,), calls, options.deepsparse, options.rounds, folder, 0.2)
    else:
        ms = {n: 1e3 * t.median for n, t in interleave(calls, options.rounds).items()}
    report = sparsec.report(compiled)
    return {
        "model": name, "batch": batch, "zeros": zeros, "block": options.block, "dtype": report.dtype,
        "difference": difference, "ms": ms, "ratio": ms["eager"] / ms["sparsec"],
        "sparse_sites": report.totals().sparse, "sites": report.totals().sites, "timings": report.to_dict()["timings"],
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line: ours, and how many times longer every peer takes."""
    ours = row["ms"]["sparsec"]
    peers = sorted((ms / ours, name) for name, ms in row["ms"].items() if name != "sparsec")
    blocks = f" in blocks of {row['block']}" if row["block"] > 1 else ""
    rest = "  ".join(f"{name} {ratio:.2f}x" for ratio, name in peers)
    sites = f"{row['sparse_sites']} of {row['sites']} sites"
    print(
        f"{row['model']} x {row['batch']}, {row['zeros']:.0%} zeros{blocks}: {ours:.2f} ms ({sites});  {rest}",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 16")
    parser.add_argument("--zeros", type=float, action="append", help="default: 0.8 and 0.9")
    parser.add_argument("--block", type=int, default=1, help="prune blocks of so many output channels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument(
        "--peers", action="store_true", help="ONNX Runtime and OpenVINO as well, with pauses"
    )
    parser.add_argument("--deepsparse", metavar="PYTHON", help="with --peers: interpreter that has deepsparse 1.8.0")
    parser.add_argument("--quick", action="store_true", help="the audio network alone, few rounds")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--plot", help="also draw gains over eager against zeros, as SVG, here")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in NETWORKS]:
        parser.error(f"unknown network {unknown[0]!r}; valid: {', '.join(NETWORKS)}")
    options.models = ["audio"] if options.quick else options.models or list(NETWORKS)
    options.batch = [1] if options.quick else options.batch or [1, 16]
    options.zeros = [0.9] if options.quick else options.zeros or [0.8, 0.9]
    options.rounds = 3 if options.quick else options.rounds
    return options


@torch.inference_mode()
def main() -> None:
    options = arguments()
    absent = missing() if options.peers else []
    print(f"{headline()}, fp32" + (f"; not installed: {', '.join(absent)}" if absent else ""))
    rows = []
    with exclusive(), tempfile.TemporaryDirectory() as folder:
        if not idle(patience_s=1 if options.quick else 30):
            print("the machine is busy: ratios are what to trust")
        for name, batch, zeros in itertools.product(options.models, options.batch, options.zeros):
            rows.append(run(name, batch, zeros, options, Path(folder)))
            show(rows[-1])
    write_json(options.json, "cnn", rows)
    if options.plot:
        Path(options.plot).write_text(figure(rows, lambda row: f"{row['model']}, {row['dtype']}"), encoding="utf-8")


if __name__ == "__main__":
    main()
