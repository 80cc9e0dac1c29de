"""factor: replace weights by the factors that the spec asks for, where a chain of small products beats the dense op.

Lossy: it changes results by more than rounding, so it runs only on sites whose value in the spec is a Factor or a sum
with one, and not at all with `tolerance=0`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import fx

from sparsec import codes, verify
from sparsec.codegen import catalog, torch_conv
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec, Problem
from sparsec.driver import Context
from sparsec.errors import FormatError, PassError
from sparsec.factors import Factor
from sparsec.factors.chain import Factored
from sparsec.factors.conv_chain import FactoredConv
from sparsec.factors.uses import conv_flops
from sparsec.formats import Buffers, Format
from sparsec.graph import Fact, get_constant
from sparsec.passes import _product
from sparsec.passes._prepacked import Prepacked
from sparsec.passes._propose import Candidate, Proposal, dense_row
from sparsec.passes._trial import Choice, Trial
from sparsec.passes.select import Select
from sparsec.report import Row

OP = "chain"
"""The op of the catalogue whose kernels multiply by a factored weight; those of convolutions are of op "conv"."""

Stored = Factored | FactoredConv
_PIXELS = 1 << 14  # of the images that are checked


class Factorise(Select):
    """linear(x, W, b), spec LowRank(64) --> its fact gets the Choice of a chain: `lower` puts it into the graph.
    conv(x, W, b), spec Tucker((32, 16)) --> the same: 1x1, window, 1x1.

    The factor is fitted to the weight, its relative error compared with `tolerance`, its chains (generated kernels and
    torch's own products) timed against the dense op and verified in float64 against the reconstruction. A site whose
    dense op stays the fastest keeps it, with a row. `calibrate` fits to the example activations instead of the weight
    alone; give enough of them: rows of x that outnumber its features.
    """

    name = "factor"
    requires = ("annotated",)
    ensures = ()
    exact = False

    def __init__(self, calibrate: bool = False) -> None:
        self.calibrate = calibrate

    def propose(self, gm: fx.GraphModule, node: fx.Node, fact: Fact, ctx: Context) -> Proposal | Row | None:
        """The chains of a site whose spec value is a factor, or why it stays dense; None for all other sites."""
        wanted = ctx.spec.match(fact.site, fact.module)
        if not isinstance(wanted, Factor):
            return None
        return self.dense(gm, fact, ctx) or _chains(gm, node, fact, wanted, ctx)

    def trial(self, gm: fx.GraphModule, ctx: Context, kernels: Mapping[KernelSpec, Kernel | Exception]) -> Trial:
        return FactorTrial(gm, ctx, kernels, self.calibrate)

    def dense(self, gm: fx.GraphModule, fact: Fact, ctx: Context) -> Row | None:
        """The row of a site that stays dense whatever its factor is."""
        if fact.refusal:
            code, reason = fact.refusal
            return dataclasses.replace(dense_row(fact, codes.SPEC_DENSE), code=code, reason=reason)
        if fact.op not in ("linear", *_product.CONVOLUTIONS):
            return dense_row(fact, codes.NO_KERNEL, op=f"a factored {fact.op}")
        if fact.dtype not in DTYPES:
            return dense_row(fact, codes.DTYPE, dtype=fact.dtype, known=", ".join(DTYPES))
        if 0 in fact.shape:
            return dense_row(fact, codes.EMPTY, shape=fact.shape)
        device = get_constant(gm, fact.weight).device
        if device.type != "cpu" or ctx.target.kind == "cuda":
            return dense_row(fact, codes.DEVICE, device=f"{device}, and factored weights run on CPUs")
        return None


def _chains(gm: fx.GraphModule, node: fx.Node, fact: Fact, wanted: Factor, ctx: Context) -> Proposal | Row:
    shape = fact.matrix if fact.op == "linear" else fact.shape
    reason = wanted.refuse(shape)
    if reason is None:
        try:
            wanted.accept(get_constant(gm, fact.weight).detach().reshape(shape))
        except FormatError as error:
            reason = str(error)
    if reason is not None:
        return dense_row(fact, codes.FORMAT_REFUSES, format=wanted.text(), detail=reason)
    factor = wanted.resolve(shape)
    problem = Problem(
        op=OP, out_features=fact.matrix[0], in_features=fact.matrix[1], dtype=fact.dtype,
        nnz=factor.flops(shape, 1) // 2, bias=fact.bias is not None, epilogue=fact.epilogue,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    formats: tuple[Stored, ...] = (Factored(factor, *fact.matrix, tiled=1), Factored(factor, *fact.matrix, tiled=0))
    if fact.op != "linear":
        conv = _product.geometry(node, fact)
        if isinstance(conv, str):
            return dense_row(fact, codes.NO_VARIANT, detail=conv)
        if not ctx.has_examples:
            return dense_row(fact, codes.NO_EXAMPLES, op=fact.op)
        problem, formats = dataclasses.replace(problem, op="conv", conv=conv), (FactoredConv(factor, fact.shape),)
    found: list[Candidate] = []
    refusals: list[str] = []
    for fmt in formats:
        for variant in catalog.variants_for(problem.op, fmt.name, ctx.target):
            refusal = variant.refuse(problem, fmt, ctx.target)
            if refusal:
                refusals.append(refusal)
            else:
                found += [Candidate(fmt, spec) for spec in variant.specs(problem, fmt, ctx.target)]
    if not found:
        return dense_row(fact, codes.NO_VARIANT, detail="; ".join(dict.fromkeys(refusals)) or "no chain fits")
    return Proposal(node, fact, problem, found)


class FactorTrial(Trial):
    """Decides factored sites: one fit for all chains of a weight, and the oracle of a product of operands."""

    def __init__(
        self, gm: fx.GraphModule, ctx: Context, kernels: Mapping[KernelSpec, Kernel | Exception], calibrate: bool
    ) -> None:
        super().__init__(gm, ctx, kernels)
        self.calibrate = calibrate
        self._gram: torch.Tensor | None = None
        self._fits: dict[tuple[str, Factor], Buffers] = {}

    def decide(
        self, proposal: Proposal, x: torch.Tensor, residual: torch.Tensor | None, batches: Sequence[int]
    ) -> tuple[Choice | Prepacked | None, Row]:
        if self.calibrate:
            rows = _product.windows(proposal.problem, x).double()
            self._gram = rows.t() @ rows
        choice, row = super().decide(proposal, x, residual, batches)
        self._fits.clear()
        if isinstance(choice, Choice):
            return choice, _factored(proposal, row)
        for fmt in dict.fromkeys(c.format for c in proposal.candidates):
            if isinstance(fmt, Stored):
                row = dataclasses.replace(row, reason=row.reason.replace(fmt.text(), fmt.factor.text()))
        return choice, row

    def pack(self, proposal: Proposal, fmt: Format) -> Buffers:
        key = (proposal.fact.weight, fmt)
        if not isinstance(fmt, Stored) or key in self._packs:
            return super().pack(proposal, fmt)
        fitted = self._fits.get((proposal.fact.weight, fmt.factor))
        if fitted is None:
            weight = get_constant(self.gm, proposal.fact.weight).detach().reshape(fmt.weight)
            fitted = self._fits[(proposal.fact.weight, fmt.factor)] = fmt.factor.fit(weight, self._gram).buffers
        packed = fmt.store(fitted)
        fmt.validate(packed, *fmt.shape)
        self._packs[key] = packed
        return packed

    def _verify(
        self, proposal: Proposal, candidate: Candidate, x: torch.Tensor, residual: torch.Tensor | None
    ) -> verify.Verdict:
        fmt = candidate.format
        if not isinstance(fmt, Stored):
            return super()._verify(proposal, candidate, x, residual)
        _, bias = self._operands(proposal)
        if isinstance(fmt, FactoredConv):
            return self._verify_images(proposal, candidate, fmt, x, residual, bias)
        with torch.inference_mode():
            y = self._sparse(proposal, candidate, x, residual)()
            rows = verify.sample(x.shape[0])
            products = fmt.products(x[rows], self.pack(proposal, fmt))
            rest = residual[rows] if residual is not None else None
            return verify.check_products(y[rows], products, bias, proposal.fact.epilogue, rest)

    def _verify_images(
        self, proposal: Proposal, candidate: Candidate, fmt: FactoredConv, x: torch.Tensor,
        residual: torch.Tensor | None, bias: torch.Tensor | None,
    ) -> verify.Verdict:  # fmt: skip
        """Every pixel of the first images."""
        conv = proposal.problem.conv
        if conv is None:
            raise PassError(f"site {proposal.fact.site!r} is a convolution without a geometry")
        some = x[: max(1, _PIXELS // conv.pixels)]
        rest = residual[: some.shape[0]] if residual is not None else None
        with torch.inference_mode():
            y = self._sparse(proposal, candidate, some, rest)().movedim(1, -1).flatten(0, -2)
            products = fmt.products(torch_conv.padded(some, conv), self.pack(proposal, fmt), torch_conv.walk_of(conv))
            flat = rest.movedim(1, -1).flatten(0, -2) if rest is not None else None
            return verify.check_products(y, products, bias, proposal.fact.epilogue, flat)


def _factored(proposal: Proposal, row: Row) -> Row:
    """The row of an installed chain: how the cost of a row of x changed, beside its error and its times."""
    fmt = next(c.format for c in proposal.candidates if isinstance(c.format, Stored))
    text, conv = fmt.factor.text(), proposal.problem.conv
    before, after = 2 * prod(fmt.shape), fmt.factor.flops(fmt.weight, 1)
    if conv is not None:
        padded = tuple(n + low + high for n, low, high in zip(conv.size, conv.low, conv.high, strict=True))
        before *= conv.pixels
        after = conv_flops(fmt.factor, fmt.weight, 1, padded, conv.stride, 0, conv.dilation)
    code, reason = row.code, row.reason
    if code == codes.INSTALLED:
        code = codes.FACTORED
        reason = codes.sentence(code, factor=text, error=row.error, speedup=row.speedup)
    each = "a row" if conv is None else "an image"
    cost = f"{before} to {after} flops {each}, {row.dense_nbytes} to {row.nbytes} bytes"
    return dataclasses.replace(row, decision="factored", format=text, code=code, reason=f"{reason}; {cost}")
