"""No process that is killed while it writes leaves an entry that another one reads damaged."""

from __future__ import annotations

import cache_soak
import pytest


@pytest.mark.parametrize(("processes", "rounds"), [(4, 12), pytest.param(16, 3200, marks=pytest.mark.soak)])
def test_killed_processes_corrupt_nothing(processes: int, rounds: int) -> None:
    totals = cache_soak.run(processes, rounds, seed=3)
    assert totals["bad"] == 0 and totals["killed"] == rounds
    assert totals["read"] > 0 and totals["stored"] > 0


def test_the_check_sees_damage() -> None:
    key = cache_soak.KEYS[0]
    good = cache_soak.content(key, 1)
    assert cache_soak.whole(key, good)
    assert not cache_soak.whole(key, good[:-1]) and not cache_soak.whole(cache_soak.KEYS[1], good)
