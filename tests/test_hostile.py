"""Files, texts and names from strangers: refused with a typed error, and never run."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from torch import nn

import sparsec
from sparsec import save_zip
from sparsec.codegen import toolchain
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import LoadError, SpecError
from sparsec.install import compiled_graphs, ledger
from sparsec.save_ops import ATEN, target_of
from sparsec.save_values import decode, expression, identifier


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.Fuzzer(tmp_path_factory.mktemp("hostile")).path


def test_mutations_are_refused_or_valid() -> None:
    totals, failures = hostile.run(seed=11, cases=100, layers=[])
    assert failures == []
    assert all(counts.get("refused", 0) for counts in totals.values()), totals
    assert getattr(builtins, hostile.FLAG) == []


# The container


def _archive(members: list[tuple[zipfile.ZipInfo, bytes]], comment: bytes = b"") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for info, content in members:
            archive.writestr(info, content)
        archive.comment = comment
    return data.getvalue()


def _members(path: Path) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def _named(name: str, mode: int = stat.S_IFREG | 0o644, compression: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.external_attr, info.compress_type = mode << 16, compression
    return info


def _bomb(good: bytes) -> bytes:
    """The size of the first member in the directory says a terabyte."""
    at = good.rindex(b"PK\x01\x02", 0, good.index(b"PK\x05\x06"))
    return good[: at + 24] + struct.pack("<I", 2**31) + good[at + 28 :]


CONTAINERS: dict[str, tuple[Callable[[bytes, list[Any]], bytes], str]] = {
    "traversal": (lambda g, m: _archive([*m, (_named("../../evil"), b"x")]), "none of a saved model's"),
    "absolute": (lambda g, m: _archive([*m, (_named("/etc/evil"), b"x")]), "none of a saved model's"),
    "backslash": (lambda g, m: _archive([*m, (_named("kernels\\..\\evil.c"), b"x")]), "none of a saved model's"),
    "newline": (lambda g, m: _archive([*m, (_named("graph.json\n"), b"x")]), "none of a saved model's"),
    "stranger": (lambda g, m: _archive([*m, (_named("setup.py"), b"x")]), "none of a saved model's"),
    "twice": (lambda g, m: _archive([*m, m[1]]), "appears twice"),
    "symlink": (lambda g, m: _archive([*m[:-1], (_named(m[-1][0].filename, stat.S_IFLNK | 0o777), b"x")]), "link"),
    "deflated": (
        lambda g, m: _archive([*m[:-1], (_named(m[-1][0].filename, compression=zipfile.ZIP_DEFLATED), b"0" * 10**6)]),
        "compressed",
    ),
    "comment": (lambda g, m: _archive(m, comment=b"hello"), "bytes before, between or behind"),
    "trailing": (lambda g, m: g + b"\0" * 30, "no saved model|bytes before"),
    "leading": (lambda g, m: b"#!/bin/sh\n" + g, "overlaps|no saved model|bytes lie between"),
    "bomb": (lambda g, m: _bomb(g), "compressed|overlaps|bytes"),
    "cut": (lambda g, m: g[: len(g) // 2], "no saved model"),
    "empty": (lambda g, m: b"", "no saved model"),
    "pickle": (lambda g, m: b"\x80\x04\x95\x00\x00", "no saved model"),
    "no manifest": (lambda g, m: _archive(m[1:]), "no manifest.json"),
    "no graph": (lambda g, m: _archive([m[0], *m[2:]]), "lists other members"),
    "other content": (lambda g, m: _archive([m[0], (m[1][0], b"{}"), *m[2:]]), "the file is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_containers_are_read_strictly(name: str, saved: Path, tmp_path: Path) -> None:
    make, message = CONTAINERS[name]
    place = tmp_path / "bad"
    place.write_bytes(make(saved.read_bytes(), _members(saved)))
    with pytest.raises(LoadError, match=message):
        sparsec.load(place)
    assert list(tmp_path.iterdir()) == [place]


def test_overlapping_members_are_refused(saved: Path, tmp_path: Path) -> None:
    """Two directory entries for one stored member: the cheapest zip bomb."""
    good = bytearray(saved.read_bytes())
    first = good.index(b"PK\x01\x02")
    second = good.index(b"PK\x01\x02", first + 4)
    good[second + 42 : second + 46] = good[first + 42 : first + 46]
    (tmp_path / "bad").write_bytes(bytes(good))
    with pytest.raises(LoadError, match="overlaps"):
        sparsec.load(tmp_path / "bad")


# The document


def _edited(saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    _, members = save_zip.read(saved)
    document = json.loads(members["graph.json"])
    change(document)
    place = tmp_path / "edited"
    save_zip.write(place, {**members, "graph.json": json.dumps(document).encode()}, {"sparsec": "0"})
    return place


def _call_of(document: dict[str, Any]) -> list[Any]:
    return next(n for n in document["graph"] if n[2].startswith("sparsec."))


def _first(document: dict[str, Any], op: str) -> list[Any]:
    return next(n for n in document["graph"] if n[0] == op)


def _set_kernel(document: dict[str, Any], **fields: Any) -> None:
    record = document["installed"][0]
    old = record["kernels"][0][1]
    new = dataclasses.replace(KernelSpec.parse(old), **fields).text()
    record["kernels"][0][1] = new
    for node in document["graph"]:
        node[3] = [new if a == old else a for a in node[3]]


DOCUMENTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown op": (lambda d: d["graph"][-2].__setitem__(2, "aten.from_file.default"), "may not call"),
    "in place": (lambda d: d["graph"][-2].__setitem__(2, "aten.relu_.default"), "may not call"),
    "other library": (lambda d: d["graph"][-2].__setitem__(2, "prim.device.default"), "may not call"),
    "python": (lambda d: d["graph"][-2].__setitem__(2, "python:eval"), "may not call"),
    "module": (lambda d: d["graph"][-2].__setitem__(0, "call_module"), "no kind of node"),
    "size as code": (lambda d: d["call"].__setitem__("conditions", [hostile.PAYLOAD]), "no size expression"),
    "parameter as code": (
        lambda d: d["call"]["parameters"][0].__setitem__("name", f"x=({hostile.PAYLOAD})"), "not a usable identifier",
    ),
    "class as code": (lambda d: d["call"].__setitem__("owner", "A(B)"), "not a usable identifier"),
    "input as code": (lambda d: _first(d, "placeholder").__setitem__(2, "*x"), "identifier"),
    "output class": (lambda d: d.update(output={"output": "os:system", "keys": [], "children": []}), "no output"),
    "swapped buffers": (lambda d: _call_of(d)[3].__setitem__(1, [{"node": "x"}]), "attributes of the model"),
    "other kernel": (lambda d: _call_of(d)[3].__setitem__(4, "[]"), "belong to no packed weight"),
    "wider kernel": (lambda d: _set_kernel(d, in_features=64), "does not fit its weight"),
    "other fields": (lambda d: _set_kernel(d, fields=(("index_bits", 32), ("block", 32))), "its fields are not those"),
    "another variant": (lambda d: _set_kernel(d, variant="linear_bitmask"), "reads format bitmask"),
    "no such variant": (lambda d: _set_kernel(d, variant="linear_evil"), "no kernel variant"),
    "variant as path": (lambda d: _set_kernel(d, variant="../evil"), "not an identifier"),
    "huge tile": (lambda d: _set_kernel(d, tile=(("one_thread", 2**40),)), "out of range"),
    "other shape": (lambda d: d["installed"][0].__setitem__("shape", [16, 64]), "installed|does not fit|site"),
    "lost tensor": (lambda d: d["tensors"].popitem(), "list different tensors"),
    "extra key": (lambda d: d.__setitem__("code", "import os"), "is not an object with the keys"),
    "module attribute": (
        lambda d: d["root"].update(forward=d["root"].pop(next(iter(d["root"])))), "has no tensor|name that modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_checked(name: str, saved: Path, tmp_path: Path) -> None:
    change, message = DOCUMENTS[name]
    with pytest.raises(LoadError, match=message):
        sparsec.load(_edited(saved, tmp_path, change))


def test_indices_of_a_file_are_validated(saved: Path, tmp_path: Path) -> None:
    _, members = save_zip.read(saved)
    tensors = save_zip.unpack_tensors(members["tensors.safetensors"])
    indices = next(t for name, t in tensors.items() if name.endswith("_indices"))
    indices[0] = 30_000
    save_zip.write(tmp_path / "bad", {**members, "tensors.safetensors": save_zip.pack_tensors(tensors)}, {})
    with pytest.raises(LoadError, match=r"site '.*': csr: buffer 'indices'"):
        sparsec.load(tmp_path / "bad")


def test_a_file_cannot_write_its_packed_buffers(saved: Path, tmp_path: Path) -> None:
    def overwrite(document: dict[str, Any]) -> None:
        call = _call_of(document)
        target = call[3][1][1]
        at = document["graph"].index(call)
        document["graph"].insert(at, ["call_function", "evil", "aten.copy_.default", [target, {"node": "x"}], {}, {}])

    with pytest.raises(LoadError, match="writes a packed buffer"):
        sparsec.load(_edited(saved, tmp_path, overwrite))


@pytest.mark.parametrize(
    "name", ["from_file", "set_", "as_strided", "empty", "resize_", "_cudnn_rnn", "save", "_foobar"]
)
def test_dangerous_ops_are_in_no_table(name: str) -> None:
    assert name not in ATEN
    with pytest.raises(LoadError):
        target_of("call_function", f"aten.{name}.default")


@pytest.mark.parametrize("text", hostile.STRINGS)
def test_hostile_strings_are_no_names_and_no_expressions(text: str) -> None:
    for read in (
        lambda: expression(text, ("s0",)),
        lambda: identifier(text, "name"),
        lambda: sparsec.formats.parse(text),
    ):
        try:
            read()
        except (LoadError, SpecError):
            continue
        assert text.isidentifier() or text in ("csr(index_bits=16,block=1)", "dense") or text.isdigit(), text


@pytest.mark.parametrize("text", ["s0 + 1", "2*s0 - 3", "max(s0, 4) // 2 == 8", "s0 % 8 == 0 and not s0 < 2"])
def test_size_expressions_pass(text: str) -> None:
    assert expression(text, ("s0",)) == text


@pytest.mark.parametrize(
    "text", ["s1", "s0.__class__", "s0[0]", "s0 ** 9", "(lambda: 1)()", "max(key=s0)", "f'{s0}'", "1\n"]
)
def test_other_expressions_do_not(text: str) -> None:
    with pytest.raises(LoadError):
        expression(text, ("s0",))


def test_arguments_nest_within_limits() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(LoadError, match="nest deeper"):
        decode(deep, lambda name: None)


# Names


def _names(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        base = rng.choice([s for s in hostile.STRINGS if 0 < len(s) < 200 and s != "\ud800"])
        name = hostile.scramble(base, rng).replace(".", "_")
        if name and not hasattr(nn.ModuleDict, name):
            found[f"{name}{len(found)}"] = None
    return list(found)


class Named(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize(("count", "rounds"), [(40, 1), pytest.param(200, 50, marks=pytest.mark.soak)])
def test_hostile_names_reach_no_template_and_no_command(
    count: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Module names with quotes, newlines and template, C and shell syntax: the kernels are those of plain names."""
    commands: list[str] = []
    real = toolchain.run

    def spy(command: Any, folder: Any, seconds: float) -> Any:
        commands.append("\0".join(command))
        return real(command, folder, seconds)

    monkeypatch.setattr(toolchain, "run", spy)
    setattr(builtins, hostile.FLAG, [])
    x = torch.randn(2, 16)
    for number in range(rounds):
        names = _names(count, number)
        texts = []
        for given in ([f"m{i}" for i in range(count)], names):
            torch.manual_seed(0)
            model = Named(given).eval()
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() == 2:
                        p[torch.rand_like(p) < 0.8] = 0
            cm = sparsec.compile(model, None, (x,), tune="off", min_speedup=0, capture="trace")
            found = [text for _, gm in compiled_graphs(cm) for r in ledger(gm).installed for _, text in r.kernels]
            texts.append(sorted(found))
        assert texts[0] == texts[1] and len(texts[0]) == count
        assert "<script" not in sparsec.report(cm).to_html()
        loaded = sparsec.load(sparsec.save(cm, tmp_path / f"m'\"$(id)\n{number}"))
        assert torch.equal(loaded(x), cm(x)) and list(sparsec.dense_state_dict(loaded)) == list(model.state_dict())
    assert getattr(builtins, hostile.FLAG) == []
    plain = ("k_", "smoke", "--version", "/dev/null")
    assert not [
        c
        for c in commands
        if "touch" in c or hostile.FLAG in c or not any(p in c for p in (*plain, "--version", "/dev/null"))
    ]
