"""Models through the rewrite pass: what it did, whether results stay, state dicts both ways."""

from __future__ import annotations

import copy
from typing import Any

import torch
from graph_tools import captured
from torch import fx, nn

import sparsec
from sparsec.driver import Context, Options, run_passes
from sparsec.graph import KEY
from sparsec.passes.fold import Fold
from sparsec.passes.normalise import Normalise
from sparsec.passes.rewrite import Applied, Rewrite
from sparsec.report import Report
from sparsec.target import Target


def rewritten(
    model: nn.Module, *args: torch.Tensor, rules: Any = None, spec: Any = None, tune: str = "off", shapes: Any = None,
    **options: Any,
) -> tuple[fx.GraphModule, list[Applied]]:  # fmt: skip
    gm = captured(model, *args, shapes=shapes)
    step = Rewrite() if rules is None else Rewrite(rules)
    context = Context(spec=spec, target=Target.probe(), report=Report(), options=Options(tune=tune, **options))
    run_passes(gm, [Normalise(), Fold(), step], context)
    entries = list(gm.meta[KEY].get("rewrites", ()))
    assert context.report.notes == [str(e) for e in entries]
    return gm, entries


def close(model: nn.Module, gm: fx.GraphModule, *args: torch.Tensor) -> None:
    exact = copy.deepcopy(model).double()(*(a.double() for a in args))
    theirs = (model(*args) - exact).abs().max().item()
    assert (gm(*args) - exact).abs().max().item() <= 8 * theirs + 1e-6


def round_trip(model: nn.Module, make: Any, *args: torch.Tensor, **keywords: Any) -> nn.Module:
    """Compile, compare outputs, give the state dict back, load another one, compare again."""
    passes = sparsec.DEFAULT.insert_before("annotate", Rewrite())
    cm = sparsec.compile(model, None, args, passes=passes, tune="off", **keywords)
    torch.testing.assert_close(cm(*args), model(*args), rtol=1e-4, atol=1e-5)
    state = sparsec.dense_state_dict(cm)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    other = make().eval()
    other.load_state_dict({k: v + 0.01 * (v != 0) for k, v in model.state_dict().items()})
    sparsec.load_dense_state_dict(cm, other.state_dict())
    torch.testing.assert_close(cm(*args), other(*args), rtol=1e-4, atol=1e-5)
    return cm
