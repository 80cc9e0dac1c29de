"""How sparsity grows over training steps, and how what is dropped goes to zero."""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.errors import SpecError
from sparsec.sparsifiers.allocators import check_sparsity


@dataclass(frozen=True)
class Schedule:
    """Base: the sparsity at a training step, and the steps at which masks are chosen anew."""

    def sparsity(self, step: int) -> float:
        raise NotImplementedError

    def due(self, step: int) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at step `at`."""

    final: float
    at: int = 0

    def __post_init__(self) -> None:
        check_sparsity("OneShot", self.final)

    def sparsity(self, step: int) -> float:
        return self.final if step >= self.at else 0.0

    def due(self, step: int) -> bool:
        return step == self.at


@dataclass(frozen=True)
class Cubic(Schedule):
    """s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3, every `every` steps (Zhu and Gupta, To prune, or not to
    prune, 2017). The last update is at `end`, and the sparsity stays `final` afterwards."""

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_sparsity("Cubic", self.final)
        check_sparsity("Cubic", self.initial)
        if not 0 <= self.begin < self.end or self.every < 1 or self.initial > self.final:
            raise SpecError(f"{self!r}: begin < end, every is positive, and initial is at most final")

    def sparsity(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        left = 1 - (min(step, self.end) - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3

    def due(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class Linear(Cubic):
    """Like Cubic, in a straight line."""

    def sparsity(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        done = (min(step, self.end) - self.begin) / (self.end - self.begin)
        return self.initial + (self.final - self.initial) * done


@dataclass(frozen=True)
class Decay:
    """Dropped entries shrink to zero over `steps` steps instead of at once: step t multiplies by (T-t-1)/(T-t), whose
    product is exactly 0 (Chen et al., HESSO, 2024)."""

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise SpecError(f"Decay: steps={self.steps!r} is no positive integer")

    def factor(self, step: int) -> float:
        """What step 0, 1, ... multiplies by; 0 from the last step on."""
        return max(0, self.steps - step - 1) / (self.steps - step) if step < self.steps else 0.0
