"""Mutation testing: break one line at a time in a copy of the package, and see whether the tests notice.

    python tests/mutants.py --seed 0 --count 100

Mutants of Python swap comparisons, constants, signs, slices and early returns in packers, validators, readers and
rewrite rules; mutants of templates do the same to the C they print. Each one is checked by the test files that are
responsible for its file, stopping at the first failure. A survivor is printed as a diff: a test is missing, or the
change means the same.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

TESTS: dict[str, tuple[str, ...]] = {
    "sparsec/formats/_check.py": ("test_formats.py", "test_hostile.py"),
    "sparsec/formats/_pack.py": ("test_formats.py",),
    "sparsec/formats/csr.py": ("test_formats.py", "test_kernels_linear.py"),
    "sparsec/formats/bitmask.py": ("test_formats.py", "test_kernels_linear.py"),
    "sparsec/formats/bsr.py": ("test_formats.py", "test_kernels_linear.py"),
    "sparsec/formats/__init__.py": ("test_format_text.py",),
    "codegen/kernel.py": ("test_render.py", "test_catalog.py"),
    "codegen/render.py": ("test_render.py",),
    "sparsec/recipes.py": ("test_fold.py", "test_save.py"),
    "sparsec/install.py": ("test_compile.py", "test_save.py"),
    "sparsec/save_zip.py": ("test_hostile.py", "test_save.py"),
    "sparsec/save_values.py": ("test_hostile.py", "test_save.py"),
    "sparsec/save_graph.py": ("test_hostile.py", "test_save.py"),
    "sparsec/save_call.py": ("test_hostile.py", "test_save.py"),
    "sparsec/save_kernels.py": ("test_hostile.py", "test_save.py"),
    "passes/fuse.py": ("test_fuse.py", "test_graph_fuzz.py"),
    "passes/fold.py": ("test_fold.py",),
    "passes/normalise.py": ("test_normalise.py",),
    "templates/linear_csr.c.jinja": ("test_kernels_linear.py",),
    "templates/linear_bitmask.c.jinja": ("test_kernels_linear.py",),
    "templates/linear_bsr.c.jinja": ("test_kernels_linear.py",),
    "templates/_panel.c.jinja": ("test_kernels_linear.py",),
    "templates/_gemv.c.jinja": ("test_kernels_linear.py",),
    "templates/_threads.c.jinja": ("test_kernels_linear.py",),
    "templates/_epilogue.c.jinja": ("test_kernels_linear.py",),
    "templates/_ffi.c.jinja": ("test_kernels_linear.py",),
}
"""File -> test files that must kill its mutants."""


@dataclass(frozen=True)
class Mutant:
    """One line of one file, before and after."""

    file: str
    line: int
    before: str
    after: str


_SWAPS = (
    (" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "), (" == ", " != "), (" != ", " == "),
    (" + ", " - "), (" - ", " + "), (" and ", " or "), (" or ", " and "), (" is not None", " is None"),
    ("not ", ""), ("[:-1]", "[:]"), ("[1:]", "[:]"), (" * ", " + "), ("True", "False"), (" // ", " * "),
)  # fmt: skip
_TEMPLATE_SWAPS = (
    (" < ", " <= "), (" <= ", " < "), (" + ", " - "), (" - ", " + "), ("+= ", "-= "), (" * ", " + "), ("++", "--"),
    (" ? ", " == 0 ? "), ("!= ", "== "), ("== ", "!= "), ("s0 + s1", "s0"), ("return -1", "return 0"),
)  # fmt: skip


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a file: one swap at one place."""
    text = (ROOT / file).read_text()
    python = file.endswith(".py")
    quiet = _documentation(text) if python else set()
    for number, line in enumerate(text.splitlines()):
        bare = line.strip()
        if number in quiet or not bare or bare.startswith(("#", "<#", "import ", "from ", "/*", "raise ", 'f"', '"')):
            continue
        if "LoadError(" in bare or "SpecError(" in bare or "FormatError(" in bare or "<% macro" in bare:
            continue
        for old, new in _SWAPS if python else _TEMPLATE_SWAPS:
            for found in re.finditer(re.escape(old), line):
                yield Mutant(file, number, line, line[: found.start()] + new + line[found.end() :])
        for found in re.finditer(r"(?<![\w.\"'])(\d+)(?![\w.\"'])", line):
            yield Mutant(file, number, line, line[: found.start()] + str(int(found[1]) + 1) + line[found.end() :])
        if python and re.match(r"\s+return \w", line) and "return None" not in line:
            yield Mutant(file, number, line, re.sub(r"return .*", "return None", line))


def _documentation(text: str) -> set[int]:
    """Lines of docstrings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.update(range(node.lineno - 1, node.end_lineno or node.lineno))
    return lines


def _parses(mutant: Mutant) -> bool:
    if not mutant.file.endswith(".py"):
        return True
    try:
        ast.parse("\n".join(_changed(mutant)))
    except SyntaxError:
        return False
    return True


def _changed(mutant: Mutant) -> list[str]:
    lines = (ROOT / mutant.file).read_text().splitlines()
    lines[mutant.line] = mutant.after
    return lines


def choose(seed: int, count: int, only: str) -> list[Mutant]:
    """`count` mutants, the same number from every file as far as it goes."""
    rng = random.Random(seed)
    pools = {f: [m for m in mutants(f) if _parses(m)] for f in TESTS if only in f and (ROOT / f).exists()}
    for pool in pools.values():
        rng.shuffle(pool)
    found: list[Mutant] = []
    while len(found) < count and any(pools.values()):
        found += [pool.pop() for pool in pools.values() if pool]
    return found[:count]


def workspace(folder: Path) -> Path:
    """A copy of the sources in which `sparsec` is the copy: one package folder with passes, codegen and templates."""
    package = folder / "lib" / "sparsec"
    shutil.copytree(ROOT / "sparsec", package, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("passes", "codegen", "templates"):
        shutil.copytree(ROOT / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return package


def place(package: Path, file: str) -> Path:
    return package.parent / file if file.startswith("sparsec/") else package / file


def check(folder: Path, tests: tuple[str, ...], seconds: float) -> tuple[bool, str]:
    """Whether the tests fail, and the line that says so."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "lib"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "SPARSEC_CACHE_DIR": str(folder / "cache"),
    }  # keys hold the source: unchanged kernels are built once
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "-m",
        "not soak and not slow",
    ]
    try:
        done = subprocess.run(
            [*command, *(str(folder / "tests" / t) for t in tests)], cwd=folder, env=environment, capture_output=True,
            text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True, "timeout"
    last = done.stdout.strip().splitlines()[-1:] or [f"status {done.returncode}"]
    return done.returncode != 0, last[0]


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the sources one line at a time and count what tests notice.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--file", default="", help="only files whose path contains this")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="a mutant whose tests take longer counts as killed"
    )
    parser.add_argument("--total", type=float, default=float("inf"), help="stop after this many seconds")
    options = parser.parse_args()
    killed, survivors, start = 0, [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sparsec-mutants-") as name:
        folder = Path(name)
        package = workspace(folder)
        chosen = choose(options.seed, options.count, options.file)
        for tests in sorted({TESTS[m.file] for m in chosen}):
            broken, line = check(folder, tests, 10 * options.seconds)
            if broken:
                print(f"{' '.join(tests)} fail without any mutant: {line}")
                return 2
        for mutant in chosen:
            if time.monotonic() - start > options.total:
                break
            target = place(package, mutant.file)
            original = target.read_text()
            target.write_text("\n".join(_changed(mutant)) + "\n")
            dead, line = check(folder, TESTS[mutant.file], options.seconds)
            target.write_text(original)
            killed += dead
            print(f"{'killed  ' if dead else 'SURVIVED'} {mutant.file}:{mutant.line + 1}  {line[:80]}", flush=True)
            if not dead:
                survivors.append(mutant)
                print(f"  - {mutant.before.strip()}\n  + {mutant.after.strip()}", flush=True)
    total = killed + len(survivors)
    print(f"seed {options.seed}: {total} mutants, {killed} killed, {len(survivors)} survived")
    return 0 if total and killed >= 0.95 * total else 1


if __name__ == "__main__":
    sys.exit(main())
