"""Copies that share storage with the caller's model, and the end of that sharing: a compile never changes its input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparsec.errors import CaptureError
from sparsec.failures import explain_failure


def shadow(model: nn.Module, training: bool | None = False, *, buffers: bool = False) -> nn.Module:
    """A deep copy of the Python side of a model whose tensors alias the caller's: nothing traced can change the caller.

    Parameters keep `requires_grad` only with `training`; None leaves mode and gradients as they are. With `buffers`,
    buffers are cloned: a copy that really runs may write them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                alias = _alias(value, training)
                memo[id(value)] = alias.clone() if buffers and not isinstance(value, nn.Parameter) else alias
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied, and the caller's model must not be touched: "
            f"{explain_failure(error, model)}; give the attribute that cannot be copied a __deepcopy__"
        ) from error
    if training is not None:
        for module in copied.modules():
            module.training = training
    return copied


_PURE_HOOKS = ("torch.nn.utils.", "torch.nn.utils", "transformers.")


def check_hooks(model: nn.Module) -> None:
    """CaptureError when a module carries hooks of the user's: a graph would run them once, while it is captured.

    The hooks of torch.nn.utils (pruning, weight norm) compute weights, and become part of the graph.
    """
    for path, module in model.named_modules():
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            origin = getattr(hook, "__module__", type(hook).__module__) or ""
            if not origin.startswith(_PURE_HOOKS):
                raise CaptureError(
                    f"{path or '<root>'} ({type(module).__name__}) has the forward hook "
                    f"{getattr(hook, '__qualname__', type(hook).__qualname__)}, which a graph would not run"
                )


def _alias(tensor: torch.Tensor, training: bool | None) -> torch.Tensor:
    plain = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(plain, requires_grad=tensor.requires_grad and training is not False)
    return plain


def storages(model: nn.Module) -> frozenset[Any]:
    """What identifies the storages of a model's tensors, for `privatise`."""
    return frozenset(storage_of(t) for m in model.modules() for t in _own_tensors(m) if t.numel())


def privatise(module: nn.Module, borrowed: frozenset[Any]) -> int:
    """Clone every tensor of `module` whose storage is among the `borrowed` ones; returns the bytes cloned.

    Tensors that alias one another keep doing so, and parameters keep their identity.
    """
    clones: dict[tuple[Any, ...], torch.Tensor] = {}
    total = 0
    for owner in module.modules():
        for tensor in _own_tensors(owner):
            if tensor.numel() == 0 or storage_of(tensor) not in borrowed:
                continue
            key = (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if key not in clones:
                clones[key] = tensor.detach().clone()
                total += tensor.numel() * tensor.element_size()
            tensor.data = clones[key]
    return total


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
        if isinstance(value, torch.Tensor):
            yield value


def storage_of(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a plain storage
        return id(tensor)
