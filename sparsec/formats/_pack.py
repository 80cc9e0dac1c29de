"""Packing helpers shared by the formats: numpy views of any dtype, selection of stored entries, counts per block.

All of it walks the matrix in chunks of rows, so that no 64-bit index of the whole weight is ever alive.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sparsec.errors import FormatError

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
"""What the `values` of a format may hold."""

INT32_MAX = 2**31 - 1
_CHUNK = 1 << 18  # entries walked at a time: their 8-byte indices take 2 MiB


def refuse_dtype(dense: torch.Tensor) -> str | None:
    """Why no format can store this tensor's dtype, or None."""
    if dense.is_quantized:
        return f"quantised weights ({dense.dtype}) are not packed; dequantise them first"
    if dense.layout is not torch.strided:
        return f"the weight has layout {dense.layout}; call .to_dense() first"
    if dense.dtype not in VALUE_DTYPES:
        return f"dtype {dense.dtype} cannot be packed; valid: {', '.join(map(str, VALUE_DTYPES))}"
    return None


def numpy_view(tensor: torch.Tensor) -> np.ndarray:
    """A numpy view of the tensor's memory (a copy if it is not contiguous on the CPU); bfloat16 is seen as uint16."""
    flat = tensor.detach().to("cpu").contiguous()
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def torch_view(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """The tensor over `array`, which `numpy_view` made of a tensor with the dtype and device of `like`."""
    tensor = torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if like.dtype == torch.bfloat16 else tensor).to(like.device)


def nonzero(dense: torch.Tensor) -> np.ndarray:
    """`dense != 0` as numpy: on one thread, since a sweep is faster than waking the pool for weights of common size."""
    array = numpy_view(dense)
    if dense.dtype in (torch.bfloat16, torch.float16):  # numpy has no fast half compare: drop the sign bit instead
        array = array.view(np.uint16) << np.uint16(1)
    set_entries: np.ndarray = array != 0
    return set_entries


def unsigned(indices: torch.Tensor) -> np.ndarray:
    """Index buffers as numpy sees them: an int16 tensor holds uint16 bit patterns, int32 is what it says."""
    array = numpy_view(indices)
    return array.view(np.uint16) if array.dtype == np.int16 else array


def row_chunks(rows: int, cols: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Half-open row ranges of about `_CHUNK` entries each; all but the last a multiple of `multiple` rows."""
    step = max(1, _CHUNK // max(1, cols * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def count_per_block(mask: np.ndarray, block: int) -> np.ndarray:
    """Set entries of a bool mask per row and block of `block` columns: int32 (rows, ceil(cols / block))."""
    rows, cols = mask.shape
    blocks = -(-cols // block)
    counts = np.zeros((rows, blocks), np.int32)
    whole = cols // block
    if whole:
        counts[:, :whole] = np.count_nonzero(mask[:, : whole * block].reshape(rows, whole, block), axis=2)
    if whole < blocks:
        counts[:, whole] = np.count_nonzero(mask[:, whole * block :], axis=1)
    return counts


def pointers_of(counts: np.ndarray) -> torch.Tensor:
    """int32 pointers [0, c0, c0 + c1, ...] of a flat run of counts. Raises FormatError when they would overflow."""
    total = int(counts.sum(dtype=np.int64))
    if total > INT32_MAX:
        raise FormatError(f"{total} stored entries overflow 32-bit pointers (at most {INT32_MAX}); split the weight")
    pointers = np.zeros(counts.size + 1, np.int32)
    np.cumsum(counts.reshape(-1), out=pointers[1:])
    return torch.from_numpy(pointers)


def select(dense: torch.Tensor, mask: np.ndarray, columns: bool) -> tuple[torch.Tensor, np.ndarray | None]:
    """The entries of `dense` under `mask` in row-major order and, if asked for, their column numbers.

    Column numbers come as uint16 where they fit and as int32 otherwise.
    """
    rows, cols = mask.shape
    source = numpy_view(dense)
    total = int(np.count_nonzero(mask))
    values = np.empty(total, source.dtype)
    index_type = np.uint16 if cols <= 65536 else np.int32
    indices = np.empty(total, index_type) if columns else None
    numbers: np.ndarray | None = None
    done = 0
    for start, stop in row_chunks(rows, cols):
        here = np.flatnonzero(mask[start:stop])
        end = done + here.size
        # mode="clip" lets take write straight into `out`; every position is in range by construction
        np.take(source[start:stop].reshape(-1), here, out=values[done:end], mode="clip")
        if indices is not None:
            if numbers is None:
                numbers = np.tile(np.arange(cols, dtype=index_type), stop - start)
            np.take(numbers, here, out=indices[done:end], mode="clip")
        done = end
    return torch_view(values, dense), indices


def place(values: torch.Tensor, flat: Iterator[np.ndarray], rows: int, cols: int) -> torch.Tensor:
    """The (rows, cols) matrix that is zero but for `values` at the flat positions that `flat` yields in order."""
    source = numpy_view(values)
    out = np.zeros(rows * cols, source.dtype)
    done = 0
    for here in flat:
        out[here] = source[done : done + here.size]
        done += here.size
    return torch_view(out.reshape(rows, cols), values)
