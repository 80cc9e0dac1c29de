"""rewrite: exact rules on graphs; what they change, what they leave alone and why, and state dicts through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_tools import calls, captured
from rewrite_tools import close, rewritten, round_trip
from torch import nn

import sparsec
from sparsec.codegen import tune
from sparsec.driver import Context, Options, run_passes
from sparsec.errors import SpecError
from sparsec.passes import rewrite_merge, rewrite_terms
from sparsec.passes.normalise import Normalise
from sparsec.passes.rewrite import Applied, Rewrite
from sparsec.sparsifiers import Magnitude
from sparsec.spec import Spec


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self, width: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        return torch.softmax(scores * 0.2, -1) @ self.value(x)


class Two(nn.Module):
    """Two linears with nothing between them."""

    def __init__(self, wide: int = 64, out: int = 4, activation: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(16, wide), nn.Linear(wide, out), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(torch.relu(y) if self.activation else y)


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 32), (2, 5, 32)])
def test_query_key_and_value_become_one_linear(bias: bool, shape: tuple[int, ...]):
    model, x = Attention(bias=bias).eval(), torch.randn(shape)
    gm, entries = rewritten(model, x)
    assert calls(gm).count("linear") == 1 and calls(gm).count("split_with_sizes") == 1
    close(model, gm, x)
    name = "qkv_merged" if bias else "parallel_linears"
    assert entries == [Applied((name,), ("query", "key", "value"), "merged untimed, because tune='off'")]
    for rules, merged in ((["parallel_linears"], True), (["qkv_merged"], bias)):
        gm, entries = rewritten(model, x, rules=rules)
        assert [e.rules for e in entries] == ([tuple(rules)] if merged else [])


def test_merged_linears_round_trip_and_are_one_site():
    cm = round_trip(Attention().eval(), Attention, torch.randn(2, 5, 32))
    report = sparsec.report(cm)
    assert [(r.site, r.shape) for r in report.rows] == [("query", (96, 32))]
    assert "query, key, value rewritten by qkv_merged" in str(report)
    assert report.kept_nbytes == 3 * 32 * 33 * 4


def test_sparse_linears_merge_into_a_sparse_site():
    model = sparsec.sparsify(Attention(64).eval(), Magnitude(0.9))
    x = torch.randn(8, 64)
    passes = sparsec.DEFAULT.insert_before("annotate", Rewrite())
    cm = sparsec.compile(model, None, (x,), passes=passes, tune="off", min_speedup=0)
    rows = sparsec.report(cm).rows
    assert [(r.site, r.decision) for r in rows] == [("query", "sparse")] and rows[0].density < 0.11
    torch.testing.assert_close(cm(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, sparsec.dense_state_dict(cm)[k]) for k, v in model.state_dict().items())


def test_a_dynamic_batch_merges():
    model = Attention().eval()
    gm, entries = rewritten(model, torch.randn(4, 32), shapes="batch")
    assert calls(gm).count("linear") == 1 and not entries[0].refused
    for rows in (2, 9):
        close(model, gm, torch.randn(rows, 32))


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), torch.relu(self.b(x))


class Tied(Tail):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.relu(self.a(x)) + torch.tanh(nn.functional.linear(x, self.a.weight, self.b.bias))


def uneven() -> nn.Module:
    model = Attention().eval()
    with torch.no_grad():
        model.key.weight[1:] = 0
    return model


REFUSED = {
    "densities": (uneven, None, "their densities differ: 3% to 100%"),
    "named alone": (Attention, Spec({"key": sparsec.CSR()}), "the spec names 'key' by itself"),
    "treated differently": (Attention, Spec({"re:[qk].*": sparsec.CSR()}), "the spec treats them differently"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_linears_that_stay_apart_say_why(case: str):
    make, spec, reason = REFUSED[case]
    gm, entries = rewritten(make().eval(), torch.randn(5, 32), spec=spec)
    assert calls(gm).count("linear") == 3
    assert [(e.refused, e.detail) for e in entries] == [(True, reason)]


def test_results_of_the_model_and_tied_weights_stay_apart():
    gm, entries = rewritten(Tail().eval(), torch.randn(3, 8))
    assert calls(gm).count("linear") == 2 and "view of a larger tensor" in entries[0].detail
    gm, entries = rewritten(Tied().eval(), torch.randn(3, 8))
    assert calls(gm).count("linear") == 2 and entries[0].detail == "two of them have one weight"


@pytest.mark.parametrize("faster,merged", [(2.0, True), (1.04, False), (0.5, False)])
def test_the_clock_decides_every_group(faster: float, merged: bool, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def measured(contenders: Any) -> Any:
        seen.append([c() for c in contenders])
        return type("Timing", (), {"us": (100.0, 100.0 / faster)})

    monkeypatch.setattr(tune, "measure", measured)
    gm, entries = rewritten(Attention().eval(), torch.randn(8, 32), tune="measure")
    assert calls(gm).count("linear") == (1 if merged else 3)
    assert entries[0].refused != merged and f"{faster:.2f}x at 8 rows (100.0 -->" in entries[0].detail
    for apart, together in seen:
        for one, other in zip(apart, together):
            torch.testing.assert_close(one, other)
    gm, _ = rewritten(Attention().eval(), torch.randn(8, 32), tune="measure", shapes="batch")
    assert len(seen) == 1 + len(rewrite_merge.UNKNOWN_ROWS)


@pytest.mark.parametrize(
    ("us", "merged"),
    [((90, 50, 60, 80, 40, 70), True), ((90, 50, 60, 40, 49, 60), True), ((90, 30, 60, 40, 29, 60), False)],
    ids=["a kernel", "torch", "kernels apart"],
)
def test_merging_must_beat_the_kernels_that_the_linears_would_have_had_apart(
    us: tuple[float, ...], merged: bool, monkeypatch: pytest.MonkeyPatch
):
    """Six contenders: torch, one thread and all threads, of three linears and of the merged one."""
    seen = []

    def measured(contenders: Any) -> Any:
        seen.append([c() for c in contenders])
        return type("Timing", (), {"us": us})

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    gm, entries = rewritten(Attention().eval(), torch.randn(8, 32), tune="measure", spec=Spec.of(None))
    assert calls(gm).count("linear") == (1 if merged else 3)
    assert f"({min(us[:3]):.1f} --> {min(us[3:]):.1f} us)" in entries[0].detail
    ((torch_apart, *others),) = seen
    for contender in others:
        for one, other in zip(torch_apart, contender):
            torch.testing.assert_close(one, other)
    gm, _ = rewritten(Attention().eval(), torch.randn(17, 32), tune="measure", spec=Spec.of(None))
    assert len(seen[1]) == 2, "too many rows for kernels"


def test_sparse_linears_merge_by_their_rows_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "measure", lambda contenders: pytest.fail("timed dense linears"))
    model = sparsec.sparsify(Attention(), Magnitude(0.9)).eval()
    few, entries = rewritten(model, torch.randn(8, 32), tune="measure", spec=Spec.of(None))
    assert calls(few).count("linear") == 1 and "sparse, 8 rows at most" in entries[0].detail
    many, entries = rewritten(model, torch.randn(65, 32), tune="measure", spec=Spec.of(None))
    assert calls(many).count("linear") == 3 and entries[0].refused
    timing = type("Timing", (), {"us": (100.0, 90.0)})
    monkeypatch.setattr(tune, "measure", lambda contenders: timing)
    dense, entries = rewritten(model, torch.randn(8, 32), tune="measure", spec=Spec.of({"_default": None}))
    assert calls(dense).count("linear") == 1 and "1.11x at 8 rows" in entries[0].detail


# -- expressions ---------------------------------------------------------------------------------------------------


def test_linear_after_linear_is_folded_when_that_is_cheaper():
    model, x = Two().eval(), torch.randn(3, 5, 16)
    gm, entries = rewritten(model, x)
    assert calls(gm) == ["linear"] and entries[0].sites == ("first", "second")
    assert "flops" in entries[0].detail and set(entries[0].rules) <= set(rewrite_terms.RULES + rewrite_terms.HELPERS)
    close(model, gm, x)
    round_trip(model, Two, x)


@pytest.mark.parametrize("make", [lambda: Two(2, 64), lambda: Two(activation=True)], ids=["narrow", "activation"])
def test_linears_that_are_cheaper_apart_stay(make: Any):
    model, x = make().eval(), torch.randn(5, 16)
    before = calls(captured(model, x))
    gm, entries = rewritten(model, x)
    assert calls(gm) == before and not [e for e in entries if not e.refused]


def test_sparse_weights_are_not_multiplied_together():
    model = sparsec.sparsify(Two(), Magnitude(0.9)).eval()
    gm, entries = rewritten(model, torch.randn(5, 16))
    assert calls(gm) == ["linear", "linear"]
    assert [e.refused for e in entries] == [True] and "multiply sparse weights" in entries[0].detail


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gain = nn.Linear(16, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x @ self.a.weight.t()) * self.gain * 0.125)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(x) + self.b(x))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(64, 2)), nn.Parameter(torch.randn(2, 64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) @ (torch.tanh(y) @ torch.sigmoid(x))


EXPRESSIONS = {
    "scale_through_linear": (Scaled, [(5, 16)], ["linear", "relu"]),
    "factor_out": (Sum, [(5, 16)], ["linear", "relu"]),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_scalings_and_sums_go_into_the_weight(name: str):
    make, shapes, want = EXPRESSIONS[name]
    model, args = make().eval(), [torch.randn(s) for s in shapes]
    gm, entries = rewritten(model, *args)
    assert calls(gm) == want and name in entries[0].rules
    close(model, gm, *args)
    round_trip(model, make, *args)


def test_products_of_activations_are_reordered():
    model = LowRank().eval()
    x, y = torch.randn(2, 64), torch.randn(64, 2)
    gm, entries = rewritten(model, x, y)
    assert entries[0].rules == ("low_rank_left",) and calls(gm).count("mm") + calls(gm).count("matmul") == 2
    close(model, gm, x, y)
    assert entries[0].detail == f"{2 * (64 * 2 * 64 + 2 * 64 * 64)} --> {2 * 2 * 2 * 2 * 64} flops"


def test_fewer_flops_must_be_faster_too(monkeypatch: pytest.MonkeyPatch):
    slow = type("Timing", (), {"us": (100.0, 99.0, 99.5, 99.5)})
    monkeypatch.setattr(tune, "measure", lambda contenders: slow)
    gm, entries = rewritten(Two().eval(), torch.randn(5, 16), tune="measure")
    assert calls(gm) == ["linear", "linear"]
    assert entries[0].refused and entries[0].detail == "fewer flops, but measured 1.01x only"


def test_open_sizes_need_a_rule_that_always_pays():
    gm, entries = rewritten(Two().eval(), torch.randn(4, 16), shapes="batch")
    assert calls(gm) == ["linear"] and not entries[0].refused


# -- moving and sharing --------------------------------------------------------------------------------------------


class Moves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2).permute(0, 2, 1)
        z = x.permute(1, 2, 0).permute(1, 2, 0)
        return y.relu() + z.permute(1, 2, 0).relu() + x.relu()


def test_permutations_that_cancel_disappear_and_equal_calls_are_shared():
    model, x = Moves().eval(), torch.randn(3, 3, 3)
    gm, entries = rewritten(model, x)
    assert calls(gm).count("transpose") == 0 and calls(gm).count("relu") < 3
    assert {e.rules[0] for e in entries} == {"transposes_cancelled", "shared"}
    assert torch.equal(gm(x), model(x))


def test_chance_and_results_are_not_shared():
    class Random(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.rand_like(x) + x, torch.rand_like(x) + x, x * 2, x * 2

    gm, entries = rewritten(Random().eval(), torch.randn(3))
    assert calls(gm).count("rand_like") == 2 and calls(gm).count("mul") == 2 and not entries


def test_numbers_of_different_types_are_different():
    class Numbers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1).relu() + (x * 1.0).relu() + (x * True).relu()

    gm, _ = rewritten(Numbers().eval(), torch.arange(3))
    assert gm(torch.arange(3)).dtype is torch.float32


# -- the pass ------------------------------------------------------------------------------------------------------


def test_only_the_rules_that_were_asked_for_are_applied():
    gm, entries = rewritten(Attention().eval(), torch.randn(5, 32), rules=["shared"])
    assert calls(gm).count("linear") == 3 and not entries
    with pytest.raises(SpecError, match="no rule is called 'merge'"):
        Rewrite(["merge"])
    with pytest.raises(SpecError, match="belong to sparsec.passes.restructure.Restructure"):
        Rewrite(["kron_vec"])
    with pytest.raises(SpecError, match="engine='z3'"):
        Rewrite(engine="z3")
    assert repr(Rewrite()) == "Rewrite()" and repr(Rewrite(["shared"])) == "Rewrite(['shared'])"


def test_tolerance_zero_forbids_lossy_passes_and_not_this_one():
    assert Rewrite.exact
    gm, entries = rewritten(Attention().eval(), torch.randn(5, 32), tolerance=0.0)
    assert calls(gm).count("linear") == 1 and not entries[0].refused


def test_nothing_happens_in_training():
    gm = captured(Attention().eval(), torch.randn(5, 32))
    run_passes(gm, [Normalise(), Rewrite()], Context(options=Options(training=True)))
    assert calls(gm).count("linear") == 3


def test_counts_changes_and_repeats_to_a_fixed_point():
    gm = captured(Attention().eval(), torch.randn(5, 32))
    history = run_passes(gm, [Normalise(), Rewrite(), Rewrite()], Context(options=Options(tune="off")))
    assert [e.changes for e in history if e.name == "rewrite"] == [1, 0]


@pytest.mark.parametrize("engine", ["auto", "search"])
def test_engines_agree(engine: str):
    model, x = Two().eval(), torch.randn(5, 16)
    gm = captured(model, x)
    run_passes(gm, [Normalise(), Rewrite(engine=engine)], Context(options=Options(tune="off")))
    assert calls(gm) == ["linear"]
    close(model, gm, x)


@pytest.mark.parametrize("shapes", [None, "batch"])
def test_a_transformer_keeps_its_outputs_and_its_state_dict(shapes: Any):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                                     vocab_size=50)  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 50, (3, 5))
    passes = sparsec.DEFAULT.insert_before("annotate", Rewrite())
    cm = sparsec.compile(model, None, example_kwargs={"input_ids": ids}, dynamic_shapes=shapes, passes=passes,
                         tune="off")  # fmt: skip
    report = sparsec.report(cm)
    names = [r.site for r in report.rows if "attention.self" in r.site]
    assert names == ["encoder.layer.0.attention.self.query"] and any(
        "attention.self.value rewritten by qkv_merged" in note for note in report.notes
    )
    ids = ids if shapes is None else torch.randint(0, 50, (4, 5))
    torch.testing.assert_close(cm(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
    state = sparsec.dense_state_dict(cm)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
