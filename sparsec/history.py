"""What the passes did: the graph as code after each of them, times, diffs, and the instruments that watch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

from torch import fx

from sparsec import logs
from sparsec.errors import SpecError, nearest
from sparsec.graph import Fact, sites

if TYPE_CHECKING:
    from sparsec.driver import Context


@dataclass(frozen=True)
class Entry:
    """The graph after one pass, as code. `skipped` says why a pass did not run."""

    name: str
    changes: int
    seconds: float
    code: str
    skipped: str = ""


class History(Sequence[Entry]):
    """What every pass did; the first entry, "capture", is the graph before any."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = list(entries)

    def add(self, entry: Entry) -> None:
        """Append the outcome of a pass."""
        self._entries.append(entry)

    def __getitem__(self, key: SupportsIndex | slice | str) -> Any:
        if isinstance(key, str):
            for entry in self._entries:
                if entry.name == key:
                    return entry
            raise SpecError(f"no pass called {key!r} ran; {nearest(key, [e.name for e in self._entries])}")
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def graphs(self) -> list[tuple[str, str]]:
        """(pass, code after it) in order."""
        return [(e.name, e.code) for e in self._entries]

    def diff(self, key: int | str, context: int = 2) -> str:
        """Unified diff of the code that a pass made of the code before it; "" for the first entry and for no change."""
        entry = self[key]
        at = next(i for i, e in enumerate(self._entries) if e is entry)
        if at == 0:
            return ""
        before = self._entries[at - 1]
        lines = difflib.unified_diff(
            before.code.splitlines(), entry.code.splitlines(), before.name, entry.name, lineterm="", n=context
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        width = max((len(e.name) for e in self._entries), default=0)
        return "\n".join(
            f"{e.name:<{width}}  {e.changes:>5} changes  {e.seconds * 1e3:8.1f} ms  {e.skipped}".rstrip() for e in self
        )


class Instrument(Protocol):
    """Watches passes from outside: called after every entry is added to the history."""

    def after(self, history: History, gm: fx.GraphModule, ctx: Context) -> None: ...


class Timing:
    """Writes the seconds of every pass to `report.timings["passes"]`; a pass that runs twice adds up."""

    def after(self, history: History, gm: fx.GraphModule, ctx: Context) -> None:
        entry = history[-1]
        if ctx.report is not None and len(history) > 1:
            table = ctx.report.timings.setdefault("passes", {})
            table[entry.name] = table.get(entry.name, 0.0) + entry.seconds


class Dump:
    """Logs what SPARSEC_LOGS asks for: `passes` (one line each), `graph` (code after each), `diff`."""

    def after(self, history: History, gm: fx.GraphModule, ctx: Context) -> None:
        entry = history[-1]
        state = entry.skipped or f"{entry.changes} changes in {entry.seconds * 1e3:.1f} ms"
        logs.log("passes", lambda: f"{entry.name}: {state}")
        logs.log("graph", lambda: f"after {entry.name}:\n{entry.code}")
        if entry.changes:
            logs.log("diff", lambda: history.diff(len(history) - 1))


INSTRUMENTS: tuple[Instrument, ...] = (Timing(), Dump())


def code(gm: fx.GraphModule) -> str:
    """The graph as Python, with what is known about each site beside its line."""
    notes = {node.name: describe(known) for node, known in sites(gm)}
    lines = []
    for line in gm.code.strip().splitlines():
        name = line.split(" = ", 1)[0].strip()
        lines.append(f"{line}  # {notes[name]}" if name in notes else line)
    return "\n".join(lines) + "\n"


def describe(known: Fact) -> str:
    """A fact in one line: `encoder.0.fc linear 1536x384 float32, 10.0 % nonzero, nm(2, 4), +gelu -> csr(...)`."""
    parts = [f"{known.site} {known.op} {'x'.join(map(str, known.shape))} {known.dtype}"]
    if known.nnz >= 0:
        parts.append(f"{100 * known.density:.1f} % nonzero")
    parts += [str(s) for s in known.structures]
    parts += [f"+{step.name}{_numbers(step.params)}" for step in known.epilogue]
    if known.refusal:
        parts.append(f"dense: {known.refusal[1]}")
    chosen = getattr(known.choice, "format", None)
    return ", ".join(parts) + (f" -> {chosen.text()}" if chosen is not None else "")


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{v:g}' for v in values)})" if values else ""
