"""Tiles of the attention kernels: which are shipped, and which one a call gets."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """BM rows (queries) and BN keys at a time, by so many warps, with so many tiles of the loop in flight."""

    BM: int
    BN: int
    warps: int
    stages: int


# Small, so that short tests have tiles of every kind; 64 keys, so that dropout takes its fast way.
INTERPRETED = Tile(32, 64, 4, 1)


def tile(kernel: str, width: int, dtype: torch.dtype, capability: tuple[int, int], features: int, rows: int) -> Tile:
    return INTERPRETED


def width_of(size: int) -> int:
    """A tile's width for heads of this size: a power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())
