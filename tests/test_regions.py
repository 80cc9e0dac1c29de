"""Regions: what a graph can hold is compiled in place; everything else stays as it was, and results are equal."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsec.contract import violations
from sparsec.errors import InputError
from sparsec.graph import constants, site_names
from sparsec.module import CompiledModule
from sparsec.regions import CHILD, NEVER, RegionPlan, capture_regions, install_region

transformers = pytest.importorskip("transformers")


def install(plan: RegionPlan) -> nn.Module:
    for path, captured in plan.regions:
        install_region(plan.root, path, CompiledModule.wrap(captured.gm, captured.call))
    return plan.root


def paths(plan: RegionPlan) -> list[str]:
    return [path for path, _ in plan.regions]


class Switch(nn.Module):
    """Branches on data; one part is called with two shapes, one never, one writes its argument, one counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.unused = nn.Linear(4, 4)
        self.writer = Writer()
        self.counter = Counter()
        self.shaped = Shaped()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, deep: bool = False) -> torch.Tensor:
        h = self.a(x)
        if h.sum() > 1e6:  # data-dependent
            h = self.unused(h)
        h = self.a(h[:1]) + h
        notes: dict[str, torch.Tensor] = {}
        h = self.writer(h, notes) + notes["seen"]
        h = self.shaped(self.counter(h))
        return self.last(self.shaped(h[:1]) + h)


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, notes: dict[str, torch.Tensor]) -> torch.Tensor:
        notes["seen"] = x
        return self.inner(x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x)


class Shaped(nn.Module):
    """Asks for a size, which stops a symbolic trace and not an export."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.shape[-1] == 4 else x


def test_a_branching_model_is_compiled_by_its_parts() -> None:
    torch.manual_seed(0)
    model, x = Switch().eval(), torch.randn(3, 4)
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    plan = capture_regions(model, (x,))
    assert paths(plan) == ["a", "writer.inner", "counter.inner", "shaped", "last"]
    rungs = {path: captured.call.rung for path, captured in plan.regions}
    assert rungs == {
        "a": "trace",
        "writer.inner": "trace",
        "counter.inner": "trace",
        "shaped": "export",
        "last": "trace",
    }
    assert plan.skipped == [("unused", NEVER)]
    assert model.counter.calls == 0 and plan.root.counter.calls == 0
    for path, captured in plan.regions:
        assert violations(captured.gm, captured.call.rung) == []
        assert captured.inputs and captured.inputs[0].shape[-1] == 4
        assert all(s in state for c in constants(captured.gm).values() for s in c.sources)
        products = [n for n in captured.gm.graph.nodes if "linear" in str(n.target)]
        assert all(site.startswith(path) for site in site_names(products).values())
    assert list(plan.root.state_dict()) == list(model.state_dict())
    root = install(plan)
    assert isinstance(root, Switch) and not root.training
    with torch.no_grad():
        for sample in (x, torch.randn(5, 4), torch.randn(1, 4)):
            torch.testing.assert_close(root(sample), model(sample))
            torch.testing.assert_close(copy.deepcopy(root)(sample), model(sample))
    for name, (pointer, value) in state.items():
        assert model.state_dict()[name].data_ptr() == pointer and torch.equal(model.state_dict()[name], value)
        assert root.state_dict()[name].data_ptr() != pointer


def test_regions_really_run_and_fall_back_on_unseen_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Switch().eval(), torch.randn(3, 4)
    root = install(capture_regions(model, (x,)))
    ran: list[str] = []

    def watch(path: str, graph: CompiledModule) -> Callable[..., object]:
        run = type(graph).run

        def wrapped(self: CompiledModule, *flat: torch.Tensor) -> object:
            ran.append(path)
            return run(self, *flat)

        return wrapped

    for path, module in root.named_modules():
        if isinstance(module, CompiledModule):
            monkeypatch.setattr(type(module), "run", watch(path, module))
    with torch.no_grad():
        root(x)
    assert ran == [f"{p}.{CHILD}" for p in ("a", "a", "writer.inner", "counter.inner", "shaped", "shaped", "last")]
    ran.clear()
    with torch.no_grad():
        assert root.a(x[None]).shape == (1, 3, 4) and ran == [f"a.{CHILD}"], "a traced graph takes any shape"
        ran.clear()
        with pytest.raises(RuntimeError, match="dtype"):  # the module's own code, not the graph, sees the float64 input
            root.a(x.double())
        assert ran == []


def test_without_examples_only_obvious_modules_are_captured() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Sequential(nn.Linear(4, 4), nn.GELU())
            self.optional = Optional()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.optional(self.plain(x)) if x.sum() > 0 else x

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.own = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
            return self.inner(x) @ self.own

    model, x = Model().eval(), torch.ones(2, 4)
    plan = capture_regions(model)
    assert paths(plan) == ["plain", "optional.inner"]
    assert [path for path, _ in plan.skipped] == ["optional"] and "give example inputs" in plan.skipped[0][1]
    assert plan.regions[0][1].inputs == ()
    with torch.no_grad():
        torch.testing.assert_close(install(plan)(x), model(x))
    assert paths(capture_regions(model, (x,))) == ["plain", "optional"]


def test_two_observed_shapes_make_one_dynamic_export() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Shaped()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x).sum() + self.part(x[:2]).sum() if x.sum() > 0 else x

    model = Twice().eval()
    plan = capture_regions(model, (torch.ones(6, 4),))
    ((path, captured),) = plan.regions
    assert path == "part" and captured.call.rung == "export"
    assert [leaf.dims for leaf in captured.call.guards] == [("batch", 4)]
    root = install(plan)
    with torch.no_grad():
        torch.testing.assert_close(root(torch.ones(9, 4)), model(torch.ones(9, 4)))


def test_own_hooks_still_run_and_inner_hooks_forbid_a_region() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) if x.sum() > 0 else x

    x = torch.ones(2, 4)
    outer, inner = Model().eval(), Model().eval()
    outer.part.register_forward_hook(lambda m, i, o: o + 1)
    inner.part[0].register_forward_hook(lambda m, i, o: o + 1)
    for model, expected in ((outer, ["part"]), (inner, ["part.0"])):
        plan = capture_regions(model, (x,))
        assert paths(plan) == expected
        with torch.no_grad():
            torch.testing.assert_close(install(plan)(x), model(x))


def test_tied_weights_are_known_by_all_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids)) if ids.sum() >= 0 else ids

    ((path, captured),) = capture_regions(Tied().eval(), (torch.tensor([1, 2]),)).regions
    assert path == "head" and constants(captured.gm)["weight"].sources == ("head.weight", "table.weight")


def test_wrong_inputs_training_and_casts() -> None:
    model, x = Switch().eval(), torch.randn(3, 4)
    with pytest.raises(InputError, match="the model itself fails on the example inputs"):
        capture_regions(model, (torch.randn(3, 5),))
    root = install(capture_regions(model, (x,)))
    with pytest.raises(InputError, match="compiled for inference"):
        root.train()
    with pytest.raises(InputError, match="cast the original model"):
        root.half()
    assert not any(m.training for m in root.modules()) and {p.dtype for p in root.parameters()} == {torch.float32}
    assert root.eval() is root


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40, bos_token_id=0, eos_token_id=39, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=40, max_position_embeddings=32, eos_token_id=39, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "parts"), [(_gpt2, ["attn.c_attn", "attn.c_proj", "mlp"]), (_llama, ["self_attn.q_proj", "mlp"])]
)
def test_generate_is_equal_token_for_token(make: Callable[[], nn.Module], parts: list[str]) -> None:
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(1, 39, (2, 5))
    plan = capture_regions(model, (ids,))
    assert plan.skipped == []
    found = paths(plan)
    assert "lm_head" in found and all(any(p.endswith(f"1.{part}") for p in found) for part in parts)
    assert all(captured.call.rung == "trace" for _, captured in plan.regions), "graphs that take any length"
    root = install(plan)
    assert isinstance(root, type(model)) and root.config.use_cache and model.config.use_cache
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    assert torch.equal(root.generate(ids, **options), want)
    assert torch.equal(copy.deepcopy(root).generate(ids, **options), want)
    with torch.no_grad():
        dense, ours = (
            model(ids, attention_mask=options["attention_mask"]),
            root(ids, attention_mask=options["attention_mask"]),
        )
    torch.testing.assert_close(ours.logits, dense.logits)
    assert ours.past_key_values.get_seq_length() == 5
