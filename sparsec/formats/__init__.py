"""Storage formats of sparse weights: one frozen descriptor per file, found by name in `FORMATS`."""

from __future__ import annotations

import re

from sparsec.errors import SpecError, nearest
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import VALUE_DTYPES, nonzero
from sparsec.formats.bitmask import Bitmask
from sparsec.formats.block_nm import BlockNM
from sparsec.formats.bsr import BSR
from sparsec.formats.csr import CSR
from sparsec.formats.csr_groups import CSRGroups
from sparsec.formats.dense import Dense
from sparsec.formats.fan_in import FanIn
from sparsec.formats.group_int4 import GroupInt4
from sparsec.formats.nm import NM
from sparsec.formats.nmg import NMG
from sparsec.formats.pairs import Pairs
from sparsec.formats.permuted import Permuted
from sparsec.formats.picks import Picks
from sparsec.formats.quantized import Quantized
from sparsec.formats.sell import SELL
from sparsec.formats.spqr import SpQR
from sparsec.formats.sum import Sum
from sparsec.formats.tiled_csl import TiledCSL
from sparsec.formats.tiles import Tiles
from sparsec.formats.two_four import TwoFour
from sparsec.formats.window import Window

_BUILT_IN = (
    Dense, CSR, CSRGroups, SELL, Window, Bitmask, BSR, NM, FanIn, TiledCSL, TwoFour, GroupInt4, SpQR, Quantized, Pairs,
    Picks, Tiles, NMG, BlockNM, Permuted, Sum,
)  # fmt: skip
FORMATS: dict[str, type[Format]] = {cls.name: cls for cls in _BUILT_IN}
"""Name in canonical text -> class. A user's formats join through `register_format`."""

_TOKEN = re.compile(r"([a-z][a-z0-9_]*)|(-?(?:0|[1-9][0-9]{0,9}))(?![a-z0-9_])|([(),=])")

_LONGEST = 1000
_DEEPEST = 16


def register_format(cls: type[Format]) -> None:
    """Add a user's format under `cls.name`. Raises SpecError for a bad or taken name."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", cls.name):
        raise SpecError(f"{cls.__name__}.name is {cls.name!r}, not a lower-case identifier such as 'ellpack'")
    if cls.name in FORMATS:
        raise SpecError(f"format name {cls.name!r} is taken by {FORMATS[cls.name].__name__}; choose another")
    if not cls.buffers:
        raise SpecError(f"{cls.__name__}.buffers is empty; name the buffers that pack() returns, 'values' first")
    FORMATS[cls.name] = cls


def parse(text: str) -> Format:
    """The inverse of `Format.text()`: `parse("csr(index_bits=16,block=128)")`. Raises SpecError for any other text."""
    if len(text) > _LONGEST:
        raise SpecError(f"not the text of a format: {text[:120]!r}... is longer than {_LONGEST} characters")
    tokens: list[str] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise SpecError(f"not the text of a format: {text[:120]!r}, unexpected {text[at]!r} at position {at}")
        tokens.append(found.group())
        at = found.end()
    reader = _Reader(text[:120], tokens)
    fmt = reader.format()
    if reader.tokens:
        raise SpecError(f"not the text of a format: {text[:120]!r}, {reader.tokens[0]!r} follows its end")
    if fmt.text() != text:
        raise SpecError(f"not the canonical text of a format: {text[:120]!r}; write {fmt.text()!r}")
    return fmt


class _Reader:
    """Recursive descent: format := name ["(" name "=" value {","...} ")"]; value := int | format | "(" values ")"."""

    def __init__(self, text: str, tokens: list[str]) -> None:
        self.text = text
        self.depth = 0
        self.tokens = tokens

    def take(self, expected: str | None = None) -> str:
        token = self.tokens.pop(0) if self.tokens else "its end"
        if expected is not None and token != expected:
            raise SpecError(f"not the text of a format: {self.text!r}, expected {expected!r} but found {token!r}")
        return token

    def peek(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def format(self) -> Format:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise SpecError(f"not the text of a format: {self.text!r} holds more than {_DEEPEST} formats")
        name = self.take()
        cls = FORMATS.get(name)
        if cls is None:
            raise SpecError(f"unknown format {name!r} in {self.text!r}; {nearest(name, FORMATS)}")
        fields: dict[str, object] = {}
        if self.peek() == "(":
            self.take("(")
            while True:
                key = self.take()
                if key in fields:
                    raise SpecError(f"format {name!r} has field {key!r} twice in {self.text!r}")
                self.take("=")
                fields[key] = self.value()
                if self.peek() != ",":
                    break
                self.take(",")
            self.take(")")
        try:
            return cls(**fields)
        except TypeError as error:
            known = ", ".join(cls.__dataclass_fields__) or "none"
            raise SpecError(f"format {name!r} cannot have the fields {tuple(fields)}; valid: {known}") from error

    def value(self) -> object:
        head = self.peek()
        if head == "(":
            self.take("(")
            items = []
            while self.peek() != ")":
                items.append(self.value())
                if self.peek() != ")":
                    self.take(",")
            self.take(")")
            return tuple(items)
        if head[:1].isalpha():
            return self.format()
        token = self.take()
        if not token.lstrip("-").isdigit():
            raise SpecError(f"not the text of a format: {self.text!r}, expected a value but found {token!r}")
        return int(token)


__all__ = [
    "BSR",
    "CSR",
    "FORMATS",
    "NM",
    "NMG",
    "SELL",
    "VALUE_DTYPES",
    "Bitmask",
    "BlockNM",
    "Buffers",
    "CSRGroups",
    "Dense",
    "FanIn",
    "Format",
    "GroupInt4",
    "Pairs",
    "Permuted",
    "Picks",
    "Quantized",
    "SpQR",
    "Sum",
    "TiledCSL",
    "Tiles",
    "TwoFour",
    "Window",
    "nonzero",
    "parse",
    "pattern",
    "register_format",
]
