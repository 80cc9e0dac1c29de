"""Transformers models from their configs, random weights: compiled whole and by regions, equal to dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude

transformers = pytest.importorskip("transformers")


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(1))}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    t = transformers
    models: dict[str, tuple[Any, Any]] = {
        "bert": (lambda: t.BertModel(t.BertConfig(**small, intermediate_size=64)), ids),
        "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)), ids),
        "opt": (lambda: t.OPTForCausalLM(t.OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32)), ids),
        "llama": (
            lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, intermediate_size=64, num_key_value_heads=2)), ids
        ),
        "vit": (
            lambda: t.ViTModel(
                t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                            image_size=32, patch_size=8)
            ), pixels,
        ),
        "resnet": (
            lambda: t.ResNetForImageClassification(
                t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=40)
            ), pixels,
        ),
        "mobilenet_v2": (
            lambda: t.MobileNetV2ForImageClassification(
                t.MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=40)
            ), pixels,
        ),
    }  # fmt: skip
    make, inputs = models[name]
    return make().eval(), inputs


WHOLE = ("bert", "gpt2", "opt", "llama", "vit", "resnet", "mobilenet_v2")


def first(output: Any) -> torch.Tensor:
    return output[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_equal_dense(name: str, dynamic: bool) -> None:
    model, inputs = build(name)
    model = sparsec.sparsify(model, Magnitude(0.85), where=nn.Linear if name != "gpt2" else None)
    shapes = "batch" if dynamic else None
    cm = sparsec.compile(model, None, example_kwargs=inputs, dynamic_shapes=shapes, tune="off")
    report = sparsec.report(cm)
    assert report.capture["rung"] == "export"
    sparse = [r for r in report.rows if r.decision == "sparse"]
    linears = [r for r in report.rows if r.op == "linear"]
    assert sparse and len(sparse) == sum(r.density < 0.7 for r in linears)
    batches = (inputs,) if not dynamic else (inputs, {k: torch.cat([v, v[:1]]) for k, v in inputs.items()})
    with torch.no_grad():
        for batch in batches:
            got, want = cm(**batch), model(**batch)
            assert type(got) is type(want)
            torch.testing.assert_close(first(got), first(want), rtol=1e-4, atol=1e-5)
    state = sparsec.dense_state_dict(cm)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_by_regions_is_token_for_token_dense(name: str) -> None:
    model, inputs = build(name)
    model = sparsec.sparsify(model, Magnitude(0.8))
    cm = sparsec.compile(model, None, example_kwargs=inputs, capture="regions", tune="off")
    assert isinstance(cm, type(model)) or type(cm).__mro__[1] is type(model)
    report = sparsec.report(cm)
    assert report.capture["rung"] == "regions"
    assert sum(r.decision == "sparse" for r in report.rows) >= 8
    with torch.no_grad():
        for length in (3, 9):
            prompt = inputs["input_ids"][:, :length]
            mask = torch.ones_like(prompt)
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
            assert torch.equal(cm.generate(prompt, **options), model.generate(prompt, **options))
    state = sparsec.dense_state_dict(cm)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


class Branching(nn.Module):
    """Control flow on data: no whole-graph capture can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
        self.second = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if y.sum().item() > 1e9:
            return self.unused(y)
        return self.second(y)


def test_data_dependent_control_flow_is_compiled_by_regions() -> None:
    torch.manual_seed(0)
    model = sparsec.sparsify(Branching().eval(), Magnitude(0.8))
    x = torch.randn(5, 32)
    cm = sparsec.compile(model, None, (x,), tune="off")
    report = sparsec.report(cm)
    assert report.capture["rung"] == "regions"
    assert "test_compile_models.py:" in report.capture["reason"]
    assert report.row("first.0").decision == report.row("second").decision == "sparse"
    assert report.row("unused").decision == "dense" and report.row("unused").code == "SPC0601"
    assert "k_" in sparsec.source(cm, "first.2")
    with torch.no_grad():
        torch.testing.assert_close(cm(x), model(x))
        torch.testing.assert_close(cm(x[:2]), model(x[:2]))
    other = sparsec.sparsify(Branching().eval(), Magnitude(0.7))
    sparsec.load_dense_state_dict(cm, other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(cm(x), other(x))


def test_spec_patterns_are_checked_over_all_regions() -> None:
    torch.manual_seed(0)
    model = sparsec.sparsify(Branching().eval(), Magnitude(0.8))
    x = torch.randn(5, 32)
    cm = sparsec.compile(model, {"second": sparsec.Bitmask(), "first.0": None}, (x,), tune="off")
    assert sparsec.report(cm).row("second").format.startswith("bitmask")
    assert sparsec.report(cm).row("first.0").code == "SPC0200"
    with pytest.raises(sparsec.SpecError, match="'secnd'"):
        sparsec.compile(model, {"secnd": sparsec.Bitmask()}, (x,), tune="off")
