"""A plan as text: cost before and after, then a line per step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsec.algebra.plan import Plan

STEPS = 40
"""Most steps that a repr shows."""


def count(value: Any) -> str:
    """A number of FLOPs or entries in few characters; expressions in full."""
    if not isinstance(value, int):
        return str(value)
    return str(value) if value < 100_000 else f"{value:.3e}"


def describe(plan: Plan) -> str:
    """The repr of a Plan."""
    many = f"{len(plan.outputs)} expressions" if not plan.single else str(plan.outputs[0].network.equation)
    lines = [f"Plan {many}"]
    for position, (kind, shape) in enumerate(zip(plan.kinds, plan.shapes)):
        if len(plan.kinds) <= STEPS:
            lines.append(f"  operand {position}: {kind.lower()} {_shape(shape)}")
    lines.append(f"  before: {count(plan.naive)} flops in one loop nest over dense operands")
    after = f"  after:  {count(plan.flops)} flops in {len(plan.steps)} steps"
    if isinstance(plan.flops, int) and isinstance(plan.naive, int) and plan.flops:
        after += f", {plan.naive / plan.flops:,.1f}x fewer; largest intermediate {count(plan.peak)} entries"
    lines.append(after)
    limit = f", at most {plan.memory} bytes an intermediate" if plan.memory is not None else ""
    lines.append(f"  order:  {plan.order}{limit}")
    if plan.steps:
        texts = [s.text for s in plan.steps[:STEPS]]
        width = max(24, *(len(t) for t in texts))
        lines.append(f"  {'step':>4}  {'mode':<10}  {'contraction':<{width}}  {'flops':>12}  {'entries':>10}")
    for number, step in enumerate(plan.steps[:STEPS]):
        lines.append(f"  {number + 1:>4}  {step.mode:<10}  {step.text:<{width}}  {count(step.flops):>12}  "
                     f"{count(step.entries):>10}")  # fmt: skip
    if len(plan.steps) > STEPS:
        lines.append(f"  ... {len(plan.steps) - STEPS} steps more")
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(line.rstrip() for line in lines)


def _shape(shape: tuple[Any, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
