"""What pruning keeps, takes and promises: MiniLM's held-out cosines, memory for a model of OPT-1.3B's size, a budget.

pruning.py minilm    quality and time of every method on real weights, at 50 %, 60 % and 2:4
pruning.py memory    layer by layer: peak memory of true-size layers with random weights, and what 24 of them need
pruning.py budget    prune until the compiled model takes a budget in milliseconds, and time it afresh
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import exclusive, headline, idle, interleave, write_json

import sparsec
from sparsec.sparsifiers import (
    BiasCorrection,
    Calibration,
    DSnoT,
    Magnitude,
    Refit,
    Sensitivity,
    SparseGPT,
    Wanda,
    meet_budget,
)

METHODS: dict[str, Callable[[Any], Any]] = {
    "magnitude": Magnitude,
    "Wanda": Wanda,
    "SparseGPT, sweep alone": lambda target: SparseGPT(target, refit=False),
    "SparseGPT": SparseGPT,
    "SparseGPT + DSnoT": lambda target: Refit(DSnoT(SparseGPT(target))),
    "SparseGPT + bias": lambda target: BiasCorrection(SparseGPT(target)),
}

TARGETS = {"50%": 0.5, "60%": 0.6, "2:4": sparsec.NM(2, 4)}
LAYERS = r"re:encoder\.layer\..*"


def example() -> Any:
    """examples/prune_minilm.py: the same model, text and measure."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import prune_minilm

    return prune_minilm


def loaded() -> tuple[Any, torch.nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    demo = example()
    name = demo.packaged()
    return demo, AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def minilm(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean cosine to the dense embeddings on held-out docstrings; seconds from the call of sparsify to its result."""
    demo, dense, tokenizer = loaded()
    texts, (count, length) = demo.docstrings(), (12, 32) if options.quick else (256, 128)
    seen = demo.batches(tokenizer, texts[::2][:count], length)
    held = demo.batches(tokenizer, texts[1::2][: count // 2], length)
    tokens, reference = sum(int(b["attention_mask"].sum()) for b in seen), demo.embed(dense, held)
    size = sum(map(len, texts[::2][:count])) / 1e3
    print(f"calibration: {count} docstrings of the standard library, {tokens} tokens ({size:.0f} kB); held out: "
          f"{count // 2} others")  # fmt: skip
    targets = [TARGETS[t] for t in (["50%"] if options.quick else options.targets)]
    rows = []
    for target in targets:
        for label, method in METHODS.items():
            if label not in (options.methods or METHODS):
                continue
            begin, busy = time.perf_counter(), time.process_time()
            pruned = sparsec.sparsify(dense, method(target), data=seen, where=LAYERS)
            wall, cpu = time.perf_counter() - begin, time.process_time() - busy
            cosine = float((demo.embed(pruned, held) * reference).sum(-1).mean())
            kept = 1 - float(torch.tensor([r["density"] for r in pruned._sparsec_report]).mean())
            row = {"target": str(target), "method": label, "cosine": cosine, "zeros": kept, "s": wall, "cpu_s": cpu}
            rows.append(row)
            print(f"{target!s:>8} {label:<24} {cosine:.4f}  {wall:5.1f} s ({cpu:5.1f} s of CPU)", flush=True)
    return rows


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """SparseGPT at 50 %, in place and block by block, on layers of OPT-1.3B's size; the peak is the kernel's VmHWM."""
    import transformers

    true_size = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}
    small = {"hidden_size": 64, "ffn_dim": 256, "num_attention_heads": 4, "word_embed_proj_dim": 64, "vocab_size": 500}
    config = transformers.OPTConfig(num_hidden_layers=options.layers, **(small if options.quick else true_size))
    torch.manual_seed(0)
    empty = resident()
    model = transformers.OPTForCausalLM(config).eval()
    blocks = model.model.decoder.layers
    layer = sum(p.nbytes for p in blocks[0].parameters())
    weights = sum(p.nbytes for p in model.parameters())
    ids = torch.randint(5, config.vocab_size, (options.sequences, 32 if options.quick else 512))
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    where = rf"re:model\.decoder\.layers\.(?:{'|'.join(map(str, range(2)))})\..*"
    reset_peak()
    begin = time.perf_counter()
    sparsec.sparsify(model, SparseGPT(0.5), data=Calibration(data, mode="blocks"), where=where, inplace=True)
    seconds, peak = time.perf_counter() - begin, resident("VmHWM")
    missing = 24 - options.layers
    total = peak + missing * layer
    zeros = [float((p == 0).float().mean()) for n, p in blocks[:2].named_parameters() if p.dim() == 2]
    print(f"{options.layers} layers of {layer / 1e6:.0f} MB, {weights / 1e9:.2f} GB in all, {ids.numel()} tokens, fp32")
    print(f"before the model {empty / 1e9:.2f} GB, peak while pruning two layers {peak / 1e9:.2f} GB, {seconds:.0f} s")
    print(f"with 24 layers ({(weights + missing * layer) / 1e9:.2f} GB of weights): {total / 1e9:.2f} GB, "
          f"and {config.hidden_size * 4 / 1e3:.1f} kB for each further token")  # fmt: skip
    return [{"layers": options.layers, "layer_bytes": layer, "weights": weights, "tokens": ids.numel(), "peak": peak,
             "empty": empty, "total_24": total, "s": seconds, "zeros": sum(zeros) / len(zeros)}]  # fmt: skip


def resident(field: str = "VmRSS") -> int:
    """Bytes that this process holds, or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Let VmHWM start again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def own_cache(folder: str | None) -> Iterator[None]:
    """A kernel cache of this benchmark's own, whose timings may be forgotten: a folder, or a temporary one."""
    before = os.environ.get("SPARSEC_CACHE_DIR")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SPARSEC_CACHE_DIR"] = folder or temporary
        try:
            yield
        finally:
            os.environ.pop("SPARSEC_CACHE_DIR")
            if before is not None:
                os.environ["SPARSEC_CACHE_DIR"] = before


def forget_timings() -> None:
    """Let the next compile time every site again; its kernels stay built."""
    shutil.rmtree(Path(os.environ["SPARSEC_CACHE_DIR"]) / "json-decisions", ignore_errors=True)


def known_timings(dense: torch.nn.Module, batch: dict[str, Any], options: argparse.Namespace) -> tuple[Any, float]:
    """Reports of every level, and milliseconds of the dense model; from a file where one was written before."""
    path = Path(options.timings) if options.timings else None
    if path is not None and path.exists():
        data = json.loads(path.read_text(encoding="utf-8"))
        return {float(s): [sparsec.Report.from_dict(r) for r in rs] for s, rs in data["levels"].items()}, data["dense"]
    timings: dict[float, list[sparsec.Report]] = {}
    for _ in range(options.analyses):
        for level in (0.5, 0.9) if options.quick else (0.5, 0.7, 0.8, 0.9):
            forget_timings()
            pruned = sparsec.sparsify(dense, Magnitude(level), where=LAYERS)
            timings.setdefault(level, []).append(sparsec.analyze(pruned, None, example_kwargs=batch))
    dense_ms = 1e3 * interleave({"dense": lambda: dense(**batch)}, options.rounds)["dense"].median
    if path is not None:
        levels = {s: [r.to_dict() for r in rs] for s, rs in timings.items()}
        path.write_text(json.dumps({"levels": levels, "dense": dense_ms}), encoding="utf-8")
    return timings, dense_ms


@torch.inference_mode()
def budget(options: argparse.Namespace) -> list[dict[str, Any]]:
    """MiniLM pruned until it takes a budget, whole or in its layers, then compiled and timed afresh, several times.

    Milliseconds count at the speed that the machine had when the levels were timed: each measurement is taken in turns
    with the dense model, or dense sites, and scaled by what those took then.
    """
    _, dense, _ = loaded()
    ids = torch.randint(1000, 20000, options.shape, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    timings, dense_ms = known_timings(dense, batch, options)
    known = Sensitivity(1.0, "ms", timings=timings)
    all_dense = known.taken(sparsec.Report([]))
    spread = [r.totals().dense_us / 1e3 for reports in timings.values() for r in reports]
    print(f"dense: {dense_ms:.1f} ms, its layers {all_dense:.1f} ms; {min(spread):.1f} to {max(spread):.1f} in "
          f"{len(spread)} analyses")  # fmt: skip

    def whole(pruned: torch.nn.Module) -> float:
        compiled = sparsec.compile(pruned, example_kwargs=batch)
        times = interleave({"dense": lambda: dense(**batch), "sparse": lambda: compiled(**batch)}, options.rounds)
        return dense_ms * times["sparse"].median / times["dense"].median

    def layers(pruned: torch.nn.Module) -> float:
        forget_timings()
        return known.taken(sparsec.report(sparsec.compile(pruned, example_kwargs=batch)))

    measure, full = (whole, dense_ms) if options.of == "model" else (layers, all_dense)
    rows = []
    for share in options.shares:
        wanted = share * full
        met = meet_budget(dense, wanted, Magnitude, timings, measure, where=LAYERS)
        again = []
        print(f"budget {wanted:.2f} ms for the {options.of}, tries (levels chosen for, measured):",
              *(f"({a:.2f}, {t:.2f})" for a, t in met.tries), flush=True)  # fmt: skip
        for _ in range(options.repeats):
            forget_timings()
            again.append(measure(met.model))
            print(f"  compiled afresh: {again[-1]:.2f} ms, {again[-1] / wanted:.3f} of the budget", flush=True)
        levels = sorted({round(1 - r["density"], 2) for r in met.model._sparsec_report})
        rows.append({"of": options.of, "budget_ms": wanted, "tries": met.tries, "again_ms": again,
                     "ratios": [ms / wanted for ms in again], "levels": levels})  # fmt: skip
    return rows


PARTS = {"minilm": minilm, "memory": memory, "budget": budget}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="a row or two of each, to see that it works")
    parser.add_argument("--methods", choices=METHODS, nargs="+", help="minilm: these alone")
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS), help="minilm: these alone")
    parser.add_argument("--layers", type=int, default=2, help="memory: layers that are built; two are pruned")
    parser.add_argument("--sequences", type=int, default=8, help="memory: calibration sequences of 512 tokens")
    parser.add_argument("--shape", type=int, nargs=2, default=(8, 128), help="budget: batch and length")
    parser.add_argument("--rounds", type=int, default=15, help="budget: rounds of timing")
    parser.add_argument("--of", choices=("model", "layers"), default="model", help="budget: what has to take it")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7], help="budget: of the dense time")
    parser.add_argument("--analyses", type=int, default=1, help="budget: reports for each level")
    parser.add_argument("--repeats", type=int, default=3, help="budget: fresh compiles of the result")
    parser.add_argument("--cache", help="budget: a folder for its kernels, to keep them for the next run")
    parser.add_argument("--timings", help="budget: a file of the levels' reports, written where there is none")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until other benchmarks have ended")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    print(f"{headline()}, fp32")
    alone = options.part == "budget" and not options.no_wait  # the other parts run for minutes
    with exclusive() if alone else contextlib.nullcontext():
        if not options.quick and not idle(patience_s=1 if options.no_wait else 20):
            print("the machine is busy: times mean little")
        with own_cache(options.cache):
            rows = PARTS[options.part](options)
    write_json(options.json, f"pruning-{options.part}", rows)


if __name__ == "__main__":
    main()
