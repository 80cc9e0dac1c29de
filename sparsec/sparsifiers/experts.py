"""Expert load: how often the routers of a mixture of experts choose each expert, counted while calibration runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """What one router chose: `counts` int64 [experts] over `rows` tokens that are not padding, `chosen` per token."""

    site: str
    counts: torch.Tensor
    rows: int

    @property
    def chosen(self) -> float:
        """Experts per token."""
        return float(self.counts.sum()) / max(1, self.rows)

    @property
    def share(self) -> torch.Tensor:
        """Each expert's share of all choices, float64."""
        return self.counts.double() / max(1, int(self.counts.sum()))

    @property
    def imbalance(self) -> float:
        """The busiest expert's load over the mean: 1 when all are equally busy."""
        return float(self.share.max()) * len(self.counts)

    @property
    def unused(self) -> tuple[int, ...]:
        """Experts that no token went to."""
        return tuple((self.counts == 0).nonzero()[:, 0].tolist())

    def __str__(self) -> str:
        shares = " ".join(f"{100 * s:.1f}" for s in self.share.tolist())
        return f"{self.site}: {self.rows} tokens, {self.chosen:g} experts each; load in %: {shares}"


class Routers(TorchDispatchMode):
    """Sees every choice of experts while it is active: the `topk`, `argmax` or `max` over a router's last dimension.

    A router is a module whose weight has one row per expert, and fewer of them than features. It may choose inside its
    own forward (Mixtral), or leave that to its parent, as an `nn.Linear` gate does; the choice then belongs to the last
    such module that has run. A choice over anything else, such as groups of experts or other features, is none; ranking
    a head's classes looks alike. Of several choices that one call of a router makes the last one counts.
    """

    def __init__(
        self, model: nn.Module, padding: Callable[[], torch.Tensor | None], is_open: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.padding = padding
        self.is_open = is_open
        self.counts: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self._running: list[tuple[str, int, int]] = []  # site, experts, number of the call
        self._last: dict[int, tuple[str, int]] = {}
        self._calls = 0
        self._pending: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._handles: list[Any] = []
        self._model = model

    def __enter__(self) -> Routers:
        for name, module in self._model.named_modules():
            experts = _experts(module)
            if experts:
                self._handles.append(module.register_forward_pre_hook(self._before(name or "<root>", experts)))
                self._handles.append(module.register_forward_hook(self._after(name or "<root>", experts)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.settle()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.is_open() and (chosen := _choice(func, args, kwargs or {}, found)) is not None:
            self._see(args[0].shape[-1], chosen)
        return found

    def _before(self, site: str, experts: int) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            self._calls += 1
            self._running.append((site, experts, self._calls))

        return before

    def _after(self, site: str, experts: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            while self._running:  # a forward that raised has left its entry behind
                name, _, call = self._running.pop()
                if name == site:
                    self._last[experts] = (site, call)
                    break

        return after

    def _see(self, experts: int, chosen: torch.Tensor) -> None:
        inside = [(site, call) for site, width, call in self._running if width == experts]
        key = inside[-1] if inside else self._last.get(experts)
        if key is not None:
            if key not in self._pending:
                self.settle()
            self._pending[key] = (chosen.detach().reshape(-1, chosen.shape[-1]), self.padding())
            self.counts.setdefault(key[0], torch.zeros(experts, dtype=torch.int64))
            self.rows.setdefault(key[0], 0)

    def settle(self) -> None:
        """Count the choices that no later one of the same call can replace any more."""
        for (site, _), (chosen, kept) in self._pending.items():
            rows = chosen.cpu()
            if kept is not None and len(kept) == len(rows):
                rows = rows[kept]
            self.counts[site] += torch.bincount(rows.reshape(-1), minlength=len(self.counts[site]))
            self.rows[site] += len(rows)
        self._pending.clear()

    def loads(self) -> dict[str, ExpertLoad]:
        """Router -> what it chose so far."""
        self.settle()
        return {site: ExpertLoad(site, counts.clone(), self.rows[site]) for site, counts in self.counts.items()}


def _experts(module: nn.Module) -> int:
    """Experts that the module can be a router of: the rows of its 2-D weight, 0 when it has none or is too tall."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return 0
    rows, features = reversed(weight.shape) if type(module).__name__ == "Conv1D" else weight.shape
    return int(rows) if 1 < rows < features else 0


def _choice(func: Any, args: Any, kwargs: Mapping[str, Any], found: Any) -> torch.Tensor | None:
    """The chosen indices [..., per row] when an operator chooses along the last dimension, else None."""
    name = func._schema.name
    if name not in ("aten::topk", "aten::argmax", "aten::max") or not args or args[0].dim() < 2:
        return None
    if name == "aten::topk":
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return found[1] if dim in (-1, args[0].dim() - 1) else None
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is None or isinstance(dim, torch.Tensor) or dim not in (-1, args[0].dim() - 1):
        return None
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    indices: torch.Tensor = found if name == "aten::argmax" else found[1]
    return indices if keep else indices.unsqueeze(-1)


def expert_load(model: nn.Module, data: Any) -> dict[str, ExpertLoad]:
    """Router's site -> its `ExpertLoad`, over one pass of calibration data; empty for a model without routers.

    `data` is what `calibrate` takes; padding rows do not count. Experts are counted whether they are modules of their
    own or slices of one stacked weight. Raises InputError for empty data and for batches that the model cannot take.
    """
    from sparsec.errors import InputError
    from sparsec.sparsifiers.batches import Calibration
    from sparsec.sparsifiers.calibration import NOTHING, Watch, quiet

    calibration = Calibration.of(data)
    watch = Watch(model, (), ("load",), calibration)
    batches: Iterable[Any] = list(calibration.batches())
    if not batches:
        raise InputError(NOTHING)
    with quiet(model), watch:
        watch.run(batches)
    return watch.routers.loads() if watch.routers is not None else {}
