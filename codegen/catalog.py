"""The catalogue: every kernel there is, in one table that selects, tests and benchmarks them; and the user's own."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sparsec.codegen import plans
from sparsec.codegen.backend import Backend
from sparsec.codegen.kernel import DTYPES, STEPS, KernelSpec, Plan, Problem
from sparsec.errors import SpecError, nearest
from sparsec.formats import Format, register_format
from sparsec.target import ARCHITECTURES, ISAS, Target

_T = TypeVar("_T")
Tile = tuple[tuple[str, int], ...]
Choose = Callable[[Problem, Format, Target, str], tuple[tuple[Plan, Tile], ...]]
Candidates = Callable[[Problem, Target], tuple[Format, ...]]
Refuse = Callable[[Problem, Format, Target], "str | None"]


@dataclass(frozen=True)
class Variant:
    """One line of the catalogue: a template, what it can compute, and the choices worth timing.

    `template` is a file of `sparsec.templates`, or the absolute path of a user's own; a backend that prints without
    templates needs none. `isas` is best first. `steps` are
    the epilogue steps that the template knows. `choose(problem, format, target, isa)` gives (plan, tile) pairs,
    preferred first; `candidates(problem, target)` the resolved formats worth packing; `needs` a reason to refuse beyond
    the general ones. The defaults suit a kernel with one way to run.
    """

    name: str
    op: str
    format: str
    template: str = ""
    language: str = "c"
    dtypes: tuple[str, ...] = ("float32",)
    isas: tuple[str, ...] = ("portable",)
    steps: tuple[str, ...] = tuple(STEPS)
    choose: Choose = plans.single
    candidates: Candidates = plans.no_formats
    needs: Refuse = plans.no_needs

    def isa(self, target: Target) -> str | None:
        """The best instruction set that both this variant and `target` have."""
        return next((isa for isa in self.isas if isa in target.isas), None)

    def serves(self, target: Target) -> bool:
        """Whether this variant's language makes kernels for the target's kind of device.

        A `tvm` target is a processor on which nothing can be built from C.
        """
        return target.kind in _KINDS.get(self.language, ("cpu", "tvm"))

    def refuse(self, problem: Problem, fmt: Format, target: Target) -> str | None:
        """Why this variant cannot run `problem` from a weight stored as `fmt`; None when it can."""
        if problem.op != self.op:
            return f"{self.name} computes {self.op}, not {problem.op}"
        if fmt.name != self.format:
            return f"{self.name} reads format {self.format}, not {fmt.text()}"
        if problem.dtype not in self.dtypes:
            return f"{self.name} computes in {' or '.join(self.dtypes)}, not {problem.dtype}"
        if unknown := [s.name for s in problem.epilogue if s.name not in self.steps]:
            return f"{self.name} has no epilogue {', '.join(unknown)}; it fuses {', '.join(self.steps) or 'none'}"
        if not self.serves(target) or self.isa(target) is None:
            return f"{self.name} needs {' or '.join(self.isas)}; {target} has {', '.join(target.isas)}"
        if min(problem.out_features, problem.in_features) < 1:
            return f"a ({problem.out_features}, {problem.in_features}) weight has nothing to multiply"
        if max(problem.out_features, problem.in_features, problem.nnz) >= 2**31:
            return f"{self.name} counts in 32 bits: rows, columns and stored values must stay below 2**31"
        return self.needs(problem, fmt.resolve(problem.out_features, problem.in_features), target)

    def specs(self, problem: Problem, fmt: Format, target: Target) -> tuple[KernelSpec, ...]:
        """The kernels worth timing for a weight stored as `fmt`, preferred first.

        Raises SpecError with the reason when the variant refuses.
        """
        if reason := self.refuse(problem, fmt, target):
            raise SpecError(reason)
        isa = self.isa(target) or ISAS["portable"].name
        resolved = fmt.resolve(problem.out_features, problem.in_features)
        return tuple(
            KernelSpec(
                op=self.op,
                variant=self.name,
                format=resolved.text(),
                dtype=problem.dtype,
                out_features=problem.out_features,
                in_features=problem.in_features,
                isa=isa,
                bias=problem.bias,
                epilogue=problem.epilogue,
                plan=plan,
                fields=fields_of(resolved),
                tile=tile,
                conv=problem.conv,
            )
            for plan, tile in self.choose(problem, resolved, target, isa)
        )

    def formats(self, problem: Problem, target: Target) -> tuple[Format, ...]:
        """The resolved formats that are worth packing a weight of this problem into, preferred first."""
        return tuple(f for f in self.candidates(problem, target) if self.refuse(problem, f, target) is None)


_AVX512_TO_C = ("avx512", "avx2", "portable")
_BITMASK_BF16 = ("avx512bf16", "avx512vbmi2", *_AVX512_TO_C)  # expands 16-bit lanes, dot products of pairs

CATALOG: tuple[Variant, ...] = (
    Variant(
        "linear_csr", "linear", "csr", "linear_csr.c.jinja",
        isas=_AVX512_TO_C, choose=plans.linear, candidates=plans.csr_formats,
    ),
    Variant(
        "linear_csr_bf16", "linear", "csr", "linear_csr.c.jinja", dtypes=("bfloat16",),
        isas=_AVX512_TO_C, choose=plans.linear, candidates=plans.csr_formats,
    ),
    Variant(
        "linear_bitmask", "linear", "bitmask", "linear_bitmask.c.jinja",
        isas=_AVX512_TO_C, choose=plans.linear, candidates=plans.bitmask_formats,
    ),
    Variant(
        "linear_bitmask_bf16", "linear", "bitmask", "linear_bitmask.c.jinja", dtypes=("bfloat16",),
        isas=_BITMASK_BF16, choose=plans.linear, candidates=plans.bitmask_formats,
    ),
    Variant(
        "linear_bsr", "linear", "bsr", "linear_bsr.c.jinja",
        isas=_AVX512_TO_C, choose=plans.bsr, candidates=plans.bsr_formats,
    ),
    Variant(
        "linear_bsr_bf16", "linear", "bsr", "linear_bsr.c.jinja", dtypes=("bfloat16",),
        isas=_AVX512_TO_C, choose=plans.bsr, candidates=plans.bsr_formats,
    ),
    Variant(
        "linear_csr_groups", "linear", "csr_groups", "linear_csr_groups.c.jinja",
        isas=_AVX512_TO_C, choose=plans.linear, candidates=plans.csr_groups_formats,
    ),
    Variant(
        "linear_csr_groups_bf16", "linear", "csr_groups", "linear_csr_groups.c.jinja", dtypes=("bfloat16",),
        isas=_AVX512_TO_C, choose=plans.linear, candidates=plans.csr_groups_formats,
    ),
    Variant(
        "linear_sell", "linear", "sell", "linear_sell.c.jinja",
        isas=_AVX512_TO_C, choose=plans.sell, candidates=plans.sell_formats,
    ),
    Variant(
        "linear_sell_bf16", "linear", "sell", "linear_sell.c.jinja", dtypes=("bfloat16",),
        isas=_AVX512_TO_C, choose=plans.sell, candidates=plans.sell_formats,
    ),
    Variant("linear_fan_in", "linear", "fan_in", "linear_fan_in.c.jinja", isas=_AVX512_TO_C, choose=plans.linear),
    Variant(
        "linear_fan_in_bf16", "linear", "fan_in", "linear_fan_in.c.jinja", dtypes=("bfloat16",),
        isas=_AVX512_TO_C, choose=plans.linear,
    ),
    Variant(
        "linear_quantized", "linear", "quantized", "linear_quantized.c.jinja",
        isas=("avx512vnni", *_AVX512_TO_C), choose=plans.linear, needs=plans.byte_sums,
    ),
    Variant("linear_nm", "linear", "nm", "linear_nm.c.jinja", isas=_AVX512_TO_C, choose=plans.linear),
    Variant(
        "linear_nm_bf16", "linear", "nm", "linear_nm.c.jinja", dtypes=("bfloat16",),
        isas=_AVX512_TO_C, choose=plans.linear,
    ),
)  # fmt: skip
"""Built-in variants, in the order in which `tune="off"` tries them."""

_TABLES = (  # modules with further VARIANTS, imported when first asked for
    "sparsec.codegen.structured_variants", "sparsec.codegen.cuda_variants", "sparsec.codegen.tvm_variants",
    "sparsec.codegen.gather", "sparsec.codegen.conv_variants", "sparsec.codegen.dense_variants",
    "sparsec.codegen.chain_variants", "sparsec.codegen.digit_variants", "sparsec.codegen.tile_variants",
)  # fmt: skip

# other languages need no C compiler
_KINDS = {"c": ("cpu",), "pair": ("cpu",), "batch": ("cpu",), "cuda": ("cuda",), "tvm": ("tvm",)}

_BACKENDS = {  # name -> module with a BACKEND, imported when first needed
    "c": "sparsec.codegen.c", "cuda": "sparsec.codegen.cuda", "tvm": "sparsec.codegen.tvm",
    "pair": "sparsec.codegen.pair", "torch": "sparsec.codegen.torch_chain", "batch": "sparsec.codegen.batched",
}  # fmt: skip

_LOCK = threading.Lock()
_user_variants: dict[str, Variant] = {}
_user_backends: dict[str, Backend] = {}


def register(obj: Variant | Backend | Format | type[Format]) -> None:
    """Add a user's Format (the class), Variant (with the path of its template) or Backend to the catalogue.

    Raises SpecError for a name that is taken, is no identifier, or a template that does not exist.
    """
    if isinstance(obj, Variant):
        _check_variant(obj)
        _add("variant", _user_variants, [v.name for v in builtin()], obj.name, obj)
    elif isinstance(obj, Backend):
        _add("backend", _user_backends, list(_BACKENDS), obj.name, obj)
    elif isinstance(obj, Format):
        register(type(obj))
    elif isinstance(obj, type) and issubclass(obj, Format):
        register_format(obj)
    else:
        what = f"the class {obj.__name__}" if isinstance(obj, type) else f"a {type(obj).__name__}"
        raise SpecError(f"register takes a Format class, a Variant or a Backend instance, got {what}")


def builtin() -> tuple[Variant, ...]:
    """CATALOG and the tables of the other languages."""
    return (*CATALOG, *(v for table in _TABLES for v in importlib.import_module(table).VARIANTS))


def variants_for(op: str, format_name: str | None = None, target: Target | None = None) -> tuple[Variant, ...]:
    """Every variant for an op (and a format), built-in ones first, each group in its order of declaration.

    With `target`, only those that make kernels for its kind of device.
    """
    every = (*builtin(), *_user_variants.values())
    found = tuple(v for v in every if v.op == op and format_name in (None, v.format))
    return found if target is None else tuple(v for v in found if v.serves(target))


def variant(name: str) -> Variant:
    """The variant of this name; SpecError with the nearest names when there is none."""
    for known in builtin():
        if known.name == name:
            return known
    try:
        return _user_variants[name]
    except KeyError:
        names = [v.name for v in builtin()] + list(_user_variants)
        raise SpecError(
            f"no kernel variant {name!r}; {nearest(name, names)}; a user's own must be registered in every process"
        ) from None


def backend(name: str) -> Backend:
    """The backend of this name; SpecError when there is none."""
    if name in _user_backends:
        return _user_backends[name]
    if name not in _BACKENDS:
        raise SpecError(f"no backend {name!r}; {nearest(name, [*_BACKENDS, *_user_backends])}")
    found: Backend = importlib.import_module(_BACKENDS[name]).BACKEND
    return found


def _check_variant(new: Variant) -> None:
    place = Path(new.template)
    if place.is_absolute() and not place.is_file():
        raise SpecError(f"variant {new.name!r}: there is no template {new.template}")
    if not new.template and new.language in ("c", "cuda"):
        raise SpecError(f"variant {new.name!r}: {new.language} kernels are printed from a template, and it names none")
    if new.template and not place.is_absolute() and ("/" in new.template or not new.template.endswith(".jinja")):
        raise SpecError(f"variant {new.name!r}: template must be an absolute path or a file of sparsec.templates")
    for kind, given, known in (("instruction set", new.isas, (*ISAS, *ARCHITECTURES)), ("dtype", new.dtypes, DTYPES)):
        if not given:
            raise SpecError(f"variant {new.name!r} names no {kind}; known: {', '.join(known)}")
        if bad := [g for g in given if g not in known]:
            raise SpecError(f"variant {new.name!r}: unknown {kind} {bad[0]!r}; {nearest(bad[0], known)}")


def _add(kind: str, table: dict[str, _T], taken: list[str], name: str, obj: _T) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", name):
        raise SpecError(f"{kind} name {name!r} is not usable; use letters, digits and underscores")
    with _LOCK:
        if name in table or name in taken:
            raise SpecError(f"a {kind} named {name!r} is already registered; choose another name")
        table[name] = obj


def fields_of(fmt: Format) -> tuple[tuple[str, int], ...]:
    """The fields that a template reads; those of a format inside another one join them."""
    fields: dict[str, object] = {}
    for name, value in fmt.fields().items():
        fields |= dict(fields_of(value)) if isinstance(value, Format) else {name: value}
    if bad := [name for name, value in fields.items() if type(value) is not int]:
        value = fields[bad[0]]
        raise SpecError(f"{fmt.text()}: field {bad[0]!r} is {value!r}; templates read resolved integer fields only")
    return tuple(fields.items())  # type: ignore[arg-type]  # each value was found to be an int
