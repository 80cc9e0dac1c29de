"""The inverse of `Factor.text()`: factors and formats from canonical text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from sparsec.errors import SpecError, nearest
from sparsec.factors import factor_class, factor_names
from sparsec.factors._base import Factor
from sparsec.formats import FORMATS, Format

_TOKEN = re.compile(r"(None|True|False|[a-z][a-z0-9_]*)|(-?[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)(?![a-z0-9_.])|([(),=])")
_CONSTANTS = {"None": None, "True": True, "False": False}
_LONGEST = 2000
_DEEPEST = 16


def parse(text: str) -> Factor:
    """`parse("sum(terms=(low_rank(rank=64),sparse(sparsity=0.95,format=csr)))")`. Raises SpecError for other text."""
    value = read(text)
    if not isinstance(value, Factor):
        raise SpecError(f"not the text of a factor: {text[:120]!r}; known factors: {', '.join(factor_names())}")
    if value.text() != text:
        raise SpecError(f"not the canonical text of a factor: {text[:120]!r}; write {value.text()!r}")
    return value


def read(text: str, more: Mapping[str, type[Format]] | None = None) -> object:
    """The value that a text describes, descriptors of `more` among its names. Raises SpecError for other text."""
    reader = _Reader(text, more or {})
    value = reader.value()
    if reader.tokens:
        raise SpecError(f"not the text of a factor: {reader.shown!r}, {reader.tokens[0]!r} follows its end")
    return value


class _Reader:
    """Recursive descent: value := number | constant | name ["(" name "=" value {","...} ")"] | "(" values ")"."""

    def __init__(self, text: str, more: Mapping[str, type[Format]]) -> None:
        self.shown = text[:120]
        self.more = more
        self.depth = 0
        self.tokens: list[str] = []
        if len(text) > _LONGEST:
            raise SpecError(f"not the text of a factor: {self.shown!r}... is longer than {_LONGEST} characters")
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise SpecError(f"not the text of a factor: {self.shown!r}, unexpected {text[at]!r} at position {at}")
            self.tokens.append(found.group())
            at = found.end()

    def value(self) -> object:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise SpecError(f"not the text of a factor: {self.shown!r} is nested more than {_DEEPEST} deep")
        try:
            token = self._take()
            if token == "(":
                return tuple(self._items())
            if token in _CONSTANTS:
                return _CONSTANTS[token]
            if token[0].isalpha():
                return self._descriptor(token)
            if token[0] not in "-0123456789":
                raise SpecError(f"not the text of a factor: {self.shown!r}, expected a value but found {token!r}")
            return float(token) if "." in token or "e" in token else int(token)
        finally:
            self.depth -= 1

    def _take(self, expected: str | None = None) -> str:
        token = self.tokens.pop(0) if self.tokens else "its end"
        if (expected is not None and token != expected) or token == "its end":
            wanted = expected or "more"
            raise SpecError(f"not the text of a factor: {self.shown!r}, expected {wanted!r} but found {token!r}")
        return token

    def _items(self) -> list[object]:
        """What stands between parentheses, the first of which is taken already."""
        items: list[object] = []
        while self.tokens[:1] != [")"]:
            items.append(self.value())
            if self.tokens[:1] != [")"]:
                self._take(",")
        self._take(")")
        return items

    def _descriptor(self, name: str) -> Factor | Format:
        fields: dict[str, object] = {}
        if self.tokens[:1] == ["("]:
            self._take("(")
            while True:
                key = self._take()
                if key in fields:
                    raise SpecError(f"{name!r} has field {key!r} twice in {self.shown!r}")
                self._take("=")
                fields[key] = self.value()
                if self.tokens[:1] != [","]:
                    break
                self._take(",")
            self._take(")")
        kinds: list[type[Factor] | type[Format]] = [factor_class(name)] if name in factor_names() else []
        kinds += [FORMATS[name]] if name in FORMATS else []  # there is a sum of factors and a sum of formats
        kinds += [self.more[name]] if name in self.more else []
        if not kinds:
            raise SpecError(f"unknown {name!r} in {self.shown!r}; {nearest(name, [*factor_names(), *FORMATS])}")
        for cls in kinds:
            with contextlib.suppress(TypeError):
                return cls(**fields)
        known = " or ".join(", ".join(cls.__dataclass_fields__) or "none" for cls in kinds)
        raise SpecError(f"{name!r} cannot have the fields {tuple(fields)}; valid: {known}")
