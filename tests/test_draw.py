"""The picture of a graph: folding, layout, and the SVG and HTML files."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from sparsec import codes
from sparsec.draw import draw, make_panels, svg
from sparsec.draw_blocks import fold, group_of, quiet, shown
from sparsec.draw_layout import DUMMY, GAP_X, layout, levels_of
from sparsec.errors import SpecError
from sparsec.graph import KEY, Fact
from sparsec.report import Report, Row

SVG = "{http://www.w3.org/2000/svg}"


class Layer(nn.Module):
    """A transformer layer in miniature: three projections, attention, two residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = [f(x).view(1, 4, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v)]
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).reshape(1, 4, 8)
        x = self.norm(x + self.o(y))
        return x + self.down(F.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        mask = (keep > 0)[:, None, None, :].expand(1, 2, 4, 4)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def capture(layers: int) -> tuple[fx.GraphModule, Report]:
    """An exported encoder whose linears carry facts and rows; one stays dense."""
    torch.manual_seed(0)
    example = (torch.randn(1, 4, 8), torch.ones(1, 4))
    program = torch.export.export(Encoder(layers).eval(), example, strict=False).run_decompositions({})
    gm = program.module(check_guards=False)
    report = Report(capture={"rung": "export"})
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            site = list(node.meta["nn_module_stack"].values())[-1][0]
            node.meta[KEY] = Fact(site, "linear", "Linear", "w", None, (8, 8), "float32", nnz=8)
            if site == "layers.0.up":
                slow = {"dense_us": 2.0, "sparse_us": 3.0, "code": codes.DENSE_FASTER, "reason": "<slow & sad>"}
                report.add(Row(site, shape=(16, 8), **slow))
            else:
                fast = {"dense_us": 4.0, "sparse_us": 2.0, "decision": "sparse", "reason": "2.00x as fast as dense"}
                report.add(Row(site, shape=(8, 8), density=0.125, format="csr(index_bits=16,block=128)", **fast))
    return gm, report


@pytest.fixture(scope="module")
def encoder() -> tuple[fx.GraphModule, Report]:
    return capture(12)


def test_small_nodes_are_folded_away(encoder):
    gm, report = encoder
    blocks = fold(gm.graph, report).blocks
    names = [b.name for b in blocks if b.kind == "op"]
    assert names.count("attention") == 12 and names.count("layer_norm") == 12 and len(names) == 24
    assert sum(b.kind == "site" for b in blocks) == 72
    assert len(blocks) < len(gm.graph.nodes) / 3
    up = next(b for b in blocks if b.name == "layers.3.up")
    assert "gelu" in up.folded and shown(up.folded) == "+ gelu" and up.row is report.row("layers.3.up")
    drawn = [n for b in blocks for n in b.nodes]
    assert sorted(drawn) == sorted(n.name for n in gm.graph.nodes if n.op != "get_attr"), "no node is lost or doubled"


def test_folding_never_closes_a_cycle():
    """A diamond whose quiet join could be folded into either side, and random graphs of quiet and loud nodes."""
    rng = random.Random(0)
    for _ in range(30):
        graph = fx.Graph()
        values = [graph.placeholder("x"), graph.placeholder("y")]
        for _ in range(40):
            target = rng.choice([torch.ops.aten.add.Tensor, torch.ops.aten.mm.default])
            values.append(graph.call_function(target, (rng.choice(values), rng.choice(values))))
        graph.output(values[-1])
        blocks = fold(graph)
        assert all(a < b for a, b in blocks.edges), "edges run forward, so there is no cycle"


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("encoder.layer.3.attention.self.query", "encoder.layer.3"),
        ("model.layers.10.mlp.up_proj#2", "model.layers.10"),
        ("features.0.0", "features.0"),
        ("embeddings.word_embeddings", "embeddings"),
        ("0", "0"),
        ("fc#2", "fc#2"),
        ("", ""),
        ("<root>", "<root>"),
    ],
)
def test_groups_are_layers(path: str, group: str):
    assert group_of(path) == group


def test_traced_modules_and_methods_are_known_too():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.fc(x)).view(2, 2) + 1

    blocks = fold(fx.symbolic_trace(Net()).graph).blocks
    assert [b.name for b in blocks] == ["x", "fc", "act", "output"]
    assert blocks[2].folded == ["view", "add"]
    graph = fx.Graph()
    assert not quiet(graph.placeholder("x"))


def test_layers_follow_longest_paths():
    edges = [(0, 1), (0, 2), (1, 3), (2, 3), (0, 3), (3, 5), (4, 5)]
    assert levels_of(6, edges) == [0, 1, 1, 2, 2, 3], "a late input sits above its user"


def test_boxes_do_not_overlap_and_edges_pass_between():
    rng = random.Random(1)
    for _ in range(20):
        count = rng.randint(2, 25)
        sizes = [(rng.choice([40.0, 90.0, 158.0]), rng.choice([14.0, 50.0])) for _ in range(count)]
        edges = sorted({(a, b) for b in range(1, count) for a in rng.sample(range(b), min(b, rng.randint(0, 3)))})
        plan = layout(sizes, edges)
        both = zip(plan.centres, sizes, strict=True)
        boxes = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in both]
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] + GAP_X <= b[0] + 0.01 or b[2] + GAP_X <= a[0] + 0.01 or a[3] <= b[1] or b[3] <= a[1]
        for x0, y0, x1, y1 in boxes:
            assert min(x0, y0) > -0.01 and x1 <= plan.width + 0.01 and y1 <= plan.height + 0.01
        for (a, b), route in zip(edges, plan.routes, strict=True):
            assert route[0] == (plan.centres[a][0], boxes[a][3]) and route[-1] == (plan.centres[b][0], boxes[b][1])
            assert all(p[1] <= q[1] for p, q in itertools.pairwise(route)), "edges only run downwards"
            for (x, y), (x0, y0, x1, y1) in itertools.product(route, boxes):
                assert not (x0 - DUMMY / 2 < x < x1 + DUMMY / 2 and y0 < y < y1), "bends keep clear of boxes"


def test_svg_is_readable(encoder):
    gm, report = encoder
    text = svg([("", gm.graph)], report)
    root = ElementTree.fromstring(text)
    width, height = float(root.get("width")), float(root.get("height"))
    assert 0.7 < width / height < 3, "the page wraps into columns"
    titles = [t.text.splitlines()[0] for t in root.iter(f"{SVG}title")]
    for row in report.rows:
        assert titles.count(row.site) >= 1
    assert "SPC0100: <slow & sad>" in "".join(t.text for t in root.iter(f"{SVG}title")), "tooltips carry the sentence"
    labels = [t.text for t in root.iter(f"{SVG}text")]
    assert "csr(16,128) · 88% zeros" in labels and "2.0x + gelu" in labels and "SPC0100 + gelu" in labels
    assert {f"layers.{i}" for i in range(12)} <= set(labels)
    assert {"sparse kernel", "factored", "stays dense"} <= set(labels), "there is a legend"
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(k, 0)) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


def test_many_graphs_share_a_page_without_overlap():
    text = svg([(f"region {i}", fx_chain(3 + i % 4)) for i in range(12)], None)
    root = ElementTree.fromstring(text)
    assert 0.5 < float(root.get("width")) / float(root.get("height")) < 3
    frames = [r for r in root.iter(f"{SVG}rect") if r.get("rx") == "8"]
    boxes = [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in frames]
    assert len(boxes) >= 12
    for (x, y, w, h), (u, v, p, q) in itertools.combinations(boxes, 2):
        assert x + w <= u or u + p <= x or y + h <= v or v + q <= y


def fx_chain(length: int) -> fx.Graph:
    """placeholder -> length products -> output"""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(length):
        value = graph.call_function(torch.ops.aten.mm.default, (value, value))
    graph.output(value)
    return graph


def test_panels_hold_their_layer_and_deep_ones_are_cut():
    graph = fx_chain(100)
    panels = make_panels(fold(graph))
    assert len(panels) > 4 and panels[1].title == "inputs (2)"
    assert sorted(m for p in panels for m in p.members) == list(range(102))


def test_several_graphs_and_html(encoder, tmp_path: Path):
    gm, report = encoder
    page = draw([("region a", gm), ("region b", gm.graph)], report, tmp_path / "all.html")
    text = page.read_text()
    assert text.startswith("<!doctype html>") and text.count("<svg") == 1
    assert "region a" in text and "region b" in text
    assert "<slow" not in text and "&lt;slow &amp; sad&gt;" in text and "<table>" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"
    bare = draw(gm, None, str(tmp_path / "bare.svg"))
    ElementTree.parse(bare)


def test_unknown_suffix_is_named(encoder, tmp_path: Path):
    with pytest.raises(SpecError, match=r"'picture\.png'.*\.svg nor \.html"):
        draw(encoder[0], None, tmp_path / "picture.png")


def test_no_module_hides_a_public_function():
    """`sparsec.draw` and `sparsec.report` are functions, however often the modules of these names are imported."""
    code = (
        "import sparsec, importlib; [importlib.import_module('sparsec.' + m) for m in ('draw', 'report')];"
        "import sys; sys.exit(not (callable(sparsec.draw) and callable(sparsec.report)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bytes_are_the_same_in_every_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_draw as t;"
        "gm, r = t.capture(2); sys.stdout.write(t.svg([('', gm.graph)], r))"
    )
    run = partial(subprocess.run, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    there = run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "3"}).stdout
    gm, report = capture(2)
    assert there == svg([("", gm.graph)], report)
