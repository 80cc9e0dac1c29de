"""Block by block: calibrate and prune one block of a chain at a time, holding only its sums and the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsec.errors import InputError
from sparsec.progress import Progress
from sparsec.sparsifiers.batches import Calibration
from sparsec.sparsifiers.calibration import NOTHING, Stop, Watch, quiet
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.stats import GRADIENTS, Stats

Prune = Callable[[Sequence[Layer], dict[str, "Stats | None"]], None]


def find_chain(model: nn.Module, layers: Sequence[Layer]) -> str | None:
    """The name of the ModuleList or Sequential whose members hold most of the layers; None when there is none."""
    best, most = None, 1
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and name:
            held = {x.site[len(name) + 1 :].partition(".")[0] for x in layers if x.site.startswith(name + ".")}
            inside = sum(x.site.startswith(name + ".") for x in layers)
            if len(held) > 1 and inside > most:
                best, most = name, inside
    return best


class Chain:
    """Blocks that feed each other: hidden state in, hidden state out, every other argument the same for all."""

    def __init__(self, model: nn.Module, name: str, calibration: Calibration) -> None:
        self.model = model
        self.name = name
        self.calibration = calibration
        self.blocks: list[Any] = list(model.get_submodule(name))  # type: ignore[call-overload]

    def problem(self, batch: Any) -> str | None:
        """Why these blocks are no chain, seen by running one batch; None when they are."""
        calls: list[tuple[int, Any, Any]] = []
        versions: list[tuple[int, torch.Tensor, int]] = []
        outputs: list[Any] = []
        handles = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(_recorder(calls, versions, i), with_kwargs=True))
            handles.append(block.register_forward_hook(lambda m, args, output: outputs.append(_hidden(output))))
        args, kwargs = self.calibration.call(self.model, batch)
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        changed = next((i for i, state, version in versions if state._version != version), None)
        if changed is not None:
            return f"member {changed} of {self.name!r} changes its input in place"
        if [i for i, _, _ in calls] != list(range(len(self.blocks))):
            return f"the members of {self.name!r} are not called once each, in order"
        if any(not isinstance(h, torch.Tensor) for h in outputs):
            return f"a member of {self.name!r} returns no hidden state"
        _, first_args, first_kwargs = calls[0]
        for (i, a, k), output in zip(calls[1:], outputs):
            state, rest = _split(a, k)
            if state is not output:
                return f"member {i} of {self.name!r} does not read what the one before returned"
            if not _same(rest, _split(first_args, first_kwargs)[1]):
                return f"member {i} of {self.name!r} gets other arguments than the first"
        return None

    def capture(self, batches: Iterable[Any], watch: Watch | None) -> list[tuple[Any, Any]]:
        """The arguments of the first block for every batch; the forward stops there. `watch` sees the layers before."""
        caught: list[tuple[Any, Any]] = []

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append((args, kwargs))
            raise Stop

        handle = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        runner = watch or Watch(self.model, [], (), self.calibration)
        try:
            for i, batch in enumerate(batches):
                try:
                    runner.run([batch], first=i)
                except Stop:
                    continue
        finally:
            handle.remove()
        return caught


def prune_by_blocks(
    model: nn.Module, layers: Sequence[Layer], needs: Iterable[str], calibration: Calibration, prune: Prune
) -> str | None:
    """Calibrate and `prune` stage by stage: what runs before the chain, each block, the rest. Changes `model`.

    Held at once: the batches, one hidden state per batch, one batch's activations, and the sums of one block's layers.
    Returns why the model is no chain (then nothing was done), else None.
    """
    name = find_chain(model, layers)
    if name is None:
        return f"{type(model).__name__} holds no ModuleList or Sequential with layers to prune in two members"
    chain, wanted = Chain(model, name, calibration), tuple(needs)
    if any(n in GRADIENTS for n in wanted):
        return "gradient statistics need the whole model"
    batches = list(calibration.batches())
    if not batches:
        raise InputError(NOTHING)
    with quiet(model):
        if problem := _problem(chain, batches[0]):
            return problem
        inside: list[list[Layer]] = [[] for _ in chain.blocks]
        members = [n for n, _ in model.get_submodule(name).named_children()]
        outside: list[Layer] = []
        for layer in layers:
            head, _, tail = layer.site.partition(name + ".")
            member = tail.partition(".")[0] if not head else None
            (inside[members.index(member)] if member in members else outside).append(layer)
        stem = _before(chain, outside, batches[0])
        if stem:
            watch = Watch(model, stem, wanted, calibration)
            with watch:
                chain.capture(batches, watch)
            prune(stem, watch.collect())
        _run_blocks(chain, inside, members, batches, wanted, prune)
        rest = [x for x in outside if x not in stem]
        if rest:
            watch = Watch(model, rest, wanted, calibration)
            with watch:
                watch.run(batches)
            prune(rest, watch.collect())
    return None


def _run_blocks(
    chain: Chain,
    inside: list[list[Layer]],
    members: list[str],
    batches: list[Any],
    needs: tuple[str, ...],
    prune: Prune,
) -> None:
    calls = chain.capture(batches, None)
    padding = [chain.calibration.padding(b) for b in batches]
    with Progress(len(chain.blocks), "pruning block by block") as bar:
        for block, member, own in zip(chain.blocks, members, inside):
            prefix = f"{chain.name}.{member}"
            local = [_renamed(x, prefix) for x in own]
            if own:
                watch = Watch(block, local, needs, chain.calibration)
                with watch, torch.no_grad():
                    for watch.batch, (args, kwargs) in enumerate(calls):
                        watch.padding = padding[watch.batch]
                        with watch.blame():
                            block(*args, **kwargs)
                        watch._shared = ()
                found = watch.collect()
                prune(own, {x.site: found[y.site] for x, y in zip(own, local)})
            with torch.no_grad():
                for i, (args, kwargs) in enumerate(calls):  # in place: one hidden state per batch, not two
                    calls[i] = _advance(block, args, kwargs)
            bar.advance()


def _advance(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    hidden = _hidden(block(*args, **kwargs))
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): hidden}


def _renamed(layer: Layer, prefix: str) -> Layer:
    return replace(layer, site=layer.site[len(prefix) + 1 :] or "<root>")


def _problem(chain: Chain, batch: Any) -> str | None:
    watch = Watch(chain.model, [], (), chain.calibration)
    with watch.blame():
        return chain.problem(batch)


def _before(chain: Chain, outside: list[Layer], batch: Any) -> list[Layer]:
    """The layers outside the chain that run before it."""
    if not outside:
        return []
    watch = Watch(chain.model, outside, (), chain.calibration)
    with watch:
        chain.capture([batch], watch)
    return [x for x in outside if watch.observers[x.site].count]


def _recorder(calls: list[tuple[int, Any, Any]], versions: list[tuple[int, torch.Tensor, int]], index: int) -> Any:
    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((index, args, dict(kwargs)))
        state, _ = _split(args, kwargs)
        if isinstance(state, torch.Tensor):
            versions.append((index, state, state._version))

    return record


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _split(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """(hidden state, everything else)."""
    if args:
        return args[0], (args[1:], kwargs)
    first = next(iter(kwargs), None)
    return kwargs.get(first), ((), {k: v for k, v in kwargs.items() if k != first})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    return a is b or (isinstance(a, (int, float, str, bool)) and a == b)
