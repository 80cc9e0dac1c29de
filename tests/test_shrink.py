"""Shrink: a really smaller dense model that equals the zeroed one, of the caller's class, with its sizes up to date."""

from __future__ import annotations

import copy
import pickle
import random
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structure_models import TRANSFORMERS, ZOO, Plain, make
from torch import nn

import sparsec
from sparsec.errors import PassError, SpecError
from sparsec.sparsifiers.structure import Group, dependency_groups, shrink, zero
from sparsec.sparsifiers.structure_shrink import outputs


@cache
def analysed(name: str) -> tuple[nn.Module, tuple[Any, ...], list[Group]]:
    model, example = make(name)
    return model, example, dependency_groups(model, example)


def sizes(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def largest_difference(a: nn.Module, b: nn.Module, example: tuple[Any, ...]) -> float:
    pairs = list(zip(outputs(a, (example, {})), outputs(b, (example, {})), strict=True))
    assert pairs
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("name", [*ZOO, *TRANSFORMERS])
def test_half_of_all_groups_zeroed_equals_shrunk(name: str):
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    model, example, groups = analysed(name)
    before = copy.deepcopy(model.state_dict())
    chosen = [g.smallest(0.5) for g in groups if g.prunable]
    small, zeroed = shrink(model, chosen), zero(model, chosen)
    assert type(small) is type(model) and sizes(zeroed) == sizes(model)
    assert largest_difference(small, zeroed, example) < 1e-6
    assert largest_difference(small, model, example) > 1e-3  # something was really taken away
    parameters = dict(model.named_parameters())
    gone = [(s.parameter, s.dim, sum(len(s.indices[u]) for u in g.chosen)) for g in chosen for s in g.slices]
    for key, tensor in small.named_parameters():
        shape = list(parameters[key].shape)
        for parameter, dim, count in gone:
            if parameter == key:
                shape[dim] -= count
        assert tensor.shape == torch.Size(shape), key
    assert sizes(small) < sizes(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("seed", range(3))
def test_any_choice_of_units_is_exact(name: str, seed: int):
    model, example, groups = analysed(name)
    rng = random.Random(seed)
    usable = [g for g in groups if g.prunable]
    chosen = [g.select(rng.sample(range(g.size), rng.randrange(1, g.size))) for g in usable if rng.random() < 0.7]
    if not chosen:
        chosen = [usable[0].select([0])]
    assert largest_difference(shrink(model, chosen), zero(model, chosen), example) < 1e-6


def test_modules_remember_their_new_sizes():
    model, _, groups = analysed("inverted")
    small: Any = shrink(model, [g.smallest(0.5) for g in groups if g.prunable])
    stem, depth = small.stem, small.depth[0]
    assert (stem[0].out_channels, stem[1].num_features, small.head.in_features) == (4, 4, 8)
    assert (depth[0].groups, depth[0].in_channels, depth[0].out_channels) == (12, 12, 12)
    assert (small.twice.groups, small.twice.in_channels, small.twice.out_channels) == (4, 4, 8)
    model, _, groups = analysed("grouped")
    small = shrink(model, [g.select([1]) for g in groups if g.name in ("stem", "mix", "up")])
    assert (small.norm.num_groups, small.norm.num_channels) == (2, 8)
    assert (small.left.groups, small.left.in_channels, small.left.out_channels) == (3, 9, 12)
    assert (small.inst.num_groups, small.inst.num_channels, small.up.out_channels) == (4, 4, 4)
    model, _, groups = analysed("attention")
    small = shrink(model, [g.select([0, 2]) for g in groups if g.kind == "heads"])
    assert (small.num_heads, small.head_dim, small.qkv.out_features, small.proj.in_features) == (2, 4, 24, 8)


def test_the_smaller_model_is_an_ordinary_module():
    model, example, groups = analysed("residual")
    small = shrink(copy.deepcopy(model).train(), [groups[0].select([1, 3])])
    assert small.training and small.stem[0].weight.requires_grad
    small(*example).sum().backward()
    again = pickle.loads(pickle.dumps(small.eval()))
    assert largest_difference(again, small, example) == 0
    assert len(dependency_groups(small, example)[0].slices[0].indices) == 6


def test_llama_generates_after_losing_heads_and_ties_stay():
    pytest.importorskip("transformers")
    model, example, groups = analysed("llama")
    first = [g.select([1]) for g in groups if g.kind == "heads"][:1]  # layers may differ
    small: Any = shrink(model, first)
    assert small.model.layers[0].self_attn.q_proj.out_features == 16
    tokens = small.generate(example[0], max_new_tokens=4, do_sample=False)
    same = zero(model, first).generate(example[0], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, same)
    model, _, groups = analysed("gpt2")
    small = shrink(model, [g.smallest(0.5) for g in groups if g.prunable])
    assert small.lm_head.weight is small.transformer.wte.weight and small.transformer.h[0].attn.num_heads == 2


def test_a_later_state_of_the_model_is_shrunk():
    model, example, groups = analysed("plain")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.5)
    chosen = [next(g for g in groups if g.name == "second").smallest(0.5, model=tuned)]
    assert largest_difference(shrink(tuned, chosen), zero(tuned, chosen), example) < 1e-6


class Numbers(nn.Module):
    """Code with a size as a number: no attribute can be brought up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8))


def test_a_size_in_the_code_is_refused_with_its_line():
    model = Numbers()
    groups = [g.select([0]) for g in dependency_groups(model, torch.randn(2, 4)) if g.prunable]
    assert len(groups) == 1
    with pytest.raises(PassError, match=r"fails.*test_shrink\.py:\d+ \(dimension 1: 2 to 1\)"):
        shrink(model, groups)


def test_bad_input_is_a_typed_error():
    model, _, groups = analysed("plain")
    chosen = groups[0].select([0])
    fixed = next(g for g in groups if g.fixed)
    other, _, others = analysed("residual")
    for wrong in ([], groups, [chosen, chosen], [1], [others[0].select([0])]):
        with pytest.raises(SpecError):
            shrink(model, wrong)
    with pytest.raises(SpecError, match="analyse this model again"):
        shrink(shrink(model, [chosen]), [chosen])
    with pytest.raises(SpecError, match="nothing|no "):
        shrink(other, chosen)
    with pytest.raises(SpecError, match="cannot be pruned"):
        fixed.select([0])
    with pytest.raises(SpecError):
        zero("model", [chosen])
    assert isinstance(sparsec.shrink(Plain().double().eval(), chosen), Plain)


def test_digits_lose_at_most_two_points_after_one_fine_tune():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    train, test = slice(0, 1300), slice(1300, None)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip

    def fit(model: nn.Module, epochs: int) -> float:
        adam = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(epochs):
            model.train()
            for part in torch.randperm(1300).split(65):
                adam.zero_grad()
                F.cross_entropy(model(x[train][part]), y[train][part]).backward()
                adam.step()
        with torch.no_grad():
            return float((model.eval()(x[test]).argmax(1) == y[test]).float().mean())

    dense = fit(net, 5)
    small = shrink(net, [g.smallest(0.5) for g in dependency_groups(net, x[:2]) if g.prunable])
    assert sizes(small) < 0.5 * sizes(net) and dense > 0.9
    assert fit(small, 3) >= dense - 0.02
