"""select, with schedules for the TVM kernels of each site searched by MetaSchedule before the clock decides."""

from __future__ import annotations

from torch import fx

from sparsec.driver import Context
from sparsec.errors import DependencyError, SpecError, ToolchainError
from sparsec.graph import get_constant
from sparsec.passes._propose import Candidate, Proposal
from sparsec.passes._shortlist import expected_batches
from sparsec.passes.select import UNKNOWN_BATCHES, Select

MAX_TRIALS = 1024


class MetaSchedule(Select):
    """candidates of a linear site --> the same, and each TVM kernel again with the best schedule of `trials`.

    `DEFAULT.replace("select", MetaSchedule(trials=32))`, with `target="tvm"` and `tune="measure"`. The searched kernel
    competes with the usual one and with the dense op, and is verified as they are. The same `seed` draws the same
    schedules. Raises SpecError for other targets and tunings, DependencyError where MetaSchedule cannot run. A search
    that fails is noted in the report, or with `fallback="error"` a ToolchainError.
    """

    name = "select"

    def __init__(self, trials: int = 32, seed: int = 0) -> None:
        if type(trials) is not int or not 1 <= trials <= MAX_TRIALS:
            raise SpecError(f"MetaSchedule(trials={trials!r}): write a number of schedules from 1 to {MAX_TRIALS}")
        if type(seed) is not int or not 0 <= seed < 2**31 - 1:
            raise SpecError(f"MetaSchedule(seed={seed!r}): write a number from 0 to 2**31 - 2")
        self.trials, self.seed = trials, seed

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.target.kind != "tvm":
            raise SpecError(f"MetaSchedule searches TVM schedules and the target is {ctx.target}; write target='tvm'")
        if ctx.options.tune != "measure":
            raise SpecError(f"MetaSchedule times schedules, which tune={ctx.options.tune!r} forbids; use 'measure'")
        from sparsec.codegen import tvm_compat

        if reason := tvm_compat.unsearchable():
            raise DependencyError(f"schedules cannot be searched: {reason}")
        return super().run(gm, ctx)

    def shortlist(self, gm: fx.GraphModule, proposal: Proposal, ctx: Context) -> list[Candidate]:
        kept = super().shortlist(gm, proposal, ctx)
        if proposal.problem.op != "linear":
            return kept
        found = [self._searched(gm, proposal, candidate, ctx) for candidate in kept]
        return kept + [candidate for candidate in found if candidate is not None]

    def _searched(self, gm: fx.GraphModule, site: Proposal, candidate: Candidate, ctx: Context) -> Candidate | None:
        """The candidate with the schedule that was found, or None when none is better than the usual one."""
        from sparsec.codegen import catalog, tvm_search

        if catalog.variant(candidate.spec.variant).language != "tvm":
            return None
        weight = get_constant(gm, site.fact.weight).detach().reshape(site.fact.matrix)
        batches = expected_batches(site) or UNKNOWN_BATCHES
        buffers = candidate.format.pack(weight)
        candidate.format.validate(buffers, *site.fact.matrix)
        try:
            found = tvm_search.search(candidate.spec, buffers, batches, self.trials, self.seed)
        except ToolchainError as error:
            if ctx.options.fallback == "error":
                raise
            ctx.report.note(f"{site.fact.site}: no schedule was searched: {str(error).splitlines()[0]}")
            return None
        ctx.report.note(
            f"{site.fact.site}: MetaSchedule timed {found.trials} schedules of {candidate.spec.variant}, and "
            + (f"the best was {found.gain:.2f}x as fast as that of the rules" if found.gain > 1 else "none was better")
        )
        return Candidate(candidate.format, found.spec) if found.spec != candidate.spec else None
