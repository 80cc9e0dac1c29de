"""Recipes: dicts and YAML with a closed schema, foreign modifiers, and everything that is refused."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsec.errors import DependencyError, LoadError, SpecError
from sparsec.formats import NM
from sparsec.sparsifiers import ERK, Block, Compose, Cubic, DSnoT, Magnitude, Recipe, Refit, SparseGPT, Wanda, sparsify
from sparsec.sparsifiers.recipes import NAMES
from sparsec.sparsifiers.scores import OBS

yaml = pytest.importorskip("yaml")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def one(sparsifier: Any, **more: Any) -> dict[str, Any]:
    return {"version": 1, "stages": [{"sparsifier": sparsifier, **more}]}


YAML = """
version: 1
stages:
  - sparsifier: {SparseGPT: {sparsity: "2:4", damp: 0.1}}
    where: "0"
  - sparsifier: {Magnitude: {sparsity: 0.75}}
    where: ["2"]
"""


def test_a_yaml_recipe_is_its_stages(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    data = [torch.randn(20, 16)]
    dense = model()
    before = [p.detach().clone() for p in dense.parameters()]
    found = sparsify(dense, str(path), data=iter(data))
    expected = sparsify(
        sparsify(dense, SparseGPT(NM(2, 4), damp=0.1), data=data, where="0"), Magnitude(0.75), where="2"
    )
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), before))
    assert [r["site"] for r in found._sparsec_report] == ["0", "2"]
    assert torch.equal(sparsify(dense, path, data=data)[0].weight, found[0].weight)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"Magnitude": {"sparsity": 0.9, "scope": "global"}}, Magnitude(0.9, "global")),
        ({"Wanda": {"sparsity": {"ERK": {"sparsity": 0.5}}}}, Wanda(ERK(0.5))),
        ({"Refit": {"inner": {"DSnoT": {"inner": "2:4", "cycles": 3}}}}, Refit(DSnoT(NM(2, 4), cycles=3))),
        (
            {"Compose": {"sparsity": 0.5, "rank": {"OBS": {"power": 1}}, "unit": {"Block": {"r": 1, "c": 4}}}},
            Compose(0.5, OBS(1), Block(1, 4)),
        ),
        ({"Compose": {"sparsity": 0.5, "rank": "OBS"}}, Compose(0.5, OBS())),
    ],
)
def test_values(data: Any, expected: Any) -> None:
    (stage,) = Recipe.read(one(data)).stages
    assert stage.sparsifier == expected


def test_a_schedule_is_for_training_loops() -> None:
    recipe = Recipe.read(
        one({"Magnitude": {"sparsity": 0.9}}, schedule={"Cubic": {"final": 0.9, "begin": 0, "end": 10}})
    )
    assert recipe.stages[0].schedule == Cubic(0.9, 0, 10)
    with pytest.raises(SpecError, match="stage 0 has a schedule, which is for a training loop"):
        sparsify(model(), one({"Magnitude": {"sparsity": 0.9}}, schedule={"OneShot": {"final": 0.9}}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stages": []}, "`stages` is a list with at least one stage"),
        ({"stage": []}, "recipe has no 'stage'; nearest: 'stages'"),
        ({"stages": [3]}, "recipe stage 0 is 3"),
        ({"stages": [{}]}, "stage 0 has no sparsifier"),
        (one({"Magnitud": {"sparsity": 0.9}}), "there is no 'Magnitud'; nearest: 'Magnitude'"),
        (one({"os.system": {"command": "true"}}), "there is no 'os.system'"),
        (one({"Magnitude": {"sparsit": 0.9}}), "Magnitude has no 'sparsit'; nearest: 'sparsity'"),
        (one({"Magnitude": {}}), "Magnitude needs sparsity"),
        (one({"Magnitude": {"sparsity": 90}}), "did you mean 0.9"),
        (one({"Magnitude": 0.9}), "Magnitude takes a mapping of fields, got 0.9"),
        (one({"Magnitude": {"sparsity": 0.5}, "Wanda": {}}), "write one name with its fields"),
        (one({"ERK": {"sparsity": 0.9}}), "sparsifier is ERK.*valid: Magnitude, Random"),
        (one({"Magnitude": {"sparsity": 0.5}}, when=3), "has no 'when'"),
        (one({"Magnitude": {"sparsity": 0.5}}, where=3), "where is 3"),
        (one({"Magnitude": {"sparsity": 0.5}}, schedule="OBS"), "schedule is OBS"),
    ],
)
def test_what_a_recipe_may_not_say(data: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sparsify(model(), data)


def test_files_that_are_no_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path

    marker = tmp_path / "ran"
    evil = f'stages: [!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{marker}"]]]'
    with pytest.raises(LoadError, match="is no YAML of plain data"):
        sparsify(model(), write(evil))
    assert not marker.exists()
    with pytest.raises(LoadError, match="holds a list"):
        sparsify(model(), write("- 1"))
    with pytest.raises(LoadError, match="cannot read the recipe"):
        sparsify(model(), tmp_path / "none.yaml")
    with pytest.raises(LoadError, match="version 2"):
        sparsify(model(), write("version: 2\nstages: [1]"))
    with pytest.raises(SpecError, match="write where: into its stages"):
        sparsify(model(), write(YAML), where="0")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match="pip install pyyaml"):
        sparsify(model(), write(YAML))


def test_every_name_is_a_class_of_the_package() -> None:
    assert all(kind.__module__.startswith("sparsec.") for kind in NAMES.values())


COMPRESSOR = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      block_size: 64
      dampening_frac: 0.02
      targets: ["Linear"]
"""


def read(text: str) -> Any:
    return Recipe.read(yaml.safe_load(text)).stages


def test_modifiers_of_llm_compressor() -> None:
    (stage,) = read(COMPRESSOR.replace("run_type: oneshot\n  ", ""))
    assert stage.sparsifier == SparseGPT(NM(2, 4), block=64, damp=0.02) and stage.where == ["Linear"]
    (stage,) = read("WandaPruningModifier: {sparsity: 0.6, mask_structure: '0:0', ignore: ['re:.*head']}")
    assert stage.sparsifier == Wanda(0.6)
    pruned = sparsify(model(), {"WandaPruningModifier": {"sparsity": 0.5, "ignore": ["2"]}}, data=[torch.randn(9, 16)])
    assert int((pruned[0].weight == 0).sum()) == 128 and int((pruned[2].weight == 0).sum()) == 0


def test_modifiers_of_sparseml() -> None:
    fields = {"init_sparsity": 0.05, "final_sparsity": 0.8, "start": 2, "end": 10, "update_frequency": 2}
    for name, scope in (("MagnitudePruningModifier", "layer"), ("GlobalMagnitudePruningModifier", "global")):
        data = {"pruning_modifiers": {name: fields | {"params": ["re:0.weight"], "mask_type": "unstructured"}}}
        (stage,) = Recipe.read(data).stages
        assert stage.sparsifier == Magnitude(0.8, scope) and stage.schedule == Cubic(0.8, 2, 10, 2, 0.05)
    whole = {"modifiers": [{"GMPruningModifier": fields | {"params": "__ALL_PRUNABLE__"}}]}
    assert Recipe.read(whole).stages[0].where is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"QuantizationModifier": {}}, "QuantizationModifier is no pruning modifier"),
        ({"SparseGPTModifier": {"sparsity": 0.5, "surprise": 1}}, "has 'surprise', which cannot be read"),
        ({"SparseGPTModifier": {"sparsity": 0.5, "sparsity_profile": "owl"}}, "asks for sparsity_profile"),
        ({"SparseGPTModifier": {"sparsity": [0.5, 0.6]}}, "a sparsity per layer"),
        ({"WandaPruningModifier": {}}, "neither sparsity nor mask_structure"),
        ({"GMPruningModifier": {"final_sparsity": 0.5}}, "needs final_sparsity, an end"),
        ({"GMPruningModifier": {"final_sparsity": 0.5, "end": 1.5}}, "are no whole numbers"),
    ],
)
def test_modifiers_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe.read(data)
