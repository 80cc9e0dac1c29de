"""The layers' jobs: independent, and the same whoever runs them, here or in other processes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sparsec.progress import Progress
from sparsec.sparsifiers.parts import Problem, Solution, Sparsifier


def run_jobs(sparsifier: Sparsifier, problems: Sequence[Problem], executor: Executor | None = None) -> list[Solution]:
    """`sparsifier.solve` of every problem, in order; by `executor` when there is one.

    Problems and solutions cross as numpy arrays, so any executor of `concurrent.futures` works. In a pool of processes
    use the "spawn" or "forkserver" start method: a fork of a process that has used OpenMP hangs.
    """
    solutions = []
    with Progress(len(problems), "pruning") as bar, torch.no_grad():
        if executor is None:
            for problem in problems:
                solutions.append(sparsifier.solve(problem))
                bar.advance()
            return solutions
        futures = [executor.submit(remote_job, sparsifier, _packed(p)) for p in problems]
        try:
            for future in futures:
                solutions.append(Solution(*_unpacked(future.result())))
                bar.advance()
        finally:
            for future in futures:
                future.cancel()
    return solutions


def remote_job(sparsifier: Sparsifier, packed: Any) -> Any:
    """One job on packed arrays: what an executor runs."""
    (layer, layer_tensors), (stats, stats_tensors), zeros = packed
    layer = replace(layer, **_tensors(layer_tensors))
    stats = None if stats is None else replace(stats, **_tensors(stats_tensors))
    with torch.no_grad():
        solution = sparsifier.solve(Problem(layer, stats, zeros))
    return [_array(x) if isinstance(x, torch.Tensor) else x for x in vars(solution).values()]


def _packed(problem: Problem) -> Any:
    return _split(problem.layer), _split(problem.stats), problem.zeros


def _split(value: Any) -> Any:
    """(the value without its tensors, the tensors as arrays)."""
    if value is None:
        return None, {}
    tensors = {k: v for k, v in vars(value).items() if isinstance(v, torch.Tensor)}
    return replace(value, **dict.fromkeys(tensors)), {k: _array(v) for k, v in tensors.items()}


def _array(tensor: torch.Tensor) -> tuple[np.ndarray, str]:
    """The bytes of a tensor as an array of its shape, and its dtype: numpy has no bfloat16."""
    plain = tensor.detach().cpu().contiguous()
    name = str(plain.dtype).removeprefix("torch.")
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy(), name


def _tensor(packed: tuple[np.ndarray, str]) -> torch.Tensor:
    array, name = packed
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor


def _tensors(packed: dict[str, Any]) -> dict[str, Any]:
    return {k: _tensor(v) for k, v in packed.items()}


def _unpacked(values: list[Any]) -> list[Any]:
    return [_tensor(v) if isinstance(v, tuple) and v and isinstance(v[0], np.ndarray) else v for v in values]
