"""An exported model is built by the C compiler alone and computes what the compiled one does."""

from __future__ import annotations

import re
import subprocess
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


def _compiled() -> nn.Module:
    model = _Mlp().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p[torch.rand_like(p) < 0.8] = 0
    return sparsec.compile(model, None, (torch.randn(4, 48),), dynamic_shapes="batch", tune="off", min_speedup=0)


def test_an_exported_model_runs_without_python(tmp_path: Path) -> None:
    cm = _compiled()
    folder = sparsec.export_c(cm, tmp_path / "model")
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
    for batch in (0, 1, 5, 70):
        x = torch.randn(batch, 48)
        (tmp_path / "x.bin").write_bytes(x.numpy().tobytes())
        names = [str(tmp_path / "x.bin"), str(tmp_path / "y.bin"), str(batch), str(folder / "weights.bin")]
        subprocess.run([str(tmp_path / "run"), *names], check=True)
        y = torch.frombuffer(bytearray((tmp_path / "y.bin").read_bytes() or b"\0\0\0\0"), dtype=torch.float32)
        torch.testing.assert_close(y[: batch * 10].view(batch, 10), cm(x), rtol=1e-6, atol=1e-6)
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:-1])
    done = subprocess.run([str(tmp_path / "run"), *names])
    assert done.returncode == 1


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
