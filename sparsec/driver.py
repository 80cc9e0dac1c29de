"""Passes, their order, and the driver that runs them: contract checks, rollback, history."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import fx

from sparsec import contract
from sparsec.errors import PassError, SparsecError, SpecError, nearest
from sparsec.graph import KEY
from sparsec.history import INSTRUMENTS, Entry, History, Instrument, code


class Pass:
    """A rewrite or an analysis of the graph. Subclass it, give it a `name`, and define `run`.

    `requires` and `ensures` are words such as "normalised" or "annotated": a pass runs only behind one that ensures
    what it requires. Raise `version` when the meaning changes. `exact` is False for a pass that changes results by
    more than rounding; `tolerance=0` skips those. A pass edits the graph, adds constants and facts; it must not
    write into a tensor, which no rollback could undo.
    """

    name: str = ""
    version: int = 1
    requires: tuple[str, ...] = ()
    ensures: tuple[str, ...] = ()
    exact: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Edit `gm` in place and return how many changes were made."""
        raise PassError(f"pass {self.name!r} ({type(self).__name__}) defines no run(gm, ctx)")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Pipeline(tuple[Pass, ...]):
    """An immutable list of passes. List operations work (`[*DEFAULT, MyPass()]`), and so do edits by name."""

    __slots__ = ()

    def __new__(cls, passes: Iterable[Pass] = ()) -> Pipeline:
        items = tuple(passes)
        for item in items:
            if not isinstance(item, Pass):
                hint = "make an instance of it" if isinstance(item, type) else "subclass sparsec.Pass"
                raise SpecError(f"a pipeline holds passes, got {item!r}: {hint}")
        return super().__new__(cls, items)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the passes, in order."""
        return tuple(p.name for p in self)

    def find(self, name: str) -> int:
        """Where the pass called `name` is. Raises SpecError when it is not there, or there twice."""
        places = [i for i, n in enumerate(self.names) if n == name]
        if not places:
            raise SpecError(f"no pass is called {name!r}; {nearest(name, self.names)}")
        if len(places) > 1:
            raise SpecError(f"pass {name!r} occurs at {places}, not once; build the list by slicing instead")
        return places[0]

    def insert_before(self, name: str, new: Pass) -> Pipeline:
        """A new pipeline with `new` right before the pass called `name`."""
        at = self.find(name)
        return Pipeline((*self[:at], new, *self[at:]))

    def insert_after(self, name: str, new: Pass) -> Pipeline:
        """A new pipeline with `new` right behind the pass called `name`."""
        at = self.find(name) + 1
        return Pipeline((*self[:at], new, *self[at:]))

    def without(self, name: str) -> Pipeline:
        """A new pipeline without the pass called `name`."""
        at = self.find(name)
        return Pipeline((*self[:at], *self[at + 1 :]))

    def replace(self, name: str, new: Pass) -> Pipeline:
        """A new pipeline with `new` in the place of the pass called `name`."""
        at = self.find(name)
        return Pipeline((*self[:at], new, *self[at + 1 :]))

    def check_order(self) -> None:
        """Raise PassError when a pass requires what no pass before it ensures."""
        ensured: set[str] = set()
        for step in self:
            for word in step.requires:
                if word not in ensured:
                    makers = [p.name for p in self if word in p.ensures]
                    found = f"{makers[0]!r} ensures it but comes later" if makers else "no pass in the list ensures it"
                    order = ", ".join(self.names)
                    raise PassError(f"pass {step.name!r} requires {word!r}: {found}; the order is {order}")
            ensured.update(step.ensures)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(self.names)})"


@dataclass(frozen=True)
class Options:
    """The keywords of `compile` that passes read. `batches` are numbers of rows to tune at, if the caller says so."""

    tune: str = "measure"  # off | model | measure
    min_speedup: float = 1.05
    tolerance: float | None = None
    fallback: str = "dense"  # dense | error
    training: bool = False
    keep_originals: bool = True
    batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("tune", self.tune, ("off", "model", "measure")),
            ("fallback", self.fallback, ("dense", "error")),
        ):
            if value not in valid:
                raise SpecError(f"{name}={value!r} is none of {', '.join(map(repr, valid))}")
        if not _number(self.min_speedup) or self.min_speedup < 0:
            raise SpecError(f"min_speedup={self.min_speedup!r} must be a number >= 0 (0 installs whatever fits)")
        if self.tolerance is not None and (not _number(self.tolerance) or self.tolerance < 0):
            raise SpecError(f"tolerance={self.tolerance!r} must be None or a number >= 0 (0 forbids lossy passes)")
        if any(type(b) is not int or b < 1 for b in self.batches):
            raise SpecError(f"batches={self.batches!r} must be positive integers")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class Context:
    """What a pass may look at besides the graph.

    `example_inputs` are the tensors of the placeholders in order; `capture` is the rung the graph came from.
    """

    spec: Any = None  # Spec
    target: Any = None  # Target
    example_inputs: tuple[Any, ...] = ()
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    report: Any = None  # Report
    options: Options = field(default_factory=Options)
    capture: str = "export"
    has_examples: bool = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.has_examples is None:
            self.has_examples = bool(self.example_inputs or self.example_kwargs)


def run_passes(
    gm: fx.GraphModule, passes: Iterable[Pass], ctx: Context, instruments: Iterable[Instrument] = INSTRUMENTS
) -> History:
    """Run `passes` over `gm` in place and return the history, which also stays in `gm.meta["sparsec"]["history"]`.

    The IR contract is checked before the first pass and after every one. A pass that raises, breaks the contract or
    returns no count is rolled back (graph, root attributes, records) and reported as PassError with its cause chained;
    an error of sparsec's own keeps its type.
    """
    pipeline, tools = Pipeline(passes), tuple(instruments)
    pipeline.check_order()
    ensured: set[str] = set()
    _inspect(gm, ctx, ensured, "capture")
    history = History([Entry("capture", 0, 0.0, code(gm))])
    for tool in tools:
        tool.after(history, gm, ctx)
    for step in pipeline:
        if not step.exact and ctx.options.tolerance == 0:
            history.add(Entry(step.name, 0, 0.0, history[-1].code, "skipped: lossy, and tolerance is 0"))
        else:
            history.add(_run(step, gm, ctx, ensured))
            ensured.update(step.ensures)
        for tool in tools:
            tool.after(history, gm, ctx)
    gm.meta.setdefault(KEY, {})["history"] = history
    return history


def _run(step: Pass, gm: fx.GraphModule, ctx: Context, ensured: set[str]) -> Entry:
    """One pass with everything around it; on any exception the graph is as it was."""
    restore = snapshot(gm)
    begin = perf_counter()
    try:
        changes = step.run(gm, ctx)
        if type(changes) is not int or changes < 0:
            raise PassError(f"run(gm, ctx) must return how many changes it made, got {changes!r}")
        gm.recompile()
        _inspect(gm, ctx, ensured | set(step.ensures), step.name)
    except BaseException as error:
        restore()
        note = f"pass {step.name!r} failed and was rolled back"
        if isinstance(error, PassError) or (isinstance(error, Exception) and not isinstance(error, SparsecError)):
            kind = "" if isinstance(error, PassError) else f"{type(error).__name__}: "
            raise PassError(f"{note}: {kind}{error}") from error
        error.add_note(note)
        raise
    return Entry(step.name, changes, perf_counter() - begin, code(gm))


def _inspect(gm: fx.GraphModule, ctx: Context, ensured: set[str], where: str) -> None:
    contract.check(gm, ctx.capture, ensured=ensured, training=ctx.options.training, where=where)
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise PassError(f"after {where!r} the graph is not well formed: {error}") from error


def snapshot(gm: fx.GraphModule) -> Callable[[], None]:
    """Remember graph, facts, records and root attributes (not the contents of tensors); call the result to go back."""
    graph = _twin(gm.graph)
    kinds = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    tables = {name: copy.copy(gm.__dict__[name]) for name in kinds}
    meta = {k: _copied(v) for k, v in gm.meta.items()}

    def restore() -> None:
        for name, table in tables.items():
            live = gm.__dict__[name]
            live.clear()
            live.update(table)
        gm.meta.clear()
        gm.meta.update(meta)
        gm.graph = graph
        gm.recompile()

    return restore


def _twin(graph: fx.Graph) -> fx.Graph:
    """A copy of the nodes with their meta; the calling convention is shared, for no pass edits it."""
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    twin.set_codegen(graph._codegen)
    copied: Any = twin.graph_copy(graph, {}, return_output_node=True)
    if copied is not None:
        value, old = copied
        twin.output(value, type_expr=old.type).meta = copy.copy(old.meta)
    return twin


def _copied(value: Any) -> Any:
    """Records are dicts, lists and small mutable dataclasses of values; the values are frozen or not ours."""
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if type(value) is list:
        return list(value)
    if dataclasses.is_dataclass(value) and not getattr(value, "__dataclass_params__").frozen:  # noqa: B009
        twin = copy.copy(value)
        for slot in dataclasses.fields(value):
            setattr(twin, slot.name, _copied(getattr(value, slot.name)))
        return twin
    return value
