"""The kernel fuzzer's problems on other sparse libraries, for comparison: `python -m sparsec.testing_peers`.

Each problem is a product with a sparse weight, and what a library gives is held to the same float64 oracle and bound as
our own kernels. A call ends `right`, `wrong` (a value beyond its bound, or NaN and Inf that do not match), `refused`
(it raises), or `crashed` (the process died).
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsec import verify
from sparsec.codegen.kernel import DTYPES
from sparsec.formats import CSR, Format
from sparsec.target import Target
from sparsec.testing import Case, Data, draw_case, draw_data, make_input, make_weight, operands
from sparsec.testing_kernels import variants
from sparsec.testing_totals import DEFAULT_PATH, Totals, resume

PROBLEMS = 50  # of one block, which is a process of its own
BLOCK = (4, 4)  # of BSR, where both sizes are multiples of it


def _torch_csr(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = (weight.to_sparse_csr() @ x.t()).t()
    return y


def _torch_bsr(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight.to_sparse_bsr(BLOCK))


def _torch_coo(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.sparse.mm(weight.to_sparse_coo(), x.t())
    return y.t()


def _scipy_csr(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    import scipy.sparse

    product: torch.Tensor = torch.from_numpy((scipy.sparse.csr_array(weight.numpy()) @ x.numpy().T).T)
    return product


PEERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "torch.sparse CSR": _torch_csr,
    "torch.sparse BSR": _torch_bsr,
    "torch.sparse COO": _torch_coo,
    "scipy.sparse CSR": _scipy_csr,
}
"""Name -> y (batch, out) from a dense weight (out, in) and x (batch, in)."""


def stored(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The positions that a peer stores: those that are not zero, or the blocks that hold one."""
    kept = weight != 0
    if name != "torch.sparse BSR" or weight.shape[0] % BLOCK[0] or weight.shape[1] % BLOCK[1]:
        return kept
    blocks = kept.view(weight.shape[0] // BLOCK[0], BLOCK[0], -1, BLOCK[1]).any(3).any(1)
    return blocks.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)


def outcome(name: str, case: Case, data: Data) -> str:
    """How a peer does on one problem: right, wrong or refused."""
    weight = make_weight(case, data)
    x = make_input(case, data, case.cols, 2).reshape(-1, case.cols)
    bias, residual = operands(case, data, x.shape[:-1])
    want = verify.expected(x, weight, bias, case.epilogue, residual, stored(name, weight))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = PEERS[name](weight, x)
            y = verify.apply_steps(case.epilogue, y if bias is None else y + bias, residual)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return "refused"
    if y.shape != want.value.shape or y.dtype != DTYPES[case.dtype]:
        return "wrong"
    ratio = want.ratio(y)
    return "wrong" if ratio.numel() and float(ratio.max()) > 1 else "right"


def _draw(seed: int, number: int, count: int) -> list[tuple[Case, Data]]:
    import dataclasses

    rng = np.random.default_rng((seed, number, 7))
    target = Target.probe()
    table = variants(target)
    fmt: Format = CSR()
    return [(dataclasses.replace(draw_case(rng, target, table), format=fmt), draw_data(rng)) for _ in range(count)]


def block(seed: int, number: int, count: int = PROBLEMS) -> tuple[dict[str, Any], list[str]]:
    """Counts of one block for Totals; each peer runs in a child process, and what is left when it dies crashed."""
    problems = _draw(seed, number, count)
    outcomes: dict[str, dict[str, int]] = {}
    for name in PEERS:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            for case, data in problems:
                os.write(write, json.dumps(outcome(name, case, data)).encode() + b"\n")
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as results:
            found = Counter(json.loads(line) for line in results)
        os.waitpid(child, 0)
        if found.total() < count:
            found["crashed"] += 1
        outcomes[name] = dict(found)
    return {"problems": count, "peers": outcomes}, []


def main() -> int:
    """The command: counts, never a failure of ours."""
    parser = argparse.ArgumentParser(description="Run the kernel fuzzer's problems on other sparse libraries.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=1000, help="in all, with those already recorded")
    parser.add_argument("--totals", type=Path, default=DEFAULT_PATH, help="JSON file that runs add to")
    options = parser.parse_args()
    record = resume(
        Totals(options.totals), "peers", options.seed, options.problems, "problems", lambda n: block(options.seed, n)
    )
    for name, counts in record["peers"].items():
        print(f"{name:<17} " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
