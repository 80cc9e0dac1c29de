"""Kernels for factored weights, and the choices behind them."""

from __future__ import annotations

from sparsec.codegen import batched, torch_conv, torch_rows
from sparsec.codegen.catalog import Tile, Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.errors import SpecError
from sparsec.formats import Format
from sparsec.target import ISAS, Target

OP = "chain"  # y = epilogue(x W^T + bias) as `linear`, from the operands that W is a product of
FORMAT = "factored"
_WIDE: dict[int, Plan] = {  # fp32 lanes -> panels; the widest leaves registers for 8 outputs of a tile
    16: ((8, "panel", 8), (16, "panel", 16), (0, "panel", 32)),
    8: ((8, "panel", 8), (0, "panel", 16)),
    1: ((4, "panel", 4), (0, "panel", 8)),
}
_NARROW: Plan = ((8, "panel", 8), (0, "panel", 16))


def panels(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """The widest panel; where its buffers would leave no room in L2, half of it first."""
    lanes = ISAS[isa].lanes
    wide = _WIDE[lanes]
    if lanes < 16 or max(problem.batches) <= 16:
        return ((wide, ()),)
    fields = fmt.fields()
    features = sum(fields[f"buffer{i}"] for i in range(fields["buffers"]))
    large = 4 * features * wide[-1][2] > target.l2 // 2
    return ((_NARROW, ()), (wide, ())) if large else ((wide, ()),)


def chain_needs(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Tiles, and a factor that is a chain of products."""
    if getattr(fmt, "tiled", None) != 1:
        return "generated chains read tiled operands"
    try:
        fmt.fields()
    except SpecError as error:
        return str(error)
    return None


def torch_needs(problem: Problem, fmt: Format, target: Target) -> str | None:
    """The factor's own buffers, all of them dense."""
    terms = getattr(fmt, "terms", None)
    if terms is None or getattr(fmt, "tiled", None) != 0:
        return "torch's products read the operands as the factor has them"
    if any(operand.format is not None for term in terms() for operand in term.operands):
        return "torch has no fast product with a sparse operand"
    return None


VARIANTS: tuple[Variant, ...] = (
    Variant(
        "chain", OP, FORMAT, "chain.c.jinja", isas=("avx512", "avx2", "portable"), choose=panels,
        needs=chain_needs,
    ),
    Variant(
        "chain_bf16", OP, FORMAT, "chain.c.jinja", dtypes=("bfloat16",), isas=("avx512", "avx2", "portable"),
        choose=panels, needs=chain_needs,
    ),
    Variant("chain_torch", OP, FORMAT, language="torch", needs=torch_needs),  # bf16 would round between the products
    Variant("conv_chain_torch", "conv", "factored_conv", language="torch", needs=torch_conv.needs),
    Variant(
        "rows_torch", "embedding", "factored_rows", language="torch", dtypes=("float32", "bfloat16"), steps=(),
        needs=torch_rows.needs,
    ),
    Variant(
        "bmm_chain", "bmm", "factored_batch", "chain.c.jinja", language="batch", steps=(),
        isas=("avx512", "avx2", "portable"), choose=panels, needs=chain_needs,
    ),
    Variant(
        "bmm_chain_bf16", "bmm", "factored_batch", "chain.c.jinja", language="batch", dtypes=("bfloat16",), steps=(),
        isas=("avx512", "avx2", "portable"), choose=panels, needs=chain_needs,
    ),
    Variant("bmm_torch", "bmm", "factored_batch", language="torch", steps=(), needs=batched.needs),
)  # fmt: skip
