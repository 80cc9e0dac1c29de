"""Streams: memory plans, the op against its kernels one by one, the pass, and what the graph keeps."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import sparsec
from sparsec.codegen import dispatch
from sparsec.codegen import stream as streams
from sparsec.codegen.build import get_kernel
from sparsec.codegen.stream import ARENA, Stream, arrange
from sparsec.errors import InputError, SpecError
from sparsec.ops import conv, pool
from sparsec.ops import stream as op
from sparsec.schedule import STREAM, candidates, describe, scheduled
from sparsec.target import Target


class Net(nn.Module):
    """A stem with a pooling, a residual block, a strided block, and a branch that is read outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.deep, self.wide = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1)
        self.last = nn.Conv2d(24, 8, 3, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = F.relu(x + self.two(F.relu(self.one(x))))
        early = F.relu6(self.wide(F.relu6(self.deep(x))))
        return self.last(early), early.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    generator = torch.Generator().manual_seed(1)
    for layer in (net.one, net.two, net.wide, net.last):
        layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) < 0.2
    return net


class Pooled(sparsec.Pass):
    """The generated pooling, whatever the clock says."""

    name, requires, ensures = "pooled", ("selected",), ()

    def run(self, gm: fx.GraphModule, ctx: Any) -> int:
        (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.max_pool2d.default)
        node.target, node.args = pool.OVERLOAD, (node.args[0], [3, 3], [2, 2], [1, 1], [1, 1])
        return 1


def compiled(model: Net, x: torch.Tensor, **options: Any) -> Any:
    passes = sparsec.DEFAULT.insert_before("pool", Pooled())
    return sparsec.compile(model, None, (x,), tune="off", min_speedup=0, passes=passes, **options)


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 23, 31, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def cm(model: Net) -> Any:
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return compiled(model, images(3), dynamic_shapes=dynamic)


def alone(cm: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The graph node by node, without its schedule."""
    gm = fx.GraphModule(cm, cm.graph)
    with torch.no_grad():
        return list(gm.forward(x))


def test_the_graph_keeps_its_nodes_and_the_code_runs_a_stream(cm: Any) -> None:
    nodes = cm.graph.find_nodes(op="call_function", target=conv.OVERLOAD)
    assert len(nodes) >= 5
    assert "sparsec.stream" in cm.code and not cm.graph.find_nodes(op="call_function", target=op.OVERLOAD)
    marked = [n for n in cm.graph.nodes if STREAM in n.meta]
    ops = [n for n in scheduled(cm.graph).nodes if n.target is op.OVERLOAD]
    assert sum(len(Stream.parse(n.args[2]).steps) for n in ops) == len(marked) >= 5
    assert any("as one stream" in note for note in sparsec.report(cm).notes)


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("batch", (1, 2, 3, 7))
def test_it_gives_the_bits_of_its_kernels(cm: Any, batch: int, threads: int) -> None:
    x, before = images(batch, batch), torch.get_num_threads()
    want = alone(cm, x)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            got = [cm(x), cm(x)]  # the first call may go through Python, the second does not
    finally:
        torch.set_num_threads(before)
    for answer in got:
        assert all(torch.equal(a, b) for a, b in zip(answer, want, strict=True))


def test_it_computes_the_model(cm: Any, model: Net) -> None:
    x = images(5)
    with torch.no_grad():
        for a, b in zip(cm(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        turned = x.to(memory_format=torch.channels_last)
        assert all(torch.equal(a, b) for a, b in zip(cm(turned), cm(x), strict=True))
        every_other = torch.cat([x, x])[::2]
        assert all(torch.equal(a, b) for a, b in zip(cm(every_other), alone(cm, every_other.contiguous()), strict=True))


def test_a_gradient_is_refused(cm: Any) -> None:
    with pytest.raises(InputError, match="training=True"):
        cm(images(2).requires_grad_())


def test_many_threads_share_one_model(cm: Any) -> None:
    batches = [images(1 + i % 4, i) for i in range(12)]
    want = [alone(cm, x) for x in batches]

    def one(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(a, b) for a, b in zip(cm(batches[i % 12]), want[i % 12], strict=True))

    with ThreadPoolExecutor(6) as workers:
        assert all(workers.map(one, range(120)))


def test_copies_files_and_torch_compile_keep_it(cm: Any, tmp_path: Path) -> None:
    x = images(4)
    with torch.no_grad():
        want = cm(x)
        loaded = sparsec.load(sparsec.save(cm, tmp_path / "m.sparsec"))
        for other in (copy.deepcopy(cm), copy.copy(cm), loaded):
            assert "sparsec.stream" in other.code
            assert all(torch.equal(a, b) for a, b in zip(other(x), want, strict=True))
        torch._dynamo.reset()
        twice = torch.compile(cm, backend="eager", fullgraph=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(twice, want, strict=True))


def test_the_op_is_one_for_torch(cm: Any) -> None:
    group = candidates(cm.graph)[0]
    inputs = [torch.randn(2, *shape) for shape in group.stream.shapes[: group.stream.inputs]]
    operands = [getattr(cm, str(node.target)).detach() for node in group.operands]
    torch.library.opcheck(op.OVERLOAD, (inputs, operands, group.stream.text()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert op.OVERLOAD(inputs, operands, group.stream.text())[0].dtype == torch.float32
        halves = [x.bfloat16() for x in inputs]
        cast = op.OVERLOAD(halves, operands, group.stream.text())
    with torch.no_grad():
        plain = op.OVERLOAD([x.float() for x in halves], operands, group.stream.text())
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))
    text = group.stream.text()
    with pytest.raises(ValueError, match="compiled for"):
        op.OVERLOAD([x[:, :, 1:] for x in inputs], operands, text)
    with pytest.raises(ValueError, match="operands"):
        op.OVERLOAD(inputs, operands[1:], text)
    with pytest.raises(ValueError, match="compiled for"):
        op.OVERLOAD([x.double() for x in inputs], operands, text)
    with pytest.raises(ValueError, match="refuses"):
        op.OVERLOAD(inputs, [operands[0][:1], *operands[1:]], text)
    empty = op.OVERLOAD([x[:0] for x in inputs], operands, text)
    assert all(y.shape[0] == 0 for y in empty)


def test_without_the_library_python_answers(cm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    group = candidates(cm.graph)[0]
    inputs = [torch.randn(3, *shape) for shape in group.stream.shapes[: group.stream.inputs]]
    operands = [getattr(cm, str(node.target)).detach() for node in group.operands]
    with torch.no_grad():
        want = op.OVERLOAD(inputs, operands, group.stream.text())
        monkeypatch.setattr(dispatch, "_state", [None])
        got = op._stream(inputs, operands, group.stream.text())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_mark_that_means_nothing_any_more_is_ignored(cm: Any) -> None:
    other = copy.deepcopy(cm)
    nodes = [n for n in other.graph.nodes if STREAM in n.meta]
    between = next(n for n in nodes[1:-1] if len(n.users) == 1 and n.target is conv.OVERLOAD and n in nodes)
    with other.graph.inserting_after(between):
        foreign = other.graph.call_function(torch.ops.aten.tanh.default, (between,))
    between.replace_all_uses_with(foreign, delete_user_cb=lambda user: user is not foreign)
    other.recompile()
    assert "sparsec.stream" not in other.code, "what lies between its nodes reads one of them and feeds another"
    x = images(2)
    with torch.no_grad():
        assert not torch.equal(other(x)[0], cm(x)[0])
        assert all(torch.equal(a, b) for a, b in zip(other(x), alone(other, x), strict=True))


def test_what_can_be_no_stream(cm: Any) -> None:
    nodes = cm.graph.find_nodes(op="call_function", target=conv.OVERLOAD)
    assert describe([nodes[0]]) is not None
    assert describe([cm.graph.find_nodes(op="placeholder")[0]]) is None
    text = Stream(1, describe(nodes[:1]).stream.steps, (1,)).text()  # type: ignore[union-attr]
    assert Stream.parse(text).text() == text
    for bad in (
        "",
        "[]",
        text.replace("[[0,0,-1", "[[0,5,-1"),
        text[:-4] + "[0]]",
        text + " ",
        text.replace("[[0,0,-1", "[[9,0,-1"),
    ):
        with pytest.raises(SpecError):
            Stream.parse(bad)


def test_values_that_live_together_lie_apart(cm: Any) -> None:
    stream = candidates(cm.graph)[0].stream
    sizes = [4 * torch.Size(shape).numel() for shape in stream.shapes]
    planned = [(at, sizes[v]) for v, (kind, at) in enumerate(stream.places) if kind == ARENA]
    assert 0 < stream.arena_bytes < sum(size for _, size in planned), "places are used again"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12), st.integers(0, 6)), max_size=14))
def test_no_two_values_overlap(spans: list[tuple[int, int, int]]) -> None:
    values = [(64 * size, first, first + length) for size, first, length in spans]
    offsets = arrange(values)
    for i, (a, (size, first, last)) in enumerate(zip(offsets, values, strict=True)):
        assert a % 64 == 0
        for b, (other, start, end) in zip(offsets[:i], values[:i], strict=True):
            assert last < start or end < first or a + size <= b or b + other <= a
    busiest = max((sum(s for s, f, e in values if f <= t <= e) for t in range(20)), default=0)
    assert max((a + v[0] for a, v in zip(offsets, values, strict=True)), default=0) <= 2 * busiest


@pytest.mark.parametrize("threads", (1, 2))
def test_channels_are_handed_over_a_few_at_a_time(model: Net, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    small = dataclasses.replace(Target.probe(), l2=8 << 10)
    monkeypatch.setattr(streams.Target, "probe", lambda: small)
    x = torch.randn(3, 3, 40 + threads, 37, generator=torch.Generator().manual_seed(0))
    cm = compiled(model, x)
    stream = max((group.stream for group in candidates(cm.graph)), key=lambda stream: len(stream.steps))
    handed = [(step.spec, reader.spec) for step, reader, n in zip(stream.steps, stream.steps[1:], stream.chunks) if n]
    assert {reader.op for _, reader in handed} == {"conv", "pool"}, "in front of the depthwise one, and of the pooling"
    assert any(step.epilogue[0].name == "add" for step, _ in handed), "a residual is handed over with them"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            want = alone(cm, x)
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(cm(x), want, strict=True))
    finally:
        torch.set_num_threads(before)


def test_a_kernel_computes_the_channels_it_is_asked_for(cm: Any) -> None:
    stream = candidates(cm.graph)[0].stream
    operands = [getattr(cm, str(node.target)).detach() for node in candidates(cm.graph)[0].operands]
    seen = set()
    for step in stream.steps:
        mine, operands = operands[: step.bias + step.buffers], operands[step.bias + step.buffers :]
        bias, buffers = (mine[0], mine[1:]) if step.bias else (None, mine)
        x, y = torch.randn(1, *step.spec.input_shape), torch.empty(1, *step.spec.output_shape)
        added = torch.randn_like(y) if step.residual >= 0 else None
        call, rows = get_kernel(step.kernel).call, y.shape[1]
        call(x, y, bias, added, *buffers)
        for low, high in ((0, 4), (4, rows), (0, rows)):
            part, some = torch.empty_like(y[0, low:high]), added[0, low:high].clone() if added is not None else None
            own = x[0, low * x.shape[1] // rows : high * x.shape[1] // rows].clone() if step.own else x
            call(own, part, bias, some, *buffers, low, high)
            assert torch.equal(part, y[0, low:high])
        for low, high in ((-4, 4), (4, 4), (0, rows + 4), (8, 4)):
            with pytest.raises(ValueError, match="output channels"):
                call(x, y, bias, added, *buffers, low, high)
        with pytest.raises(ValueError, match="expected x, y"):
            call(x, y, bias, added, *buffers, 0)
        with pytest.raises(ValueError):
            call(torch.cat([x, x]), torch.cat([y, y]), bias, added, *buffers, 0, 4)
        seen.add(step.spec.variant)
    assert len(seen) >= 3


def test_nothing_moves_across_a_write(cm: Any) -> None:
    graph = copy.deepcopy(cm).graph
    longest = max(len(group.nodes) for group in candidates(graph))
    middle = max(candidates(graph), key=lambda group: len(group.nodes)).nodes[longest // 2]
    with graph.inserting_before(middle):
        graph.call_function(torch.ops.aten.zero_.default, (graph.find_nodes(op="placeholder")[0],))
    parts = [len(group.nodes) for group in candidates(graph)]
    assert max(parts) < longest, "two streams, or one and a single kernel"


def test_shapes_that_no_pooling_kernel_takes() -> None:
    assert pool.spec_of((3, 8), "float32", [1], [1], [0], [1]) is None
    assert pool.spec_of((3, 8, 8), "float32", [2, 2], [2, 2], [0, 0]) is None
