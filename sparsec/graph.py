"""The graph that passes see: facts about sites, constants with their origin, and the edit primitives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsec.errors import PassError

if TYPE_CHECKING:
    from sparsec.formats._base import Format

KEY = "sparsec"
"""Facts live under `node.meta[KEY]`, graph-wide records under `gm.meta[KEY]`."""


@dataclass(frozen=True)
class Structure:
    """A structure that every entry of a weight obeys, e.g. `Structure("nm", (2, 4))`, `Structure("block", (16, 1))`."""

    kind: str  # unstructured | nm | block | fan_in | banded | block_diagonal | zero_rows | zero_cols | dense
    params: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.params))})" if self.params else self.kind


@dataclass(frozen=True)
class Fact:
    """What is known about one site; passes add to it with `dataclasses.replace` and never wipe it.

    `shape` is the weight as stored by the node; `matrix` the (out, in) matrix that formats pack.
    """

    site: str  # qualified module name, `<root>`, `path#2` for a second use
    op: str  # linear | conv1d | conv2d | conv3d | embedding | matmul
    module: str  # type name of the owning module, "" for a functional call
    weight: str  # root attribute
    bias: str | None
    shape: tuple[int, ...]
    dtype: str  # "float32"
    nnz: int = -1
    structures: tuple[Structure, ...] = ()
    refusal: tuple[str, str] | None = None  # (code, sentence): why the site must stay dense
    epilogue: tuple[Any, ...] = ()  # codegen Steps, in order
    absorbed: tuple[str, ...] = ()  # names of the nodes that the epilogue replaces, last one is the site's new output
    residual: str | None = None  # name of the node that an `add` step reads
    choice: Any = None  # the Choice of select

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of the packed matrix: a convolution flattens (in/groups, *kernel) in C order."""
        out = self.shape[0]
        return out, _product(self.shape[1:])

    @property
    def density(self) -> float:
        return self.nnz / max(1, _product(self.shape))


@dataclass(frozen=True)
class Constant:
    """Where a root attribute comes from: the original state-dict names, and how it is computed from them.

    `recipe` is an FX graph of ATen calls with one placeholder per source; None when the attribute is the source itself.
    A constant that is no state-dict entry (a non-persistent buffer, a lifted literal) has no sources.
    """

    sources: tuple[str, ...]
    recipe: fx.Graph | None = field(default=None, compare=False)


def fact(node: fx.Node) -> Fact | None:
    """The site fact of a node, if it is a site."""
    return node.meta.get(KEY)


def update(node: fx.Node, **changes: Any) -> Fact:
    """Add to the fact of a site node; raises PassError on a node that carries none."""
    old = fact(node)
    if old is None:
        raise PassError(f"node {node.name!r} is no site: it carries no fact; run `annotate` first")
    new = dataclasses.replace(old, **changes)
    node.meta[KEY] = new
    return new


def sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Fact]]:
    """Every site node with its fact, in graph order."""
    for node in gm.graph.nodes:
        known = fact(node)
        if known is not None:
            yield node, known


def constants(gm: fx.GraphModule) -> dict[str, Constant]:
    """Root attribute -> Constant, shared by every pass; passes that make constants add to it."""
    table: dict[str, Constant] = gm.meta.setdefault(KEY, {}).setdefault("constants", {})
    return table


def get_constant(gm: fx.GraphModule, name: str) -> torch.Tensor:
    """The tensor behind a get_attr target (flat or dotted)."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def _product(dims: tuple[int, ...]) -> int:
    total = 1
    for d in dims:
        total *= d
    return total
