"""What the machine can do: instruction sets, cache sizes and cores, probed once and named in every kernel key."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparsec.errors import SpecError, nearest


@dataclass(frozen=True)
class Isa:
    """One instruction set that templates are written for.

    `features` is everything the processor must have (names of /proc/cpuinfo), `flags` the compiler options that switch
    exactly those on, `lanes` the fp32 values in one vector (1: plain loops, left to the compiler).
    """

    name: str
    arch: str  # "" runs anywhere
    features: tuple[str, ...]
    flags: tuple[str, ...]
    lanes: int


_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt")
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_FLAGS = (*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_VNNI = (*_AVX512, "avx512_vnni")
_VNNI_FLAGS = (*_AVX512_FLAGS, "-mavx512vnni")
_VBMI2 = (*_VNNI, "avx512vbmi", "avx512_vbmi2")
_VBMI2_FLAGS = (*_VNNI_FLAGS, "-mavx512vbmi", "-mavx512vbmi2")
_BF16 = (*_VBMI2, "avx512_bf16")
_BF16_FLAGS = (*_VBMI2_FLAGS, "-mavx512bf16")
_FP16 = (*_BF16, "avx512_fp16")
_FP16_FLAGS = (*_BF16_FLAGS, "-mavx512fp16")
AMX = ("amx_tile", "amx_bf16", "amx_int8")
"""Features that the system lends to a process that asks; the registers are 8 KiB, which not every process pays for."""
_AMX_FLAGS = (*_FP16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8")

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        # name, arch, features, flags, fp32 lanes                                      first processors that have it
        Isa("amx", "x86_64", (*_FP16, *AMX), _AMX_FLAGS, 16),  # Sapphire Rapids: tiles of bf16 and of bytes
        Isa("avx512fp16", "x86_64", _FP16, _FP16_FLAGS, 16),  # the same: half precision arithmetic
        Isa("avx512bf16", "x86_64", _BF16, _BF16_FLAGS, 16),  # Zen 4, Sapphire Rapids
        Isa("avx512vbmi2", "x86_64", _VBMI2, _VBMI2_FLAGS, 16),  # Ice Lake, Zen 4: expand and permute bytes and words
        Isa("avx512vnni", "x86_64", _VNNI, _VNNI_FLAGS, 16),  # Cascade Lake: dot products of bytes
        Isa("avx512", "x86_64", _AVX512, _AVX512_FLAGS, 16),  # Skylake-X
        Isa("avx2", "x86_64", _AVX2, _AVX2_FLAGS, 8),  # Haswell, Zen
        Isa("portable", "", (), (), 1),  # the baseline of the architecture: SSE2, NEON
    )
}
"""Best first; every x86 line contains the ones below it, so a kernel for one line runs wherever a better line does."""

ARCHITECTURES: dict[str, Isa] = {
    name: Isa(name, "cuda", (), (f"-arch={name}",), 32)
    for name in ("sm_120", "sm_100", "sm_90", "sm_89", "sm_87", "sm_86", "sm_80")
}
"""CUDA architectures, best first. A library holds machine code for one and PTX that newer devices translate."""


def instruction_set(name: str) -> Isa:
    """The Isa of a processor or CUDA architecture; SpecError when there is none of this name."""
    found = ISAS.get(name) or ARCHITECTURES.get(name)
    if found is None:
        known = (*ISAS, *ARCHITECTURES)
        raise SpecError(f"unknown instruction set {name!r}; {nearest(name, known)}; valid: {', '.join(known)}")
    return found


FEATURES: tuple[str, ...] = tuple(sorted({*ISAS["amx"].features, "neon", "bf16", "i8mm", "sve"}))
"""Every processor feature that a kernel of ours asks for or that decides a kernel's speed; others are not recorded."""

_ARM_NAMES = {"asimd": "neon"}  # /proc/cpuinfo's name -> ours
_KINDS = ("cpu", "cuda", "tvm")


@dataclass(frozen=True)
class Target:
    """Where kernels will run. `l1d`, `l2`, `l3` are bytes seen by one core (0: none, or not known)."""

    arch: str
    features: tuple[str, ...] = ()
    cores: int = 1
    l1d: int = 32 << 10
    l2: int = 256 << 10
    l3: int = 0
    name: str = ""
    kind: str = "cpu"
    detail: str = ""  # what followed the colon: "avx2", "sm_90", ...

    @classmethod
    def probe(cls) -> Target:
        """This machine, read once per process from /proc/cpuinfo and /sys."""
        return _probe()

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """A target from its name: `cpu`, `cpu:<isa>`, `cuda`, `cuda:sm_90`, `tvm`, `tvm:<target>`.

        `cpu:<isa>` keeps only what that instruction set may use. Raises SpecError for a name that means nothing and for
        an instruction set that this processor lacks.
        """
        if isinstance(text, Target):
            return text
        if not isinstance(text, str):
            raise SpecError(f"target must be a string or a Target, got {type(text).__name__}; valid: {_valid()}")
        kind, colon, detail = text.partition(":")
        if kind not in _KINDS or (colon and not detail):
            raise SpecError(f"unknown target {text!r}; {nearest(kind, _KINDS)}; valid: {_valid()}")
        here = cls.probe()
        if kind == "cpu":
            return here if not detail else here.limit(detail)
        if kind == "cuda" and detail and not re.fullmatch(r"sm_[0-9]{2,3}[af]?", detail):
            raise SpecError(f"target {text!r}: {detail!r} is no CUDA architecture; write e.g. 'cuda:sm_90'")
        if kind == "cuda":
            return _cuda(here, detail)
        return dataclasses.replace(here, kind=kind, detail=detail)

    def limit(self, isa: str) -> Target:
        """This target without the features that `isa` does not use; SpecError if it lacks some that `isa` needs."""
        if isa not in ISAS:
            raise SpecError(f"unknown instruction set {isa!r}; {nearest(isa, ISAS)}; valid: {_valid()}")
        if missing := self.lacks(isa):
            raise SpecError(
                f"{self.name or self.arch} has no {isa}: it lacks {', '.join(missing)}; "
                f"here it can be {', '.join(self.isas)}"
            )
        keep = tuple(f for f in self.features if f in ISAS[isa].features)
        return dataclasses.replace(self, features=keep, detail=isa)

    @property
    def isas(self) -> tuple[str, ...]:
        """The instruction sets this target can run, best first; "portable" is the last one of every processor.

        For a CUDA target these are architectures; none when `cuda` was asked for where there is no device.
        """
        return tuple(name for name in (ARCHITECTURES if self.kind == "cuda" else ISAS) if not self.lacks(name))

    def lacks(self, isa: str) -> tuple[str, ...]:
        """What this target misses to run kernels built for `isa`; empty when it can run them."""
        need = instruction_set(isa)
        if need.arch == "cuda":
            able = self.kind == "cuda" and bool(self.detail) and _generation(isa) <= _generation(self.detail)
            return () if able else (isa if self.detail else "a CUDA device",)
        if need.arch and need.arch != self.arch:
            return (need.arch,)
        return tuple(f for f in need.features if f not in self.features)

    def machine_id(self) -> str:
        """Identifies machines on which a timing means the same; decisions of the tuner are stored under it."""
        facts = (self.kind, self.detail, self.arch, self.name, self.cores, self.l1d, self.l2, self.l3, *self.features)
        return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self.kind + (f":{self.detail}" if self.detail else "")


def _valid() -> str:
    return ", ".join(
        ["'cpu'", *(f"'cpu:{name}'" for name in ISAS), "'cuda'", "'cuda:sm_90'", "'tvm'", "'tvm:<target>'"]
    )


@functools.cache
def _probe() -> Target:
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    name, features = read_cpuinfo(_read(Path("/proc/cpuinfo")))
    if AMX[0] in features and not tiles_lent():
        features = tuple(f for f in features if f not in AMX)
    l1d, l2, l3 = read_caches(Path(f"/sys/devices/system/cpu/cpu{cpus[0]}/cache"))
    return Target(arch, features, len(cpus), l1d, l2, l3, name or arch)


_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@functools.cache
def tiles_lent() -> bool:
    """Ask the system, once for this process and all its threads, for the tile registers of AMX; whether it lends them.

    A processor may list AMX where the system refuses: an old kernel, a sandbox, signal stacks that are too small.
    """
    import ctypes

    try:
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


def _cuda(host: Target, detail: str) -> Target:
    """A CUDA target; without an architecture that of the current device, and its name where it is the same."""
    import torch

    if not torch.cuda.is_available():
        return dataclasses.replace(host, kind="cuda", detail=detail, name=detail or "no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    device = f"sm_{major}{minor}"
    own = next((a for a in ARCHITECTURES if _generation(a) <= _generation(device)), device)
    name = torch.cuda.get_device_name() if detail in ("", device) else detail
    return dataclasses.replace(host, kind="cuda", detail=detail or own, name=name)


def _generation(architecture: str) -> int:
    return int(re.sub(r"[^0-9]", "", architecture) or 0)


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """(name, features) from the text of /proc/cpuinfo. A feature counts when every processor listed has it."""
    names: dict[str, str] = {}
    common: set[str] | None = None
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("flags", "Features"):
            have = {_ARM_NAMES.get(f, f) for f in value.split()}
            common = have if common is None else common & have
        elif value:
            names.setdefault(key, value)
    parts = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    number = "/".join(names[p] for p in parts if p in names)
    name = names.get("model name", "")
    return (f"{name} ({number})" if name and number else name or number), _known(common or ())


def _known(features: Iterable[str]) -> tuple[str, ...]:
    have = frozenset(features)
    return tuple(f for f in FEATURES if f in have)


def read_caches(folder: Path) -> tuple[int, int, int]:
    """(L1 data, L2, L3) bytes from a /sys/devices/system/cpu/cpuN/cache folder; modest defaults where it is silent."""
    found: dict[int, int] = {}
    for index in sorted(folder.glob("index*")):
        if _read(index / "type").strip() == "Instruction":
            continue
        level, size = _read(index / "level").strip(), _read(index / "size").strip()
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if level.isdigit() and match:
            found[int(level)] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return found.get(1, 32 << 10), found.get(2, 256 << 10), found.get(3, 0)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
