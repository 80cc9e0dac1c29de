"""rewrite: exact rules of linear algebra on the graph, each proved in `sparsec.algebra`, each named in the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from sparsec.algebra.rules import rule
from sparsec.driver import Context, Pass
from sparsec.errors import SpecError
from sparsec.graph import KEY, fold_constants

RULES = (
    "transposes_cancelled",
    "shared",
    "linears_folded",
    "scale_through_linear",
    "factor_out",
    "low_rank_left",
    "low_rank_right",
    "affine_through_norm",
    "parallel_linears",
    "qkv_merged",
    "pooled_streamed",
)
"""What `Rewrite()` applies. The names are those of `sparsec.algebra.rules()`."""

ENGINES = ("auto", "egglog", "search")


@dataclass(frozen=True)
class Applied:
    """One rule at one place, or why it was refused there. Kept in `gm.meta["sparsec"]["rewrites"]`."""

    rules: tuple[str, ...]
    sites: tuple[str, ...]
    detail: str
    refused: bool = False

    def __str__(self) -> str:
        verb = "left alone" if self.refused else "rewritten"
        return f"rewrite: {', '.join(self.sites)} {verb} by {' then '.join(self.rules)}: {self.detail}"


@dataclass
class Log:
    """What the rewrites of one graph did."""

    entries: list[Applied] = field(default_factory=list)
    changes: int = 0

    def applied(self, rules: Iterable[str], sites: Iterable[str], detail: str) -> None:
        self.entries.append(Applied(tuple(rules), tuple(sites), detail))
        self.changes += 1

    def refused(self, name: str, sites: Iterable[str], reason: str) -> None:
        entry = Applied((name,), tuple(sites), reason, refused=True)
        if entry not in self.entries:
            self.entries.append(entry)

    def record(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Put what happened into the graph's meta and the report; the number of changes."""
        known = gm.meta.setdefault(KEY, {})
        known["rewrites"] = (*known.get("rewrites", ()), *self.entries)
        if ctx.report is not None:
            for entry in self.entries:
                ctx.report.note(str(entry))
        return self.changes


class Rewrite(Pass):
    """`linear(x, q), linear(x, k), linear(x, v) --> slices of linear(x, cat(q, k, v))`, and the other exact rules.

    Products are reordered where that takes fewer FLOPs and, with tune="measure", less time; linears on one input are
    merged where the merged one was measured to be faster by `min_speedup`. Weights that change become recipes, so that
    state dicts go both ways. `engine` is "auto" (egglog when it is installed), "egglog" or "search". Nothing is done in
    training. Put it before `annotate`, behind `fold`: merged linears are then sites like any other, under the name of
    the first.
    """

    name = "rewrite"
    requires = ("normalised",)
    ensures = ("rewritten",)

    def __init__(self, rules: Iterable[str] = RULES, engine: str = "search") -> None:
        self.rules = tuple(rules)
        for name in self.rules:
            if name not in RULES:
                rule(name)  # an unknown name has its own message
                raise SpecError(
                    f"rule {name!r} is no rewrite of normalised graphs; those are {', '.join(RULES)}. Rules of weights "
                    "with a known structure belong to sparsec.passes.restructure.Restructure"
                )
        if engine not in ENGINES:
            raise SpecError(f"engine={engine!r} is none of {', '.join(map(repr, ENGINES))}")
        self.engine = engine

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        from sparsec.passes import rewrite_graph, rewrite_layers, rewrite_merge, rewrite_terms

        log = Log()
        if ctx.options.training:
            return 0
        if "transposes_cancelled" in self.rules:
            rewrite_graph.cancel_transposes(gm, log)
        if "shared" in self.rules:
            rewrite_graph.share(gm, log)
        algebra = [name for name in self.rules if name in rewrite_terms.RULES]
        if algebra:
            rewrite_terms.rewrite(gm, ctx, log, algebra, self.engine)
        if rewrite_layers.NORM in self.rules:
            rewrite_layers.affine(gm, ctx, log)
            fold_constants(gm)
        merging = [name for name in self.rules if name in rewrite_merge.RULES]
        if merging:
            rewrite_merge.merge(gm, ctx, log, merging)
        if rewrite_layers.POOL in self.rules:
            rewrite_layers.stream(gm, ctx, log)
        fold_constants(gm)
        return log.record(gm, ctx)

    def __repr__(self) -> str:
        return "Rewrite()" if self.rules == RULES else f"Rewrite({list(self.rules)!r})"
