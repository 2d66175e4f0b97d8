"""Tiles of the attention kernels: which are shipped, which one a call gets, and how others are tried on request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from . import attention_mask as bits
from .runtime import INTERPRETING


class Tile(NamedTuple):
    """BM rows (queries) and BN keys at a time, by so many warps, with so many tiles of the loop in flight."""

    BM: int
    BN: int
    warps: int
    stages: int


# Small, so that short tests have tiles of every kind; 64 keys, so that dropout takes its fast way.
INTERPRETED = {
    "forward": Tile(32, 64, 4, 1), "dq": Tile(32, 64, 4, 1), "dkv": Tile(64, 64, 4, 1), "dbias": Tile(32, 64, 4, 1),
}  # fmt: skip
# Rows of a pair up to which a smaller tile is filled better.
FEW_ROWS = 16
# A logit that is more than a product, a probability more than its power of two, keys that are picked: these need
# registers of their own.
HEAVY = bits.ALTERED.value | bits.DENSE.value | bits.DROPOUT.value | bits.GLOBAL.value
_HALF = {
    # (capability, kernel, width): tiles of what is only masked by structure, and of what is not.
    (9, "forward", 64): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
    (9, "forward", 128): (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
    (9, "forward", 256): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    (9, "dq", 64): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    (9, "dq", 128): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    (9, "dq", 256): (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (9, "dkv", 64): (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)),
    (9, "dkv", 128): (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
    (9, "dkv", 256): (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
    (8, "forward", 64): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
    (8, "forward", 128): (Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
    (8, "forward", 256): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (8, "dq", 64): (Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)),
    (8, "dq", 128): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    (8, "dq", 256): (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (8, "dkv", 64): (Tile(32, 64, 4, 2), Tile(16, 64, 4, 2)),
    (8, "dkv", 128): (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (8, "dkv", 256): (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
}
# Tiles that come through descriptors need no registers for addresses, and leave room for one more in flight.
_TILED = {128: Tile(128, 128, 8, 3)}
# Descriptors end where the tensor does, not where a sequence does; keys that are picked, and tiles that a table may
# hide, are not in their order.
_NOT_TILED = bits.LENGTHS.value | bits.PACKED.value | bits.GLOBAL.value | bits.SPLIT.value | bits.DENSE.value
# float32 without TF32 is multiplied outside the tensor cores, with operands in registers.
_SINGLE = {
    ("forward", 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("forward", 128): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("forward", 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("dq", 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("dq", 128): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("dq", 256): (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ("dkv", 64): (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
    ("dkv", 128): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("dkv", 256): (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
}
# dbias keeps its sum of logits' gradients beside all else.
_BIAS = {
    (9, 64): Tile(64, 64, 8, 1), (9, 128): Tile(64, 64, 8, 1), (9, 256): Tile(16, 64, 8, 1),
    (8, 64): Tile(32, 64, 8, 1), (8, 128): Tile(32, 64, 8, 1), (8, 256): Tile(16, 64, 8, 1),
}  # fmt: skip


def tile(kernel: str, width: int, dtype: torch.dtype, capability: tuple[int, int], features: int, rows: int) -> Tile:
    """The tile of a kernel ("forward", "dq", "dkv", "far", "dbias") for heads of this width. `rows` are a pair's."""
    heavy = bool(features & HEAVY) or kernel == "far"
    kernel = "dkv" if kernel == "far" else kernel
    if INTERPRETING:
        return INTERPRETED[kernel]
    width = max(width, 64)
    generation = 9 if capability[0] in (9, 10) else 8
    if dtype == torch.float32:
        kernel = "dq" if kernel == "dbias" else kernel
        chosen = _SINGLE[kernel, width][heavy]
    elif kernel == "dbias":
        chosen = _BIAS[generation, width]
    else:
        chosen = _HALF[generation, kernel, width][heavy]
        if features & bits.TILED.value and not heavy:
            chosen = _TILED.get(width, chosen)
    if kernel == "forward" and rows <= FEW_ROWS:  # decoding: bound by reading keys
        return Tile(16, min(64, chosen.BN), 4, chosen.stages)
    return chosen


def tiled(dtype: torch.dtype, capability: tuple[int, int], features: int, rows: int) -> bool:
    """Whether the forward pass reads keys and values through descriptors, if their layout lets it."""
    return capability[0] in (9, 10) and dtype != torch.float32 and not features & _NOT_TILED and rows > FEW_ROWS


def width_of(size: int) -> int:
    """A tile's width for heads of this size: a power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def sums(width: int) -> tuple[int, ...]:
    """Which of dk and dv a program sums, for each time that its kernel is launched."""
    dk, dv = bits.WITH_DK.value, bits.WITH_DV.value
    return (dk, dv) if width > 128 else (dk | dv,)


# Tiles that took the least time, by what settles it.
_tuned: dict[Hashable, Tile] = {}


def tuned(
    key: Hashable, shipped: Tile, launch: Callable[[Tile], object], time: Callable[[Callable[[], object]], float]
) -> Tile:
    """The fastest of the shipped tile and its neighbours, measured at the first call with this key."""
    if key not in _tuned:
        taken: dict[Tile, float] = {}
        for one in neighbours(shipped):
            try:
                taken[one] = time(functools.partial(launch, one))
            except OutOfResources:
                if one == shipped:
                    raise
        _tuned[key] = min(taken, key=taken.__getitem__)
    return _tuned[key]


def neighbours(shipped: Tile) -> list[Tile]:
    """A tile, and those that differ from it in one thing."""
    BM, BN, warps, stages = shipped
    others = [Tile(BM, BN, warps, n) for n in (stages - 1, stages + 1) if n > 0]
    others += [Tile(BM, n, warps, stages) for n in (BN // 2, BN * 2) if 32 <= n <= 128]
    others += [Tile(n, BN, warps, stages) for n in (BM // 2, BM * 2) if 16 <= n <= 128]
    return [shipped, *others, Tile(BM, BN, 12 - warps, stages)] if warps in (4, 8) else [shipped, *others]
