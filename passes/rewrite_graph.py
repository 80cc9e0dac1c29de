"""What the rewrites share: places, shapes and the clock; and those that only move values or compute them once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsec.aten import arguments, opname
from sparsec.codegen import tune
from sparsec.driver import Context
from sparsec.graph import drop_unread, get_constant, mutated, owner, pure

if TYPE_CHECKING:
    from sparsec.passes.rewrite import Log


def place(node: fx.Node) -> str:
    """The module that a node comes from, for people."""
    return owner(node)[0] or "<root>"


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """The order of axes that a call of `t`, `transpose` or `permute` gives; None for other calls or unknown ranks."""
    name = opname(node)
    if name not in ("aten::t", "aten::transpose", "aten::permute"):
        return None
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    rank = value.dim() if value is not None else (2 if name == "aten::t" else None)
    if rank is None:
        return None
    axes = list(range(rank))
    bound = arguments(node)
    if name == "aten::permute":
        return tuple(d % rank for d in bound["dims"])
    first, second = (0, rank - 1) if name == "aten::t" else (bound["dim0"] % rank, bound["dim1"] % rank)
    if rank:
        axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def cancel_transposes(gm: fx.GraphModule, log: Log) -> None:
    """`permute(permute(x, p), q) --> x` where the two are inverse to each other."""
    for node in list(gm.graph.nodes):
        outer = permutation(node)
        inner = permutation(node.args[0]) if outer is not None else None
        if outer is None or inner is None or len(inner) != len(outer):
            continue
        if tuple(inner[i] for i in outer) != tuple(range(len(outer))):
            continue
        middle = node.args[0]
        node.replace_all_uses_with(middle.args[0])
        gm.graph.erase_node(node)
        if not middle.users:
            gm.graph.erase_node(middle)
        log.applied(["transposes_cancelled"], [place(middle)], f"{node.name} undoes {middle.name}")


def share(gm: fx.GraphModule, log: Log) -> None:
    """`f(x), f(x) --> y = f(x); y, y` for calls without effects and without chance."""
    written = mutated(gm)
    seen: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and node.target not in written:
            key: Any = ("get_attr", node.target)
        elif pure(node) and node.op == "call_function":
            key = str(node.target), _frozen(node.args), _frozen(node.kwargs)
        else:
            continue
        first = seen.setdefault(key, node)
        if first is node or _escapes(node, first):
            continue
        node.replace_all_uses_with(first)
        gm.graph.erase_node(node)
        if node.op != "get_attr":
            log.applied(["shared"], [place(node)], f"{node.name} is {first.name}")
    drop_unread(gm, [n for n in gm.graph.nodes if n.op == "get_attr"])


def _frozen(value: Any) -> Any:
    """Arguments as a hashable key: nodes by identity, numbers with their type."""
    if isinstance(value, fx.Node):
        return "node", value.name
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return type(value).__name__, repr(value)


def _escapes(node: fx.Node, first: fx.Node) -> bool:
    """Two results of the model must stay two tensors: a caller may write into one."""
    both = (node, first)
    return any(u.op == "output" for n in both for u in n.users)


Trial = tuple[str, Sequence[Callable[[], object]], Sequence[Callable[[], object]]]
"""Where it is timed ("" for the only place), the ways to run what is there, and those to run what would be."""


def judged(ctx: Context, detail: str, trials: Iterable[Trial]) -> tuple[bool, str]:
    """Whether the best new way beats the best old one by `min_speedup` in every trial, and the sentence for it."""
    needed, texts = ctx.options.min_speedup, [detail]
    worst = float("inf")
    for where, now, then in trials:
        us = tune.measure([*now, *then]).us
        before, after = min(us[: len(now)]), min(us[len(now) :])
        worst = min(worst, before / after)
        texts.append(f"{before / after:.2f}x{where} ({before:.1f} --> {after:.1f} us)")
    text = ", ".join(texts)
    return worst >= needed, text if worst >= needed else f"{text}: less than min_speedup={needed:g}"


def give_value(gm: fx.GraphModule, node: fx.Node) -> None:
    """The shape of a new node, where those of what it reads are known; constants have theirs from their attribute."""
    values: dict[fx.Node, Any] = {n: n.meta.get("val") for n in node.all_input_nodes}
    mode = next((m for m in (getattr(v, "fake_mode", None) for v in values.values()) if m is not None), None)
    if mode is None:
        return
    for read, value in values.items():
        if value is None and read.op == "get_attr":
            values[read] = mode.from_tensor(get_constant(gm, str(read.target)).detach())
        elif getattr(value, "fake_mode", mode) is not mode:
            values[read] = _remade(value, mode)
    if any(v is None for v in values.values()):
        return
    with mode:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _remade(value: torch.Tensor, mode: Any) -> torch.Tensor | None:
    """A fake tensor of another mode, of which a graph has several once passes have folded parts, as one of `mode`."""
    sizes = (*value.shape, *value.stride())
    if not all(isinstance(size, int) for size in sizes):
        return None
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
