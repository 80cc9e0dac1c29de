"""Saved models: what goes in comes out, in this process and another, and what cannot be saved says why."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sparsec
from sparsec import save_zip
from sparsec.codegen import build
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import InputError, LoadError, SpecError
from sparsec.install import find_kernel
from sparsec.target import Target


class Net(nn.Module):
    """Shared and folded weights, a buffer outside the state dict, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.a.weight
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.register_buffer("scale", torch.rand(64), persistent=False)

    def forward(self, x: torch.Tensor, gain: float = 2.0, mask: torch.Tensor | None = None) -> dict[str, Any]:
        y = self.tied(torch.relu(self.a(x))) + self.b(x) * gain
        return {"y": self.norm(y) * self.scale, "rest": (y.reshape(-1, 32), [x.sum(-1)])}


def _net() -> Net:
    torch.manual_seed(1)
    net = Net().eval()
    with torch.no_grad():
        for p in (net.a.weight, net.b.weight, net.norm.parametrizations.weight.original1):
            p[torch.rand_like(p) < 0.85] = 0
    return net


def _compile(model: nn.Module, *args: Any, **keywords: Any) -> nn.Module:
    return sparsec.compile(model, None, args, **{"tune": "off", "min_speedup": 0, **keywords})


def _same(a: Any, b: Any) -> None:
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert left[1] == right[1]
    assert all(torch.equal(x, y) for x, y in zip(left[0], right[0], strict=True))


def rewrite(path: Path, change: Callable[[dict[str, bytes], dict[str, Any]], None]) -> Path:
    """A copy of a saved model with members changed and hashes made to fit again: damage that no hash reveals."""
    manifest, members = save_zip.read(path)
    about = {k: v for k, v in manifest.items() if k not in ("format", "version", "members")}
    change(members, about)
    changed = path.with_suffix(".changed")
    save_zip.write(changed, members, about)
    return changed


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a saved model with `graph.json` changed."""

    def apply(members: dict[str, bytes], about: dict[str, Any]) -> None:
        document = json.loads(members["graph.json"])
        change(document)
        members["graph.json"] = json.dumps(document).encode()

    return rewrite(path, apply)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    cm = _compile(_net(), torch.randn(4, 64))
    return cm, sparsec.save(cm, tmp_path_factory.mktemp("saved") / "net.sparsec")


@pytest.mark.parametrize("keywords", [{}, {"dynamic_shapes": "batch"}, {"capture": "trace"}], ids=str)
def test_everything_comes_back(keywords: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(4, 64)
    cm = _compile(_net(), x, **keywords)
    loaded = sparsec.load(sparsec.save(cm, tmp_path / "m.sparsec"))
    _same(cm(x), loaded(x))
    _same(sparsec.dense_state_dict(cm), sparsec.dense_state_dict(loaded))
    assert list(cm.state_dict()) == list(loaded.state_dict())
    assert sparsec.report(cm).to_dict() == sparsec.report(loaded).to_dict()
    assert sparsec.graphs(cm) == sparsec.graphs(loaded)
    assert sparsec.source(cm, "b") == sparsec.source(loaded, "b")
    pictures = [sparsec.draw(m, tmp_path / f"{i}.svg").read_text() for i, m in enumerate((cm, loaded))]
    assert pictures[0] == pictures[1]
    again = sparsec.save(loaded, tmp_path / "again.sparsec")
    assert again.read_bytes() == (tmp_path / "m.sparsec").read_bytes()
    if keywords.get("dynamic_shapes"):
        _same(cm(x[:3]), loaded(x[:3]))
    else:
        with pytest.raises(InputError, match="expected"):
            loaded(x[:3])


def test_new_weights_go_into_a_loaded_model(saved: tuple[nn.Module, Path]) -> None:
    """Recipes, ties and ledger survive: the folded weight norm is computed again."""
    net, x = _net(), torch.randn(4, 64)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    loaded = sparsec.load(saved[1])
    sparsec.load_dense_state_dict(loaded, net.state_dict())
    _same(dict(net.state_dict()), sparsec.dense_state_dict(loaded))
    torch.testing.assert_close(loaded(x)["y"], net(x)["y"], rtol=1e-4, atol=1e-5)


def test_memory_order_of_dense_weights_survives(tmp_path: Path) -> None:
    layer = nn.Linear(8, 6).eval()
    layer.weight = nn.Parameter(torch.randn(8, 6).t())
    cm = sparsec.compile(layer, {"_default": None}, (torch.randn(2, 8),), tune="off")
    loaded = sparsec.load(sparsec.save(cm, tmp_path / "m.sparsec"))
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in cm.parameters()]


def test_outputs_of_transformers_keep_their_class(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertModel(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight[torch.rand_like(module.weight) < 0.9] = 0
    kwargs = {"input_ids": torch.randint(0, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    cm = sparsec.compile(model, None, None, example_kwargs=kwargs, tune="off", min_speedup=0)
    path = sparsec.save(cm, tmp_path / "m.sparsec")
    out = sparsec.load(path)(**kwargs)
    assert type(out).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    _same(cm(**kwargs), out)

    def elsewhere(document: dict[str, Any]) -> None:
        document["output"]["output"] = "transformers.modeling_outputs:NoSuchOutput"

    plain = sparsec.load(edit(path, elsewhere))(**kwargs)
    assert type(plain) is dict and torch.equal(plain["last_hidden_state"], out.last_hidden_state)


def test_a_fresh_process_loads_files_and_exported_programs(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    cm, path = saved
    x = torch.randn(4, 64)
    torch.save(x, tmp_path / "x.pt")
    torch.export.save(torch.export.export(cm, (x,)), str(tmp_path / "m.pt2"))
    code = f"""
import sparsec, torch
x = torch.load({str(tmp_path / "x.pt")!r})
one = sparsec.load({str(path)!r})(x)["y"]
two = torch.export.load({str(tmp_path / "m.pt2")!r}).module()(x)["y"]
print(torch.equal(one, two), one.double().sum().item().hex())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["True", cm(x)["y"].double().sum().item().hex()], done.stderr


def test_members_are_plain_and_bytes_are_deterministic(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    cm, path = saved
    assert sparsec.save(cm, tmp_path / "again").read_bytes() == path.read_bytes()
    names = zipfile.ZipFile(path).namelist()
    assert names[:5] == ["manifest.json", "graph.json", "tensors.safetensors", "report.json", "history.json"]
    assert names[5:] and all(n.startswith("kernels/k_") and n.endswith(".c") for n in names[5:])
    manifest = json.loads(zipfile.ZipFile(path).read("manifest.json"))
    assert (manifest["format"], manifest["version"], manifest["torch"]) == ("sparsec-model", 1, torch.__version__)


def _forget(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process know no kernel, so that loading has to obtain them again."""
    monkeypatch.setattr(build, "_loaded", {})


def test_sources_in_the_file_are_never_compiled(
    saved: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(members: dict[str, bytes], about: dict[str, Any]) -> None:
        for name in members:
            if name.startswith("kernels/"):
                members[name] = b"#error compiled from the file"

    x = torch.randn(4, 64)
    changed = rewrite(saved[1], poison)
    _forget(changed, monkeypatch)
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    _same(sparsec.load(changed)(x), saved[0](x))


def test_libraries_run_only_when_trusted(
    saved: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cm, x = saved[0], torch.randn(4, 64)
    path = sparsec.save(cm, tmp_path / "with.sparsec", libraries=True)
    monkeypatch.setattr("sparsec.save_kernels.build.build_kernels", lambda *a, **k: pytest.fail("it compiled"))
    _forget(path, monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="it compiled"):
        sparsec.load(path)
    _same(sparsec.load(path, trust=True)(x), cm(x))

    def break_them(members: dict[str, bytes], about: dict[str, Any]) -> None:
        for name in members:
            if name.startswith("libraries/"):
                members[name] = b"no library"

    _forget(path, monkeypatch)
    with pytest.raises(LoadError, match="does not load as kernel"):
        sparsec.load(rewrite(path, break_them), trust=True)


def test_kernels_are_fitted_to_the_machine(saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in Target.probe().isas:
        pytest.skip("needs a processor with more than one instruction set")
    small = Target.probe().limit("avx2")
    monkeypatch.setattr("sparsec.save_kernels._target", lambda spec: small)
    loaded, x = sparsec.load(saved[1]), torch.randn(4, 64)
    assert KernelSpec.parse(find_kernel(loaded, "b")).isa == "avx2"
    torch.testing.assert_close(loaded(x)["y"], saved[0](x)["y"], rtol=1e-4, atol=1e-5)


class _Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if float(x.sum()) > 0 else -self.body(x)


class _Pair(tuple):
    pass


def test_what_cannot_be_saved_says_why(tmp_path: Path) -> None:
    regions = _compile(_Looped().eval(), torch.ones(2, 16))
    with pytest.raises(SpecError, match="compiled by regions.*dense_state_dict"):
        sparsec.save(regions, tmp_path / "m")
    with pytest.raises(SpecError, match="no result of sparsec.compile"):
        sparsec.save(nn.Linear(2, 2), tmp_path / "m")
    cm = _compile(nn.Linear(16, 16).eval(), torch.ones(2, 16))
    with pytest.raises(SpecError, match="cannot write"):
        sparsec.save(cm, tmp_path / "missing" / "m")
    with cm.graph.inserting_before(next(n for n in cm.graph.nodes if n.op == "output")):
        cm.graph.call_function(torch.ops.aten.from_file.default, ("/etc/passwd",))
    with pytest.raises(SpecError, match=r"calls aten.from_file.default, which a saved model cannot hold"):
        sparsec.save(cm, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_versions_are_compared(saved: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, message in ((2, "newer than 1: update sparsec"), (0, "is not 1, which this sparsec reads")):
        monkeypatch.setattr(save_zip, "VERSION", version)
        path = sparsec.save(saved[0], tmp_path / "m")
        monkeypatch.undo()
        with pytest.raises(LoadError, match=message):
            sparsec.load(path)
