"""The catalogue: what it refuses and why, what it offers, and registration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from sparsec import formats
from sparsec.codegen import catalog, plans
from sparsec.codegen.backend import Backend
from sparsec.codegen.kernel import DTYPES, STEPS, KernelSpec, Problem, Step
from sparsec.errors import SpecError
from sparsec.formats import BSR, CSR, NM, SELL, Bitmask, CSRGroups, FanIn, Format, Quantized
from sparsec.target import ISAS, Target

FULL = Target("x86_64", ISAS["avx512bf16"].features, l1d=32 << 10)
PLAIN = Target("aarch64")
PROBLEM = Problem("linear", 384, 1536, "float32", 58_982, True, (Step("gelu"),))
EXAMPLES: dict[str, Format] = {
    "csr": CSR(), "bitmask": Bitmask(), "bsr": BSR(16, 1), "csr_groups": CSRGroups(), "sell": SELL(),
    "nm": NM(2, 4),
    "fan_in": FanIn(9), "quantized": Quantized(),
}  # fmt: skip


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_user_variants", {})
    monkeypatch.setattr(catalog, "_user_backends", {})
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))


def test_the_table_is_sound() -> None:
    names = [v.name for v in catalog.CATALOG]
    assert len(set(names)) == len(names)
    for variant in catalog.CATALOG:
        assert variant.format in formats.FORMATS and set(variant.dtypes) <= set(DTYPES)
        assert set(variant.steps) <= set(STEPS)
        assert [i for i in ISAS if i in variant.isas] == list(variant.isas), "best first"
        assert variant.isas[-1] == "portable", "every kernel runs everywhere"
        assert catalog.variant(variant.name) is variant and variant in catalog.variants_for(variant.op, variant.format)
    for dtype in ("float32", "bfloat16"):
        for fmt in EXAMPLES:
            found = [v for v in catalog.CATALOG if v.format == fmt and dtype in v.dtypes]
            assert len(found) == ((fmt, dtype) != ("quantized", "bfloat16"))


@pytest.mark.parametrize("target", [FULL, FULL.limit("avx2"), PLAIN], ids=["avx512", "avx2", "plain"])
@pytest.mark.parametrize("variant", catalog.CATALOG, ids=lambda v: v.name)
def test_specs_are_complete_and_parse_back(variant: catalog.Variant, target: Target) -> None:
    problem = dataclasses.replace(PROBLEM, dtype=variant.dtypes[0])
    fmt = EXAMPLES[variant.format]
    specs = variant.specs(problem, fmt, target)
    assert specs and len(set(specs)) == len(specs)
    for spec in specs:
        assert KernelSpec.parse(spec.text()) == spec
        assert spec.isa in target.isas and spec.variant == variant.name and spec.epilogue == problem.epilogue
        assert spec.format == fmt.resolve(384, 1536).text() and spec.fields == catalog.fields_of(fmt.resolve(384, 1536))
        limits = [limit for limit, _, _ in spec.plan]
        assert limits[-1] == 0 and limits[:-1] == sorted(set(limits[:-1])) and 0 not in limits[:-1]
    again = variant.specs(problem, fmt, target)
    assert again == specs
    assert variant.specs(dataclasses.replace(problem, nnz=1), fmt, target) == specs, "equal shapes share kernels"


def test_the_best_instruction_set_is_taken() -> None:
    bf16 = catalog.variant("linear_bitmask_bf16")
    expected = {"avx512bf16": "avx512bf16", "avx512vbmi2": "avx512vbmi2", "avx512": "avx512", "avx2": "avx2"}
    assert {isa: bf16.isa(FULL.limit(isa)) for isa in expected} == expected
    assert bf16.isa(FULL) == "avx512bf16" and bf16.isa(PLAIN) == "portable"
    assert catalog.variant("linear_csr").isa(FULL) == "avx512"


def _refused(variant: str = "linear_csr", fmt: Format = CSR(), target: Target = FULL, **change: object) -> str:  # noqa: B008
    problem = dataclasses.replace(PROBLEM, **change)  # type: ignore[arg-type]
    reason = catalog.variant(variant).refuse(problem, fmt, target)
    assert reason is not None
    with pytest.raises(SpecError) as error:
        catalog.variant(variant).specs(problem, fmt, target)
    assert str(error.value) == reason
    return reason


def test_refusals_are_sentences_with_the_reason() -> None:
    assert _refused(op="conv2d") == "linear_csr computes linear, not conv2d"
    assert _refused(fmt=BSR(4, 4)) == "linear_csr reads format csr, not bsr(r=4,c=4)"
    assert _refused(dtype="float16") == "linear_csr computes in float32, not float16"
    assert _refused(target=Target.parse("cuda")).startswith("linear_csr needs avx512 or avx2 or portable; cuda has")
    assert "below 2**31" in _refused(nnz=2**31) and "nothing to multiply" in _refused(in_features=0)
    assert catalog.variant("linear_csr").refuse(PROBLEM, CSR(), FULL) is None
    narrow = dataclasses.replace(catalog.variant("linear_csr"), name="narrow", steps=("relu",), isas=("avx512",))
    assert narrow.refuse(PROBLEM, CSR(), FULL) == "narrow has no epilogue gelu; it fuses relu"
    plain = dataclasses.replace(PROBLEM, epilogue=())
    assert narrow.refuse(plain, CSR(), FULL.limit("avx2")) == "narrow needs avx512; cpu:avx2 has avx2, portable"
    assert narrow.specs(plain, CSR(), FULL)[0].isa == "avx512"


@pytest.mark.parametrize("l1d", [16 << 10, 32 << 10, 48 << 10, 128 << 10])
def test_blocks_keep_a_panel_inside_the_l1_cache(l1d: int) -> None:
    for columns in (16, 32, 64):
        block = plans.panel_block(dataclasses.replace(FULL, l1d=l1d), columns)
        assert block & (block - 1) == 0 and block >= 16
        assert block * columns * 4 <= l1d < block * columns * 8


@pytest.mark.parametrize("size", [(384, 384), (1536, 384), (5, 7), (1, 1), (4096, 70_000), (3, 129)])
def test_formats_are_resolved_and_fit(size: tuple[int, int]) -> None:
    rows, cols = size
    for variant in catalog.CATALOG:
        problem = Problem("linear", rows, cols, variant.dtypes[0], max(1, rows * cols // 5))
        for fmt in variant.formats(problem, FULL):
            assert fmt.resolve(rows, cols) == fmt and fmt.name == variant.format
            assert None not in fmt.fields().values()
            assert fmt.fields().get("block", 1) <= max(16, -(-cols // 16) * 16)
    sparse = Problem("linear", rows, cols, "float32", rows * cols // 100)
    assert catalog.variant("linear_bitmask").formats(sparse, FULL) == ()
    assert catalog.variant("linear_csr").formats(sparse, FULL) != ()
    assert catalog.variant("linear_csr").formats(dataclasses.replace(sparse, dtype="int8"), FULL) == ()


def test_users_add_variants_formats_and_backends(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Ell(Format):
        name: ClassVar[str] = "ell"
        buffers: ClassVar[tuple[str, ...]] = ("values", "indices")

    class Mine(Backend):
        name = "mine"

    template = tmp_path / "ell.c.jinja"
    template.write_text("")
    variant = catalog.Variant("linear_ell", "linear", "ell", str(template), language="mine")
    for obj in (Ell, variant, Mine()):
        catalog.register(obj)
    assert catalog.variants_for("linear", "ell") == (variant,) and catalog.variant("linear_ell") is variant
    assert catalog.variants_for("linear")[: len(catalog.CATALOG)] == catalog.CATALOG
    assert catalog.backend("mine").name == "mine" and formats.FORMATS["ell"] is Ell
    assert catalog.backend("mine").available() is None
    for obj in (Ell, Ell(), variant, Mine()):
        with pytest.raises(SpecError, match=r"'(ell|linear_ell|mine)' is (taken|already registered)"):
            catalog.register(obj)
    for method in ("render", "build", "load"):
        with pytest.raises(SpecError, match=f"'mine' does not define {method}"):
            getattr(Mine(), method)(*([None] * (1 if method == "render" else 2)))


def test_bad_registrations_say_what_is_wrong(tmp_path: Path) -> None:
    good = catalog.Variant("mine", "linear", "csr", str(tmp_path / "t.jinja"))
    with pytest.raises(SpecError, match="there is no template"):
        catalog.register(good)
    (tmp_path / "t.jinja").write_text("")
    for change, message in (
        ({"name": "linear_csr"}, "a variant named 'linear_csr' is already registered"),
        ({"name": "no good"}, "variant name 'no good' is not usable"),
        ({"isas": ("avx3",)}, "unknown instruction set 'avx3'; nearest: 'avx2'"),
        ({"isas": ()}, "names no instruction set"),
        ({"dtypes": ("float31",)}, "unknown dtype 'float31'; nearest: 'float32'"),
        ({"template": "../x.jinja"}, "must be an absolute path or a file of sparsec.templates"),
    ):
        with pytest.raises(SpecError, match=message.replace("(", r"\(")):
            catalog.register(dataclasses.replace(good, **change))  # type: ignore[arg-type]
    for obj in (3, "csr", catalog.Variant, int):
        with pytest.raises(SpecError, match="register takes a Format class, a Variant or a Backend instance, got"):
            catalog.register(obj)  # type: ignore[arg-type]

    class C(Backend):
        name = "c"

    with pytest.raises(SpecError, match="a backend named 'c' is already registered"):
        catalog.register(C())


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(SpecError, match="no kernel variant 'linear_cst'; nearest: 'linear_csr'"):
        catalog.variant("linear_cst")
    with pytest.raises(SpecError, match="no backend 'cc'; nearest: 'c'"):
        catalog.backend("cc")
    with pytest.raises(SpecError, match="field 'shape' is"):
        catalog.fields_of(_Tupled())


@dataclass(frozen=True)
class _Tupled(Format):
    shape: tuple[int, ...] = (1, 2)
    name: ClassVar[str] = "tupled"
