"""A back end of one's own: kernels that are Python files full of numpy, checked, timed and cached like any others.

A back end has a name, which variants give as their `language`, and three steps: `render` prints a kernel from its
KernelSpec, `build` turns the text into a file of the cache, `load` makes a callable of the file.
"""

import hashlib
import runpy
import sys
from pathlib import Path

import torch
from torch import nn

import sparsec
from sparsec.codegen.cache import open_cache
from sparsec.codegen.kernel import Kernel, KernelSpec, Source
from sparsec.formats import NM
from sparsec.target import Target

STEPS = {"relu": "np.maximum(s, 0)", "tanh": "np.tanh(s)", "scale": "s * {0!r}", "add": "s + residual.numpy()"}


class Numpy(sparsec.Backend):
    """Prints a function of numpy calls. `available()`, which this one inherits, could say what to install."""

    name = "numpy"

    def render(self, spec: KernelSpec) -> Source:
        """The text: it may depend on the spec alone, since equal specs must print equal bytes in every process."""
        lines = [
            "import numpy as np",
            f"def {spec.symbol}(x, y, bias, residual, values, places):",
            f"    at = places.numpy() + {dict(spec.fields)['m']} * np.arange(places.shape[1])[:, None]",
            "    s = (x.numpy()[..., at] * values.numpy()).sum((-1, -2))" + (" + bias.numpy()" if spec.bias else ""),
            *(f"    s = {STEPS[step.name].format(*step.params)}" for step in spec.epilogue),
            "    y.numpy()[...] = s",
        ]
        return Source(spec, self.name, "\n".join(lines) + "\n")

    def build(self, source: Source, target: Target) -> Path:
        """A file under the hash of all it depends on. Several threads and processes may build at once."""
        cache, key = open_cache(), hashlib.sha256(f"{sys.version}\n{source.text}".encode()).hexdigest()
        with cache.lock(key):
            entry = cache.lookup(key)
            if entry is None:
                with cache.workspace() as folder:
                    draft = folder / "kernel.py"
                    draft.write_text(source.text)
                    entry = cache.store(key, draft, source.text, {"spec": source.spec.text()})
        return entry.library

    def load(self, path: Path, source: Source) -> Kernel:
        """The callable: `call(x, y, bias or None, residual or None, *buffers of the format)` fills y."""
        call = runpy.run_path(str(path))[source.spec.symbol]
        return Kernel(source.spec, call, source.text, ("numpy", sys.version), str(path))


class Slow(NM):
    """N:M under another name, so that no compiled kernel competes for it."""

    name = "slow"


def main() -> None:
    variant = sparsec.Variant("linear_slow_numpy", "linear", "slow", language="numpy", steps=tuple(STEPS))
    for own in (Slow, variant, Numpy()):
        sparsec.register(own)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 64), nn.ReLU()).eval(), torch.randn(8, 256)
    kept = model[0].weight.data.view(-1, 4).abs().topk(2).indices
    model[0].weight.data.view(-1, 4).mul_(torch.zeros(64 * 64, 4).scatter_(1, kept, 1.0))
    compiled = sparsec.compile(model, Slow(2, 4), (x,), min_speedup=0)  # 0: take it however slow it is
    print(sparsec.report(compiled), sparsec.source(compiled, "0"), sep="\n")
    print(f"largest difference: {(compiled(x) - model(x)).detach().abs().max():.1e}")


if __name__ == "__main__":
    main()
