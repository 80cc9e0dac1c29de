"""A progress bar for work that takes seconds; silent when nobody watches."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Any


def watched() -> bool:
    """True when stderr is a terminal and the log level of `sparsec` lets warnings through."""
    stream = sys.stderr
    if stream is None or not hasattr(stream, "isatty") or not stream.isatty():
        return False
    return logging.getLogger("sparsec").isEnabledFor(logging.WARNING)


class Progress:
    """`with Progress(len(specs), "building kernels") as bar: ... bar.advance()`.

    `advance` may be called from any thread. The bar goes to stderr, disappears when it is done, and is only drawn when
    there is more than one step and somebody watches.
    """

    def __init__(self, total: int, title: str = "building kernels") -> None:
        self.total = total
        self.title = title
        self.done = 0
        self._lock = threading.Lock()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.total > 1 and watched():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def advance(self, steps: int = 1) -> None:
        """Count finished steps."""
        with self._lock:
            self.done += steps
            if self._bar is not None:
                self._bar.advance(self._task, steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
