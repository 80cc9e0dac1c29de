"""Coverage-guided fuzzing of the parsers that read strangers' bytes, with libFuzzer through atheris.

    pip install atheris; python tests/hostile_atheris.py --runs 100000

Each parser runs in a process of its own, because libFuzzer ends the process; a corpus of valid inputs and of hostile
strings is where it starts. An untyped exception stops it with the input that provoked it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hostile

from sparsec import save_zip
from sparsec.codegen import render
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import FormatError, LoadError, SpecError
from sparsec.formats import parse
from sparsec.save_report import check_report
from sparsec.save_values import decode, expression, identifier
from sparsec.testing_totals import DEFAULT_PATH, Totals


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape" if data[:1] == b"s" else "replace")


def _kernel(data: bytes) -> None:
    render.check(KernelSpec.parse(_text(data)))


def _argument(data: bytes) -> None:
    decode(save_zip.loads(data, "graph.json"), lambda name: name)


def _report(data: bytes) -> None:
    check_report(save_zip.loads(data, "report.json")).to_json()


def _container(data: bytes) -> None:
    place = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()) / "sparsec-atheris"
    place.write_bytes(data)
    save_zip.read(place)


PARSERS: dict[str, tuple[Callable[[bytes], object], type[Exception]]] = {
    "format": (lambda data: parse(_text(data)), SpecError),
    "kernel": (_kernel, SpecError),
    "expression": (lambda data: expression(_text(data), ("s0",)), LoadError),
    "identifier": (lambda data: identifier(_text(data), "name"), LoadError),
    "argument": (_argument, LoadError),
    "report": (_report, LoadError),
    "tensors": (save_zip.unpack_tensors, LoadError),
    "container": (_container, LoadError),
}


def corpus(name: str, fuzzer: hostile.Fuzzer) -> list[bytes]:
    """Inputs to start from."""
    texts = {
        "format": [fmt.text() for fmt in fuzzer.formats],
        "kernel": [fuzzer.kernel],
        "expression": ["s0 + 1", "2*s0 - 3", "max(s0, 4) // 2 == 8", "s0 % 8 == 0 and not s0 < 2"],
        "identifier": ["x", "layer_1", "é"],
        "argument": [json.dumps(node[3]) for node in fuzzer.document["graph"]],
        "report": [json.dumps(fuzzer.report)],
    }
    if name == "tensors":
        return [fuzzer.members["tensors.safetensors"]]
    if name == "container":
        return [fuzzer.bytes]
    strings = [s.encode("utf-8", "replace") for s in hostile.STRINGS] if name != "report" else []
    return [t.encode() for t in texts[name]] + strings


def one(name: str, runs: int, folder: str) -> None:
    """Fuzz one parser; never returns."""
    import atheris  # type: ignore[import-not-found]

    parser, expected = PARSERS[name]

    def test(data: bytes) -> None:
        try:
            parser(data)
        except (expected, FormatError):
            return

    for function in (parser, parse, KernelSpec.parse, expression, identifier, decode, check_report, save_zip.loads):
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], f"-runs={runs}", "-seed=1", "-verbosity=0", "-max_len=8192", folder], test)
    atheris.Fuzz()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--runs", type=int, default=10_000, help="of each parser")
    options.add_argument("--parser", action="append", default=[], choices=list(PARSERS))
    options.add_argument("--totals", type=Path, default=DEFAULT_PATH, help="JSON file that runs add to")
    options.add_argument("--child", default="", help=argparse.SUPPRESS)
    options.add_argument("--corpus", default="", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        one(given.child, given.runs, given.corpus)
    failed = 0
    with hostile.fuzzing() as fuzzer, tempfile.TemporaryDirectory() as folder:
        for name in given.parser or PARSERS:
            place = Path(folder) / name
            place.mkdir()
            for number, data in enumerate(corpus(name, fuzzer)):
                (place / str(number)).write_bytes(data)
            command = [sys.executable, __file__, "--child", name, "--runs", str(given.runs), "--corpus", str(place)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            wrong = [] if done.returncode == 0 else [f"{name}: {done.stderr[-1500:]}"]
            failed += bool(wrong)
            Totals(given.totals).add("atheris", 1, {"runs": given.runs, "parsers": {name: given.runs}}, wrong)
            print(f"{name:<10} {given.runs} runs: {'failed' if wrong else 'no failure'}\n{''.join(wrong)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
