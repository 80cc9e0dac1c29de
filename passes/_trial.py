"""Trying a site's candidates on real activations: pack, time against the dense op, verify in float64, decide."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import fx

from sparsec import codes, cost, verify
from sparsec.codegen import tune
from sparsec.codegen.kernel import Kernel, KernelSpec
from sparsec.codegen.rates import rates
from sparsec.driver import Context
from sparsec.errors import DeviceError, VerifyError
from sparsec.formats import Dense, Format
from sparsec.formats._base import Buffers
from sparsec.graph import get_constant
from sparsec.passes import _prepacked, _product
from sparsec.passes._prepacked import Prepacked
from sparsec.passes._propose import Candidate, Proposal, dense_row
from sparsec.passes._shortlist import expected_us
from sparsec.report import Row

CLOSE = 1.3


@dataclass(frozen=True)
class Choice:
    """What select decided for a site that becomes sparse; lower installs it.

    `dense_ranges` are inclusive (low, high) batch ranges that stay on the dense weight, high 0 for no limit.
    """

    format: Format
    kernel: KernelSpec
    buffers: Buffers = field(compare=False, repr=False)
    dense_ranges: tuple[tuple[int, int], ...] = ()


@dataclass
class Seconds:
    """Where a compile spends its time, for the report."""

    tune: float = 0.0
    verify: float = 0.0


class Trial:
    """Decides sites one at a time. Packed weights are shared between the sites that share a weight."""

    def __init__(self, gm: fx.GraphModule, ctx: Context, kernels: Mapping[KernelSpec, Kernel | Exception]) -> None:
        self.gm, self.ctx, self.kernels = gm, ctx, kernels
        self.seconds = Seconds()
        self.model: list[tuple[float, float, float]] = []  # best us expected and measured; the pick over the latter
        self._packs: dict[tuple[str, Format], Buffers] = {}
        self._errors: dict[tuple[str, Format], float] = {}
        self._machine = ctx.target.machine_id()

    def decide(
        self, proposal: Proposal, x: torch.Tensor, residual: torch.Tensor | None, batches: Sequence[int]
    ) -> tuple[Choice | Prepacked | None, Row]:
        """Choose for one site. x (..., in) are activations, or (images, channels, *size);
        `batches` the numbers of rows, or of images, to time."""
        built = [c for c in proposal.candidates if isinstance(self.kernels.get(c.spec), Kernel)]
        built, refusal = self._tolerated(proposal, built) if built else ([], self._unbuilt(proposal))
        packed = _prepacked.candidate(proposal.problem, batches, self.ctx)
        if refusal is not None and packed is None:
            return None, refusal
        x, residual = _product.flatten(proposal.problem, x, residual)
        begin = perf_counter()
        times = self._times(proposal, built, packed, x, residual, batches)
        self.seconds.tune += perf_counter() - begin
        if self.ctx.options.tune == "measure" and times is not None and len(built) > 1:
            self._remember(proposal, built, times, batches)
        if packed is None or times is None:
            return self._best(proposal, built, times, x, residual, batches)
        extra = times.pop()
        outcome = (None, refusal) if refusal else self._best(proposal, built, times, x, residual, batches)
        return self._or_prepacked(proposal, packed, times[0], extra, outcome, x, residual)

    def _remember(
        self, proposal: Proposal, built: list[Candidate], times: list[list[float]], batches: Sequence[int]
    ) -> None:
        """How the cost model's first choice fared against the clock's."""
        expected = [expected_us(proposal, c, batches, self.ctx) for c in built]
        measured = [sum(t) for t in times[1 : len(built) + 1]]
        pick = measured[expected.index(min(expected))]
        self.model.append((min(expected), min(measured), pick / min(measured)))

    def agreement(self) -> str | None:
        """A sentence on the cost model against the clock, over all sites that had a choice; None without any."""
        if not self.model:
            return None
        near = sum(ratio <= CLOSE for _, _, ratio in self.model)
        expected, measured = (sum(column) for column in list(zip(*self.model, strict=True))[:2])
        return (
            f"the cost model's first choice was within {CLOSE:g}x of the fastest kernel at {near} of {len(self.model)} "
            f"sites; it expected {expected / 1e3:.2f} ms of their best kernels, and the clock saw {measured / 1e3:.2f}"
        )

    def _best(
        self, proposal: Proposal, built: list[Candidate], times: list[list[float]] | None, x: torch.Tensor,
        residual: torch.Tensor | None, batches: Sequence[int],
    ) -> tuple[Choice | None, Row]:  # fmt: skip
        """The fastest kernel that beats the dense op and verifies."""
        order = range(len(built)) if times is None else sorted(range(len(built)), key=lambda i: sum(times[i + 1]))
        failures = []
        for index in order:
            outcome = self._judge(proposal, built[index], times, index, batches)
            if outcome[0] is None:
                return outcome  # the fastest candidate loses, so all do
            begin = perf_counter()
            verdict = self._verify(proposal, built[index], x, residual)
            self.seconds.verify += perf_counter() - begin
            if verdict.ok:
                return outcome
            failures.append(f"{built[index].spec.variant}: {verdict.sentence}")
        if self.ctx.options.fallback == "error":
            raise VerifyError(f"site {proposal.fact.site!r}: {'; '.join(failures)}")
        row = dense_row(proposal.fact, codes.VERIFY_FAILED, variant=built[0].spec.variant, detail="; ".join(failures))
        return None, row

    def _or_prepacked(
        self, proposal: Proposal, packed: Prepacked, dense: list[float], extra: list[float],
        outcome: tuple[Choice | None, Row], x: torch.Tensor, residual: torch.Tensor | None,
    ) -> tuple[Choice | Prepacked | None, Row]:  # fmt: skip
        """What was decided so far, or the prepacked dense op where it is faster still."""
        choice, row = outcome
        taken = sum(dense) if choice is None else row.sparse_us or 0.0
        if not _prepacked.wins(dense, extra, taken, self.ctx.options.min_speedup):
            return outcome
        weight, bias = self._operands(proposal)
        if not _prepacked.check(packed, proposal.fact, weight, bias, x, residual).ok:
            return outcome
        return packed, _prepacked.report(row, dense, extra)

    def _unbuilt(self, proposal: Proposal) -> Row:
        if proposal.refused is not None:
            return proposal.refused
        spec = proposal.candidates[0].spec
        detail = str(self.kernels.get(spec, "no kernel was built")).splitlines()[0]
        return dense_row(proposal.fact, codes.BUILD_FAILED, variant=spec.variant, detail=detail)

    def _tolerated(self, proposal: Proposal, built: list[Candidate]) -> tuple[list[Candidate], Row | None]:
        """The candidates whose error to the original weight is allowed, or the row that says why none is."""
        limit = self.ctx.options.tolerance
        if limit is None:
            return built, None
        allowed = [c for c in built if self.error(proposal, c.format) <= limit]
        if allowed:
            return allowed, None
        best = min(built, key=lambda c: self.error(proposal, c.format)).format
        error = self.error(proposal, best)
        return [], dense_row(proposal.fact, codes.TOLERANCE, factor=best.text(), error=error, tolerance=limit)

    # -- running -----------------------------------------------------------------------------------------------------

    def pack(self, proposal: Proposal, fmt: Format) -> Buffers:
        """The weight of a site in `fmt`, packed once."""
        key = (proposal.fact.weight, fmt)
        if key not in self._packs:
            weight = get_constant(self.gm, proposal.fact.weight).detach()
            with _memory(proposal, weight.device, f"pack a {tuple(weight.shape)} weight as {fmt.text()}"):
                packed = fmt.pack(weight.reshape(proposal.fact.matrix))
            fmt.validate(packed, *proposal.fact.matrix)
            self._packs[key] = packed
        return self._packs[key]

    def error(self, proposal: Proposal, fmt: Format) -> float:
        """||unpacked - weight|| / ||weight|| (Frobenius): 0 for exact formats."""
        if fmt.exact:
            return 0.0
        key = (proposal.fact.weight, fmt)
        if key not in self._errors:
            weight = self._operands(proposal)[0].double()
            off = fmt.unpack(self.pack(proposal, fmt), *proposal.fact.matrix).double() - weight
            self._errors[key] = float(off.norm() / weight.norm().clamp(min=torch.finfo(torch.float64).tiny))
        return self._errors[key]

    def forget(self, keep: Sequence[Buffers]) -> None:
        """Drop the packed weights that nobody chose."""
        kept = {id(b) for b in keep}
        self._packs = {k: b for k, b in self._packs.items() if id(b) in kept}

    def _operands(self, proposal: Proposal) -> tuple[torch.Tensor, torch.Tensor | None]:
        fact = proposal.fact
        weight = get_constant(self.gm, fact.weight).detach().reshape(fact.matrix)
        return weight, get_constant(self.gm, fact.bias).detach() if fact.bias else None

    def _sparse(
        self, proposal: Proposal, candidate: Candidate, x: torch.Tensor, residual: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        buffers = list(self.pack(proposal, candidate.format).values())
        _, bias = self._operands(proposal)
        text, op = candidate.spec.text(), _product.overload(candidate.spec.op)
        return lambda: op(x, buffers, bias, residual, text)

    def _verify(
        self, proposal: Proposal, candidate: Candidate, x: torch.Tensor, residual: torch.Tensor | None
    ) -> verify.Verdict:
        weight, bias = self._operands(proposal)
        fmt, packed = candidate.format, self.pack(proposal, candidate.format)
        if not fmt.exact:
            weight = fmt.unpack(packed, *proposal.fact.matrix)
        with torch.inference_mode(), _memory(proposal, x.device, f"run {candidate.spec.variant} once"):
            y = self._sparse(proposal, candidate, x, residual)()
            stored, steps = fmt.positions(packed, *proposal.fact.matrix), proposal.fact.epilogue
            verdicts = [
                verify.check(s.y, s.x, s.weight, s.bias, steps, s.residual, s.stored, fmt.blur(s.x))
                for s in _product.samples(proposal.problem, y, x, weight, stored, bias, residual)
            ]
        return max(verdicts, key=lambda verdict: (not verdict.ok, verdict.worst))

    # -- timing ------------------------------------------------------------------------------------------------------

    def _times(
        self,
        proposal: Proposal,
        built: list[Candidate],
        packed: Prepacked | None,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        batches: Sequence[int],
    ) -> list[list[float]] | None:
        """Microseconds [dense, candidate 0, ..., and prepacked if it is given][batch]; None when nothing is timed."""
        if self.ctx.options.tune == "off":
            return None
        columns = [self._column(proposal, built, packed, x, residual, batch) for batch in batches]
        return [list(row) for row in zip(*columns, strict=True)]

    def _column(
        self, proposal: Proposal, built: list[Candidate], packed: Prepacked | None, x: torch.Tensor,
        residual: torch.Tensor | None, batch: int,
    ) -> tuple[float, ...]:  # fmt: skip
        if self.ctx.options.tune == "model":
            dense = cost.dense_us(proposal.problem, batch, self.ctx.target, rates(self.ctx.target))
            return dense, *(expected_us(proposal, c, (batch,), self.ctx) for c in built)
        texts = [c.spec.text() for c in built] + ([packed.kernel.text()] if packed else [])
        key = tune.decision_key(proposal.problem, batch, texts, self._machine)
        timing = tune.recall(key, len(texts) + 1)
        if timing is None:
            xb = _product.take(proposal.problem, x, batch)
            rb = _product.take(proposal.problem, residual, batch) if residual is not None else None
            weight, bias = self._operands(proposal)
            shaped = weight if proposal.fact.op == "linear" else weight.reshape(proposal.fact.shape)
            plain = _product.dense(proposal.problem, shaped, bias, proposal.fact.epilogue)
            contenders: list[Callable[[], object]] = [
                lambda: plain(xb, rb),
                *(self._sparse(proposal, c, xb, rb) for c in built),
                *([_prepacked.call(packed, weight, bias, xb, rb)] if packed else []),
            ]
            with _memory(proposal, x.device, f"time {', '.join(c.spec.variant for c in built)} on {batch} rows"):
                measure = tune.measure if proposal.problem.conv is None else tune.measure_cold
                timing = measure(contenders)
            tune.remember(key, timing)
            if not timing.steady:
                self.ctx.report.note("the machine was busy while sites were timed: their times were not stored")
        return timing.us

    # -- deciding ----------------------------------------------------------------------------------------------------

    def _judge(
        self,
        proposal: Proposal,
        candidate: Candidate,
        times: list[list[float]] | None,
        index: int,
        batches: Sequence[int],
    ) -> tuple[Choice | None, Row]:
        """The choice and row if `candidate` is taken, given the times; a None choice when dense stays."""
        fact, options = proposal.fact, self.ctx.options
        row = dense_row(fact, codes.SPEC_DENSE)
        changes: dict[str, object] = {"variant": candidate.spec.variant, "batch": _batch(batches)}
        values: dict[str, object] = {"variant": candidate.spec.variant, "format": candidate.format.text()}
        ranges: tuple[tuple[int, int], ...] = ()
        if times is None:
            code = codes.INSTALLED_UNTIMED
            values["tune"] = options.tune
        else:
            dense, sparse = times[0], times[index + 1]
            changes |= {"dense_us": sum(dense), "sparse_us": sum(sparse)}
            code, ranges = self._verdict(dense, sparse, batches)
            values |= {
                "speedup": sum(dense) / sum(sparse), "dense_us": sum(dense), "sparse_us": sum(sparse),
                "min_speedup": options.min_speedup, "dense": _spans(ranges), "sparse": "the others",
            }  # fmt: skip
        changes |= {"code": code, "reason": codes.sentence(code, **values)}
        if code in (codes.DENSE_FASTER, codes.WITHIN_MARGIN, codes.MODEL_SAYS_DENSE):
            return None, _replace(row, changes)
        buffers = self.pack(proposal, candidate.format)
        size = sum(b.numel() * b.element_size() for b in buffers.values())
        if not ranges and isinstance(candidate.format, Dense) and times is not None:
            changes |= {"code": codes.DENSE_KERNEL, "reason": codes.sentence(codes.DENSE_KERNEL, **values)}
        changes |= {
            "decision": "dense" if isinstance(candidate.format, Dense) else "sparse", "format": candidate.format.text(),
            "nbytes": size + (row.dense_nbytes if ranges else 0), "error": self.error(proposal, candidate.format),
        }  # fmt: skip
        return Choice(candidate.format, candidate.spec, buffers, ranges), _replace(row, changes)

    def _verdict(
        self, dense: list[float], sparse: list[float], batches: Sequence[int]
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The code, and the batch ranges that stay dense when only some are won."""
        least = self.ctx.options.min_speedup
        if least == 0:
            return codes.INSTALLED_FORCED, ()
        won = [d >= least * s for d, s in zip(dense, sparse, strict=True)]
        modelled = self.ctx.options.tune == "model"
        if all(won):
            return (codes.INSTALLED_MODEL if modelled else codes.INSTALLED), ()
        kept = sum(s if w else d for d, s, w in zip(dense, sparse, won, strict=True))
        if any(won) and sum(dense) >= least * kept:
            return codes.INSTALLED_BUCKETS, _ranges(batches, won)
        if modelled:
            return codes.MODEL_SAYS_DENSE, ()
        return (codes.WITHIN_MARGIN if sum(sparse) <= sum(dense) else codes.DENSE_FASTER), ()


@contextlib.contextmanager
def _memory(proposal: Proposal, device: torch.device, what: str) -> Iterator[None]:
    """A device whose memory does not suffice is a DeviceError; nothing has been installed by then."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of device memory" not in str(error):
            raise
        raise DeviceError(
            f"site {proposal.fact.site!r}: no memory on {device} to {what}; free some, leave the site dense in the "
            f"spec, or compile on the CPU ({error})"
        ) from error


def _ranges(batches: Sequence[int], won: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """Inclusive batch ranges of the lost buckets; two tested sizes divide at their geometric mean."""
    spans: list[tuple[int, int]] = []
    for i, wins in enumerate(won):
        if wins:
            continue
        low = 1 if i == 0 else int((batches[i - 1] * batches[i]) ** 0.5) + 1
        high = 0 if i == len(won) - 1 else int((batches[i] * batches[i + 1]) ** 0.5)
        if spans and spans[-1][1] == low - 1:
            spans[-1] = (spans[-1][0], high)
        else:
            spans.append((low, high))
    return tuple(spans)


def _spans(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{low} and more" if high == 0 else f"{low} to {high}" for low, high in ranges)


def _batch(batches: Sequence[int]) -> int | tuple[int, ...] | None:
    if not batches:
        return None
    return batches[0] if len(batches) == 1 else tuple(batches)


def _replace(row: Row, changes: Mapping[str, object]) -> Row:
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]
