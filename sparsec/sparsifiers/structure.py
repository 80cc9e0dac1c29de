"""Structure: what must go together in a model, a smaller model without it, and a better order of it.

groups = dependency_groups(model, example_inputs)
small = shrink(model, [g.smallest(0.5) for g in groups if g.prunable])
ordered, permutations = co_permute(model, example_inputs)
"""

from __future__ import annotations

from sparsec.sparsifiers.structure_groups import Group, Slice, dependency_groups
from sparsec.sparsifiers.structure_permute import KeptMagnitude, co_permute, permute
from sparsec.sparsifiers.structure_shrink import shrink, zero

__all__ = ["Group", "KeptMagnitude", "Slice", "co_permute", "dependency_groups", "permute", "shrink", "zero"]
