"""Mutation testing: break the sources in one place at a time, in a copy, and see whether the tests notice.

    python tests/mutants.py --seed 0 --count 100

Generated mutants swap comparisons, constants, signs, slices and early returns in packers, validators, readers and
rewrite rules, and do the same to the C that templates print; those of `BY_HAND` are mistakes that people make. Each
is judged by the tests that are responsible for its file, in stages, the quickest first; a stage stops at its first
failure. A survivor is recorded as a diff: a test is missing, or the change means the same (`EQUIVALENT` says which).

The sources are those of the last commit, so that unfinished work does not disturb; a test that fails without any mutant
is left out. Each stage runs in a fork of a process that has loaded everything but sparsec.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Stage = tuple[str, ...]  # arguments of pytest


def _kernels(name: str) -> tuple[Stage, ...]:
    """The tests of a kernel template: one kernel at every batch, its relations, then the special cases."""
    one = f"(linear_{name}- or linear_{name}]) and (every_batch or every_relation)"
    return ("test_fuzz.py", "-k", one), ("test_kernels_linear.py", "test_kernels_regular.py")


_SHARED: tuple[Stage, ...] = (
    ("test_fuzz.py", "-k", "(linear_csr] or linear_csr- or linear_bitmask_bf16) and (every_batch or every_relation)"),
    ("test_kernels_linear.py",),
)
_READERS: tuple[Stage, ...] = (
    ("test_hostile.py", "-k", "not mutations and not names"),
    ("test_save.py",),
    ("test_hostile.py",),
)
_STRUCTURED: Stage = ("test_formats_structured.py", "-k", "not kernels")
_SYSTEMS: Stage = ("test_systems_formats.py",)
_CONVOLUTIONS: tuple[Stage, ...] = (("test_conv.py", "-k", "agrees or layout or geometry"), ("test_conv.py",))
TESTS: dict[str, tuple[Stage, ...]] = {
    "sparsec/formats/_check.py": (("test_formats.py",), ("test_formats_regular.py", "test_hostile.py")),
    "sparsec/formats/_pack.py": (("test_formats.py",), ("test_formats_regular.py",)),
    "sparsec/formats/csr.py": (("test_formats.py",), *_kernels("csr")),
    "sparsec/formats/bitmask.py": (("test_formats.py",), *_kernels("bitmask")),
    "sparsec/formats/bsr.py": (("test_formats.py",), *_kernels("bsr")),
    "sparsec/formats/nm.py": (("test_formats_regular.py",), *_kernels("nm")),
    "sparsec/formats/fan_in.py": (("test_formats_regular.py",), *_kernels("fan_in")),
    "sparsec/formats/quantized.py": (("test_formats_quantized.py",), *_kernels("quantized")),
    "sparsec/formats/csr_groups.py": (("test_formats_csr_groups.py",), *_kernels("csr_groups")),
    "sparsec/formats/sell.py": (("test_formats_sell.py",), *_kernels("sell")),
    "sparsec/formats/window.py": (("test_formats_window.py",), *_kernels("window")),
    "sparsec/formats/nmg.py": (_STRUCTURED, *_kernels("nmg"), _SYSTEMS),
    "sparsec/formats/block_nm.py": (_STRUCTURED, *_kernels("block_nm"), _SYSTEMS),
    "sparsec/formats/permuted.py": (_STRUCTURED, *_kernels("permuted_bsr"), _SYSTEMS),
    "sparsec/formats/sum.py": (_STRUCTURED, *_kernels("sum"), _SYSTEMS),
    "sparsec/formats/__init__.py": (("test_format_text.py",),),
    "sparsec/points/rulebook.py": (("test_points.py",),),
    "sparsec/factors/chain.py": (("test_chain.py", "-k", "not memory"),),
    "sparsec/algebra/rules_linear.py": (("test_algebra_rules.py",), ("test_rewrite.py",)),
    "sparsec/algebra/rules_layers.py": (("test_algebra_rules.py",), ("test_rewrite.py",)),
    "sparsec/algebra/rules_structure.py": (("test_algebra_rules.py",), ("test_rewrite.py",)),
    "sparsec/contract.py": (("test_contract.py",), ("test_graph_fuzz.py",)),
    "codegen/conv.py": (("test_conv_fuzz.py", "-k", "two_to_the_31"), *_CONVOLUTIONS),
    "codegen/kernel.py": (("test_render.py", "test_catalog.py"), ("test_fuzz.py", "-k", "share")),
    "codegen/render.py": (("test_render.py",),),
    "codegen/cache.py": (("test_cache.py",), ("test_cache_soak.py", "test_faults.py")),
    "sparsec/verify.py": (("test_verify.py",), ("test_fuzz.py", "-k", "relation or oracle")),
    "sparsec/recipes.py": (("test_fold.py",), ("test_save.py",)),
    "sparsec/save_zip.py": _READERS,
    "sparsec/save_values.py": _READERS,
    "sparsec/save_graph.py": _READERS,
    "sparsec/save_call.py": _READERS,
    "sparsec/save_kernels.py": _READERS,
    "passes/fuse.py": (("test_fuse.py",), ("test_graph_fuzz.py",)),
    "passes/fold.py": (("test_fold.py",), ("test_graph_fuzz.py",)),
    "passes/normalise.py": (("test_normalise.py",), ("test_graph_fuzz.py",)),
    "passes/conv_rewrite.py": (("test_conv_rewrite.py",),),
    "templates/linear_csr.c.jinja": _kernels("csr"),
    "templates/linear_bitmask.c.jinja": _kernels("bitmask"),
    "templates/linear_bsr.c.jinja": _kernels("bsr"),
    "templates/linear_nm.c.jinja": _kernels("nm"),
    "templates/linear_fan_in.c.jinja": _kernels("fan_in"),
    "templates/linear_quantized.c.jinja": _kernels("quantized"),
    "templates/linear_csr_groups.c.jinja": _kernels("csr_groups"),
    "templates/linear_sell.c.jinja": _kernels("sell"),
    "templates/linear_window.c.jinja": _kernels("window"),
    "templates/linear_nmg.c.jinja": _kernels("nmg"),
    "templates/linear_block_nm.c.jinja": _kernels("block_nm"),
    "templates/_quad.c.jinja": _kernels("sell"),
    "templates/_conv.c.jinja": _CONVOLUTIONS,
    "templates/conv_csr.c.jinja": _CONVOLUTIONS,
    "templates/conv_csr_groups.c.jinja": _CONVOLUTIONS,
    "templates/conv_bsr.c.jinja": (("test_conv.py", "-k", "blocks or dilation"), ("test_conv.py",)),
    "templates/conv_depthwise.c.jinja": (("test_conv.py", "-k", "depthwise"), ("test_conv.py",)),
    "templates/conv_dense.c.jinja": _CONVOLUTIONS,
    "templates/chain.c.jinja": (("test_chain.py", "-k", "every_batch or every_epilogue"), ("test_chain.py",)),
    "templates/gather_gemm.c.jinja": (("test_points.py",),),
    "templates/_panel.c.jinja": _SHARED,
    "templates/_gemv.c.jinja": _SHARED,
    "templates/_threads.c.jinja": _SHARED,
    "templates/_epilogue.c.jinja": (("test_kernels_linear.py",), ("test_fuzz.py", "-k", "share")),
    "templates/_ffi.c.jinja": (("test_kernels_linear.py",), ("test_fuzz.py", "-k", "share"), ("test_ops.py",)),
}
"""File -> the stages that must kill its mutants."""

BY_HAND: tuple[tuple[str, str, str], ...] = (
    ("templates/linear_csr.c.jinja", "+ t${ c_int(j) };", ";"),  # the second chain of sums is lost
    ("templates/linear_csr.c.jinja", "if (p < end) {", "if (p + 1 < end) {"),  # the odd entry is lost
    ("templates/linear_csr.c.jinja", "if (resume) {", "if (0) {"),  # only the last block of inputs counts
    ("templates/linear_csr.c.jinja", "for (; p + 8 <= end; p += 8)", "for (; p + 8 <= end; p += 4)"),
    ("templates/linear_csr.c.jinja", "s0 = s0 + s1;", "s0 = s0 + s0;"),
    ("templates/linear_csr.c.jinja", "a->indices[p] - k0", "a->indices[p]"),  # right for the first block of inputs
    ("templates/_panel.c.jinja", "block > 0);\n        continue;", "1);\n        continue;"),  # sums start as garbage
    ("templates/_panel.c.jinja", "int64_t at = from / nc * nc", "int64_t at = from"),
    ("templates/_panel.c.jinja", "columns - c < ${ c_int(w) } ? columns - c :", "columns - c < 0 ? columns - c :"),
    ("templates/_gemv.c.jinja", "if (i < n) emit_", "if (i + 1 < n) emit_"),  # the last row of an odd number
    ("templates/_gemv.c.jinja", "a->x + b * IN;", "a->x;"),  # every row of x is the first
    ("templates/_threads.c.jinja", "if (part >= of) return OUT;", "if (part >= of) return OUT - 1;"),
    ("templates/_epilogue.c.jinja", "a->residual + b * OUT + r", "a->residual + r"),
    ("templates/_epilogue.c.jinja", "s.params[1]", "s.params[0]"),  # clamp to a point
    ("templates/_epilogue.c.jinja", "${ c_float(0.044715) }", "${ c_float(0.04715) }"),
    ("templates/_ffi.c.jinja", "t->dtype.bits != bits || ", ""),
    ("templates/_ffi.c.jinja", "if (a.batch * OUT != outputs)", "if (0)"),
    ("templates/_ffi.c.jinja", "t->strides[i] != count", "t->strides[i] < 0"),
    ("sparsec/formats/csr.py", "np.minimum(low + fmt.block, cols)", "low + fmt.block"),
    ("sparsec/formats/csr.py", '_check.ascending(self.name, indices, ends[::blocks], "row")', "pass"),
    ("sparsec/formats/_check.py", "rises = indices[1:] > indices[:-1]", "rises = indices[1:] >= indices[:-1]"),
    ("sparsec/formats/_check.py", "if array[-1] != total:", "if array[-1] > total:"),
    ("sparsec/verify.py", "8 + 2 * count**0.5", "8 + 2 * count**2"),
    ("passes/fold.py", 'node.kwargs.get("alpha", 1) != 1 or ', ""),  # x + 2 b becomes x + b
    ("templates/conv_csr.c.jinja", "if (resume) {", "if (0) {"),  # only the last blocks of columns count
    ("templates/conv_csr.c.jinja", "if (p < end) {", "if (p + 1 < end) {"),
    ("templates/conv_csr.c.jinja", "a->indices[p + 1] - k0", "a->indices[p + 1]"),
    ("templates/_conv.c.jinja", "zeros(to, first - low);", ";"),  # padding in front holds what was there
    ("templates/_conv.c.jinja", "zeros(to + (last - low), high - last);", ";"),
    ("templates/linear_sell.c.jinja", "memset(packed, 0, ", "if (0) memset(packed, 0, "),  # the slot of zeros
    ("templates/linear_sell.c.jinja", "memset(sums, 0, ", "if (0) memset(sums, 0, "),
    ("templates/linear_sell.c.jinja", "g < slices && count[g]", "g + 1 < slices && count[g]"),
    (
        "sparsec/formats/sell.py",
        "indices[entry * ROWS + here % ROWS] = offset + 1",
        "indices[entry * ROWS + here % ROWS] = offset",
    ),
)
"""(file, text, what it becomes): the first place where the text stands."""

EQUIVALENT: dict[str, str] = {
    "sparsec/formats/bsr.py: bad = (padding != 0).flatten(1).any(dim=1).nonzero().flatten() -> "
    "bad = (padding != 0).flatten(2).any(dim=1).nonzero().flatten()": "the first entry is the first bad block anyway",
    "sparsec/formats/bitmask.py: if rows == 0 or words == 0: -> if rows == 0 and words == 0:": "what follows does "
    "nothing for weights without rows or columns, too",
}
"""Mutant without its line -> why no test can see it."""


@dataclass(frozen=True)
class Mutant:
    """One change: the file, the number of its (first) line, and the text before and after."""

    file: str
    line: int
    before: str
    after: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line + 1}: {self.before.strip()} -> {self.after.strip()}"


_SWAPS = (
    (" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "), (" == ", " != "), (" != ", " == "),
    (" + ", " - "), (" - ", " + "), (" and ", " or "), (" or ", " and "), (" is not None", " is None"),
    ("not ", ""), ("[:-1]", "[:]"), ("[1:]", "[:]"), (" * ", " + "), ("True", "False"), (" // ", " * "),
)  # fmt: skip
_TEMPLATE_SWAPS = (
    (" < ", " <= "), (" <= ", " < "), (" + ", " - "), (" - ", " + "), ("+= ", "-= "), (" * ", " + "), ("++", "--"),
    (" ? ", " == 0 ? "), ("!= ", "== "), ("== ", "!= "), ("s0 + s1", "s0"), ("return -1", "return 0"),
)  # fmt: skip


def mutants(root: Path, file: str) -> Iterator[Mutant]:
    """Every generated mutant of a file: one swap at one place."""
    text = place(root, file).read_text()
    python = file.endswith(".py")
    quiet = _documentation(text) if python else set()
    for number, line in enumerate(text.splitlines()):
        bare = line.strip()
        if number in quiet or not bare or bare.startswith(("#", "<#", "import ", "from ", "/*", "raise ", 'f"', '"')):
            continue
        if "LoadError(" in bare or "SpecError(" in bare or "FormatError(" in bare or "<% macro" in bare:
            continue
        if not python and "*/" in bare and "/*" not in bare:
            continue
        code = line if python else line.partition("/*")[0]
        for old, new in _SWAPS if python else _TEMPLATE_SWAPS:
            for found in re.finditer(re.escape(old), code):
                yield Mutant(file, number, line, line[: found.start()] + new + line[found.end() :])
        for found in re.finditer(r"(?<![\w.\"'])(\d+)(?![\w.\"'])", code):
            yield Mutant(file, number, line, line[: found.start()] + str(int(found[1]) + 1) + line[found.end() :])
        if python and re.match(r"\s+return \w", line) and "return None" not in line:
            yield Mutant(file, number, line, re.sub(r"return .*", "return None", line))


def by_hand(root: Path) -> list[Mutant]:
    """The mutants of BY_HAND that the sources still have a place for."""
    found = []
    for file, before, after in BY_HAND:
        text = place(root, file).read_text()
        if before in text:
            found.append(Mutant(file, text[: text.index(before)].count("\n"), before, after))
    return found


def changed(root: Path, mutant: Mutant) -> str:
    """The text of the file with the mutant in it."""
    text = place(root, mutant.file).read_text()
    start = sum(len(line) for line in text.splitlines(keepends=True)[: mutant.line])
    at = text.index(mutant.before, start)
    return text[:at] + mutant.after + text[at + len(mutant.before) :]


def _documentation(text: str) -> set[int]:
    """Lines of docstrings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.update(range(node.lineno - 1, node.end_lineno or node.lineno))
    return lines


def _parses(root: Path, mutant: Mutant) -> bool:
    if not mutant.file.endswith(".py"):
        return True
    try:
        ast.parse(changed(root, mutant))
    except SyntaxError:
        return False
    return True


def choose(root: Path, seed: int, count: int, only: str) -> list[Mutant]:
    """`count` mutants: those by hand, then the same number of generated ones from every file as far as it goes."""
    rng = random.Random(seed)
    files = [f for f in TESTS if only in f and place(root, f).exists()]
    pools = {f: [m for m in mutants(root, f) if _parses(root, m)] for f in files}
    for pool in pools.values():
        rng.shuffle(pool)
    found = [m for m in by_hand(root) if only in m.file]
    while len(found) < count and any(pools.values()):
        found += [pool.pop() for pool in pools.values() if pool]
    return found[:count]


def workspace(folder: Path) -> Path:
    """The sources of the last commit, with `sparsec` as one package folder that holds passes, codegen and templates."""
    try:
        packed = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, subprocess.CalledProcessError):  # no git, or not in a checkout
        for part in ("sparsec", "passes", "codegen", "templates", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
    for part in ("passes", "codegen", "templates"):
        (folder / part).rename(folder / "sparsec" / part)
    return folder


def place(root: Path, file: str) -> Path:
    """Where a file of the checkout is in the workspace."""
    return root / file if file.startswith("sparsec/") else root / "sparsec" / file


def warm() -> None:
    """Load what every stage needs, and nothing that is mutated."""
    import hypothesis
    import jinja2
    import numpy
    import pytest
    import scipy.sparse
    import sympy
    import torch.fx.experimental.proxy_tensor

    loaded = (hypothesis, jinja2, numpy, pytest, scipy.sparse, sympy, torch)
    if any(module is None for module in loaded) or "sparsec" in sys.modules:
        raise RuntimeError("sparsec was imported before its mutants")


def pytest_in_fork(root: Path, arguments: Stage, seconds: float) -> tuple[int, list[str]]:
    """Exit status of pytest in a fork (124 after `seconds`), and the ids of the tests that failed."""
    out = root / "pytest.out"
    child = os.fork()
    if child == 0:
        os.setsid()
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ |= {
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SPARSEC_CACHE_DIR": str(root / "cache"),
        }
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(root))
        os.chdir(root)
        import pytest

        status = 3
        try:
            tests = [f"tests/{a}" if a.endswith(".py") or "::" in a else a for a in arguments]
            status = int(
                pytest.main(["-q", "-n0", "-p", "no:cacheprovider", "-rf", "-m", "not soak and not slow", *tests])
            )
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return 124, []
    text = out.read_text(errors="replace")
    return os.waitstatus_to_exitcode(status), re.findall(r"^FAILED tests/(\S+)", text, re.M)


class Judge:
    """Runs stages on the workspace; what fails without a mutant is left out."""

    def __init__(self, root: Path, seconds: float) -> None:
        self.root, self.seconds = root, seconds
        self.broken = functools.cache(self._broken)

    def _broken(self, stage: Stage) -> Stage:
        status, failed = pytest_in_fork(self.root, stage, 20 * self.seconds)
        if status not in (0, 1) or (status == 1 and not failed):
            raise RuntimeError(f"{' '.join(stage)} does not run without any mutant: status {status}")
        return tuple(argument for name in failed for argument in ("--deselect", f"tests/{name}"))

    def killed(self, mutant: Mutant) -> str:
        """The test that noticed, or "" when none did."""
        target = place(self.root, mutant.file)
        original = target.read_text()
        for stage in TESTS[mutant.file]:
            left_out = self.broken(stage)
            target.write_text(changed(self.root, mutant))
            try:
                status, failed = pytest_in_fork(self.root, ("-x", *stage, *left_out), self.seconds)
            finally:
                target.write_text(original)
            if status != 0:
                return failed[0] if failed else f"status {status} of {' '.join(stage)}"
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Break the sources in one place at a time and count what tests notice."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100, help="in all, with those already recorded")
    parser.add_argument("--file", default="", help="only files whose path contains this")
    parser.add_argument("--seconds", type=float, default=300.0, help="a stage that takes longer has noticed")
    parser.add_argument("--total", type=float, default=float("inf"), help="stop after this many seconds")
    parser.add_argument("--totals", type=Path, default=ROOT / "out" / "mutants.json", help="JSON file that runs add to")
    options = parser.parse_args()
    options.totals.parent.mkdir(exist_ok=True)
    record: dict[str, Any] = json.loads(options.totals.read_text()) if options.totals.exists() else {}
    start = time.monotonic()
    warm()
    with tempfile.TemporaryDirectory(prefix="sparsec-mutants-") as name:
        root = workspace(Path(name))
        judge = Judge(root, options.seconds)
        for mutant in choose(root, options.seed, options.count, options.file):
            if mutant.name in record:
                continue
            if time.monotonic() - start > options.total:
                break
            by = judge.killed(mutant)
            record[mutant.name] = by
            options.totals.write_text(json.dumps(record, indent=1))
            print(f"{'killed  ' if by else 'SURVIVED'} {mutant.name}\n           {by[:100]}", flush=True)
    survivors = [
        name for name, by in record.items() if not by and re.sub(r":\d+:", ":", name, count=1) not in EQUIVALENT
    ]
    print("\n".join(["", *survivors]))
    print(f"{len(record)} mutants, {sum(map(bool, record.values()))} killed, {len(survivors)} survived")
    return 0 if record and len(survivors) <= 0.05 * len(record) else 1


if __name__ == "__main__":
    sys.exit(main())
