"""The CUDA half of the catalogue, and the choices behind it: batch plans, tiles, and what each kernel refuses."""

from __future__ import annotations

from sparsec.codegen.catalog import Tile, Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.formats import CSR, Bitmask, Format, TiledCSL
from sparsec.target import ARCHITECTURES, Target

ALL = ("float16", "bfloat16", "float32")
TENSOR = ("float16", "bfloat16")  # what mma.sync multiplies with fp32 sums and without losing digits of the inputs

_ROWS: Plan = ((8, "gemv", 8), (63, "panel", 32), (0, "panel", 64))
_PANELS: Plan = ((8, "mma", 8), (16, "mma", 16), (32, "mma", 32), (0, "mma", 64))


def rows(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """A warp per row: lanes over entries for few rows of x, over rows of x for many."""
    return ((_ROWS, ()),)


def merge(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """A warp per 256 rows and entries: a few reads of 32 entries each, and few rows cut in two."""
    return ((((63, "merge", 32), (0, "merge", 64)), (("share", 256),)),)


def gemv(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """A warp per row, for few rows of x."""
    return ((((0, "gemv", 8),), (("share", 64),)),)


def tensor(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Tensor cores take 8 rows of x at least; wider panels read W less often."""
    return ((_PANELS, (("stages", 4),)),)


def whole_tiles(problem: Problem, fmt: Format, target: Target) -> str | None:
    """BSR on tensor cores: blocks of whole 16 x 16 tiles."""
    fields = fmt.fields()
    if fields["r"] % 16 or fields["c"] % 16:
        return f"tensor cores multiply 16 x 16 tiles; {fmt.text()} has blocks of {fields['r']} x {fields['c']}"
    return None


def permuted_tiles(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Rows go back to their places as they are stored; inputs are copied in the order they have."""
    inner, fields = fmt.fields()["format"], fmt.fields()
    if inner.name != "bsr" or fields["col_order"]:
        return f"it reads BSR with reordered rows, not {fmt.text()}"
    return whole_tiles(problem, inner, target)


def whole_blocks(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Row-split BSR: no block reaches over the last input."""
    if problem.in_features % fmt.fields()["c"]:
        return f"{problem.in_features} inputs are not whole blocks of {fmt.fields()['c']}"
    return None


def whole_groups(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Quantised weights: no group reaches over the last input."""
    return f"{problem.in_features} inputs are not whole groups of 16" if problem.in_features % 16 else None


def narrow_blocks(problem: Problem, fmt: Format, target: Target) -> str | None:
    """The input gradient keeps the sums of a block of columns in shared memory."""
    block = fmt.fields()["block"]
    return None if block <= 128 else f"{fmt.text()} has blocks of {block} columns; pack it with CSR(block=128)"


def csr_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """CSR with one pointer per row."""
    return (CSR().resolve(problem.out_features, problem.in_features),)


def bitmask_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Masks of a warp's width."""
    return (Bitmask(32).resolve(problem.out_features, problem.in_features),) if problem.density >= 0.05 else ()


def tiled_csl_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """The tile height of the paper; fewer bytes than dense 16-bit weights below half density."""
    return (TiledCSL(128),) if problem.density < 0.5 else ()


_ARCH = tuple(ARCHITECTURES)

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "linear_csr_cuda", "linear", "csr", "linear_csr.cu.jinja", "cuda", ALL, _ARCH,
        choose=rows, candidates=csr_formats,
    ),
    Variant(
        "linear_csr_merge", "linear", "csr", "linear_csr_merge.cu.jinja", "cuda", ALL, _ARCH,
        choose=merge, candidates=csr_formats,
    ),
    Variant(
        "linear_tiled_csl_mma", "linear", "tiled_csl", "linear_tiled_csl.cu.jinja", "cuda", TENSOR, _ARCH,
        choose=tensor, candidates=tiled_csl_formats,
    ),
    Variant(
        "linear_bsr_mma", "linear", "bsr", "linear_bsr.cu.jinja", "cuda", TENSOR, _ARCH,
        choose=tensor, needs=whole_tiles,
    ),
    Variant(
        "linear_permuted_bsr_mma", "linear", "permuted", "linear_bsr.cu.jinja", "cuda", TENSOR, _ARCH,
        choose=tensor, needs=permuted_tiles,
    ),
    Variant(
        "linear_bsr_rows", "linear", "bsr", "linear_bsr_rows.cu.jinja", "cuda", ALL, _ARCH,
        choose=rows, needs=whole_blocks,
    ),
    Variant(
        "linear_two_four_mma", "linear", "two_four", "linear_two_four.cu.jinja", "cuda", TENSOR, _ARCH,
        choose=tensor,
    ),
    Variant("linear_fan_in_cuda", "linear", "fan_in", "linear_fan_in.cu.jinja", "cuda", ALL, _ARCH, choose=rows),
    Variant(
        "linear_bitmask_cuda", "linear", "bitmask", "linear_bitmask.cu.jinja", "cuda", ALL, _ARCH,
        choose=gemv, candidates=bitmask_formats,
    ),
    Variant(
        "linear_group_int4_cuda", "linear", "group_int4", "linear_group_int4.cu.jinja", "cuda", ALL, _ARCH,
        choose=gemv, needs=whole_groups,
    ),
    Variant(
        "linear_spqr_cuda", "linear", "spqr", "linear_spqr.cu.jinja", "cuda", ALL, _ARCH,
        choose=gemv, needs=whole_groups,
    ),
    # gradients: out_features and in_features are those of the op's y and x
    Variant("linear_dx_csr", "linear_dx", "csr", "linear_dx_csr.cu.jinja", "cuda", ALL, _ARCH, (), needs=narrow_blocks),
    Variant("linear_dw_csr", "linear_dw", "csr", "linear_dw_csr.cu.jinja", "cuda", ALL, _ARCH, ()),
)  # fmt: skip
"""In the order in which `tune="off"` tries them."""
