"""Expert load: what routers choose, counted against the definition, for gates, routers and stacked experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsec.errors import InputError, SpecError
from sparsec.sparsifiers import Calibration, Wanda, calibrate, expert_load, sparsify


class Mixture(nn.Module):
    """A linear gate whose parent chooses two of five experts; experts are modules."""

    def __init__(self, width: int = 6, experts: int = 5) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]) * shares[rows, place, None])
        return x + out.reshape(x.shape)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixture() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.topk(4).values @ x.new_ones(4, 6)).sort(-1).values  # choices that are no router's


def counted(gate: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return gate(x).topk(2).indices.reshape(-1).bincount(minlength=5)


def test_a_gate_is_counted_over_all_batches_and_the_experts_agree() -> None:
    model, batches = Model(), [torch.randn(3, 4, 6), torch.randn(7, 2, 6)]
    loads = expert_load(model, batches)
    assert sorted(loads) == ["blocks.0.gate", "blocks.1.gate"]
    x = torch.cat([b.reshape(-1, 6) for b in batches])
    first = loads["blocks.0.gate"]
    assert torch.equal(first.counts, counted(model.blocks[0].gate, x)) and (first.rows, first.chosen) == (26, 2.0)
    assert torch.equal(loads["blocks.1.gate"].counts, counted(model.blocks[1].gate, model.blocks[0](x)))
    stats = calibrate(model, batches, needs=("load",))
    for block in range(2):
        rows = [stats[f"blocks.{block}.experts.{e}"] for e in range(5)]
        assert [r.rows if r else 0 for r in rows] == loads[f"blocks.{block}.gate"].counts.tolist()
        assert torch.equal(stats[f"blocks.{block}.gate"].get("load"), loads[f"blocks.{block}.gate"].counts)  # type: ignore[union-attr]
    assert len(stats["head"].get("load")) == 0  # type: ignore[union-attr]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_padding_does_not_count() -> None:
    model, x = Model(), torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    first = expert_load(model, [{"x": x, "attention_mask": mask}])["blocks.0.gate"]
    assert torch.equal(first.counts, counted(model.blocks[0].gate, x[mask != 0])) and first.rows == 8


def test_what_a_load_says() -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[0].gate.weight[:] = 0
        model.blocks[0].gate.weight[3] = 1
        model.blocks[0].gate.weight[1, 0] = -1e-3
    load = expert_load(model, [torch.rand(10, 6) + 0.1])["blocks.0.gate"]
    assert int(load.counts[3]) == 10 and float(load.share.sum()) == pytest.approx(1)
    assert load.imbalance == pytest.approx(2.5) and 1 in load.unused and 3 not in load.unused
    assert str(load).startswith("blocks.0.gate: 10 tokens, 2 experts each; load in %:")


class SwitchRouter(nn.Module):
    """Chooses inside its own forward, a group of experts first, by argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x @ self.weight.T).softmax(-1)
        best = scores.unflatten(-1, (2, 3)).amax(-1).topk(1).indices  # groups of experts are no experts
        mask = torch.zeros_like(scores).unflatten(-1, (2, 3)).scatter(-2, best[..., None].expand(-1, -1, 3), 1.0)
        scores.topk(3)  # a first thought, which does not count
        return (scores * mask.flatten(-2)).argmax(-1)


def test_the_last_choice_of_a_router_counts() -> None:
    model, x = nn.Sequential(SwitchRouter()), torch.randn(40, 8)
    (load,) = expert_load(model, [x[:25], x[25:]]).values()
    assert (load.site, load.rows, load.chosen) == ("0", 40, 1.0)
    assert torch.equal(load.counts, model(x).bincount(minlength=6))


def test_mixtral_has_stacked_experts_and_its_own_router() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=50,
    )  # fmt: skip
    model: Any = hf.MixtralModel(config).eval()
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    handle = model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: seen.append(out[2]))
    loads = expert_load(model, [{"input_ids": ids}])
    handle.remove()
    assert sorted(loads) == ["layers.0.mlp.gate", "layers.1.mlp.gate"]
    assert torch.equal(loads["layers.0.mlp.gate"].counts, seen[0].reshape(-1).bincount(minlength=4))


def test_experts_that_no_token_reaches_are_reported_and_stay() -> None:
    model = Mixture()
    with torch.no_grad():
        model.gate.weight[:] = torch.arange(5.0)[:, None]
    pruned = sparsify(model, Wanda(0.5), data=[torch.rand(20, 6)])
    rows = {r["site"]: r for r in pruned._sparsec_report}
    for number in (0, 1, 2):
        assert "never reach" in rows[f"experts.{number}"]["reason"] and rows[f"experts.{number}"]["density"] == 1
        assert torch.equal(pruned.experts[number].weight, model.experts[number].weight)
    assert rows["experts.4"]["density"] == 0.5


def test_bad_data_is_a_typed_error() -> None:
    with pytest.raises(InputError, match="calibration saw nothing"):
        expert_load(Model(), [])
    with pytest.raises(InputError, match="cannot run on calibration batch 0"):
        expert_load(Model(), [torch.randn(2, 9)])
    with pytest.raises(SpecError, match="collected no load"):
        calibrate(nn.Linear(2, 2), torch.randn(3, 2))["<root>"].get("load")  # type: ignore[union-attr]
    assert expert_load(nn.Linear(2, 2), Calibration(torch.randn(3, 2))) == {}
