"""The float64 oracle: what it accepts, and that it catches what is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen.kernel import STEPS, Step


def problem(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(33, 65, generator=g) * (torch.rand(33, 65, generator=g) < 0.3)
    return torch.randn(17, 65, generator=g).to(dtype), weight.to(dtype), torch.randn(33, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_itself_passes(dtype: torch.dtype) -> None:
    x, weight, bias = problem(dtype)
    verdict = verify.check(F.linear(x, weight, bias), x, weight, bias)
    assert verdict.ok and verdict.worst < 1


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_has_a_meaning_and_a_bound(name: str) -> None:
    x, weight, bias = problem()
    step = Step(name, (-0.5, 0.5)[: STEPS[name]] if STEPS[name] == 2 else (3.0,) * STEPS[name])
    residual = torch.randn(17, 33, generator=torch.Generator().manual_seed(5)) if name == "add" else None
    y = verify.apply_steps((step,), F.linear(x, weight, bias), residual)
    assert verify.check(y, x, weight, bias, (step,), residual).ok
    wrong = y.clone()
    wrong[3, 4] += 1e-3
    verdict = verify.check(wrong, x, weight, bias, (step,), residual)
    assert not verdict.ok and "row 3" in verdict.sentence and "feature 4" in verdict.sentence


def test_one_wrong_ulp_of_the_sum_is_tolerated_a_dropped_product_is_not() -> None:
    x, weight, _ = problem()
    y = F.linear(x, weight)
    assert verify.check(torch.nextafter(y, torch.full_like(y, torch.inf)), x, weight, None).ok
    pruned = weight.clone()
    row, column = weight.nonzero()[0].tolist()
    pruned[row, column] = 0
    assert not verify.check(F.linear(x, pruned), x, weight, None).ok


def test_wrong_shape_is_a_verdict_and_no_exception() -> None:
    x, weight, _ = problem()
    verdict = verify.check(torch.zeros(17, 32), x, weight, None)
    assert not verdict.ok and "(17, 32)" in verdict.sentence


def test_pruned_positions_contribute_nothing_even_times_infinity() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    x = torch.tensor([[2.0, torch.inf], [torch.nan, 1.0]])
    exact = verify.product(x.double(), weight.double())
    assert exact[0].tolist() == [2.0, 0.0]
    assert exact[1, 0].isnan() and exact[1, 1] == 0.0


def test_stored_nan_and_infinity_must_come_out() -> None:
    x, weight, _ = problem()
    weight[4, 5], weight[7, 8] = torch.nan, torch.inf
    y = F.linear(x, weight)
    assert verify.check(y, x, weight, None).ok
    assert not verify.check(torch.nan_to_num(y), x, weight, None).ok


def test_many_rows_are_checked_in_parts_and_the_place_is_right() -> None:
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.eye(16)
    y = F.linear(x, weight)
    assert verify.check(y, x, weight, None).ok
    y[2999, 15] += 1
    assert "row 2999" in verify.check(y, x, weight, None).sentence


def test_empty_batch_passes() -> None:
    assert verify.check(torch.zeros(0, 3), torch.zeros(0, 5), torch.ones(3, 5), None).ok


def test_sampled_rows_hold_both_ends_and_are_distinct() -> None:
    assert verify.sample(256) == slice(None)
    rows = verify.sample(1000)
    assert isinstance(rows, torch.Tensor) and len(rows) == verify.SAMPLE
    assert rows.unique().numel() == verify.SAMPLE and rows.min() == 0 and rows.max() == 999


@pytest.mark.parametrize("seed", range(4))
def test_products_with_infinities_equal_the_sum_of_stored_products(seed: int) -> None:
    """Every kind of non-finite term on both sides, against one sum per entry."""
    g = torch.Generator().manual_seed(seed)

    def special(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=g, dtype=torch.float64)
        kind = torch.randint(0, 40, shape, generator=g)
        for number, value in enumerate((torch.inf, -torch.inf, torch.nan, 0.0, -0.0)):
            values[kind == number] = value
        return values

    x, weight = special(19, 7), special(23, 7)
    kept = torch.rand(weight.shape, generator=g) < 0.7
    weight[~kept] = 0.0
    x[0] = torch.randn(7, generator=g).double()
    for stored in (None, kept):
        found = verify.product(x, weight, stored)
        places = weight != 0 if stored is None else stored
        want = torch.stack([torch.stack([(r[k] * w[k]).sum() for w, k in zip(weight, places)]) for r in x])
        assert torch.equal(found.isnan(), want.isnan())
        torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in STEPS if name not in ("scale", "add")])
def test_no_step_stretches_an_error_by_more_than_its_bound_allows(name: str) -> None:
    y = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    out = verify.apply_steps((Step(name, (-6.0, 6.0)[: STEPS[name]]),), y, None)
    steepest = float((out.diff() / y.diff()).abs().max())
    assert steepest <= verify._SLOPES.get(name, 1.0) + 1e-9
    assert steepest >= 0.9 * verify._SLOPES.get(name, 1.0)  # and the table says no more than it must


def test_a_blurred_input_behind_the_steepest_step_stays_in_its_bound() -> None:
    """A product of one entry may be off by all of the blur, and hardswish is steepest at 3."""
    x, weight = torch.tensor([[2.99]]), torch.ones(1, 1)
    y = torch.nn.functional.hardswish(torch.tensor([[2.99 - 0.01]]))
    blur = torch.tensor([0.01])
    assert verify.check(y, x, weight, None, (Step("hardswish"),), blur=blur).ok
    assert not verify.check(y, x, weight, None, (Step("hardswish"),), blur=blur / 2).ok
