"""Whole convolutional networks, sparse against dense eager, torch.compile and the engines that are installed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch
from timing import exclusive, headline, idle, interleave, write_json
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude

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


def run(name: str, batch: int, zeros: float, rounds: int, peers: bool) -> dict[str, Any]:
    """Prune, compile, check and time one row of the table."""
    make, example = NETWORKS[name]
    torch.manual_seed(0)
    dense, x = make().eval(), example(batch)
    pruned = sparsec.sparsify(dense, Magnitude(zeros), where=prunable(dense))
    compiled = sparsec.compile(pruned, example_inputs=(x,))
    want = values(pruned(x))
    difference = ((values(compiled(x)) - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    models: dict[str, Any] = {"eager": pruned, "sparsec": compiled}
    if peers:
        torch._dynamo.reset()
        models["torch.compile"] = torch.compile(pruned)
    times = interleave({n: (lambda m=m: m(x)) for n, m in models.items()}, rounds, round_s=0.02)
    report = sparsec.report(compiled)
    return {
        "model": name, "batch": batch, "zeros": zeros, "dtype": report.dtype, "difference": difference,
        "ms": {n: 1e3 * t.median for n, t in times.items()},
        "ratio": {n: times["eager"].median / t.median for n, t in times.items()},
        "best_ms": {n: 1e3 * t.best for n, t in times.items()},
        "sparse_sites": report.totals().sparse, "sites": report.totals().sites,
        "timings": report.to_dict()["timings"], "repeated": times["eager"].repeated,
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 16")
    parser.add_argument("--zeros", type=float, action="append", help="default: 0.8 and 0.9")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=False, help="torch.compile as well")
    parser.add_argument("--quick", action="store_true", help="the audio network alone, few rounds")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in NETWORKS]:
        parser.error(f"unknown network {unknown[0]!r}; valid: {', '.join(NETWORKS)}")
    names = ["audio"] if options.quick else options.models or list(NETWORKS)
    batches = [1] if options.quick else options.batch or [1, 16]
    sparsities = [0.9] if options.quick else options.zeros or [0.8, 0.9]
    rows = []
    print(f"{headline()}, fp32; milliseconds (gain over eager)")
    with exclusive():
        if not idle(patience_s=1 if options.quick else 30):
            print("the machine is busy: ratios are what to trust")
        for name in names:
            for batch in batches:
                for zeros in sparsities:
                    row = run(name, batch, zeros, 3 if options.quick else options.rounds, options.peers)
                    rows.append(row)
                    figures = "  ".join(f"{n} {ms:.2f} ({row['ratio'][n]:.2f}x)" for n, ms in row["ms"].items())
                    sites = f"{row['sparse_sites']} of {row['sites']} sites sparse"
                    print(f"{name} x {batch}, {zeros:.0%} zeros: {figures}  [{sites}]", flush=True)
    write_json(options.json, "cnn", rows)


if __name__ == "__main__":
    main()
