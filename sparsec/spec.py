"""Spec: what should happen to which site. Read by select, written by users; a frozen, hashable value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sparsec.errors import SpecError, nearest
from sparsec.factors import Factor
from sparsec.formats import Format

DEFAULT_KEY = "_default"
REGEX = "re:"


@dataclass(frozen=True)
class Auto:
    """Detect the structure that is there and let select choose among the formats that hold it."""


Value = Format | Factor | Auto | None
"""What a pattern maps to: a format, a factor or sum of both, `Auto()`, or None, which leaves the site dense."""


@dataclass(frozen=True, init=False)
class Spec:
    """An ordered mapping from site patterns to a Format, a Factor, `Auto()` or None (stay dense).

    A pattern is a site's qualified name, `"re:<regex>"` that matches the whole name, a module type (a class, its name,
    or its dotted name), or `"_default"`. Precedence: exact name, then regexes (first wins), then type, then default; a
    site that nothing matches stays dense. A name without an ordinal matches every use of its module (`path`, `path#2`).

    `Spec(CSR())` and `Spec(Auto())` hold for all sites; `Spec()` and `Spec(None)` mean `Spec(Auto())`.

    Raises SpecError for a pattern or value that means nothing.
    """

    entries: tuple[tuple[str, Value], ...]

    def __init__(self, value: Spec | Mapping[Any, Value] | Value = None) -> None:
        if isinstance(value, Spec):
            entries = value.entries
        elif isinstance(value, Mapping):
            entries = _entries(value)
        else:
            entries = ((DEFAULT_KEY, _value("this spec", Auto() if value is None else value)),)
        object.__setattr__(self, "entries", entries)

    @classmethod
    def of(cls, value: Spec | Mapping[Any, Value] | Value) -> Spec:
        """`value` itself if it is a Spec already, the Spec it stands for otherwise."""
        return value if isinstance(value, Spec) else cls(value)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        if [key for key, _ in self.entries] == [DEFAULT_KEY] and self.entries[0][1] is not None:
            return f"Spec({self.entries[0][1]!r})"
        return "Spec({" + ", ".join(f"{key!r}: {value!r}" for key, value in self.entries) + "})"

    def pattern(self, site: str, module_type: str = "") -> str | None:
        """The key that decides for a site, or None when no key matches it. `path#2` goes before `path`."""
        for test in (_is_exact, _is_name, _is_regex_of, _is_type):
            for key, _ in self.entries:
                if key != DEFAULT_KEY and test(key, site, module_type):
                    return key
        return DEFAULT_KEY if any(key == DEFAULT_KEY for key, _ in self.entries) else None

    def match(self, site: str, module_type: str = "") -> Value:
        """What should happen to a site of this name and owning module type; None leaves it dense."""
        key = self.pattern(site, module_type)
        return None if key is None else dict(self.entries)[key]

    def check(self, sites: Sequence[str], types: Sequence[str] = ()) -> None:
        """Raise SpecError for the first pattern that matches none of the model's sites (`types[i]` owns `sites[i]`)."""
        owners = list(types) + [""] * (len(sites) - len(types))
        for key, _ in self.entries:
            if key == DEFAULT_KEY:
                continue
            if not any(matches(key, s, t) for s, t in zip(sites, owners)):
                raise SpecError(unmatched(key, sites, owners))


def unmatched(key: str, sites: Sequence[str], types: Sequence[str]) -> str:
    """The message for a pattern that matches no site: the nearest names, and how to match below a module."""
    if not sites:
        return f"pattern {key!r} matches nothing: the model has no site that could be made sparse"
    if key.startswith(REGEX):
        shown = nearest(key[len(REGEX) :].replace("\\", "").replace(".*", ""), sites)
        return f"pattern {key!r} matches no site in full; {shown}"
    if any(site.startswith(key + ".") for site in sites):
        return (
            f"pattern {key!r} is no site but holds some; write {REGEX + re.escape(key) + '[.].*'!r} to match them all"
        )
    kinds = dict.fromkeys(t.rpartition(".")[2] for t in types if t)
    if key[:1].isupper() or key.rpartition(".")[2][:1].isupper():
        return f"pattern {key!r} matches no site; module types that have sites: {', '.join(kinds) or 'none'}"
    return f"pattern {key!r} matches no site; {nearest(key, sites)}"


def without_ordinal(site: str) -> str:
    """`path#2` -> `path`: the module behind a second use."""
    path, mark, ordinal = site.rpartition("#")
    return path if mark and ordinal.isdigit() else site


def normal_key(key: Any) -> str:
    """A pattern as text: module classes become their dotted name. Raises SpecError for anything that is no pattern."""
    if isinstance(key, type):
        return f"{key.__module__}.{key.__qualname__}"
    if not isinstance(key, str) or not key:
        raise SpecError(f"pattern {key!r} is not a site name, 're:<regex>', a module class or its name, or '_default'")
    if key.startswith(REGEX):
        _regex(key)
    return key


def matches(key: str, site: str, module_type: str = "") -> bool:
    """Whether a normal key other than `_default` matches a site by name, by regex or by type."""
    return _is_name(key, site, module_type) or _is_regex_of(key, site, module_type) or _is_type(key, site, module_type)


def _entries(mapping: Mapping[Any, Value]) -> tuple[tuple[str, Value], ...]:
    found: dict[str, Value] = {}
    for key, value in mapping.items():
        text = normal_key(key)
        if text in found:
            raise SpecError(f"pattern {text!r} appears twice in the spec")
        found[text] = _value(f"pattern {text!r}", value)
    return tuple(found.items())


def _value(where: str, value: Any) -> Value:
    if value is None or isinstance(value, (Format, Factor, Auto)):
        return value
    if isinstance(value, type) and issubclass(value, (Format, Factor, Auto)):
        raise SpecError(f"{where} maps to the class {value.__name__}; write an instance: {value.__name__}()")
    raise SpecError(
        f"{where} maps to {value!r}; valid: a format such as CSR() or BSR(16, 1), "
        "a factor such as LowRank(64), a sum of these, Auto(), or None to stay dense"
    )


@lru_cache(maxsize=256)
def _regex(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key[len(REGEX) :])
    except re.error as error:
        raise SpecError(f"pattern {key!r} is not a valid regular expression: {error}") from error


def _is_exact(key: str, site: str, module_type: str) -> bool:
    return key == site


def _is_name(key: str, site: str, module_type: str) -> bool:
    return key == site or key == without_ordinal(site)


def _is_regex_of(key: str, site: str, module_type: str) -> bool:
    if not key.startswith(REGEX):
        return False
    regex = _regex(key)
    return regex.fullmatch(site) is not None or regex.fullmatch(without_ordinal(site)) is not None


def _is_type(key: str, site: str, module_type: str) -> bool:
    """Dotted names compare in full when both are dotted, otherwise by their last part."""
    if not module_type or key.startswith(REGEX):
        return False
    if "." in key and "." in module_type:
        return key == module_type
    return key.rpartition(".")[2] == module_type.rpartition(".")[2]
