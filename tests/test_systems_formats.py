"""Published systems of formats and kernels, each held to what its paper says that can be counted or compared here."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import sparsec
from sparsec import cost, verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import KernelSpec, Problem, Step
from sparsec.formats import (
    BSR,
    CSR,
    NM,
    NMG,
    BlockNM,
    CSRGroups,
    FanIn,
    Format,
    GroupInt4,
    Permuted,
    SpQR,
    TiledCSL,
    TwoFour,
)  # fmt: skip
from sparsec.formats._order import order_of
from sparsec.graph import Structure
from sparsec.ops.linear import OVERLOAD
from sparsec.passes import _propose, _reorder
from sparsec.target import Target

TARGET = Target.probe()


def kernel(fmt: Format, rows: int, cols: int, steps: tuple[Step, ...] = ()) -> KernelSpec:
    """The first kernel of the catalogue for a format here, built."""
    problem = Problem("linear", rows, cols, "float32", rows * cols // 4, epilogue=steps)
    fits = [v for v in catalog.variants_for("linear", fmt.name, TARGET) if v.refuse(problem, fmt, TARGET) is None]
    spec = fits[0].specs(problem, fmt, TARGET)[0]
    build_kernels([spec], TARGET)
    return spec


def agrees(spec: KernelSpec, fmt: Format, dense: torch.Tensor, batches: tuple[int, ...]) -> bool:
    """Whether a kernel is within the float64 bound at each batch."""
    packed = fmt.resolve(*dense.shape).pack(dense)
    stored = fmt.resolve(*dense.shape).positions(packed, *dense.shape)
    for batch in batches:
        x = torch.randn(batch, dense.shape[1], generator=torch.Generator().manual_seed(batch))
        y = OVERLOAD(x, list(packed.values()), None, None, spec.text())
        if not verify.check(y, x, dense, None, spec.epilogue, None, stored).ok:
            return False
    return True


def energy(dense: torch.Tensor, mask: torch.Tensor) -> float:
    return float((dense.abs() * mask).sum())


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


class TestSTen:
    """Ivanov et al., STen: Productive and Efficient Sparsity in PyTorch (2023)."""

    @pytest.mark.parametrize(("n", "m", "g"), [(2, 4, 16), (1, 4, 16), (2, 8, 8), (2, 16, 4)])
    def test_quotas_are_exact_and_the_energy_is_that_of_plain_n_of_m(self, n: int, m: int, g: int) -> None:
        fmt = NMG(n, m, g)
        weight = gaussian(fmt.chunk, 64)
        mask = fmt.choose(weight)
        assert int(mask.sum()) == weight.numel() * n // m
        codes = (mask.reshape(fmt.chunk, -1, m) * 2 ** torch.arange(m)).sum(2)
        for group in codes.T:
            assert set(torch.unique(group, return_counts=True)[1].tolist()) == {g}
        assert energy(weight, mask) >= 0.95 * energy(weight, NM(n, m).choose(weight))

    def test_a_compiled_model_equals_the_dense_one_and_half_of_it_is_stored(self) -> None:
        fmt = NMG(2, 4, 8)
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU()).eval().requires_grad_(False)
        model[0].weight.mul_(fmt.choose(model[0].weight))
        x = gaussian(9, 64)
        made = sparsec.compile(model, fmt, (x,), tune="off")
        torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
        row = sparsec.report(made).row("0")
        assert (row.variant, row.nbytes) == ("linear_nmg", 96 * 64 // 2 * 4 + 96 * 64 // 4 * 2)

    def test_a_pair_of_layouts_without_a_kernel_is_computed_dense(self) -> None:
        model = nn.Sequential(nn.Linear(16, 12)).eval().double().requires_grad_(False)
        model[0].weight.mul_(NMG(2, 4, 2).choose(model[0].weight))
        x = gaussian(3, 16).double()
        made = sparsec.compile(model, NMG(2, 4, 2), (x,), tune="off")
        assert sparsec.report(made).row("0").decision == "dense"
        assert torch.equal(made(x), model(x))


class TestFlashLLM:
    """Xia et al., Flash-LLM: load as sparse, compute as dense (VLDB 2023), the half that needs no GPU."""

    @pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.6, 0.8])
    def test_bytes_follow_the_words_and_beat_dense_above_half(self, sparsity: float) -> None:
        fmt = TiledCSL(128).resolve(512, 512)
        dense = (
            gaussian(512, 512) * (torch.rand(512, 512, generator=torch.Generator().manual_seed(1)) >= sparsity)
        ).half()
        packed = fmt.pack(dense)
        assert torch.equal(fmt.unpack(packed, 512, 512), dense)
        size = sum(t.numel() * t.element_size() for t in packed.values())
        assert size == fmt.nbytes(512, 512, fmt.stored(dense), 2)
        assert (size < dense.numel() * 2) == (sparsity > 0.5)


@pytest.fixture(scope="module")
def planted() -> torch.Tensor:
    """16 x 16 blocks along the diagonal, three beside each, rows shuffled."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.eye(24, dtype=torch.bool) | (torch.rand(24, 24, generator=generator) < 0.08)
    weight = torch.randn(384, 384, generator=generator) * kinds.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return weight[torch.randperm(384, generator=generator)]


class TestSMaT:
    """Okanovic et al., High Performance Unstructured SpMM Computation Using Tensor Cores (SC 2024)."""

    def test_reordering_finds_the_planted_blocks(self, planted: torch.Tensor) -> None:
        plain, found = BSR(16, 16).stored(planted), Permuted(BSR(16, 16)).stored(planted)
        wanted = int(torch.count_nonzero(planted))
        assert found <= 1.1 * wanted and plain >= 3 * found

    def test_the_product_is_that_of_the_given_order_with_a_third_of_the_blocks(self, planted: torch.Tensor) -> None:
        fmt = Permuted(BSR(16, 16))
        assert agrees(kernel(fmt, 384, 384), fmt, planted, (1, 5, 64))

    def test_such_orders_are_proposed_where_rows_are_alike_and_nowhere_else(self, planted: torch.Tensor) -> None:
        ctx = SimpleNamespace(options=SimpleNamespace(tune="measure"), target=TARGET)
        nnz = int(torch.count_nonzero(planted))
        problem = Problem("linear", 384, 384, "float32", nnz)
        assert Permuted(BSR(16, 1)) in _reorder.formats(planted, problem, ctx)  # type: ignore[arg-type]
        random = gaussian(384, 384) * (torch.rand(384, 384, generator=torch.Generator().manual_seed(2)) < 0.1)
        assert _reorder.formats(random, problem, ctx) == []  # type: ignore[arg-type]
        band = torch.zeros(1024, 1024)
        for k in range(-4, 5):
            band += torch.diag(torch.ones(1024 - abs(k)), k)
        order = torch.randperm(1024, generator=torch.Generator().manual_seed(3))
        hidden, thin = band[order][:, order], Problem("linear", 1024, 1024, "float32", 9000)
        bits = (hidden != 0).numpy()
        rows = order_of("rcm", bits)
        cols = order_of("rcm", bits[rows].T)
        assert _reorder.fill(bits[rows][:, cols], 16, 16) >= 5 * _reorder.fill(bits, 16, 16)
        cuda = SimpleNamespace(options=ctx.options, target=Target.parse("cuda:sm_90"))
        assert _reorder.formats(planted, problem, cuda) == [Permuted(BSR(16, 16))]  # type: ignore[arg-type]
        assert all(isinstance(f, Permuted) for f in _reorder.formats(hidden, thin, ctx))  # type: ignore[arg-type]


class TestFastSparseConvNets:
    """Elsen et al., Fast Sparse ConvNets (CVPR 2020): the SpMM stream, in its linear form."""

    @pytest.mark.parametrize("fmt", [CSR(), BSR(2, 1), BSR(4, 1), CSRGroups()], ids=lambda f: f.text())
    def test_streams_are_exact_at_every_sparsity_with_the_clamp_fused(self, fmt: Format) -> None:
        spec = kernel(fmt, 61, 83, (Step("clamp", (0.0, 6.0)),))
        for sparsity in (0.0, 0.5, 0.9, 0.99):
            dense = gaussian(61, 83) * (torch.rand(61, 83, generator=torch.Generator().manual_seed(4)) >= sparsity)
            dense[10:14] = 0
            assert agrees(spec, fmt, dense, (1, 4, 31, 64))


class TestSRigL:
    """Lasby et al., Dynamic Sparse Training with Structured Sparsity (ICLR 2024): the condensed layer."""

    def test_condensed_equals_masked_and_every_row_has_the_same_fan_in(self) -> None:
        fmt = FanIn(8)
        weight = gaussian(60, 77)
        mask = fmt.choose(weight)
        assert set(mask.sum(1).tolist()) == {8}
        dense = weight * mask
        packed = fmt.resolve(60, 77).pack(dense)
        assert packed["values"].shape == (60, 8) and packed["indices"].shape == (60, 8)
        assert agrees(kernel(fmt, 60, 77), fmt, dense, (1, 3, 32))


class TestGQSA:
    """Zeng et al., GQSA: Group Quantization and Sparsity for Accelerating LLM Inference (2024)."""

    def test_half_of_the_groups_in_four_bits_take_a_quarter_of_half_precision(self) -> None:
        weight = gaussian(256, 512).half()
        kept = weight.float().reshape(256, -1, 16).pow(2).mean(2).flatten().argsort() >= 256 * 32 // 2
        pruned = weight * kept.reshape(256, 32).repeat_interleave(16, 1)
        packed = GroupInt4().pack(pruned)
        size = sum(t.numel() * t.element_size() for t in packed.values())
        assert size == GroupInt4().nbytes(256, 512, GroupInt4().stored(pruned), 2) and size <= 0.26 * 256 * 512 * 2
        back = GroupInt4().unpack(packed, 256, 512).float()
        group = pruned.float().reshape(256, 32, 16)
        step = (group.amax(2).clamp(min=0) - group.amin(2).clamp(max=0)) / 15
        assert bool(((back - pruned.float()).reshape(256, 32, 16).abs() <= 0.51 * step[..., None] + 2e-3).all())


class TestSpQR:
    """Dettmers et al., SpQR (ICLR 2024)."""

    def test_bits_follow_the_formula_and_outliers_pay(self) -> None:
        weight = gaussian(128, 256)
        weight[torch.rand(128, 256, generator=torch.Generator().manual_seed(5)) < 0.01] *= 12
        weight = weight.half()
        errors = {}
        for permille in (0, 10):
            fmt = SpQR(permille)
            packed = fmt.pack(weight)
            size = sum(t.numel() * t.element_size() for t in packed.values())
            outliers = 128 * 256 * permille // 1000
            assert 8 * size == 3 * 128 * 256 + 32 * 128 * 16 + outliers * (16 + 32) + 32 * 129
            errors[permille] = float((fmt.unpack(packed, 128, 256).float() - weight.float()).norm())
        assert errors[10] < 0.85 * errors[0]


class TestSparseByteNN:
    """Xu et al., SparseByteNN (2023): groups of output channels that share a pattern."""

    @pytest.mark.parametrize("k", [4, 8, 16])
    def test_vector_blocks_are_exact_and_rearranged_channels_keep_more(self, k: int) -> None:
        kinds = torch.rand(4, 96, generator=torch.Generator().manual_seed(6)) < 0.3
        owner = torch.randint(4, (64,), generator=torch.Generator().manual_seed(7))
        weight = gaussian(64, 96) * (0.1 + kinds[owner])

        def kept(w: torch.Tensor) -> tuple[torch.Tensor, float]:
            size = w.abs().reshape(64 // k, k, 96).sum(1)
            best = size >= size.flatten().kthvalue(round(size.numel() * 0.7)).values
            mask = best.repeat_interleave(k, 0)
            return w * mask, energy(w, mask)

        order = torch.from_numpy(order_of("jaccard", (weight.abs() > 0.8).numpy()))
        plain, rearranged = kept(weight), kept(weight[order])
        assert rearranged[1] >= plain[1]
        fmt = BSR(k, 1)
        assert fmt.stored(rearranged[0]) == int(torch.count_nonzero(rearranged[0]))
        assert agrees(kernel(fmt, 64, 96), fmt, rearranged[0], (1, 28))


class TestFlightLLM:
    """Zeng et al., FlightLLM (FPGA 2024): n:m mixed per block, and one kernel for a bucket of lengths."""

    def test_a_mix_keeps_more_than_uniform_n_of_m_of_the_same_size(self) -> None:
        scale = torch.rand(8, 8, generator=torch.Generator().manual_seed(8)).pow(3).repeat_interleave(16, 0)
        weight = gaussian(128, 128) * scale.repeat_interleave(16, 1)
        mask = BlockNM().mix(weight, 0.75)
        count = int(mask.sum())
        uniform = NM(4, 16).choose(weight)
        assert energy(weight, mask) / count > energy(weight, uniform) / int(uniform.sum())
        fmt = BlockNM()
        assert set(np.diff(fmt.pack(weight * mask)["pointers"].numpy()).tolist()) <= set(fmt.levels)

    def test_one_kernel_serves_every_length(self) -> None:
        weight = gaussian(48, 64)
        dense = weight * BlockNM().mix(weight, 0.7)
        spec = kernel(BlockNM(), 48, 64)
        assert agrees(spec, BlockNM(), dense, (*range(1, 258, 16), 255, 256, 257))


class TestS4:
    """Yen et al., S4: a High-sparsity, High-performance AI Accelerator (2022): balanced banks, one in 32."""

    def test_every_bank_holds_as_many_and_the_kernel_is_exact(self) -> None:
        fmt, weight = NM(1, 32), gaussian(40, 96)
        dense = weight * fmt.choose(weight)
        assert set(torch.count_nonzero(dense.reshape(40, -1, 32), dim=2).flatten().tolist()) == {1}
        packed = fmt.pack(dense)
        assert packed["values"].numel() == dense.numel() // 32 and torch.equal(fmt.unpack(packed, 40, 96), dense)
        assert agrees(kernel(fmt, 40, 96), fmt, dense, (1, 2, 16, 33))

    def test_the_model_of_cost_crosses_dense_once_and_follows_the_density(self) -> None:
        times = []
        for n in (31, 16, 8, 4, 2, 1):
            fmt = NM(n, 32)
            problem = Problem("linear", 4096, 4096, "float32", 4096 * 4096 * n // 32)
            spec = catalog.variant("linear_nm").specs(problem, fmt, TARGET)[0]
            times.append(cost.sparse_us(problem, fmt, spec, 64, TARGET) / cost.dense_us(problem, 64, TARGET))
        assert times == sorted(times, reverse=True)
        assert times[0] > 1 > times[-1] and times[0] / times[-1] > 8


def test_two_of_four_goes_to_sparse_tensor_cores_on_cuda() -> None:
    fact = SimpleNamespace(structures=(Structure("nm", (2, 4)),))
    problem = Problem("linear", 64, 64, "float16", 2048)
    cuda = SimpleNamespace(target=Target.parse("cuda:sm_90"), options=SimpleNamespace(tune="measure"))
    assert _propose._auto_formats(fact, problem, cuda)[0] == TwoFour()  # type: ignore[arg-type]
    cpu = SimpleNamespace(target=TARGET, options=cuda.options)
    assert _propose._auto_formats(fact, problem, cpu)[0] == NM(2, 4)  # type: ignore[arg-type]
    for params, fits in (((1, 4), True), ((1, 2), True), ((3, 4), False), ((4, 8), False)):
        assert _propose._two_of_four(*params) == fits


def test_a_reordered_site_is_compiled_and_gives_its_weight_back() -> None:
    generator = torch.Generator().manual_seed(9)
    kinds = torch.rand(6, 96, generator=generator) < 0.2
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU()).eval().requires_grad_(False)
    model[0].weight.mul_(kinds[torch.randint(6, (96,), generator=generator)])
    x = gaussian(7, 96)
    before = copy.deepcopy(model.state_dict())
    made = sparsec.compile(model, Permuted(BSR(16, 1)), (x,), tune="off")
    assert sparsec.report(made).row("0").variant == "linear_permuted_bsr"
    torch.testing.assert_close(made(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(sparsec.dense_state_dict(made).values(), before.values(), strict=True))
