"""Tiles tried on request (`FUSEDSEQ_AUTOTUNE=1`): the fastest of a few, measured at the first call of a kind.

Off, each kernel takes the tile that ships for it. What a kind is, its caller says by a key, which never has the size of
the batch in it: a new batch size must not stop a training run to measure again. Part of the backend `triton`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from fusedseq import config

T = TypeVar("T", bound=Hashable)

# What took the least time, by key.
_fastest: dict[Hashable, Any] = {}


def choose(key: Hashable, shipped: T, others: Callable[[], Sequence[T]], launch: Callable[[T], object], x: Tensor) -> T:
    """What a call on the device of `x` is to run with: `shipped`, or if tuning is asked for the fastest of it and of
    `others`.

    `launch` runs the kernel with one of them, as often as it takes; what it writes must not be what it reads. A
    candidate that the GPU has no room for is passed over, unless it is the shipped one. While a stream is captured
    nothing can be measured: what was not measured before then takes the shipped one.
    """
    if not config.settings.autotune or not _measurable(x):
        return shipped
    key = (key, shipped, _device(x))
    if key not in _fastest:
        if _capturing():
            return shipped
        taken: dict[T, float] = {}
        for one in dict.fromkeys((shipped, *others())):
            try:
                taken[one] = _measure(functools.partial(launch, one))
            except (OutOfResources, PTXASError):
                if one == shipped:
                    raise
        _fastest[key] = min(taken, key=taken.__getitem__)
    found: T = _fastest[key]
    return found


def _measurable(x: Tensor) -> bool:
    return x.is_cuda


def _device(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _measure(call: Callable[[], object]) -> float:
    """Milliseconds, the median of many runs."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


class Block(NamedTuple):
    """A tile of a kernel that is limited by memory: rows, columns, warps."""

    BM: int
    BN: int
    warps: int = 4

    def others(self, whole: bool = False) -> list[Block]:
        """Its neighbours; `whole` rows must stay what they are."""
        BM, BN, warps = self
        found = [Block(BM, BN, n) for n in (warps // 2, warps * 2) if n <= 32]
        found += [Block(n, BN, warps) for n in (BM // 2, BM * 2) if 0 < n <= 16]
        if not whole:
            found += [Block(max(1, BM * BN // n), n, warps) for n in (BN // 2, BN * 2) if 32 <= n <= 1024]
        return found
