"""The passes, and the order in which `compile` runs them."""

from __future__ import annotations

from sparsec.driver import Pipeline
from sparsec.passes.annotate import Annotate
from sparsec.passes.conv_rewrite import ConvRewrite
from sparsec.passes.factor import Factorise
from sparsec.passes.fold import Fold
from sparsec.passes.fuse import Fuse
from sparsec.passes.lower import Lower
from sparsec.passes.meta_schedule import MetaSchedule
from sparsec.passes.normalise import Normalise
from sparsec.passes.pool import Pool
from sparsec.passes.select import Select
from sparsec.passes.stream import Stream

DEFAULT = Pipeline(
    (
        Normalise(),  # first: every later pass reads one spelling of a weight op, with its weight on the root
        Fold(),  # before annotate: folding makes the weights that are measured
        ConvRewrite(),  # behind fold, which wants to see the convolution; before annotate, because it changes the sites
        Annotate(),  # facts for everything below: sites, densities, structures, refusals
        Fuse(),  # needs sites; before select, because the tail is part of the kernel that is timed
        Factorise(),  # before select, which leaves decided sites alone; lossy, so only where the spec names a factor
        Select(),  # needs the final weights and tails; decides by the clock and verifies
        Pool(),  # behind select: only the clock says whether it pays
        Lower(),  # nothing reads a dense weight behind it
        Stream(),  # last: it marks kernels that stand in the graph
    )
)
"""What `compile` runs. Edits by name give a new list: `DEFAULT.insert_before("select", MyPass())`."""

__all__ = [
    "DEFAULT", "Annotate", "ConvRewrite", "Factorise", "Fold", "Fuse", "Lower", "MetaSchedule", "Normalise", "Pool",
    "Select", "Stream",
]  # fmt: skip
