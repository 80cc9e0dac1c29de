"""What calibration knows about one layer, and how it is accumulated batch by batch in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.errors import SpecError
from sparsec.sparsifiers.layers import Layer

FEATURES = ("mean", "var", "norm", "density")
"""Collected always: a few numbers per input feature."""

GRADIENTS = ("grad", "fisher", "hessian_grad", "out_grad")
NEEDS = ("gram", "inputs", "load", *GRADIENTS)
"""Collected when asked for."""

CHUNK = 4096
"""Rows that enter one product: what an observer holds besides its sums is this many rows of features."""

SAMPLES = 2048
"""Rows of `inputs` kept at most."""


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of one layer's inputs, over all rows that are not padding.

    A row is one input vector: of a linear layer a token, of a convolution one unfolded window, whose features are
    ordered as `Layer.matrix`. The leading dimension counts the groups of a convolution and is 1 otherwise:

    `mean`, `var`, `norm` (root of the sum of squares), `density` (share of nonzeros): float64 [groups, features];
    `gram`, sum of x x^T: [groups, features, features]; `inputs`: up to 2048 rows [rows, groups, features], float32;
    `grad`, `fisher`, `hessian_grad`: like the weight, means over samples; `out_grad`: rms of dL/dy, [outputs];
    `load` of a router: int64 [experts], how often it chose each; empty for a layer that chooses nothing.
    """

    site: str
    rows: int
    mean: torch.Tensor
    var: torch.Tensor
    norm: torch.Tensor
    density: torch.Tensor
    gram: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    hessian_grad: torch.Tensor | None = None
    out_grad: torch.Tensor | None = None
    load: torch.Tensor | None = None
    samples: int = 0

    def get(self, name: str) -> torch.Tensor:
        """A statistic. Raises SpecError when it was not collected."""
        value = getattr(self, name)
        if value is None:
            raise SpecError(f"calibration of {self.site!r} collected no {name}; ask for it with needs=({name!r},)")
        return value  # type: ignore[no-any-return]

    def per_output(self, name: str, outputs: int) -> torch.Tensor:
        """A feature statistic as [outputs, features]: each output reads the features of its own group."""
        value = self.get(name)
        return value.repeat_interleave(outputs // value.shape[0], dim=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, torch.Tensor))


class Partial:
    """The sums of one input tensor. Layers that read the same tensor share it."""

    def __init__(self, rows: torch.Tensor, gram: bool, double: bool) -> None:
        """`rows` is [rows, groups, features], finite or not."""
        self.rows = rows.shape[0]
        exact = [chunk.double() for chunk in rows.split(CHUNK)]
        zero = torch.zeros(rows.shape[1:], dtype=torch.float64)
        self.total = sum((c.sum(0) for c in exact), zero)
        self.squares = sum((c.square().sum(0) for c in exact), zero)
        self.nonzero = sum(((c != 0).sum(0) for c in exact), zero)
        self.gram: torch.Tensor | None = None
        if gram:
            kind = torch.float64 if double else torch.float32
            for chunk in rows.split(CHUNK):
                part = chunk.to(kind).movedim(1, 0)
                product = part.mT @ part
                self.gram = product if self.gram is None else self.gram.add_(product)

    @property
    def finite(self) -> bool:
        return bool(self.squares.isfinite().all())


class Observer:
    """The running sums of one layer."""

    def __init__(self, layer: Layer, needs: Iterable[str] = (), double: bool = False) -> None:
        self.layer = layer
        self.needs = tuple(needs)
        self.double = double
        self.count = 0
        self.sums: list[torch.Tensor] = []
        self.gram: torch.Tensor | None = None
        self.kept: list[torch.Tensor] = []
        self.stride = 1
        self.extra: dict[str, torch.Tensor] = {}
        self.samples = 0

    def add(self, partial: Partial, rows: torch.Tensor) -> None:
        """Count the rows of one call."""
        parts = [partial.total, partial.squares, partial.nonzero]
        self.sums = [a + b for a, b in zip(self.sums, parts)] if self.sums else parts
        if partial.gram is not None:
            if self.gram is None:
                kind = torch.float64 if self.double else torch.float32
                self.gram = torch.zeros(partial.gram.shape, dtype=kind)
            self.gram += partial.gram
        if "inputs" in self.needs:
            self._keep(rows)
        self.count += partial.rows

    def _keep(self, rows: torch.Tensor) -> None:
        """Every stride-th row; the stride doubles when there are too many, so the sample spreads over all data."""
        self.kept.append(rows[(-self.count) % self.stride :: self.stride].float().clone())
        while sum(map(len, self.kept)) > SAMPLES:
            self.kept = [torch.cat(self.kept)[::2].clone()]
            self.stride *= 2

    def accumulate(self, name: str, value: torch.Tensor) -> None:
        """Add to a sum over samples: a gradient statistic, in float64."""
        found = self.extra.get(name)
        self.extra[name] = value.double() if found is None else found.add_(value)

    def finish(self) -> Stats | None:
        """The statistics; None when the layer never ran."""
        if not self.count:
            return None
        total, squares, nonzero = (s / self.count for s in self.sums)
        means = {k: v / max(1, self.samples) for k, v in self.extra.items() if k != "out_grad"}
        if "out_grad" in self.extra:
            means["out_grad"] = (self.extra["out_grad"] / self.count).sqrt()
        return Stats(
            self.layer.site, self.count, total, (squares - total.square()).clamp_(min=0), self.sums[1].sqrt(), nonzero,
            self.gram, torch.cat(self.kept) if self.kept else None, samples=self.samples, **means,
        )  # fmt: skip


def needed_bytes(layers: Sequence[Layer], needs: Iterable[str] = (), double: bool = False) -> int:
    """The bytes that the sums of these layers take at once: 8 bytes for each of 3 features sums, for the Gram matrix
    4 (8 with `double`) per pair of features of a group, 4 * 2048 per feature for `inputs`, 8 per weight for each
    gradient statistic."""
    wanted, total = tuple(needs), 0
    for layer in layers:
        width = layer.weight.numel() // max(1, layer.outputs)
        total += 3 * 8 * width * layer.groups
        total += (8 if double else 4) * layer.groups * width * width * ("gram" in wanted)
        total += 4 * SAMPLES * width * layer.groups * ("inputs" in wanted)
        total += 8 * layer.weight.numel() * sum(n in wanted for n in ("grad", "fisher", "hessian_grad"))
    return total


def check_needs(needs: Iterable[str]) -> tuple[str, ...]:
    """The needs beyond `FEATURES`, each once, in a fixed order. Raises SpecError for a name that means nothing."""
    wanted = tuple(needs)
    wrong = [n for n in wanted if n not in (*FEATURES, *NEEDS)]
    if wrong:
        raise SpecError(f"calibration knows no statistic {wrong[0]!r}; valid: {', '.join((*FEATURES, *NEEDS))}")
    return tuple(n for n in NEEDS if n in wanted)


def input_rows(module: Any, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The input of a module as [rows, groups, features], features in the order of `Layer.matrix`."""
    if not x.is_floating_point():
        raise SpecError(
            f"layer {layer.site!r} ({layer.kind}) reads {x.dtype}; calibration knows Linear, Conv1D and convolutions"
        )
    if not layer.op.startswith("conv"):
        return x.reshape(-1, 1, x.shape[-1])
    dims = len(module.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = torch.nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i in range(dims):
        span = module.dilation[i] * (module.kernel_size[i] - 1) + 1
        x = x.unfold(2 + i, span, module.stride[i])[..., :: module.dilation[i]]
    # [batch, channels, *places, *kernel] -> [batch, *places, groups, *kernel, channels of a group]
    x = x.unflatten(1, (layer.groups, -1))
    x = x.movedim(1, 1 + dims + 1).movedim(1, -1)
    return x.reshape(-1, layer.groups, x.shape[-dims - 1 :].numel())
