"""Which kernels could run a site: from the spec's value and the facts to a short list of candidates, or a reason."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsec import codes
from sparsec.codegen import catalog, plans
from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem
from sparsec.driver import Context
from sparsec.errors import SpecError
from sparsec.factors import Factor
from sparsec.formats import Dense, Format
from sparsec.graph import Fact, get_constant
from sparsec.passes import _prepacked, _product, _reorder
from sparsec.report import Row
from sparsec.spec import Auto

AUTO_DENSITY = 0.7
"""Above this share of nonzeros `Auto` tries nothing: a sparse kernel saves less work than its bookkeeping costs."""

# structure kind -> format name that `Auto` tries beside the unstructured ones
_STRUCTURED = {"block": "bsr", "nm": "nm", "fan_in": "fan_in"}
_UNSTRUCTURED = ("tiled_csl", "csr", "csr_groups", "sell", "pairs", "tiles", "window", "bitmask")


@dataclass(frozen=True)
class Candidate:
    """A kernel that could run a site, on a weight packed in `format`."""

    format: Format
    spec: KernelSpec


@dataclass
class Proposal:
    """A site on its way to a decision: its problem and candidates, best first."""

    node: fx.Node
    fact: Fact
    problem: Problem
    candidates: list[Candidate] = field(default_factory=list)
    refused: Row | None = None  # why there are no candidates, for a site that only its dense op can still speed up


def dense_row(fact: Fact, code: str, **values: Any) -> Row:
    """The report row of a site that stays dense, with the sentence of `code`."""
    itemsize = torch.empty((), dtype=getattr(torch, fact.dtype)).element_size()
    size = fact.matrix[0] * fact.matrix[1] * itemsize
    return Row(
        site=fact.site, op=fact.op, shape=fact.shape, density=fact.density if fact.nnz >= 0 else 1.0,
        nbytes=size, dense_nbytes=size, code=code, reason=codes.sentence(code, **values), error=0.0,
    )  # fmt: skip


def propose(gm: fx.GraphModule, node: fx.Node, fact: Fact, ctx: Context) -> Proposal | Row:
    """The candidates of a site, or the row that says why it stays dense.

    Raises SpecError when the spec names a format that the weight does not obey.
    """
    wanted = ctx.spec.match(fact.site, fact.module)
    if wanted is None or isinstance(wanted, Dense):
        return dense_row(fact, codes.SPEC_DENSE)
    if isinstance(wanted, Factor):
        return _not_factored(fact, wanted, ctx)
    if fact.refusal:
        code, reason = fact.refusal
        return dataclasses.replace(dense_row(fact, codes.SPEC_DENSE), code=code, reason=reason)
    if fact.dtype not in DTYPES:
        return dense_row(fact, codes.DTYPE, dtype=fact.dtype, known=", ".join(DTYPES))
    if 0 in fact.shape:
        return dense_row(fact, codes.EMPTY, shape=fact.shape)
    device = get_constant(gm, fact.weight).device
    if device.type != ("cuda" if ctx.target.kind == "cuda" else "cpu"):
        return dense_row(fact, codes.DEVICE, device=f"{device} while the target is {ctx.target}")
    rows, cols = fact.matrix
    problem = Problem(
        op=_product.op_of(fact), out_features=rows, in_features=cols, dtype=fact.dtype, nnz=fact.nnz,
        bias=fact.bias is not None, epilogue=fact.epilogue, batches=(), threads=torch.get_num_threads(),
    )  # fmt: skip
    if problem.op == "conv":
        conv = _product.geometry(node, fact)
        if isinstance(conv, str):
            return dense_row(fact, codes.NO_VARIANT, detail=conv)
        problem = dataclasses.replace(problem, conv=conv)
        if not ctx.has_examples:
            return dense_row(fact, codes.NO_EXAMPLES, op=fact.op)
    if isinstance(wanted, Auto):
        if fact.density > AUTO_DENSITY:
            found = _dense(node, problem, ctx)
            if found:
                return Proposal(node, fact, problem, found)
            return _stay(Proposal(node, fact, problem), ctx, codes.TOO_DENSE, density=fact.density)
        if problem.op == "linear":
            problem = dataclasses.replace(problem, batches=_product.rows(node))
        formats = _auto_formats(fact, problem, ctx)
        if not any(structure.kind in _STRUCTURED for structure in fact.structures):
            weight = get_constant(gm, fact.weight).detach().reshape(rows, cols)
            formats += _reorder.formats(weight, problem, ctx)
    else:
        weight = get_constant(gm, fact.weight).reshape(rows, cols)
        refusal = wanted.refuse(weight)
        if refusal:
            raise SpecError(f"site {fact.site!r}: the weight does not obey {wanted.text()}: {refusal}")
        formats = [wanted]
    found, reasons = _candidates(formats, problem, ctx)
    if not found:
        detail = "; ".join(dict.fromkeys(reasons)) or "no format fits"
        return _stay(Proposal(node, fact, problem), ctx, codes.NO_VARIANT, detail=detail)
    return Proposal(node, fact, problem, found)


def _dense(node: fx.Node, problem: Problem, ctx: Context) -> list[Candidate]:
    """Generated kernels of a dense site; those of linears are for few rows, and only where the clock judges them."""
    if problem.op == "linear":
        if ctx.options.tune != "measure" or ctx.options.min_speedup == 0:
            return []
        problem = dataclasses.replace(problem, batches=_product.rows(node))
    return _candidates([Dense()], problem, ctx)[0]


def _not_factored(fact: Fact, wanted: Factor, ctx: Context) -> Row:
    """The row of a site whose factor no pass has fitted: they are lossy, and one option forbids them all."""
    if ctx.options.tolerance != 0:
        raise SpecError(
            f"site {fact.site!r}: the spec asks for {wanted.text()}, and the list of passes has no 'factor' before "
            "'select'; use sparsec.DEFAULT or insert sparsec.passes.Factorise()"
        )
    return dense_row(fact, codes.LOSSY, factor=wanted.text())


def _stay(proposal: Proposal, ctx: Context, code: str, **values: Any) -> Proposal | Row:
    """The row of a site without kernels, or the proposal that still lets its dense op be prepacked."""
    row = dense_row(proposal.fact, code, **values)
    if _prepacked.candidate(proposal.problem, (1,), ctx) is None:
        return row
    return dataclasses.replace(proposal, refused=row)


def _auto_formats(fact: Fact, problem: Problem, ctx: Context) -> list[Format]:
    """The formats worth trying for the structures that are really there, most specific first."""
    from sparsec.formats import FORMATS

    found: list[Format] = []
    for structure in fact.structures:
        name = _STRUCTURED.get(structure.kind)
        if structure.kind == "nm" and ctx.target.kind == "cuda" and _two_of_four(*structure.params):
            found.append(FORMATS["two_four"]())
        elif name:
            found.append(FORMATS[name](*structure.params))
    suited = [name for name in _UNSTRUCTURED if _suits(name, problem, ctx)]
    return found + [FORMATS[name]() for name in suited or _UNSTRUCTURED]


def _two_of_four(n: int, m: int) -> bool:
    """Whether n of m is also 2 of 4, which sparse tensor cores multiply."""
    return 4 % m == 0 and n * (4 // m) <= 2


def _suits(name: str, problem: Problem, ctx: Context) -> bool:
    """Whether some kernel of a format likes this problem, or has no likes of its own."""
    variants = catalog.variants_for(problem.op, name, ctx.target)
    return any(v.candidates is plans.no_formats or v.formats(problem, ctx.target) for v in variants)


def _candidates(formats: list[Format], problem: Problem, ctx: Context) -> tuple[list[Candidate], list[str]]:
    found: list[Candidate] = []
    reasons: list[str] = []
    for wanted in formats:
        variants = catalog.variants_for(problem.op, wanted.name, ctx.target)
        if not variants:
            reasons.append(f"the catalogue has no kernel for {problem.op} with {wanted.name}")
        for variant in variants:
            for fmt in _concrete(variant, wanted, problem, ctx):
                refusal = variant.refuse(problem, fmt, ctx.target)
                if refusal:
                    reasons.append(refusal)
                    continue
                found += [Candidate(fmt, spec) for spec in variant.specs(problem, fmt, ctx.target)]
    return found, reasons


def _concrete(variant: catalog.Variant, wanted: Format, problem: Problem, ctx: Context) -> list[Format]:
    """`wanted` with its open fields set as the variant likes them; fields that the user set stay."""
    given = {key: value for key, value in wanted.fields().items() if value is not None}
    liked = variant.formats(problem, ctx.target)
    agreeing = [fmt for fmt in liked if all(fmt.fields()[key] == value for key, value in given.items())]
    return agreeing or [wanted.resolve(problem.out_features, problem.in_features)]
