"""The cache on disk: what is trusted, what is rebuilt, and what happens when the disk does not cooperate."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sparsec.codegen import cache
from sparsec.codegen.cache import Cache, Entry
from sparsec.errors import ToolchainError

KEY = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def box(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def put(box: Cache, key: str = KEY, content: bytes = b"library" * 500) -> Entry:
    with box.workspace() as folder:
        built = folder / "out.so"
        built.write_bytes(content)
        return box.store(key, built, f"source of {key}", {"spec": "[]"})


def test_store_and_lookup(box: Cache) -> None:
    assert box.lookup(KEY) is None
    stored = put(box)
    found = box.lookup(KEY)
    assert found is not None and found.library == stored.library
    assert found.library.read_bytes() == b"library" * 500
    assert found.source.read_text() == f"source of {KEY}" and found.facts["spec"] == "[]"
    assert found.facts["sha256"][:16] in found.library.name  # other content, other path
    assert put(box, content=b"other").library != stored.library
    assert list((box.root / "tmp").iterdir()) == []


def test_everything_is_private(box: Cache) -> None:
    put(box)
    box.store_json("decisions", "x", 1)
    for path in [box.root, *box.root.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _open_to_all(path: Path) -> None:
    path.chmod(0o666)


def _link(path: Path) -> None:
    real = path.with_name("elsewhere")
    path.rename(real)
    path.symlink_to(real)


@pytest.mark.parametrize("harm", [_truncate, _flip, _empty, _open_to_all, _link, Path.unlink])
@pytest.mark.parametrize("what", ["library", "manifest"])
def test_bad_entries_are_not_served_and_are_replaced(box: Cache, harm: Any, what: str) -> None:
    entry = put(box)
    harm(entry.library if what == "library" else box.root / "kernels" / f"{KEY}.json")
    assert box.lookup(KEY) is None
    again = put(box)
    found = box.lookup(KEY)
    assert found is not None and found.library == again.library == entry.library
    assert found.library.read_bytes() == b"library" * 500


def test_files_of_another_user_are_not_served(box: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = put(box)
    if os.geteuid() == 0:
        os.chown(entry.library, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert box.lookup(KEY) is None


def test_manifests_of_other_keys_or_shapes_are_ignored(box: Cache) -> None:
    put(box)
    manifest = box.root / "kernels" / f"{OTHER}.json"
    strange = ({"sha256": "0" * 64, "suffix": suffix} for suffix in (5, "/../../x", ".s o", ""))
    for value in ([], {}, {"sha256": 5}, {"sha256": "../../x"}, {"sha256": "0" * 64}, *strange):
        manifest.write_bytes(cache._record(value))  # type: ignore[arg-type]
        manifest.chmod(0o600)
        assert box.lookup(OTHER) is None
    for text in (b"", b"\xff\xfe", b"{}", b"0\n{}"):
        manifest.write_bytes(text)
        assert box.lookup(OTHER) is None
    with pytest.raises(ValueError, match="not a hash"):
        box.lookup("../../etc/passwd")
    with pytest.raises(ValueError, match="record kind"):
        box.load_json("../x", "k")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(mode)
    box = Cache(root)
    assert box.root != root and stat.S_IMODE(box.root.stat().st_mode) == 0o700
    assert f"group or others may write to it (mode {mode:o})" in box.notes[0] and "chmod go-w" in box.notes[0]
    assert put(box).library.is_file() and list(root.iterdir()) == []


def test_a_readable_directory_is_fine_and_a_new_one_is_private(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    box = Cache(root)
    assert box.root == root and box.notes == () and stat.S_IMODE(root.stat().st_mode) == 0o700
    root.chmod(0o755)
    assert Cache(root).notes == ()


def test_a_directory_of_another_user_or_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "not used" in Cache(tmp_path / "file").notes[0]
    root = tmp_path / "theirs"
    root.mkdir()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert f"belongs to user {me}, not to {me + 1}" in Cache(root).notes[0]
    assert "no home directory" in Cache(None).notes[0]


def full_below(root: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Every rename and mkdir below `root` fails as on a full or read-only disk."""
    rename, mkdir = os.replace, Path.mkdir

    def replace(src: Any, dst: Any) -> None:
        if str(dst).startswith(str(root)):
            raise OSError(code, os.strerror(code))
        rename(src, dst)

    def make(self: Path, *args: Any, **more: Any) -> None:
        if code == errno.EROFS and str(self).startswith(str(root)):
            raise OSError(code, os.strerror(code))
        mkdir(self, *args, **more)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "mkdir", make)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_moves_the_cache(box: Cache, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    before = box.root
    full_below(before, monkeypatch, code)
    entry = put(box)
    assert box.root != before and entry.library.is_relative_to(box.root)
    assert os.strerror(code) in box.notes[0] and str(before) in box.notes[0] and len(box.notes) == 1
    assert box.lookup(KEY) is not None
    assert box.keep_source(OTHER, "text").read_text() == "text"


def test_no_place_at_all_is_an_error(box: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    full_below(Path("/"), monkeypatch, errno.ENOSPC)
    with pytest.raises(ToolchainError, match="set SPARSEC_CACHE_DIR"):
        put(box)
    box.store_json("decisions", "k", 1)  # a lost record is no error
    assert box.load_json("decisions", "k") is None


def test_a_library_that_vanished_is_an_error(box: Cache, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="vanished before it could be cached"):
        box.store(KEY, tmp_path / "gone.so", "source", {})


def test_a_cache_on_another_file_system_gets_a_copy(box: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rename` does not cross file systems; the library is then written like every other file."""
    real = Path.stat
    with box.workspace() as folder:
        built = folder / "out.so"
        built.write_bytes(b"library")

        def elsewhere(self: Path, **more: Any) -> Any:
            found = real(self, **more)
            return os.stat_result((*found[:2], found.st_dev + 1, *found[3:10])) if self == built else found

        monkeypatch.setattr(Path, "stat", elsewhere)
        entry = box.store(KEY, built, "source", {})
        monkeypatch.undo()
        assert built.exists()
    assert entry.library.read_bytes() == b"library" and stat.S_IMODE(entry.library.stat().st_mode) & 0o077 == 0
    assert box.lookup(KEY) is not None


def test_only_the_first_failure_moves_the_cache(box: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    before = box.root
    assert box.fall_back(before, "full") and box.root != before
    private = box.root
    assert box.fall_back(before, "full") and box.root == private  # another thread met the same trouble first
    assert not box.fall_back(private, "full")
    full_below(private, monkeypatch, errno.ENOSPC)
    with pytest.raises(ToolchainError, match=f"cannot write kernels to {private}"):
        put(box)


def test_a_lock_file_that_was_trimmed_meanwhile_is_taken_anew(box: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and flock the file may be removed: a lock on it would exclude nobody."""
    real, path, opened = cache.fcntl.flock, box.root / "locks" / f"{KEY}.lock", []

    def flock(descriptor: int, how: int) -> None:
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    with box.lock(KEY):
        assert len(opened) == 2 and path.exists()


@pytest.mark.parametrize("where", ["open", "flock"])
def test_without_working_locks_the_work_is_done_anyway(box: Cache, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def refuse(*args: Any, **more: Any) -> int:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(cache.os if where == "open" else cache.fcntl, where, refuse)
    with box.lock(KEY):
        monkeypatch.undo()
        assert put(box).library.exists()


def test_records(box: Cache) -> None:
    assert box.load_json("decisions", "anything at all") is None
    for value in ({"medians": [1.5, 2.0], "rounds": 9}, [1, None, "x"], 0):
        box.store_json("decisions", "k", value)
        assert box.load_json("decisions", "k") == value
    assert box.load_json("toolchain", "k") is None
    (path,) = (box.root / "json-decisions").iterdir()
    _flip(path)
    assert box.load_json("decisions", "k") is None
    box.store_json("decisions", "k", 2)
    assert box.load_json("decisions", "k") == 2


def test_environment_chooses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "mine"))
    assert cache.open_cache().root == tmp_path / "mine" and cache.open_cache() is cache.open_cache()
    monkeypatch.delenv("SPARSEC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.open_cache().root == tmp_path / "xdg" / "sparsec" and cache.notes() == ()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache._open.cache_clear()
    assert cache.open_cache().root == tmp_path / "home" / ".cache" / "sparsec"
    cache._open.cache_clear()


def age(path: Path, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(path, (when, when))


def test_the_least_recently_used_go_first(box: Cache) -> None:
    keys = [f"{i:02x}" * 32 for i in range(6)]
    for position, key in enumerate(keys):
        put(box, key, bytes([position]) * 10_000)
        age(box.root / "kernels" / f"{key}.json", 1000 - position)
    assert box.lookup(keys[0]) is not None  # used now: the youngest
    box.trim(45_000)
    assert [key for key in keys if box.lookup(key)] == [keys[0], keys[4], keys[5]]
    assert not any(name.startswith(keys[1]) for name in os.listdir(box.root / "kernels"))
    assert not any(name.startswith(keys[1]) for name in os.listdir(box.root / "locks"))


def test_storing_keeps_the_cache_below_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "TRIM_EVERY", 2)
    box = Cache(tmp_path / "small", max_bytes=50_000)
    for i in range(20):
        put(box, f"{i:02x}" * 32, os.urandom(10_000))
    assert sum(p.stat().st_size for p in (box.root / "kernels").iterdir()) <= 60_000 + 2 * 11_000


def test_an_entry_that_is_being_built_is_not_evicted(box: Cache) -> None:
    put(box)
    with box.lock(KEY):
        box.trim(0)
        assert box.lookup(KEY) is not None
    box.trim(0)
    assert box.lookup(KEY) is None


def test_leftovers_of_killed_processes_go_after_an_hour(box: Cache) -> None:
    old, new = box.root / "tmp" / "old", box.root / "tmp" / "new"
    orphan = box.root / "kernels" / f"{OTHER}-0123456789abcdef.so"
    for folder in (old, new):
        folder.mkdir()
        (folder / "x.o").write_text("half")
    orphan.write_text("library without a manifest")
    for path in (old, orphan):
        age(path, 2 * cache.STALE_SECONDS)
    box.trim()
    assert not old.exists() and not orphan.exists() and new.exists()


def test_locks_exclude_threads(box: Cache) -> None:
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            with box.lock(KEY):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and inside == 0


def _hold(root: str, ready: Any) -> None:
    with Cache(Path(root)).lock(KEY):
        ready.set()
        time.sleep(600)


def test_a_killed_holder_releases_its_lock(box: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(box.root), ready))
    holder.start()
    assert ready.wait(60)
    assert box._acquire(box.root / "locks" / f"{KEY}.lock", seconds=0.0) is None
    holder.kill()
    holder.join()
    descriptor = box._acquire(box.root / "locks" / f"{KEY}.lock", seconds=60.0)
    assert descriptor is not None
    os.close(descriptor)
