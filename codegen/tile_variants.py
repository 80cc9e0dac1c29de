"""Kernels of dense tiles: blocks in the tile registers of AMX, and masked tiles that are spread into the L1 cache."""

from __future__ import annotations

from sparsec.codegen.catalog import Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.codegen.plans import Tile, codes_in
from sparsec.formats import BSR, Format, Quantized, Tiles
from sparsec.formats.tiles import MAX_WIDE, WORDS, together
from sparsec.target import Target

_WIDE: Plan = ((16, "panel", 16), (32, "panel", 32), (0, "panel", 64))


def panels(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Panels as wide as the tile registers have sums for, 64 columns; without them also of eight."""
    return ((_WIDE if isa == "amx" else ((8, "panel", 8), *_WIDE), ()),)


def blocks(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Four tiles of sums, two by two where blocks are 32 rows high: each operand that is loaded serves twice."""
    return ((((16, "panel", 16), (0, "panel", 32)) if fmt.fields()["r"] % 32 == 0 else _WIDE, ()),)


def whole_tiles(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Blocks must be made of tiles of 16 rows by 32 inputs."""
    r, c = (fmt.fields()[key] for key in "rc")
    if r % 16 or c % 32 or max(r, c) > 128:
        return f"tile registers hold blocks of whole tiles of 16 x 32, up to 128 x 128, not of {r} x {c}"
    return None


def narrow(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Rows of at most 65536 tiles."""
    most = MAX_WIDE * WORDS * together(2 if problem.dtype == "bfloat16" else 4)
    return f"{problem.in_features} inputs are more than {most}" if problem.in_features > most else None


def codes_inside(problem: Problem, fmt: Format, target: Target) -> str | None:
    """The format of the codes must be the template's."""
    return codes_in(Tiles.name, problem, fmt)


def tile_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """In bf16, where tile registers multiply faster than weights come; without them where half the weight is stored and
    none of it stays in L2, so that a dense product waits for it. In fp32 other kernels were faster everywhere."""
    if problem.dtype != "bfloat16" or not 0.05 < problem.density <= 0.7 or "avx512bf16" not in target.isas:
        return ()
    streams = problem.out_features * problem.in_features * 2 > target.l2
    return (Tiles(),) if "amx" in target.isas or (streams and problem.density > 0.35) else ()


def code_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Where a matrix unit multiplies bytes."""
    return (Quantized(Tiles()),) if "amx" in target.isas and problem.density > 0.05 else ()


VARIANTS = (
    Variant(
        "linear_tiles", "linear", Tiles.name, "linear_tiles.c.jinja",
        isas=("avx512", "portable"), choose=panels, candidates=tile_formats, needs=narrow,
    ),
    Variant(
        "linear_tiles_bf16", "linear", Tiles.name, "linear_tiles.c.jinja", dtypes=("bfloat16",),
        isas=("amx", "avx512bf16", "portable"), choose=panels, candidates=tile_formats, needs=narrow,
    ),
    Variant(
        "linear_tiles_codes", "linear", Quantized.name, "linear_tiles.c.jinja",
        isas=("amx", "avx512vbmi2", "portable"), choose=panels, candidates=code_formats, needs=codes_inside,
    ),
    Variant(
        "linear_bsr_amx", "linear", BSR.name, "linear_bsr_amx.c.jinja", dtypes=("bfloat16",),
        isas=("amx",), choose=blocks, needs=whole_tiles,
    ),
)  # fmt: skip
"""Joined to the catalogue."""
