"""Rung 1: torch.export, its retries, and the guards it leaves behind."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sparsec.call import CallInfo, Leaf, same
from sparsec.failures import quiet


def run_export(model: nn.Module, example: Any, shapes: Any) -> tuple[Any, list[str]]:
    """The functional ExportedProgram of a private copy, and notes on what had to be changed to get it."""
    args, kwargs = example
    with quiet():
        try:
            return _export(model, args, kwargs, shapes), []
        except Exception as error:
            if "Cache" not in str(error) or not _has_cache(model):
                raise
        # Key-value caches of transformers are no pytrees; without one the forward is a plain function.
        with without_cache(model):
            return _export(model, args, kwargs, shapes), ["captured with use_cache=False: outputs carry no cache"]


def _export(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> Any:
    before = [dict(vars(m)) for m in model.modules()]
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    check_state(model, before)
    return program.run_decompositions({})


def check_state(model: nn.Module, before: list[dict[str, Any]]) -> None:
    """RuntimeError when a forward assigned attributes: a graph would repeat the first value for ever."""
    for (path, module), old in zip(model.named_modules(), before):
        for name in changed_attributes(module, old):
            owner = f"{path or '<root>'} ({type(module).__name__})"
            raise RuntimeError(f"the forward of {owner} assigns self.{name}, a side effect that no graph can hold")


def changed_attributes(module: nn.Module, old: dict[str, Any]) -> Iterator[str]:
    """Attributes of a module that differ from the earlier `vars(module)`, but for weights that hooks compute anew."""
    for name, value in vars(module).items():
        if module._forward_pre_hooks and isinstance(old.get(name), torch.Tensor):
            continue
        if name not in old or _changed(old[name], value):
            yield name


def _changed(old: Any, new: Any) -> bool:
    """Whether an attribute holds something else; export itself rebuilds containers around the same leaves."""
    if same(new, old):
        return False
    before, spec = pytree.tree_flatten(old)
    after, found = pytree.tree_flatten(new)
    return spec != found or any(not same(b, a) for a, b in zip(before, after))


def _has_cache(model: nn.Module) -> bool:
    return any(hasattr(getattr(m, "config", None), "use_cache") for m in model.modules())


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Switch `config.use_cache` off everywhere, and back on leaving."""
    changed: list[tuple[Any, Any]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "use_cache") and not any(config is seen for seen, _ in changed):
            changed.append((config, config.use_cache))  # type: ignore[union-attr]
    try:
        for config, _ in changed:
            config.use_cache = False
        yield
    finally:
        for config, value in changed:
            config.use_cache = value


def guard(call: CallInfo, program: Any, gm: fx.GraphModule) -> CallInfo:
    """Read the guards of each leaf off the placeholders, and drop the placeholders of baked-in constants."""
    order = iter([n for n in gm.graph.nodes if n.op == "placeholder"])
    rename: dict[str, str] = {}
    arguments = []
    for argument in call.arguments:
        leaves = []
        for leaf in argument.leaves:
            if not argument.given:
                leaves.append(leaf)
                continue
            leaves.append(_guard_leaf(leaf, next(order), rename, gm))
        arguments.append(replace(argument, leaves=tuple(leaves)))
    symbols = {}
    for symbol, bounds in program.range_constraints.items():
        if str(symbol) in rename:
            low, high = int(bounds.lower), bounds.upper
            # 2 is only export's assumption that a dynamic size is neither 0 nor 1.
            symbols[rename[str(symbol)]] = (0 if low <= 2 else low, int(high) if high.is_Integer else None)
    for name in rename.values():
        symbols.setdefault(name, (0, None))
    conditions = _conditions(getattr(program, "_guards_code", None) or [], arguments)
    return replace(call, arguments=tuple(arguments), symbols=symbols, conditions=conditions)


def _guard_leaf(leaf: Leaf, node: fx.Node, rename: dict[str, str], gm: fx.GraphModule) -> Leaf:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        dims = tuple(_dim(size, rename) for size in value.shape)
        return replace(leaf, slot=True, dims=dims, dtype=value.dtype, device=value.device, value=None)
    if node.users:  # a dynamic Python number
        return replace(leaf, slot=True, value=None)
    gm.graph.erase_node(node)
    return leaf


def _dim(size: int | torch.SymInt, rename: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_Integer:
        return int(expression)
    from torch.utils._sympy.printers import PythonPrinter

    text = str(PythonPrinter().doprint(expression))
    for symbol in sorted(expression.free_symbols, key=str):
        rename.setdefault(str(symbol), f"s{len(rename)}" if len(rename) else "batch")
    return re.sub(r"[A-Za-z_]\w*", lambda m: rename.get(m[0], m[0]), text)


_SIZE = re.compile(r"L((?:\['\w+'\]|\[\d+\]|\.\w+)+)\.size\(\)\[(\d+)\]")


def _conditions(guards: list[str], arguments: list[Any]) -> tuple[str, ...]:
    """The guards that a branch of the model may depend on, over our symbols.

    Ranges are checked with the symbols. Inequalities with 0 and 1 and identities between shape expressions only restate
    how export traced, and would refuse batches that the graph handles.
    """
    dims = {leaf.name: leaf.dims for argument in arguments for leaf in argument.leaves if leaf.slot}

    def symbol(match: re.Match[str]) -> str:
        path = re.sub(r"^\['(\w+)'\]", r"\1", match[1])
        sizes = dims.get(path)
        return f"({sizes[int(match[2])]})" if sizes else match[0]

    found = []
    for text in guards:
        plain = re.fullmatch(r"\(*(.+?)\)* (==|!=) (\d+)", text)
        if plain is None or (plain[2] == "!=" and int(plain[3]) < 2):
            continue
        translated = _SIZE.sub(symbol, text)
        if "L[" not in translated and "/" not in translated and re.search(r"[A-Za-z]", translated):
            found.append(translated)
    return tuple(dict.fromkeys(found))
