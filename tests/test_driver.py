"""The driver: order, counts, rollback, history, instruments; pipelines as values; options; logs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_tools import aten, build, calls
from torch import fx, nn

from sparsec import logs
from sparsec.driver import Context, Options, Pass, Pipeline, run_passes
from sparsec.errors import PassError, SparsecError, SpecError
from sparsec.graph import KEY, Constant, Fact, add_constant, constants, fact
from sparsec.history import code


def linear_graph() -> fx.GraphModule:
    return build(lambda x, w: aten.relu.default(aten.linear.default(x, w)), "x", w=torch.eye(4))


class Mark(Pass):
    """Marks the first linear as a site."""

    ensures = ("annotated",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        node = next(n for n in gm.graph.nodes if n.name.startswith("linear"))
        node.meta[KEY] = Fact("fc", "linear", "Linear", "w", None, (4, 4), "float32", nnz=4)
        return 1


class Tanh(Pass):
    """relu --> tanh."""

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        found = [n for n in gm.graph.nodes if n.target is aten.relu.default]
        for node in found:
            node.target = aten.tanh.default
        return len(found)


class Ruin(Pass):
    """Changes everything it can, then does what `how` says."""

    name = "ruin"

    def __init__(self, how: Any) -> None:
        self.how = how

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        add_constant(gm, "extra", torch.ones(2), Constant(("extra",)))
        gm.w = nn.Parameter(torch.zeros(4, 4))
        gm.meta[KEY]["note"] = "new"
        node = next(n for n in gm.graph.nodes if n.op == "call_function")
        node.meta[KEY] = Fact("gone", "linear", "Linear", "w", None, (4, 4), "float32")
        relu = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
        relu.target = aten.relu_.default if self.how == "in place" else aten.neg.default
        if isinstance(self.how, BaseException):
            raise self.how
        return 1 if self.how == "in place" else self.how


def test_runs_in_order_and_counts() -> None:
    gm = linear_graph()
    history = run_passes(gm, [Mark(), Tanh(), Tanh()], Context())
    assert [(e.name, e.changes) for e in history] == [("capture", 0), ("mark", 1), ("tanh", 1), ("tanh", 0)]
    assert gm.meta[KEY]["history"] is history
    assert calls(gm) == ["linear", "tanh"]
    x = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    assert torch.equal(gm(x), x.tanh())


def test_history_shows_code_facts_and_diffs() -> None:
    gm = linear_graph()
    history = run_passes(gm, [Mark(), Tanh()], Context())
    assert history.graphs()[0] == ("capture", history["capture"].code)
    assert "fc linear 4x4 float32, 25.0 % nonzero" in history["mark"].code
    assert history.diff("capture") == ""
    diff = history.diff("tanh").splitlines()
    assert diff[:2] == ["--- mark", "+++ tanh"]
    assert [line for line in diff[2:] if line.startswith("-")] == [
        "-    relu_default = torch.ops.aten.relu.default(linear_default);  linear_default = None"
    ]
    assert any(line.startswith("+") and "aten.tanh" in line for line in diff[2:])
    with pytest.raises(SpecError, match=r"no pass called 'tahn' ran; nearest: 'tanh'"):
        history["tahn"]
    assert [line.split()[:2] for line in str(history).splitlines()] == [["capture", "0"], ["mark", "1"], ["tanh", "1"]]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (ValueError("boom"), PassError, r"pass 'ruin' failed and was rolled back: ValueError: boom"),
        (PassError("no"), PassError, r"pass 'ruin' failed and was rolled back: no"),
        (SpecError("bad spec"), SpecError, r"bad spec"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        ("in place", PassError, r"relu_default' breaks 'functional'.*aten\.relu_\.default writes its argument"),
        (None, PassError, r"must return how many changes it made, got None"),
        (True, PassError, r"must return how many changes it made, got True"),
        (-1, PassError, r"must return how many changes it made, got -1"),
    ],
)
def test_a_failing_pass_leaves_no_trace(how: Any, kind: type[BaseException], message: str | None) -> None:
    gm = linear_graph()
    gm.meta[KEY]["list"] = ["old"]
    run_passes(gm, [Mark()], Context())
    weight, before, x = gm.w, code(gm), torch.randn(3, 4)
    expected = gm(x)
    with pytest.raises(kind, match=message) as caught:
        run_passes(gm, [Ruin(how)], Context())
    assert code(gm) == before
    assert "fc linear 4x4" in before
    assert gm.w is weight
    assert not hasattr(gm, "extra")
    assert set(constants(gm)) == {"w"}
    assert "note" not in gm.meta[KEY]
    assert gm.meta[KEY]["list"] == ["old"]
    site = next(n for n in gm.graph.nodes if n.name == "linear_default")
    assert fact(site).site == "fc"
    assert torch.equal(gm(x), expected)
    gm.graph.lint()
    if isinstance(how, ValueError) and kind is PassError:
        assert caught.value.__cause__ is how
    if isinstance(how, SpecError):
        assert caught.value.__notes__ == ["pass 'ruin' failed and was rolled back"]


def test_passes_before_the_failing_one_stay() -> None:
    gm = linear_graph()
    with pytest.raises(PassError):
        run_passes(gm, [Tanh(), Broken()], Context())
    assert calls(gm) == ["linear", "tanh"]


class Broken(Pass):
    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        raise RuntimeError("always")


def test_mutable_records_are_rolled_back() -> None:
    from dataclasses import dataclass, field

    @dataclass
    class Ledger:
        rows: list[int] = field(default_factory=list)

    class Append(Pass):
        def run(self, gm: fx.GraphModule, ctx: Context) -> int:
            gm.meta[KEY]["ledger"].rows.append(2)
            raise RuntimeError("late")

    gm = linear_graph()
    gm.meta[KEY]["ledger"] = Ledger([1])
    with pytest.raises(PassError):
        run_passes(gm, [Append()], Context())
    assert gm.meta[KEY]["ledger"] == Ledger([1])


def test_a_pass_without_run_is_told_what_to_define() -> None:
    class Lazy(Pass):
        pass

    with pytest.raises(PassError, match=r"pass 'lazy' \(Lazy\) defines no run\(gm, ctx\)"):
        run_passes(linear_graph(), [Lazy()], Context())


def test_requirements_are_checked_before_anything_runs() -> None:
    class Needs(Pass):
        requires = ("annotated",)

        def run(self, gm: fx.GraphModule, ctx: Context) -> int:
            return 0

    gm = linear_graph()
    with pytest.raises(PassError, match=r"'needs' requires 'annotated': 'mark' ensures it but comes later"):
        run_passes(gm, [Tanh(), Needs(), Mark()], Context())
    assert calls(gm) == ["linear", "relu"]
    with pytest.raises(PassError, match=r"no pass in the list ensures it; the order is needs"):
        run_passes(gm, [Needs()], Context())
    assert [e.changes for e in run_passes(gm, [Mark(), Needs()], Context())] == [0, 1, 0]


def test_lossy_passes_are_skipped_at_zero_tolerance() -> None:
    class Lossy(Tanh):
        name = "lossy"
        exact = False

    gm = linear_graph()
    history = run_passes(gm, [Lossy()], Context(options=Options(tolerance=0.0)))
    assert history["lossy"].skipped == "skipped: lossy, and tolerance is 0"
    assert calls(gm) == ["linear", "relu"]
    assert run_passes(gm, [Lossy()], Context(options=Options(tolerance=0.5)))["lossy"].changes == 1


def test_instruments_see_every_entry_and_times_reach_the_report() -> None:
    class Record:
        def __init__(self) -> None:
            self.seen: list[tuple[str, int]] = []

        def after(self, history: Any, gm: fx.GraphModule, ctx: Context) -> None:
            self.seen.append((history[-1].name, len(history)))

    class FakeReport:
        def __init__(self) -> None:
            self.timings: dict[str, Any] = {}

    record = Record()
    run_passes(linear_graph(), [Mark(), Tanh()], Context(), instruments=[record])
    assert record.seen == [("capture", 1), ("mark", 2), ("tanh", 3)]
    report = FakeReport()
    history = run_passes(linear_graph(), [Mark(), Tanh(), Tanh()], Context(report=report))
    assert list(report.timings["passes"]) == ["mark", "tanh"]
    assert report.timings["passes"]["tanh"] == pytest.approx(history[2].seconds + history[3].seconds)


# pipelines


def test_pipeline_edits_give_new_lists() -> None:
    base = Pipeline([Mark(), Tanh()])
    new = Broken()
    assert base.insert_before("tanh", new).names == ("mark", "broken", "tanh")
    assert base.insert_after("tanh", new).names == ("mark", "tanh", "broken")
    assert base.without("mark").names == ("tanh",)
    assert base.replace("mark", new).names == ("broken", "tanh")
    assert base.names == ("mark", "tanh")
    assert [p.name for p in [*base, new]] == ["mark", "tanh", "broken"]
    assert isinstance(base.without("mark"), Pipeline)
    assert repr(base) == "Pipeline(mark, tanh)"


def test_pipeline_names_what_is_wrong() -> None:
    base = Pipeline([Mark(), Tanh(), Tanh()])
    with pytest.raises(SpecError, match=r"no pass is called 'mrak'; nearest: 'mark'"):
        base.insert_before("mrak", Tanh())
    with pytest.raises(SpecError, match=r"'tanh' occurs at \[1, 2\]"):
        base.without("tanh")
    with pytest.raises(SpecError, match=r"make an instance of it"):
        Pipeline([Tanh])  # type: ignore[list-item]
    with pytest.raises(SpecError, match=r"subclass sparsec\.Pass"):
        Pipeline([print])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tune": "fast"}, r"tune='fast' is none of 'off', 'model', 'measure'"),
        ({"fallback": "sparse"}, r"fallback='sparse' is none of 'dense', 'error'"),
        ({"min_speedup": -1}, r"min_speedup=-1 must be a number >= 0"),
        ({"min_speedup": float("nan")}, r"min_speedup=nan"),
        ({"tolerance": -0.1}, r"tolerance=-0.1 must be None or a number"),
        ({"batches": (0,)}, r"batches=\(0,\) must be positive integers"),
    ],
)
def test_options_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Options(**values)


# logs


def test_log_grammar() -> None:
    assert logs.parse("") == {}
    assert logs.parse("+passes,-build, report") == {"passes": logs.DEBUG, "build": logs.ERROR, "report": logs.INFO}
    assert logs.parse("all,-graph") == {**dict.fromkeys(logs.ARTIFACTS, logs.INFO), "graph": logs.ERROR}
    with pytest.raises(SpecError, match=r"unknown name 'pases'; nearest: 'passes'; valid: all, passes, graph, diff"):
        logs.parse("pases")
    assert issubclass(SpecError, SparsecError)


def test_logs_follow_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(logs.VARIABLE, "passes,diff")
    run_passes(linear_graph(), [Mark(), Tanh()], Context())
    shown = capsys.readouterr().err
    assert "[sparsec:passes] tanh: 1 changes in " in shown
    assert "[sparsec:diff] +    tanh" in shown or "[sparsec:diff] +    relu_default = torch.ops.aten.tanh" in shown
    assert "[sparsec:graph]" not in shown
    monkeypatch.delenv(logs.VARIABLE)
    run_passes(linear_graph(), [Tanh()], Context())
    assert capsys.readouterr().err == ""
    with pytest.raises(SpecError, match="no log artifact is called 'x'"):
        logs.enabled("x")


def test_expensive_text_is_made_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "-graph")
    logs.log("graph", lambda: pytest.fail("the text was made"))
