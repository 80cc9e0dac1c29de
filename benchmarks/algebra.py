"""What the exact rewrites, the planner and the searches gain: times in one run against what they replace, and counts.

Run by itself or at the end of `benchmarks/factors.py`. Every row has the ratio that it must reach, its bar.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timing import exclusive, headline, idle, interleave, write_json
from torch import nn
from torch.nn import functional as F

import sparsec
from sparsec.algebra import Symmetric, plan, plan_many
from sparsec.algebra.attention import kronecker_attention
from sparsec.factors.select import mode_spectra, pack_ranks, tucker_parameters
from sparsec.factors.tucker import hooi
from sparsec.passes.restructure import Restructure
from sparsec.passes.rewrite import Rewrite

Row = dict[str, Any]


def timed(name: str, bar: float, before: Callable[[], Any], after: Callable[[], Any], rounds: int, note: str) -> Row:
    times = interleave({"before": before, "after": after}, rounds)
    us = {n: 1e6 * t.median for n, t in times.items()}
    return {"name": name, "us": us, "ratio": us["before"] / us["after"], "bar": bar, "note": note}


class Projections(nn.Module):
    """Three linears on one input, multiplied and added, with a share of zeros."""

    def __init__(self, width: int, zeros: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for layer in (self.query, self.key, self.value):
                layer.weight.mul_(torch.rand_like(layer.weight) >= zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x) * self.key(x) + self.value(x)


def merged(rounds: int) -> Iterator[Row]:
    """Parallel linears on one input, against the same model compiled without the rule."""
    for zeros in (0.9, 0.0):
        for batch in (1, 2, 4, 8):
            torch.manual_seed(0)
            model, x = Projections(384, zeros).eval(), torch.randn(batch, 384)
            apart = sparsec.compile(model, None, (x,))
            one = sparsec.compile(model, None, (x,), passes=sparsec.DEFAULT.insert_before("annotate", Rewrite()))
            noted = next((n for n in sparsec.report(one).notes if "merged" in n), "")
            bar = 1.15 if zeros else 1.0
            name = f"merged linears 384, {zeros:.0%} zeros, batch {batch}"
            yield timed(name, bar, partial(apart, x), partial(one, x), rounds, noted)


class Circulant(nn.Module):
    """A feed-forward network whose two weights are block-circulant, computed from one column a block."""

    def __init__(self, width: int, block: int) -> None:
        super().__init__()
        for name, (p, q) in {
            "up": (4 * width // block, width // block),
            "down": (width // block, 4 * width // block),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(p, q, block) / (q * block) ** 0.5))
        self.register_buffer("order", (torch.arange(block)[:, None] - torch.arange(block)) % block)

    def weight(self, columns: torch.Tensor) -> torch.Tensor:
        p, q, block = columns.shape
        return columns[:, :, self.order].permute(0, 2, 1, 3).reshape(p * block, q * block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x, self.weight(self.up))), self.weight(self.down))


class Kronecker(nn.Module):
    """A feed-forward network of Kronecker products behind a diagonal scaling, as adapters have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        small, large = int(width**0.5), width // int(width**0.5)
        self.scale = nn.Parameter(torch.randn(width))
        self.a, self.b = (
            nn.Parameter(torch.randn(2 * small, small) / 8),
            nn.Parameter(torch.randn(2 * large, large) / 8),
        )
        self.c, self.d = (
            nn.Parameter(torch.randn(small, 2 * small) / 8),
            nn.Parameter(torch.randn(large, 2 * large) / 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ torch.diag(self.scale)
        return F.linear(F.gelu(F.linear(x, torch.kron(self.a, self.b))), torch.kron(self.c, self.d))


def structured(rounds: int) -> Iterator[Row]:
    """Models that compute a weight from smaller ones, against the same model compiled with the weight written out."""
    for name, model in (
        ("block-circulant 1024, blocks of 64", Circulant(1024, 64)),
        ("kronecker 1024", Kronecker(1024)),
    ):
        for batch in (1, 64):
            torch.manual_seed(0)
            x = torch.randn(batch, 1024)
            plain = sparsec.compile(model.eval(), None, (x,))
            read = sparsec.compile(model, None, (x,), passes=sparsec.DEFAULT.insert_before("normalise", Restructure()))
            notes = [n for n in sparsec.report(read).notes if n.startswith("rewrite")]
            yield timed(
                f"{name}, batch {batch}", 1.0, partial(plain, x), partial(read, x), rounds, "; ".join(notes[:2])
            )


def encoder(rounds: int) -> Iterator[Row]:
    """BERT-base's layer shapes with 90 % zeros: query, key and value of every layer merged."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False).eval()
    with torch.no_grad():
        for p in model.encoder.parameters():
            if p.dim() == 2:
                p.mul_(torch.rand_like(p) >= 0.9)
    ids = torch.randint(0, 30_000, (1, 8), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    spec = {r"re:encoder\..*": sparsec.Auto(), "_default": None}
    apart = sparsec.compile(model, spec, example_kwargs=given)
    one = sparsec.compile(
        model, spec, example_kwargs=given, passes=sparsec.DEFAULT.insert_before("annotate", Rewrite())
    )
    count = sum("qkv_merged" in n and "rewritten" in n for n in sparsec.report(one).notes)
    yield timed("BERT-base, 4 layers, 90 % zeros, 1 x 8", 1.0, lambda: apart(**given), lambda: one(**given), rounds,
                f"{count} merged")  # fmt: skip


def packing(rounds: int) -> Iterator[Row]:
    """Ranks of a Tucker core: one decomposition a mode and an exact search, against greedy steps by true loss."""
    generator = torch.Generator().manual_seed(7)
    sizes, budget = (10, 9, 8, 7), 500
    tensor = torch.randn(sizes, generator=generator, dtype=torch.float64)
    for m, n in enumerate(sizes):
        decay = torch.exp(-(0.15 + 0.15 * m) * torch.arange(n, dtype=torch.float64))
        turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        tensor = torch.movedim(torch.tensordot(turn * decay, tensor, dims=([1], [m])), 0, m)

    def loss(ranks: Sequence[int]) -> float:
        return 1 - float(hooi(tensor, tuple(ranks))[0].norm() / tensor.norm()) ** 2

    def greedy() -> tuple[int, ...]:
        chosen: tuple[int, ...] = (1,) * len(sizes)
        while True:
            grown = [tuple(r + (m == at) for at, r in enumerate(chosen)) for m in range(len(sizes))]
            grown = [
                r for r in grown if all(a <= n for a, n in zip(r, sizes)) and tucker_parameters(sizes, r) <= budget
            ]
            if not grown:
                return chosen
            chosen = min(grown, key=loss)

    def packed() -> tuple[int, ...]:
        return pack_ranks(mode_spectra(tensor), budget)

    note = f"loss {loss(packed()):.4f} against {loss(greedy()):.4f}"
    yield timed("tucker packing against greedy by true loss", 10.0, greedy, packed, min(rounds, 3), note)


def fields(rounds: int) -> Iterator[Row]:
    """Attention on a grid against its means, and a separable field on a 64^3 grid against its points."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 64 * 64, 32)
    yield timed("attention on 64 x 64 against means", 1.0, lambda: F.scaled_dot_product_attention(q, q, q),
                lambda: kronecker_attention(q, q, q, 64, 64), rounds, "counted: 32x; another function")  # fmt: skip
    n, rank = 64, 16
    nets = [
        nn.Sequential(nn.Linear(1, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, rank)) for _ in "xyz"
    ]
    axis = torch.linspace(-1, 1, n)
    points = torch.cartesian_prod(axis, axis, axis)
    drawn = plan("xr,yr,zr->xyz", *[(n, rank)] * 3)

    def each() -> torch.Tensor:
        parts = [net(points[:, i : i + 1]) for i, net in enumerate(nets)]
        return torch.einsum("nr,nr,nr->n", *parts)

    def grid() -> torch.Tensor:
        return drawn(*(net(axis[:, None]) for net in nets))

    note = f"{3 * n} evaluations instead of {3 * n**3}"
    yield timed("separable field on 64^3 against its points", 20.0, each, grid, min(rounds, 5), note)


def motifs(rounds: int) -> Iterator[Row]:
    """FLOPs of all connected motifs of up to five nodes on twenty, against the naive count."""
    import networkx as nx

    graph = torch.tensor(nx.to_numpy_array(nx.gnp_random_graph(20, 0.4, seed=1)))
    adjacency = Symmetric(graph)
    found = [g for g in nx.graph_atlas_g() if 2 <= g.number_of_nodes() <= 5 and nx.is_connected(g)]
    texts = [",".join("abcde"[u] + "abcde"[w] for u, w in g.edges) + "->" for g in found]
    made = plan_many([(t, *[adjacency] * g.number_of_edges()) for t, g in zip(texts, found)])
    yield {"name": f"{len(found)} motifs on 20 nodes, FLOPs", "us": {}, "ratio": made.naive / made.flops, "bar": 20.0,
           "note": f"{made.naive} --> {made.flops} flops, counted"}  # fmt: skip


PARTS = {"merged": merged, "structured": structured, "encoder": encoder, "packing": packing, "fields": fields,
         "motifs": motifs}  # fmt: skip


def rows(words: Sequence[str], rounds: int) -> Iterator[Row]:
    """The rows of all parts, or of those whose name is among the words."""
    for name, part in PARTS.items():
        if not words or name in words:
            yield from part(rounds)


def line(row: Row) -> str:
    text = f"{row['name']:<48} " + " --> ".join(f"{us:.0f} us" for us in row["us"].values())
    return f"{text}  {row['ratio']:.2f}x (bar {row['bar']:g})  {row['note']}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"only these of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    print(f"{headline()}, fp32")
    found = []
    with exclusive():
        if not idle(patience_s=5):
            print("the machine is busy: ratios are what to trust")
        for row in rows(options.parts, options.rounds):
            found.append(row)
            print(line(row), flush=True)
    write_json(options.json, "algebra", found)


if __name__ == "__main__":
    main()
