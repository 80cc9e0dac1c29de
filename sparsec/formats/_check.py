"""Checks of packed buffers, shared by the formats: each failure names buffer, position, value and what is valid."""

from __future__ import annotations

import numpy as np
import torch

from sparsec.errors import FormatError
from sparsec.formats._pack import INT32_MAX, VALUE_DTYPES, numpy_view


def positive(owner: str, field: str, value: object, optional: bool = False) -> str | None:
    """What is wrong with a positive integer field of a format, or None."""
    if (value is None and optional) or (type(value) is int and value > 0):
        return None
    return f"{owner}: {field}={value!r} must be a positive integer{' or None' if optional else ''}"


def value_dtype(name: str, values: torch.Tensor, dims: int) -> None:
    """Raise unless `values` has a dtype that formats store and the right number of dimensions."""
    if values.dtype not in VALUE_DTYPES:
        valid = ", ".join(map(str, VALUE_DTYPES))
        raise FormatError(f"{name}: buffer 'values' has dtype {values.dtype}; valid: {valid}")
    if values.dim() != dims:
        raise FormatError(f"{name}: buffer 'values' has shape {tuple(values.shape)}, expected {dims} dimension(s)")


def buffer(name: str, key: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise unless the buffer has exactly this dtype and shape."""
    if tensor.dtype != dtype:
        raise FormatError(f"{name}: buffer {key!r} has dtype {tensor.dtype}, expected {dtype}")
    if tuple(tensor.shape) != shape:
        raise FormatError(f"{name}: buffer {key!r} has shape {tuple(tensor.shape)}, expected {shape}")


def pointers(
    name: str, tensor: torch.Tensor, segments: int, total: int, key: str = "pointers", into: str = "values"
) -> np.ndarray:
    """`tensor` as numpy; raises unless it is int32[segments + 1], starts at 0, never falls and ends at `total`.

    `key` names the buffer in messages, `into` the one whose entries it counts.
    """
    buffer(name, key, tensor, torch.int32, (segments + 1,))
    if total > INT32_MAX:
        raise FormatError(f"{name}: buffer {into!r} has {total} entries, 32-bit pointers reach {INT32_MAX}")
    array = numpy_view(tensor)
    if array[0] != 0:
        raise FormatError(f"{name}: buffer {key!r} at position 0 holds {array[0]}, expected 0")
    falls = array[1:] < array[:-1]
    if falls.any():
        at = int(np.argmax(falls)) + 1
        raise FormatError(
            f"{name}: buffer {key!r} at position {at} holds {array[at]}, less than {array[at - 1]} before it; "
            f"valid: {array[at - 1]} to {total}"
        )
    if array[-1] != total:
        raise FormatError(
            f"{name}: buffer {key!r} at position {segments} holds {array[-1]}, expected {total}, the stored entries"
        )
    return array


def ascending(name: str, indices: np.ndarray, starts: np.ndarray, what: str) -> None:
    """Raise unless `indices` rise strictly inside every run; `starts` are where runs begin, and the end."""
    if indices.size < 2:
        return
    rises = indices[1:] > indices[:-1]
    inner = starts[(starts > 0) & (starts < indices.size)]
    rises[inner - 1] = True
    if not rises.all():
        at = int(np.argmin(rises)) + 1
        row = int(np.searchsorted(starts, at, side="right")) - 1
        raise FormatError(
            f"{name}: buffer 'indices' at position {at} ({what} {row}) holds {indices[at]}, not above "
            f"{indices[at - 1]} before it; indices rise strictly inside a {what}"
        )


def segment_ranges(name: str, indices: np.ndarray, ends: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Raise unless the indices of segment s (entries ends[s] to ends[s + 1]) lie in low[s] <= index < high[s].

    Looks at the first and last entry of each segment only, which is enough once `ascending` has passed.
    """
    first, last = ends[:-1], ends[1:]
    used = np.flatnonzero(first < last)
    lower, upper = low[used], high[used]
    for where, bad in (
        (first[used], indices[first[used]] < lower),
        (last[used] - 1, indices[last[used] - 1] >= upper),
    ):
        if bad.any():
            s = int(np.argmax(bad))
            raise FormatError(
                f"{name}: buffer 'indices' at position {where[s]} holds {indices[where[s]]}, "
                f"valid: {lower[s]} to {upper[s] - 1}"
            )


def ascending_entries(
    name: str, entries: tuple[np.ndarray, np.ndarray, np.ndarray], rows: int, cols: int, noun: str
) -> None:
    """FormatError unless entries (row, column, position in 'places') lie in the matrix and ascend along a row."""
    row, column, at = entries
    outside = (row >= rows) | (column >= cols)
    if outside.any():
        i = int(np.argmax(outside))
        raise FormatError(
            f"{name}: buffer 'places' at position {at[i]} means ({row[i]}, {column[i]}), outside ({rows}, {cols})"
        )
    order = np.argsort(row, kind="stable")
    falls = (np.diff(row[order]) == 0) & (np.diff(column[order]) <= 0)
    if falls.any():
        i = int(order[int(np.argmax(falls)) + 1])
        raise FormatError(
            f"{name}: buffer 'places' at position {at[i]} means column {column[i]} of row {row[i]}, which "
            f"does not lie behind the row's {noun} before it"
        )
