"""The choices behind the convolution kernels: formats blocked for the tile, and the tiles worth timing.

A tile of T output positions keeps T sums of a row (or of four) in registers; the part of the input that one step of
column blocks reads stays in L1, and the planes of a strip of tiles in L2.
"""

from __future__ import annotations

from sparsec.codegen.conv import Conv
from sparsec.codegen.kernel import Plan, Problem
from sparsec.formats import CSR, CSRGroups, Format
from sparsec.formats.csr_groups import MAX_BLOCK
from sparsec.target import ISAS, Target

Tile = tuple[tuple[str, int], ...]

OFFSETS, PANEL, IN_PLACE = 0, 1, 2
"""Where a kernel finds the input of a column: at an offset into the planes, in a copied panel, in x itself."""

CHUNK_BYTES = 128 << 10  # of sums that wait between two steps
LONGEST_STRIP = 1024  # positions
MAX_ROWS = 16  # outputs of a block
MANY_CHANNELS = 256  # from here on, copies of unaligned planes are worth their making
WIDE = 8  # vectors of a row of CSR at a time: the fewer tiles, the fewer ends of rows, which no predictor foresees
MAX_LOADS = 144  # of an output row of a depthwise kernel: 3 x 3 taps of 16 vectors, 5 x 5 of 5
MAX_DENSE = 256  # inputs per output of the dense kernel


def refuse(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Why no convolution kernel takes this problem."""
    conv = problem.conv
    if conv is None:
        return "a convolution is described by its geometry, and this problem has none"
    channels, rest = divmod(problem.in_features, conv.taps)
    if rest or problem.out_features % conv.groups:
        return f"a ({problem.out_features}, {problem.in_features}) weight does not fit {conv.taps} taps"
    if channels * conv.groups * conv.inputs >= 2**31 or problem.out_features * conv.pixels >= 2**31:
        return "an image of 2**31 elements and more is beyond the kernel's 32-bit sizes"
    if plane_floats(conv, channels * conv.groups, 16) >= 2**28:
        return "the padded planes of one tile would take a gigabyte"
    if isinstance(fmt, CSRGroups) and conv.groups > 1 and problem.out_features // conv.groups % 4:
        return f"groups of four rows cannot be cut from {problem.out_features // conv.groups} channels a group"
    return None


def refuse_depthwise(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Why the depthwise kernel does not take this problem; its weights of a channel must fit the registers."""
    if (reason := refuse(problem, fmt, target)) is not None:
        return reason
    conv = _geometry(problem)
    if conv.groups == 1 or problem.in_features != conv.taps:
        return "the depthwise kernel wants one input channel per group"
    if conv.taps > 64:
        return f"{conv.taps} taps are more than the depthwise kernel unrolls (64)"
    return None


def refuse_blocks(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Why the kernel of blocks does not take this problem."""
    if (reason := refuse(problem, fmt, target)) is not None:
        return reason
    fields = dict(fmt.fields())
    if fields["c"] != 1 or fields["r"] > MAX_ROWS:
        return f"blocks of a convolution are 1 to {MAX_ROWS} outputs by one input, not {fields['r']} by {fields['c']}"
    conv = _geometry(problem)
    if conv.groups > 1 and problem.out_features // conv.groups % fields["r"]:
        return f"blocks of {fields['r']} outputs cannot be cut from {problem.out_features // conv.groups} a group"
    return None


def blocks(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """All columns in one step: a load serves a whole block, so that waiting for L2 is hidden by its multiplications."""
    ((plan, tile),) = dense(problem, fmt, target, isa)
    return ((plan, tile[:-1]),)


def refuse_dense(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Why the dense kernel does not take this problem: large ones are better served by a library's blocked layouts."""
    if (reason := refuse(problem, fmt, target)) is not None:
        return reason
    conv = _geometry(problem)
    if conv.groups > 1 and problem.in_features == conv.taps:
        return "a depthwise convolution has a kernel of its own"
    if problem.in_features > MAX_DENSE:
        return f"{problem.in_features} dense inputs per output are left to torch (at most {MAX_DENSE})"
    return None


def dense(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """All channels in one step, by offset: these weights are small."""
    columns = 4 * max(ISAS[isa].lanes, 4)
    mode = IN_PLACE if _in_place(problem, columns // 4) else OFFSETS
    tile = (
        ("mode", mode), ("columns", columns), ("strip", _strip(problem, target, columns, mode)), ("step", 1),
        ("chunk", 16), ("block", problem.in_features),
    )  # fmt: skip
    return (((), tile),)


def depthwise(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Rows of x where they are, when their columns are few enough to be printed one by one; else padded copies: whole
    rows of one channel at a time, as many as stay in L1 beside those of the next channel."""
    conv = _geometry(problem)
    vectors = -(-conv.out[-1] // max(ISAS[isa].lanes, 4))
    if problem.op == "conv" and len(conv.size) == 2 and conv.stride[1] <= 2 and vectors * conv.taps <= MAX_LOADS:
        return (((), (("mode", IN_PLACE), ("columns", 64), ("strip", 64), ("step", 1), ("chunk", 16))),)
    lay = conv.layout
    room = max(1, target.l1d * 3 // 8 // 4 // len(lay.phases) - lay.span - 32)
    rows = max(1, min(lay.rows, room // lay.pitch))
    rows = -(-lay.rows // -(-lay.rows // rows))  # strips of even height
    tile = (("mode", OFFSETS), ("columns", 64), ("strip", rows * lay.pitch), ("step", 1), ("chunk", 16))
    return (((), tile),)


def tiles(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """1x1 kernels read x in place, or packed planes where x has unaligned ones; others by offset or by a panel."""
    conv = _geometry(problem)
    lanes = max(ISAS[isa].lanes, 4)
    columns = 4 * lanes
    if _in_place(problem, lanes):
        width = WIDE * lanes if fmt.name == "csr" and lanes == 16 else columns
        wide = (((), _tile(problem, fmt, target, width, IN_PLACE)),)
        if conv.pixels % lanes == 0 or problem.in_features < MANY_CHANNELS:
            return wide
        return (*wide, ((), _tile(problem, fmt, target, columns, OFFSETS)))
    offsets, panel = (((), _tile(problem, fmt, target, columns, mode)) for mode in (OFFSETS, PANEL))
    if conv.taps == 1:
        return (offsets,)
    whole = dict(fmt.fields()).get("block", 1) % conv.taps == 0
    return (panel, offsets) if whole else (panel,)


def _in_place(problem: Problem, lanes: int) -> bool:
    """Whether a kernel can read x itself: the pixels of the output are those of the input, and fill a vector."""
    conv = _geometry(problem)
    return conv.layout.flat and problem.dtype == "float32" and conv.pixels >= lanes


def _tile(problem: Problem, fmt: Format, target: Target, columns: int, mode: int) -> Tile:
    conv = _geometry(problem)
    block = dict(fmt.fields()).get("block", 1)
    blocks = -(-problem.in_features // block)
    step = max(1, min(blocks, (target.l1d * 3 // 4) // max(1, block * _column_bytes(conv, columns, mode))))
    chunk = max(16, CHUNK_BYTES // (4 * columns) // 16 * 16)
    return (
        ("mode", mode), ("columns", columns), ("strip", _strip(problem, target, columns, mode)), ("step", step),
        ("chunk", min(chunk, -(-problem.out_features // 16) * 16)),
    )  # fmt: skip


def _column_bytes(conv: Conv, columns: int, mode: int) -> int:
    """What a column of the weight brings into L1 for a tile: by offset, the taps of a channel share its planes."""
    if mode != OFFSETS or conv.taps == 1:
        return 4 * columns
    return max(1, 4 * (columns + conv.layout.span) * len(conv.layout.phases) // conv.taps)


def _strip(problem: Problem, target: Target, columns: int, mode: int) -> int:
    """Positions whose planes fill half of L2: the longer, the less often the rows between two strips are packed."""
    conv = _geometry(problem)
    if mode == IN_PLACE:
        return columns
    channels = problem.in_features // conv.taps * conv.groups
    strip = columns
    while strip < LONGEST_STRIP and 4 * plane_floats(conv, channels, 2 * strip) <= target.l2 // 2:
        strip *= 2
    return strip


def plane_floats(conv: Conv, channels: int, strip: int) -> int:
    """Floats of the planes of a strip, as the template lays them out."""
    return channels * len(conv.layout.phases) * (strip + conv.layout.span + 48)


def _geometry(problem: Problem) -> Conv:
    if problem.conv is None:  # `refuse` has said so before
        raise ValueError("a convolution without geometry")
    return problem.conv


def csr_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """CSR in blocks of whole channels that stay in L1: by offset the taps of a channel share its planes."""
    if problem.conv is None:
        return ()
    room = (target.l1d * 3 // 4) // _column_bytes(problem.conv, _columns(target), PANEL)
    block = max(1, room // problem.conv.taps) * problem.conv.taps
    fmt = CSR(block=min(block, problem.in_features))
    return (fmt.resolve(problem.out_features, problem.in_features),)


def csr_groups_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Groups of four rows, where enough columns are shared; blocks of whole channels if bytes can number them."""
    if problem.conv is None or problem.density < 0.08:
        return ()
    taps = problem.conv.taps
    room = min(MAX_BLOCK, target.l1d // (4 * _columns(target)))  # all of L1: longer runs of a pattern are worth more
    block = room // taps * taps if taps <= room else room
    return (CSRGroups(min(block, problem.in_features)).resolve(problem.out_features, problem.in_features),)


def _columns(target: Target) -> int:
    return 4 * max(ISAS[target.isas[0]].lanes, 4)
