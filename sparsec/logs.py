"""SPARSEC_LOGS: which artifacts to print while compiling, in the grammar of TORCH_LOGS."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from sparsec.errors import SpecError, nearest

VARIABLE = "SPARSEC_LOGS"

ARTIFACTS: dict[str, str] = {
    "passes": "one line for every pass: changes and time",
    "graph": "the code of the graph after every pass",
    "diff": "what every pass changed in the code",
    "codegen": "generated kernel sources",
    "build": "compiler commands and cache hits",
    "tune": "candidates, their times and the decision",
    "report": "the report at the end of compile",
}
"""What can be asked for, and what it prints."""

ERROR, INFO, DEBUG = 0, 1, 2
"""Levels: `-name` shows errors alone, `name` the artifact, `+name` the detail too."""

_parsed: tuple[str, dict[str, int]] = ("", {})


def parse(text: str) -> dict[str, int]:
    """`"+passes,-build,report"` as artifact -> level; `all` is every name. SpecError for unknown names."""
    levels: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        level = {"+": DEBUG, "-": ERROR}.get(item[0], INFO)
        name = item[1:].strip() if item[0] in "+-" else item
        if name == "all":
            levels.update(dict.fromkeys(ARTIFACTS, level))
        elif name in ARTIFACTS:
            levels[name] = level
        else:
            raise SpecError(
                f"{VARIABLE}={text!r}: unknown name {name!r}; {nearest(name, ARTIFACTS)}; "
                f"valid: all, {', '.join(ARTIFACTS)}, each with + for detail or - for errors only"
            )
    return levels


def levels(environment: Mapping[str, str] | None = None) -> dict[str, int]:
    """The levels that the environment asks for, parsed when it changed; called at the start of every compile."""
    global _parsed
    text = (os.environ if environment is None else environment).get(VARIABLE, "")
    if text != _parsed[0]:
        _parsed = (text, parse(text))
    return _parsed[1]


def enabled(artifact: str, level: int = INFO) -> bool:
    """Whether `artifact` is to be printed at `level`."""
    if artifact not in ARTIFACTS:
        raise SpecError(f"no log artifact is called {artifact!r}; {nearest(artifact, ARTIFACTS)}")
    return levels().get(artifact, -1) >= level


def log(artifact: str, text: str | Callable[[], str], level: int = INFO) -> None:
    """Print to stderr when asked for; `text` may be a function, called only then."""
    if enabled(artifact, level):
        body = text() if callable(text) else text
        prefix = f"[sparsec:{artifact}] "
        print(prefix + body.rstrip().replace("\n", "\n" + prefix), file=sys.stderr)
