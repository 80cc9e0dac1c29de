"""What a failing capture says: silence for torch's own noise, and the line of the model that is to blame."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparsec.errors import CaptureError, InputError, SpecError

MUTED = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export", "torch._subclasses")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what a failing export prints: a partial graph on stderr, warnings and three loggers."""
    loggers = [logging.getLogger(name) for name in MUTED]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


_INSIDE = tuple(os.path.dirname(os.path.abspath(p)) + os.sep for p in (torch.__file__, __file__, contextlib.__file__))


def explain_failure(error: BaseException, model: nn.Module) -> str:
    """The error's first line with the file and line of the model's own code that caused it.

    That is the innermost frame outside torch, sparsec and the standard library, else the definition of `forward`.
    """
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (CaptureError, InputError, SpecError)):
        return message
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith((*_INSIDE, "<")) and "importlib" not in frame.filename:
            place = f"{frame.filename}:{frame.lineno}"
    if not place:
        with contextlib.suppress(OSError, TypeError):
            function: Any = inspect.unwrap(type(model).forward)
            place = f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    return f"{type(error).__name__}: {message:.300}" + (f" ({place})" if place else "")
