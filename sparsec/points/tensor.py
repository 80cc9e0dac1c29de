"""SparseTensor: features at the occupied cells of a grid, and the index that finds a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sparsec.errors import InputError

if TYPE_CHECKING:
    from sparsec.ops.gather import Pairs

TABLE = 1 << 22  # cells of the largest grid (with its halo) that is looked up in a table; beyond that keys are searched


class Index:
    """The occupied cells of a grid. SparseTensors that differ in features alone share one, and its rulebooks."""

    def __init__(self, coords: torch.Tensor, shape: tuple[int, ...], batch: int) -> None:
        self.coords, self.shape, self.batch = coords, shape, batch
        self.rulebooks: dict[Any, tuple[Pairs, Index]] = {}
        self._lookups: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __len__(self) -> int:
        return self.coords.shape[0]

    def strides(self, halo: Sequence[int]) -> tuple[int, ...]:
        """Key distance of one step along the batch and each dimension of the grid with `halo` cells on either side."""
        steps = [1]
        for size, border in zip(reversed(self.shape), reversed(halo)):
            steps.append(steps[-1] * (size + 2 * border))
        if self.batch * steps[-1] >= 1 << 62:
            raise InputError(f"a batch of {self.batch} grids of {self.shape} has more cells than 62 bits can number")
        return tuple(reversed(steps))

    def keys(self, coords: torch.Tensor, halo: Sequence[int]) -> torch.Tensor:
        """The number of each cell in C order, int64; cells in the halo have numbers too, which nothing occupies."""
        steps = self.strides(halo)
        key = coords[:, 0] * steps[0]
        for d, border in enumerate(halo):
            key = key + (coords[:, d + 1] + border) * steps[d + 1]
        return key

    def find(self, keys: torch.Tensor, halo: tuple[int, ...]) -> torch.Tensor:
        """Which entry lies at each key, -1 for none; any shape."""
        found, order = self._lookup(halo)
        if order is None:
            return found[keys]
        if not len(self):
            return torch.full_like(keys, -1)
        place = torch.searchsorted(found, keys).clamp_(max=len(self) - 1)
        return torch.where(found[place] == keys, order[place], -1)

    def _lookup(self, halo: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(table over all cells, None), or (sorted keys, their entries)."""
        if halo not in self._lookups:
            own = self.keys(self.coords, halo)
            cells = self.batch * self.strides(halo)[0]
            if cells <= TABLE:
                table = own.new_full((cells,), -1)
                table[own] = torch.arange(len(self), device=own.device)
                self._lookups[halo] = table, None
            else:
                self._lookups[halo] = tuple(torch.sort(own))  # type: ignore[assignment]
        return self._lookups[halo]

    def repeated(self) -> list[int] | None:
        """A coordinate that occurs twice."""
        halo = (1,) * len(self.shape)
        found, order = self._lookup(halo)
        if order is None:
            twice = found[self.keys(self.coords, halo)] != torch.arange(len(self), device=found.device)
            at = twice.nonzero()
        else:
            at = order[1:][found[1:] == found[:-1]]
        return self.coords[at.reshape(-1)[0]].tolist() if at.numel() else None  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features at some cells of a batch of 2d or 3d grids; every other cell is zero.

    coords: integers (points, 1 + d): the image of the batch, then the position, the slowest dimension first.
    features: floating point (points, channels), differentiable. shape: the extents of the grid, by default as far as
    the coordinates reach; batch: the number of images, likewise.

    Raises InputError for coordinates that repeat, lie outside the grid, or do not fit the features.
    """

    coords: torch.Tensor
    features: torch.Tensor
    shape: tuple[int, ...] | None = None
    batch: int | None = None
    index: Index = field(init=False, repr=False)

    def __post_init__(self) -> None:
        coords, features = self.coords, self.features
        if not isinstance(coords, torch.Tensor) or not isinstance(features, torch.Tensor):
            raise InputError("coords and features must be tensors")
        if coords.is_floating_point() or coords.is_complex() or coords.dtype is torch.bool:
            raise InputError(f"coords must be integers, got {coords.dtype}")
        if coords.dim() != 2 or coords.shape[1] not in (3, 4):
            raise InputError(
                f"coords must be (points, 1 + d) with d = 2 or 3: the image of the batch, then the position; "
                f"got {tuple(coords.shape)}"
            )
        if features.dim() != 2 or features.shape[0] != coords.shape[0] or not features.is_floating_point():
            raise InputError(
                f"features must be floating point (points, channels) with {coords.shape[0]} points, got "
                f"{features.dtype} {tuple(features.shape)}"
            )
        if coords.device != features.device:
            raise InputError(f"coords are on {coords.device} and features on {features.device}; move them together")
        coords = coords.long()
        shape, batch = self._extents(coords)
        index = Index(coords, shape, batch)
        if (again := index.repeated()) is not None:
            raise InputError(
                f"coordinate {again} occurs more than once; add up or average the features of equal coordinates first"
            )
        for name, value in (("coords", coords), ("shape", shape), ("batch", batch), ("index", index)):
            object.__setattr__(self, name, value)

    def _extents(self, coords: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """Shape and batch, checked against the coordinates."""
        d = coords.shape[1] - 1
        if not len(coords) and (self.shape is None or self.batch is None):
            raise InputError("without points the grid is unknown: give shape and batch")
        low = coords.amin(0).tolist() if len(coords) else [0] * (d + 1)
        high = coords.amax(0).tolist() if len(coords) else [-1] * (d + 1)
        shape = tuple(self.shape) if self.shape is not None else tuple(h + 1 for h in high[1:])
        batch = self.batch if self.batch is not None else high[0] + 1
        if len(shape) != d or any(type(s) is not int or s < 1 for s in shape) or type(batch) is not int or batch < 0:
            raise InputError(f"shape must be {d} positive integers and batch an integer, got {shape} and {batch!r}")
        for what, least, most, size in zip(("image", *"zyx"[-d:]), low, high, (batch, *shape)):
            if least < 0 or most >= size:
                wrong = least if least < 0 else most
                raise InputError(
                    f"coordinate {what} = {wrong} lies outside the grid, which has {size} (batch {batch}, {shape})"
                )
        return shape, batch

    @classmethod
    def from_dense(cls, x: torch.Tensor, mask: torch.Tensor | None = None) -> SparseTensor:
        """From (batch, channels, *grid): cells where a channel is nonzero, or where `mask` (batch, *grid) is True."""
        if x.dim() not in (4, 5):
            raise InputError(f"expected (batch, channels, *grid) with 2 or 3 grid dimensions, got {tuple(x.shape)}")
        found = (x != 0).any(1) if mask is None else mask
        if found.dtype is not torch.bool or found.shape != (x.shape[0], *x.shape[2:]):
            raise InputError(f"mask must be bool {(x.shape[0], *x.shape[2:])}, got {found.dtype} {tuple(found.shape)}")
        coords = found.nonzero()
        return cls(coords, x.movedim(1, -1)[found], tuple(x.shape[2:]), x.shape[0])

    def dense(self) -> torch.Tensor:
        """(batch, channels, *grid) with zeros where there is no point; differentiable."""
        flat = self.index.keys(self.coords, (0,) * len(self.index.shape))
        sizes = self.index.batch, *self.index.shape
        out = self.features.new_zeros((math.prod(sizes), self.features.shape[1])).index_copy(0, flat, self.features)
        return out.view(*sizes, -1).movedim(-1, 1)

    def with_features(self, features: torch.Tensor) -> SparseTensor:
        """The same cells with other features (points, channels); the rulebooks are shared."""
        if features.dim() != 2 or features.shape[0] != len(self.index) or not features.is_floating_point():
            raise InputError(
                f"expected features ({len(self.index)}, channels), got {features.dtype} {tuple(features.shape)}"
            )
        return at_index(self.index, features)

    @property
    def occupancy(self) -> float:
        """The share of all cells that is occupied."""
        return len(self.index) / max(1, self.index.batch * math.prod(self.index.shape))


def at_index(index: Index, features: torch.Tensor) -> SparseTensor:
    """A SparseTensor over cells that are known to be valid."""
    made = object.__new__(SparseTensor)
    fields = {"coords": index.coords, "features": features, "shape": index.shape, "batch": index.batch, "index": index}
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made
