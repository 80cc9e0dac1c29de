"""Recipes of llm-compressor and SparseML: their common pruning modifiers as stages of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsec.errors import SpecError

ALIASES = {"__ALL_PRUNABLE__": None, "__ALL__": None}

ONE_SHOT = {"SparseGPTModifier": "SparseGPT", "WandaPruningModifier": "Wanda"}
GRADUAL = ("MagnitudePruningModifier", "GMPruningModifier", "GlobalMagnitudePruningModifier")

IGNORED = (
    "sequential_targets", "sequential_update", "preserve_sparsity_mask", "offload_hessians", "update_scheduler",
    "leave_enabled", "log_types", "sequential_prep", "quantize",
)  # fmt: skip
"""Fields that say how their library runs, not what is pruned."""


def is_foreign(data: Mapping[str, Any]) -> bool:
    """Whether a mapping holds modifiers of those libraries."""
    return any(isinstance(k, str) and k.endswith("Modifier") for k, _ in _modifiers(data))


def foreign_stages(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Our stages for every modifier. Raises SpecError for one that is not about pruning weights, or not known."""
    return [_stage(name, dict(options or {})) for name, options in _modifiers(data)]


def _modifiers(data: Any) -> Iterator[tuple[str, Any]]:
    """(type, fields) of every modifier, however the recipe nests them: `*_stage`, `*_modifiers`, `modifiers` lists."""
    if isinstance(data, Mapping):
        for key, inner in data.items():
            if isinstance(key, str) and key.endswith("Modifier") and (inner is None or isinstance(inner, Mapping)):
                yield key, inner
            elif isinstance(key, str) and (key.endswith(("_stage", "_modifiers")) or key == "modifiers"):
                yield from _modifiers(inner)
    elif isinstance(data, list):
        for item in data:
            yield from _modifiers(item)


def _stage(name: str, options: dict[str, Any]) -> dict[str, Any]:
    known = [*ONE_SHOT, *GRADUAL]
    if name not in known:
        raise SpecError(f"recipe: {name} is no pruning modifier that can be read; valid: {', '.join(known)}")
    for key in IGNORED:
        options.pop(key, None)
    where = _where(name, options)
    stage = _one_shot(name, options) if name in ONE_SHOT else _gradual(name, options)
    if options:
        raise SpecError(f"recipe: {name} has {next(iter(options))!r}, which cannot be read")
    return stage | ({} if where is None else {"where": where})


def _where(name: str, options: dict[str, Any]) -> list[str] | None:
    targets = options.pop("targets", None) or options.pop("params", None)
    ignore = options.pop("ignore", None) or []
    if isinstance(targets, str):
        targets = [targets]
    if targets is None or any(t in ALIASES for t in targets):
        found = None
    else:
        # SparseML names parameters, `encoder.0.weight` or "re:.*weight"
        found = [t.removesuffix(".weight").removesuffix("weight") if "weight" in t else t for t in targets]
        found = [f"{t}.*" if t.startswith("re:") and t.endswith(".") else t for t in found]
    if not ignore:
        return found
    if found is not None and len(found) != 1:
        raise SpecError(f"recipe: {name} has both several targets and ignore; name the targets without ignore")
    kept = ".*" if found is None or not found[0].startswith("re:") else found[0][3:]
    if found is not None and not found[0].startswith("re:"):
        raise SpecError(f"recipe: {name}: ignore needs targets that are a regular expression, or none")
    return [f"re:(?!(?:{'|'.join(_regex(i) for i in ignore)})$){kept}"]


def _regex(name: str) -> str:
    import re

    return name[3:] if name.startswith("re:") else re.escape(name)


def _one_shot(name: str, options: dict[str, Any]) -> dict[str, Any]:
    structure = str(options.pop("mask_structure", "0:0"))
    sparsity = options.pop("sparsity", None)
    if isinstance(sparsity, list):
        raise SpecError(f"recipe: {name} has a sparsity per layer; write one modifier per layer")
    target = sparsity if structure in ("0:0", "unstructured") else structure
    if target is None:
        raise SpecError(f"recipe: {name} has neither sparsity nor mask_structure")
    fields: dict[str, Any] = {"sparsity": target}
    if name == "SparseGPTModifier":
        fields |= {
            ours: options.pop(theirs)
            for ours, theirs in (("block", "block_size"), ("damp", "dampening_frac"))
            if theirs in options
        }
    owl = [k for k in ("sparsity_profile", "owl_m", "owl_lmbda") if options.get(k) is not None]
    if owl:
        raise SpecError(f"recipe: {name} asks for {owl[0]}, which cannot be read; give each layer its sparsity")
    for key in ("sparsity_profile", "owl_m", "owl_lmbda"):
        options.pop(key, None)
    return {"sparsifier": {ONE_SHOT[name]: fields}}


def _gradual(name: str, options: dict[str, Any]) -> dict[str, Any]:
    def take(*names: str, default: Any = None) -> Any:
        found = [options.pop(n) for n in names if n in options]
        return found[0] if found else default

    final = take("final_sparsity")
    structure = str(take("mask_structure", "mask_type", default="unstructured"))
    kind = take("inter_func", default="cubic")
    begin, end = take("start", "start_epoch", default=0), take("end", "end_epoch")
    every = take("update_frequency", default=1)
    initial = take("init_sparsity", "initial_sparsity", default=0.0)
    scope = "global" if name.startswith("Global") or take("scope", "score_type", default="") == "global" else "layer"
    take("global_sparsity")
    if kind not in ("cubic", "linear") or final is None or end is None:
        raise SpecError(f"recipe: {name} needs final_sparsity, an end, and inter_func cubic or linear")
    whole = [int(x) for x in (begin, end, max(every, 1))]
    if any(float(a) != b for a, b in zip((begin, end), whole)):
        raise SpecError(f"recipe: {name}: start and end count steps here; {begin!r} and {end!r} are no whole numbers")
    target: Any = final if structure in ("0:0", "unstructured") else structure
    fields = {"sparsity": target} | ({"scope": scope} if scope == "global" else {})
    schedule = {"final": final, "begin": whole[0], "end": whole[1], "every": whole[2], "initial": initial}
    return {"sparsifier": {"Magnitude": fields}, "schedule": {"Cubic" if kind == "cubic" else "Linear": schedule}}
