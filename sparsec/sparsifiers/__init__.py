"""Which values to keep: `sparsify(model, Magnitude(0.9))` returns a pruned copy."""

from __future__ import annotations

from sparsec.sparsifiers.allocators import ER, ERK, EqualShare, GlobalShare, Sensitivity
from sparsec.sparsifiers.basic import Compose, Magnitude, Random, Wanda
from sparsec.sparsifiers.batches import Calibration
from sparsec.sparsifiers.calibration import calibrate, calibrate_graph
from sparsec.sparsifiers.experts import ExpertLoad, expert_load
from sparsec.sparsifiers.gradual import Fairness, Gradual, SparseUpdate
from sparsec.sparsifiers.granularity import Block, Element, FanIn, Filter, GroupedNM, GroupsOf, Kernel
from sparsec.sparsifiers.hesso import Hesso
from sparsec.sparsifiers.milliseconds import Met, meet_budget
from sparsec.sparsifiers.net_trim import NetTrim
from sparsec.sparsifiers.parts import Apply, Hard, Problem, Solution, Sparsifier
from sparsec.sparsifiers.pruning import sparsify
from sparsec.sparsifiers.quantise import Grid
from sparsec.sparsifiers.recipes import Recipe
from sparsec.sparsifiers.refine import BiasCorrection, DSnoT, Refit
from sparsec.sparsifiers.schedules import Cubic, Decay, Linear, OneShot
from sparsec.sparsifiers.second_order import OBSUpdate, SparseGPT
from sparsec.sparsifiers.selectors import GroupEnvelope, Sample, Threshold, TopK
from sparsec.sparsifiers.shrinkage import SoftShrink
from sparsec.sparsifiers.stats import Stats
from sparsec.sparsifiers.structure import Group, co_permute, dependency_groups, shrink
from sparsec.sparsifiers.structured import Structured

__all__ = [
    "ER",
    "ERK",
    "Apply",
    "BiasCorrection",
    "Block",
    "Calibration",
    "Compose",
    "Cubic",
    "DSnoT",
    "Decay",
    "Element",
    "EqualShare",
    "ExpertLoad",
    "Fairness",
    "FanIn",
    "Filter",
    "GlobalShare",
    "Gradual",
    "Grid",
    "Group",
    "GroupEnvelope",
    "GroupedNM",
    "GroupsOf",
    "Hard",
    "Hesso",
    "Kernel",
    "Linear",
    "Magnitude",
    "Met",
    "NetTrim",
    "OBSUpdate",
    "OneShot",
    "Problem",
    "Random",
    "Recipe",
    "Refit",
    "Sample",
    "Sensitivity",
    "SoftShrink",
    "Solution",
    "SparseGPT",
    "SparseUpdate",
    "Sparsifier",
    "Stats",
    "Structured",
    "Threshold",
    "TopK",
    "Wanda",
    "calibrate",
    "calibrate_graph",
    "co_permute",
    "dependency_groups",
    "expert_load",
    "meet_budget",
    "shrink",
    "sparsify",
]
