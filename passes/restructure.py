"""restructure: products with weights that the model computes from smaller ones, before `normalise` writes them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from sparsec.algebra.rules import rule
from sparsec.driver import Context, Pass
from sparsec.errors import SpecError
from sparsec.graph import constant_nodes, trace_into
from sparsec.passes import restructure_forms as forms
from sparsec.passes.restructure_forms import Derived, Form
from sparsec.passes.rewrite import Log
from sparsec.passes.rewrite_graph import give_value, judged, place

RULES: dict[str, Callable[[fx.GraphModule, fx.Node, forms.Known], Form | str | None]] = {
    "kron_mixed_product": forms.kron_mixed_product,
    "kron_vec": forms.kron_vec,
    "khatri_rao_gram": forms.khatri_rao_gram,
    "diag_absorbed": forms.diag_absorbed,
    "block_circulant_fft": forms.block_circulant_fft,
    "separable_filter": forms.separable_filter,
}
"""Rule of `sparsec.algebra.rules()` -> what finds it in a graph: the form, why it is refused, or None."""

ROWS = (1, 16, 256)
"""Rows that count where the graph does not tell how many there are: a rewrite has to pay at all of them."""


class Restructure(Pass):
    """`linear(x, kron(a, b)) --> two small linears`, and the other rules of weights with a known structure.

    The structure is read from the calls that compute the weight, never from its values, so that it holds for whatever
    is loaded later. A form is taken when it needs fewer FLOPs and, with tune="measure", is faster by `min_speedup`.
    Put it before `normalise`, which writes the weights out. Nothing is done in training.
    """

    name = "restructure"

    def __init__(self, rules: Iterable[str] = tuple(RULES)) -> None:
        self.rules = tuple(rules)
        for name in self.rules:
            if name not in RULES:
                rule(name)  # an unknown name has its own message
                raise SpecError(f"rule {name!r} reads no structure of a weight; those are {', '.join(RULES)}")

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.options.training:
            return 0
        log = Log()
        for name in self.rules:
            for node in [n for n in gm.graph.nodes if n.op == "call_function"]:
                found = RULES[name](gm, node, constant_nodes(gm))
                if isinstance(found, str):
                    log.refused(name, [place(node)], found)
                elif found is not None:
                    pays, detail = _timed(gm, ctx, found)
                    if pays:
                        _install(gm, found)
                        log.applied([name], [place(node)], detail)
                    else:
                        log.refused(name, [place(node)], detail)
        gm.graph.eliminate_dead_code()
        return log.record(gm, ctx)

    def __repr__(self) -> str:
        return "Restructure()" if self.rules == tuple(RULES) else f"Restructure({list(self.rules)!r})"


def _timed(gm: fx.GraphModule, ctx: Context, form: Form) -> tuple[bool, str]:
    """Whether a form pays, and the sentence that says so."""
    before, after = form.flops
    detail = f"{before} --> {after} flops"
    if form.unit:
        detail += f" a {form.unit}"
    if after * max(1.0, ctx.options.min_speedup) >= before:
        return False, f"{detail} would not pay"
    if form.node in constant_nodes(gm) or ctx.options.tune != "measure":
        return True, detail
    sizes = _rows(form)
    contenders = [(f" at {rows} rows" if len(sizes) > 1 else "", *_contenders(gm, form, rows)) for rows in sizes]
    return judged(ctx, detail, [(where, [now], [then]) for where, now, then in contenders])


def _rows(form: Form) -> tuple[int, ...]:
    """What unknown sizes are taken for; one number where there are none."""
    shapes = [forms.shape_of(None, n) for n in form.reads if n.op != "get_attr"]
    return (1,) if all(isinstance(s, int) for shape in shapes for s in shape or ()) else ROWS


def _contenders(gm: fx.GraphModule, form: Form, rows: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    made: dict[fx.Node, torch.Tensor] = {}

    def value(node: fx.Node) -> torch.Tensor:
        if node not in made:
            sizes = [s if isinstance(s, int) else rows for s in forms.shape_of(gm, node) or ()]
            made[node] = torch.randn(sizes, generator=generator).to(forms.dtype_of(gm, node))
        return made[node]

    reads = [value(n) for n in form.reads]
    args = [a.function(value(a.source)) if isinstance(a, Derived) else value(a) for a in form.args]
    return lambda: form.before(*reads), lambda: form.after(*args)


def _install(gm: fx.GraphModule, form: Form) -> None:
    """Trace the new form before the old node, and let every new node come from the same module."""
    node = form.node
    old = set(gm.graph.nodes)
    args = [trace_into(node, a.function, a.source) if isinstance(a, Derived) else a for a in form.args]
    new = trace_into(node, form.after, *args)
    for made in gm.graph.nodes:
        if made not in old:
            if stack := node.meta.get("nn_module_stack"):
                made.meta["nn_module_stack"] = stack
            give_value(gm, made)
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
