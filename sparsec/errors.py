"""The one tree of errors. Every message says what was wrong, where, what is valid and what to do about it."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable


class SparsecError(Exception):
    """Base of every error that sparsec raises on purpose."""


class SpecError(SparsecError, ValueError):
    """A spec, pattern, option or name that means nothing for this model."""


class CaptureError(SparsecError, RuntimeError):
    """The model could not be turned into a graph; names the file and line that stopped it."""


class PassError(SparsecError, RuntimeError):
    """A pass failed or broke the IR contract; the graph was rolled back."""


class ToolchainError(SparsecError, RuntimeError):
    """No usable compiler, or the compiler rejected generated source; carries command, output and source path."""


class VerifyError(SparsecError, RuntimeError):
    """A kernel disagreed with its float64 oracle by more than the error bound."""


class InputError(SparsecError, ValueError):
    """A compiled model was called or cast in a way it was not compiled for (shape, dtype, device)."""


class FormatError(SparsecError, ValueError):
    """Packed buffers that do not obey their format, or a weight that a format cannot hold."""


class LoadError(SparsecError, RuntimeError):
    """A saved model or cache entry that is damaged, of another version, or not allowed."""


class DeviceError(SparsecError, RuntimeError):
    """No kernels exist for the device the model or the inputs live on."""


class DependencyError(SparsecError, ImportError):
    """An optional package is missing or has an unsupported version."""


def nearest(name: str, known: Iterable[str], limit: int = 5) -> str:
    """A clause for error messages: the known names closest to `name`, or the first few when nothing is close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(repr(n) for n in close)
    shown = ", ".join(repr(n) for n in names[:limit])
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f"known: {shown}{more}" if names else "there are none"


_LAST = threading.local()


def remember(error: SparsecError) -> None:
    """Keep what an op ends with in this thread, for `recall`: torch's stable ABI passes on messages only."""
    _LAST.error = error


def recall(raised: BaseException) -> None:
    """Raise the remembered error in place of `raised`, when `raised` is what torch made of it; else return."""
    error = getattr(_LAST, "error", None)
    _LAST.error = None
    if error is not None and error is not raised and str(error) in str(raised):
        raise error from None
