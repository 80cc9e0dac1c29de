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
from sparsec.graph import Fact, epilogue_nodes, get_constant, sites, update
from sparsec.passes import _product
from sparsec.passes._prepacked import Prepacked
from sparsec.passes._propose import Candidate, Proposal, dense_row, propose
from sparsec.passes._shortlist import batches, expected_batches, leading, shortlist
from sparsec.passes._trial import Choice, Trial
from sparsec.report import Row

UNKNOWN_BATCHES = (1, 16, 256)
"""What linear sites are tuned at when there are no example inputs."""



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
                outcome.candidates = self.shortlist(gm, outcome, ctx)
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

    def shortlist(self, gm: fx.GraphModule, proposal: Proposal, ctx: Context) -> list[Candidate]:
        """The candidates that are built and timed."""
        return shortlist(proposal, expected_batches(proposal) if ctx.has_examples else UNKNOWN_BATCHES, ctx)

    def trial(self, gm: fx.GraphModule, ctx: Context, kernels: Mapping[KernelSpec, Kernel | Exception]) -> Trial:
        """What decides between the candidates."""
        return Trial(gm, ctx, kernels)

    def _build(self, proposals: dict[fx.Node, Proposal], ctx: Context, rows: dict[str, Row]) -> dict[KernelSpec, Any]:
        """Every candidate's kernel, or its error; where none could be built, sites with candidates are done with."""
        from sparsec.progress import Progress

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
        self.gm, self.proposals, self.trial = gm, proposals, trial
        self.outcomes: list[tuple[Proposal, Choice | Prepacked | None, Row]] = []

    def run_node(self, n: fx.Node) -> Any:
        proposal = self.proposals.get(n)
        if proposal is not None:
            source = _product.source(n)
            x = source.crop(self.env[_product.operand(n)])
            added = epilogue_nodes(self.gm, n)[1]
            residual = self.env[added] if added is not None else None
            dims = leading(proposal.problem, x.dim())
            rows = batches(source.node.meta.get("val"), math.prod(x.shape[:dims]), dims)
            self.outcomes.append((proposal, *self.trial.decide(proposal, x, residual, rows)))
        return super().run_node(n)
