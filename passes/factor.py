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
from sparsec.factors.batch_chain import FactoredBatch
from sparsec.factors.chain import Factored
from sparsec.factors.conv_chain import FactoredConv
from sparsec.factors.rows_chain import FactoredRows
from sparsec.factors.stored import Stored
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

UNBUCKETED = ("embedding", "bmm")
"""Ops without a variant that keeps its dense weight for some batches, and without kernels for plain weights."""

_PIXELS = 1 << 14  # of the images that are checked
_EACH = 32  # rows of each matrix of a batch


class Factorise(Select):
    """linear(x, W, b), spec LowRank(64) --> its fact gets the Choice of a chain: `lower` puts it into the graph.
    conv(x, W, b), spec Tucker((32, 16)) --> the same: 1x1, window, 1x1.
    embedding(W, x), spec LowRank(32) --> rows of the left factor times the right one; the table is never formed.
    bmm(x, W), spec Monarch(8) --> one chain for each matrix of the batch.

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
        plain = fact.op in UNBUCKETED and fact.refusal is not None and fact.refusal[0] == codes.NO_KERNEL
        if fact.refusal and not plain:
            code, reason = fact.refusal
            return dataclasses.replace(dense_row(fact, codes.SPEC_DENSE), code=code, reason=reason)
        if fact.op not in ("linear", *_product.CONVOLUTIONS, *UNBUCKETED):
            return dense_row(fact, codes.NO_KERNEL, op=f"a factored {fact.op}")
        if fact.dtype not in DTYPES:
            return dense_row(fact, codes.DTYPE, dtype=fact.dtype, known=", ".join(DTYPES))
        if 0 in fact.shape:
            return dense_row(fact, codes.EMPTY, shape=fact.shape)
        device = get_constant(gm, fact.weight).device
        if device.type != "cpu" or ctx.target.kind == "cuda":
            return dense_row(fact, codes.DEVICE, device=f"{device}, and factored weights run on CPUs")
        return None


def _formats(fact: Fact, factor: Factor) -> tuple[Stored, ...]:
    """The ways to keep a factored weight of this kind of product, `factor` being resolved."""
    shape = fact.shape
    if fact.op == "linear":
        return Factored(factor, *fact.matrix, tiled=1), Factored(factor, *fact.matrix, tiled=0)
    if fact.op == "embedding":
        return (FactoredRows(factor, shape),)
    if fact.op == "bmm":
        return FactoredBatch(factor, shape, tiled=1), FactoredBatch(factor, shape, tiled=0)
    return (FactoredConv(factor, shape),)


def _shape(fact: Fact) -> tuple[int, ...]:
    """What a factor of this weight sees: (out, in, ...)."""
    if fact.op == "bmm":
        return fact.shape[2], fact.shape[1]
    return fact.matrix if fact.op == "linear" else fact.shape


def _chains(gm: fx.GraphModule, node: fx.Node, fact: Fact, wanted: Factor, ctx: Context) -> Proposal | Row:
    shape = _shape(fact)
    reason = wanted.refuse(shape)
    factor = wanted if reason else wanted.resolve(shape)
    formats = () if reason else _formats(fact, factor)
    if not reason:
        reason = formats[0].refuse(get_constant(gm, fact.weight).detach().reshape(fact.matrix))
    if reason is not None:
        return dense_row(fact, codes.FORMAT_REFUSES, format=wanted.text(), detail=reason)
    first = formats[0]
    flops = sum(plan.flops for plan in first.plans) if isinstance(first, FactoredRows) else factor.flops(shape, 1)
    problem = Problem(
        op=OP if fact.op == "linear" else fact.op, out_features=first.features[0],
        in_features=first.features[1], dtype=fact.dtype, nnz=flops // 2, bias=fact.bias is not None,
        epilogue=fact.epilogue, threads=torch.get_num_threads(),
    )  # fmt: skip
    if fact.op in _product.CONVOLUTIONS:
        conv = _product.geometry(node, fact)
        if isinstance(conv, str):
            return dense_row(fact, codes.NO_VARIANT, detail=conv)
        problem = dataclasses.replace(problem, op="conv", conv=conv)
    if fact.op != "linear" and not ctx.has_examples:
        return dense_row(fact, codes.NO_EXAMPLES, op=fact.op)
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
        if self.calibrate and proposal.problem.op != "embedding":  # a table has no inputs but row numbers
            rows = _product.windows(proposal.problem, x).double()
            self._gram = rows.mT @ rows
        try:
            choice, row = super().decide(proposal, x, residual, batches)
        except FormatError as error:  # what only the fit shows
            text = proposal.candidates[0].format.text()
            choice, row = None, dense_row(proposal.fact, codes.FORMAT_REFUSES, format=text, detail=str(error))
        self._fits.clear()
        self._gram = None
        if isinstance(choice, Choice):
            return choice, _factored(proposal, row)
        for fmt in dict.fromkeys(c.format for c in proposal.candidates):
            if isinstance(fmt, Stored):
                row = dataclasses.replace(row, reason=row.reason.replace(fmt.text(), fmt.factor.text()))
        return choice, row

    def _judge(
        self, proposal: Proposal, candidate: Candidate, times: list[list[float]] | None, index: int,
        batches: Sequence[int],
    ) -> tuple[Choice | None, Row]:  # fmt: skip
        choice, row = super()._judge(proposal, candidate, times, index, batches)
        if choice is None or not choice.dense_ranges or proposal.problem.op not in UNBUCKETED:
            return choice, row
        values = {"dense_us": row.dense_us, "sparse_us": row.sparse_us, "variant": row.variant}
        lost = dense_row(proposal.fact, codes.DENSE_FASTER, **values)
        reason = f"{lost.reason} over all batches, and dense is faster for some"
        return None, dataclasses.replace(lost, dense_us=row.dense_us, sparse_us=row.sparse_us, batch=row.batch,
                                         variant=row.variant, reason=reason)  # fmt: skip

    def pack(self, proposal: Proposal, fmt: Format) -> Buffers:
        key = (proposal.fact.weight, fmt)
        if not isinstance(fmt, Stored) or key in self._packs:
            return super().pack(proposal, fmt)
        weight, shared = proposal.fact.weight, isinstance(fmt, Factored)
        if shared:  # one fit for both ways to keep it
            if (weight, fmt.factor) not in self._fits:
                dense = get_constant(self.gm, weight).detach().reshape(fmt.seen)
                self._fits[(weight, fmt.factor)] = fmt.factor.fit(dense, self._gram).buffers
            packed = fmt.store(self._fits[(weight, fmt.factor)])
        else:
            packed = fmt.fit(get_constant(self.gm, weight).detach().reshape(fmt.shape), self._gram)
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
            dim = 1 if isinstance(fmt, FactoredBatch) else 0
            rows = verify.sample(x.shape[dim], verify.SAMPLE if dim == 0 else _EACH)
            some = x[:, rows] if dim else x[rows]
            rest = residual[rows] if residual is not None else None
            y = self._sparse(proposal, candidate, some, rest)().flatten(0, -2)
            products = fmt.products(some, self.pack(proposal, fmt))  # type: ignore[attr-defined]
            return verify.check_products(y, products, bias, proposal.fact.epilogue, rest)

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
    before, after = 2 * prod(fmt.features), fmt.factor.flops(fmt.seen, 1)
    if isinstance(fmt, FactoredRows):
        before, after = 0, sum(plan.flops for plan in fmt.plans)
    if conv is not None:
        padded = tuple(n + low + high for n, low, high in zip(conv.size, conv.low, conv.high, strict=True))
        before *= conv.pixels
        after = conv_flops(fmt.factor, fmt.seen, 1, padded, conv.stride, 0, conv.dilation)
    code, reason = row.code, row.reason
    if code == codes.INSTALLED:
        code = codes.FACTORED
        reason = codes.sentence(code, factor=text, error=row.error, speedup=row.speedup)
    each = "a row" if conv is None else "an image"
    reason = reason.replace(fmt.text(), text)
    cost = f"{before} to {after} flops {each}, {row.dense_nbytes} to {row.nbytes} bytes"
    return dataclasses.replace(row, decision="factored", format=text, code=code, reason=f"{reason}; {cost}")
