"""The compiled module: binding, checks, modes, copies, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from sparsec.call import MISMATCH, flatten_like, make_binders, same
from sparsec.capture import capture_whole
from sparsec.errors import InputError
from sparsec.graph import KEY
from sparsec.module import CompiledModule


def compiled(model: nn.Module, *args: Any, **kwargs: Any) -> CompiledModule:
    captured = capture_whole(model, *args, **kwargs)
    return CompiledModule.wrap(captured.gm, captured.call)


class Rich(nn.Module):
    """Positional-only, defaults, varargs, keyword-only, a tree, and free keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("lost", torch.ones(4), persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        /,
        mask: torch.Tensor | None = None,
        mode: str = "plain",
        *more: torch.Tensor,
        batch: dict[str, Any] | None = None,
        flag: bool = False,
        **kwargs: Any,
    ) -> Any:
        y = self.l(x) * self.kept * self.lost
        if mask is not None:
            y = y * mask
        for other in more:
            y = y + other
        if batch is not None:
            y = y + batch["a"] * batch["n"] + batch["b"][0]
        y = -y if mode == "minus" else y
        y = y * kwargs["factor"] if "factor" in kwargs else y
        return OrderedDict(y=y, parts=[y.sum(), (y.mean(), flag)])


def _x(rows: int = 2) -> torch.Tensor:
    return torch.arange(rows * 4.0).reshape(rows, 4)


def _agree(module: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        got, want = module(*args, **kwargs), model(*args, **kwargs)
    assert type(got) is type(want)
    torch.testing.assert_close(got["y"], want["y"])
    torch.testing.assert_close(got["parts"][1][0], want["parts"][1][0])
    assert got["parts"][1][1] is want["parts"][1][1]


@pytest.mark.parametrize("mode", ["export", "trace"])
def test_every_kind_of_parameter_binds(mode: str) -> None:
    model = Rich()
    batch = {"a": _x(), "n": 3, "b": [_x()]}
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((_x(),), {}),
        ((_x(), _x()), {}),
        ((_x(),), {"mask": _x(), "flag": True}),
        ((_x(), None, "minus", _x(), _x()), {}),
        ((_x(),), {"batch": batch, "factor": _x()}),
        ((_x(),), {"mode": "minus", "factor": 2.0}),
    ]
    for args, kwargs in cases:
        module = compiled(model, args, kwargs, mode=mode)
        _agree(module, model, *args, **kwargs)
    module = compiled(model, (_x(),), {"batch": batch}, mode=mode)
    _agree(module, model, _x(), batch={"b": [_x()], "n": 3, "a": _x()}), "the order of keys is free"
    assert inspect.signature(module.forward) == inspect.signature(model.forward)


def test_constants_omitted_mean_as_captured_and_others_are_refused() -> None:
    module = compiled(Rich(), (_x(),), {"mode": "minus", "mask": None, "factor": 2.0})
    for kwargs in ({"factor": 2.0}, {"factor": 2.0, "mode": "minus"}, {"factor": 2.0, "mask": None, "flag": False}):
        assert torch.equal(
            module(_x(), **kwargs)["y"], Rich.forward(_like(module), _x(), None, "minus", factor=2.0)["y"]
        )
    for kwargs, text in [
        ({"factor": 2.0, "mode": "plain"}, r"mode: got 'plain', but the graph was captured with 'minus'"),
        ({"factor": 3.0}, r"factor.*got 3\.0, but the graph was captured with 2\.0"),
        ({"factor": 2}, r"factor.*got 2,"),
        ({"factor": 2.0, "mask": _x()}, r"mask: got a tensor of shape \(2, 4\).*not captured"),
        ({"factor": 2.0, "other": 1}, r"argument 'other' was not captured.*nearest|known"),
        ({"factor": 2.0, "flag": 0}, r"flag: got 0, but the graph was captured with False"),
    ]:
        with pytest.raises(InputError, match=text):
            module(_x(), **kwargs)
        assert module.attempt(_x(), **kwargs) is MISMATCH


def _like(module: CompiledModule) -> Rich:
    model = Rich()
    with torch.no_grad():
        model.l.weight.copy_(module.l_weight)
        model.l.bias.copy_(module.l_bias)
    return model


def test_tensors_are_checked_and_named() -> None:
    module = compiled(Rich(), (_x(),), {"batch": {"a": _x(), "n": 3, "b": [_x()]}})
    good = {"a": _x(), "n": 3, "b": [_x()]}
    for args, batch, text in [
        ((_x(3),), good, r"x: got shape \(3, 4\), expected \(2, 4\); compile with dynamic_shapes"),
        ((_x()[0],), good, r"x: got shape \(4,\), expected \(2, 4\)"),
        ((_x().double(),), good, r"x: got dtype torch\.float64, expected torch\.float32"),
        ((_x().to("meta"),), good, r"x: got a tensor on meta, expected cpu"),
        (([1.0],), good, r"x: got list \[1\.0\], expected a tensor of shape \(2, 4\)"),
        ((_x(),), {**good, "n": 4}, r"batch\['n'\]: got 4"),
        ((_x(),), {**good, "b": [_x(3)]}, r"batch\['b'\]\[0\]: got shape \(3, 4\)"),
        ((_x(),), {"a": _x()}, r"batch: the structure of this argument differs"),
        ((_x(),), None, r"batch: the structure .* got NoneType"),
    ]:
        with pytest.raises(InputError, match=text):
            module(*args, batch=batch)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        module()


def test_attempt_and_forward_are_plain_functions_of_the_signature() -> None:
    call = capture_whole(Rich(), (_x(),)).call
    forward, attempt = make_binders(call)

    class Recorder:
        def run(self, *flat: Any) -> Any:
            return flat

    x = _x()
    assert forward(Recorder(), x)[0] is x and attempt(Recorder(), x)[0] is x
    assert attempt(Recorder(), _x(3)) is MISMATCH


def test_inference_captures_refuse_training_casts_and_pickles() -> None:
    module = compiled(Rich(), (_x(),))
    assert module.eval() is module and not module.training
    with pytest.raises(InputError, match="training=True"):
        module.train()
    assert not module.training
    for cast in (lambda: module.half(), lambda: module.to(torch.bfloat16), lambda: module.double()):
        with pytest.raises(InputError, match="cast the original model before compiling"):
            cast()
    with pytest.raises(InputError, match="move the original model before compiling"):
        module.to("meta")
    assert module.to("cpu") is module and module.float() is module
    for dump in (lambda: pickle.dumps(module), lambda: torch.save(module, io.BytesIO())):
        with pytest.raises(InputError, match=r"sparsec\.save"):
            dump()


def test_copies_keep_meta_call_and_persistence() -> None:
    model = Rich()
    module = compiled(model, (_x(),))
    module.meta[KEY]["note"] = {"a": 1}
    assert set(module.state_dict()) == {"l_weight", "l_bias", "kept"}
    for copied, deep in ((copy.deepcopy(module), True), (copy.copy(module), False)):
        assert isinstance(copied, CompiledModule)
        assert copied.meta[KEY]["note"] == {"a": 1} and copied.call is module.call
        assert set(copied.state_dict()) == set(module.state_dict())
        assert (copied.l_weight.data_ptr() != module.l_weight.data_ptr()) is deep
        _agree(copied, model, _x())
        with pytest.raises(InputError):
            copied(_x(3))
        assert all("val" in n.meta for n in copied.graph.nodes if n.op == "call_function")
    with torch.no_grad():
        copy.deepcopy(module).l_weight.zero_()
    _agree(module, model, _x())


def test_edits_and_recompile_keep_the_binder() -> None:
    module = compiled(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (_x(),))
    relu = next(n for n in module.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.replace_all_uses_with(relu.args[0])
    module.graph.erase_node(relu)
    module.recompile()
    with torch.no_grad():
        assert torch.equal(module(_x()), nn.functional.linear(_x(), module.c_0_weight, module.c_0_bias))
    with pytest.raises(InputError):
        module(_x(3))


def test_compile_and_export_of_the_result() -> None:
    model = Rich()
    args, kwargs = (_x(), _x()), {"batch": {"a": _x(), "n": 3, "b": [_x()]}}
    module = compiled(model, args, kwargs)
    torch.compiler.reset()
    fast = torch.compile(module, fullgraph=True, backend="eager")
    program = torch.export.export(module, args, kwargs, strict=False)
    with torch.no_grad():
        want = model(*args, **kwargs)["y"]
        torch.testing.assert_close(fast(*args, **kwargs)["y"], want)
        torch.testing.assert_close(program.module()(*args, **kwargs)["y"], want)


def test_call_info_lists_tensors_and_constants_in_signature_order() -> None:
    captured = capture_whole(Rich(), (_x(),), {"flag": True, "mask": _x() + 1})
    assert captured.call.names == ("x", "mask")
    assert [leaf.name for leaf in captured.call.guards] == ["x", "mask"]
    assert captured.call.constants["flag"] is True and captured.call.constants["mode"] == "plain"
    flat = captured.call.flatten((_x(),), {"mask": _x()})
    assert len(flat) == 2
    with pytest.raises(InputError, match="mask"):
        captured.call.flatten((_x(),))


def test_same_and_flatten_like() -> None:
    assert same(1, 1) and not same(1, 1.0) and not same(1, True) and not same(torch.ones(2), torch.ones(2))
    spec = torch.utils._pytree.tree_structure({"a": 0, "b": (1, [2])})
    assert flatten_like({"b": (1, [2]), "a": 0}, spec) == [0, 1, 2]
    assert flatten_like({"b": (1, [2])}, spec) is None
    assert flatten_like({"b": [1, [2]], "a": 0}, spec) is None


def test_a_call_costs_little() -> None:
    """Counted, not timed: the binder of a plain signature makes no call but the graph's and the mode check's."""
    module = compiled(nn.Sequential(nn.Linear(4, 4)), (_x(),))
    code = type(module).forward.__code__
    errors = {"AttributeError", "TypeError", "ValueError"}
    assert set(code.co_names) <= errors | {"shape", "dtype", "is_cpu", "run"} | {
        name for name in code.co_names if name.startswith("_sc_")
    }
    assert "_sc_flatten" not in code.co_names and type(module).__call__ is nn.Module.__call__
