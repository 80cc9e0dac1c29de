"""Sparsifiers: exact counts, deterministic ties, what `where` selects, and a caller's model that never changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsec.errors import SpecError
from sparsec.formats import CSR, NM
from sparsec.report import Row
from sparsec.sparsifiers import Magnitude, Random, Sparsifier, sparsify
from sparsec.sparsifiers.layers import find_layers
from sparsec.structure import detect


class Conv1D(nn.Module):
    """As transformers has it: an (in, out) weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(30, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16))
        self.conv = nn.Conv2d(8, 4, 3)
        self.c1d = Conv1D(12, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.emb.weight
        self.twin = nn.Linear(16, 24)
        self.twin.weight = self.body[0].weight


def zeros(tensor: torch.Tensor) -> int:
    return int((tensor == 0).sum())


DEFAULT = ["body.0", "body.2", "conv", "c1d"]


def test_default_layers_have_exact_counts_and_the_rest_is_untouched() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    pruned = sparsify(model, Magnitude(0.7))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "_sparsec_report")
    assert type(pruned) is Model
    for name, tensor in pruned.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner in DEFAULT or owner == "twin":
            assert zeros(tensor) == round(0.7 * tensor.numel()), name
            kept = tensor != 0
            assert torch.equal(tensor[kept], before[name][kept])
            assert before[name][~kept].abs().max() <= before[name][kept].abs().min()
        else:
            assert torch.equal(tensor, before[name]), name
    assert pruned.twin.weight is pruned.body[0].weight
    assert pruned.head.weight is pruned.emb.weight


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sparsity=st.floats(0, 1, exclude_max=True),
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    levels=st.integers(1, 5),
    scope=st.sampled_from(["layer", "global"]),
)
def test_counts_are_exact_whatever_the_ties(sparsity: float, rows: int, cols: int, levels: int, scope: str) -> None:
    model = nn.Sequential(nn.Linear(cols, rows), nn.Linear(rows, 3))
    generator = torch.Generator().manual_seed(levels)
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randint(1, levels + 1, layer.weight.shape, generator=generator))
    pruned = sparsify(model, Magnitude(sparsity, scope=scope))
    sizes = [layer.weight.numel() for layer in model]
    found = [zeros(layer.weight) for layer in pruned]
    if scope == "layer":
        assert found == [round(sparsity * n) for n in sizes]
    else:
        assert sum(found) == round(sparsity * sum(sizes))
        if sum(found):
            dropped = max(w.weight[p.weight == 0].max().item() for w, p in zip(model, pruned) if zeros(p.weight))
            kept = [w.weight[p.weight != 0].min().item() for w, p in zip(model, pruned) if (p.weight != 0).any()]
            assert not kept or dropped <= min(kept)


def test_ties_go_by_index() -> None:
    model = nn.Linear(5, 2)
    nn.init.ones_(model.weight)
    pruned = sparsify(model, Magnitude(0.3))
    assert pruned.weight.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


def test_global_scope_prefers_small_layers_values() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.uniform_(1, 2)
        model[1].weight.uniform_(3, 4)
    pruned = sparsify(model, Magnitude(0.5, scope="global"))
    assert zeros(pruned[0].weight) == 100 and zeros(pruned[1].weight) == 0


def test_existing_zeros_count() -> None:
    model = nn.Linear(10, 10)
    with torch.no_grad():
        model.weight.fill_(1.0)[:4] = 0
    for sparsifier in (Magnitude(0.6), Random(0.6), Magnitude(0.6, scope="global")):
        assert zeros(sparsify(model, sparsifier).weight) == 60
    assert zeros(sparsify(model, Magnitude(0.2)).weight) == 40


def test_nan_and_infinite_weights_stay() -> None:
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), 1.0, float("-inf"), 2.0]]))
    weight = sparsify(model, Magnitude(0.5)).weight[0]
    assert weight[1] == 0 and weight[3] == 0 and weight[0].isnan() and weight[2].isinf()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8, dtype=dtype)
    pruned = sparsify(model, Magnitude(0.5))
    assert pruned.weight.dtype == dtype and zeros(pruned.weight) == 64


def test_random_is_deterministic_and_does_not_depend_on_other_layers() -> None:
    model = Model()
    a, b = sparsify(model, Random(0.5, seed=3)), sparsify(model, Random(0.5, seed=3), where="body.2")
    assert torch.equal(a.body[2].weight, b.body[2].weight)
    assert zeros(a.body[2].weight) == round(0.5 * 24 * 16)
    other = sparsify(model, Random(0.5, seed=4))
    assert not torch.equal(a.body[2].weight == 0, other.body[2].weight == 0)
    state = torch.random.get_rng_state()
    sparsify(model, Random(0.5))
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_is_not_magnitude() -> None:
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    dropped = model.weight[sparsify(model, Random(0.5)).weight == 0].abs().mean()
    assert abs(dropped / model.weight.abs().mean() - 1) < 0.05


@pytest.mark.parametrize("sparsifier", [Magnitude(NM(2, 4)), Random(NM(2, 4), seed=1)], ids=["magnitude", "random"])
def test_patterns(sparsifier: Sparsifier) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 4, 3), Conv1D(12, 16))
    pruned = sparsify(model, sparsifier)
    matrices = [pruned[0].weight, pruned[1].weight.permute(0, 2, 3, 1).reshape(-1, 8), pruned[2].weight.t()]
    for matrix in matrices:
        assert NM(2, 4).refuse(matrix.detach()) is None
        assert zeros(matrix) * 2 == matrix.numel()
    assert any(s.kind == "nm" for s in detect(pruned[1].weight.detach().reshape(4, -1), kernel=9))


def test_a_pattern_keeps_the_largest_of_each_group() -> None:
    model = nn.Linear(8, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -4, 3, 2, 5, 5, 5, 0]]))
    assert sparsify(model, Magnitude(NM(2, 4))).weight.tolist() == [[0, -4, 3, 0, 5, 5, 0, 0]]


# where


def chosen(where: Any) -> list[str]:
    return [layer.site for layer in find_layers(Model(), where)]


def is_norm_free(name: str, module: nn.Module) -> bool:
    return name.startswith("body")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, DEFAULT),
        ("conv", ["conv"]),
        ("re:body[.].*", ["body.0", "body.2"]),
        ("re:.*", DEFAULT),
        # `head` shares the embedding's weight and must be asked for, `twin` that of body.0
        (nn.Linear, ["body.0", "body.2", "head"]),
        ("Linear", ["body.0", "body.2", "head"]),
        ("Conv1D", ["c1d"]),
        (nn.Embedding, ["emb"]),
        ("emb", ["emb"]),
        ("twin", ["twin"]),
        (is_norm_free, ["body.0", "body.2"]),
        (["conv", "re:body.0", nn.Conv2d], ["body.0", "conv"]),
        (("conv", is_norm_free), ["body.0", "body.2", "conv"]),
    ],
)
def test_where(where: Any, expected: list[str]) -> None:
    assert chosen(where) == expected


def test_the_root_is_a_layer_too() -> None:
    assert [layer.site for layer in find_layers(nn.Linear(3, 3))] == ["<root>"]
    assert [layer.site for layer in find_layers(nn.Linear(3, 3), "<root>")] == ["<root>"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("body.1", "'body.1' matches no site; nearest: 'body"),
        ("body", "is no site but holds some; write 're:body"),
        ("re:heads.*", "matches no site in full"),
        (nn.Conv3d, "module types that have sites: Embedding, Linear, Conv2d, Conv1D"),
        (lambda name, module: False, "is true for no module"),
        ([], r"where=\[\] selects nothing"),
        (3, "where=3; valid: a site name"),
        ([3], "pattern 3 is not a site name"),
        ("re:(", "not a valid regular expression"),
        (["conv", "nowhere"], "'nowhere' matches no site"),
    ],
)
def test_where_that_selects_nothing(where: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sparsify(Model(), Magnitude(0.5), where=where)


def test_a_model_without_layers() -> None:
    with pytest.raises(SpecError, match="ReLU has no Linear or convolution to prune"):
        sparsify(nn.ReLU(), Magnitude(0.5))


# Bad sparsifiers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Magnitude(1.0), r"Magnitude: sparsity=1.0 is not a share of zeros in \[0, 1\)"),
        (lambda: Magnitude(-0.1), "sparsity=-0.1"),
        (lambda: Magnitude(90), r"did you mean 0.9\?"),
        (lambda: Magnitude(float("nan")), "sparsity=nan"),
        (lambda: Magnitude(True), "sparsity=True"),
        (lambda: Magnitude("0.9"), "sparsity='0.9'"),  # type: ignore[arg-type]
        (lambda: Magnitude(0.5, scope="model"), "scope='model'; valid: 'layer', 'global'"),
        (lambda: Magnitude(CSR()), "csr is no pattern to prune to"),
        (lambda: Magnitude(NM(2, 4), scope="global"), "scope='global' means nothing"),
        (lambda: Random(2.0), "Random: sparsity=2.0"),
        (lambda: Random(0.5, seed=0.5), "seed=0.5 is not an integer"),  # type: ignore[arg-type]
    ],
)
def test_bad_sparsifiers(make: Callable[[], Sparsifier], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_bad_arguments() -> None:
    with pytest.raises(SpecError, match=r"write an instance, e.g. Magnitude\(0.9\)"):
        sparsify(nn.Linear(2, 2), Magnitude)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"takes an nn\.Module, got dict"):
        sparsify({}, Magnitude(0.5))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="layer '<root>' has 6 inputs, which groups of 4 do not divide"):
        sparsify(nn.Linear(6, 2), Magnitude(NM(2, 4)))
    model = nn.Linear(2, 2)
    model.extra = (model.weight * 2,)  # not a leaf: torch refuses to copy it
    with pytest.raises(SpecError, match="Linear cannot be copied"):
        sparsify(model, Magnitude(0.5))


# The record


def test_the_record_is_plain_and_becomes_report_rows() -> None:
    model = Model()
    pruned = sparsify(model, Magnitude(0.75))
    record = pickle.loads(pickle.dumps(pruned._sparsec_report))
    rows = {r.site: r for r in map(Row.from_dict, record)}
    assert list(rows) == DEFAULT
    row = rows["conv"]
    assert (row.op, row.shape, row.decision, row.density) == ("conv2d", (4, 8, 3, 3), "dense", 0.25)
    assert row.reason.startswith("pruned by Magnitude(sparsity=0.75, scope='layer')")
    lost = model.conv.weight - pruned.conv.weight
    assert row.error == pytest.approx((lost.norm() / model.conv.weight.norm()).item(), rel=1e-5)
    again = sparsify(pruned, Magnitude(0.9), where="conv")
    assert [r["site"] for r in again._sparsec_report] == DEFAULT
    assert [round(r["density"], 2) for r in again._sparsec_report] == [0.25, 0.25, 0.1, 0.25]
    assert pruned._sparsec_report == record


def test_masks_change_nothing() -> None:
    model = nn.Linear(10, 10)
    layers = find_layers(model)
    before = model.weight.detach().clone()
    (mask,) = Magnitude(0.4).masks(layers)
    assert mask.dtype == torch.bool and int((~mask).sum()) == 40
    assert torch.equal(model.weight, before)


def test_zero_sparsity_and_empty_weights() -> None:
    model = nn.Linear(4, 4)
    assert torch.equal(sparsify(model, Magnitude(0.0)).weight, model.weight)
    assert torch.equal(sparsify(model, Magnitude(0.0, scope="global")).weight, model.weight)
