"""The choices behind the catalogue: which formats, batch plans and tiles are worth timing for a problem.

Blocking keeps the packed activations of one panel (`block` inputs by NC batch columns of fp32) inside the L1 data cache
while values and indices stream past them, the panel layout of Elsen et al., Fast Sparse ConvNets (CVPR 2020).
"""

from __future__ import annotations

from sparsec.codegen.kernel import Plan, Problem
from sparsec.formats import CSR, SELL, Bitmask, CSRGroups, Format
from sparsec.formats import sell as sell_format
from sparsec.formats.csr_groups import MAX_BLOCK
from sparsec.target import Target

Tile = tuple[tuple[str, int], ...]

DEFAULT_PLAN: Plan = ((1, "gemv", 1), (8, "panel", 8), (16, "panel", 16), (63, "panel", 32), (0, "panel", 64))
"""A panel no wider than the batch, since idle columns cost as much as busy ones; beyond 64 the registers are full."""


def single(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """One kernel without a plan or a tile."""
    return (((), ()),)


def no_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Leaves the format to the spec."""
    return ()


def no_needs(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Refuses nothing."""
    return None


def linear(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """GEMV for one row of x, then panels that widen with the batch."""
    return ((DEFAULT_PLAN, ()),)


def byte_sums(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Codes in quads, whose products are summed in 32 bits."""
    return codes_in(CSRGroups.name, problem, fmt)


def codes_in(name: str, problem: Problem, fmt: Format) -> str | None:
    """The format inside a quantised one must be `name`; 32 bits hold 65536 products of bytes for certain."""
    inner, inputs = fmt.fields()["format"], problem.in_features
    if inner.name != name:
        return f"it reads codes in {name}, not in {inner.text()}"
    return f"sums of {inputs} products of bytes may overflow 32 bits (at most 65536 inputs)" if inputs > 65536 else None


def bsr(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Panels of at most two vectors of AVX-512: registers then hold twice the rows, which share what is loaded."""
    if not isa.startswith("avx512"):
        return linear(problem, fmt, target, isa)
    return (((*DEFAULT_PLAN[:3], (0, "panel", 32)), ()),)


def panel_block(target: Target, columns: int) -> int:
    """Inputs per block, a power of two, so that block * columns fp32 activations fit L1d.

    Half and double that size timed within noise of it, so one size is offered and not several.
    """
    fit = max(16, target.l1d // (4 * columns))
    return 1 << (fit.bit_length() - 1)


def _block(problem: Problem, target: Target, multiple: int = 1) -> int:
    """The block for the widest panel of the plan, never beyond the matrix."""
    whole = max(1, -(-problem.in_features // multiple)) * multiple
    return min(whole, max(multiple, panel_block(target, DEFAULT_PLAN[-1][2])))


def csr_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """CSR with 16-bit columns where they fit."""
    return (CSR(block=_block(problem, target)).resolve(problem.out_features, problem.in_features),)


def csr_groups_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Groups of four rows: down to 10 % nonzeros the loops without branches and the shared loads beat plain CSR."""
    if problem.density < 0.08:
        return ()
    block = min(_block(problem, target), MAX_BLOCK)
    return (CSRGroups(block).resolve(problem.out_features, problem.in_features),)


def sell(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Panels only, up to the width whose block of activations fits L1d and whose sums fit the registers."""
    narrow: Plan = ((8, "panel", 8), (0, "panel", 16))
    if not isa.startswith("avx512"):
        return ((narrow, ()),)
    block = fmt.fields()["block"]
    widest = ((0, "panel", 64),) if 64 * (block + 1) * 4 <= target.l1d else ((0, "panel", 32),)
    return (((*narrow[:1], (16, "panel", 16), *((32, "panel", 32),)[: widest[0][2] > 32], *widest), ()),)


def sell_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Sliced ELLPACK in the longest blocks whose panels of 32, and of 64, columns fit L1d: the longer ones have fewer
    ends of slices, the wider panels read the weight half as often, which counts where it streams from memory."""
    if problem.density > 0.6:
        return ()
    sizes = [min(sell_format.MAX_BLOCK, max(16, target.l1d // (4 * columns) - 1)) for columns in (32, 64)]
    blocks = dict.fromkeys(min(size, max(1, problem.in_features)) for size in sizes)
    return tuple(SELL(block) for block in blocks)


def bitmask_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Bitmasks of one vector each; smaller than CSR from 6 % density up, and branch-free at one row of x."""
    if problem.density < 0.05:
        return ()
    return (Bitmask(16, _block(problem, target, 16)),)


def bsr_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Blocks are a structure of the weight, not a choice: the spec or `annotate` names them."""
    return ()
