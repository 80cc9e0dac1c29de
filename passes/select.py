"""select: choose for every site between its dense op and the catalogue's kernels, by the clock, verified in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import fx

from sparsec import codes
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec
from sparsec.driver import Context, Pass
from sparsec.errors import SparsecError
from sparsec.factors import Factor
from sparsec.graph import Fact, get_constant, sites, update
from sparsec.passes import _product
from sparsec.passes._prepacked import Prepacked
from sparsec.passes._propose import Proposal, dense_row, propose
from sparsec.passes._trial import Choice, Trial
from sparsec.report import Row

UNKNOWN_BATCHES = (1, 16, 256)
"""What linear sites are tuned at when there are no example inputs."""

LARGEST_BATCH = 1024  # dynamic sizes are timed up to here; the last bucket stands for all above it


class Select(Pass):
    """site with candidates --> site with a Choice, or a report row that says why it stays dense."""

    name = "select"
    requires = ("annotated",)
    ensures: tuple[str, ...] = ("selected",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        proposals: dict[fx.Node, Proposal] = {}
        rows: dict[str, Row] = {}
        for node, fact in sites(gm):
            outcome = self.propose(gm, node, fact, ctx)
            if outcome is None:
                continue
            if isinstance(outcome, Row):
                rows[fact.site] = outcome
            else:
                rows[fact.site] = outcome.refused or dense_row(fact, codes.NEVER_CALLED)
                proposals[node] = outcome
        kernels = self._build(proposals, ctx, rows)
        trial = self.trial(gm, ctx, kernels)
        chosen: list[Choice | Prepacked] = []
        if proposals:
            for proposal, choice, row in _decisions(gm, ctx, proposals, trial):
                rows[proposal.fact.site] = row
                if choice is not None:
                    chosen.append(choice)
                    update(proposal.node, choice=choice)
                trial.forget([c.buffers for c in chosen if isinstance(c, Choice)])
        for row in rows.values():
            ctx.report.put(row)
        if (sentence := trial.agreement()) is not None:
            ctx.report.note(sentence)
        ctx.report.timings["tune_s"] = ctx.report.timings.get("tune_s", 0.0) + trial.seconds.tune
        ctx.report.timings["verify_s"] = ctx.report.timings.get("verify_s", 0.0) + trial.seconds.verify
        return len(chosen)

    def propose(self, gm: fx.GraphModule, node: fx.Node, fact: Fact, ctx: Context) -> Proposal | Row | None:
        """The candidates of a site, or why it stays dense; None for a site that is not for this pass to decide."""
        decided = isinstance(ctx.spec.match(fact.site, fact.module), Factor) and fact.site in ctx.report
        return None if decided else propose(gm, node, fact, ctx)

    def trial(self, gm: fx.GraphModule, ctx: Context, kernels: Mapping[KernelSpec, Kernel | Exception]) -> Trial:
        """What decides between the candidates."""
        return Trial(gm, ctx, kernels)

    def _build(self, proposals: dict[fx.Node, Proposal], ctx: Context, rows: dict[str, Row]) -> dict[KernelSpec, Any]:
        """Every candidate's kernel, or its error; where none could be built, sites with candidates are done with."""
        from sparsec.progress import Progress

        if ctx.options.tune == "off":
            for proposal in proposals.values():
                del proposal.candidates[1:]
        specs = list(dict.fromkeys(c.spec for p in proposals.values() for c in p.candidates))
        begin = perf_counter()
        errors: dict[KernelSpec, SparsecError] = {}
        with Progress(len(specs), "building kernels") as bar:
            kernels = build_kernels(specs, ctx.target, progress=bar.advance, errors=errors)
        ctx.report.timings["build_s"] = ctx.report.timings.get("build_s", 0.0) + perf_counter() - begin
        if errors and ctx.options.fallback == "error":
            raise next(iter(errors.values()))
        if errors and not kernels:
            spec, error = next(iter(errors.items()))
            detail = str(error).splitlines()[0]
            missing = catalog.backend(catalog.variant(spec.variant).language).available()
            code = codes.NO_TOOLCHAIN if missing else codes.BUILD_FAILED
            for node in [n for n, p in proposals.items() if p.candidates]:
                fact = proposals.pop(node).fact
                rows[fact.site] = dense_row(fact, code, variant=spec.variant, detail=detail)
            ctx.report.note(f"no kernel could be built, so every site stays dense: {detail}")
        return {**kernels, **errors}


def _decisions(gm: fx.GraphModule, ctx: Context, proposals: Mapping[fx.Node, Proposal], trial: Trial) -> Any:
    """Yield (proposal, choice, row) for every site that runs: on example inputs, else on random activations."""
    if ctx.has_examples:
        runner = _Runner(gm, proposals, trial)
        with torch.inference_mode():
            runner.run(*ctx.example_inputs)
        yield from runner.outcomes
        return
    generator = torch.Generator().manual_seed(0)
    for proposal in proposals.values():
        problem = proposal.problem
        device = get_constant(gm, proposal.fact.weight).device
        x = torch.randn(max(UNKNOWN_BATCHES), problem.in_features, generator=generator)
        x = x.to(device, DTYPES[problem.dtype])
        residual = None
        if any(step.name == "add" for step in problem.epilogue):
            residual = torch.randn(x.shape[0], problem.out_features, generator=generator).to(x)
        yield (proposal, *trial.decide(proposal, x, residual, UNKNOWN_BATCHES))


class _Runner(fx.Interpreter):
    """Runs the dense graph once and decides each site when its activations are at hand, so that none is kept."""

    def __init__(self, gm: fx.GraphModule, proposals: Mapping[fx.Node, Proposal], trial: Trial) -> None:
        super().__init__(gm)
        self.proposals, self.trial = proposals, trial
        self.outcomes: list[tuple[Proposal, Choice | Prepacked | None, Row]] = []

    def run_node(self, n: fx.Node) -> Any:
        proposal = self.proposals.get(n)
        if proposal is not None:
            source = _product.source(n)
            x = source.crop(self.env[n.args[0]])  # type: ignore[index]
            residual = next((v for k, v in self.env.items() if k.name == proposal.fact.residual), None)
            leading = _leading(proposal, x.dim())
            batches = _batches(source.node, math.prod(x.shape[:leading]), leading)
            self.outcomes.append((proposal, *self.trial.decide(proposal, x, residual, batches)))
        return super().run_node(n)


def _leading(proposal: Proposal, rank: int) -> int:
    """How many dimensions of the input count rows, or images."""
    conv = proposal.problem.conv
    return rank - 1 if conv is None else rank - 1 - len(conv.size)


def _batches(source: fx.Node, seen: int, leading: int) -> tuple[int, ...]:
    """The rows to time: what was seen, or for dynamic sizes the ends of the range and the powers of four between."""
    value = source.meta.get("val")
    rows: Any = 1
    for size in getattr(value, "shape", ())[:leading]:
        rows = rows * size
    if not isinstance(rows, torch.SymInt):
        return (max(1, seen),)
    node = rows.node
    ranges = [node.shape_env.var_to_range[s] for s in sorted(node.expr.free_symbols, key=str)]
    low = _clip(min(_bound(r.lower) for r in ranges))
    high = _clip(max(_bound(r.upper) for r in ranges))
    sizes = {low, high, *(4**k for k in range(6) if low < 4**k < high)}
    found = {int(node.expr.subs(dict.fromkeys(node.expr.free_symbols, size))) for size in sorted(sizes)}
    return tuple(sorted({min(max(1, n), LARGEST_BATCH) for n in found} | {max(1, seen)}))


def _bound(bound: Any) -> int:
    try:
        return int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):  # int_oo and sympy's infinities are no numbers
        return LARGEST_BATCH


def _clip(size: int) -> int:
    return min(max(1, size), LARGEST_BATCH)
