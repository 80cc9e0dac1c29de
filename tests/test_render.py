"""Rendering: emitters, the sandbox, determinism, and the rules that every packaged template keeps."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_kernel

from sparsec.codegen import catalog
from sparsec.codegen.kernel import KernelSpec, Problem, Step
from sparsec.codegen.render import TEMPLATES, c_float, c_int, environment, ident, render, render_file, require
from sparsec.errors import SpecError

PACKAGED = sorted(TEMPLATES.glob("*.jinja"))


def write(folder: Path, text: str) -> str:
    path = folder / "t.c.jinja"
    path.write_text(text)
    return str(path)


def test_c_int_checks_type_and_range() -> None:
    assert [c_int(v) for v in (0, 7, -7)] == ["0", "7", "(-7)"]
    assert c_int(2**31 - 1) == "2147483647" and c_int(2**31) == "2147483648LL"
    assert c_int(-(2**63)) == "(-9223372036854775807LL - 1)"
    assert c_int(127, 8) == "127"
    for value, bits in ((2**63, 64), (128, 8), (-129, 8)):
        with pytest.raises(SpecError, match="does not fit"):
            c_int(value, bits)
    for value in (True, 1.0, "1", None, "1; system()"):
        with pytest.raises(SpecError, match="c_int prints integers"):
            c_int(value)


def test_c_float_keeps_every_float32() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        (value,) = struct.unpack("<f", struct.pack("<I", rng.getrandbits(32)))
        if math.isfinite(value):
            text = c_float(value)
            assert re.fullmatch(r"\(?-?0x[01]\.[0-9a-f]+p[+-]\d+f\)?", text)
            assert float.fromhex(text.strip("()").rstrip("f")) == value
    assert (c_float(1), c_float(0.1), c_float(-2.5)) == ("0x1.0p+0f", "0x1.99999ap-4f", "(-0x1.4p+1f)")
    assert c_float(-0.0) == "(-0x0.0p+0f)"
    assert c_float(math.inf) == "__builtin_inff()" and c_float(-math.inf) == "(-__builtin_inff())"
    assert c_float(math.nan) == '__builtin_nanf("")'


def test_c_float_and_ident_refuse_what_they_cannot_print() -> None:
    with pytest.raises(SpecError, match="beyond float32"):
        c_float(1e39)
    for value in (True, "0.5", None):
        with pytest.raises(SpecError, match="c_float prints numbers"):
            c_float(value)
    assert ident("acc_3") == "acc_3"
    for name in ("", "3a", "a b", "a;b", "a\n", "int", "x" * 64, 5, None):
        with pytest.raises(SpecError, match="is not a C identifier"):
            ident(name)
    assert require(1, "x") == ""
    with pytest.raises(SpecError, match=r"^columns$"):
        require(0, "columns")


def test_the_text_is_the_template_with_emitted_values() -> None:
    text = render(tiny_kernel.spec(7, factor=0.1)).text
    assert "out[i] = 0x1.99999ap-4f * in[i] + 7;" in text
    assert f"__tvm_ffi_{tiny_kernel.spec(7, factor=0.1).symbol}(" in text
    assert text.startswith("#include") and text.endswith("}\n") and "<%" not in text and "${" not in text
    assert render(tiny_kernel.spec(7)) is render(tiny_kernel.spec(7))  # kept


def test_specs_and_sources_are_values() -> None:
    """They are kept and compared: nobody may change one that somebody else holds."""
    source, problem = render(tiny_kernel.spec(7)), Problem("linear", 2, 3, "float32", 4)
    for value, name in ((source, "text"), (source.spec, "isa"), (Step("relu"), "name"), (problem, "op")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, "other")


HASHES = """
import hashlib, itertools, test_template_branches as branches, tiny_kernel
from sparsec.codegen import catalog, render
from sparsec.codegen.kernel import Problem, Step
from sparsec.formats import BSR, NM, FanIn
from sparsec.formats.csr_groups import CSRGroups
from sparsec.formats.quantized import Quantized
from sparsec.target import ISAS, Target
texts = [render.render(tiny_kernel.spec(n)).text for n in range(3)]
for isa in ISAS.values():
    target = Target("x86_64", isa.features)
    for v in catalog.CATALOG:
        problem = Problem("linear", 40, 70, v.dtypes[0], 700, True, (Step("clamp", (0.0, 6.0)),))
        known = [f for f in (BSR(4, 4), FanIn(18), NM(2, 7), CSRGroups(), Quantized()) if f.name == v.format]
        formats = [f for f in v.formats(problem, target) or known if v.refuse(problem, f, target) is None]
        texts += [render.render(s).text for f in formats for s in v.specs(problem, f, target)]
for v in catalog.builtin():
    specs = itertools.islice(branches.kernels(v), 3) if v.template else ()
    texts += [render.render_file(v.template, spec) for spec in specs]
print(len(texts), hashlib.sha256(repr(texts).encode()).hexdigest())
"""


def test_equal_specs_give_equal_bytes_in_any_process() -> None:
    runs = []
    for seed in ("0", "4242"):
        places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": places}
        runs.append(subprocess.Popen([sys.executable, "-c", HASHES], env=env, stdout=subprocess.PIPE, text=True))
    first, second = (run.communicate(timeout=120)[0] for run in runs)
    assert first and first == second
    assert int(first.split()[0]) > 150


HOSTILE = '"); system("true"); //'


@pytest.mark.parametrize(
    "change",
    [
        {"variant": HOSTILE}, {"op": "linear*/"}, {"format": "csr*/int x;/*"}, {"format": ""}, {"dtype": HOSTILE},
        {"isa": "native"}, {"plan": ((0, HOSTILE, 1),)}, {"fields": ((HOSTILE, 1),)}, {"tile": (("a b", 1),)},
        {"out_features": -1}, {"in_features": 2**31},
    ],
)  # fmt: skip
def test_hostile_names_never_reach_the_text(change: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        render(dataclasses.replace(tiny_kernel.spec(), **change))  # type: ignore[arg-type]
    stolen = (
        KernelSpec.parse(dataclasses.replace(tiny_kernel.spec(), **change).text()) if "dtype" not in change else None
    )
    if stolen is not None:  # the same from a file
        with pytest.raises(SpecError):
            render(stolen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${ k.nothing }", "line 1: .*nothing"),
        ("\n${ missing }", "line 2: 'missing' is undefined"),
        ("<% if f.block %>x<% endif %>", "has no attribute 'block'"),
        ("${ k.out_features }", "prints 3 as it is; use c_int"),
        ("${ none }", "prints None as it is"),
        ("${ k.plan }", "prints a tuple"),
        ("${ k.__class__ }", "unsafe|access"),
        ("${ k.text.__globals__ }", "unsafe|access"),
        ("${ 3|default(4) }", "No filter named 'default'"),
        ("${ 'x'|safe }", "No filter named 'safe'"),
        ("<% for i in range(1000000) %>x<% endfor %>", "OverflowError"),
        ("${ c_int(k.epilogue) }", "c_int prints integers"),
        ("\n\n${ require(k.bias, 'needs a bias') }", "line 3: needs a bias"),
        ("<% if %>", "line 1: Expected an expression"),
        ("<% include 'nowhere.jinja' %>", "nowhere.jinja"),
        ("${ 1 // 0 }", "ZeroDivisionError"),
    ],
)
def test_wrong_templates_are_spec_errors_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"(?s)template .*({message})"):
        render_file(write(tmp_path, text), tiny_kernel.spec())


def test_c_survives_the_delimiters(tmp_path: Path) -> None:
    c = "int a[2][2] = {{1,2},{3,4}};\n#define X(a) #a {#pragma}\nint m = 7 % 3 << 1; // 50 %% 'q' $ {}\n"
    assert render_file(write(tmp_path, c), tiny_kernel.spec()) == c


def test_user_template_sees_its_own_folder_and_the_packaged_macros(tmp_path: Path) -> None:
    (tmp_path / "_mine.jinja").write_text("mine")
    place = write(tmp_path, "<% include '_mine.jinja' %> ${ 'yes' if has('avx2') else 'no' } ${ c_int(f.block) }")
    spec = dataclasses.replace(tiny_kernel.spec(isa="avx2"), fields=(("block", 64),))
    assert render_file(place, spec) == "mine yes 64\n"
    loader = environment(str(tmp_path)).loader
    assert loader is not None and {p.name for p in PACKAGED} <= set(loader.list_templates())


def test_epilogue_values_are_exact() -> None:
    spec = dataclasses.replace(tiny_kernel.spec(), epilogue=(Step("scale", (1 / 3,)),))
    assert "0x1.555556p-2f" in render(KernelSpec.parse(spec.text())).text


@pytest.mark.parametrize("path", PACKAGED, ids=lambda p: p.name)
def test_packaged_templates_keep_the_rules(path: Path) -> None:
    text = path.read_text()
    environment().get_template(path.name)  # parses
    assert not re.search(r"\|\s*(default|d|safe)\b", text)
    if not path.name.startswith(("_", "export_")):  # macros, and the files around exported kernels
        first = re.search(r"\$\{\s*([a-z_.]+)\(", text)
        assert first and first[1] in ("require", "linear.check", "conv.check"), "refuse before printing"
        assert path.name in {v.template for v in catalog.builtin()}, "a template without a line in the catalogue"


def test_every_line_of_the_catalogue_has_its_template() -> None:
    assert {v.template for v in catalog.builtin() if v.template.endswith(".jinja")} <= {p.name for p in PACKAGED}
