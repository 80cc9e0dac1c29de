"""Factored embedding tables and batches of matrices through compile: products, checks, refusals, files, the clock."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec import codes
from sparsec.codegen import catalog, tune
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import FormatError, InputError, SpecError
from sparsec.factors import (
    CP,
    BlockDiagonal,
    Circulant,
    Factor,
    Kronecker,
    LowRank,
    Monarch,
    Sparse,
    TensorTrain,
    Tucker,
)
from sparsec.factors.batch_chain import FactoredBatch
from sparsec.factors.rows_chain import FactoredRows, lookups
from sparsec.factors.stored import Stored, parse_stored
from sparsec.formats import CSRGroups
from sparsec.passes import DEFAULT, Factorise

TABLE, BATCH = (48, 24), (3, 24, 16)
TABLES: dict[str, Factor] = {
    "low_rank": LowRank(6), "train": TensorTrain((4, 9, 4), (6, 8), (4, 6)), "cp": CP(7, (6, 8), (24,)),
    "tucker": Tucker((5, 6, 7), (6, 8), (24,)), "kronecker": Kronecker((6, 4), 3), "monarch": Monarch(4),
    "blocks": BlockDiagonal(4), "circulant": Circulant(4), "sum": LowRank(2) + Monarch(4),
}  # fmt: skip
BATCHES: dict[str, tuple[Factor, str]] = {
    "low_rank": (LowRank(5), "bmm_chain"), "monarch": (Monarch(4), "bmm_chain"),
    "kronecker": (Kronecker((4, 6), 2), "bmm_chain"), "sparse": (LowRank(3) + Sparse(0.8), "bmm_chain"),
}  # fmt: skip
EQUATIONS = ("nbi,bio->nbo", "bni,boi->bno", "bio,bin->bno", "bni,bio->bon")


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(*TABLE, padding_idx=0)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.table(index))


class Batch(nn.Module):
    """x (3, n, 24) times three matrices, by one of the calls that do that."""

    def __init__(self, call: str = "bmm") -> None:
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.randn(3, 16, 24) if call == EQUATIONS[1] else torch.randn(BATCH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.call in EQUATIONS:
            a = {"n": 1, "b": 0, "i": 2}
            labels = next(t for t in self.call.partition("->")[0].split(",") if "o" not in t)
            given = x.permute([a[c] for c in labels])
            first = (self.weight, given) if self.call.startswith("bio") else (given, self.weight)
            return torch.einsum(self.call, *first)
        return torch.bmm(x, self.weight) if self.call == "bmm" else x @ self.weight


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def follows(net: nn.Module, fast: nn.Module, x: torch.Tensor, path: Path) -> None:
    """Products, state dicts, files and torch.compile of a result whose only site is factored."""
    twin = copy.deepcopy(net)
    twin.load_state_dict(sparsec.dense_state_dict(fast))
    torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)
    again = sparsec.load(sparsec.save(fast, path / "net"))
    assert torch.equal(again(x), fast(x))
    changed = {k: 2.0 * v for k, v in net.state_dict().items()}
    sparsec.load_dense_state_dict(fast, changed)
    twin.load_state_dict(sparsec.dense_state_dict(fast))
    torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_looked_up_in_its_factors(name: str, tmp_path: Path) -> None:
    net, factor, x = frozen(Table()), TABLES[name], torch.randint(0, TABLE[0], (4, 5))
    fast = sparsec.compile(net, {"table": factor}, (x,), tune="off")
    (row,) = sparsec.report(fast).rows
    fit = factor.fit(net.table.weight)
    assert (row.op, row.decision, row.variant) == ("embedding", "factored", "rows_torch")
    assert row.error == pytest.approx(fit.error, rel=1e-4) and row.nbytes == factor.nbytes(TABLE, 4)
    spent = sum(plan.flops for plan in lookups(factor, TABLE))
    assert f"0 to {spent} flops a row, {row.dense_nbytes} to {row.nbytes} bytes" in row.reason
    assert row.format == factor.resolve(TABLE).text() and "b_" in sparsec.source(fast, "table")
    follows(net, fast, x, tmp_path)
    for bad in (torch.tensor([[-1] * 5] * 4), torch.full((4, 5), TABLE[0])):
        with pytest.raises(InputError, match="valid: 0 to 47"):
            fast(bad)


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_matrices_is_a_chain_each(name: str, tmp_path: Path) -> None:
    factor, variant = BATCHES[name]
    net, x = frozen(Batch()), torch.randn(3, 7, 24)
    fast = sparsec.compile(net, factor, (x,), tune="off")
    (row,) = sparsec.report(fast).rows
    assert (row.op, row.decision, row.variant, row.shape) == ("bmm", "factored", variant, BATCH)
    each = [factor.fit(w.t().contiguous()) for w in net.weight]
    whole = sum((f.error * float(w.norm())) ** 2 for f, w in zip(each, net.weight)) ** 0.5 / float(net.weight.norm())
    assert row.error == pytest.approx(whole, rel=1e-3)
    assert f"{2 * 24 * 16} to {factor.flops((16, 24), 1)} flops a row" in row.reason
    follows(net, fast, x, tmp_path)


@pytest.mark.parametrize("call", ["matmul", *EQUATIONS])
def test_every_spelling_of_a_batched_product_is_a_site(call: str) -> None:
    net, x = frozen(Batch(call)), torch.randn(3, 7, 24)
    fast = sparsec.compile(net, LowRank(5), (x,), tune="off")
    (row,) = sparsec.report(fast).rows
    assert (row.op, row.decision) == ("bmm", "factored")
    twin = copy.deepcopy(net)
    twin.load_state_dict(sparsec.dense_state_dict(fast))
    torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)


def test_torchs_products_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = frozen(Batch()), torch.randn(3, 7, 24)
    monkeypatch.setattr(tune, "recall", lambda key, count: tune.Timing((20.0, 40.0, 10.0)[:count], 9))
    for factor in (LowRank(5), LowRank(2) + Monarch(4)):
        fast = sparsec.compile(net, factor, (x,))
        (row,) = sparsec.report(fast).rows
        assert (row.variant, row.code) == ("bmm_torch", codes.FACTORED) and "2.00x over dense" in row.reason
        twin = copy.deepcopy(net)
        twin.load_state_dict(sparsec.dense_state_dict(fast))
        torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)
        assert "einsum" in sparsec.source(fast, "<root>")


CASES = {"table": (Table, LowRank(6), "table"), "batch": (Batch, LowRank(5), "<root>")}


def example(case: str) -> torch.Tensor:
    return torch.randint(0, TABLE[0], (4, 5)) if case == "table" else torch.randn(3, 7, 24)


@pytest.mark.parametrize("case", CASES)
def test_the_clock_and_the_tolerance_decide(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, factor, _ = CASES[case]
    net, x = frozen(make()), example(case)
    for us, keywords, decision, code in (
        ((30.0, 10.0, 11.0), {}, "factored", codes.FACTORED),
        ((30.0, 31.0, 33.0), {}, "dense", codes.DENSE_FASTER),
        ((30.0, 29.5, 33.0), {}, "dense", codes.WITHIN_MARGIN),
        ((30.0, 31.0, 33.0), {"min_speedup": 0}, "factored", codes.INSTALLED_FORCED),
        ((30.0, 10.0, 11.0), {"tolerance": 0.01}, "dense", codes.TOLERANCE),
        ((30.0, 10.0, 11.0), {"tolerance": 0}, "dense", codes.LOSSY),
    ):
        monkeypatch.setattr(tune, "recall", lambda key, count, us=us: tune.Timing(us[:count], 9))
        (row,) = sparsec.analyze(net, factor, (x,), **keywords).rows
        assert (row.decision, row.code) == (decision, code)
        if decision == "dense":
            assert row.nbytes == row.dense_nbytes


@pytest.mark.parametrize("case", CASES)
def test_really_timed_and_by_the_model(case: str) -> None:
    make, factor, _ = CASES[case]
    net, x = frozen(make()), example(case)
    for mode in ("measure", "model"):
        fast = sparsec.compile(net, factor, (x,), tune=mode)
        (row,) = sparsec.report(fast).rows
        assert row.dense_us is not None and row.dense_us > 0 and row.sparse_us is not None and row.sparse_us > 0
        if row.decision == "dense":
            assert torch.equal(fast(x), net(x))


@pytest.mark.parametrize("case", CASES)
def test_no_batch_may_lose(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no op that keeps the dense weight for some batches, so one lost batch keeps the dense op."""
    make, factor, _ = CASES[case]
    net, x = frozen(make()), example(case)
    name, dim = ("index", 0) if case == "table" else ("x", 1)
    shapes = {name: {dim: torch.export.Dim("n", min=2, max=64)}}
    times = iter([(30.0, 10.0, 10.0), (30.0, 40.0, 40.0), *[(30.0, 5.0, 5.0)] * 20])
    monkeypatch.setattr(tune, "recall", lambda key, count: tune.Timing(next(times)[:count], 9))
    (row,) = sparsec.analyze(net, factor, (x,), dynamic_shapes=shapes).rows
    assert (row.decision, row.code) == ("dense", codes.DENSE_FASTER) and "faster for some" in row.reason
    fast = sparsec.compile(net, factor, (x,), dynamic_shapes=shapes, tune="off")
    twin = copy.deepcopy(net)
    twin.load_state_dict(sparsec.dense_state_dict(fast))
    for n in (2, 33):
        other = torch.randint(0, 48, (n, 5)) if case == "table" else torch.randn(3, n, 24)
        torch.testing.assert_close(fast(other), twin(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_kernel_is_not_installed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, factor, _ = CASES[case]
    net, x = frozen(make()), example(case)
    kind: type[Stored] = FactoredRows if case == "table" else FactoredBatch
    real = kind.products

    def off(self: Stored, *args: object) -> tuple[torch.Tensor, torch.Tensor, int]:
        exact, size, longest = real(self, *args)
        exact[-1, -1] += 0.1 * size[-1, -1]
        return exact, size, longest

    monkeypatch.setattr(kind, "products", off)
    (row,) = sparsec.analyze(net, factor, (x,), tune="off").rows
    assert (row.decision, row.code) == ("dense", codes.VERIFY_FAILED)


@pytest.mark.parametrize("case", CASES)
def test_torch_compile_and_export_take_the_result(case: str) -> None:
    make, factor, _ = CASES[case]
    net, x = frozen(make()), example(case)
    fast = sparsec.compile(net, factor, (x,), tune="off")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))
    assert torch.equal(torch.export.export(fast, (x,)).module()(x), fast(x))


def test_narrow_dtypes_take_one_product() -> None:
    net, x = frozen(Table().bfloat16()), example("table")
    fast = sparsec.compile(net, LowRank(6), (x,), tune="off")
    twin = copy.deepcopy(net)
    twin.load_state_dict(sparsec.dense_state_dict(fast))
    assert fast(x).dtype is torch.bfloat16 and sparsec.report(fast).rows[0].decision == "factored"
    torch.testing.assert_close(fast(x), twin(x))


def test_refusals_say_why() -> None:
    index, x = example("table"), example("batch")
    for net, factor, given, code, says in (
        (Table(), LowRank(2) + Sparse(0.9), index, codes.NO_VARIANT, "sparse operand cannot be looked up"),
        (Table().bfloat16(), TABLES["train"], index, codes.NO_VARIANT, "bfloat16 would be rounded"),
        (Table(), LowRank(25), index, codes.FORMAT_REFUSES, "more than its full rank of 24"),
        (Table().double(), LowRank(5), index, codes.DTYPE, "float64"),
        (Batch(), LowRank(17), x, codes.FORMAT_REFUSES, "more than its full rank of 16"),
        (Batch("matmul"), LowRank(5), torch.randn(2, 3, 7, 24), codes.NO_KERNEL, "matmul"),
        (Batch("matmul"), LowRank(5), torch.randn(7, 24), codes.NO_KERNEL, "matmul"),
    ):
        (row,) = sparsec.analyze(frozen(net), factor, (given,), tune="off").rows
        assert (row.decision, row.code) == ("dense", code) and says in row.reason
    broken = Batch()
    broken.weight.data[1, 2, 3] = float("inf")
    (row,) = sparsec.analyze(frozen(broken), LowRank(5), (x,), tune="off").rows
    assert row.code == codes.FORMAT_REFUSES and "NaN or Inf" in row.reason
    (row,) = sparsec.analyze(frozen(Table()), LowRank(5), None, tune="off", capture="trace").rows
    assert row.code == codes.NO_EXAMPLES
    uneven = torch.randn(BATCH)
    uneven[0, :, 3:] *= 1e-3  # its largest entries lie in few rows, which this format pads
    with pytest.raises(FormatError, match="different numbers of values in 'indices'"):
        FactoredBatch(Sparse(0.8, CSRGroups()).resolve((16, 24)), BATCH, 0).pack(uneven.reshape(3, -1))


def test_calibration_lowers_the_error_on_the_inputs() -> None:
    net = frozen(Batch())
    x = torch.randn(3, 200, 24) * torch.linspace(0.01, 2, 24)
    off = []
    for calibrate in (False, True):
        passes = DEFAULT.replace("factor", Factorise(calibrate))
        off.append(float((sparsec.compile(net, LowRank(4), (x,), passes=passes, tune="off")(x) - net(x)).norm()))
    assert off[1] < 0.9 * off[0]
    passes = DEFAULT.replace("factor", Factorise(True))
    (row,) = sparsec.analyze(frozen(Table()), LowRank(4), (example("table"),), passes=passes, tune="off").rows
    assert row.decision == "factored"


def test_text_reads_back_and_bad_text_does_not() -> None:
    rows, batch = FactoredRows(LowRank(6), TABLE), FactoredBatch(Monarch(4).resolve((16, 24)), BATCH, 0)
    for fmt in (rows, batch):
        assert parse_stored(fmt.text()) == fmt and type(fmt).parse(fmt.text()) == fmt
    assert parse_stored("csr") is None
    for bad in (
        "factored_rows(factor=low_rank(rank=6),weight=(48,24,3))",
        "factored_rows(factor=low_rank(rank=60),weight=(48,24))",
        "factored_rows(factor=csr,weight=(48,24))", "factored_rows(factor=low_rank(rank=6),weight=5)",
        "factored_batch(factor=low_rank(rank=6),weight=(3,24,16),tiled=2)",
        "factored_batch(factor=low_rank(rank=6),weight=(3,24,16),tiled=x)",
        "factored_batch(factor=monarch,weight=(3,24,16),tiled=1)",
        "factored_batch(factor=low_rank(rank=6),weight=(-3,24,16),tiled=1)", "factored_rows(", "factored_batch()",
    ):  # fmt: skip
        with pytest.raises(SpecError):
            parse_stored(bad)
    weight = torch.randn(BATCH)
    buffers = batch.pack(weight.reshape(3, -1))
    batch.validate(buffers, 3, 24 * 16)
    for damaged in ({k: t[:2] for k, t in buffers.items()}, {**buffers, "left": buffers["left"][..., 1:].contiguous()}):
        with pytest.raises(FormatError):
            batch.validate(damaged, 3, 24 * 16)
    assert batch.nbytes(3, 24 * 16, 0, 4) == 3 * Monarch(4).nbytes((16, 24), 4)


def test_kernels_refuse_what_they_were_not_made_for() -> None:
    x, y = torch.randn(3, 7, 24), torch.empty(3, 7, 16)
    fmt = FactoredBatch(LowRank(5), BATCH, 0)
    buffers = list(fmt.pack(torch.randn(3, 384)).values())
    spec = KernelSpec("bmm", "bmm_torch", fmt.text(), "float32", 16, 24, "portable")
    backend = catalog.backend("torch")
    call = backend.load(Path(), backend.render(spec)).call
    call(x, y, None, None, *buffers)
    call(x[:, :0], y[:, :0], None, None, *buffers)
    for bad in (
        (x[:2], y, None, None, *buffers), (x.double(), y, None, None, *buffers), (x, y[..., 1:], None, None, *buffers),
        (x, y, torch.zeros(16), None, *buffers), (x, y, None, None, *buffers[1:]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be|expected"):
            call(*bad)
    rows = FactoredRows(LowRank(6), TABLE)
    spec = KernelSpec("embedding", "rows_torch", rows.text(), "float32", *TABLE, "portable")
    call = backend.load(Path(), backend.render(spec)).call
    index, out, own = torch.tensor([3, 1]), torch.empty(2, 24), list(rows.pack(torch.randn(TABLE)).values())
    call(index.int(), out, None, None, *own)
    for bad in ((index.float(), out, None, None, *own), (index, out.double(), None, None, *own),
                (index, out, None, None, own[0]), (index, out, torch.zeros(24), None, *own)):  # fmt: skip
        with pytest.raises(ValueError, match="must be|expected"):
            call(*bad)
