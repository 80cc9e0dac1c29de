"""The container of a saved model: a zip of a few stored members, which is read as strictly as it is written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsec.errors import LoadError, SpecError

FORMAT = "sparsec-model"
VERSION = 1
"""Raised when a reader of the old version would misread the new one; other additions are new keys."""

MANIFEST = "manifest.json"
JSON_BYTES = 256 << 20  # the largest JSON member that is parsed
MEMBERS = 100_000

_NAME = re.compile(
    r"manifest\.json|graph\.json|report\.json|history\.json|tensors\.safetensors"
    r"|kernels/k_[0-9a-f]{16}\.[a-z]{1,8}|libraries/k_[0-9a-f]{16}\.so"
)
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LOCAL = struct.Struct("<4s5H3I2H")
_END = 22
_END64 = 76  # zip64 end of central directory and its locator


def write(path: Path, members: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """Write the container beside `path` and rename it into place; equal members give equal bytes.

    `about` goes into the manifest, beside format, version, and size and SHA-256 of every member.
    """
    table = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members.items()}
    manifest = {"format": FORMAT, "version": VERSION, **about, "members": table}
    everything = {MANIFEST: dumps(manifest, indent=1), **members}
    try:
        descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror}") from error
    try:
        with open(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in everything.items():
                info = zipfile.ZipInfo(name, _EPOCH)
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, data)
        os.replace(draft, path)
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if os.path.exists(draft):
            os.unlink(draft)


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, member -> bytes) of a container; LoadError for anything that `write` could not have written."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except (OSError, EOFError) as error:
        raise LoadError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, NotImplementedError, ValueError) as error:
        raise LoadError(f"{path} is no saved model: {error}") from error
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from error


def _read(file: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        _check_layout(file, archive)
        data: dict[str, bytes] = {}
        for info in archive.infolist():
            if info.filename.endswith(".json") and info.file_size > JSON_BYTES:
                raise LoadError(f"member {info.filename!r} has {info.file_size} bytes; at most {JSON_BYTES} are read")
            data[info.filename] = archive.read(info)
    if MANIFEST not in data:
        raise LoadError(f"it has no {MANIFEST}; was it written by sparsec.save?")
    manifest = loads(data.pop(MANIFEST), MANIFEST)
    _check_manifest(manifest, data)
    return manifest, data


def _check_layout(file: Any, archive: zipfile.ZipFile) -> None:
    """Members are stored, plain, known, unique, and fill the file from its first byte to the directory at its end."""
    infos = archive.infolist()
    if len(infos) > MEMBERS:
        raise LoadError(f"it has {len(infos)} members; at most {MEMBERS}")
    seen: set[str] = set()
    for info in infos:
        name = info.orig_filename
        if not _NAME.fullmatch(name):
            raise LoadError(f"member {name!r:.100} is none of a saved model's; nothing was extracted")
        if name in seen:
            raise LoadError(f"member {name!r} appears twice")
        seen.add(name)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise LoadError(f"member {name!r} is compressed; saved models are stored plainly")
        mode = info.external_attr >> 16
        if info.flag_bits & ~0x800 or (mode and not stat.S_ISREG(mode)):
            raise LoadError(f"member {name!r} is encrypted, streamed, a link or a folder; only plain files are read")
    size = file.seek(0, os.SEEK_END)
    place = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        file.seek(info.header_offset)
        head = file.read(_LOCAL.size)
        if info.header_offset != place or len(head) != _LOCAL.size:
            raise LoadError(f"member {info.filename!r} overlaps another one, or bytes lie between them")
        fields = _LOCAL.unpack(head)
        place += _LOCAL.size + fields[-2] + fields[-1] + info.file_size
    file.seek(archive.start_dir)
    directory = sum(46 + len(i.orig_filename.encode()) + len(i.extra) + len(i.comment) for i in infos)
    rest = size - archive.start_dir - directory
    if place != archive.start_dir or archive.comment or rest not in (_END, _END + _END64):
        raise LoadError("there are bytes before, between or behind its members")


def _check_manifest(manifest: Any, data: Mapping[str, bytes]) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LoadError(f"its manifest is not that of a {FORMAT}; was it written by sparsec.save?")
    version = manifest.get("version")
    if version != VERSION or type(version) is not int:
        by = f"sparsec {manifest.get('sparsec')!s:.20}"
        if type(version) is int and version > VERSION:
            raise LoadError(f"format version {version} (written by {by}) is newer than {VERSION}: update sparsec")
        raise LoadError(
            f"format version {version!r:.20} (written by {by}) is not {VERSION}, which this sparsec reads; "
            "compile the original model again, or load the file with the sparsec that wrote it"
        )
    table = manifest.get("members")
    if not isinstance(table, dict) or sorted(table) != sorted(data):
        raise LoadError("its manifest lists other members than it has")
    for name, content in data.items():
        known = table[name]
        digest = hashlib.sha256(content).hexdigest()
        if not isinstance(known, dict) or known.get("size") != len(content) or known.get("sha256") != digest:
            raise LoadError(f"member {name!r} is not the one its manifest describes: the file is damaged")


def dumps(value: Any, indent: int | None = None) -> bytes:
    """Strict JSON: no NaN, sorted by insertion, one form for one value."""
    return json.dumps(value, indent=indent, allow_nan=False, separators=None if indent else (",", ":")).encode()


def loads(data: bytes, what: str) -> Any:
    """JSON without duplicate keys, NaN or excessive nesting; LoadError names the member."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{what} is not valid JSON: {error!s:.200}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has one key twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def pack_tensors(tensors: Mapping[str, Any]) -> bytes:
    """Tensors by name as safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    try:
        return bytes(save(dict(tensors)))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise SpecError(f"a tensor of the model cannot be stored: {error}") from error


def unpack_tensors(data: bytes) -> dict[str, Any]:
    """The tensors of a safetensors member; LoadError when sizes, offsets or types in its header are wrong."""
    from safetensors.torch import load

    head = io.BytesIO(data).read(8)
    if len(head) != 8 or int.from_bytes(head, "little") > min(len(data) - 8, JSON_BYTES):
        raise LoadError("tensors.safetensors is cut short")
    loads(data[8 : 8 + int.from_bytes(head, "little")], "the header of tensors.safetensors")
    try:
        return dict(load(data))
    except Exception as error:  # the library raises its own and torch's errors for damaged input
        raise LoadError(f"tensors.safetensors is damaged: {type(error).__name__}: {error!s:.200}") from error
