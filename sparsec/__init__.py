"""sparsec: a compiler that makes sparse and tensor-structured PyTorch models really faster, and proves it.

    import sparsec
    fast = sparsec.compile(model, None, example_inputs)   # None: use the sparsity that is there
    print(sparsec.report(fast))
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

_collecting = gc.isenabled()
gc.disable()  # importing torch leaves a heap whose full collection takes longer than all imports below
try:
    from sparsec.api import (
        analyze,
        compile,
        dense_state_dict,
        draw,
        graphs,
        load_dense_state_dict,
        report,
        source,
    )
    from sparsec.codegen.backend import Backend
    from sparsec.codegen.catalog import Variant, register
    from sparsec.driver import Pass
    from sparsec.errors import (
        CaptureError,
        DependencyError,
        DeviceError,
        FormatError,
        InputError,
        LoadError,
        PassError,
        SparsecError,
        SpecError,
        ToolchainError,
        VerifyError,
    )
    from sparsec.export_c import export_c
    from sparsec.formats import (
        BSR,
        CSR,
        NM,
        NMG,
        SELL,
        Bitmask,
        BlockNM,
        CSRGroups,
        Dense,
        FanIn,
        Format,
        GroupInt4,
        Pairs,
        Permuted,
        Picks,
        Quantized,
        SpQR,
        TiledCSL,
        Tiles,
        TwoFour,
        Window,
    )
    from sparsec.passes import DEFAULT
    from sparsec.report import Report
    from sparsec.save import load, save
    from sparsec.spec import Auto, Spec
finally:
    if _collecting:
        gc.enable()

if TYPE_CHECKING:
    from sparsec.algebra import plan
    from sparsec.factors import (
        CP,
        BlockDiagonal,
        BlockTerm,
        Butterfly,
        Circulant,
        Dictionary,
        Factor,
        Kronecker,
        LowRank,
        Monarch,
        Product,
        Separable,
        Sparse,
        SparseProduct,
        Sum,
        TensorNetwork,
        TensorRing,
        TensorTrain,
        Tucker,
    )  # fmt: skip
    from sparsec.masks import mask_outputs
    from sparsec.ranks import choose_ranks
    from sparsec.sparsifiers import sparsify
    from sparsec.sparsifiers.structure import co_permute, dependency_groups, shrink

__version__ = "0.1.0"

_FACTORS = (
    "BlockDiagonal", "BlockTerm", "Butterfly", "CP", "Circulant", "Dictionary", "Factor", "Kronecker", "LowRank",
    "Monarch", "Product", "Separable", "Sparse", "SparseProduct", "Sum", "TensorNetwork", "TensorRing",
    "TensorTrain", "Tucker",
)  # fmt: skip
_LAZY = {  # what a user who only compiles or loads never needs: a third of the time to import
    "sparsify": "sparsec.sparsifiers",
    "choose_ranks": "sparsec.ranks",
    "plan": "sparsec.algebra",
    "co_permute": "sparsec.sparsifiers.structure",
    "dependency_groups": "sparsec.sparsifiers.structure",
    "mask_outputs": "sparsec.masks",
    "shrink": "sparsec.sparsifiers.structure",
    **dict.fromkeys(_FACTORS, "sparsec.factors"),
}


def __getattr__(name: str) -> Any:
    if name in ("masks", "points"):
        return import_module(f"sparsec.{name}")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sparsec' has no attribute {name!r}")


__all__ = [
    "BSR",
    "CP",
    "CSR",
    "DEFAULT",
    "NM",
    "NMG",
    "SELL",
    "Auto",
    "Backend",
    "Bitmask",
    "BlockDiagonal",
    "BlockNM",
    "BlockTerm",
    "Butterfly",
    "CSRGroups",
    "CaptureError",
    "Circulant",
    "Dense",
    "DependencyError",
    "DeviceError",
    "Dictionary",
    "Factor",
    "FanIn",
    "Format",
    "FormatError",
    "GroupInt4",
    "InputError",
    "Kronecker",
    "LoadError",
    "LowRank",
    "Monarch",
    "Pairs",
    "Pass",
    "PassError",
    "Permuted",
    "Picks",
    "Product",
    "Quantized",
    "Report",
    "Separable",
    "SpQR",
    "Sparse",
    "SparseProduct",
    "SparsecError",
    "Spec",
    "SpecError",
    "Sum",
    "TensorNetwork",
    "TensorRing",
    "TensorTrain",
    "TiledCSL",
    "Tiles",
    "ToolchainError",
    "Tucker",
    "TwoFour",
    "Variant",
    "VerifyError",
    "Window",
    "analyze",
    "choose_ranks",
    "co_permute",
    "compile",
    "dense_state_dict",
    "dependency_groups",
    "draw",
    "export_c",
    "graphs",
    "load",
    "load_dense_state_dict",
    "mask_outputs",
    "plan",
    "register",
    "report",
    "save",
    "shrink",
    "source",
    "sparsify",
]
