"""Recipes: what to prune, how far and when, as a dict or a YAML file that names nothing but what is listed here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsec.errors import DependencyError, LoadError, SpecError, nearest
from sparsec.formats import NM
from sparsec.sparsifiers import allocators, granularity, schedules, scores, selectors
from sparsec.sparsifiers.basic import Compose, Magnitude, Random, Wanda
from sparsec.sparsifiers.net_trim import NetTrim
from sparsec.sparsifiers.parts import Hard, Sparsifier
from sparsec.sparsifiers.quantise import Grid
from sparsec.sparsifiers.refine import BiasCorrection, DSnoT, Refit
from sparsec.sparsifiers.second_order import OBSUpdate, SparseGPT
from sparsec.sparsifiers.shrinkage import SoftShrink

SCHEMA = 1

_CLASSES: tuple[Any, ...] = (
    Magnitude, Random, Wanda, SparseGPT, NetTrim, Compose, DSnoT, Refit, BiasCorrection, NM, Grid,
    Hard, OBSUpdate, SoftShrink,
    allocators.EqualShare, allocators.GlobalShare, allocators.ER, allocators.ERK, allocators.Sensitivity,
    granularity.Element, granularity.FanIn, granularity.GroupsOf, granularity.GroupedNM, granularity.Block,
    granularity.Kernel, granularity.Filter,
    scores.AbsValue, scores.Uniform01, scores.TimesNorm, scores.OBS, scores.AbsGradient, scores.Saliency,
    scores.GradientFlow, scores.Fisher, scores.Taylor, scores.SNR, scores.Cosine, scores.EdgeDegree,
    scores.SketchProbability,
    selectors.TopK, selectors.Threshold, selectors.Sample, selectors.GroupEnvelope,
    schedules.OneShot, schedules.Cubic, schedules.Linear,
)  # fmt: skip

NAMES: dict[str, Callable[..., Any]] = {c.__name__: c for c in _CLASSES}
"""Everything a recipe may name, with the fields of its class as options."""

STAGE_KEYS = ("sparsifier", "where", "schedule")


@dataclass(frozen=True)
class Stage:
    """One line of a recipe: what prunes which layers, and for training loops, when."""

    sparsifier: Sparsifier
    where: Any = None
    schedule: schedules.Schedule | None = None


@dataclass(frozen=True)
class Recipe:
    """Stages, applied in order; layers of a later stage keep the zeros of an earlier one."""

    stages: tuple[Stage, ...]

    @classmethod
    def read(cls, source: Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from a dict, or from a YAML file (read with `safe_load`: data only, nothing is imported or run).

            version: 1
            stages:
              - sparsifier: {SparseGPT: {sparsity: 0.5, damp: 0.01}}
                where: "re:encoder[.].*"

        A value `{Name: {field: value}}` is one of `NAMES`, `"2:4"` is the pattern NM(2, 4). A stage's `schedule` is for
        `Gradual`. Recipes of llm-compressor and SparseML are read as well, see `sparsec.sparsifiers.imports`.

        Raises SpecError for names and fields that do not exist, LoadError for a file that is no recipe, DependencyError
        without pyyaml.
        """
        from sparsec.sparsifiers.imports import foreign_stages, is_foreign

        data = source if isinstance(source, Mapping) else _load(Path(source))
        if is_foreign(data):
            data = {"version": SCHEMA, "stages": foreign_stages(data)}
        _only("recipe", data, ("version", "stages"))
        if data.get("version", SCHEMA) != SCHEMA:
            raise LoadError(f"recipe has version {data['version']!r}; this one reads {SCHEMA}")
        stages = data.get("stages")
        if not isinstance(stages, (list, tuple)) or not stages:
            raise SpecError("recipe: `stages` is a list with at least one stage")
        return cls(tuple(_stage(i, s) for i, s in enumerate(stages)))


def run_recipe(model: nn.Module, source: Any, *, data: Any = None, inplace: bool = False) -> nn.Module:
    """`sparsify` with every stage of a recipe, on a copy unless `inplace`."""
    from sparsec.sparsifiers.batches import Calibration
    from sparsec.sparsifiers.pruning import copied, sparsify

    recipe = Recipe.read(source)
    scheduled = next((i for i, s in enumerate(recipe.stages) if s.schedule is not None), None)
    if scheduled is not None:
        raise SpecError(
            f"recipe: stage {scheduled} has a schedule, which is for a training loop; "
            "read it with Recipe.read and give its stages to Gradual"
        )
    wanted = sum(s.sparsifier.needs_data for s in recipe.stages)
    if wanted > 1 and data is not None:
        calibration = Calibration.of(data)
        data = replace(calibration, data=list(calibration.batches()))  # a generator serves one stage only
    pruned = model if inplace else copied(model)
    for stage in recipe.stages:
        pruned = sparsify(pruned, stage.sparsifier, data=data, where=stage.where, inplace=True)
    return pruned


def _load(path: Path) -> Mapping[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise DependencyError("YAML recipes need pyyaml (pip install pyyaml); a dict needs nothing") from error
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read the recipe {str(path)!r}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoadError(f"{str(path)!r} is no YAML of plain data: {error}") from error
    if not isinstance(data, Mapping):
        raise LoadError(f"{str(path)!r} holds a {type(data).__name__}, not the mapping of a recipe")
    return data


def _stage(index: int, data: Any) -> Stage:
    place = f"recipe stage {index}"
    if not isinstance(data, Mapping):
        raise SpecError(f"{place} is {data!r}, not a mapping with {', '.join(STAGE_KEYS)}")
    _only(place, data, STAGE_KEYS)
    if "sparsifier" not in data:
        raise SpecError(f"{place} has no sparsifier")
    sparsifier = value(f"{place}: sparsifier", data["sparsifier"])
    if not isinstance(sparsifier, Sparsifier):
        raise SpecError(f"{place}: sparsifier is {sparsifier!r}; valid: {_kinds(Sparsifier)}")
    schedule = data.get("schedule")
    schedule = None if schedule is None else value(f"{place}: schedule", schedule)
    if schedule is not None and not isinstance(schedule, schedules.Schedule):
        raise SpecError(f"{place}: schedule is {schedule!r}; valid: {_kinds(schedules.Schedule)}")
    where = data.get("where")
    names = [where] if isinstance(where, str) else where
    if where is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise SpecError(f"{place}: where is {where!r}; valid: a site name, 're:...', a module type's name, or a list")
    return Stage(sparsifier, where, schedule)


def value(place: str, data: Any) -> Any:
    """A plain value as what it stands for: `{Name: fields}` and `"n:m"` become objects, the rest stays."""
    if isinstance(data, str) and len(parts := data.split(":")) == 2 and all(p.isdigit() for p in parts):
        return NM(int(parts[0]), int(parts[1]))
    if isinstance(data, str) and data in NAMES:
        return build(f"{place}", data, {})
    if isinstance(data, Mapping):
        if len(data) != 1:
            raise SpecError(
                f"{place} is {dict(data)!r}; write one name with its fields: {{Magnitude: {{sparsity: 0.9}}}}"
            )
        ((name, given),) = data.items()
        return build(place, name, {} if given is None else given)
    return tuple(value(place, x) for x in data) if isinstance(data, (list, tuple)) else data


def build(place: str, name: Any, given: Any) -> Any:
    """An object of `NAMES` from the fields of its class."""
    if name not in NAMES:
        raise SpecError(f"{place}: there is no {name!r}; {nearest(str(name), NAMES)}")
    if not isinstance(given, Mapping):
        raise SpecError(f"{place}: {name} takes a mapping of fields, got {given!r}")
    kind: Any = NAMES[name]
    known = [f.name for f in fields(kind) if f.init and f.name not in ("timings", "uses")]
    _only(f"{place}: {name}", given, known)
    missing = [
        f.name for f in fields(kind)
        if f.name in known and f.name not in given and f.default is MISSING and f.default_factory is MISSING
    ]  # fmt: skip
    if missing:
        raise SpecError(f"{place}: {name} needs {', '.join(missing)}; its fields: {inspect.signature(kind)}")
    found = {k: value(f"{place}.{k}", v) for k, v in given.items()}
    try:
        return kind(**found)
    except (TypeError, AttributeError) as error:
        raise SpecError(f"{place}: {name} cannot be made of {found!r}: {error}") from error


def _only(place: str, data: Mapping[str, Any], known: Any) -> None:
    wrong = [k for k in data if k not in known]
    if wrong:
        raise SpecError(f"{place} has no {wrong[0]!r}; {nearest(str(wrong[0]), known)}")


def _kinds(base: type) -> str:
    return ", ".join(n for n, c in NAMES.items() if isinstance(c, type) and issubclass(c, base))
