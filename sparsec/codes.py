"""The stable codes of report rows: what happened to a site, in a form that programs can test and people can read.

A code never changes its meaning. The hundreds say who decided: 0 installed, 1 the clock, 2 the spec, 3 the dtype,
4 the toolchain, 5 verification, 6 capture, 7 the device, 8 the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Any

from sparsec.errors import SpecError, nearest

INSTALLED = "SPC0000"
INSTALLED_UNTIMED = "SPC0001"
INSTALLED_MODEL = "SPC0002"
INSTALLED_FORCED = "SPC0003"
INSTALLED_SHARED = "SPC0004"
INSTALLED_BUCKETS = "SPC0005"
FACTORED = "SPC0006"
PREPACKED = "SPC0010"
DENSE_KERNEL = "SPC0011"
DENSE_FASTER = "SPC0100"
WITHIN_MARGIN = "SPC0101"
MODEL_SAYS_DENSE = "SPC0102"
SPEC_DENSE = "SPC0200"
TOO_DENSE = "SPC0201"
FORMAT_REFUSES = "SPC0202"
TOLERANCE = "SPC0203"
LOSSY = "SPC0204"
DTYPE = "SPC0300"
COMPLEX = "SPC0301"
QUANTISED = "SPC0302"
NO_TOOLCHAIN = "SPC0400"
BUILD_FAILED = "SPC0401"
VERIFY_FAILED = "SPC0500"
NOT_CAPTURED = "SPC0600"
NEVER_CALLED = "SPC0601"
NO_EXAMPLES = "SPC0602"
NOT_CONSTANT = "SPC0603"
PRUNED = "SPC0604"
DEVICE = "SPC0700"
NO_KERNEL = "SPC0800"
NO_VARIANT = "SPC0801"
EMPTY = "SPC0802"


@dataclass(frozen=True)
class Code:
    """One outcome: its code, a title of a few words, and the sentence, whose braces name the values it needs."""

    code: str
    title: str
    template: str


_TABLE = (
    Code(INSTALLED, "faster than dense", "{speedup:.2f}x as fast as dense, as {format}"),
    Code(INSTALLED_UNTIMED, "installed untimed", "installed as {format} without timing, because tune={tune!r}"),
    Code(INSTALLED_MODEL, "faster by the cost model", "the cost model expects {speedup:.2f}x over dense, as {format}"),
    Code(INSTALLED_FORCED, "forced", "installed as {format} because min_speedup=0; measured {speedup:.2f}x of dense"),
    Code(INSTALLED_SHARED, "shares a packed weight", "runs on the packed weight of {owner}, as {format}"),
    Code(INSTALLED_BUCKETS, "sparse for some batches", "sparse at batch {sparse}; dense kept for batch {dense}"),
    Code(FACTORED, "factored", "replaced by {factor} with a relative error of {error:.2e}: {speedup:.2f}x over dense"),
    Code(PREPACKED, "dense, prepacked", "stays dense; its weight is prepacked for {library}: {speedup:.2f}x"),
    Code(DENSE_KERNEL, "dense, generated", "stays dense, on the generated kernel {variant}: {speedup:.2f}x"),
    Code(DENSE_FASTER, "dense is faster", "dense takes {dense_us:.1f} us, {variant} {sparse_us:.1f} us"),
    Code(
        WITHIN_MARGIN,
        "gain too small",
        "{variant} is {speedup:.2f}x as fast as dense, less than min_speedup={min_speedup:g}",
    ),
    Code(MODEL_SAYS_DENSE, "slower by the cost model", "by the cost model {variant} reaches {speedup:.2f}x of dense"),
    Code(SPEC_DENSE, "dense by the spec", "the spec leaves this site dense"),
    Code(TOO_DENSE, "too dense", "{density:.1%} of the weight is nonzero, too much for any kernel to be tried"),
    Code(FORMAT_REFUSES, "format refuses", "the weight does not fit {format}: {detail}"),
    Code(TOLERANCE, "over the tolerance", "{factor} has a relative error of {error:.2e}, over tolerance={tolerance:g}"),
    Code(LOSSY, "lossy, and forbidden", "{factor} is lossy, and tolerance=0 forbids that"),
    Code(DTYPE, "dtype without kernels", "no kernels for {dtype}; there are some for {known}"),
    Code(COMPLEX, "complex weight", "complex weights ({dtype}) stay dense"),
    Code(QUANTISED, "quantised weight", "the weight is quantised already ({detail}) and stays as it is"),
    Code(NO_TOOLCHAIN, "no compiler", "no kernel could be built: {detail}"),
    Code(BUILD_FAILED, "kernel build failed", "{variant} did not build: {detail}"),
    Code(VERIFY_FAILED, "verification failed", "{variant} disagreed with its float64 oracle: {detail}"),
    Code(NOT_CAPTURED, "not captured", "the module could not be captured: {detail}"),
    Code(NEVER_CALLED, "never called", "the example inputs never reach this module"),
    Code(NO_EXAMPLES, "no example inputs", "a {op} cannot be timed without example_inputs; pass them to compile"),
    Code(NOT_CONSTANT, "weight is computed", "the weight is computed at run time: {detail}"),
    Code(PRUNED, "pruned, not compiled", "pruned by {sparsifier}; compile the model to make it faster"),
    Code(DEVICE, "device without kernels", "the weight lives on {device}, for which there are no kernels"),
    Code(NO_KERNEL, "op without kernels", "there are no kernels for {op} yet"),
    Code(NO_VARIANT, "no kernel takes it", "no kernel of the catalogue takes this site: {detail}"),
    Code(EMPTY, "empty weight", "a weight of shape {shape} has nothing to compute"),
)

CODES: dict[str, Code] = {c.code: c for c in _TABLE}
"""Every code, in ascending order."""


def lookup(code: str) -> Code:
    """The table entry of `code`. Raises SpecError for a code that does not exist."""
    if code not in CODES:
        raise SpecError(f"no report code {code!r}; {nearest(code, CODES)}")
    return CODES[code]


def sentence(code: str, **values: Any) -> str:
    """The sentence of `code` with its values filled in. Raises SpecError when a value it needs is not given."""
    template = lookup(code).template
    needed = [name for _, name, _, _ in Formatter().parse(template) if name]
    missing = [name for name in needed if name not in values]
    if missing:
        raise SpecError(f"the sentence of {code} needs {', '.join(missing)}; given: {', '.join(values) or 'nothing'}")
    return template.format(**values)


def markdown() -> str:
    """All codes as a page of documentation."""
    head = [
        "# Report codes",
        "",
        "Every row of a report has one of these codes and its sentence. Codes are stable: programs may test them.",
        "",
        "| code | title | sentence |",
        "|---|---|---|",
    ]
    return "\n".join(head + [f"| {c.code} | {c.title} | {c.template} |" for c in CODES.values()]) + "\n"
