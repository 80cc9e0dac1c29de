"""The cache on disk: built kernels and small records, which no crash, race, full disk or stranger can corrupt.

A kernel is stored under a key as `<key>.json` (the manifest), `<key>-<content hash>.so` and `.c`. The manifest is
renamed into place last and holds the hash of the library, which is checked before every dlopen: loading a truncated
library is SIGBUS, not an exception. A path whose content was loaded is never given other content, because the hash is
in its name: dlopen returns what it loaded before under the same name.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparsec.errors import ToolchainError

MAX_BYTES = 512 << 20
STALE_SECONDS = 3600.0  # leftovers of killed processes older than this are removed
LOCK_SECONDS = 600.0  # a holder that is stopped, not dead, must not stop the others for good
TRIM_EVERY = 64  # stores

_KEY = re.compile(r"[0-9a-f]{16,64}")
_SUFFIX = re.compile(r"\.[a-z]{1,8}")  # of a library: .so, or what another backend loads
_T = TypeVar("_T")
_KIND = re.compile(r"[a-z_]{1,32}")


@dataclass(frozen=True)
class Entry:
    """A checked library of the cache, with its source and the facts it was stored with."""

    library: Path
    source: Path
    facts: dict[str, Any]


def open_cache() -> Cache:
    """The cache of this process for the present `SPARSEC_CACHE_DIR` (default: `sparsec` in the XDG cache folder)."""
    return _open(os.environ.get("SPARSEC_CACHE_DIR", ""), os.environ.get("XDG_CACHE_HOME", ""))


def notes() -> tuple[str, ...]:
    """Sentences for the report: why the cache is not where it should be. Empty when all is well."""
    return open_cache().notes


def load_json(kind: str, key: str) -> Any:
    """A record stored by `store_json`, or None when there is none that is whole."""
    return open_cache().load_json(kind, key)


def store_json(kind: str, key: str, value: Any) -> None:
    """Keep a small JSON value under (kind, key). A record that cannot be written is only lost, never half there."""
    open_cache().store_json(kind, key, value)


@functools.lru_cache(maxsize=64)
def _open(chosen: str, xdg: str) -> Cache:
    if chosen:
        return Cache(Path(chosen).expanduser().absolute())
    if xdg and os.path.isabs(xdg):
        return Cache(Path(xdg) / "sparsec")
    home = Path("~").expanduser()
    return Cache(home / ".cache" / "sparsec" if home.is_absolute() else None)


class Cache:
    """A cache folder. `root` is None for one that is private to this process from the start."""

    def __init__(self, root: Path | None, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.notes: tuple[str, ...] = ()
        self._stores = 0
        self._lock = threading.RLock()
        reason = prepare(root) if root is not None else "there is no home directory"
        if root is None or reason is not None:
            self._go_private(
                f"cache directory {root} is not used: {reason}" if root else f"no cache directory: {reason}"
            )
        else:
            self.root = root

    def lookup(self, key: str) -> Entry | None:
        """The entry of `key` if its library is whole and nobody else could have written it; counts as a use."""
        manifest = self._path("kernels", key, ".json")
        facts = _read_record(manifest)
        if not isinstance(facts, dict):
            return None
        digest = facts.get("sha256")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            return None
        suffix = facts.get("suffix", ".so")
        if not isinstance(suffix, str) or not _SUFFIX.fullmatch(suffix):
            return None
        library = self._path("kernels", key, f"-{digest[:16]}{suffix}")
        if not _trusted(library) or _file_hash(library) != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(manifest)
        return Entry(library, library.with_suffix(".c"), facts)

    def store(self, key: str, library: Path, source: str, facts: dict[str, Any]) -> Entry:
        """Move a built library (a file of a `workspace`) into the cache and return its entry.

        Raises ToolchainError when neither the cache nor a temporary directory can be written.
        """
        digest = _file_hash(library)
        if digest is None:
            raise ToolchainError(
                f"the library {library} vanished before it could be cached; is a cleaner removing files?"
            )
        record = {**facts, "sha256": digest, "suffix": library.suffix}
        entry = self._writing(lambda: self._publish(key, library, source, record))
        self._stores += 1
        if self._stores % TRIM_EVERY == 1:
            self.trim()
        return entry

    def drop(self, key: str) -> None:
        """Forget an entry that turned out not to load."""
        with contextlib.suppress(OSError):
            self._path("kernels", key, ".json").unlink()

    def keep_source(self, key: str, text: str) -> Path:
        """Write a source that did not compile where its author can read it; the path goes into the error."""

        def write() -> Path:
            path = self._path("failed", key, ".c")
            _write(path, text.encode(), self.root / "tmp")
            return path

        return self._writing(write)

    def load_json(self, kind: str, key: str) -> Any:
        record = _read_record(self._json_path(kind, key))
        return record.get("value") if isinstance(record, dict) else None

    def store_json(self, kind: str, key: str, value: Any) -> None:
        path = self._json_path(kind, key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _write(path, _record({"value": value}), self.root / "tmp")

    @contextlib.contextmanager
    def lock(self, key: str, seconds: float | None = None) -> Iterator[bool]:
        """Hold the lock of a key against other threads and processes; the kernel releases it when a holder dies.

        Where locks do not work (some network file systems), or one is not had within `seconds`, the block runs without
        and is told so (False): two builders then do the same work, and the later rename wins.
        """
        descriptor = self._acquire(self._path("locks", key, ".lock"), seconds)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                os.close(descriptor)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A fresh folder on the cache's file system, removed at the end."""

        def make() -> Path:
            folder = self.root / "tmp" / uuid.uuid4().hex
            folder.mkdir(mode=0o700)
            return folder

        folder = self._writing(make)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def trim(self, max_bytes: int | None = None) -> None:
        """Remove the least recently used entries beyond the size cap, and what killed processes left behind."""
        limit = self.max_bytes if max_bytes is None else max_bytes
        entries, orphans = _scan(self.root / "kernels")
        _remove_stale([*orphans, *_files(self.root / "tmp"), *_files(self.root / "failed")])
        total = sum(size for _, size, _ in entries.values())
        if total <= limit:
            return
        for key, (_, size, files) in sorted(entries.items(), key=lambda item: item[1][0]):
            descriptor = self._acquire(self._path("locks", key, ".lock"), seconds=0.0)
            if descriptor is None:
                continue  # somebody builds it now
            for path in sorted(files, key=lambda p: p.suffix != ".json"):  # the manifest first: no entry, then no files
                with contextlib.suppress(OSError):
                    path.unlink()
            with contextlib.suppress(OSError):
                self._path("locks", key, ".lock").unlink()
            os.close(descriptor)
            total -= size
            if total <= limit * 0.8:
                return

    def _publish(self, key: str, library: Path, source: str, record: dict[str, Any]) -> Entry:
        folder = self.root / "tmp"
        final = self._path("kernels", key, f"-{record['sha256'][:16]}{record['suffix']}")
        _write(final.with_suffix(".c"), source.encode(), folder)
        if library.stat().st_dev == folder.stat().st_dev:
            library.chmod(0o700)
            os.replace(library, final)
        else:  # the cache moved to another file system while the compiler ran
            _write(final, library.read_bytes(), folder)
        _write(self._path("kernels", key, ".json"), _record(record), folder)
        return Entry(final, final.with_suffix(".c"), record)

    def _path(self, folder: str, key: str, suffix: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"cache key {key!r} is not a hash in hexadecimal")
        return self.root / folder / (key + suffix)

    def _json_path(self, kind: str, key: str) -> Path:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"record kind {kind!r} must be lower-case letters")
        return self.root / f"json-{kind}" / (hashlib.sha256(key.encode()).hexdigest()[:40] + ".json")

    def fall_back(self, root: Path, why: str) -> bool:
        """Leave `root`, which could not be written, for a private folder; False when `root` is one already."""
        with self._lock:
            if self.root != root:
                return True  # another thread met the same trouble first
            if self.notes:
                return False
            self._go_private(f"cache directory {root} cannot be written ({why})")
            return True

    def _writing(self, action: Callable[[], _T]) -> _T:
        """Run an action that writes below `root`, once more in a private folder when the disk is full or read-only."""
        root = self.root
        try:
            return action()
        except OSError as error:
            if not self.fall_back(root, error.strerror or str(error)):
                raise ToolchainError(f"cannot write kernels to {root} ({error}); set SPARSEC_CACHE_DIR") from error
        try:
            return action()
        except OSError as error:
            raise ToolchainError(f"cannot write kernels to {self.root} ({error}); set SPARSEC_CACHE_DIR") from error

    def _go_private(self, why: str) -> None:
        try:
            self.root = Path(tempfile.mkdtemp(prefix="sparsec-"))
        except OSError as error:
            raise ToolchainError(
                f"{why}; and no temporary directory either ({error}); set SPARSEC_CACHE_DIR"
            ) from error
        atexit.register(_remove_private, self.root, os.getpid())
        _make_folders(self.root)
        self.notes = (f"{why}; kernels of this process live in {self.root} and are built again next time",)

    def _acquire(self, path: Path, seconds: float | None = None) -> int | None:
        deadline = time.monotonic() + (LOCK_SECONDS if seconds is None else seconds)
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
                os.close(descriptor)  # `trim` removed the file between open and lock: take the new one
            except BlockingIOError:
                os.close(descriptor)
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.01)
            except OSError:
                os.close(descriptor)
                return None


def _remove_private(root: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves its parent's folder alone
        shutil.rmtree(root, ignore_errors=True)


def prepare(root: Path) -> str | None:
    """Create a cache folder (0700) or accept the one that is there; otherwise say why it cannot be trusted or used."""
    try:
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        status = root.stat()
        if not stat.S_ISDIR(status.st_mode):
            return "it is not a directory"
        if status.st_uid != os.geteuid():
            return f"it belongs to user {status.st_uid}, not to {os.geteuid()}"
        if status.st_mode & 0o022:
            return f"group or others may write to it (mode {stat.S_IMODE(status.st_mode):o}); run chmod go-w on it"
        _make_folders(root)
        descriptor, probe = tempfile.mkstemp(dir=root / "tmp")
        os.close(descriptor)
        os.unlink(probe)
    except OSError as error:
        return f"{error.strerror or error}"
    return None


def _make_folders(root: Path) -> None:
    for name in ("kernels", "locks", "tmp", "failed"):
        (root / name).mkdir(mode=0o700, exist_ok=True)


def _write(path: Path, content: bytes, temporary: Path) -> None:
    """Write a file so that others see all of it or none: temporary name, then rename."""
    draft = temporary / uuid.uuid4().hex
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def _record(value: dict[str, Any]) -> bytes:
    body = json.dumps(value, sort_keys=True)
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n".encode()


def _read_record(path: Path) -> Any:
    """The value that `_record` wrote, or None for a file that is missing, damaged, or not ours."""
    if not _trusted(path):
        return None
    try:
        check, _, body = path.read_bytes().decode().partition("\n")
        body = body.removesuffix("\n")
        return json.loads(body) if hashlib.sha256(body.encode()).hexdigest() == check else None
    except (OSError, ValueError):
        return None


def _trusted(path: Path) -> bool:
    """Whether a file is a regular one that belongs to us and that nobody else can write."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _file_hash(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _scan(folder: Path) -> tuple[dict[str, tuple[float, int, list[Path]]], list[Path]]:
    """({key: (last use, bytes, files)}, files that belong to no manifest)."""
    groups: dict[str, list[Path]] = {}
    for path in _files(folder):
        groups.setdefault(re.split(r"[-.]", path.name)[0], []).append(path)
    entries: dict[str, tuple[float, int, list[Path]]] = {}
    orphans: list[Path] = []
    for key, files in groups.items():
        manifest = folder / f"{key}.json"
        if manifest not in files or not _KEY.fullmatch(key):
            orphans += files
            continue
        with contextlib.suppress(OSError):
            entries[key] = (manifest.stat().st_mtime, sum(f.stat().st_size for f in files), files)
    return entries, orphans


def _remove_stale(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
