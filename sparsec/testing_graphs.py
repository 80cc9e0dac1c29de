"""Random modules, compiled and compared with their float64 selves, with the graph's meaning checked after every pass.

A `Plan` is a seed and a few sizes: everything about a module follows from it, so that a failure is one line that can be
written down. Weights have few distinct shapes, so that thousands of graphs share their kernels.
`python -m sparsec.testing_graphs --seed 0 --graphs 200` runs them by the hundred.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsec import api
from sparsec.driver import Context, Pass
from sparsec.errors import CaptureError, PassError
from sparsec.passes import DEFAULT, Annotate, ConvRewrite, Fold, Fuse, Lower, Normalise, Pool, Select, Stream
from sparsec.passes.restructure import Restructure
from sparsec.passes.rewrite import Rewrite
from sparsec.testing_totals import DEFAULT_PATH, Totals, resume

WIDTH, WIDE, STEPS = 32, 64, 6  # features, features inside an MLP, sequence length
CAPTURES = ("export", "trace")
GRAPHS = 20  # of one block
_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.relu, F.gelu, F.silu, torch.tanh, F.hardswish, lambda x: F.gelu(x, approximate="tanh"),
    lambda x: torch.clamp(x, -1.0, 2.0), lambda x: x * 0.5, lambda x: x,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One random module and how it is compiled."""

    seed: int
    depth: int
    capture: str = "export"
    dynamic: bool = False
    order: int = 0  # which of ORDERS; beyond them the seed of a random one
    batch: int = 3
    writes: bool = True  # whether blocks write in place, which a trace cannot follow


ORDERS: tuple[tuple[type[Pass], ...], ...] = (
    tuple(type(step) for step in DEFAULT),
    (Normalise, Annotate, Fuse, Select, Lower),
    (Normalise, Fold, Annotate, Select, Lower),
    (Normalise, Annotate, Select, Lower),
    (Normalise, Fold, Normalise, Fold, Annotate, Fuse, Select, Lower),
    (Normalise, Annotate, Fold, Annotate, Fuse, Select, Lower),
)
"""The default pipeline, what is left without its optional passes, and passes that change nothing the second time."""


def passes_of(order: int) -> tuple[type[Pass], ...]:
    """The passes of `Plan.order`: beyond ORDERS a random subset of the exact ones, in a random order that is allowed.

    What may stand between `normalise` and `select` commutes: it may come in any order, any number of times; only
    `annotate` follows what changes weights behind its first run, whose facts would speak of weights that are gone.
    """
    if order < len(ORDERS):
        return ORDERS[order]
    rng = random.Random(f"order {order}")
    before: list[type[Pass]] = [Rewrite] if rng.random() < 0.3 else []
    before += [rng.choice((Normalise, Fold, Fold, ConvRewrite)) for _ in range(rng.randrange(5))]
    rng.shuffle(before)
    choices: tuple[tuple[type[Pass], ...], ...] = (
        (Fuse,), (Fuse,), (Annotate,), (Fold, Annotate), (ConvRewrite, Annotate),
    )  # fmt: skip
    between = [kind for _ in range(rng.randrange(4)) for kind in rng.choice(choices)]
    after: list[type[Pass]] = [Pool] if rng.random() < 0.5 else []
    last: list[type[Pass]] = [Stream] if rng.random() < 0.5 else []
    first: list[type[Pass]] = [Restructure] if rng.random() < 0.3 else []
    return (*first, Normalise, *before, Annotate, *between, Select, *after, Lower, *last)


def _prune(module: nn.Module, rng: random.Random) -> None:
    """Patterns that become sparse sites, some that do not, and an empty and a full weight now and then."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() < 2:
                continue
            kind = rng.randrange(8)
            keep = torch.rand(p.shape) < (0.0 if kind == 0 else 1.0 if kind == 1 else rng.choice((0.05, 0.2, 0.5)))
            if kind == 2 and p.dim() == 2 and p.shape[1] % 4 == 0:
                keep = torch.tensor([True, False, True, False]).repeat(p.shape[0], p.shape[1] // 4)
            p.mul_(keep)
            if "bias" not in name:
                p.mul_(1.0 + rng.random())


class RandomNet(nn.Module):
    """`depth` random blocks on (batch, STEPS, WIDTH) activations; earlier results stay around for residuals."""

    def __init__(self, seed: int, depth: int, writes: bool = True) -> None:
        super().__init__()
        rng = random.Random(f"graph {seed}")
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            kind = rng.choice(BLOCKS)
            if kind is InPlace and not writes:
                kind = Mlp
            earlier = [b for b in self.blocks if isinstance(b, Dense)]
            if kind is Dense and earlier and rng.random() < 0.25:
                self.blocks.append(rng.choice(earlier))  # the same module again
                continue
            block = kind(rng)
            if isinstance(block, Residual) and not writes:
                block.kind %= 2
            if isinstance(block, Dense) and earlier and rng.random() < 0.2:
                block.layer.weight = rng.choice(earlier).layer.weight  # a weight with two owners
            self.blocks.append(block)
        self.links = [rng.randrange(i + 1) for i in range(depth)]
        _prune(self, rng)
        own = random.Random(f"structure {seed}")  # draws of its own: what a seed made stays what it was
        self.structured = Structured(own) if own.random() < 0.2 else None
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        seen = [x if self.structured is None else self.structured(x)]
        for block, link in zip(self.blocks, self.links):
            seen.append(block(seen[-1], seen[link]))
        return {"last": seen[-1], "mean": (seen[-1].mean(1), seen[len(seen) // 2])}


class Dense(nn.Module):
    """activation(linear(x)), and sometimes the linear's value is read twice."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.7)
        self.act = rng.choice(_ACTIVATIONS)
        self.twice = rng.random() < 0.3

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.act(y) + y if self.twice else self.act(y)


class Residual(nn.Module):
    """linear(x) + old, on either side, before or after the activation; sometimes in place."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.act = rng.choice(_ACTIVATIONS)
        self.kind = rng.randrange(4)

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.kind == 0:
            return self.act(y + old)
        if self.kind == 1:
            return old + self.act(y)
        if self.kind == 2:
            y += old
            return y  # type: ignore[no-any-return]
        return torch.add(y, old, alpha=2)


class Mlp(nn.Module):
    """Up, activation, down, norm."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.act, self.norm = rng.choice(_ACTIVATIONS), nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.drop(self.down(self.act(self.up(x)))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Two heads over the sequence, one projection for all three or one for each."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.5) for _ in range(3))
        self.causal = rng.random() < 0.5

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        batch, steps = x.shape[0], x.shape[1]
        q, k, v = (f(x).view(batch, steps, 2, WIDTH // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + y.transpose(1, 2).reshape(x.shape)


class Shapes(nn.Module):
    """Concatenation, chunks, transposes and views around a linear layer."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDE, WIDTH)
        self.kind = rng.randrange(4)

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, old], -1)
        if self.kind == 0:
            return self.layer(both)  # type: ignore[no-any-return]
        if self.kind == 1:
            return self.layer(both.reshape(-1, WIDE)).view(x.shape)  # type: ignore[no-any-return]
        if self.kind == 2:
            return self.layer(both.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]
        one, two = self.layer(both).chunk(2, -1)
        return torch.cat([two, one], -1)


class Functional(nn.Module):
    """Weights that are computed: transposed, scaled, normalised, cast; products that are no nn.Linear."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.kind = rng.randrange(7)

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        w = self.weight
        if self.kind == 0:
            return x @ w
        if self.kind == 1:
            return F.linear(x, w.t() * 0.5, self.bias)
        if self.kind == 2:
            return F.linear(x, w / (w.norm() + 1.0))
        if self.kind == 3:
            return torch.addmm(self.bias, x.reshape(-1, WIDTH), w.t()).view(x.shape)
        if self.kind == 4:
            return torch.einsum("bti,oi->bto", x, w)
        if self.kind == 5:
            return torch.matmul(x, w.transpose(0, 1).contiguous()) + self.bias
        return F.linear(x, w.double().to(w.dtype), self.bias * 2)


class Structured(nn.Module):
    """A weight computed from smaller ones, by a structure that `restructure` reads: Kronecker, diagonal, circulant."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.randrange(5)
        self.one = nn.Parameter(torch.randn(4, 4) / 2)
        self.two = nn.Parameter(torch.randn(WIDTH // 4, WIDTH // 4) / (WIDTH // 4) ** 0.5)
        self.scale = nn.Parameter(torch.randn(WIDTH) / WIDTH**0.5)
        self.order: torch.Tensor
        self.register_buffer("order", (torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)) % WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == 0:
            return F.linear(x, torch.kron(self.one, self.two), self.scale)
        if self.kind == 1:
            return x @ torch.kron(self.one, self.two)
        if self.kind == 2:
            return x @ torch.diag(self.scale)
        if self.kind == 3:
            return F.linear(x, torch.kron(self.one, self.two) @ torch.kron(self.one, self.two))
        return F.linear(x, self.scale[self.order])


class InPlace(nn.Module):
    """Writes into a fresh tensor: arithmetic, activations, slices."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.kind = rng.randrange(4)

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.kind == 0:
            return F.relu(y, inplace=True)
        if self.kind == 1:
            return y.mul_(0.5).add_(old)  # type: ignore[no-any-return]
        if self.kind == 2:
            z = y.clone()
            z[:, 0] = 0.0
            return z + y  # type: ignore[no-any-return]
        return y.clamp_(min=-1.0, max=1.0) - old  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """Over the sequence, between transposes, grouped or not, with a norm."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=rng.choice((1, 2, WIDTH)))
        self.norm = rng.choice((nn.BatchNorm1d(WIDTH), nn.GroupNorm(4, WIDTH), nn.Identity()))

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return old + F.relu(self.norm(self.layer(x.transpose(1, 2)))).transpose(1, 2)


class Image(nn.Module):
    """A convolution of the activations seen as an image, pointwise, grouped, dilated or strided and spread again."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        kernel, dilation = rng.choice(((1, 1), (3, 1), (3, 2)))
        self.layer = nn.Conv2d(
            8, 8, kernel, padding=kernel // 2 * dilation, dilation=dilation, groups=rng.choice((1, 1, 8)),
            bias=rng.random() < 0.5,
        )  # fmt: skip
        self.norm = rng.choice((nn.BatchNorm2d(8), nn.Identity()))
        self.act = rng.choice(_ACTIVATIONS)

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.layer(x.reshape(x.shape[0], 8, STEPS, WIDTH // 8)))
        return self.act(y).reshape(x.shape) + old


class Plain(nn.Module):
    """No weights: casts, gates, norms, reductions."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.randrange(5)

    def forward(self, x: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        if self.kind == 0:
            return x.double().mul(1.5).to(x.dtype)
        if self.kind == 1:
            return x * torch.sigmoid(old)
        if self.kind == 2:
            return F.layer_norm(x, (WIDTH,))
        if self.kind == 3:
            return x - x.mean(-1, keepdim=True)
        return torch.softmax(x, -1) * WIDTH


BLOCKS: tuple[type[nn.Module], ...] = (
    Dense, Dense, Residual, Residual, Mlp, Attention, Shapes, Functional, Functional, InPlace, Convolution, Image,
    Plain,
)  # fmt: skip


class SemanticCheck(Pass):
    """Changes nothing: runs the graph and compares it with float64 eager; PassError names the pass that broke it."""

    name = "semantic"

    def __init__(self, after: str, number: int, reference: list[torch.Tensor], bound: list[float]) -> None:
        self.name = f"semantic_{number}_{after}"
        self.after, self.reference, self.bound = after, reference, bound

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        with torch.no_grad():
            found = _leaves(gm(*ctx.example_inputs))
        if wrong := compare(found, self.reference, self.bound):
            raise PassError(f"after {self.after!r} the graph computes something else: {wrong}")
        return 0


def _leaves(value: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def compare(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], bound: Sequence[float]) -> str:
    """What differs from the float64 reference by more than the bound of its output, or ""."""
    if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in reference]:
        return f"shapes {[tuple(t.shape) for t in found]}, expected {[tuple(t.shape) for t in reference]}"
    for number, (mine, exact, most) in enumerate(zip(found, reference, bound)):
        error = float((mine.double() - exact).abs().max()) if mine.numel() else 0.0
        if not error <= most:
            return f"output {number} is off by {error:.3g}, bound {most:.3g}"
    return ""


def oracle(net: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
    """Float64 outputs, and for each the error allowed: sixteen times that of eager float32, and a floor."""
    with torch.no_grad():
        exact = _leaves(copy.deepcopy(net).double()(x.double()))
        eager = _leaves(net(x))
    scale = [float(e.abs().max()) if e.numel() else 0.0 for e in exact]
    error = [float((a.double() - b).abs().max()) if b.numel() else 0.0 for a, b in zip(eager, exact)]
    return exact, [16 * e + 4e-6 * s + 1e-6 for e, s in zip(error, scale)]


def draw(seed: int) -> Plan:
    """The plan of a seed: depths 1 to 30, three quarters at most 4; an eighth through torch.export, which is slow.

    Half run one of ORDERS, half a random order. A tenth of the traced ones write in place and end up exported.
    """
    rng = random.Random(f"plan {seed}")
    depth = rng.choice((rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4), rng.randint(5, 30)))
    capture = "export" if rng.random() < 0.125 else "trace"
    dynamic = capture == "export" and rng.random() < 0.4
    order = rng.randrange(len(ORDERS)) if rng.random() < 0.5 else rng.randrange(len(ORDERS), 100_000)
    writes = capture == "export" or rng.random() < 0.1
    return Plan(seed, depth, capture, dynamic, order, rng.choice((2, 3, 5, 8)), writes)


def failure(plan: Plan) -> str:
    """What is wrong with one plan: the error of the compiler, or the first difference; "" when all is well."""
    net = RandomNet(plan.seed, plan.depth, plan.writes)
    x = torch.randn(plan.batch, STEPS, WIDTH)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    reference, bound = oracle(net, x)
    passes: list[Pass] = []
    for number, kind in enumerate(passes_of(plan.order)):
        passes += [kind(), SemanticCheck(kind.name, number, reference, bound)]
    try:
        cm = api.compile(
            net, None, (x,), capture=plan.capture, dynamic_shapes="batch" if plan.dynamic else None, passes=passes,
            tune="off", min_speedup=0, fallback="error",
        )  # fmt: skip
    except CaptureError as error:
        if plan.capture == "trace":  # it knows no in-place writes, says so, and `auto` exports such models too
            return failure(dataclasses.replace(plan, capture="export"))
        return f"CaptureError: {error!s:.400}"
    except Exception as error:  # everything that stops the compiler on a valid module is a finding
        return f"{type(error).__name__}: {error!s:.400}"
    for batch in (plan.batch, 1, 9) if plan.dynamic else (plan.batch,):
        y = x if batch == plan.batch else torch.randn(batch, STEPS, WIDTH)
        exact, most = oracle(net, y)
        with torch.no_grad():
            wrong = compare(_leaves(cm(y)), exact, most)
        if wrong:
            return f"batch {batch}: {wrong}"
    return _state(net, cm, before)


def _state(net: nn.Module, cm: nn.Module, before: dict[str, torch.Tensor]) -> str:
    """The caller's model is untouched, and its state comes back bit-equal."""
    for name, value in net.state_dict().items():
        if not torch.equal(value, before[name]):
            return f"compiling changed {name} of the caller's model"
    back = api.dense_state_dict(cm)
    if list(back) != list(before):
        return f"the state dict has the keys {list(back)}, expected {list(before)}"
    return next((f"{k} does not come back" for k, v in back.items() if not torch.equal(v, before[k])), "")


def shrink(plan: Plan) -> Plan:
    """A shallower or simpler plan that still fails."""
    changes: list[dict[str, Any]] = [{"dynamic": False}, {"order": 0}]
    changes += [{"depth": d} for d in range(1, plan.depth)]
    for change in changes:
        smaller = dataclasses.replace(plan, **change)
        if smaller != plan and failure(smaller):
            return shrink(smaller) if "depth" not in change else smaller
    return plan


def run(seed: int, graphs: int, first: int = 0) -> Iterator[tuple[Plan, str]]:
    """Draw and check `graphs` plans; every plan is yielded with its failure or ""."""
    for number in range(first, first + graphs):
        plan = draw(seed * 1_000_000 + number)
        yield plan, failure(plan)


def block(seed: int, number: int, graphs: int = GRAPHS) -> tuple[dict[str, Any], list[str]]:
    """Counts and failures, shrunk, of one block for Totals."""
    kinds: Counter[str] = Counter()
    failures: list[str] = []
    for plan, wrong in run(seed, graphs, first=number * graphs):
        kinds[plan.capture + (" dynamic" if plan.dynamic else "")] += 1
        kinds["deeper than 10"] += plan.depth > 10
        if wrong:
            smaller = shrink(plan)
            failures.append(f"{smaller}\n  {failure(smaller)}")
    return {"graphs": graphs, "kinds": dict(kinds)}, failures


def main() -> int:
    """`python -m sparsec.testing_graphs --seed 0 --graphs 200`; exit status 1 when anything failed."""
    parser = argparse.ArgumentParser(description="Compile random modules and compare them with float64 eager.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", type=int, default=100, help="in all, with those already recorded")
    parser.add_argument("--totals", type=Path, default=DEFAULT_PATH, help="JSON file that runs add to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no block after this long")
    options = parser.parse_args()
    totals = Totals(options.totals)
    record = resume(
        totals, "graphs", options.seed, options.graphs, "graphs", lambda n: block(options.seed, n), options.seconds
    )
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(record.get("kinds", {}).items()))
    print(f"seed {options.seed}: {record.get('graphs', 0)} graphs ({kinds}), {len(record['failures'])} failures")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
