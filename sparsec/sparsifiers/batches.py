"""Calibration data: what a batch may be, how it is called, and which of its rows are padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec.errors import InputError, SpecError

MODES = ("auto", "whole", "blocks")
MASKS = ("attention_mask", "mask", "padding_mask", "key_padding_mask", "src_key_padding_mask")

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration data and how to use it; plain data stands for `Calibration(data)`.

    `data`: an iterable of batches, or one batch. A tuple or list is positional arguments, a mapping is keyword
    arguments, a tensor is the one argument; `inputs` says how many leading arguments the model takes when the rest are
    labels (default: as many as `forward` accepts). Batches may differ in every dimension but features.

    `mode`: "whole" runs the unpruned model once; "blocks" goes block by block, each calibrated behind the pruned ones
    before it, and holds the hidden states between two blocks and the sums of one block; "auto" takes blocks where the
    model is a chain of them and the method works layer by layer.

    `mask`: where the padding mask is: a keyword, a position, a function of the batch, or None to look for a keyword
    such as attention_mask. True or nonzero means a real row, except in masks called *padding_mask, which mark padding.

    `loss(output, batch)`, for gradient statistics, gives a scalar for a batch of one sample, or (values, weights) for
    an expectation over labels. `double` accumulates the Gram matrices in float64. `executor` runs one job per layer;
    results do not depend on it when its workers compute with as many threads as here.
    """

    data: Any
    mode: str = "auto"
    inputs: int | None = None
    mask: str | int | Callable[[Any], torch.Tensor] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    double: bool = False
    executor: Executor | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SpecError(f"Calibration: mode={self.mode!r}; valid: {', '.join(map(repr, MODES))}")

    @classmethod
    def of(cls, data: Any) -> Calibration:
        """`data` itself if it is a Calibration, else one of it."""
        return data if isinstance(data, Calibration) else cls(data)

    def batches(self) -> Iterator[Any]:
        """The batches as given. Raises SpecError for data that is none."""
        if isinstance(self.data, (torch.Tensor, Mapping)):
            yield self.data
        elif isinstance(self.data, Iterable) and not isinstance(self.data, (str, bytes)):
            yield from self.data
        else:
            raise SpecError(
                f"data={type(self.data).__name__} is no calibration data; pass an iterable of batches: tensors, tuples "
                "of arguments, or dicts of keyword arguments"
            )

    def call(self, model: nn.Module, batch: Any) -> Call:
        """The batch as (args, kwargs) of the model's forward."""
        if isinstance(batch, Mapping):
            return (), dict(batch)
        args = (batch,) if isinstance(batch, torch.Tensor) else batch
        if not isinstance(args, (tuple, list)):
            raise InputError(f"a calibration batch is a {type(batch).__name__}; valid: a tensor, a tuple, or a dict")
        count = self.inputs if self.inputs is not None else _positional(model)
        return tuple(args if count is None else args[:count]), {}

    def padding(self, batch: Any) -> torch.Tensor | None:
        """Flat bool of the rows to count, or None when all do."""
        if callable(self.mask):
            found, inverted = self.mask(batch), False
        elif isinstance(self.mask, int):
            found, inverted = batch[self.mask], False
        else:
            names = MASKS if self.mask is None else (self.mask,)
            name = next((n for n in names if isinstance(batch, Mapping) and batch.get(n) is not None), None)
            if name is None:
                if self.mask is not None:
                    raise InputError(f"Calibration(mask={self.mask!r}): a batch has no such entry")
                return None
            found, inverted = batch[name], "padding" in name
        if self.mask is None and found.dim() != 2:  # a causal or per-head mask says nothing about rows
            return None
        kept = (found == 0) if inverted else (found != 0)
        return kept.reshape(-1).cpu()


def _positional(model: nn.Module) -> int | None:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def samples(batch: Any) -> Iterator[Any]:
    """A batch cut into batches of one along dimension 0 of its tensors."""
    if isinstance(batch, torch.Tensor):
        yield from batch.split(1)
        return
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    sizes = {len(v) for v in values if isinstance(v, torch.Tensor) and v.dim()}
    if len(sizes) != 1:
        raise InputError(f"per-sample gradients need one batch size in dimension 0; the tensors have {sorted(sizes)}")
    for i in range(sizes.pop()):
        cut = [v[i : i + 1] if isinstance(v, torch.Tensor) and v.dim() else v for v in values]
        yield dict(zip(batch, cut)) if isinstance(batch, Mapping) else tuple(cut)
