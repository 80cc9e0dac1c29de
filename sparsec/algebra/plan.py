"""Contraction plans: `plan(einsum, *operands)` finds the cheapest order once, says what it costs, and runs it.

The optimum over orders is that of dynamic programming over subsets (Held and Karp's scheme, as opt_einsum has it), with
costs that know zeros, deltas, Kronecker factors and shift-invariant matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.algebra import cost, execute, order
from sparsec.algebra.cost import Sizes
from sparsec.algebra.equation import Equation
from sparsec.algebra.network import Leaf, Network, build, mask_of
from sparsec.algebra.operands import Delta, Operand, operand
from sparsec.algebra.program import Canon, Program, Step, start_value
from sparsec.errors import InputError, SpecError


@dataclass(frozen=True)
class Output:
    """One result of a plan: which value it is (-1: the number one), and how its axes become the caller's."""

    value: int
    labels: tuple[int, ...]
    network: Network


@dataclass(frozen=True, repr=False)
class Plan:
    """Steps that compute an einsum, or several. Call it with operands like those it was planned for.

    Values 0 to len(reads) - 1 are views of operands, step k makes value len(reads) + k. `naive` is the FLOPs of one
    loop nest over all labels with every operand written out, `flops` those of the steps, `peak` the entries of the
    largest intermediate.
    """

    reads: tuple[Leaf, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    shapes: tuple[tuple[Any, ...], ...]
    kinds: tuple[str, ...]
    same: tuple[int, ...]  # operand -> the first operand that was the same object
    naive: Any
    order: str
    memory: int | None = None
    single: bool = True

    @property
    def flops(self) -> Any:
        """FLOPs of one call."""
        return sum(step.flops for step in self.steps)

    @property
    def peak(self) -> Any:
        """Entries of the largest intermediate; results are not counted."""
        made = {out.value for out in self.outputs}
        inner = [s.entries for i, s in enumerate(self.steps) if i + len(self.reads) not in made]
        return max(inner, default=0) if all(isinstance(e, int) for e in inner) else inner

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be used, and why."""
        return tuple(dict.fromkeys(n for out in self.outputs for n in out.network.notes))

    def __call__(self, *operands: Any) -> Any:
        """The result for these operands: a tensor, or a tuple of them for a plan of several expressions.

        Deltas hold no data and may be left out. Raises InputError for another number, kind or shape of operands.
        """
        given = self._bind(operands)
        values: list[Any] = [execute.read(given[leaf.operand], leaf) for leaf in self.reads]
        last = {source: n for n, step in enumerate(self.steps) for source in step.sources}
        last.update({out.value: len(self.steps) for out in self.outputs})
        for number, step in enumerate(self.steps):
            inputs = [values[s] for s in step.sources]
            if len(inputs) == 1:
                values.append(execute.reduce(inputs[0], step.labels[0], step.result))
            else:
                (a, b), (la, lb) = inputs, step.labels
                values.append(execute.contract(step.mode, a, la, b, lb, step.result))
            for source in step.sources:
                if last[source] == number:
                    values[source] = None
        made = tuple(self._result(out, values, given) for out in self.outputs)
        return made[0] if self.single else made

    def _bind(self, operands: Sequence[Any]) -> list[Operand]:
        filled = list(operands)
        if len(operands) == sum(kind != "Delta" for kind in self.kinds) < len(self.kinds):
            rest = iter(operands)
            filled = [Delta(s[0], len(s)) if k == "Delta" else next(rest) for k, s in zip(self.kinds, self.shapes)]
        if len(filled) != len(self.kinds):
            raise InputError(f"this plan takes {len(self.kinds)} operands, got {len(operands)}")
        for position, first in enumerate(self.same):
            if filled[position] is not filled[first] and not isinstance(filled[position], Delta):
                raise InputError(
                    f"operands {first} and {position} were one object when planned and shared products; pass one "
                    "object again, or plan with different ones"
                )
        given = [operand(v) for v in filled]
        bound: dict[str, int] = {}
        for position, (op, kind, shape) in enumerate(zip(given, self.kinds, self.shapes)):
            if type(op).__name__ != kind:
                raise InputError(f"operand {position} was planned as {kind}, got {type(op).__name__}; plan again")
            fits = len(op.shape) == len(shape) and all(
                s == (w if isinstance(w, int) else bound.setdefault(str(w), s)) for w, s in zip(shape, op.shape)
            )
            if not fits:
                raise InputError(f"operand {position} has shape {tuple(op.shape)}, the plan was made for {shape}")
        return given

    def _result(self, out: Output, values: list[Any], given: Sequence[Operand]) -> torch.Tensor:
        sizes = {a: s for a, s in enumerate(out.network.sizes) if isinstance(s, int)}
        if out.value < 0:
            value = torch.ones((), dtype=given[0].dense().dtype)
        else:
            value = execute.plain(values[out.value])
        sizes.update(zip(out.labels, value.shape))
        return execute.assemble(value, out.labels, out.network.output, out.network.free, sizes)

    def to_dict(self) -> dict[str, Any]:
        """This plan as plain values that `json` writes; `sparsec.algebra.from_dict` reads them back."""
        from sparsec.algebra.store import to_dict

        return to_dict(self)

    def __repr__(self) -> str:
        from sparsec.algebra.text import describe

        return describe(self)


def plan(einsum: str, *operands: Any, memory: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The cheapest way to compute `einsum` over operands: a Plan, to be called with tensors.

    An operand is a tensor, a torch sparse tensor, one of `sparsec.algebra.operands`, or a shape; a name in a shape
    ("batch") is a size that is known only at the call, and gives a plan that chooses by it. `memory` is the most bytes
    of one intermediate. `dtype` is that of shapes. Up to 12 tensors the order is optimal in FLOPs; beyond, greedy
    orders, and cotengra's when it is installed, are repaired piecewise.

    Raises SpecError for a malformed einsum, InputError for operands that do not fit it or a memory that no order keeps.
    """
    given = [operand(v, dtype) for v in operands]
    if not given:
        raise InputError(f"einsum {einsum!r} was given no operands")
    equation = Equation.parse(einsum, [len(op.shape) for op in given])
    network = build(equation, given)
    same = identical(operands)
    limit = entries_limit(memory, given)
    if all(isinstance(s, int) for s in network.sizes):
        sizes = Sizes(network.sizes)
        return single(network, given, same, sizes, sizes, limit, memory)
    from sparsec.algebra.buckets import bucketed

    return bucketed(network, given, same, limit, memory)


def identical(operands: Sequence[Any]) -> tuple[int, ...]:
    """For every operand the first one that is the same object. Shapes are never the same: equal tuples may be one."""
    found: list[int] = []
    for position, value in enumerate(operands):
        shared = not isinstance(value, tuple | list)
        found.append(next((i for i in range(position) if shared and operands[i] is value), position))
    return tuple(found)


def entries_limit(memory: int | None, given: Sequence[Operand]) -> float:
    """Bytes of one intermediate as a number of entries of the widest dtype."""
    if memory is None:
        return math.inf
    if type(memory) is not int or memory < 1:
        raise SpecError(f"memory={memory!r} is a positive number of bytes that one intermediate may take")
    return memory // max(op.dtype.itemsize for op in given)


def identities(network: Network, same: Sequence[int], table: dict[Any, int]) -> list[int]:
    """A number for every leaf; equal numbers read the same entries of the same operand."""
    made = []
    for leaf in network.leaves:
        pattern = tuple(leaf.indices.index(a) for axis in leaf.axes for a in axis)
        splits = tuple(len(axis) for axis in leaf.axes)
        key = (same[leaf.operand], leaf.path, leaf.kind, splits, leaf.digits, pattern)
        made.append(table.setdefault(key, len(table)))
    return made


def search(canon: Canon, sample: Sizes, limit: float, program: Program | None = None) -> tuple[order.Tree, str]:
    """(tree, how it was found) for a network; products that `program` has are free. Raises InputError."""
    count = len(canon.network.leaves)
    values = [start_value(canon, i) for i in range(count)]
    if count <= order.OPTIMAL:
        known = None if program is None else (lambda subset: program.knows(canon, subset))
        found = order.optimal(values, canon.network.kept, sample, limit, known)
        how = "optimal"
    else:
        found = order.search(values, canon.network.kept, sample, limit)
        how = f"searched, {count} tensors"
    if found is not None:
        return found.tree, how
    least = ""
    if count <= order.OPTIMAL:
        small = order.optimal(values, canon.network.kept, sample, by_peak=True)
        least = f"; the most frugal order needs {small.peak} entries" if small is not None else ""
    raise InputError(f"no order of {canon.network.equation} keeps every intermediate within {limit:.0f} entries{least}")


def single(
    network: Network, given: Sequence[Operand], same: Sequence[int], sample: Sizes, sizes: Sizes, limit: float,
    memory: int | None,
) -> Plan:  # fmt: skip
    """The plan of one network, ordered at `sample` sizes and counted at `sizes`."""
    program = Program()
    canon = Canon(network, identities(network, same, {}))
    out, how = Output(-1, (), network), "nothing to contract"
    if network.leaves:
        tree, how = search(canon, sample, limit)
        if len(set(canon.identities)) < len(canon.identities):
            tree = _repeating(canon, tree, sample, limit)
        slot = program.emit(canon, tree, sample, sizes)
        out = Output(program.number(slot.number), slot.labels, network)
    reads, steps = program.finish()
    naive = naive_flops(network, given)
    return Plan(reads, steps, (out,), network.shapes, network.kinds, tuple(same), naive, how, memory)


def _repeating(canon: Canon, tree: order.Tree, sample: Sizes, limit: float) -> order.Tree:
    """A tree in which products occur again: orders are looked for in which one product of the best tree is free."""

    def flops(candidate: order.Tree) -> Any:
        program = Program()
        program.emit(canon, candidate, sample, sample)
        return program.flops

    best, least = tree, flops(tree)
    for part in _parts(tree)[:-1]:
        free = Program()
        free.emit_subset(canon, part, sample)
        candidate = search(canon, sample, limit, free)[0]
        if flops(candidate) < least:
            best, least = candidate, flops(candidate)
    return best


def _parts(tree: order.Tree) -> list[order.Tree]:
    """The products of a tree, inner ones first."""
    return [] if not isinstance(tree, tuple) else [*_parts(tree[0]), *_parts(tree[1]), tree]


def naive_flops(network: Network, given: Sequence[Operand]) -> Any:
    """One loop nest over the labels of the einsum as written, products of factors being written out before."""
    labels = network.equation.labels
    sizes = Sizes(tuple(network.equation.sizes(network.shapes)[label] for label in labels))
    masks = [mask_of(labels.index(c) for c in term) for term in network.equation.inputs]
    keep = mask_of(labels.index(c) for c in network.equation.output)
    formed = sum(math.prod(op.shape) * (len(op.parts) - 1) for op in given if op.kind in ("kron", "khatri_rao"))
    return cost.naive_flops(masks, [op.dtype.is_complex for op in given], keep, sizes) + formed
