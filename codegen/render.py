"""From KernelSpec to text: sandboxed templates in which only strings of ours and typed emitters print anything."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparsec.templates
from sparsec.codegen.catalog import variant
from sparsec.codegen.kernel import DTYPES, STEPS, KernelSpec, Source
from sparsec.errors import SpecError, nearest
from sparsec.target import ARCHITECTURES, ISAS, instruction_set

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATES = Path(sparsec.templates.__file__).parent

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_FORMAT_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9_=(),.+-]{0,255}")
_KEYWORDS = """
auto break case char const continue default do double else enum extern float for goto if inline int long register
restrict return short signed sizeof static struct switch typedef union unsigned void volatile while asm typeof
""".split()  # noqa: SIM905
FLOAT_MAX = 3.4028234663852886e38


@functools.lru_cache(maxsize=4096)
def render(spec: KernelSpec) -> Source:
    """The source of a kernel: the template of `spec.variant`, printed. Equal specs give equal bytes in any process.

    Raises SpecError when the spec holds names that must not reach the text, when the template's `require` refuses it,
    and when the template itself is wrong (with its file and line).
    """
    check(spec)
    found = variant(spec.variant)
    return Source(spec, found.language, render_file(found.template, spec))


def render_file(template: str, spec: KernelSpec) -> str:
    """Print one template: a file of `sparsec.templates`, or an absolute path, whose folder then serves its includes."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError, UndefinedError

    place = Path(template)
    env = environment(str(place.parent) if place.is_absolute() else None)
    features = instruction_set(spec.isa).features
    try:
        text = env.get_template(place.name).render(
            k=spec, f=dict(spec.fields), t=dict(spec.tile), has=lambda feature: feature in features
        )
    except TemplateSyntaxError as error:
        raise SpecError(f"template {error.filename or error.name}, line {error.lineno}: {error.message}") from error
    except (UndefinedError, SecurityError) as error:
        raise SpecError(f"template {_where(error, template)}: {error.message}") from error
    except TemplateError as error:
        raise SpecError(f"template {template}: {type(error).__name__}: {error.message}") from error
    except SpecError as error:
        raise SpecError(f"template {_where(error, template)}: {error}") from error
    except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        raise SpecError(f"template {_where(error, template)}: {type(error).__name__}: {error}") from error
    return text.strip() + "\n"


@functools.cache
def environment(folder: str | None = None) -> ImmutableSandboxedEnvironment:
    """The Jinja environment of the packaged templates, or of a user's folder in front of them."""
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(
        block_start_string="<%", block_end_string="%>", variable_start_string="${", variable_end_string="}",
        comment_start_string="<#", comment_end_string="#>", trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False, finalize=_finalize,
        loader=FileSystemLoader([*([folder] if folder else []), str(TEMPLATES)]), auto_reload=False,
        extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"],
    )  # fmt: skip
    for hidden in ("default", "d", "safe", "random", "pprint", "tojson"):
        env.filters.pop(hidden, None)
    env.globals = {name: env.globals[name] for name in ("range", "namespace", "dict")}
    env.globals.update(c_int=c_int, c_float=c_float, ident=ident, require=require)
    return env


def c_int(value: Any, bits: int = 64) -> str:
    """A decimal C literal for an integer that fits `bits` (signed); negative ones in parentheses."""
    if type(value) is not int:
        raise SpecError(f"c_int prints integers, got {value!r}")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if not low <= value <= high:
        raise SpecError(f"c_int: {value} does not fit {bits} signed bits")
    if value == -(1 << 63):
        return "(-9223372036854775807LL - 1)"
    suffix = "LL" if abs(value) > 2**31 - 1 else ""
    return f"({value}{suffix})" if value < 0 else f"{value}{suffix}"


def c_float(value: Any) -> str:
    """A C literal of type float, hexadecimal so that no digit is lost; the value is rounded to the nearest float32."""
    if type(value) not in (int, float):
        raise SpecError(f"c_float prints numbers, got {value!r}")
    number = float(value)
    if math.isnan(number):
        return '__builtin_nanf("")'
    if math.isinf(number):
        return "__builtin_inff()" if number > 0 else "(-__builtin_inff())"
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", number))
    except OverflowError:
        raise SpecError(
            f"c_float: {value!r} is beyond float32 (largest {FLOAT_MAX!r}); use inf if that is meant"
        ) from None
    text = re.sub(r"(\.0|[1-9a-f])0+p", r"\1p", abs(rounded).hex()) + "f"
    return f"(-{text})" if math.copysign(1.0, rounded) < 0 else text


def ident(name: Any) -> str:
    """A C identifier, as it is; anything else (an int, a keyword, punctuation) raises SpecError."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or name in _KEYWORDS:
        raise SpecError(f"ident: {name!r} is not a C identifier")
    return name


def require(condition: Any, message: str) -> str:
    """Refuse the spec with `message` unless `condition` holds; prints nothing."""
    if not condition:
        raise SpecError(message)
    return ""


def check(spec: KernelSpec) -> None:
    """Raise SpecError unless every string in `spec` is a harmless identifier or known name.

    A spec may come from a file, and templates may print its strings.
    """
    tables: list[tuple[str, str, Collection[str]]] = [
        ("dtype", spec.dtype, DTYPES),
        ("instruction set", spec.isa, (*ISAS, *ARCHITECTURES)),
    ]
    tables += [("epilogue step", step.name, STEPS) for step in spec.epilogue]
    for what, value, known in tables:
        if value not in known:
            raise SpecError(f"KernelSpec: unknown {what} {value!r}; {nearest(value, known)}")
    names = [spec.op, spec.variant]
    names += [routine for _, routine, _ in spec.plan] + [n for n, _ in spec.fields] + [n for n, _ in spec.tile]
    for name in names:
        if not _IDENTIFIER.fullmatch(name):
            raise SpecError(f"KernelSpec: {name!r} is not an identifier")
    if not _FORMAT_TEXT.fullmatch(spec.format):
        raise SpecError(f"KernelSpec: {spec.format!r} is not the text of a format")
    for name, size in (("out_features", spec.out_features), ("in_features", spec.in_features)):
        if not 0 <= size < 2**31:
            raise SpecError(f"KernelSpec: {name} is {size}; kernels count in 32 bits, it must be 0 to 2**31 - 1")


def _finalize(value: Any) -> str:
    if isinstance(value, str):
        return value
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        return str(value)  # raises, and names what is undefined
    if value is None or isinstance(value, (bool, int, float)):
        raise SpecError(f"prints {value!r} as it is; use c_int, c_float or ident")
    raise SpecError(f"prints a {type(value).__name__}; use c_int, c_float or ident")


def _where(error: BaseException, template: str) -> str:
    """file:line of the innermost template frame of a traceback (Jinja maps generated code back to templates)."""
    place, trace = template, error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.endswith(".jinja"):
            place = f"{name}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place
