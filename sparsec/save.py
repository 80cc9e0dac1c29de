"""`save` and `load`: a compiled model as one file that holds data only, and that is believed in nothing.

The file is a zip of stored members: `manifest.json`, `graph.json` (our own form of the graph, calls named through fixed
tables), `tensors.safetensors`, `report.json`, `history.json`, and `kernels/*.c` for reading. Loading parses, checks and
rebuilds; kernels are rendered again from their KernelSpecs with the templates of this installation. Nothing is
unpickled, no code of the file is run, and none is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from sparsec import save_zip
from sparsec.codegen import build
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import DeviceError, LoadError, SparsecError, SpecError, ToolchainError
from sparsec.graph import KEY, constants, ties
from sparsec.history import Entry, History
from sparsec.install import Ledger, compiled_graphs, ledger
from sparsec.module import CompiledModule, FlatCodeGen
from sparsec.private import storage_of
from sparsec.report import Report
from sparsec.save_call import decode_call, encode_call
from sparsec.save_graph import decode_constant, decode_graph, encode_constant, encode_graph
from sparsec.save_kernels import bind, decode_installed, encode_installed, make
from sparsec.save_report import check_report
from sparsec.save_values import (
    decode,
    decode_tree,
    device,
    encode,
    encode_tree,
    identifier,
    integer,
    sequence,
    table,
    text,
)


def save(cm: nn.Module, path: str | Path, *, libraries: bool = False) -> Path:
    """Write a compiled model into one file and return its path; `load` gives it back in any process.

    The file holds graph, packed weights, kept originals, report, history, and generated sources to read. With
    `libraries` it also holds the built kernels, which only `load(path, trust=True)` uses. An existing file is replaced
    in one step.

    Raises SpecError for a model that was compiled by regions (its class is Python code), for a graph that calls
    Python modules or ops outside the tables of `sparsec.save_ops`, and for arguments that are no plain values.
    """
    graph, result = _whole(cm)
    store = _Store()
    document = _document(graph, result, store)
    texts = list(dict.fromkeys(t for record in ledger(graph).installed for _, t in record.kernels))
    members = {
        "graph.json": save_zip.dumps(document),
        "tensors.safetensors": save_zip.pack_tensors(store.tensors),
        "report.json": result.report.to_json(indent=None).encode(),
        "history.json": save_zip.dumps(_encode_history(result.histories.get(""))),
    }
    for kernel in (build.get_kernel(t) for t in texts):
        members[f"kernels/{kernel.spec.symbol}.{'cu' if kernel.spec.device == 'cuda' else 'c'}"] = (
            kernel.source.encode()
        )
        if libraries and kernel.path and kernel.spec.device == "cpu":
            members[f"libraries/{kernel.spec.symbol}.so"] = Path(kernel.path).read_bytes()
    save_zip.write(Path(path), members, {"sparsec": _version(), "torch": torch.__version__})
    return Path(path)


def load(path: str | Path, trust: bool = False) -> nn.Module:
    """The compiled model that `save` wrote, with kernels made for this machine.

    All of the file is checked first: container, hashes, graph, names, formats (linear in the stored entries), and that
    each kernel belongs to the weight it reads. `trust=True` lets it bring its own built kernels, which run with your
    rights: use it only for files whose origin you know. Everything else is safe to load from strangers.

    Raises LoadError for a file that is damaged, forged or of another format version; ToolchainError where no compiler
    is found; DeviceError for a CUDA model where there is no device.
    """
    manifest, members = save_zip.read(Path(path))
    try:
        return _load(members, bool(trust))
    except (ToolchainError, DeviceError):
        raise
    except Exception as error:  # whatever a damaged file can provoke, also in torch, is the file's fault
        by = f"sparsec {manifest.get('sparsec')!s:.20}, torch {manifest.get('torch')!s:.30}"
        what = (
            str(error) if isinstance(error, SparsecError) else f"it is damaged ({type(error).__name__}: {error!s:.200})"
        )
        raise LoadError(f"{path} (written by {by}): {what}") from error


def _version() -> str:
    from sparsec.codegen.c import package_version

    return package_version()


def _whole(cm: nn.Module) -> tuple[CompiledModule, Any]:
    from sparsec.api import Result

    result = cm.meta.get(KEY, {}).get("result") if isinstance(cm, fx.GraphModule) else None
    if isinstance(cm, CompiledModule) and cm.call is not None and isinstance(result, Result):
        return cm, result
    if next(iter(compiled_graphs(cm)), None) is not None:
        raise SpecError(
            f"{type(cm).__name__} was compiled by regions: around them it is a class of your own, and saved "
            "models hold no code. Call torch.save(sparsec.dense_state_dict(cm), path), load that and compile again; "
            "or compile the part that can be captured whole"
        )
    raise SpecError(f"{type(cm).__name__} is no result of sparsec.compile; save takes what compile returned")


# Writing


class _Store:
    """Tensors on their way into the file, by name; permuted ones keep the order of their dimensions in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self._seen: set[Any] = set()

    def put(self, name: str, tensor: torch.Tensor) -> str:
        value = tensor.detach()
        if value.layout is not torch.strided or value.is_quantized:
            raise SpecError(
                f"tensor {name!r} has layout {value.layout} or is quantised; saved models hold plain tensors"
            )
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda d: -strides[d])
        permuted = value.permute(order)
        natural = value.is_contiguous() or not permuted.is_contiguous()
        flat = (value if natural else permuted).to("cpu").contiguous()
        if storage_of(flat) in self._seen:
            flat = flat.clone()
        self._seen.add(storage_of(flat))
        self.tensors[name] = flat
        self.about[name] = {"order": None if natural else order, "device": str(value.device)}
        return name

    def entry(self, name: str, value: Any) -> Any:
        """A state-dict entry, which may be a plain value instead of a tensor."""
        return self.put(name, value) if isinstance(value, torch.Tensor) else {"value": encode(value)}

    def literal(self, tensor: torch.Tensor) -> str:
        return self.put(f"literal.{len(self.tensors)}", tensor)


def _document(gm: CompiledModule, result: Any, store: _Store) -> dict[str, Any]:
    codegen = gm.graph._codegen
    out = codegen.pytree_info.out_spec if isinstance(codegen, FlatCodeGen) else None
    root: dict[str, Any] = {}
    for name, tensor in [*gm._parameters.items(), *gm._buffers.items()]:
        if tensor is not None:
            kind = "parameter" if name in gm._parameters else "buffer"
            root[name] = {"kind": kind, "persistent": name not in gm._non_persistent_buffers_set}
            store.put(f"root.{name}", tensor)
    records = ledger(gm)
    return {
        "call": encode_call(gm.call),  # type: ignore[arg-type]
        "output": None if out is None else encode_tree(out),
        "graph": encode_graph(gm.graph),
        "root": root,
        "constants": {name: encode_constant(c, store.literal) for name, c in constants(gm).items()},
        "ties": dict(ties(gm)),
        "installed": [encode_installed(record, store.literal) for record in records.installed],
        "originals": {k: store.entry(f"original.{i}", v) for i, (k, v) in enumerate(records.originals.items())},
        "keys": list(result.keys),
        "tensors": store.about,
    }


def _encode_history(history: History | None) -> list[Any]:
    return [[e.name, e.changes, e.seconds, e.code, e.skipped] for e in history or ()]


# Reading


_DOCUMENT = ("call", "output", "graph", "root", "constants", "ties", "installed", "originals", "keys", "tensors")


def _load(members: dict[str, bytes], trust: bool) -> CompiledModule:
    for name in ("graph.json", "tensors.safetensors", "report.json", "history.json"):
        if name not in members:
            raise LoadError(f"it has no member {name}")
    document = table(save_zip.loads(members["graph.json"], "graph.json"), "graph.json", _DOCUMENT)
    report = check_report(save_zip.loads(members["report.json"], "report.json"))
    history = _decode_history(save_zip.loads(members["history.json"], "history.json"))
    tensors = _tensors(document["tensors"], save_zip.unpack_tensors(members["tensors.safetensors"]))
    libraries = {
        n.removeprefix("libraries/").removesuffix(".so"): data
        for n, data in members.items()
        if n.startswith("libraries/")
    }
    fitted: dict[str, KernelSpec] = {}
    module = _module(document, tensors, fitted)
    make(list(dict.fromkeys(fitted.values())), libraries if trust else {})
    _attach(module, document, report, history)
    return module


def _tensors(about: Any, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name, in the memory order and on the device they had."""
    if not isinstance(about, dict) or sorted(about) != sorted(stored):
        raise LoadError("graph.json and tensors.safetensors list different tensors")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        table(about[name], f"tensor {name!r:.60}", ("order", "device"))
        order = about[name]["order"]
        if order is not None:
            if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(tensor.dim()))):
                raise LoadError(f"tensor {name!r:.60}: {order!r:.60} is no order of its dimensions")
            tensor = tensor.permute([order.index(d) for d in range(tensor.dim())])
        where = device(about[name]["device"])
        if where.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"the model was saved on {where}, and this process sees no CUDA device")
        found[name] = tensor.to(where)
    return found


def _module(
    document: dict[str, Any], tensors: Mapping[str, torch.Tensor], fitted: dict[str, KernelSpec]
) -> CompiledModule:
    call = decode_call(document["call"])
    root, transient = _root(document["root"], tensors)
    literal = _fetcher(tensors, "literal.")
    installed = [decode_installed(d, root, literal, fitted) for d in sequence(document["installed"], "installed")]
    graph = decode_graph(document["graph"], inputs=len(call.guards), has=lambda name: name in root)
    bind(graph, installed, fitted)
    _set_output(graph, document["output"])
    gm = fx.GraphModule({}, fx.Graph())
    for name, tensor in root.items():
        if hasattr(gm, name):
            raise LoadError(f"attribute {name!r} has a name that modules need themselves")
        if isinstance(tensor, nn.Parameter):
            gm.register_parameter(name, tensor)
        else:
            gm.register_buffer(name, tensor, persistent=name not in transient)
    gm.graph = graph
    known = gm.meta.setdefault(KEY, {})
    known["constants"] = _table_of(document["constants"], lambda d: decode_constant(d, literal))
    known["ties"] = _table_of(document["ties"], lambda d: text(d, "tie", 10_000))
    original = _fetcher(tensors, "original.")

    def entry(data: Any) -> Any:
        return decode(data["value"], original) if isinstance(data, dict) and list(data) == ["value"] else original(data)

    known["ledger"] = Ledger(installed, _table_of(document["originals"], entry))
    return CompiledModule.wrap(gm, call)


def _root(data: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    if not isinstance(data, dict):
        raise LoadError("root is not an object")
    root: dict[str, torch.Tensor] = {}
    transient: set[str] = set()
    for name, about in data.items():
        identifier(name, "attribute")
        table(about, f"attribute {name!r}", ("kind", "persistent"))
        if about["kind"] not in ("parameter", "buffer") or f"root.{name}" not in tensors:
            raise LoadError(f"attribute {name!r} is neither parameter nor buffer, or has no tensor")
        tensor = tensors[f"root.{name}"]
        root[name] = nn.Parameter(tensor, requires_grad=False) if about["kind"] == "parameter" else tensor
        if about["persistent"] is not True:
            transient.add(name)
    return root, transient


def _fetcher(tensors: Mapping[str, torch.Tensor], prefix: str) -> Callable[[Any], torch.Tensor]:
    def fetch(name: Any) -> torch.Tensor:
        if not isinstance(name, str) or not name.startswith(prefix) or name not in tensors:
            raise LoadError(f"{name!r:.60} is no tensor of this file")
        return tensors[name]

    return fetch


def _table_of(data: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise LoadError("constants, ties and originals are objects")
    return {text(name, "name", 10_000): read(value) for name, value in data.items()}


def _set_output(graph: fx.Graph, data: Any) -> None:
    if data is None:
        return
    tree = decode_tree(data)
    (output,) = next(n for n in graph.nodes if n.op == "output").args
    if not isinstance(output, (tuple, list)) or len(output) != tree.num_leaves:
        raise LoadError(f"the graph does not give the {tree.num_leaves} outputs of its output tree")
    graph.set_codegen(FlatCodeGen([n.name for n in graph.nodes if n.op == "placeholder"], tree))


def _decode_history(data: Any) -> History:
    history = History()
    for item in sequence(data, "history"):
        if not isinstance(item, list) or len(item) != 5 or type(item[2]) not in (int, float):
            raise LoadError("an entry of the history is not a list of five parts")
        name, code, skipped = (text(item[i], "history", save_zip.JSON_BYTES) for i in (0, 3, 4))
        history.add(Entry(name, integer(item[1], "changes"), float(item[2]), code, skipped))
    return history


def _attach(module: CompiledModule, document: dict[str, Any], report: Report, history: History) -> None:
    """The records that the public functions read; the same as after `compile`."""
    from sparsec.api import Result

    keys = tuple(text(k, "key", 10_000) for k in sequence(document["keys"], "keys"))
    module.meta[KEY]["history"] = history
    module.meta[KEY]["result"] = Result(report, keys, {"": history})
