"""Calibration: statistics against their definitions, padding, every form of data, blocks, executors, bad data."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from sparsec import codes
from sparsec.capture import capture_whole
from sparsec.errors import InputError, SpecError
from sparsec.formats import NM
from sparsec.sparsifiers import (
    Calibration,
    Compose,
    DSnoT,
    GlobalShare,
    Magnitude,
    Refit,
    SparseGPT,
    Stats,
    Wanda,
    calibrate,
    calibrate_graph,
    sparsify,
)
from sparsec.sparsifiers.gradients import log_likelihoods
from sparsec.sparsifiers.layers import find_layers
from sparsec.sparsifiers.scores import Fisher, GradientFlow, Saliency
from sparsec.sparsifiers.stats import needed_bytes


class Conv1D(nn.Module):
    """As transformers has it: an (in, out) weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        return (hidden + self.down(torch.relu(self.up(hidden))),)


class Encoder(nn.Module):
    """Stem, a chain of blocks with a mask beside the hidden state, head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 3)
        self.unused = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, attention_mask)[0]
        return self.head(x)


def stats_of(module: nn.Module, data: Any, **options: Any) -> Stats:
    found = calibrate(module, data, **options)
    (only,) = found.values()
    assert only is not None
    return only


def check(stats: Stats, rows: torch.Tensor) -> None:
    """`rows` is [rows, features] in the layer's order, in float64."""
    assert stats.rows == len(rows)
    torch.testing.assert_close(stats.mean[0], rows.mean(0))
    torch.testing.assert_close(stats.var[0], rows.var(0, unbiased=False), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats.norm[0], rows.norm(dim=0))
    torch.testing.assert_close(stats.density[0], (rows != 0).double().mean(0))
    if stats.gram is not None:
        torch.testing.assert_close(stats.gram[0].double(), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_linear_over_batches_of_any_shape() -> None:
    batches = [torch.relu(torch.randn(3, 5, 6)), torch.randn(7, 6), torch.randn(1, 2, 2, 6)]
    rows = torch.cat([b.reshape(-1, 6) for b in batches]).double()
    check(stats_of(nn.Linear(6, 4), batches, needs=("gram",)), rows)
    check(stats_of(Conv1D(4, 6), batches, needs=("gram",)), rows)


def test_double_accumulates_in_float64() -> None:
    x = torch.randn(4000, 5) + 100
    exact = x.double().T @ x.double()
    single, double = (
        stats_of(nn.Linear(5, 2), Calibration([x], double=d), needs=("gram",)).get("gram")[0] for d in (False, True)
    )
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    assert (double - exact).abs().max() / exact.abs().max() < 1e-12
    assert (single - exact).abs().max() / exact.abs().max() < 1e-5


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv3d(2, 3, 2),
    ],
    ids=str,
)
def test_convolutions_unfold_into_the_features_of_their_matrix(conv: Any) -> None:
    x = torch.randn(2, conv.in_channels, *(7, 6, 5)[: len(conv.kernel_size)])
    conv = conv.double()
    with torch.no_grad():
        conv.bias.zero_()
        y = conv(x.double())
    found = stats_of(conv, Calibration([x.double()], double=True), needs=("gram",))
    (layer,) = find_layers(conv)
    weights = layer.matrix(layer.weight.detach()).chunk(conv.groups)
    energy = sum(float(((w @ g) * w).sum()) for w, g in zip(weights, found.get("gram")))
    assert energy == pytest.approx(float(y.square().sum()), rel=1e-9)
    assert found.rows == y.shape[0] * y[0, 0].numel()
    total = sum(float((w @ m).sum()) for w, m in zip(weights, found.mean))
    assert total * found.rows == pytest.approx(float(y.sum()), rel=1e-9)


def test_padding_rows_do_not_count() -> None:
    model = Encoder()
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"x": x, "attention_mask": mask}
    for mode in ("whole", "blocks"):
        pruned = sparsify(model, Wanda(0.5), data=Calibration([batch], mode=mode))
        poisoned = {"x": torch.where(mask[..., None] == 0, 1e6, x), "attention_mask": mask}
        again = sparsify(model, Wanda(0.5), data=Calibration([poisoned], mode=mode))
        assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), again.parameters()))
    check(calibrate(model, [batch], where="stem")["stem"], x[mask != 0].double())  # type: ignore[arg-type]
    by_position = Calibration([(x, mask)], mask=1)
    check(calibrate(model, by_position, where="stem")["stem"], x[mask != 0].double())  # type: ignore[arg-type]
    inverted = Calibration([{"x": x, "attention_mask": mask}], mask=lambda b: b["attention_mask"] == 0)
    check(calibrate(model, inverted, where="stem")["stem"], x[mask == 0].double())  # type: ignore[arg-type]


def test_forms_of_data() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.lin(a + b)

    a, b = torch.randn(6, 4), torch.randn(6, 4)
    rows = (a + b).double()
    forms: list[Any] = [[(a, b)], ((x, y) for x, y in zip(a.split(2), b.split(2))), {"a": a, "b": b}]
    forms += [[{"a": a, "b": b}], torch.utils.data.DataLoader(torch.utils.data.TensorDataset(a, b), batch_size=4)]
    forms += [[(a, b, torch.zeros(6))]]  # labels beyond what forward takes
    for data in forms:
        check(calibrate(Two(), data)["lin"], rows)  # type: ignore[arg-type]
    check(stats_of(nn.Linear(4, 2), a), a.double())
    check(stats_of(nn.Linear(4, 2), Calibration([(a, b)], inputs=1)), a.double())


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    first = calibrate(model, [torch.randn(8, 4)] * 2)
    second = calibrate(model, [torch.randn(8, 4)] * 2)
    assert all(m.training for m in model.modules()) and not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert first.keys() == second.keys() and not torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_what_is_stated() -> None:
    layers = find_layers(nn.Sequential(nn.Linear(10, 4), nn.Conv2d(4, 6, 3, groups=2)))
    width = 2 * 9
    expected = (3 * 8 * 10 + 4 * 100) + (3 * 8 * 2 * width + 4 * 2 * width * width)
    assert needed_bytes(layers, ("gram",)) == expected
    found = stats_of(nn.Linear(10, 4), [torch.randn(9000, 10)], needs=("gram", "inputs"))
    assert found.get("inputs").shape[0] <= 2048
    assert found.nbytes <= needed_bytes(layers[:1], ("gram", "inputs")) + 8 * 10  # norm beside its square


def test_inputs_are_a_spread_sample() -> None:
    x = torch.arange(9000.0).reshape(-1, 1)
    seen = stats_of(nn.Linear(1, 1), [x[:100], x[100:]], needs=("inputs",)).get("inputs").reshape(-1)
    assert 1000 < len(seen) <= 2048 and torch.equal(seen, torch.arange(len(seen)) * 8.0)


# Gradients


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output, batch[1])


def test_gradient_statistics_equal_brute_force() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    data = Calibration([(x[:3], y[:3]), (x[3:], y[3:])], loss=loss)
    found = calibrate(model, data, needs=("grad", "fisher", "hessian_grad", "out_grad"))
    weight = model[0].weight
    grads = torch.stack(
        [torch.autograd.grad(loss(model(x[i : i + 1]), (0, y[i : i + 1])), weight)[0] for i in range(7)]
    )
    stats = found["0"]
    assert stats is not None
    torch.testing.assert_close(stats.get("grad"), grads.mean(0))
    torch.testing.assert_close(stats.get("fisher"), grads.square().mean(0))
    both = [model[0].weight, model[2].weight]
    product = torch.zeros_like(weight)
    for a, b in ((x[:3], y[:3]), (x[3:], y[3:])):
        first = torch.autograd.grad(loss(model(a), (0, b)), both, create_graph=True)
        inner = sum((g * g.detach()).sum() for g in first)
        product += torch.autograd.grad(inner, weight)[0] * len(a) / 7
    torch.testing.assert_close(stats.get("hessian_grad"), product)
    outputs = torch.cat([model[0](x[i : i + 1]).detach() for i in range(7)]).requires_grad_()
    total = sum(loss(model[2](outputs[i : i + 1].tanh()), (0, y[i : i + 1])) for i in range(7))
    expected = torch.autograd.grad(total, outputs)[0].square().mean(0).sqrt()
    torch.testing.assert_close(stats.get("out_grad"), expected)
    assert not any(p.grad is not None for p in model.parameters())


def test_the_fisher_of_the_models_own_labels() -> None:
    model = nn.Linear(3, 4).double()
    x = torch.randn(5, 3).double()
    stats = stats_of(model, Calibration([x], loss=log_likelihoods), needs=("fisher",))
    p = model(x).softmax(-1).detach()
    # d log p(y) / d W_ij = (1[y = i] - p_i) x_j
    expected = ((p * (1 - p)).T @ x.square()) / 5
    torch.testing.assert_close(stats.get("fisher"), expected)


@pytest.mark.parametrize("score", [Saliency(), GradientFlow(), Fisher()], ids=repr)
def test_gradient_scores_prune(score: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = Calibration([(torch.randn(7, 4), torch.arange(7) % 3)], loss=loss)
    pruned = sparsify(model, Compose(0.5, score), data=data)
    assert [int((m.weight == 0).sum()) for m in (pruned[0], pruned[2])] == [12, 9]
    globally = sparsify(model, Magnitude(GlobalShare(0.5, by=score)), data=data)
    assert sum(int((m.weight == 0).sum()) for m in (globally[0], globally[2])) == 21


# Blocks


def test_blocks_are_calibrated_behind_pruned_ones() -> None:
    model, data = Encoder(), [torch.randn(6, 5, 4), torch.randn(3, 2, 4)]
    blocks = sparsify(model, SparseGPT(0.5), data=Calibration(data, mode="blocks"), where=nn.Linear)
    expected = copy.deepcopy(model)
    stages = [["stem"], *([f"layers.{i}.up", f"layers.{i}.down"] for i in range(3)), ["head"]]
    for sites in stages:  # the definition: each stage on a whole pass of what is pruned so far
        expected = sparsify(expected, SparseGPT(0.5), data=Calibration(data, mode="whole"), where=sites)
    for (name, a), (_, b) in zip(blocks.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    rows = {r["site"]: r for r in blocks._sparsec_report}
    assert rows["unused"]["code"] == codes.NEVER_CALLED and rows["stem"]["code"] == codes.PRUNED
    assert torch.equal(blocks.unused.weight, model.unused.weight)


def test_auto_takes_blocks_where_there_are_some() -> None:
    model, data = Encoder(), [torch.randn(6, 5, 4)]
    auto, blocks = (sparsify(model, SparseGPT(0.5), data=Calibration(data, mode=m)) for m in ("auto", "blocks"))
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), blocks.parameters()))


class Skips(Encoder):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.layers[1](x)[0] + self.layers[0](x)[0])


class Inplace(Block):
    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        hidden += self.down(self.up(hidden))
        return (hidden,)


def test_what_is_no_chain_falls_back_or_says_why() -> None:
    model, data = Skips(), [torch.randn(6, 5, 4)]
    with pytest.raises(SpecError, match=r"members of 'layers' are not called once each, in order; use mode='whole'"):
        sparsify(model, Wanda(0.5), data=Calibration(data, mode="blocks"))
    auto, whole = (sparsify(model, Wanda(0.5), data=Calibration(data, mode=m)) for m in ("auto", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), whole.parameters()))
    model = Encoder()
    model.layers[1] = Inplace(8)
    with pytest.raises(SpecError, match="member 1 of 'layers' changes its input in place"):
        sparsify(model, Wanda(0.5), data=Calibration(data, mode="blocks"))
    with pytest.raises(SpecError, match="holds no ModuleList or Sequential"):
        sparsify(nn.Linear(4, 4), Wanda(0.5), data=Calibration(torch.randn(3, 4), mode="blocks"))
    with pytest.raises(SpecError, match="compares the scores of all layers"):
        sparsify(Encoder(), Wanda(GlobalShare(0.5)), data=Calibration(data, mode="blocks"))


def test_inplace_prunes_the_model_itself() -> None:
    model = Encoder()
    assert sparsify(model, Wanda(0.5), data=[torch.randn(6, 5, 4)], inplace=True) is model
    assert int((model.stem.weight == 0).sum()) == 16


def test_a_captured_graph_sees_what_hooks_see() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.extra = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(torch.relu(self.lin(self.lin(x))), self.extra)

    model, x = Functional(), torch.randn(6, 4)
    captured = capture_whole(model, (x,))
    found = calibrate_graph(captured.gm, [captured.inputs], needs=("gram",))
    assert sorted(found) == ["<root>", "lin", "lin#2"]
    check(found["lin"], x.double())  # type: ignore[arg-type]
    check(found["lin#2"], model.lin(x).detach().double())  # type: ignore[arg-type]
    check(found["<root>"], torch.relu(model.lin(model.lin(x))).detach().double())  # type: ignore[arg-type]
    hooked = calibrate(model, [x])["lin"]
    assert hooked is not None and hooked.rows == 12


# Executors


def model_and_data() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 16), nn.Linear(16, 4))
    model[3].to(torch.bfloat16)
    model.insert(3, Cast())
    return model, [torch.randn(5, 4, 5, 5), torch.randn(9, 4, 5, 5)]


class Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16)


@pytest.fixture
def single() -> Iterator[None]:
    """One thread, as the workers have, so that sums are in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_with(executor: Executor) -> None:
    model, data = model_and_data()
    for method in (Refit(DSnoT(SparseGPT(0.5))), SparseGPT(NM(2, 4))):
        here = sparsify(model, method, data=Calibration(data))
        there = sparsify(model, method, data=Calibration(data, executor=executor))
        assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters()))
        assert here._sparsec_report == there._sparsec_report


def test_a_process_pool_runs_the_jobs(single: None) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread) as pool:
        same_with(pool)


def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
def test_dask_runs_the_jobs(single: None) -> None:
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, protocol="inproc://"
    )
    with cluster, distributed.Client(cluster) as client:
        same_with(client.get_executor())


# Bad data


def nothing() -> Iterator[torch.Tensor]:
    return iter(())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration saw nothing"),
        (nothing(), "calibration saw nothing"),
        ([torch.randn(5, 3)], "Encoder cannot run on calibration batch 0: "),
        ([torch.randn(5, 4), torch.randn(2, 7)], "Encoder cannot run on calibration batch 1: "),
        ([torch.full((2, 4), torch.nan)], "'stem' reads NaN or infinite values in calibration batch 0"),
        ([torch.full((2, 4), torch.inf)], "'stem' reads NaN or infinite values"),
        ([3], "a calibration batch is a int"),
        ({"x": torch.randn(2, 3, 4), "attention_mask": torch.zeros(2, 3)}, "calibration saw nothing"),
        ([{"y": torch.randn(2, 4)}], "Encoder cannot run on calibration batch 0: .*unexpected keyword"),
    ],
)
@pytest.mark.parametrize("mode", ["whole", "auto"])
def test_bad_data_is_one_error_and_the_model_is_unharmed(data: Any, message: str, mode: str) -> None:
    model = Encoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        sparsify(model, SparseGPT(0.5), data=Calibration(data, mode=mode))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_options() -> None:
    with pytest.raises(SpecError, match="data=int is no calibration data"):
        calibrate(nn.Linear(2, 2), 3)
    with pytest.raises(SpecError, match="no statistic 'covariance'; valid: mean"):
        calibrate(nn.Linear(2, 2), torch.randn(2, 2), needs=("covariance",))
    with pytest.raises(SpecError, match="fisher need a loss"):
        calibrate(nn.Linear(2, 2), torch.randn(2, 2), needs=("fisher",))
    with pytest.raises(SpecError, match="mode='rows'; valid: 'auto'"):
        Calibration([], mode="rows")
    with pytest.raises(SpecError, match=r"Wanda calibrates; pass data="):
        sparsify(nn.Linear(2, 2), Wanda(0.5))
    with pytest.raises(SpecError, match="'0'.*calibration knows Linear"):
        sparsify(
            nn.Sequential(nn.Embedding(5, 4)), Wanda(0.5), data=torch.zeros(3, dtype=torch.long), where=nn.Embedding
        )
