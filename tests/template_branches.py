"""Which branches of the templates a set of kernels takes: Jinja's conditions report how they came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jinja2 import nodes

from sparsec.codegen import render

REPORT = "branch_taken_"  # a name that no template uses


@dataclass
class Branches:
    """Every condition of the templates read so far, as (file, number of it in the file), with its line and outcomes."""

    files: set[str] = field(default_factory=set)
    lines: dict[tuple[str, int], int] = field(default_factory=dict)
    taken: dict[tuple[str, int], set[bool]] = field(default_factory=dict)

    def seen(self, name: str, number: int, value: Any) -> Any:
        """Called in place of a condition: notes how it comes out and hands it on."""
        self.taken[name, number].add(bool(value))
        return value

    @property
    def outcomes(self) -> int:
        return sum(map(len, self.taken.values()))

    def missing(self) -> dict[str, int]:
        """`file: line of the source never true` -> line number, for every outcome that did not occur."""
        found = {}
        for place, ways in sorted(self.taken.items()):
            line = self.lines[place]
            text = (render.TEMPLATES / place[0]).read_text().splitlines()[line - 1].strip()
            found |= {f"{place[0]}: {text} never {str(w).lower()}": line for w in (True, False) if w not in ways}
        return found

    def watch(self, tree: nodes.Template, name: str, environment: Any) -> nodes.Template:
        """The tree with every condition of `if`, `elif`, `a if b else c` and `for ... if` wrapped."""
        self.files.add(name)
        places = [node for node in tree.find_all((nodes.If, nodes.CondExpr, nodes.For)) if node.test is not None]
        for number, node in enumerate(sorted(places, key=lambda n: n.lineno)):
            self.lines[name, number], self.taken[name, number] = node.lineno, set()
            arguments = [nodes.Const(name), nodes.Const(number), node.test]
            node.test = nodes.Call(nodes.Name(REPORT, "load"), arguments, [], None, None, lineno=node.lineno)
            node.test.set_environment(environment)
        return tree


@contextmanager
def watching() -> Iterator[Branches]:
    """Renders inside go through an environment of their own, whose conditions report to what is yielded."""
    branches = Branches()
    env = render.environment.__wrapped__()
    plain = env._parse

    def parse(source: str, name: str | None, filename: str | None) -> nodes.Template:
        return branches.watch(plain(source, name, filename), name or "", env)

    env._parse = parse  # type: ignore[method-assign]
    env.globals[REPORT] = branches.seen
    with patch.object(render, "environment", lambda folder=None: env):
        yield branches


def templates() -> list[str]:
    return sorted(p.name for p in Path(render.TEMPLATES).glob("*.jinja"))
