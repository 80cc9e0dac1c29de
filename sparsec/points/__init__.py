"""Convolution over points: grids of which few cells are occupied.

x = SparseTensor(coords, features, shape=(64, 64, 64))
y = submanifold_conv(x, conv.weight, conv.bias)          # where points are, as dense convolution computes it
"""

from __future__ import annotations

from sparsec.points.conv import FocalConv, SparseConv, SubmanifoldConv, focal_conv, sparse_conv, submanifold_conv
from sparsec.points.tensor import SparseTensor

__all__ = [
    "FocalConv",
    "SparseConv",
    "SparseTensor",
    "SubmanifoldConv",
    "focal_conv",
    "sparse_conv",
    "submanifold_conv",
]
