"""Calibration: run a model over data and collect what its layers read, by hooks or on a captured graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from sparsec.errors import InputError, SpecError
from sparsec.progress import Progress
from sparsec.sparsifiers.batches import Calibration
from sparsec.sparsifiers.experts import Routers
from sparsec.sparsifiers.layers import Layer, Where, find_layers
from sparsec.sparsifiers.stats import GRADIENTS, Observer, Partial, Stats, check_needs, input_rows

NOTHING = "calibration saw nothing: the data is empty, all of it is padding, or no selected layer ever ran"

LIMIT = 1 << 24
"""Features of unfolded convolution inputs that are held at once."""


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    needs: Iterable[str] = (),
    where: Where | Iterable[Where] | None = None,
) -> dict[str, Stats | None]:
    """Statistics of the selected layers' inputs over `data`: site -> `Stats`, None for a layer that never ran.

    One pass over the data in evaluation mode; padding rows are left out. `needs` asks for more than the means: "gram",
    "inputs", "load" (of a router: how often it chose each expert), and with a `Calibration(data, loss=...)` "grad",
    "fisher", "hessian_grad", "out_grad". Memory beyond the model's own:
    `sparsec.sparsifiers.stats.needed_bytes(layers, needs)`, whatever the length of the data.

    The model is left as it was. Raises InputError for empty data, a batch that the model cannot take, and inputs that
    are not finite; SpecError for statistics that do not exist.
    """
    calibration = Calibration.of(data)
    watch = Watch(model, find_layers(model, where), needs, calibration)
    with quiet(model), watch:
        watch.run(calibration.batches())
    return watch.finish()


class Watch:
    """Hooks on the layers of one model; `run` feeds them, `finish` gives the statistics. Use it in a `with`."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], needs: Iterable[str], calibration: Calibration):
        self.model = model
        self.needs = check_needs(needs)
        self.calibration = calibration
        self.observers = {x.site: Observer(x, self.needs, calibration.double) for x in layers}
        self.gradients = [n for n in self.needs if n in GRADIENTS]
        if self.gradients and calibration.loss is None:
            raise SpecError(
                f"{', '.join(self.gradients)} need a loss: data=Calibration(batches, loss=lambda output, batch: ...)"
            )
        self.padding: torch.Tensor | None = None
        self.batch = 0
        self.open = True
        self._shared: tuple[Any, ...] = ()
        self._handles: list[Any] = []
        self.routers: Routers | None = None

    def __enter__(self) -> Watch:
        if "load" in self.needs:
            self.routers = Routers(self.model, lambda: self.padding, lambda: self.open)
            self.routers.__enter__()
        for site, observer in self.observers.items():
            module = self.model.get_submodule("" if site == "<root>" else site)
            self._handles.append(module.register_forward_pre_hook(self._hook(observer), with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._shared = ()
        if self.routers is not None:
            self.routers.__exit__(*error)

    def run(self, batches: Iterable[Any], first: int = 0) -> None:
        """Feed batches through the model; `first` is the number of the first one in messages."""
        from sparsec.sparsifiers.gradients import add_gradients

        known = batches if isinstance(batches, Sequence) else None
        with Progress(len(known) if known is not None else 0, "calibrating") as bar:
            for self.batch, batch in enumerate(batches, first):
                self.padding = self.calibration.padding(batch)
                args, kwargs = self.calibration.call(self.model, batch)
                with torch.no_grad(), self.blame():
                    self.model(*args, **kwargs)
                if self.gradients:
                    self.open = False
                    with self.blame():
                        add_gradients(self.model, batch, self.calibration, self.observers, self.gradients)
                    self.open = True
                self._shared = ()
                bar.advance()

    @contextlib.contextmanager
    def blame(self) -> Iterator[None]:
        """Errors of the model become InputError that names the batch."""
        try:
            yield
        except (InputError, SpecError, Stop):
            raise
        except Exception as error:
            message = f"{type(self.model).__name__} cannot run on calibration batch {self.batch}: {error}"
            raise InputError(message) from error

    def _hook(self, observer: Observer) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.open:
                x = args[0] if args else next(iter(kwargs.values()))
                self.see(observer, module, x.detach())

        return before

    def see(self, observer: Observer, module: Any, x: torch.Tensor) -> None:
        """Count one input of a layer. Layers that read the very same tensor share the work."""
        conv = observer.layer.op.startswith("conv")
        per_sample = x[:1].numel() * (observer.layer.matrix(observer.layer.weight).shape[1] if conv else 0)
        parts = x.split(max(1, LIMIT // max(1, per_sample))) if conv else (x,)
        key = (x.data_ptr(), x.shape, x.stride(), x._version, conv)
        if not conv and self._shared and self._shared[0] == key:
            observer.add(*self._shared[1])
            return
        for part in parts:
            rows = input_rows(module, observer.layer, part)
            if self.padding is not None and not conv and len(rows) == len(self.padding):
                rows = rows[self.padding]
            rows = rows.cpu()
            if not len(rows):
                continue
            partial = Partial(rows, "gram" in self.needs, self.calibration.double)
            if not partial.finite:
                raise InputError(
                    f"layer {observer.layer.site!r} reads NaN or infinite values in calibration batch {self.batch}; "
                    "leave such batches out, or run the model in a wider dtype"
                )
            observer.add(partial, rows)
            self._shared = (key, (partial, rows), x)  # x stays alive, so that its address is not reused

    def collect(self) -> dict[str, Stats | None]:
        """Site -> statistics, None for layers that never ran."""
        found = {site: observer.finish() for site, observer in self.observers.items()}
        if self.routers is None:
            return found
        loads = self.routers.loads()
        none = torch.zeros(0, dtype=torch.int64)
        counts = {site: loads[site].counts if site in loads else none for site in found}
        return {site: s and replace(s, load=counts[site]) for site, s in found.items()}

    def finish(self) -> dict[str, Stats | None]:
        """`collect`. Raises InputError when there was no data, or when all rows were padding."""
        found = self.collect()
        if found and not any(found.values()):
            raise InputError(NOTHING)
        return found


class Stop(Exception):
    """Ends a forward that has gone far enough."""


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a key-value cache; modes, buffers and config are as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    configs: dict[int, Any] = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False)]
    model.eval()
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config in cached:
            config.use_cache = True
        with torch.no_grad():
            for buffer, old in buffers:
                if not torch.equal(buffer, old):
                    buffer.copy_(old)


def calibrate_graph(
    gm: fx.GraphModule, inputs: Iterable[Sequence[Any]], *, needs: Iterable[str] = (), double: bool = False
) -> dict[str, Stats | None]:
    """Statistics of the linear sites of a captured graph, `inputs` being its flat arguments batch by batch.

    It sees what hooks cannot: functional calls, and each use of a shared module as a site of its own (`path#2`). `gm`
    is the graph of `capture_whole(...)`. Raises as `calibrate`.
    """
    from sparsec.graph import get_constant, operands, opname, site_names

    nodes = [n for n in gm.graph.nodes if opname(n) == "aten::linear" and operands(n)[0].op == "get_attr"]
    names, wanted = site_names(nodes), check_needs(needs)
    weights = [get_constant(gm, str(operands(n)[0].target)) for n in nodes]
    found = {n: Observer(Layer(names[n], "Linear", w), wanted, double) for n, w in zip(nodes, weights)}
    watch = Watch(nn.Module(), [], wanted, Calibration((), double=double))

    class Run(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            if node in found:
                watch.see(found[node], None, self.env[node.all_input_nodes[0]].detach())
            return super().run_node(node)

    for watch.batch, arguments in enumerate(inputs):
        with torch.no_grad():
            Run(gm).run(*arguments)
        watch._shared = ()
    watch.observers = {o.layer.site: o for o in found.values()}
    return watch.finish()
