"""Times functions against each other in turns, A B A B, so that a slow moment of the machine strikes all of them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

Function = Callable[[], object]
Turn = Callable[[], contextlib.AbstractContextManager[Any]]

# Idle threads of a pool go on spinning for a while after its last call (libgomp about 10 ms). Where the next function
# has a pool of its own, that would take cores from it.
PAUSE = 0.015
# Below this a turn begins with a call that is not timed: threads have gone to sleep, caches hold another's data.
SHORT = 0.02


@dataclass(frozen=True)
class Timing:
    median: float  # seconds of one call
    spread: float  # half the distance between the quartiles, as a fraction of the median
    samples: list[float] = field(default_factory=list)  # seconds of one call in each turn


def timed(function: Function, calls: int, finish: Function | None = None, turn: Turn = contextlib.nullcontext) -> float:
    """Seconds of one call. `finish` waits for work that a call only queues, as on a GPU; all calls are made in one
    `turn`, entering which is not timed."""
    with turn():
        if finish is not None:
            finish()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if finish is not None:
            finish()
        return (time.perf_counter() - start) / calls


def plan(once: Mapping[str, float], budget: float, rounds: int = 15) -> tuple[int, dict[str, int]]:
    """How many rounds, no fewer than five, and how many calls of each function in a turn; `once` is one call of each.

    A turn has several calls where one is short, or the clock is what is measured.
    """
    rounds = max(5, min(rounds, int(budget / sum(once.values()))))
    share = budget / rounds / len(once)
    return rounds, {name: max(1, int(share / seconds)) for name, seconds in once.items()}


def interleave(
    functions: Mapping[str, Function],
    budget: float = 1.0,
    rounds: int = 15,
    pools: Mapping[str, str] | None = None,
    finish: Function | None = None,
    turns: Mapping[str, Turn] | None = None,
) -> dict[str, Timing]:
    """Each function in turn, up to `rounds` times, about `budget` seconds in all.

    `pools` names the thread pool of each function; between different pools there is a pause. `turns` are what a
    function's calls are made in (see `timed`).
    """
    pools, turns = pools or {}, turns or {}

    def seconds(name: str, calls: int) -> float:
        return timed(functions[name], calls, finish, turns.get(name, contextlib.nullcontext))

    for name in functions:
        seconds(name, 1)
    once = {name: seconds(name, 1) for name in functions}
    rounds, calls = plan(once, budget, rounds)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    last = ""
    for _ in range(rounds):
        for name in functions:
            if last and pools.get(name) != pools.get(last):
                time.sleep(PAUSE)
            if once[name] < SHORT:
                seconds(name, 1)
            samples[name].append(seconds(name, calls[name]))
            last = name
    return {name: summary(taken) for name, taken in samples.items()}


def summary(samples: list[float]) -> Timing:
    median, spread = middle(samples)
    return Timing(median, spread, samples)


def middle(values: list[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles as a fraction of it."""
    if len(values) < 2:
        return values[0], 0.0
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2 / median


_CORE_DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}


def fma_peak(threads: int, rounds: int = 2_000_000, dtype: str = "float32") -> float:
    """Operations per second of `threads` cores on registers alone, the best of five; 0 without a core.

    They are those that products of this dtype are made of: of pairs for bfloat16 where the machine has such
    instructions, else of float32 for both half types.
    """
    try:
        from fusedseq import _cpu
    except ImportError:
        return 0.0
    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            operations = sum(pool.map(lambda n: _cpu.multiply_adds(_CORE_DTYPES[dtype], n), [rounds] * threads))
            best = max(best, operations / (time.perf_counter() - start))
    return best


def copy_bandwidth(threads: int, mebibytes: int = 256) -> float:
    """Bytes read plus bytes written per second when copying what no cache holds, the best of six."""
    source = torch.ones(mebibytes << 18)
    target = torch.empty_like(source)
    with _threads(threads):
        seconds = min(timed(lambda: target.copy_(source), 1) for _ in range(6))
    return 2 * source.nbytes / seconds


def read_bandwidth(threads: int, kibibytes: int = 256) -> float:
    """Bytes per second that `threads` cores read, each from a buffer in its own L2, the best of six."""
    passes = 4096
    # One call reads the buffer many times, so that starting it costs nothing.
    buffers = [torch.ones(kibibytes << 8).expand(passes, -1) for _ in range(threads)]
    with _threads(1), ThreadPoolExecutor(threads) as pool:
        seconds = min(timed(lambda: list(pool.map(lambda b: b.sum(1), buffers)), 1) for _ in range(6))
    return threads * passes * kibibytes * 1024 / seconds


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
