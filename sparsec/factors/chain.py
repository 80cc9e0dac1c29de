"""Factored: a fitted factor as a weight's storage, in the tiles that generated kernels stream or as it was fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch

from sparsec.errors import FormatError
from sparsec.factors._base import Shape
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._stages import Stage, Stages, stages_of
from sparsec.factors.stored import Stored, sums
from sparsec.formats import CSR, Buffers


@dataclass(frozen=True)
class Factored(Stored):
    """A weight (out, inp) held as `factor`, which is resolved.

    With `tiled` the buffers are `values`, every dense operand in tiles one behind the other (see `Stage.pack`), and for
    each sparse operand its CSR as `values_0`, `indices_0`, `pointers_0`. Without, they are those of the factor, with
    sparse operands in their own formats.
    """

    out: int
    inp: int
    tiled: int = 1

    name: ClassVar[str] = "factored"

    @property
    def weight(self) -> Shape:
        return self.out, self.inp

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the factor
        return _names(self)

    @property
    def stages(self) -> Stages:
        """The products of a generated kernel; SpecError where the factor is no chain of them."""
        return stages_of(self.factor, self.shape)

    def terms(self) -> tuple[Contraction, ...]:
        """The einsums whose sum is the product."""
        return self.factor.contract(self.shape)

    def store(self, fitted: Buffers) -> Buffers:
        """The buffers of a fit, as this format keeps them."""
        if not self.tiled:
            return super().store(fitted)
        first = next(iter(fitted.values()))
        dense = [first.new_zeros(0)]
        sparse: Buffers = {}
        for stage in self.stages.stages:
            whole = stage.operand.dense(fitted)
            if not stage.sparse:
                dense.append(stage.pack(whole))
                continue
            at = len(sparse) // len(CSR.buffers)
            own = _csr(stage.operand).pack(whole, _kept(stage.operand, fitted))
            sparse.update({f"{key}_{at}": tensor for key, tensor in own.items()})
        return {"values": torch.cat(dense), **sparse}

    def operands(self, buffers: Buffers) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Every operand of every term as (dense tensor, the bool mask of its stored positions if it is sparse)."""
        if not self.tiled:
            flat = [o for term in self.terms() for o in term.operands]
            return [(o.dense(buffers), _kept(o, buffers)) for o in flat]
        found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        at = sparse = 0
        for stage in self.stages.stages:
            if stage.sparse:
                fmt, own = _csr(stage.operand), _own(buffers, sparse)
                rows, cols = stage.operand.shape
                found.append((fmt.unpack(own, rows, cols), fmt.positions(own, rows, cols)))
                sparse += 1
            else:
                found.append((stage.unpack(buffers["values"][at : at + stage.packed]), None))
                at += stage.packed
        return found

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        given = iter(self.operands(buffers))
        total = torch.zeros(rows, cols, dtype=torch.float64, device=buffers[self.buffers[0]].device)
        for term in self.terms():
            plain, own = _plain(term, [next(given)[0].double() for _ in term.operands])
            total += plain.reconstruct(own)
        return total.to(buffers[self.buffers[0]].dtype)

    def products(self, x: torch.Tensor, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The product for x (batch, in) in float64, the same of absolute values, and how many sums it rounds like.

        The rounding error of a chain is bounded by the product of the absolute operands: with n_s terms in the sums of
        stage s it is sum_s (8 + 2 sqrt(n_s)) eps of it, which `sparsec.verify` writes as 8 + 2 sqrt(n) of one n.
        """
        given = iter(self.operands(buffers))
        exact = torch.zeros(x.shape[0], self.out, dtype=torch.float64)
        size = torch.zeros_like(exact)
        worst = 0.0
        for term in self.terms():
            mine = [next(given) for _ in term.operands]
            exact += _product(term, x.double(), [(t.double(), kept) for t, kept in mine])
            clean = torch.where(torch.isfinite(x), x, torch.zeros((), dtype=x.dtype))
            size += _product(term, clean.double().abs(), [(t.double().abs(), kept) for t, kept in mine])
            worst = max(worst, sum(8 + 2 * n**0.5 for n in _lengths(term)))
        return exact, size, sums(worst, len(self.terms()))

    def check(self, buffers: Buffers) -> None:
        if not self.tiled:
            super().check(buffers)
            return
        values = buffers["values"]
        packed = sum(s.packed for s in self.stages.stages if not s.sparse)
        if values.shape != (packed,) or not values.is_floating_point():
            raise FormatError(
                f"{self.name}: buffer 'values' is {values.dtype} {tuple(values.shape)}, "
                f"expected {packed} floating values"
            )
        for at, stage in enumerate(s for s in self.stages.stages if s.sparse):
            own = _own(buffers, at)
            _csr(stage.operand).validate(own, *stage.operand.shape)
            if own["values"].dtype != values.dtype:
                raise FormatError(
                    f"{self.name}: buffer 'values_{at}' is {own['values'].dtype}, 'values' {values.dtype}"
                )

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        if not self.tiled:
            return super().nbytes(rows, cols, stored, itemsize)
        total = 0
        for stage in self.stages.stages:
            if stage.sparse:
                height, width = stage.operand.shape
                total += _csr(stage.operand).nbytes(height, width, stage.operand.stored, itemsize)
            else:
                total += stage.packed * itemsize
        return total

    def fields(self) -> dict[str, Any]:
        """The stages as integers, for templates; nothing for kernels that read the factor itself."""
        return _fields(self) if self.tiled else {}

    def sizes(self) -> tuple[int, ...]:
        return self.out, self.inp, self.tiled if self.tiled in (0, 1) else -1


def _csr(operand: Operand) -> CSR:
    return CSR().resolve(*operand.shape)


def _own(buffers: Buffers, at: int) -> Buffers:
    """The CSR buffers of sparse operand `at`, under their plain names."""
    return {key: buffers[f"{key}_{at}"] for key in CSR.buffers}


def _kept(operand: Operand, buffers: Buffers) -> torch.Tensor | None:
    if operand.format is None:
        return None
    own = {key: buffers[name] for key, name in zip(operand.format.buffers, operand.names, strict=True)}
    return operand.format.positions(own, operand.shape[0], operand.shape[1])


@lru_cache(maxsize=256)
def _names(fmt: Factored) -> tuple[str, ...]:
    if not fmt.tiled:
        return tuple(fmt.factor.shapes(fmt.shape))
    sparse = sum(s.sparse for s in fmt.stages.stages)
    return ("values", *(f"{key}_{at}" for at in range(sparse) for key in CSR.buffers))


def _plain(term: Contraction, dense: list[torch.Tensor]) -> tuple[Contraction, Buffers]:
    """The same einsum on dense operands, named by their places."""
    operands = tuple(Operand((f"operand_{at}",), o.letters, o.shape) for at, o in enumerate(term.operands))
    return dataclasses.replace(term, operands=operands), {f"operand_{at}": t for at, t in enumerate(dense)}


def _product(
    term: Contraction, x: torch.Tensor, operands: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> torch.Tensor:
    """As `Contraction.apply`, but positions that a sparse operand does not store contribute nothing even times Inf."""
    running = x.reshape(x.shape[0], *term.x)
    for (dense, kept), (left, right, result) in zip(operands, term.steps(), strict=True):
        if kept is not None and not bool(torch.isfinite(running).all()):
            running = torch.stack([running[:, mask] @ row[mask] for row, mask in zip(dense, kept)], dim=1)
        else:
            running = torch.einsum(f"{left},{right}->{result}", running, dense)
    return running.reshape(x.shape[0], prod(term.y))


def _lengths(term: Contraction) -> list[int]:
    """How many numbers each step of a contraction sums."""
    found = []
    for left, right, result in term.steps():
        size = 1
        for c in set(left + right) - set(result):
            size *= term.sizes[c]
        found.append(size)
    return found


@lru_cache(maxsize=256)
def _fields(fmt: Factored) -> dict[str, int]:
    plan = fmt.stages
    found = {"stages": len(plan.stages), "buffers": len(plan.buffers), "result": plan.result, "work": plan.products()}
    found |= {f"buffer{i}": size for i, size in enumerate(plan.buffers)}
    at = sparse = 0
    for i, stage in enumerate(plan.stages):
        found |= {f"s{i}_{key}": value for key, value in _stage_fields(stage).items()}
        found[f"s{i}_at"] = sparse if stage.sparse else at
        at += 0 if stage.sparse else stage.packed
        sparse += stage.sparse
    return found | {"values": at, "sparse": sparse}


def _stage_fields(stage: Stage) -> Mapping[str, int]:
    found = {
        "sparse": int(stage.sparse), "source": stage.source, "target": stage.target, "resume": int(stage.resume),
        "blocks": stage.blocks, "outputs": stage.outputs, "depth": stage.depth, "step": stage.step,
        "tile": stage.tile, "tiles": stage.tiles,
    }  # fmt: skip
    if stage.sparse:
        found["bits"] = _csr(stage.operand).index_bits or 32
    for kind, axes in (("g", stage.groups), ("p", stage.spectators), ("n", stage.new)):
        found[kind] = len(axes)
        for at, axis in enumerate(axes):
            found |= {f"{kind}{at}": axis.size, f"{kind}{at}_read": axis.read, f"{kind}{at}_write": axis.write}
    return found
