"""The house rules that a reader could check by eye: who imports whom, sizes, asserts, and what import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ("sparsec", "passes", "codegen")
AROUND = ("tests", "examples", "benchmarks")
MAX_LINES = 500
HEAVY = ("sympy", "networkx", "scipy", "jinja2", "rich", "tvm", "transformers")

# What each place may import. A name is a folder (`formats`), one module (`codegen.kernel`, `errors`), or `face`: every
# module of sparsec/ itself except those that sit on top of everything, `api` and `testing`.
MAY_IMPORT: dict[str, set[str]] = {
    "face": {"face", "formats", "codegen.kernel"},
    "formats": {"errors"},
    "factors": {"errors", "formats", "algebra"},
    "algebra": {"errors"},
    "sparsifiers": {"errors", "formats", "graph", "capture", "report"},
    "training": {"errors", "sparsifiers", "ops"},
    "ops": {"errors", "codegen"},
    "points": {"errors", "ops"},
    "passes": {"face", "formats", "factors", "algebra", "codegen.kernel"},
    "codegen": {"errors", "formats", "target", "cost"},
}

# Single modules that may do more than their folder, each with its reason.
MAY_ALSO: dict[str, tuple[set[str], str]] = {
    "__init__": (
        {"api", "face", "formats", "passes", "codegen", "ops", "sparsifiers", "factors", "algebra"},
        "the public names",
    ),
    "api": ({"formats", "passes", "codegen", "ops", "sparsifiers"}, "the public functions import everything"),
    "testing": ({"formats", "codegen", "ops", "testing_relations"}, "problems and oracles for tests and benchmarks"),
    "testing_relations": ({"formats", "ops"}, "runs kernels through their op"),
    "testing_conv": ({"formats", "codegen", "ops"}, "problems and oracle of convolutions"),
    "testing_kernels": ({"testing", "testing_conv", "formats", "codegen"}, "draws kernels of all variants"),
    "testing_peers": ({"testing", "formats"}, "runs the same problems on other libraries"),
    "spec": ({"factors"}, "factors are values of a spec"),
    "formats._base": ({"factors"}, "a + b builds a Sum"),
    "masks": ({"ops"}, "puts its op into modules"),
    "export_c": ({"codegen"}, "writes kernels into a C project"),
    "save": ({"api", "codegen"}, "puts a compile result back together, with kernels of this machine"),
    "save_kernels": ({"codegen", "factors"}, "renders and builds the kernels of a file"),
    "sparsifiers.blocks": ({"progress"}, "takes a while"),
    "sparsifiers.calibration": ({"progress"}, "takes a while"),
    "sparsifiers.jobs": ({"progress"}, "takes a while"),
    "ranks": ({"api", "factors", "sparsifiers"}, "asks calibration and compiled layers what each rank costs"),
    "testing_graphs": ({"api", "passes"}, "compiles random modules with every order of the passes"),
    "sparsifiers.layers": ({"spec"}, "where= takes the patterns of a spec"),
    "sparsifiers.pruning": ({"codes"}, "writes report rows"),
    "codegen.torch_conv": ({"factors", "verify"}, "runs a factor's convolutions, and applies the epilogue"),
    "codegen.torch_chain": ({"factors", "verify"}, "multiplies by a factor's operands, and applies the epilogue"),
    "codegen.torch_rows": ({"factors"}, "looks rows up in a factor's operands"),
    "codegen.batched": ({"factors"}, "multiplies by a batch of factors' operands"),
    "schedule": ({"codegen", "ops"}, "knows which ops can be steps of a stream"),
    "passes.stream": ({"codegen", "ops"}, "times a stream against its nodes"),
    "passes.pool": ({"codegen", "ops"}, "times its kernel against torch's"),
    "passes.factor": ({"codegen"}, "asks the catalogue for chains"),
    "codegen.render": ({"templates"}, "finds the template files"),
    "ops.linear": ({"verify"}, "a bucket that keeps its dense weight applies the same epilogue"),
    "passes.rewrite_graph": ({"codegen"}, "times a rewriting against what it replaces"),
    "passes.rewrite_merge": ({"codegen"}, "times merged linears"),
    "passes.rewrite_layers": ({"codegen"}, "times norms and pools"),
    "passes.restructure": ({"codegen"}, "times products of structured weights"),
    "passes.rewrite_terms": ({"codegen"}, "times rewritten expressions"),
    "passes.select": ({"codegen"}, "builds and times candidates"),
    "passes.meta_schedule": ({"codegen"}, "searches schedules of TVM kernels"),
    "passes._propose": ({"codegen"}, "asks the catalogue for candidates"),
    "ops.prepacked": ({"verify"}, "torch applies the steps of an epilogue that oneDNN does not fuse"),
    "passes._prepacked": ({"ops"}, "times and installs the op of dense sites"),
    "ops.conv": ({"verify"}, "a bucket that keeps its dense weight applies the same epilogue"),
    "passes._product": ({"ops"}, "knows the op of every kind of site"),
    "passes._shortlist": ({"codegen"}, "asks the catalogue what language a kernel is in"),
    "passes._trial": ({"codegen", "ops"}, "runs candidates through the op that will be installed"),
    "passes.lower": ({"ops"}, "puts the ops into the graph"),
}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    """The name below `sparsec.`: `graph`, `formats.csr`, `codegen.kernel`, `passes` for a package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "sparsec" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def known() -> frozenset[str]:
    return frozenset(module_of(p) for p in sources(*PACKAGE)) | {"templates"}


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of ours that one import statement reads, named as in `module_of`."""
    if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        joined = [f"{node.module}.{a.name}" for a in node.names]
        names = [n if n.removeprefix("sparsec.") in known() else node.module for n in joined]
    else:
        return
    for name in names:
        if name == "sparsec":
            yield "__init__"
        elif name.startswith("sparsec."):
            yield name.removeprefix("sparsec.")


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of our imports; `top_level` leaves out those in functions and under TYPE_CHECKING."""

    def walk(node: ast.AST, skip: bool) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            hidden = skip or (top_level and (lazy or typing))
            if not hidden:
                yield from ((getattr(child, "lineno", 0), name) for name in imported(child))
            yield from walk(child, hidden)

    yield from walk(tree(path), False)


def place_of(module: str) -> str:
    head = module.partition(".")[0]
    if head in ("api", "testing", "__init__", "templates"):
        return head
    return head if head in MAY_IMPORT else "face"


def allowed(importer: str, target: str) -> bool:
    own = place_of(importer)
    may = MAY_IMPORT.get(own, MAY_IMPORT["face"]) | MAY_ALSO.get(importer, (set(), ""))[0]
    names = {target, place_of(target)}
    return bool(names & may) or place_of(target) == own or (importer == "api" and target != "__init__")


def narrows(test: ast.expr) -> bool:
    """True for `x is not None` and conjunctions of it: a hint to the type checker that no input can make false."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(narrows(v) for v in test.values)
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.IsNot)


def test_every_place_has_a_row():
    folders = {p.parent.name for p in sources("sparsec") if p.parent != ROOT / "sparsec"}
    assert folders - {"sparsec"} <= set(MAY_IMPORT), "a new folder needs a line in MAY_IMPORT"
    stale = [m for m in MAY_ALSO if m not in known()]
    assert not stale, f"MAY_ALSO speaks of modules that do not exist: {stale}"


@pytest.mark.parametrize("path", list(sources(*PACKAGE)), ids=module_of)
def test_imports_follow_the_arrows(path: Path):
    importer = module_of(path)
    wrong = [f"{path.name}:{line} imports {name}" for line, name in imports(path) if not allowed(importer, name)]
    assert not wrong, f"{wrong}; see MAY_IMPORT in {Path(__file__).name}"


def test_the_table_forbids_what_it_should():
    against = [("formats.csr", "graph"), ("codegen.build", "graph"), ("graph", "api"), ("graph", "testing")]
    against += [("passes.fold", "codegen.build"), ("ops.linear", "graph"), ("report", "passes.fold")]
    along = [("passes.fold", "codegen.kernel"), ("api", "passes"), ("codegen.build", "codegen.c"), ("graph", "errors")]
    assert [pair for pair in against if allowed(*pair)] == [] and [pair for pair in along if not allowed(*pair)] == []


def test_no_import_cycles():
    """At import time; functions may import upwards lazily."""
    edges = {module_of(p): sorted({n for _, n in imports(p, top_level=True)}) for p in sources(*PACKAGE)}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in edges.get(module, ()):
                if not (module.startswith(target + ".") or target == module):  # a package comes before its modules
                    visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("path", list(sources(*PACKAGE, *AROUND)), ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_keep_the_rules(path: Path):
    wrong = []
    for node in ast.walk(tree(path)):
        line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            tops = [a.name.partition(".")[0] for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            tops = [(node.module or "").partition(".")[0]]
            if any(a.name == "*" for a in node.names):
                wrong.append(f"{line}: import *")
        else:
            tops = []
        if isinstance(node, ast.Assert) and path.relative_to(ROOT).parts[0] in PACKAGE and not narrows(node.test):
            wrong.append(f"{line}: assert in library code; raise a SparsecError")
        bare = {"passes", "codegen", "templates"} & set(tops)
        if bare and not getattr(node, "level", 0):
            wrong.append(f"{line}: bare import of {bare.pop()}; write sparsec.{'.'.join(tops)}")
    assert not wrong, wrong


def test_files_stay_small():
    texts = [*sources(*PACKAGE, *AROUND), *sorted((ROOT / "templates").rglob("*.jinja"))]
    long = {str(p.relative_to(ROOT)): n for p in texts if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_templates_hold_text_only():
    names = {p.name for p in (ROOT / "templates").iterdir()} - {"__pycache__", "__init__.py"}
    assert [n for n in sorted(names) if not n.endswith(".jinja")] == ["dispatch.cpp"]
    assert (ROOT / "templates" / "__init__.py").read_text() == ""


def test_importing_sparsec_loads_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import sparsec;"
        f"print(*sorted(m for m in {HEAVY!r} if m in sys.modules and m not in before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [], f"imported at import time: {done.stdout}"
