"""Look inside a compiled model: the graph after each pass, one kernel's source, a picture, the report as data."""

import difflib
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude


class Block(nn.Module):
    """A residual block with a normalised input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def main() -> None:
    torch.manual_seed(0)
    blocks = 1 if "--quick" in sys.argv else 2
    model = sparsec.sparsify(nn.Sequential(*(Block(256) for _ in range(blocks))).eval(), Magnitude(0.9))
    x = torch.randn(32, 256)
    report = sparsec.analyze(model, example_inputs=(x,))  # decides everything, installs nothing
    print(report)

    compiled = sparsec.compile(model, example_inputs=(x,), min_speedup=0)  # 0: install whatever the clock says
    history = sparsec.graphs(compiled)
    print("passes:", ", ".join(name for name, _ in history))
    (_, before), (_, after) = history[0], history[-1]
    for line in difflib.unified_diff(before.splitlines(), after.splitlines(), "captured", "lowered", n=0, lineterm=""):
        print(line[:120])

    row = next(r for r in sparsec.report(compiled).rows if r.decision == "sparse")
    text = sparsec.source(compiled, row.site)
    print(f"{row.site} runs {row.variant}, {len(text.splitlines())} lines of C:")
    print("\n".join(text.splitlines()[:12]))

    folder = Path(tempfile.mkdtemp()) if "--quick" in sys.argv else Path()
    print("picture:", sparsec.draw(compiled, folder / "graph.svg"))
    slowest = max(sparsec.report(compiled).to_dict()["rows"], key=lambda r: r["sparse_us"] or 0)
    print("most time:", slowest["site"], f"{slowest['sparse_us']:.0f} us of {slowest['dense_us']:.0f} us dense")


if __name__ == "__main__":
    main()
