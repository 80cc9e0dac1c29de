"""What a compiled graph keeps about its sites, and the map between its buffers and the caller's state dict."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sparsec.errors import FormatError, InputError, SpecError, nearest
from sparsec.formats import Format
from sparsec.formats._base import Buffers
from sparsec.graph import KEY, Constant, constants, evaluate, invert, invertible, ties

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Installed:
    """One packed weight: its format, its buffers on the root, and the constant it was packed from.

    Several sites share one record when they share a weight.
    """

    format: Format
    shape: tuple[int, ...]  # of the weight as the dense op reads it; the packed matrix is (shape[0], rest)
    dtype: torch.dtype
    buffers: tuple[str, ...]  # root attributes, in the order of Format.buffers
    origin: Constant
    kernels: tuple[tuple[str, str], ...]  # (site, KernelSpec text)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the packed matrix."""
        cols = 1
        for size in self.shape[1:]:
            cols *= size
        return self.shape[0], cols


@dataclass
class Ledger:
    """Graph-wide records of a compiled graph, under `gm.meta["sparsec"]["ledger"]`.

    `originals` are state-dict entries that no buffer can give back bit-equal (folded) or that the graph never reads.
    """

    installed: list[Installed] = field(default_factory=list)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)


def ledger(gm: fx.GraphModule) -> Ledger:
    """The Ledger of a graph, made on first use."""
    record: Ledger = gm.meta.setdefault(KEY, {}).setdefault("ledger", Ledger())
    return record


def compiled_graphs(cm: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """Every graph of a compile result with its path: the module itself, or its regions."""
    for path, module in cm.named_modules():
        if isinstance(module, fx.GraphModule) and "ledger" in module.meta.get(KEY, {}):
            yield path, module


def buffers_of(gm: fx.GraphModule, record: Installed) -> Buffers:
    """The packed buffers of one weight, by the names of its format."""
    return {key: getattr(gm, name) for key, name in zip(record.format.buffers, record.buffers, strict=True)}


def validate(gm: fx.GraphModule, incoming: State | None = None) -> None:
    """Check every packed buffer of a graph, with those of `incoming` (root name -> tensor) in place of its own.

    Raises FormatError naming the site. Linear in the stored entries.
    """
    for record in ledger(gm).installed:
        buffers = buffers_of(gm, record)
        for key, name in zip(record.format.buffers, record.buffers, strict=True):
            buffers[key] = (incoming or {}).get(name, buffers[key])
        try:
            record.format.validate(buffers, *record.matrix)
        except FormatError as error:
            raise FormatError(f"site {record.kernels[0][0]!r}: {error}") from error


def keep_originals(gm: fx.GraphModule, state: State, folded: bool = True) -> int:
    """Keep a copy of the entries of `state` that were folded beyond recovery; returns the bytes kept."""
    kept = ledger(gm).originals
    if folded:
        for constant in _origins(gm):
            if constant.recipe is not None and not invertible(constant):
                kept.update({name: private(state[name]) for name in constant.sources if name in state})
    return _size(kept)


def keep_unread(gm: fx.GraphModule, state: State) -> int:
    """Keep a copy of the entries of `state` that the graph never reads; returns their bytes."""
    read = {name for constant in _origins(gm) for name in constant.sources} | set(ties(gm))
    unread = {name: private(value) for name, value in state.items() if name not in read}
    ledger(gm).originals.update(unread)
    return _size(unread)


def plain_entries(cm: nn.Module) -> dict[str, torch.Tensor]:
    """State-dict entries of a result that live outside its compiled graphs, under their original names."""
    inside = [path for path, _ in compiled_graphs(cm)]
    if "" in inside:
        return {}
    return {k: v for k, v in cm.state_dict().items() if not any(k.startswith(path + ".") for path in inside)}


def load_plain(cm: nn.Module, state: State) -> None:
    """Copy into the entries outside the compiled graphs; shapes were checked before."""
    with torch.no_grad():
        for name, tensor in plain_entries(cm).items():
            if name in state:
                tensor.copy_(state[name])


def dense_entries(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Original name -> dense tensor for every state-dict entry that this graph can give back."""
    found: dict[str, torch.Tensor] = {}
    for name, constant in constants(gm).items():
        if hasattr(gm, name):
            _spread(found, constant, getattr(gm, name).detach())
    for record in ledger(gm).installed:
        matrix = record.format.unpack(buffers_of(gm, record), *record.matrix)
        _spread(found, record.origin, matrix.reshape(record.shape).detach())
    found.update(ledger(gm).originals)
    for alias, name in ties(gm).items():
        if name in found:
            found[alias] = found[name]
    return found


def prepare(gm: fx.GraphModule, state: State) -> list[tuple[str, torch.Tensor]]:
    """New tensors for every attribute of a graph from an original state dict: constants computed, weights packed.

    Raises InputError for a changed shape and FormatError for a weight that its site's format cannot hold.
    """
    fresh: list[tuple[str, torch.Tensor]] = []
    for name, constant in constants(gm).items():
        if hasattr(gm, name) and constant.sources:
            fresh.append((name, _recompute(constant, state, getattr(gm, name).shape)))
    for record in ledger(gm).installed:
        dense = _recompute(record.origin, state, torch.Size(record.shape)).to(record.dtype)
        matrix = dense.reshape(record.matrix)
        refusal = record.format.refuse(matrix)
        if refusal:
            raise FormatError(f"site {record.kernels[0][0]!r}: {refusal}; compile again for the new weights")
        packed = record.format.pack(matrix)
        record.format.validate(packed, *record.matrix)
        fresh += [
            (attribute, packed[key]) for key, attribute in zip(record.format.buffers, record.buffers, strict=True)
        ]
    return fresh


def commit(gm: fx.GraphModule, fresh: list[tuple[str, torch.Tensor]], state: State) -> None:
    """Put what `prepare` made into the graph."""
    for name, tensor in fresh:
        replace_tensor(gm, name, tensor)
    kept = ledger(gm).originals
    for name in kept:
        kept[name] = private(state[name])


def replace_tensor(gm: fx.GraphModule, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` where the parameter or buffer `name` of the root is; its shape may differ."""
    old = getattr(gm, name)
    tensor = tensor.detach().to(device=old.device, dtype=old.dtype).contiguous()
    if isinstance(old, nn.Parameter):
        gm.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=old.requires_grad))
    else:
        gm.register_buffer(name, tensor.clone(), persistent=name not in gm._non_persistent_buffers_set)


def check_state(state: State, expected: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError unless `state` has exactly the expected keys and shapes."""
    missing = [k for k in expected if k not in state]
    if missing:
        raise InputError(f"state dict lacks {missing[0]!r} ({len(missing)} missing); {nearest(missing[0], state)}")
    unknown = [k for k in state if k not in expected]
    if unknown:
        raise InputError(
            f"state dict has unknown key {unknown[0]!r} ({len(unknown)} in all); {nearest(unknown[0], expected)}"
        )
    for key, tensor in expected.items():
        if isinstance(tensor, torch.Tensor) and state[key].shape != tensor.shape:
            raise InputError(
                f"state dict entry {key!r} has shape {tuple(state[key].shape)}, the compiled model was built for "
                f"{tuple(tensor.shape)}: compile again for other shapes"
            )


def _origins(gm: fx.GraphModule) -> Iterator[Constant]:
    for name, constant in constants(gm).items():
        if hasattr(gm, name):
            yield constant
    for record in ledger(gm).installed:
        yield record.origin


def _spread(found: dict[str, torch.Tensor], constant: Constant, value: torch.Tensor) -> None:
    """Record `value` under every name it can be given back as."""
    if constant.recipe is None:
        for name in constant.sources:
            found[name] = value
        return
    source = invert(constant, value)
    if source is not None:
        found[constant.sources[0]] = source


def _recompute(constant: Constant, state: State, shape: torch.Size) -> torch.Tensor:
    absent = [name for name in constant.sources if name not in state]
    if absent:
        raise InputError(f"state dict lacks {absent[0]!r}; {nearest(absent[0], state)}")
    value = evaluate(constant, [state[name] for name in constant.sources])
    if value.shape != shape:
        raise InputError(
            f"{constant.sources[0]!r} gives shape {tuple(value.shape)}, the compiled model was built for {tuple(shape)}"
        )
    return value


def private(value: Any) -> Any:
    """A copy of a state-dict entry; quantised modules keep dtypes and packed objects among their tensors."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _size(entries: State) -> int:
    return sum(t.numel() * t.element_size() for t in entries.values() if isinstance(t, torch.Tensor))


def find_kernel(cm: nn.Module, site: str) -> str:
    """The KernelSpec text of an installed site. Raises SpecError when the site is dense or unknown."""
    known: dict[str, str] = {}
    for _, gm in compiled_graphs(cm):
        for record in ledger(gm).installed:
            known.update(record.kernels)
    if site not in known:
        raise SpecError(f"site {site!r} runs no generated kernel; {nearest(site, known)}")
    return known[site]
