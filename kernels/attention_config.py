"""Tiles of the attention kernels: which are shipped, which one a call gets, and which others it may try on request."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import attention_mask as bits
from .runtime import INTERPRETING


class Tile(NamedTuple):
    """BM rows (queries) and BN keys at a time, by so many warps, with so many tiles of the loop in flight."""

    BM: int
    BN: int
    warps: int
    stages: int
    dealt: bool = False  # whether a program for each multiprocessor is dealt the tiles, forward only

    @property
    def edges(self) -> int:
        """Tiles in flight where rows see only some of the keys, for dkv."""
        return min(self.stages, 2)


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
    (9, "dq", 64): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    (9, "dq", 128): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    (9, "dq", 256): (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (9, "dkv", 64): (Tile(64, 64, 4, 3), Tile(32, 128, 8, 2)),
    (9, "dkv", 128): (Tile(64, 128, 8, 3), Tile(32, 64, 8, 2)),
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
# GPUs on which a block has 99 KB of shared memory, and what has more of it everywhere else.
_SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))
_SMALLER = {("dq", 256): Tile(32, 64, 8, 1), ("dkv", 256): Tile(16, 64, 8, 2)}
# Where the bounds of a row's sequence do not fit beside all else.
_PACKED = {(8, "dq", 128): Tile(64, 64, 8, 2)}
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
        if kernel == "forward" and features & bits.TILED.value and not heavy:
            chosen = _TILED.get(width, chosen)
        if features & bits.PACKED.value and not heavy:
            chosen = _PACKED.get((generation, kernel, width), chosen)
        if capability in _SMALL:
            chosen = _SMALLER.get((kernel, width), chosen)
    if kernel == "forward" and rows <= FEW_ROWS:  # decoding: bound by reading keys
        return Tile(16, min(64, chosen.BN), 4, chosen.stages)
    return chosen


def tiled(kernel: str, dtype: torch.dtype, capability: tuple[int, int], features: int, rows: int) -> bool:
    """Whether "forward" or "dq" reads keys and values through descriptors, if their layout lets it."""
    # dq of a heavy call has no registers to win by it, and spills.
    apart = _NOT_TILED | (HEAVY if kernel == "dq" else 0)
    return capability[0] in (9, 10) and dtype != torch.float32 and not features & apart and rows > FEW_ROWS


def width_of(size: int) -> int:
    """A tile's width for heads of this size: a power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def sums(width: int) -> tuple[int, ...]:
    """Which of dk and dv a program sums, for each time that its kernel is launched."""
    dk, dv = bits.WITH_DK.value, bits.WITH_DV.value
    return (dk, dv) if width > 128 else (dk | dv,)


def neighbours(shipped: Tile, kernel: str, features: int) -> list[Tile]:
    """Tiles that differ from the shipped one in one thing."""
    BM, BN, warps, stages, _ = shipped
    others = [shipped._replace(stages=n) for n in (stages - 1, stages + 1) if n > 0]
    others += [shipped._replace(BN=n) for n in (BN // 2, BN * 2) if 32 <= n <= 128]
    others += [shipped._replace(BM=n) for n in (BM // 2, BM * 2) if 16 <= n <= 128]
    others += [shipped._replace(warps=12 - warps)] if warps in (4, 8) else []
    # Tiles of unequal length. With pointers there are no registers for it.
    uneven = features & bits.CAUSAL.value and features & bits.TILED.value and not features & HEAVY
    return others + ([shipped._replace(dealt=True)] if kernel == "forward" and uneven else [])
