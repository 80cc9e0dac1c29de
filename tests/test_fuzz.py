"""The kernel fuzzer: a quick share of the battery, what it once found, and that its checks see what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import testing, testing_kernels, testing_peers, testing_totals
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import KernelSpec, Step
from sparsec.formats import CSR, CSRGroups, Format, Quantized
from sparsec.target import Target
from sparsec.testing import Case, Data
from sparsec.testing_relations import RELATIONS, Trial

pytestmark = pytest.mark.usefixtures("user_flags")

TARGET = Target.probe()
VARIANTS = [v.name for v in testing_kernels.variants(TARGET)]
PLAIN = Data("uniform", 0.4, 9, "normal", "contiguous", 1, 5)


@functools.cache
def _kernel(variant: str) -> tuple[Case, KernelSpec]:
    """A small square kernel of each variant, whose sums all relations speak of."""
    rng = np.random.default_rng(3)
    while True:
        case = testing.draw_case(rng, TARGET, testing_kernels.variants(TARGET, [variant]))
        case = dataclasses.replace(case, rows=33, cols=33, bias=False, epilogue=())
        case = dataclasses.replace(case, format=testing.draw_format(rng, case.format.name, 33, 33))
        if spec := case.spec(TARGET):
            build_kernels([spec], TARGET)
            return case, spec


FOUND = (
    # one product may be off by all of the rounding of its activation, and hardswish then stretches that by 1.5
    (
        Case("linear_quantized", "avx512", Quantized(CSRGroups(7)), "float32", 384, 511, True, (Step("hardswish"),)),
        Data("diagonal", 0.02, 16, "normal", "contiguous", 1, 809560366),
    ),
    # float16 rounds results below 6e-5 in fixed steps: a power of two on the input shows bits that were not there
    (
        Case("linear_csr_groups_fp16", "avx2", CSRGroups(128), "float16", 129, 4, True, (Step("add"),)),
        Data("blocks", 0.5, 100, "normal", "contiguous", 1, 1905169466),
    ),
    (
        Case("linear_csr_groups_fp16", "avx2", CSRGroups(128), "float16", 129, 4, True, (Step("add"),)),
        Data("banded", 0.02, 24, "normal", "contiguous", 1, 366012255),
    ),
)
"""Problems that failed once."""


@pytest.mark.parametrize(("case", "data"), FOUND, ids=lambda v: getattr(v, "variant", ""))
def test_what_failed_once_passes(case: Case, data: Data) -> None:
    if case.isa not in TARGET.isas or (spec := case.spec(TARGET)) is None:
        pytest.skip(f"this processor has no {case.isa}")
    build_kernels([spec], TARGET)
    assert testing.failures(case, data, spec.text()) == []


def _grid() -> list[tuple[str, str, str]]:
    """(pattern, values, layout): every pair of two, and half of the triples."""
    return [
        (pattern, values, testing.LAYOUTS[(p + v + 2 * step) % 6])
        for p, pattern in enumerate(testing.PATTERNS)
        for v, values in enumerate(testing.VALUES)
        for step in range(3)
    ]


def test_the_grid_has_every_pair() -> None:
    for one, two, pairs in ((0, 1, 70), (0, 2, 84), (1, 2, 30)):
        assert len({(triple[one], triple[two]) for triple in _grid()}) == pairs


@pytest.mark.parametrize(("pattern", "values", "layout"), _grid())
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pattern_kind_of_value_and_layout(variant: str, pattern: str, values: str, layout: str) -> None:
    case, spec = _kernel(variant)
    seed = VARIANTS.index(variant) + 100 * testing.PATTERNS.index(pattern)
    data = dataclasses.replace(PLAIN, pattern=pattern, values=values, layout=layout, seed=seed)
    assert testing.failures(case, data, spec.text(), relations=()) == []


@pytest.mark.parametrize("batch", testing.BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_batch(variant: str, batch: int) -> None:
    case, spec = _kernel(variant)
    assert testing.failures(case, dataclasses.replace(PLAIN, batch=batch), spec.text(), relations=()) == []


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_relation(variant: str, relation: str) -> None:
    case, spec = _kernel(variant)
    other = _kernel({"float32": "linear_csr", "float16": "linear_csr_fp16"}.get(case.dtype, "linear_csr_bf16"))
    data = dataclasses.replace(PLAIN, threads=2, values="integers", pattern="power_law")
    assert testing.failures(case, data, spec.text(), (other[0].format, other[1].text()), [relation]) == []


@pytest.mark.parametrize("block", range(2))
def test_a_share_of_the_battery(block: int) -> None:
    wrong = [found for found in testing_kernels.run(0, 3, 25, block=block) if found[2]]
    assert wrong == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS), pattern=st.sampled_from(testing.PATTERNS),
    values=st.sampled_from(testing.VALUES), layout=st.sampled_from(testing.LAYOUTS), batch=st.integers(0, 70),
    threads=st.integers(1, 3),
    density=st.floats(0.0, 1.0), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_small_problem(
    variant: str, pattern: str, values: str, layout: str, batch: int, threads: int, density: float, seed: int
) -> None:
    case, spec = _kernel(variant)
    data = Data(pattern, density, batch, values, layout, threads, seed)
    assert testing.failures(case, data, spec.text()) == []


# The checks see what is wrong


def _lying(case: Case, spec: KernelSpec, change: float) -> Trial:
    """A trial whose kernel is fine and whose output is not."""
    ran = testing.trial(case, PLAIN, spec.text())
    y = ran.y.clone()
    y[3, 7] += change
    return dataclasses.replace(ran, y=y)


def test_the_oracle_sees_one_wrong_entry() -> None:
    case, spec = _kernel("linear_csr")
    fine = testing.trial(case, PLAIN, spec.text())
    assert fine.off(fine.y) == ""
    lie = _lying(case, spec, 1e-3)
    assert "of the bound" in lie.off(lie.y)


@pytest.mark.parametrize("name", ["repeat", "scaled input", "scaled weight", "transposed"])
def test_relations_see_an_output_that_is_not_the_kernels(name: str) -> None:
    case, spec = _kernel("linear_csr")
    assert RELATIONS[name](_lying(case, spec, 1e-2))


@pytest.mark.parametrize("name", ["threads", "permuted rows", "permuted columns", "fewer rows"])
def test_relations_see_a_kernel_that_does_not_do_what_was_expected(name: str) -> None:
    case, spec = _kernel("linear_csr")
    ran = testing.trial(case, PLAIN, spec.text())
    wrong = dataclasses.replace(ran.expected, value=ran.expected.value + 1.0)
    assert "of the bound" in (RELATIONS[name](dataclasses.replace(ran, expected=wrong)) or "")


def test_a_relation_is_silent_where_the_format_cannot_hold_the_weight() -> None:
    case, spec = _kernel("linear_nm")
    ran = testing.trial(case, dataclasses.replace(PLAIN, pattern="full"), spec.text())
    assert RELATIONS["transposed"](ran) is None


def test_a_failing_problem_shrinks_to_a_simple_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case, spec = _kernel("linear_csr")

    def failures(case: Case, data: Data, text: str, other: object = None) -> list[str]:
        return ["wrong"] if data.batch > 3 else []

    monkeypatch.setattr(testing, "failures", failures)
    small = testing.shrink(case, Data("banded", 0.5, 64, "special", "strided", 3, 1), spec.text())
    assert small == Data("one_entry", 0.02, 32, "integers", "contiguous", 1, 1)


def test_a_draw_follows_from_its_seed_and_has_siblings() -> None:
    table = testing_kernels.variants(TARGET)
    one, two = (testing_kernels.draw_kernels(np.random.default_rng(4), TARGET, table, 24) for _ in range(2))
    assert one == two and len({case.variant for case, _ in one}) >= 6
    assert testing_kernels._others(one)
    case = Case("linear_csr", "portable", CSR().resolve(4, 5), "float32", 4, 5, True, (Step("relu"),))
    assert testing_kernels._sibling(np.random.default_rng(0), case, []) is None


def test_a_few_blocks_draw_every_variant() -> None:
    table = testing_kernels.variants(TARGET)
    drawn = [
        case.variant
        for block in range(6)
        for case, _ in testing_kernels.draw_kernels(np.random.default_rng((0, block)), TARGET, table, 24, block * 12)
    ]
    assert set(drawn) == {variant.name for variant in table}


def test_a_spec_that_its_variant_refuses_is_none() -> None:
    fmt: Format = CSR().resolve(4, 5)
    assert Case("linear_csr", TARGET.isas[0], fmt, "bfloat16", 4, 5, True, ()).spec(TARGET) is None


# Totals


def test_totals_add_up_and_go_on(tmp_path: Path) -> None:
    totals = testing_totals.Totals(tmp_path / "deep" / "t.json")
    seen: list[int] = []

    def block(number: int) -> tuple[dict[str, object], list[str]]:
        seen.append(number)
        return {"cases": 5, "kinds": {"a": 2, "b": 3}}, ["broken"] if number == 1 else []

    record = testing_totals.resume(totals, "x", 7, 12, "cases", block)
    assert seen == [0, 1, 2] and record["cases"] == 15 and record["kinds"] == {"a": 6, "b": 9}
    record = testing_totals.resume(totals, "x", 7, 20, "cases", block)
    assert seen == [0, 1, 2, 3] and record["failures"] == ["broken"] and record["blocks"] == 4
    assert totals.record("x", 8)["blocks"] == 0
    assert testing_totals.resume(totals, "x", 8, 20, "cases", block, seconds=0)["blocks"] == 0
    assert set(json.loads(totals.path.read_text())["x"]) == {"7"}


def test_the_command_adds_to_its_totals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(testing_kernels, "KERNELS", 2)
    place = tmp_path / "t.json"
    arguments = ["x", "--problems", "6", "--each", "3", "--variant", "linear_csr", "--totals", str(place)]
    monkeypatch.setattr("sys.argv", arguments)
    assert testing_kernels.main() == 0
    assert "6 problems on 2 kernels of 1 variants" in capsys.readouterr().out
    assert json.loads(place.read_text())["kernels cpu 3 linear_csr"]["0"]["problems"] == 6


def test_a_recorded_failure_is_the_status_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing_kernels, "failures", lambda *a: ["oracle: off"])
    monkeypatch.setattr(testing_kernels, "KERNELS", 1)
    monkeypatch.setattr("sys.argv", ["x", "--problems", "1", "--each", "1", "--totals", str(tmp_path / "t.json")])
    assert testing_kernels.main() == 1


def test_special_values_are_not_tame() -> None:
    case, spec = _kernel("linear_csr")
    ran = testing.trial(case, dataclasses.replace(PLAIN, values="special"), spec.text())
    assert not ran.tame and not torch.isfinite(ran.x).all()
    assert RELATIONS["scaled input"](ran) is None


# Other libraries, under the same oracle


def test_peers_are_judged_by_the_same_oracle() -> None:
    counts, failures = testing_peers.block(1, 0, count=12)
    assert failures == [] and counts["problems"] == 12
    for name, outcomes in counts["peers"].items():
        assert sum(outcomes.values()) >= 12 and outcomes.get("right", 0) + outcomes.get("refused", 0) > 0, name


def test_a_peer_that_lies_refuses_or_dies_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    peers = {
        "liar": lambda weight, x: x @ weight.t() + 1,
        "refuser": refuse,
        "corpse": lambda weight, x: os._exit(1),
        "honest": lambda weight, x: torch.nan_to_num(x.double() @ weight.double().t()).to(x.dtype),
    }
    monkeypatch.setattr(testing_peers, "PEERS", peers)
    found = testing_peers.block(2, 0, count=6)[0]["peers"]
    assert found["liar"]["wrong"] >= 4 and found["refuser"] == {"refused": 6}
    assert found["corpse"] == {"crashed": 1} and found["honest"]["right"] >= 3
