"""Dependency groups: the exact slices that go together, one test per pattern, and what is refused where."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from structure_models import Attention, Concat, Grouped, Inverted, Plain, Residual, make
from torch import nn

import sparsec
from sparsec.errors import CaptureError, InputError, SpecError
from sparsec.sparsifiers.structure import Group, dependency_groups

IMAGE = torch.randn(2, 3, 8, 8)


def slices(group: Group) -> dict[tuple[str, int], tuple[tuple[int, ...], ...]]:
    return {(s.parameter, s.dim): s.indices for s in group.slices}


def groups_of(model: nn.Module, *inputs: torch.Tensor) -> dict[str, Group]:
    return {g.name: g for g in dependency_groups(model, inputs)}


@cache
def plain() -> dict[str, Group]:
    return groups_of(Plain(), IMAGE)


def singles(count: int, start: int = 0) -> tuple[tuple[int, ...], ...]:
    return tuple((start + i,) for i in range(count))


def test_a_channel_takes_its_norm_and_its_reader_along():
    groups = plain()
    params = ["first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    want = {(name, 0): singles(8) for name in params} | {("second.weight", 1): singles(8)}
    assert slices(groups["first"]) == want and groups["first"].prunable and groups["first"].kind == "channels"


def test_flatten_gives_each_channel_a_run_of_inputs():
    group = plain()["second"]
    assert slices(group)["head.weight", 1] == tuple(tuple(range(4 * c, 4 * c + 4)) for c in range(6))


def test_inputs_and_outputs_are_fixed_and_say_where():
    groups = plain()
    assert "is an output of the model" in groups["head"].fixed and not groups["head"].permutable
    assert "fixed" in groups["first#2"].fixed and "structure_models.py:" in groups["first#2"].fixed
    assert list(slices(groups["first#2"])) == [("first.weight", 1)]


def test_residual_sums_tie_all_their_producers():
    group = groups_of(Residual(), IMAGE)["stem.0"]
    found = slices(group)
    for key in [
        ("stem.0.weight", 0),
        ("b.0.weight", 0),
        ("short.0.weight", 0),
        ("short.0.weight", 1),
        ("head.weight", 1),
    ]:
        assert found[key] == singles(8)
    assert group.prunable and ("a.0.weight", 1) in found and ("a.0.weight", 0) not in found


def test_concat_readers_hold_each_producer_at_its_offset():
    groups = groups_of(Concat(), IMAGE)
    assert slices(groups["convs.0"])["convs.2.weight", 1] == singles(4, 8)
    assert slices(groups["convs.1"])["convs.2.weight", 1] == singles(4, 12)
    assert slices(groups["convs.1"])["norms.2.weight", 0] == singles(4, 12)
    assert slices(groups["stem"])["head.weight", 1] == singles(8)


def test_depthwise_with_gate_and_multiplier():
    groups = groups_of(Inverted(), IMAGE)
    wide = slices(groups["expand.0.0"])
    assert wide["depth.0.0.weight", 0] == singles(24) and wide["excite.weight", 0] == singles(24)
    assert wide["squeeze.weight", 1] == singles(24) and ("depth.0.0.weight", 1) not in wide
    assert slices(groups["stem.0"])["twice.weight", 0] == tuple((2 * c, 2 * c + 1) for c in range(8))
    assert slices(groups["squeeze"])["excite.weight", 1] == singles(8)


def test_grouped_convolutions_norm_groups_shuffle_and_pixel_shuffle():
    groups = groups_of(Grouped(), IMAGE)
    assert slices(groups["stem"])["stem.weight", 0] == tuple(tuple(range(4 * g, 4 * g + 4)) for g in range(3))
    assert slices(groups["mix"])["mix.weight", 0] == tuple((i, 4 + i, 8 + i) for i in range(4))
    assert slices(groups["mix"])["left.weight", 1] == singles(4)
    assert slices(groups["right"])["up.weight", 0] == tuple((i, 4 + i) for i in range(4))
    assert slices(groups["up"])["head.weight", 1] == singles(2)
    assert slices(groups["up"])["up.weight", 1] == (tuple(range(4)), tuple(range(4, 8)))


def test_fused_attention_heads_and_gated_halves():
    groups = groups_of(Attention(), torch.randn(2, 5, 6))
    heads = groups["qkv"]
    want = tuple(tuple(part * 16 + 4 * h + i for part in range(3) for i in range(4)) for h in range(4))
    assert heads.kind == "heads" and slices(heads)["qkv.weight", 0] == want
    assert slices(heads)["proj.weight", 1] == tuple(tuple(range(4 * h, 4 * h + 4)) for h in range(4))
    assert slices(groups["gate"])["gate.weight", 0] == tuple((i, 12 + i) for i in range(12))
    stream = groups["embed"]
    assert "layer_norm divides by a mean" in stream.blocked and not stream.fixed
    assert not stream.prunable and stream.permutable and "read position by position" in groups["place"].fixed


def test_grouped_query_heads_go_with_their_key_and_value_head():
    pytest.importorskip("transformers")
    groups = groups_of(*(lambda m, x: (m, *x))(*make("llama", torch.float32)))
    found = slices(groups["model.layers.1.self_attn.q_proj"])
    path = "model.layers.1.self_attn"
    assert found[f"{path}.q_proj.weight", 0] == (tuple(range(16)), tuple(range(16, 32)))
    assert (
        found[f"{path}.k_proj.weight", 0] == found[f"{path}.v_proj.weight", 0] == (tuple(range(8)), tuple(range(8, 16)))
    )
    assert found[f"{path}.o_proj.weight", 1] == (tuple(range(16)), tuple(range(16, 32)))
    stream = next(g for g in groups.values() if ("model.norm.weight", 0) in slices(g))
    assert "counts the units" in stream.blocked and stream.permutable and stream.size == 32


def test_tied_embeddings_are_one_tensor_with_two_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.mid(self.embed(x))) + self.embed(x))

    found = dependency_groups(Tied(), (torch.tensor([[1, 2]]),))
    group = next(g for g in found if g.prunable)
    part = next(s for s in group.slices if s.parameter == "embed.weight")
    assert part.dim == 1 and part.tied == ("head.weight",) and group.size == 8
    rows = next(g for g in found if any(s.parameter == "embed.weight" and s.dim == 0 for s in g.slices))
    assert "named by the inputs" in rows.fixed


class Between(nn.Module):
    """Two linear layers with a function between them."""

    def __init__(self, function, inputs: int = 8) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 8), nn.Linear(inputs, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (lambda h: h.cumsum(-1), 8, "cumsum runs along a prunable dimension"),
        (lambda h: h.sort(-1).values, 8, "aten::sort is not understood"),
        (lambda h: torch.cat([h, h[:, 3:4]], 1), 9, "is read at one fixed position"),
        (lambda h: h + torch.arange(8.0), 8, "a tensor whose dimension is fixed"),
        (lambda h: h[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], 8, "indexed along a prunable dimension"),
    ],
)
def test_what_cannot_be_proved_is_refused_with_its_place(function, inputs, reason):  # type: ignore[no-untyped-def]
    group = groups_of(Between(function, inputs), torch.randn(2, 4))["a"]
    assert reason in group.fixed and "test_structure_groups.py:" in group.fixed and "node '" in group.fixed
    with pytest.raises(SpecError, match="cannot be pruned"):
        group.select([0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h: h.softmax(-1), "normalises over this dimension"),
        (lambda h: h - h.mean(-1, keepdim=True), "counts the units"),
        (lambda h: h / torch.sigmoid(h).sum(-1, keepdim=True), "counts the units"),
        (lambda h: F.rms_norm(h, (8,)), "divides by a mean"),
    ],
)
def test_counts_forbid_removing_but_not_reordering(function, reason):  # type: ignore[no-untyped-def]
    group = groups_of(Between(function), torch.randn(2, 4))["a"]
    assert reason in group.blocked and not group.fixed and group.permutable and not group.prunable


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h / (1 + F.relu(h).sum(-1, keepdim=True)),
        lambda h: h / (1 + torch.linalg.vector_norm(h, dim=-1, keepdim=True)),
        lambda h: h.flip(-1).sigmoid(),
        lambda h: torch.where(h > 0, h, 0.1 * h),
        lambda h: h.view(-1, 2, 4).transpose(0, 1).unbind(0)[1].repeat(1, 2) * h,
    ],
)
def test_sums_of_zeros_and_moves_are_exact(function):  # type: ignore[no-untyped-def]
    group = groups_of(Between(function), torch.randn(2, 4))["a"]
    assert group.prunable, group


def test_multihead_attention_of_torch_cannot_lose_heads_but_says_so():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    groups = groups_of(nn.Sequential(nn.Linear(8, 8), layer), torch.randn(2, 3, 8))
    assert "MultiheadAttention" in groups["1.self_attn"].blocked and groups["1.linear1"].prunable


def test_a_computed_weight_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    nn.utils.parametrizations.weight_norm(model[1])
    groups = dependency_groups(model, (IMAGE,))
    assert all(not g.prunable for g in groups) and any("computed, not a parameter" in g.fixed for g in groups)


def test_units_are_chosen_by_score_and_checked():
    model = Plain()
    with torch.no_grad():
        model.first.weight[5] = 0
        model.first.bias[5] = model.norm.weight[5] = model.norm.bias[5] = 0
        model.second.weight[:, 5] = 0
    group = groups_of(model, IMAGE)["first"]
    assert group.smallest(1).chosen == (5,) == group.smallest(1, "l1").chosen and group.gather().shape[0] == 8
    assert group.smallest(0.5, lambda rows: torch.arange(8.0)).chosen == (0, 1, 2, 3)
    assert len(group.smallest(0.99).chosen) == 7 and "1 chosen" in str(group.smallest(1))
    for wrong in ([8], [-1], [True], ["a"], range(8)):
        with pytest.raises(SpecError):
            group.select(wrong)
    for amount, score in [(1.0, "l2"), (-0.1, "l2"), (0.5, "l3"), (0.5, lambda rows: rows), (True, "l2")]:
        with pytest.raises(SpecError):
            group.smallest(amount, score)


def test_bad_input_is_a_typed_error_and_the_model_stays():
    model = Plain().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for wrong, error in [(None, SpecError), ((), SpecError), ((torch.randn(2, 4, 8, 8),), InputError)]:
        with pytest.raises(error):
            dependency_groups(model, wrong)
    with pytest.raises(SpecError):
        dependency_groups("model", (IMAGE,))
    branching = Between(lambda h: h if h.sum() > 0 else -h)
    with pytest.raises(CaptureError, match="test_structure_groups"):
        dependency_groups(branching, (torch.randn(2, 4),))
    assert sparsec.dependency_groups(model, IMAGE) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
