"""sparsec: a compiler that makes sparse and tensor-structured PyTorch models really faster, and proves it.

    import sparsec
    fast = sparsec.compile(model, None, example_inputs)   # None: use the sparsity that is there
    print(sparsec.report(fast))
"""

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
from sparsec.formats import BSR, CSR, NM, Bitmask, Dense, FanIn, Format, GroupInt4, SpQR, TiledCSL, TwoFour
from sparsec.passes import DEFAULT
from sparsec.report import Report
from sparsec.save import load, save
from sparsec.sparsifiers import sparsify
from sparsec.sparsifiers.structure import co_permute, dependency_groups, shrink
from sparsec.spec import Auto, Spec

__version__ = "0.1.0"

__all__ = [
    "BSR",
    "CSR",
    "DEFAULT",
    "NM",
    "Auto",
    "Backend",
    "Bitmask",
    "CaptureError",
    "Dense",
    "DependencyError",
    "DeviceError",
    "FanIn",
    "Format",
    "FormatError",
    "GroupInt4",
    "InputError",
    "LoadError",
    "Pass",
    "PassError",
    "Report",
    "SpQR",
    "SparsecError",
    "Spec",
    "SpecError",
    "TiledCSL",
    "ToolchainError",
    "TwoFour",
    "Variant",
    "VerifyError",
    "analyze",
    "co_permute",
    "compile",
    "dense_state_dict",
    "dependency_groups",
    "draw",
    "graphs",
    "load",
    "load_dense_state_dict",
    "register",
    "report",
    "save",
    "shrink",
    "source",
    "sparsify",
]
