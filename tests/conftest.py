"""What every test shares: a private kernel cache, seeds, its share of the cores, and golden texts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
CACHE = "SPARSEC_CACHE_DIR"
_made: list[str] = []
_flags_of_users: list[Callable[..., tuple[str, ...]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    """One fresh cache directory for all workers, which inherit the variable; each takes its share of the cores."""
    if CACHE not in os.environ:
        _made.append(tempfile.mkdtemp(prefix="sparsec-tests-"))
        os.environ[CACHE] = _made[0]
    if "soak" not in config.option.markexpr.replace("not soak", ""):
        _compile_sooner()
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        import torch

        share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        torch.set_num_threads(share)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))  # of processes that tests start


def _compile_sooner() -> None:
    """Build kernels with -O1 in half of the time: most tests check and never time them.

    `user_flags` brings the flags of users back, for the share of the battery that every variant gets here. Processes
    that tests start, examples among them, have those flags anyway.
    """
    from sparsec.codegen import toolchain

    whole = toolchain.Toolchain.command

    def command(
        self: toolchain.Toolchain, isa: str, source: str = "<source>", output: str = "<output>"
    ) -> tuple[str, ...]:
        return tuple("-O1" if flag == "-O3" else flag for flag in whole(self, isa, source, output))

    _flags_of_users.append(whole)
    toolchain.Toolchain.command = command  # type: ignore[method-assign]


@pytest.fixture
def user_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's flags as users get them, on every instruction set."""
    from sparsec.codegen import toolchain

    monkeypatch.setattr(toolchain.Toolchain, "command", _flags_of_users[0])


def pytest_unconfigure(config: pytest.Config) -> None:
    if _made:
        os.environ.pop(CACHE, None)
        shutil.rmtree(_made.pop(), ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`golden(text)` compares with `golden/<file>/<test>.txt`; --update-golden writes it. Never for measurements."""

    def check(text: str) -> None:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in request.node.name)
        path = GOLDEN / request.path.stem.removeprefix("test_") / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden text {path}; run pytest --update-golden and read the result"
        assert text == path.read_text(encoding="utf-8")

    return check
