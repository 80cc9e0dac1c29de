"""The compiled module: a GraphModule that is called like the original and refuses what it was not compiled for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from sparsec.call import CallInfo, make_binders
from sparsec.errors import InputError
from sparsec.graph import KEY
from sparsec.install import validate
from sparsec.private import privatise
from sparsec.schedule import scheduled


class FlatCodeGen(_PyTreeCodeGen):
    """Code whose inputs are the flat placeholders and whose output has the original structure.

    The stock pytree code flattens its inputs again on every call; the binder has done that already.
    """

    def __init__(self, names: list[str], out_spec: pytree.TreeSpec) -> None:
        inputs = pytree.tree_structure(tuple(range(len(names))))
        super().__init__(_PyTreeInfo(names, inputs, out_spec))

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatCodeGen:
        return copy.copy(self)  # tree specs are immutable, and warn when they are copied

    def process_inputs(self, *inputs: Any) -> Any:
        """For torch.fx.Interpreter, which export hands the arguments of a call: their tensors are the placeholders."""
        if len(inputs) == len(self.pytree_info.orig_args) and not any(isinstance(x, (dict, list)) for x in inputs):
            return inputs
        return [leaf for leaf in pytree.arg_tree_leaves(*inputs) if isinstance(leaf, torch.Tensor)]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        return CodeGen.gen_fn_def(self, free_vars, maybe_return_annotation, expanded_def=expanded_def)

    def generate_output(self, output_args: Any, *, descs: Any = None, repr_fn: Any = None) -> str:
        spec = self.pytree_info.out_spec
        show = repr_fn or repr
        if spec is not None and spec.is_leaf() and isinstance(output_args, (list, tuple)) and len(output_args) == 1:
            return f"return {show(output_args[0])}"
        if spec is not None and spec.type in (tuple, list) and all(c.is_leaf() for c in spec.children()):
            return f"return {show(spec.type(output_args))}"
        return super().generate_output(output_args, descs=descs, repr_fn=repr_fn)


class CompiledModule(fx.GraphModule):
    """A captured graph behind the original signature.

    `forward` binds and checks a call (InputError names the argument, what it got and what it expects); `attempt` does
    the same but returns `call.MISMATCH`; `run` is the graph alone, on flat tensors. All records live in
    `meta["sparsec"]`, because copies of a GraphModule keep nothing else.
    """

    @classmethod
    def wrap(cls, gm: fx.GraphModule, call: CallInfo) -> CompiledModule:
        """Take over a captured graph, its constants and its meta; `gm` must not be used afterwards.

        Constants that still share storage with the caller's model are cloned now, when the packed ones are gone.
        """
        gm.graph._tracer_cls = None
        module = cls(gm, gm.graph, class_name=f"Compiled{call.owner}")
        keep_persistence(gm, module)
        module.meta = gm.meta
        module.meta.setdefault(KEY, {})["call"] = call
        privatise(module, module.meta[KEY].pop("borrowed", frozenset()))
        module.training = call.training
        module.recompile()
        return module

    @property
    def call(self) -> CallInfo | None:
        found: CallInfo | None = self.meta.get(KEY, {}).get("call") if "meta" in self.__dict__ else None
        return found

    def recompile(self) -> Any:
        """Regenerate `run` from the scheduled graph and put the binder in front of it."""
        graph = self._graph
        self._graph = scheduled(graph)
        try:
            code = super().recompile()
        finally:
            self._graph = graph
        cls: Any = type(self)
        if self.call is not None:
            cls.run = cls.forward
            cls.forward, cls.attempt = make_binders(self.call)
        # The stock wrapper only prints the generated source when a call fails; it costs as much as the binder.
        cls.__call__ = nn.Module.__call__
        return code

    def train(self, mode: bool = True) -> CompiledModule:
        """Switch modes where the capture has both; an inference capture refuses to train."""
        call = self.call
        if mode and call is not None and not call.training:
            raise InputError(
                f"{call.owner} was compiled for inference: dropout and batch norm are baked in; "
                "compile with training=True to train it"
            )
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompiledModule:
        self.check_apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def check_apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """InputError when `fn` (what `.to()` applies to every tensor) would change a dtype or a device."""
        for tensor in self.state_tensors():
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            moved = fn(probe)
            if moved.dtype != probe.dtype:
                raise InputError(
                    f"a compiled model cannot be cast from {probe.dtype} to {moved.dtype}: its weights are packed and "
                    "its graph is specialised for one dtype; cast the original model before compiling it"
                )
            if moved.device != probe.device:
                raise InputError(
                    f"a compiled model cannot be moved from {probe.device} to {moved.device}: its kernels were built "
                    "for one device; move the original model before compiling it"
                )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Packed buffers are checked before any is copied: a kernel follows their indices without looking."""
        cut = len(prefix)
        validate(self, {key[cut:]: value for key, value in state_dict.items() if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def state_tensors(self) -> list[torch.Tensor]:
        """One tensor for each (dtype, device) among parameters and buffers."""
        found: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        for tensor in [*self.parameters(), *self.buffers()]:
            found.setdefault((tensor.dtype, tensor.device), tensor)
        return list(found.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        for spec in (self.__dict__.get("_in_spec"), self.__dict__.get("_out_spec")):
            memo[id(spec)] = spec
        copied = cast(CompiledModule, super().__deepcopy__(memo))
        keep_persistence(self, copied)
        copied.training = self.training
        copied.recompile()  # only now does the copy know its call
        return copied

    def __copy__(self) -> CompiledModule:
        graph = fx.Graph()
        output = graph.graph_copy(self.graph, {})
        graph.output(output)
        graph.set_codegen(self.graph._codegen)
        shallow = fx.GraphModule(self, graph)
        shallow.meta = dict(self.meta)
        keep_persistence(self, shallow)
        call = self.call
        return CompiledModule.wrap(shallow, call) if call is not None else shallow  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "a compiled model cannot be pickled: the copy would lose its packed weights' records and kernels; "
            "use sparsec.save(model, path) and sparsec.load(path)"
        )

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_package__(self, exporter: Any) -> Any:
        return self.__reduce_ex__(2)


def keep_persistence(source: nn.Module, target: nn.Module) -> None:
    """Copy which buffers stay out of the state dict: making a GraphModule from another module forgets it."""
    known = dict(target.named_modules())
    for name, module in source.named_modules():
        if name in known:
            mine = known[name]
            mine._non_persistent_buffers_set |= module._non_persistent_buffers_set & mine._buffers.keys()
