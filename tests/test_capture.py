"""Capture: both rungs give flat functional graphs that equal the model, and never touch it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.nn.utils import prune

from sparsec.aten import opname
from sparsec.capture import capture_whole
from sparsec.contract import violations
from sparsec.errors import CaptureError, InputError, SpecError
from sparsec.graph import constants, site_names
from sparsec.module import CompiledModule

transformers = pytest.importorskip("transformers")

IDS, IMAGE = "ids", "image"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}


def _text(name: str, **config: object) -> nn.Module:
    model = getattr(transformers, name)
    return model(model.config_class(vocab_size=40, **config)).eval()


def _bert() -> nn.Module:
    return _text("BertModel", max_position_embeddings=16, **SMALL)


def _gpt2() -> nn.Module:
    return _text("GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1)


def _opt() -> nn.Module:
    sizes = {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}
    sizes.pop("intermediate_size")
    return _text("OPTForCausalLM", max_position_embeddings=16, **sizes)


def _llama() -> nn.Module:
    return _text("LlamaForCausalLM", max_position_embeddings=16, num_key_value_heads=2, **SMALL)


def _vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **SMALL)).eval()


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config).eval()


def _mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.2)
    model = transformers.MobileNetV2ForImageClassification(config).eval()
    body = model.mobilenet_v2
    body.layer = body.layer[:3]  # the depth is no option of the config, and only costs time here
    channels = body.layer[-1].reduce_1x1.convolution.out_channels
    body.conv_1x1 = type(body.conv_1x1)(config, channels, body.conv_1x1.convolution.out_channels, kernel_size=1).eval()
    return model


MODELS = {
    "bert": (_bert, IDS),
    "gpt2": (_gpt2, IDS),
    "opt": (_opt, IDS),
    "llama": (_llama, IDS),
    "vit": (_vit, IMAGE),
    "resnet": (_resnet, IMAGE),
    "mobilenet": (_mobilenet, IMAGE),
}


def _input(kind: str, batch: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(batch)
    if kind == IDS:
        return torch.randint(2, 40, (batch, 6), generator=gen)
    return torch.randn(batch, 3, 32, 32, generator=gen)


def _snapshot(model: nn.Module) -> tuple[object, ...]:
    tensors = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    return tensors, flags, grads, getattr(getattr(model, "config", None), "use_cache", None)


def _assert_untouched(model: nn.Module, before: tuple[object, ...]) -> None:
    tensors, *rest = _snapshot(model)
    assert rest == list(before[1:])
    for name, (pointer, value) in before[0].items():  # type: ignore[attr-defined]
        assert tensors[name][0] == pointer and torch.equal(tensors[name][1], value)  # type: ignore[index]


@pytest.mark.parametrize("dynamic", [None, "batch"], ids=["static", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_captured_whole_and_equal(name: str, dynamic: str | None) -> None:
    torch.manual_seed(0)
    make, kind = MODELS[name]
    model = make()
    before = _snapshot(model)
    example = _input(kind, 1 if dynamic else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        captured = capture_whole(model, (example,), None, dynamic, "export")
    _assert_untouched(model, before)
    assert captured.call.rung == "export" and captured.reason == ""
    assert violations(captured.gm) == [] or all("tensor_metadata" in str(v) for v in violations(captured.gm))
    assert all("." not in n.target for n in captured.gm.graph.nodes if n.op == "get_attr")
    cached = name in ("gpt2", "opt", "llama")
    assert any("use_cache" in note for note in captured.notes) is cached
    module = CompiledModule.wrap(captured.gm, captured.call)
    for batch in (1, 2, 5) if dynamic else (2,):
        x = _input(kind, batch)
        with torch.no_grad():
            want, got = model(x, **({"use_cache": False} if cached else {})), module(x)
        assert type(got) is type(want) and list(got) == list(want)
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-6)
    if not dynamic:
        with pytest.raises(InputError, match=r"got shape \(3, .*expected \(2, "):
            module(_input(kind, 3))


class Net(nn.Module):
    """A little of everything that the table knows, and a module that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular")
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("scale", torch.ones(4) * 2, persistent=False)
        self.plain = torch.tensor(3.0)

    def forward(self, x: torch.Tensor, *, flag: bool = True, extra: torch.Tensor | None = None) -> dict[str, object]:
        h = self.drop(self.act(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        h, _ = self.gru(h)
        h = self.again(F.gelu(self.first(h)))
        h += 1
        return {"y": F.linear(h, self.weight) * self.scale * self.plain, "z": (h @ self.weight.t(), h.mean())}


@pytest.mark.parametrize("example", [False, True], ids=["blind", "example"])
def test_the_table_gives_aten_form(example: bool) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 4, 4)
    before = _snapshot(model)
    captured = capture_whole(model, (x,) if example else None, None, None, "trace")
    _assert_untouched(model, before)
    gm = captured.gm
    assert violations(gm, "trace") == []
    products = [n for n in gm.graph.nodes if opname(n) in ("aten::linear", "aten::conv2d", "aten::matmul")]
    assert list(site_names(products).values()) == ["conv", "first", "first#2", "<root>", "<root>#2"]
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["gru"]
    table = constants(gm)
    assert table["first_weight"].sources == ("first.weight", "again.weight")
    assert table["scale"].sources == () and "scale" in gm._non_persistent_buffers_set
    if example:
        assert all(isinstance(n.meta["val"], torch.Tensor) for n in products)
        assert any(opname(n) == "aten::add" for n in gm.graph.nodes)
    module = CompiledModule.wrap(gm, captured.call)
    with torch.no_grad():
        got, want = module(x, flag=True), model(x)
    torch.testing.assert_close(got, want)
    if not example:
        assert module(torch.randn(5, 3, 6, 6))["y"].shape == (5, 36, 4)


def test_auto_without_examples_traces_and_with_examples_exports() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.3))
    assert capture_whole(model).call.rung == "trace"
    captured = capture_whole(model, torch.randn(2, 4))
    assert captured.call.rung == "export"
    assert not any("dropout" in str(n.target) for n in captured.gm.graph.nodes)
    assert model.training


@dataclass
class Pair:
    """An output that export does not know and a trace does."""

    left: torch.Tensor
    right: torch.Tensor


def test_auto_falls_to_trace_and_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Pair:
            return Pair(self.l(x), x)

    x, model = torch.randn(2, 4), Odd()
    captured = capture_whole(model, (x,))
    assert captured.call.rung == "trace"
    assert "torch.export" in captured.reason and "test_capture.py:" in captured.reason
    torch.testing.assert_close(CompiledModule.wrap(captured.gm, captured.call)(x).left, model(x).left)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that the error must name
            return self.l(x)
        return -self.l(x)


def test_a_failure_names_the_line_and_both_rungs_silently(capfd: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "the line that the error must name" in text)
    model = Branching()
    before = _snapshot(model)
    with pytest.raises(CaptureError) as caught:
        capture_whole(model, (torch.randn(2, 4),))
    _assert_untouched(model, before)
    text = str(caught.value)
    assert text.count(f"test_capture.py:{line}") == 2 and "torch.export" in text and "symbolic_trace" in text
    assert capfd.readouterr() == ("", "")


def test_state_in_forward_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.l(x) * self.calls

    model = Counting()
    with pytest.raises(CaptureError, match=r"assigns self\.calls"):
        capture_whole(model, (torch.randn(2, 4),))
    assert model.calls == 0


def test_in_place_writes_that_others_see_are_refused_by_the_trace() -> None:
    class Aliasing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.l(x)
            view = h[:, :2]
            view.mul_(2.0)
            return h

    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match="in place"):
        capture_whole(Aliasing(), None, None, None, "trace")
    captured = capture_whole(model := Aliasing(), (x,))
    assert captured.call.rung == "export"
    with torch.no_grad():
        torch.testing.assert_close(captured.gm(x), model(x))


def test_an_in_place_relu_is_seen_by_later_readers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.r = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.l(x)
            return self.r(h) + h

    x, model = torch.randn(3, 4), Net()
    with torch.no_grad():
        torch.testing.assert_close(capture_whole(model).gm(x), model(x))


def test_hooks_of_the_user_are_refused_and_pruning_is_captured() -> None:
    x = torch.randn(2, 4)
    hooked = nn.Sequential(nn.Linear(4, 4))
    seen: list[object] = []
    hooked[0].register_forward_hook(lambda m, i, o: seen.append(o))
    with pytest.raises(CaptureError, match=r"0 \(Linear\) has the forward hook"):
        capture_whole(hooked, (x,))
    assert seen == []
    pruned = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    for example in ((x,), None):
        gm = capture_whole(pruned, example).gm
        assert {s for c in constants(gm).values() for s in c.sources} == {"0.bias", "0.weight_orig", "0.weight_mask"}
        with torch.no_grad():
            torch.testing.assert_close(gm(x), pruned(x))


def test_tied_weights_are_one_constant_and_two_sites() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    for example in (None, torch.randn(2, 4)):
        gm = capture_whole(Tied(), example).gm
        assert {n: c.sources for n, c in constants(gm).items()} == {"a_weight": ("a.weight", "b.weight")}
        products = [n for n in gm.graph.nodes if opname(n) == "aten::linear"]
        assert list(site_names(products).values()) == ["a", "b"]


def test_flat_names_are_identifiers_and_never_attributes_of_a_module() -> None:
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            for name in ("class", "run", "attempt", "meta", "layers_0_weight"):
                self.register_parameter(name, nn.Parameter(torch.ones(2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            for name in ("class", "run", "attempt", "meta", "layers_0_weight"):
                x = x + getattr(self, name)
            return x

    x, model = torch.randn(3, 2), Awkward()
    for example in (None, (x,)):
        captured = capture_whole(model, example)
        assert all(name.isidentifier() for name in constants(captured.gm)) and len(constants(captured.gm)) == 7
        with torch.no_grad():
            torch.testing.assert_close(CompiledModule.wrap(captured.gm, captured.call)(x), model(x))


def test_dynamic_shapes_of_every_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, d: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.l(x) + d["y"]

    model, batch = Two(), Dim("b", min=1, max=8)
    example = (torch.randn(1, 4), {"y": torch.randn(1, 4)})
    forms = ["batch", {"x": {0: batch}, "d": {"y": {0: batch}}}, ({0: Dim.AUTO}, {"y": {0: Dim.AUTO}})]
    for shapes in forms:
        for mode in ("export", "trace"):
            captured = capture_whole(model, example, None, shapes, mode)
            assert [leaf.dims for leaf in captured.call.guards] == [("batch", 4), ("batch", 4)]
            assert captured.inputs[0].shape == (2, 4), "a batch of one is doubled"
            module = CompiledModule.wrap(captured.gm, captured.call)
            for n in (1, 2, 7):
                assert module(torch.randn(n, 4), {"y": torch.randn(n, 4)}).shape == (n, 4)
            with pytest.raises(InputError, match=r"d\['y'\]: got shape \(3, 4\)"):
                module(torch.randn(2, 4), {"y": torch.randn(3, 4)})
    captured = capture_whole(model, example, None, forms[1], "export")
    with pytest.raises(InputError, match="batch <= 8"):
        CompiledModule.wrap(captured.gm, captured.call)(torch.randn(9, 4), {"y": torch.randn(9, 4)})


def test_a_branch_on_a_dynamic_size_is_guarded() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 5:
                return x * 2
            return x

    captured = capture_whole(Branch(), (torch.randn(8, 4),), None, "batch", "export")
    module = CompiledModule.wrap(captured.gm, captured.call)
    assert torch.equal(module(torch.ones(6, 4)), torch.ones(6, 4) * 2)
    with pytest.raises(InputError, match="6 <= batch"):
        module(torch.ones(5, 4))


def test_a_size_that_cannot_vary_is_noted_or_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * int(x.shape[0])

    captured = capture_whole(Fixed(), (torch.randn(3, 4),), None, "batch", "export")
    assert captured.notes == ["dimension 0 of x cannot vary: the forward fixes it at its example size of 3"]
    with pytest.raises(CaptureError, match="dimension 0 of x cannot vary"):
        capture_whole(Fixed(), (torch.randn(1, 4),), None, "batch", "export")


def test_wrong_options_and_inputs() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with pytest.raises(SpecError, match=r"'exports'.*'export'"):
        capture_whole(model, (x,), None, None, "exports")
    with pytest.raises(CaptureError, match="needs example_inputs"):
        capture_whole(model, None, None, None, "export")
    with pytest.raises(SpecError, match="dynamic_shapes means nothing without"):
        capture_whole(model, None, None, "batch")
    with pytest.raises(SpecError, match="'batch'"):
        capture_whole(model, (x,), None, "all")
    with pytest.raises(SpecError, match=r"torch\.nn\.Module, got int"):
        capture_whole(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="too many positional arguments"):
        capture_whole(model, (x, x))
    with pytest.raises(InputError, match="got str, expected a tuple"):
        capture_whole(model, "x")
    with pytest.raises(InputError, match=r"the model itself fails on the example inputs.*mat1 and mat2"):
        capture_whole(model, (torch.randn(2, 5),))


def test_capture_borrows_and_wrap_returns() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    theirs = {p.data_ptr() for p in model.parameters()}
    captured = capture_whole(model, (x,))
    assert {p.data_ptr() for p in captured.gm.parameters()} == theirs, "capture copies no weight"
    assert not any(p.requires_grad for p in captured.gm.parameters())
    module = CompiledModule.wrap(captured.gm, captured.call)
    assert not theirs & {p.data_ptr() for p in module.parameters()}
