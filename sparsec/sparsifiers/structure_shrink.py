"""A really smaller dense model: slices of parameters removed, and the sizes that modules remember updated."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sparsec.errors import PassError, SpecError, nearest
from sparsec.sparsifiers.pruning import RECORD
from sparsec.sparsifiers.structure_groups import Group, Resize, Slice

Indices = dict[tuple[str, int], torch.Tensor]
"""(parameter name, dimension) -> indices to read."""


def zero(model: nn.Module, groups: Iterable[Group]) -> nn.Module:
    """A copy of `model` whose chosen units have only zero parameters: what `shrink` gives, at full size.

    Buffers keep their values. Raises SpecError as `shrink` does.
    """
    chosen = _check(model, groups)
    copied = _copied(model)
    params = dict(copied.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group in chosen:
            for part in group.slices:
                if part.parameter in params:
                    params[part.parameter].index_fill_(part.dim, _taken(part, group.chosen), 0)
    return copied


def shrink(model: nn.Module, groups: Iterable[Group]) -> nn.Module:
    """A smaller dense copy of `model`, of the same class, without the chosen units of `groups`.

    Parameters, buffers and the sizes that modules remember (in_features, groups, num_heads, ...) all change; tied
    parameters stay tied. The result is compared with `zero(model, groups)` on the example of the analysis before it is
    returned. `model` may be a later state of the analysed model, e.g. after fine-tuning; it is only read.

    Raises SpecError for groups that choose nothing, block, or fit another model, PassError when the smaller model fails
    or disagrees because its code holds a size that no attribute does; the message lists where the sizes are used.
    """
    chosen = _check(model, groups)
    small = _copied(model)
    keep: Indices = {}
    shapes = {n: t.shape for n, t in _tensors(model).items()}
    for group in chosen:
        for part in group.slices:
            key = (part.parameter, part.dim)
            left = keep.get(key, torch.arange(shapes[part.parameter][part.dim]))
            keep[key] = left[~torch.isin(left, _taken(part, group.chosen))]
    _refuse_empty(keep)
    changed = rebuild(small, keep, [s for g in chosen for s in g.slices])
    used = _changes(chosen)
    _update_modules(small, model, changed)
    vars(small).pop(RECORD, None)  # the report rows of a pruned model speak of other shapes
    want = outputs(zero(model, chosen), chosen[0].origin.example) if chosen[0].origin else []
    failure: tuple[str, Exception | None] | None = None
    for names, config in ((_USUAL, False), (_USUAL, True), (_ANY, False), (_ANY, True)):
        undo = _update_sizes(small, used, names, config)
        problem = _problem(small, chosen, want)
        if problem is None:
            return small
        failure = failure or problem
        for holder, attribute, value in reversed(undo):
            setattr(holder, attribute, value)
    reason, cause = failure or ("", None)
    raise PassError(f"{reason}; {_where(used)}") from cause


# What is chosen


def _check(model: nn.Module, groups: Iterable[Group]) -> list[Group]:
    if not isinstance(model, nn.Module):
        raise SpecError(f"expected a torch.nn.Module, got {type(model).__name__}")
    listed = [groups] if isinstance(groups, Group) else list(groups)
    wrong = next((g for g in listed if not isinstance(g, Group)), None)
    if wrong is not None:
        raise SpecError(f"expected groups of dependency_groups, got {type(wrong).__name__}")
    chosen = [g for g in listed if g.chosen]
    if not chosen:
        raise SpecError("no group has chosen units; use group.select(units) or group.smallest(0.5)")
    if len({g.ids for g in chosen}) < len(chosen):
        raise SpecError("a group is listed twice; choose all its units in one select")
    for group in chosen:
        group.select(group.chosen)
    fits(model, chosen)
    return chosen


def fits(model: nn.Module, groups: Iterable[Group]) -> None:
    """SpecError unless every slice of the groups exists in `model` with the size it was analysed with."""
    known = _tensors(model)
    sizes = {(s.parameter, s.dim): s.size for g in groups if g.origin for s in g.origin.axes}
    for group in groups:
        for part in group.slices:
            tensor = known.get(part.parameter)
            if tensor is None:
                raise SpecError(f"group {group.name!r}: no {part.parameter!r} here; {nearest(part.parameter, known)}")
            size = sizes.get((part.parameter, part.dim))
            found = tensor.shape[part.dim] if part.dim < tensor.dim() else None
            if found != size:
                raise SpecError(
                    f"group {group.name!r}: {part.parameter} has shape {tuple(tensor.shape)}, but dimension {part.dim} "
                    f"was {size} when the groups were found; analyse this model again"
                )


def _taken(part: Slice, units: Sequence[int]) -> torch.Tensor:
    return torch.tensor([i for u in units for i in part.indices[u]])


def _refuse_empty(keep: Indices) -> None:
    for (name, dim), left in keep.items():
        if not left.numel():
            raise SpecError(f"nothing would be left of dimension {dim} of {name}; keep a unit in one of its groups")


# Parameters


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise SpecError(f"{type(model).__name__} cannot be copied, and its original never changes: {error}") from error


def rebuild(model: nn.Module, indices: Indices, slices: Iterable[Slice]) -> dict[str, list[tuple[int, int, int]]]:
    """Give every named tensor of `model` the listed indices; ties stay. Returns name -> [(dim, old size, new size)]."""
    tied = {s.parameter: s.tied for s in slices}
    by_name: dict[str, dict[int, torch.Tensor]] = {}
    for (name, dim), index in indices.items():
        by_name.setdefault(name, {})[dim] = index
    changed: dict[str, list[tuple[int, int, int]]] = {}
    for name, dims in by_name.items():
        owner, _, leaf = name.rpartition(".")
        old = getattr(model.get_submodule(owner), leaf)
        new = old.detach()
        for dim, index in dims.items():
            new = new.index_select(dim, index.to(new.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
        for alias in (name, *tied[name]):
            where, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(where), attribute, new)
            changed[alias] = [(dim, old.shape[dim], len(index)) for dim, index in dims.items()]
    return changed


# Sizes that modules remember


def _linear(m: Any, old: Any) -> None:
    m.out_features, m.in_features = m.weight.shape


def _transposed_linear(m: Any, old: Any) -> None:
    m.nx, m.nf = m.weight.shape


def _conv(m: Any, old: Any) -> None:
    if m.transposed:
        m.in_channels, m.out_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
        return
    if m.groups > 1 and old.weight.shape[1] == 1:  # depthwise: as many groups as input channels
        m.groups = m.weight.shape[0] * old.groups // old.weight.shape[0]
    m.out_channels, m.in_channels = m.weight.shape[0], m.weight.shape[1] * m.groups


def _norm(m: Any, old: Any) -> None:
    m.num_features = next(t for t in (m.weight, m.running_mean) if t is not None).shape[0]


def _group_norm(m: Any, old: Any) -> None:
    m.num_channels = m.weight.shape[0]
    m.num_groups = old.num_groups * m.num_channels // old.num_channels


def _layer_norm(m: Any, old: Any) -> None:
    m.normalized_shape = tuple(m.weight.shape)


def _embedding(m: Any, old: Any) -> None:
    m.num_embeddings, m.embedding_dim = m.weight.shape


def _prelu(m: Any, old: Any) -> None:
    m.num_parameters = m.weight.shape[0]


MODULES: tuple[tuple[type, Callable[[Any, Any], None]], ...] = (
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _conv),
    (nn.modules.batchnorm._NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
)


def _updater(module: nn.Module) -> Callable[[Any, Any], None] | None:
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers; its weight is (in, out)
        return _transposed_linear
    return next((update for kind, update in MODULES if isinstance(module, kind)), None)


def _update_modules(small: nn.Module, model: nn.Module, changed: dict[str, list[tuple[int, int, int]]]) -> None:
    """Bring the attributes of every module with changed parameters up to date."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        module, old = small.get_submodule(path), model.get_submodule(path)
        update = _updater(module)
        if update is not None:
            update(module, old)
            continue
        own = [entry for name, dims in changed.items() if name.rpartition(".")[0] == path for entry in dims]
        _set_sizes(module, {(before, after) for _, before, after in own}, _ANY)


def _changes(groups: Sequence[Group]) -> list[tuple[Resize, int]]:
    """Every tensor whose size along its prunable dimension changes, with its new size."""
    origin = groups[0].origin
    if origin is None:
        return []
    gone = np.array([g.ids[u] for g in groups for u in g.chosen])
    kept = [(r, int((~np.isin(r.units, gone)).sum())) for r in origin.resizes]
    return [(r, size) for r, size in kept if size != r.shape[r.dim]]


# Names of attributes that count heads or channels, tried first; then any integer but for those that count other things.
_HEADS = r"^(n|num|nb)?_?(attention|attn|key_value|kv|query|q)?_?heads?$"
_USUAL = re.compile(_HEADS + r"|^(all_head_(size|dim)|inner_dim|split_size|(num_|in_|out_)?(channels|features)|width)$")
_ANY = re.compile(
    r"^(?!.*(head_dim|head_size|dim_head|n_rep|groups|layer|axis|bucket|ratio|kernel|stride|window|padding))"
)

Undo = list[tuple[Any, str, Any]]
"""(object, attribute, its former value)."""


def _update_sizes(small: nn.Module, used: Sequence[tuple[Resize, int]], names: re.Pattern[str], config: bool) -> Undo:
    """Attributes of modules in whose forward tensors change size: numbers of heads, widths of splits, channels.

    With `config` a module that reads transformers' config gets its own copy with its own number of heads.
    """
    by_path: dict[str, set[tuple[int, int]]] = {}
    for resize, size in used:
        by_path.setdefault(resize.path, set()).add((resize.shape[resize.dim], size))
    undo: Undo = []
    for path, pairs in by_path.items():
        module: Any = small.get_submodule(path)
        if isinstance(module, nn.GroupNorm) and module.weight is None:
            before, after = next(iter(pairs))
            undo += [(module, "num_channels", before), (module, "num_groups", module.num_groups)]
            module.num_channels, module.num_groups = after, module.num_groups * after // before
        elif _updater(module) is None or not list(module.parameters(False)):
            undo += _set_sizes(module, pairs, names)
            if config and hasattr(module, "config"):
                undo.append((module, "config", module.config))
                module.config = copy.deepcopy(module.config)
                _set_sizes(module.config, pairs, re.compile(_HEADS))
    return undo


def _set_sizes(holder: Any, pairs: Iterable[tuple[int, int]], names: re.Pattern[str]) -> Undo:
    """Replace integers with a fitting name that equal an old size, unless two new sizes compete."""
    options: dict[int, set[int]] = {}
    for before, after in pairs:
        options.setdefault(before, set()).add(after)
    undo: Undo = []
    for name, value in list(vars(holder).items()):
        if type(value) is int and not name.startswith("_") and names.search(name) and len(options.get(value, ())) == 1:
            undo.append((holder, name, value))
            setattr(holder, name, next(iter(options[value])))
    return undo


# Verification


def outputs(model: nn.Module, example: Any) -> list[torch.Tensor]:
    """The floating-point tensors that `model` gives in eval mode on an example (args, kwargs); modes are restored."""
    modes = [(m, m.training) for m in model.modules()]
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, example)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = model.eval()(*args, **kwargs)
    finally:
        for module, mode in modes:
            module.training = mode
    return list(_floats(result))


def _floats(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            if key != "past_key_values":
                yield from _floats(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _floats(part)


def difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest difference over the largest value (at least 1); infinity when shapes differ or results are NaN."""
    worst = 0.0
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    for a, b in zip(got, want):
        if b.numel():
            scale = max(1.0, float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 1.0)
            error = torch.where(a == b, 0.0, (a - b).abs().double()).nan_to_num(0.0 if bool(b.isnan().all()) else 1e30)
            worst = max(worst, float(error.max()) / scale)
    return worst


def tolerance(tensors: Sequence[torch.Tensor]) -> float:
    """What two orders of summation may differ by: 1e-6 in float64, thousands of roundings in anything shorter."""
    eps = max((torch.finfo(t.dtype).eps for t in tensors), default=1e-7)
    return 1e-6 if eps < 1e-10 else 2e3 * eps


def _problem(
    small: nn.Module, groups: Sequence[Group], want: Sequence[torch.Tensor]
) -> tuple[str, Exception | None] | None:
    """What is wrong with the smaller model on the example of the analysis; None when it equals the zeroed one."""
    origin = groups[0].origin
    if origin is None:
        return None
    try:
        got = outputs(small, origin.example)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"the smaller model fails: {type(error).__name__}: {first}", error
    off = difference(got, want)
    return None if off <= tolerance(want) else (f"the smaller model is off the zeroed one by {off:.2g}", None)


_VIEWS = ("view", "reshape", "unflatten", "split", "slice", "expand", "repeat", "chunk")


def _where(used: Sequence[tuple[Resize, int]]) -> str:
    """The views and splits whose sizes the model's code may hold as numbers."""
    views = [(r, n) for r, n in used if any(v in r.op for v in _VIEWS)] or list(used)
    lines = dict.fromkeys(f"{r.where} (dimension {r.dim}: {r.shape[r.dim]} to {n})" for r, n in views)
    shown = list(lines)[:6]
    more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
    return "its code may hold a size as a number; sizes change at " + "; ".join(shown) + more
