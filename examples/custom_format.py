"""A new storage format with a kernel of its own, added from outside: each row keeps one window of consecutive inputs.

Convolution-like and banded layers have this structure. The kernel is the template `windows.c.jinja` beside this file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import sparsec
from sparsec.formats import Format
from sparsec.formats._base import Buffers, pattern


@dataclass(frozen=True)
class Windows(Format):
    """Every row stores `width` consecutive values, from column `starts[row]` on."""

    width: int = 8
    name = "windows"
    buffers = ("values", "starts")
    regular = True

    def refuse(self, dense: torch.Tensor) -> str | None:
        found = pattern(dense)
        span = found.shape[1] - found.flip(1).int().argmax(1) - found.int().argmax(1)
        wide = (span > self.width) & found.any(1)
        return f"row {int(wide.nonzero()[0])} spans more than {self.width} columns" if wide.any() else None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        if reason := self.refuse(dense):
            raise sparsec.FormatError(reason)
        starts = pattern(dense, mask).int().argmax(1).clamp(max=dense.shape[1] - self.width)
        columns = starts[:, None] + torch.arange(self.width)
        return {"values": dense.gather(1, columns).contiguous(), "starts": starts.int()}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        columns = buffers["starts"].long()[:, None] + torch.arange(self.width)
        return buffers["values"].new_zeros(rows, cols).scatter_(1, columns, buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, starts = buffers["values"], buffers["starts"]
        if values.shape != (rows, self.width) or starts.shape != (rows,) or starts.dtype != torch.int32:
            raise sparsec.FormatError(f"windows: values must be ({rows}, {self.width}), starts int32 ({rows},)")
        if rows and (starts.min() < 0 or starts.max() > cols - self.width):
            raise sparsec.FormatError(f"windows: a start lies outside 0..{cols - self.width}")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return rows * (self.width * itemsize + 4)


TEMPLATE = str(Path(__file__).with_name("windows.c.jinja").resolve())
KERNEL = sparsec.Variant("linear_windows", "linear", "windows", TEMPLATE, isas=("avx2", "portable"), steps=("relu",))


def main() -> None:
    sparsec.register(Windows)
    sparsec.register(KERNEL)
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1024)
    with torch.no_grad():
        layer.weight *= (torch.arange(1024)[:, None] - torch.arange(1024)).abs() <= 8  # a band of 17 columns
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(4, 1024)
    compiled = sparsec.compile(model, Windows(17), (x,))
    print(sparsec.report(compiled))
    print(sparsec.source(compiled, "0").partition("#include <tvm")[0])  # the kernel, without its entry
    with torch.no_grad():
        print(f"largest difference: {(compiled(x) - model(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
