"""Times functions against each other in turns, A B A B, so that a slow moment of the machine strikes all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    median: float  # seconds of one call
    spread: float  # half the distance between the quartiles, as a fraction of the median


def timed(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleave(
    functions: Mapping[str, Callable[[], object]], budget: float = 1.0, rounds: int = 15
) -> dict[str, Timing]:
    """Each function in turn, `rounds` times, about `budget` seconds in all; no fewer than five rounds."""
    for function in functions.values():
        function()
    once = {name: timed(function, 1) for name, function in functions.items()}
    rounds = max(5, min(rounds, int(budget / sum(once.values()))))
    # A turn of several calls where one is short, or the clock and the cold caches after the other's turn are measured.
    share = budget / rounds / len(functions)
    calls = {name: max(1, int(share / seconds)) for name, seconds in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(timed(function, calls[name]))
    return {name: summary(taken) for name, taken in samples.items()}


def fma_peak(threads: int, rounds: int = 2_000_000) -> float:
    """Float32 operations per second of `threads` cores on registers alone, the best of five; 0 without a core."""
    try:
        from fusedseq import _cpu
    except ImportError:
        return 0.0
    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            operations = sum(pool.map(_cpu.multiply_adds, [rounds] * threads))
            best = max(best, operations / (time.perf_counter() - start))
    return best


def summary(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, (high - low) / 2 / median)
