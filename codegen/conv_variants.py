"""The convolution kernels of the catalogue, and the pooling that is made like them."""

from __future__ import annotations

from sparsec.codegen import plans_conv
from sparsec.codegen.catalog import Variant

_ISAS = ("avx512", "avx2", "portable")

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "conv_csr", "conv", "csr", "conv_csr.c.jinja", dtypes=("float32", "bfloat16"), isas=_ISAS,
        choose=plans_conv.tiles, candidates=plans_conv.csr_formats, needs=plans_conv.refuse,
    ),
    Variant(
        "conv_csr_groups", "conv", "csr_groups", "conv_csr_groups.c.jinja", dtypes=("float32", "bfloat16"), isas=_ISAS,
        choose=plans_conv.tiles, candidates=plans_conv.csr_groups_formats, needs=plans_conv.refuse,
    ),
    Variant(
        "conv_bsr", "conv", "bsr", "conv_bsr.c.jinja", dtypes=("float32", "bfloat16"), isas=_ISAS,
        choose=plans_conv.blocks, needs=plans_conv.refuse_blocks,
    ),
    Variant(
        "conv_depthwise", "conv", "dense", "conv_depthwise.c.jinja", dtypes=("float32", "bfloat16"), isas=_ISAS,
        choose=plans_conv.depthwise, needs=plans_conv.refuse_depthwise,
    ),
    Variant(
        "conv_dense", "conv", "dense", "conv_dense.c.jinja", dtypes=("float32", "bfloat16"), isas=_ISAS,
        choose=plans_conv.dense, needs=plans_conv.refuse_dense,
    ),
    Variant(
        "pool_max", "pool", "dense", "pool_max.c.jinja", dtypes=("float32", "bfloat16"), isas=_ISAS,
        steps=(), choose=plans_conv.depthwise, needs=plans_conv.refuse_depthwise,
    ),
)  # fmt: skip
