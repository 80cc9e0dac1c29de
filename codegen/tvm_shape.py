"""The sizes that the text of a TVM kernel is made of, and the declarations that its functions share."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

from sparsec.codegen.kernel import KernelSpec
from sparsec.codegen.tvm_compat import FENCE
from sparsec.codegen.tvm_walk import Walk, walk
from sparsec.errors import SpecError
from sparsec.target import ISAS

PACKED_FLOATS = 8192  # activations of a panel that are packed at a time, so that they stay in the L1 data cache
SUM_FLOATS = 98304  # sums of a panel that wait while further inputs are packed
ONE_THREAD = 12000  # cycles of work below which a second thread costs more than it saves
ROW_COST = 2  # what a row costs besides its entries, in entries

FENCE_CALL = f'T.evaluate(T.call_extern("int32", "{FENCE}"))'
LINE = 16  # 32-bit numbers in a cache line
STACK = 'annotations={"disable_lower_builtin": True}'  # keeps a small buffer on the stack, out of TVM's memory pool


@dataclass(frozen=True)
class Panels:
    """What all kernels have that work on panels: `lanes` columns of the batch in a vector, panels of some `widths`."""

    spec: KernelSpec
    lanes: int
    widths: tuple[int, ...]  # of panels, ascending

    def vector(self, nc: int) -> int:
        """Columns of a panel in one vector."""
        return math.gcd(nc, self.lanes)

    @property
    def registers(self) -> int:
        """Vector registers that sums may fill."""
        return 24 if self.lanes == 16 else 10

    @property
    def arguments(self) -> tuple[tuple[str, str, str], ...]:
        """Name, dtype and shape of the format's buffers, in its order."""
        raise NotImplementedError

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the sizes in those shapes that are known at run time only."""
        return ()

    @property
    def checks(self) -> tuple[str, ...]:
        """Conditions on the buffers that their shapes do not say, without which nothing is computed."""
        return ()

    @property
    def padded(self) -> int:
        """Inputs of a packed panel: those past the last one are zeros."""
        return self.spec.in_features

    def packed(self, nc: int) -> int:
        """Inputs that are packed at a time."""
        return self.padded

    def chunk(self, nc: int) -> int:
        """Rows whose sums are kept before they are stored."""
        return self.spec.out_features

    def scratch(self) -> int:
        """Floats that one task needs."""
        raise NotImplementedError


@dataclass(frozen=True)
class Shape(Panels):
    """The sizes that the text of one linear kernel is made of."""

    walk: Walk

    @property
    def groups(self) -> int:
        """Row groups of the weight."""
        return -(-self.spec.out_features // self.walk.rows)

    @property
    def align(self) -> int:
        """Rows are divided among tasks in multiples of this."""
        return math.lcm(self.walk.rows, self.lanes)

    @property
    def padded_rows(self) -> int:
        return -(-self.spec.out_features // self.align) * self.align

    @property
    def arguments(self) -> tuple[tuple[str, str, str], ...]:
        return self.walk.arguments

    @property
    def symbols(self) -> tuple[str, ...]:
        return self.walk.symbols

    @property
    def checks(self) -> tuple[str, ...]:
        return (self.walk.check,) if self.walk.check else ()

    @property
    def padded(self) -> int:
        return self.walk.padded

    def step(self, nc: int) -> int:
        """K blocks that are packed at a time."""
        return min(self.walk.blocks, max(1, PACKED_FLOATS // (nc * self.walk.block)))

    def packed(self, nc: int) -> int:
        return min(self.padded, self.step(nc) * self.walk.block)

    def chunk(self, nc: int) -> int:
        """A few rows when all inputs are packed at once, else as many as the L2 cache likes."""
        rows = 64 if self.step(nc) >= self.walk.blocks else SUM_FLOATS // nc
        return min(self.padded_rows, max(self.align, rows // self.align * self.align))

    def tile(self, nc: int) -> int:
        """Rows of a group that share each loaded vector: as many as there are registers for."""
        fit = max(1, self.registers // (nc // self.vector(nc)))
        return max(g for g in range(1, self.walk.rows + 1) if self.walk.rows % g == 0 and (g == 1 or g <= fit))

    def scratch(self) -> int:
        """Packed activations, sums, and a tile that is being transposed."""
        return max(((self.packed(nc) + self.chunk(nc)) * nc for nc in self.widths), default=0) + self.lanes**2


def shape_of(spec: KernelSpec) -> Shape:
    """The sizes for a spec. Raises SpecError for what these texts cannot say."""
    return Shape(spec, lanes_of(spec), widths_of(spec, "linear", ("gemv", "panel")), walk(spec))


def widths_of(spec: KernelSpec, op: str, routines: tuple[str, ...]) -> tuple[int, ...]:
    """The widths of the panels in a plan, ascending. Raises SpecError for what no text of `op` can say."""
    if spec.op != op:
        raise SpecError(f"{spec.variant}: this TVM text computes {op}, not {spec.op}")
    if spec.dtype != "float32":
        raise SpecError(f"{spec.variant}: TVM kernels compute in float32, not {spec.dtype}")
    if sum(step.name == "add" for step in spec.epilogue) > 1:
        raise SpecError(f"{spec.variant}: one residual per kernel")
    if not spec.plan or spec.plan[-1][0] != 0:
        raise SpecError(f"{spec.variant}: the last line of a plan must have no limit (0)")
    if bad := [p for p in spec.plan if p[1] not in routines or (p[1] == "panel" and (p[2] < 4 or p[2] % 4))]:
        raise SpecError(
            f"{spec.variant}: plan line {bad[0]}; valid: {', '.join(routines)}, panels with a multiple of 4 columns"
        )
    return tuple(sorted({nc for _, routine, nc in spec.plan if routine == "panel"}))


def lanes_of(spec: KernelSpec) -> int:
    """fp32 values of a vector; four (SSE, NEON) on the baseline of an architecture."""
    return max(4, ISAS[spec.isa].lanes)


def pointer(name: str, dtype: str = "float32") -> str:
    return f'{name}_data: T.handle("{dtype}")'


def weights_of(shape: Panels) -> tuple[list[str], list[str], list[str]]:
    """(parameters, arguments that hand them on, declarations) of the format's buffers."""
    arguments = shape.arguments
    declared = [f'{n} = T.decl_buffer({size}, "{dtype}", data={n}_data)' for n, dtype, size in arguments]
    parameters = [pointer(n, dtype) for n, dtype, _ in arguments] + [f"{s}: T.int64" for s in shape.symbols]
    return parameters, [*(f"{n}_data" for n, _, _ in arguments), *shape.symbols], declared


def outputs_of(shape: Panels) -> tuple[list[str], list[str], list[str]]:
    """The same for y, bias and residual."""
    sizes = sizes_of(shape.spec)
    del sizes["x"]
    return (
        [pointer(n) for n in sizes], [f"{n}_data" for n in sizes],
        [f'{n} = T.decl_buffer({size}, "float32", data={n}_data)' for n, size in sizes.items()],
    )  # fmt: skip


def sizes_of(spec: KernelSpec) -> dict[str, str]:
    """Name and shape of every float32 tensor that is not a buffer of the format, in the order of the call."""
    rows = f"(batch, {spec.out_features})"
    sizes = {"x": f"(batch, {spec.in_features})", "y": rows}
    if spec.bias:
        sizes["bias"] = f"({spec.out_features},)"
    if any(step.name == "add" for step in spec.epilogue):
        sizes["residual"] = rows
    return sizes


def function(name: str, parameters: list[str], body: str) -> str:
    head = f"@T.prim_func(private=True, s_tir=True)\ndef {name}({', '.join(parameters)}):\n"
    return head + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n"


def lines_of(lines: list[str], indent: int) -> str:
    return ("\n" + " " * indent).join(lines)
