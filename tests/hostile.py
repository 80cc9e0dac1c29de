"""Mutation fuzzing of everything that reads text or bytes from outside, as a command with totals.

    python tests/hostile.py --seed 0 --cases 100000

Each case damages one valid input at random and demands a typed error or a valid result: never another exception, never
a crash, and never a call of the payload that the damage carries. A failure prints its seed and number, which is all
that is needed to see it again: `--seed S --only N --layer NAME`. Totals add up in a file over runs.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copy
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsec
from sparsec import save_zip
from sparsec.codegen import render
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import FormatError, LoadError, SparsecError, SpecError
from sparsec.formats import BSR, CSR, NM, Bitmask, FanIn, Format, TiledCSL, parse
from sparsec.save import _module, _tensors
from sparsec.save_report import check_report
from sparsec.testing_totals import DEFAULT_PATH, Totals, resume

FLAG = "SPARSEC_TEST_PAYLOAD_RAN"
PAYLOAD = f"__import__('builtins').{FLAG}.append(1)"
STRINGS = (
    "", "x" * 5000, PAYLOAD, f"a); {PAYLOAD} #", f"\n{PAYLOAD}\n", f"{{{{ {PAYLOAD} }}}}", f"${{ {PAYLOAD} }}",
    "<% include '/etc/passwd' %>", "../../etc/passwd", "/etc/passwd", "\0", "'\"\\", "$(touch /tmp/pwned)", "`id`",
    "; rm -rf /", "*/ int main(void) { return 0; } /*", "#include </etc/passwd>", "%s%n", "__class__", "__reduce__",
    "lambda: 0", "self", "_sc_1", "None", "import os", "os.system", "aten.from_file.default", "aten.set_.default",
    "aten.as_strided.default", "aten.linear.default", "sparsec.linear.default", "method:__class__", "operator:setitem",
    "python:eval", "torch:load", "torch:classes", "functional:os", "python:getattr", "cuda:0", "meta", "float128",
    "csr(index_bits=16,block=1)", "dense", "bsr(r=1,c=999999999999)", "\ud800", "é" * 50, "9" * 5000, "nan", "1e999",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, True)


def junk(rng: random.Random) -> Any:
    """A hostile JSON value."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(STRINGS)
    if kind < 5:
        return rng.choice(NUMBERS)
    return rng.choice((None, [], {}, [[]], {"node": "x"}, {"tuple": []}, [None] * 50, {"float": "inf"}, False))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)


def mutate(value: Any, rng: random.Random) -> Any:
    """A deep copy of a JSON value with one to three places replaced, removed, duplicated, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return junk(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2 and isinstance(holder, dict):
            holder[str(junk(rng))] = holder.pop(key)
        elif kind == 3:
            other, place = rng.choice(places)
            if key in holder if isinstance(holder, dict) else key < len(holder):
                with contextlib.suppress(KeyError, IndexError):
                    holder[key] = copy.deepcopy(other[place])
        elif kind == 4 and type(holder[key]) is int:
            holder[key] += rng.choice((-1, 1, 7, 1 << 16))
        elif kind == 5 and isinstance(holder[key], str) and holder[key]:
            holder[key] = scramble(holder[key], rng)
        else:
            holder[key] = junk(rng)
    return value


def scramble(text: str, rng: random.Random) -> str:
    """A text with characters replaced, removed or inserted."""
    parts = list(text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(parts) + 1)
        parts[at : at + rng.randrange(2)] = [rng.choice((*"(),=[]{}\"'\\\n;0129az_.-$%#", rng.choice(STRINGS)[:40]))]
    return "".join(parts)


def scramble_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated, inserted or exchanged."""
    kind, changed = rng.randrange(6), bytearray(data)
    at = rng.randrange(len(changed))
    if kind == 0:
        return bytes(changed[:at])
    if kind == 1:
        changed[at:at] = rng.randbytes(rng.randint(1, 64))
    elif kind == 2:
        changed[at : at + 64] = changed[rng.randrange(len(changed)) :][:64]
    elif kind == 3:
        del changed[at : at + rng.randint(1, 16)]
    else:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


class Net(nn.Module):
    """Two packed weights, one of them folded, a dynamic batch, an argument with a default, and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))

    def forward(self, x: torch.Tensor, gain: float = 2.0) -> dict[str, Any]:
        return {"y": self.b(torch.relu(self.a(x))) * gain, "s": (x.sum(-1), [x.reshape(-1, 16)])}


class Fuzzer:
    """One valid input of every kind, and the layers that damage them. `run` gives "refused" or "accepted"."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        net = Net().eval()
        with torch.no_grad():
            net.a.weight[torch.rand(32, 32) < 0.8] = 0
            net.b.parametrizations.weight.original1[torch.rand(32, 32) < 0.8] = 0
        self.x = torch.randn(4, 32)
        cm = sparsec.compile(net, None, (self.x,), dynamic_shapes="batch", tune="off", min_speedup=0)
        self.folder, self.path = folder, sparsec.save(cm, folder / "good")
        self.bytes = self.path.read_bytes()
        self.manifest, self.members = save_zip.read(self.path)
        self.document = json.loads(self.members["graph.json"])
        self.report = json.loads(self.members["report.json"])
        self.stored = save_zip.unpack_tensors(self.members["tensors.safetensors"])
        self.kernel = self.document["installed"][0]["kernels"][0][1]
        self.formats = [
            fmt.resolve(24, 40) for fmt in (CSR(block=16), Bitmask(), BSR(4, 2), NM(2, 4), FanIn(10), TiledCSL())
        ]
        self.packed = [(fmt, self._pack(fmt)) for fmt in self.formats]
        self.layers: dict[str, Callable[[random.Random], str]] = {
            "container": self.container, "member": self.member, "graph": self.graph, "call": self.call,
            "report": self.read_report, "kernel": self.kernel_text, "format": self.format_text,
            "validate": self.validate,
        }  # fmt: skip

    def _pack(self, fmt: Format) -> dict[str, torch.Tensor]:
        weight = torch.randn(24, 40)
        if fmt.name == "nm":
            weight = weight * torch.tensor([1.0, 0, 1, 0]).repeat(10)
        elif fmt.name == "fan_in":
            weight = weight * (torch.arange(40) % 4 == 0)
        else:
            weight[torch.rand(24, 40) < 0.6] = 0
        return fmt.resolve(24, 40).pack(weight)

    def container(self, rng: random.Random) -> str:
        """Bytes of the file: most damage is found by the container, the rest by its hashes."""
        place = self.folder / "bad"
        place.write_bytes(scramble_bytes(self.bytes, rng))
        return _typed(lambda: save_zip.read(place), LoadError)

    def member(self, rng: random.Random) -> str:
        """Bytes of one member, with hashes made to fit."""
        name = rng.choice(["graph.json", "tensors.safetensors", "report.json", "history.json"])
        data = scramble_bytes(self.members[name], rng)
        if name == "tensors.safetensors":
            return _typed(lambda: _tensors(self.document["tensors"], save_zip.unpack_tensors(data)), LoadError)
        return _typed(lambda: save_zip.loads(data, name), LoadError)

    def graph(self, rng: random.Random) -> str:
        """The parsed document: everything but building the kernels."""
        document = self.document if rng.random() < 0.6 else self._focused(rng)
        damaged = mutate(document, rng) if document is self.document else document

        def build() -> None:
            if not isinstance(damaged, dict) or set(damaged) != set(self.document):
                raise LoadError("keys")
            _module(damaged, _tensors(damaged["tensors"], dict(self.stored)), {})

        return _typed(build, SparsecError)

    def _focused(self, rng: random.Random) -> Any:
        """Damage below one key, since most of a document is its graph."""
        key = rng.choice(sorted(self.document))
        return {**self.document, key: mutate(self.document[key], rng)}

    def call(self, rng: random.Random) -> str:
        """The whole load, and where it succeeds one call, which may raise what torch raises but must return."""
        document = self._focused(rng)
        members = {**self.members, "graph.json": json.dumps(document).encode()}
        place = self.folder / "whole"
        try:
            save_zip.write(place, members, {"sparsec": "0", "torch": "0"})
        except ValueError:
            return "refused"
        found: list[Any] = []
        state = _typed(lambda: found.append(sparsec.load(place)), SparsecError)
        for model in found:
            try:
                with torch.no_grad():
                    model(self.x)
            except (SparsecError, RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
                return "refused at the call"
            except NotImplementedError:
                return "refused at the call"
        return state

    def read_report(self, rng: random.Random) -> str:
        damaged = mutate(self.report, rng)

        def read() -> None:
            report = check_report(damaged)
            report.to_json()
            report.totals()

        return _typed(read, LoadError)

    def kernel_text(self, rng: random.Random) -> str:
        text = json.dumps(mutate(json.loads(self.kernel), rng)) if rng.random() < 0.7 else scramble(self.kernel, rng)

        def read() -> None:
            spec = KernelSpec.parse(text)
            render.check(spec)
            if max(spec.out_features, spec.in_features) < 5000 and spec.variant == "linear_csr":
                out = render.render(spec).text
                if FLAG in out or "passwd" in out:
                    raise AssertionError("the payload reached the generated source")

        return _typed(read, SpecError)

    def format_text(self, rng: random.Random) -> str:
        fmt = rng.choice(self.formats)
        text = scramble(fmt.text(), rng) if rng.random() < 0.9 else str(rng.choice(STRINGS))
        return _typed(lambda: parse(text), SpecError)

    def validate(self, rng: random.Random) -> str:
        """Buffers with damaged numbers, shapes, dtypes: refused, or unpacked inside the matrix."""
        fmt, good = rng.choice(self.packed)
        buffers = {k: v.clone() for k, v in good.items()}
        for _ in range(rng.randint(1, 2)):
            key = rng.choice(sorted(buffers))
            buffers[key] = _damage(buffers[key], rng)
        if rng.random() < 0.05:
            buffers.pop(rng.choice(sorted(buffers)))
        rows, cols = rng.choice(((24, 40), (24, 40), (24, 40), (25, 40), (24, 41), (0, 40), (24, 2**31 - 1)))

        def check() -> None:
            fmt.validate(buffers, rows, cols)
            if cols < 100:
                fmt.unpack(buffers, rows, cols)

        return _typed(check, FormatError)


def _damage(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    kind = rng.randrange(7)
    if kind == 0:
        return tensor.to(rng.choice((torch.int64, torch.int16, torch.float32, torch.uint8, torch.bool)))
    if kind == 1:
        return tensor[: rng.randrange(tensor.shape[0] + 1)].clone()
    if kind == 2:
        return torch.cat([tensor, tensor[:1]])
    if kind == 3:
        return tensor.unsqueeze(0) if rng.random() < 0.5 else tensor.t() if tensor.dim() == 2 else tensor.flip(0)
    flat = tensor.reshape(-1)
    if flat.numel() and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        top = torch.iinfo(tensor.dtype)
        for _ in range(rng.randint(1, 3)):
            value = rng.choice((0, 1, 39, 40, 41, top.max, top.min, rng.randint(top.min, top.max), -1))
            flat[rng.randrange(flat.numel())] = max(top.min, min(top.max, value))
    return tensor


def _typed(action: Callable[[], object], expected: type[Exception]) -> str:
    try:
        action()
    except expected:
        return "refused"
    return "accepted"


SHARES = {
    "format": 250, "member": 250, "validate": 200, "kernel": 120, "report": 120, "container": 48, "graph": 10,
    "call": 2,
}  # fmt: skip
"""Cases of each layer among a thousand: the cheap ones often, whole loads with a call twice."""


def check(fuzzer: Fuzzer, seed: int, layer: str, number: int) -> tuple[str, str]:
    """Outcome of one case, which follows from (seed, layer, number) alone, and what is wrong, or ""."""
    name, wrong = f"--seed {seed} --layer {layer} --only {number}", ""
    try:
        outcome = fuzzer.layers[layer](random.Random(f"{seed}/{layer}/{number}"))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # every untyped exception is a finding
        outcome, wrong = "failed", f"{name}: {type(error).__name__}: {error!s:.200}"
    if getattr(builtins, FLAG):
        getattr(builtins, FLAG).clear()
        wrong = f"{name}: the payload ran"
    return outcome, wrong


def run(seed: int, cases: int, layers: list[str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Totals {layer: {outcome: count}} and failures of `cases` of every layer, and a fiftieth of whole loads."""
    with fuzzing() as fuzzer:
        wanted = {layer: cases // 50 if layer == "call" else cases for layer in layers or fuzzer.layers}
        return count(fuzzer, seed, {layer: range(share) for layer, share in wanted.items()})


def count(fuzzer: Fuzzer, seed: int, wanted: dict[str, range]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Totals {layer: {outcome: count}} and failures of the given cases."""
    totals: dict[str, dict[str, int]] = {layer: {} for layer in wanted}
    failures: list[str] = []
    for layer, numbers in wanted.items():
        for number in numbers:
            outcome, wrong = check(fuzzer, seed, layer, number)
            totals[layer][outcome] = totals[layer].get(outcome, 0) + 1
            failures += [wrong] if wrong else []
    return totals, failures


@contextlib.contextmanager
def fuzzing() -> Iterator[Fuzzer]:
    """A Fuzzer with its folder in memory where there is one, and the payload's flag."""
    setattr(builtins, FLAG, [])
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Fuzzer(Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000, help="in all, with those already recorded")
    parser.add_argument("--layer", default="", help="with --only")
    parser.add_argument("--only", type=int, default=None, help="one case, with its traceback")
    parser.add_argument("--totals", type=Path, default=DEFAULT_PATH, help="JSON file that runs add to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no block after this long")
    options = parser.parse_args()
    with fuzzing() as fuzzer:
        if options.only is not None:
            print(fuzzer.layers[options.layer](random.Random(f"{options.seed}/{options.layer}/{options.only}")))
            return 1 if getattr(builtins, FLAG) else 0

        def block(number: int) -> tuple[dict[str, Any], list[str]]:
            numbers = {layer: range(number * share, (number + 1) * share) for layer, share in SHARES.items()}
            totals, failures = count(fuzzer, options.seed, numbers)
            return {"mutations": sum(SHARES.values()), "layers": totals}, failures

        record = resume(
            Totals(options.totals), "hostile", options.seed, options.cases, "mutations", block, options.seconds
        )
    for layer, counts in record.get("layers", {}).items():
        print(f"{layer:<10} " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    print(f"seed {options.seed}: {record.get('mutations', 0)} mutations, {len(record['failures'])} failures")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
