"""lower: put the chosen kernels into the graph as `sparsec` ops on packed buffers, and drop the dense weights."""

from __future__ import annotations

from torch import fx

from sparsec.aten import arguments
from sparsec.driver import Context, Pass
from sparsec.formats import Format
from sparsec.graph import (
    Constant,
    add_constant,
    constants,
    drop_dead_constants,
    epilogue_nodes,
    get_constant,
    sites,
    take_over,
)
from sparsec.install import Installed, ledger
from sparsec.passes import _prepacked, _product
from sparsec.passes._trial import Choice


class Lower(Pass):
    """epilogue(aten.linear(x, W, b)) --> sparsec.linear(x, [values, indices, ...], b, residual, kernel)."""

    name = "lower"
    requires = ("selected",)
    ensures = ("lowered",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        packed: dict[tuple[str, Format], tuple[str, ...]] = {}
        records: dict[tuple[str, Format], Installed] = {}
        changes = 0
        for node, known in list(sites(gm)):
            choice = known.choice
            if isinstance(choice, _prepacked.Prepacked):
                _prepacked.install(gm, node, choice)
                changes += 1
            if not isinstance(choice, Choice):
                continue
            key = (known.weight, choice.format)
            if key not in packed:
                packed[key] = _register(gm, known.weight, choice)
            site = (known.site, choice.kernel.text())
            old = records.get(key)
            records[key] = Installed(
                format=choice.format,
                shape=known.shape,
                dtype=get_constant(gm, known.weight).dtype,
                buffers=packed[key],
                origin=constants(gm).get(known.weight, Constant(())),
                kernels=(*(old.kernels if old else ()), site),
            )
            _replace(gm, node, packed[key], choice)
            changes += 1
        ledger(gm).installed.extend(records.values())
        drop_dead_constants(gm)
        return changes


def _register(gm: fx.GraphModule, weight: str, choice: Choice) -> tuple[str, ...]:
    """Put the packed buffers on the root: values as a frozen parameter, the rest as buffers."""
    stem = weight.removesuffix("_weight")
    return tuple(
        add_constant(gm, f"{stem}_{key}", tensor, parameter=position == 0)
        for position, (key, tensor) in enumerate(choice.buffers.items())
    )


def _replace(gm: fx.GraphModule, node: fx.Node, names: tuple[str, ...], choice: Choice) -> None:
    """Insert the op behind the last absorbed node, move all uses to it, erase what it replaces."""
    node_input = _product.operand(node)
    absorbed, residual = epilogue_nodes(gm, node)
    bound = arguments(node)
    weight, bias = bound.get("weight"), bound.get("bias")
    with gm.graph.inserting_before(absorbed[-1] if absorbed else node):
        buffers = [gm.graph.get_attr(name) for name in names]
        for getter, tensor in zip(buffers, choice.buffers.values(), strict=True):
            getter.meta["val"] = tensor
        source = _product.source(node).node
        head = (source, buffers)
        tail = (bias, residual, choice.kernel.text())
        op = _product.overload(choice.kernel.op, buckets=bool(choice.dense_ranges))
        if choice.dense_ranges:
            flat = [bound for span in choice.dense_ranges for bound in span]
            new = gm.graph.call_function(op, (*head, weight, *tail, flat))
        else:
            new = gm.graph.call_function(op, (*head, *tail))
    take_over(new, node, absorbed)
    for unread in (node_input, weight):  # a folded pad, a weight without a dense range
        if isinstance(unread, fx.Node) and unread.op != "placeholder" and not unread.users:
            gm.graph.erase_node(unread)
