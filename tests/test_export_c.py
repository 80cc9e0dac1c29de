"""An exported model is built by the C compiler alone and computes what the compiled one does."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec.codegen import toolchain
from sparsec.errors import SpecError

MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include "model.h"
int main(int argc, char **argv) {
  const long batch = atol(argv[3]);
  float *x = malloc(batch * MODEL_INPUTS * 4 + 4), *y = malloc(batch * MODEL_OUTPUTS * 4 + 4);
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  model_t *model = model_open(argv[4]);
  if (argc != 5 || !in || !out || !model) return 1;
  if (fread(x, 4, batch * MODEL_INPUTS, in) != (size_t)(batch * MODEL_INPUTS)) return 2;
  if (model_run(model, x, batch, y)) return 3;
  fwrite(y, 4, batch * MODEL_OUTPUTS, out);
  model_close(model);
  return fclose(out);
}
"""


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(48, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        return self.c(nn.functional.gelu(self.b(x) + x))


class _Convolutions(nn.Module):
    """Strided, with a folded norm, a residual, groups, a pointwise one, and a linear layer on the flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm, self.c, self.d = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1), nn.Linear(8 * 30, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = nn.functional.hardswish(self.norm(self.b(x)) + x)
        return self.d(self.c(x).flatten(1))


def _pruned(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p[torch.rand_like(p) < 0.8] = 0
    return model.eval()


def _compiled() -> nn.Module:
    x = torch.randn(4, 48)
    return sparsec.compile(_pruned(_Mlp()), None, (x,), dynamic_shapes="batch", tune="off", min_speedup=0)


def _program(folder: Path, tmp_path: Path) -> list[str]:
    """The exported sources and MAIN as a program, with the flags of the CMake file."""
    (tmp_path / "main.c").write_text(MAIN)
    tools = toolchain.find()
    flags = dict(re.findall(r"set_source_files_properties\((\w+\.c) PROPERTIES COMPILE_OPTIONS \"([^\"]*)\"", (
        folder / "CMakeLists.txt").read_text()))  # fmt: skip
    objects = []
    for source in [*sorted(folder.glob("*.c")), tmp_path / "main.c"]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        extra = [f for f in flags.get(source.name, "").split(";") if f]
        command = [*tools.program, "-std=gnu11", "-O1", "-fno-math-errno", "-Wall", "-Werror", "-Wno-psabi", *extra,
                   f"-I{folder}", f"-I{folder / 'include'}", "-c", str(source), "-o", objects[-1]]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    subprocess.run([*tools.program, *objects, "-o", str(tmp_path / "run"), "-fopenmp", "-lm"], check=True)
    return [str(tmp_path / "run"), str(tmp_path / "x.bin"), str(tmp_path / "y.bin")]


def _agrees(program: list[str], folder: Path, x: torch.Tensor, y: torch.Tensor) -> None:
    """What the program writes for x is y."""
    Path(program[1]).write_bytes(x.numpy().tobytes())
    subprocess.run([*program, str(len(x)), str(folder / "weights.bin")], check=True)
    found = torch.frombuffer(bytearray(Path(program[2]).read_bytes() or b"\0\0\0\0"), dtype=torch.float32)
    torch.testing.assert_close(found[: y.numel()].view(y.shape), y, rtol=1e-6, atol=1e-6)


def test_an_exported_model_runs_without_python(tmp_path: Path) -> None:
    cm = _compiled()
    folder = sparsec.export_c(cm, tmp_path / "model")
    program = _program(folder, tmp_path)
    for batch in (0, 1, 5, 70):
        x = torch.randn(batch, 48)
        _agrees(program, folder, x, cm(x).detach())
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:-1])
    assert subprocess.run([*program, "1", str(folder / "weights.bin")]).returncode == 1


def test_an_exported_chain_of_convolutions_runs_without_python(tmp_path: Path) -> None:
    """Captured with one batch by tracing, it takes any; its result is that of the eager model."""
    torch.manual_seed(3)
    model = _pruned(_Convolutions())
    cm = sparsec.compile(model, None, (torch.randn(2, 3, 12, 10),), capture="trace", tune="off", min_speedup=0)
    assert [row.decision for row in sparsec.report(cm).rows] == ["sparse"] * 4
    folder = sparsec.export_c(cm, tmp_path / "model")
    program = _program(folder, tmp_path)
    assert "MODEL_INPUTS = 360, MODEL_OUTPUTS = 10" in (folder / "model.h").read_text()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 12, 10)
        with torch.no_grad():
            _agrees(program, folder, x, model(x))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda x: x.reshape(-1, 8), r"reshape takes \(2, 8, 3, 3\) to \(18, 8\)"),
        (lambda x: x.flatten(2), "the rows of a linear layer must be the batch"),
        (lambda x: x.transpose(1, 2).flatten(1), "it calls transpose"),
    ],
)
def test_views_that_move_the_batch_are_refused(
    after: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)
            with torch.no_grad():
                self.last = nn.Linear(after(torch.zeros(2, 8, 3, 3)).shape[-1], 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(after(self.conv(x)))

    x = torch.randn(2, 4, 5, 5)
    cm = sparsec.compile(_pruned(Reshaped()), None, (x,), capture="trace", tune="off", min_speedup=0)
    with pytest.raises(SpecError, match=message):
        sparsec.export_c(cm, tmp_path / "m")


def test_models_with_other_ops_are_refused(tmp_path: Path) -> None:
    class Normed(_Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(super().forward(x), (10,))

    model = Normed().eval()
    cm = sparsec.compile(model, sparsec.CSR(), (torch.randn(4, 48),), tune="off", min_speedup=0)
    with pytest.raises(SpecError, match="aten.layer_norm.default, and only generated kernels"):
        sparsec.export_c(cm, tmp_path / "m")
    with pytest.raises(SpecError, match="captured whole, not Linear"):
        sparsec.export_c(nn.Linear(2, 2), tmp_path / "m")
    assert not (tmp_path / "m").exists()


class _Two(_Mlp):
    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + super().forward(z)


class _Pair(_Mlp):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = torch.relu(self.a(x))
        return x, self.c(x)


@pytest.mark.parametrize(
    ("model", "inputs", "message"), [(_Two, 2, "one input, not 2"), (_Pair, 1, "return one tensor")]
)
def test_other_signatures_are_refused(model: type[nn.Module], inputs: int, message: str, tmp_path: Path) -> None:
    given = tuple(torch.randn(4, 48) for _ in range(inputs))
    cm = sparsec.compile(_pruned(model()), None, given, capture="trace", tune="off", min_speedup=0)
    with pytest.raises(SpecError, match=message):
        sparsec.export_c(cm, tmp_path / "m")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SpecError, match=f"cannot write {tmp_path / 'file'}"):
        sparsec.export_c(_compiled(), tmp_path / "file")
