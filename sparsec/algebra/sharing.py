"""Planning several expressions together: what two of them need is computed once.

Every expression is ordered with the products of all others free of charge, in turn, until nothing improves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsec.algebra import order
from sparsec.algebra.cost import Sizes
from sparsec.algebra.equation import Equation
from sparsec.algebra.network import Network, build
from sparsec.algebra.operands import operand
from sparsec.algebra.plan import Output, Plan, entries_limit, identities, naive_flops, search
from sparsec.algebra.program import Canon, Program
from sparsec.errors import InputError

SWEEPS = 3


def plan_many(expressions: Sequence[tuple[Any, ...]], memory: int | None = None) -> Plan:
    """One plan for several einsums, each `(einsum, *operands)`; it returns a tuple of results.

    Operands that are the same object are one operand: the plan is called with every distinct one once, in order of
    first appearance. A `Symmetric` operand also shares what differs by a transposition. Raises as `plan` does.
    """
    if not expressions:
        raise InputError("plan_many was given no expressions")
    distinct: list[Any] = []
    networks: list[Network] = []
    same: list[list[int]] = []
    for einsum, *values in expressions:
        places = []
        for value in values:
            at = next((i for i, d in enumerate(distinct) if d is value and not isinstance(value, tuple | list)), None)
            if at is None:
                at = len(distinct)
                distinct.append(value)
            places.append(at)
        given = [operand(v) for v in values]
        network = build(Equation.parse(einsum, [len(op.shape) for op in given]), given)
        if not all(isinstance(s, int) for s in network.sizes):
            raise InputError(f"einsum {einsum!r}: plan_many needs sizes that are ints; plan it by itself")
        networks.append(network)
        same.append(places)
    table: dict[Any, int] = {}
    canons = [Canon(n, identities(n, s, table)) for n, s in zip(networks, same)]
    given = [operand(v) for v in distinct]
    limit = entries_limit(memory, given)
    program, slots = _settle(canons, [Sizes(n.sizes) for n in networks], limit)
    reads, steps = program.finish()
    owner = {id(leaf): places for network, places in zip(networks, same) for leaf in network.leaves}
    reads = tuple(_moved(leaf, owner[id(leaf)]) for leaf in reads)
    outputs = tuple(
        Output(-1 if slot is None else program.number(slot.number), () if slot is None else slot.labels, network)
        for slot, network in zip(slots, networks)
    )
    naive = sum(naive_flops(n, [given[i] for i in s]) for n, s in zip(networks, same))
    how = f"optimal each, shared over {len(networks)} expressions"
    return Plan(reads, steps, outputs, tuple(op.shape for op in given), tuple(type(op).__name__ for op in given),
                tuple(range(len(given))), naive, how, memory, single=False)  # fmt: skip


def _moved(leaf: Any, places: Sequence[int]) -> Any:
    import dataclasses

    return dataclasses.replace(leaf, operand=places[leaf.operand])


def _settle(canons: Sequence[Canon], sizes: Sequence[Sizes], limit: float) -> tuple[Program, list[Any]]:
    sequence = sorted(range(len(canons)), key=lambda i: len(canons[i].network.leaves))
    trees: dict[int, order.Tree] = {}
    program = Program()
    for i in sequence:
        if canons[i].network.leaves:
            trees[i] = search(canons[i], sizes[i], limit, program)[0]
            program.emit(canons[i], trees[i], sizes[i], sizes[i])
    best, slots = _emitted(canons, sizes, trees, sequence)
    for _ in range(SWEEPS):
        before = best.flops
        for i in [s for s in sequence if s in trees]:
            others = {k: t for k, t in trees.items() if k != i}
            around, _ = _emitted(canons, sizes, others, sequence)
            tried = {**others, i: search(canons[i], sizes[i], limit, around)[0]}
            made, found = _emitted(canons, sizes, tried, [*(s for s in sequence if s != i), i])
            if made.flops < best.flops:
                trees, best, slots = tried, made, found
                sequence = [*(s for s in sequence if s != i), i]
        if best.flops == before:
            break
    return best, slots


def _emitted(
    canons: Sequence[Canon], sizes: Sequence[Sizes], trees: dict[int, order.Tree], sequence: Sequence[int]
) -> tuple[Program, list[Any]]:
    program = Program()
    slots: list[Any] = [None] * len(canons)
    for i in sequence:
        if i in trees:
            slots[i] = program.emit(canons[i], trees[i], sizes[i], sizes[i])
    return program, slots
