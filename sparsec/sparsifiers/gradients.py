"""Gradient statistics: mean gradient, Fisher information, Hessian-gradient product, gradients of outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsec.errors import InputError
from sparsec.sparsifiers.batches import Calibration, samples
from sparsec.sparsifiers.stats import Observer


def add_gradients(
    model: nn.Module, batch: Any, calibration: Calibration, observers: Mapping[str, Observer], needs: Sequence[str]
) -> None:
    """Add one batch to the sums of `observers`, sample by sample, so that squares are of per-sample gradients."""
    weights = {site: o.layer.weight for site, o in observers.items()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    grads = _OutputGradients(model, observers) if "out_grad" in needs else None
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            before = sum(o.samples for o in observers.values())
            for sample in samples(batch):
                _one(model, sample, calibration, observers, needs, weights)
            if grads is not None:
                grads.remove()  # differentiating twice would count again
            if "hessian_grad" in needs:
                count = (sum(o.samples for o in observers.values()) - before) // len(observers)
                _curvature(model, batch, calibration, observers, count)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        if grads is not None:
            grads.remove()


def _one(
    model: nn.Module,
    sample: Any,
    calibration: Calibration,
    observers: Mapping[str, Observer],
    needs: Sequence[str],
    weights: Mapping[str, torch.Tensor],
) -> None:
    args, kwargs = calibration.call(model, sample)
    output = model(*args, **kwargs)
    found = calibration.loss(output, sample)  # type: ignore[misc]
    values, shares = found if isinstance(found, tuple) else (found.reshape(1), torch.ones(1))
    if not bool(values.isfinite().all()):
        raise InputError("the loss is NaN or infinite")
    if isinstance(found, tuple) and "out_grad" in needs:
        raise InputError("out_grad needs a loss that gives one scalar")
    for i, share in enumerate(shares.tolist()):
        grads = torch.autograd.grad(
            values[i], list(weights.values()), retain_graph=i + 1 < len(shares), allow_unused=True
        )
        for (site, weight), g in zip(weights.items(), grads):
            g = torch.zeros_like(weight) if g is None else g
            if "grad" in needs:
                observers[site].accumulate("grad", g * share)
            if "fisher" in needs:
                observers[site].accumulate("fisher", g.double().square() * share)
    for observer in observers.values():
        observer.samples += 1


def _curvature(
    model: nn.Module, batch: Any, calibration: Calibration, observers: Mapping[str, Observer], count: int
) -> None:
    """H g of the whole batch's loss, by differentiating g . stop(g); weighted by its `count` samples."""
    args, kwargs = calibration.call(model, batch)
    loss = calibration.loss(model(*args, **kwargs), batch)  # type: ignore[misc]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise InputError("hessian_grad needs a loss that gives one scalar, also for a whole batch")
    weights = [o.layer.weight for o in observers.values()]
    grads = torch.autograd.grad(loss.reshape(()), weights, create_graph=True, allow_unused=True)
    inner = [(g * g.detach()).sum() for g in grads if g is not None and g.requires_grad]
    products: Sequence[Any] = [None] * len(weights)
    if inner:
        products = torch.autograd.grad(torch.stack(inner).sum(), weights, allow_unused=True)
    for observer, h in zip(observers.values(), products):
        value = torch.zeros_like(observer.layer.weight) if h is None else h
        observer.accumulate("hessian_grad", value.detach() * count)


class _OutputGradients:
    """Hooks that add up the squares of dL/dy per output of each layer."""

    def __init__(self, model: nn.Module, observers: Mapping[str, Observer]) -> None:
        self.handles = []
        for site, observer in observers.items():
            module = model.get_submodule("" if site == "<root>" else site)
            self.handles.append(module.register_forward_hook(self._watch(observer)))

    @staticmethod
    def _watch(observer: Observer) -> Any:
        axis = 1 if observer.layer.op.startswith("conv") else -1

        def add(grad: torch.Tensor) -> None:
            observer.accumulate("out_grad", grad.double().square().movedim(axis, 0).flatten(1).sum(1))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return after

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def log_likelihoods(output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss for `Calibration` that takes the expectation over the model's own labels, p(y|x): the true Fisher.

    Returns (-log p(y) for every label y, p(y)); `output` is logits [1, classes] or has them as `.logits`.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 1:
        raise InputError("log_likelihoods needs logits of shape [1, classes]")
    negative = -logits.log_softmax(-1)[0]
    return negative, (-negative).exp().detach()


__all__ = ["add_gradients", "log_likelihoods"]
