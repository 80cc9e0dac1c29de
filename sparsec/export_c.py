"""`export_c`: a compiled chain of sparse linear layers and convolutions as C, with its weights and without Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from sparsec.codegen import render
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import SpecError
from sparsec.module import CompiledModule
from sparsec.target import ISAS

_ALIGN = 64
_CODES = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.float16: (2, 16)}
_MOST = 12  # buffers of one kernel
_STEPS = (torch.ops.sparsec.linear.default, torch.ops.sparsec.conv.default)
_VIEWS = ("view", "_unsafe_view", "reshape", "flatten")


def export_c(cm: nn.Module, folder: str | Path) -> Path:
    """Write a compiled model as a C library into `folder` (created if needed) and return it.

    `model.h` declares `model_open(weights)`, `model_run(model, x, batch, y)` and `model_close`; beside it lie
    `model.c`, one file per kernel, `weights.bin`, `CMakeLists.txt`, and a header that stands in for tvm-ffi. The code
    needs an OpenMP runtime and the instruction sets the kernels were generated for, and takes any batch; an element of
    it is a row of MODEL_INPUTS values, for a convolution a whole image (channels, *size) in C order.

    Raises SpecError unless the model is one graph that maps one tensor to one tensor through generated kernels alone,
    with views that leave the batch as it is between them: force kernels with min_speedup=0 and a spec that leaves no
    layer dense.
    """
    if not isinstance(cm, CompiledModule) or cm.call is None:
        raise SpecError(f"export_c takes a model that sparsec.compile captured whole, not {type(cm).__name__}")
    exporter = _Exporter(cm)
    exporter.read()
    return exporter.write(Path(folder))


class _Exporter:
    """Steps, arrays and kernels of one graph, in the order in which they run."""

    def __init__(self, gm: CompiledModule) -> None:
        self.gm = gm
        self.values: dict[fx.Node, int] = {}
        self.steps: list[dict[str, Any]] = []
        self.arrays: list[dict[str, Any]] = []
        self.blob = bytearray()
        self.kernels: dict[str, KernelSpec] = {}
        self.views: list[fx.Node] = []
        self.ranks: list[tuple[fx.Node, int]] = []  # dimensions of what each linear step reads
        self.dtype = torch.float32

    def read(self) -> None:
        output: Any = None
        inputs = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise SpecError(f"export_c takes models with one input, not {len(inputs)}")
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = 0
            elif node.op == "output":
                output = node.args[0]
            elif node.target in _STEPS:
                self._step(node)
            elif _name(node) in _VIEWS:
                self._view(node)
            elif node.op != "get_attr" and node.target is not torch.ops.aten.sym_size.int:  # sizes serve views only
                raise SpecError(
                    f"export_c cannot write node {node.name!r}: it calls {node.target}, and only generated kernels can "
                    "be exported; compile with min_speedup=0 and a spec that leaves no layer dense"
                )
        result = output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output
        if not self.steps or self.values.get(result) != len(self.steps):
            raise SpecError("export_c takes models that return one tensor, that of their last kernel")
        images = len(self.views) > 0 or any(spec.conv is not None for spec in self.kernels.values())
        if images and (deep := [n for n, rank in self.ranks if rank != 2]):
            raise SpecError(
                f"export_c cannot write node {deep[0].name!r}: beside convolutions and views, the rows of a linear "
                "layer must be the batch; flatten its input to two dimensions"
            )

    def _view(self, node: fx.Node) -> None:
        """Contiguous values under another shape are the same bytes, as long as the batch stays what it is."""
        source: Any = node.args[0]
        old, new = (getattr(n.meta.get("val"), "shape", None) for n in (source, node))
        if source not in self.values or not old or not new or old[0] != new[0]:
            raise SpecError(
                f"export_c cannot write node {node.name!r}: {node.target} takes {_sizes(old)} to {_sizes(new)}, and "
                "only views that leave the first dimension as it is can be exported"
            )
        self.views.append(node)
        self.values[node] = self.values[source]

    def _step(self, node: fx.Node) -> None:
        x, buffers, bias, residual, text = node.args
        spec = KernelSpec.parse(text)  # type: ignore[arg-type]
        if spec.device != "cpu" or len(buffers) > _MOST:  # type: ignore[arg-type]
            raise SpecError(
                f"export_c cannot write node {node.name!r}: its kernel {spec.variant} is not one for the CPU"
            )
        self.kernels[spec.symbol] = spec
        self.dtype = getattr(torch, spec.dtype)
        number = -1 if bias is None else self._array(bias)
        first = len(self.arrays)
        for buffer in buffers:  # type: ignore[union-attr]
            self._array(buffer)
        inputs, outputs = spec.in_features, spec.out_features
        if spec.conv is None:
            self.ranks.append((node, len(getattr(x.meta.get("val"), "shape", ()))))  # type: ignore[union-attr]
        else:
            inputs = inputs // spec.conv.taps * spec.conv.groups * math.prod(spec.conv.size)
            outputs *= spec.conv.pixels
        self.steps.append(
            {
                "kernel": spec.symbol, "input": self.values[x],  # type: ignore[index]
                "residual": -1 if residual is None else self.values[residual],  # type: ignore[index]
                "bias": number, "first": first, "count": len(self.arrays) - first,
                "inputs": inputs, "outputs": outputs,
            }
        )  # fmt: skip
        self.values[node] = len(self.steps)

    def _array(self, node: Any) -> int:
        tensor = getattr(self.gm, node.target).detach().contiguous()
        self.blob += bytes(-len(self.blob) % _ALIGN)
        unsigned = tensor.dtype in (torch.uint8, torch.bool)
        code, bits = _CODES.get(tensor.dtype, (int(unsigned), 8 * tensor.element_size()))
        shape = [*tensor.shape, 0, 0, 0][:3]
        self.arrays.append({"offset": len(self.blob), "shape": shape, "ndim": tensor.dim(), "code": code, "bits": bits})
        self.blob += tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return len(self.arrays) - 1

    def write(self, folder: Path) -> Path:
        self.blob += bytes(-len(self.blob) % _ALIGN)
        env = render.environment()
        kernels = [{"name": name, "flags": ";".join(ISAS[spec.isa].flags)} for name, spec in self.kernels.items()]
        code, bits = _CODES[self.dtype]
        values = {
            "kernels": list(self.kernels), "arrays": self.arrays, "steps": self.steps, "nbytes": len(self.blob),
            "item": bits // 8, "code": code, "inputs": self.steps[0]["inputs"], "outputs": self.steps[-1]["outputs"],
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip
        files = {
            "model.h": env.get_template("export_model.h.jinja").render(values),
            "model.c": env.get_template("export_model.c.jinja").render(values),
            "include/tvm/ffi/c_api.h": env.get_template("export_api.h.jinja").render(),
            "CMakeLists.txt": env.get_template("export_cmake.txt.jinja").render(kernels=kernels),
        }
        files.update({f"{name}.c": render.render(spec).text for name, spec in self.kernels.items()})
        try:
            for name, text in files.items():
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text, encoding="utf-8")
            (folder / "weights.bin").write_bytes(self.blob)
        except OSError as error:
            raise SpecError(f"cannot write {folder}: {error.strerror}") from error
        return folder


def _name(node: fx.Node) -> str:
    """The bare name of what a node calls: `view` for `aten.view.default` and for the method."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet if isinstance(packet, str) else str(getattr(packet, "__name__", ""))


def _sizes(shape: Any) -> str:
    return "an unknown shape" if shape is None else f"({', '.join(map(str, shape))})"
