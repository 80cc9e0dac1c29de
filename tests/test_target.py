"""Target: probing, names, instruction sets and their flags."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from sparsec.errors import SpecError
from sparsec.target import FEATURES, ISAS, Target, read_caches, read_cpuinfo

CPUINFO = """\
processor : 0
vendor_id : GenuineIntel
cpu family : 6
model : 85
model name : Xeon
flags : fpu avx2 fma f16c bmi1 bmi2 popcnt avx512f avx512bw avx512dq avx512vl avx512_vnni something_else

processor : 1
flags : fpu avx2 fma f16c bmi1 bmi2 popcnt avx512f avx512bw avx512dq avx512_vnni
"""

FULL = Target("x86_64", features=tuple(sorted(f for f in FEATURES if f not in ("neon", "sve", "bf16", "i8mm"))))


def test_cpuinfo_keeps_only_what_every_processor_has() -> None:
    name, features = read_cpuinfo(CPUINFO)
    assert name == "Xeon (GenuineIntel/6/85)"
    assert " ".join(features) == "avx2 avx512_vnni avx512bw avx512dq avx512f bmi1 bmi2 f16c fma popcnt"
    assert Target("x86_64", features).isas == ("avx2", "portable")  # one core without avx512vl loses all of AVX-512
    assert read_cpuinfo("") == ("", ())


def test_cpuinfo_of_arm() -> None:
    name, features = read_cpuinfo("CPU implementer : 0x41\nFeatures : fp asimd bf16\nCPU part : 0xd40\n")
    assert name == "0x41/0xd40"
    assert features == ("bf16", "neon")
    assert Target("aarch64", features).isas == ("portable",)


def test_caches(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert read_caches(tmp_path) == (48 << 10, 2 << 20, 0)
    assert read_caches(tmp_path / "nowhere") == (32 << 10, 256 << 10, 0)


def test_isas_are_nested_and_their_flags_explicit() -> None:
    assert FULL.isas == tuple(ISAS)
    x86 = [isa for isa in ISAS.values() if isa.arch == "x86_64"]
    for better, worse in itertools.pairwise(x86):
        assert set(worse.features) < set(better.features)
        assert set(worse.flags) < set(better.flags)
    for isa in ISAS.values():
        assert len(isa.flags) == len(isa.features)
        assert not any("native" in flag or "march" in flag for flag in isa.flags)
    assert ISAS["portable"].flags == ()
    assert set(ISAS["avx2"].flags) == {"-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"}


def test_probe_is_cached_and_parse_restricts() -> None:
    here = Target.probe()
    assert here is Target.probe()
    assert here.cores >= 1 and here.l1d >= 8 << 10 and here.features == tuple(sorted(here.features))
    assert Target.parse("cpu") is here
    assert Target.parse(here) is here
    plain = Target.parse("cpu:portable")
    assert plain.isas == ("portable",) and plain.features == () and str(plain) == "cpu:portable"
    avx2 = FULL.limit("avx2")
    assert avx2.isas == ("avx2", "portable") and set(avx2.features) == set(ISAS["avx2"].features)
    assert Target.parse("cuda:sm_90").detail == "sm_90" and Target.parse("tvm").kind == "tvm"


@pytest.mark.parametrize("text", ["", "cpus", "cpu:", "cpu:avx", "gpu", "cuda:90", "cuda:sm_9; rm"])
def test_unknown_targets_say_what_is_valid(text: str) -> None:
    with pytest.raises(SpecError) as error:
        Target.parse(text)
    assert "cpu" in str(error.value) or "sm_90" in str(error.value)


def test_missing_features_are_named() -> None:
    with pytest.raises(SpecError, match=r"lacks avx512f, .* it can be avx2, portable"):
        FULL.limit("avx2").limit("avx512")
    with pytest.raises(SpecError, match="must be a string or a Target, got int"):
        Target.parse(3)  # type: ignore[arg-type]


def test_machine_id_tells_machines_apart() -> None:
    assert FULL.machine_id() == dataclasses.replace(FULL).machine_id()
    others = [FULL.limit("avx2"), dataclasses.replace(FULL, cores=7), dataclasses.replace(FULL, l2=1)]
    assert len({t.machine_id() for t in (FULL, *others)}) == 4
