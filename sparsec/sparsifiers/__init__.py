"""Which values to keep: `sparsify(model, Magnitude(0.9))` returns a pruned copy."""

from __future__ import annotations

from sparsec.sparsifiers.basic import Magnitude, Random
from sparsec.sparsifiers.parts import Sparsifier
from sparsec.sparsifiers.pruning import sparsify

__all__ = ["Magnitude", "Random", "Sparsifier", "sparsify"]
