"""Small networks, one for each way in which channels depend on each other, in float64 and with lively statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(a: int, b: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(b))


class Plain(nn.Module):
    """conv, norm, relu, pool, conv, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.head(F.sigmoid(self.second(x)).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.short = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 8), conv_bn(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + self.short(x)) + x
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """DenseNet: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Inverted(nn.Module):
    """MobileNetV2 with squeeze-and-excite: expansion, depthwise, gate, linear bottleneck, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.expand = nn.ModuleList(conv_bn(8, 24, 1) for _ in range(2))
        self.depth = nn.ModuleList(conv_bn(24, 24, 3, groups=24) for _ in range(2))
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.reduce = nn.ModuleList(conv_bn(24, 8, 1) for _ in range(2))
        self.twice = nn.Conv2d(8, 16, 3, groups=8)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.stem(x))
        for expand, depth, reduce in zip(self.expand, self.depth, self.reduce):
            y = F.relu6(depth(F.relu6(expand(x))))
            y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
            x = x + reduce(y)
        return self.head(self.twice(x).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolution, channel shuffle, group norm, PReLU, transposed convolution, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mix = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 1)
        self.left, self.right = nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.act, self.up, self.inst = nn.PReLU(8), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.GroupNorm(8, 8)
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.left(F.relu(self.mix(F.silu(self.norm(self.stem(x))))))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(
            F.pixel_shuffle(F.interpolate(self.inst(self.up(self.act(self.right(x)))), scale_factor=0.5), 2)
        )


class Attention(nn.Module):
    """Fused query, key and value as in timm, beside a gated feed-forward whose halves are one tensor."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.embed, self.place = nn.Linear(6, dim), nn.Parameter(torch.randn(1, 5, dim))
        self.qkv, self.proj, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.gate, self.down, self.head = nn.Linear(dim, 24), nn.Linear(12, dim), nn.Linear(dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.place
        n, s, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, s, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.head_dim**-0.5, -1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, s, -1))
        a, b = self.gate(x).chunk(2, -1)
        return self.head((x + self.down(F.gelu(a) * b)).mean(1))


IMAGE = (2, 3, 8, 8)
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (2, 3, 8, 8)),
    "residual": (Residual, IMAGE),
    "concat": (Concat, IMAGE),
    "inverted": (Inverted, IMAGE),
    "grouped": (Grouped, IMAGE),
    "attention": (Attention, (2, 5, 6)),
}
TRANSFORMERS = ("resnet", "mobilenet", "vit", "llama", "gpt2")


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Any, ...]]:
    """(model, example inputs) in eval mode, seeded."""
    torch.manual_seed(1)
    if name in ZOO:
        kind, shape = ZOO[name]
        model, example = kind(), torch.randn(shape, dtype=dtype)
    else:
        model, example = _from_config(name, dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if getattr(module, "affine", False) or isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    return model.to(dtype).eval(), (example,)


def _from_config(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    import transformers as hf

    image, tokens = torch.randn(1, 3, 32, 32, dtype=dtype), torch.randint(0, 40, (2, 5))
    common: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name == "resnet":
        config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], layer_type="bottleneck")
        return hf.ResNetForImageClassification(config), image
    if name == "mobilenet":
        config = hf.MobileNetV2Config(depth_multiplier=0.35, finegrained_output=False)
        return hf.MobileNetV2ForImageClassification(config), image
    if name == "vit":
        config = hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=16,
        )
        return hf.ViTForImageClassification(config), image
    if name == "llama":
        config = hf.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            **common,
        )
        return hf.LlamaForCausalLM(config), tokens
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16, **common)
    return hf.GPT2LMHeadModel(config), tokens
