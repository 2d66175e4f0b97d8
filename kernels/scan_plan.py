"""Which kernel runs a scan, in what tiles. Nothing here has been tuned on a GPU: the limits are those of registers.

A tile has 16 rows of the batch as long as each tile finds a multiprocessor of its own, since then more rows would only
lengthen the step. Beyond that it has 64, what `wgmma` multiplies at a time, and reads the weights a quarter as often.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Up to these the weights of one direction stay in the registers of one program.
RESIDENT = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
# Up to this one program streams all of W_hh in each step; beyond, the blocks of units go to programs of their own.
STREAMED = 256
# How many programs run side by side, about the multiprocessors of an A100 or H100. Fixed, so that the same call gives
# the same bits on GPUs of one generation.
PROGRAMS = 128
FEW, MANY = 16, 64  # rows of a tile
ALIGNED = 16  # what sizes are a multiple of where tiles have 64 rows: else addresses fill the registers
RESIDENT_MANY = 32  # units up to which the weights leave room for 64 rows


class Plan(NamedTuple):
    """Tile sizes: batch entries, units, and the depth of a partial product."""

    kind: str  # "resident", "streamed" or "step"
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; None: what the assembler likes


def plan(cell: str, H: int, R: int, B: int, D: int, dtype: torch.dtype, capability: tuple[int, int] = (9, 0)) -> Plan:
    """The plan that ships, for both passes."""
    kind = "step"
    if R == H and RESIDENT[dtype] >= H:
        kind = "resident"
    elif max(H, R) <= STREAMED:
        kind = "streamed"
    blocks = -(-max(H, R) // 32) if kind == "step" else 1
    if takes_many(H, R, B, dtype) and -(-B // FEW) * D * blocks > PROGRAMS:
        many = _many("streamed" if kind == "resident" and H > RESIDENT_MANY else kind, H)
        # Products of 64 rows by mma.sync keep their operands in registers, of which a whole scan has none left.
        if many.kind == "step" or capability[0] in (9, 10):
            return many
    return _few(kind, H, R, dtype)


def takes_many(H: int, R: int, B: int, dtype: torch.dtype) -> bool:
    """Whether a tile may have 64 rows. float32 has no tensor cores to fill."""
    return dtype != torch.float32 and B >= MANY and _aligned(H, R)


def _aligned(H: int, R: int) -> bool:
    return H % ALIGNED == 0 and R % ALIGNED == 0


def _few(kind: str, H: int, R: int, dtype: torch.dtype) -> Plan:
    half, aligned = dtype != torch.float32, _aligned(H, R)
    # Left to itself the assembler gives a thread half as many, spills, and has room for a second program in vain.
    registers = 255 if aligned else None
    if kind == "resident":
        width = _width(H)
        if width <= 32:
            return Plan("resident", FEW, width, width, 4, 1, registers)
        return Plan("resident", FEW, width, width, 8, 1, 240)
    if kind == "step":
        return Plan("step", FEW, 32, 32, 4, 3 if half else 2)
    # Of float32, whose products go without tensor cores, a thread holds more, and where loads are wide has no registers
    # for a tile in flight.
    return Plan("streamed", FEW, 32, 32, 4 if half else 8, 3 if half else 1 if aligned else 2, registers)


def _many(kind: str, H: int) -> Plan:
    if kind == "resident":
        return Plan("resident", MANY, _width(H), _width(H), 8, 1)
    # What a program that walks through time keeps from step to step leaves less for tiles in flight.
    return Plan(kind, MANY, 32, 64 if kind == "step" else 32, 8, 3)


def _width(H: int) -> int:
    return max(16, 1 << (H - 1).bit_length())


def others(shipped: Plan, H: int, R: int, many: bool, dtype: torch.dtype) -> list[Plan]:
    """What else could run the scan: the other kernels, the other number of rows, the neighbours of what ships."""
    kinds = ["step"]
    if max(H, R) <= 2 * STREAMED:
        kinds.append("streamed")
    if R == H and RESIDENT[dtype] >= H:
        kinds.append("resident")
    found = [_few(kind, H, R, dtype) for kind in kinds]
    if many:
        found += [_many(kind, H) for kind in kinds if kind != "resident" or H <= RESIDENT_MANY]
    if shipped.kind != "resident":
        found += [shipped._replace(BN=n) for n in (16, 64) if n <= max(H, R)]
        found += [shipped._replace(BK=k) for k in (shipped.BK // 2, shipped.BK * 2) if k >= 16]
        found += [shipped._replace(stages=n) for n in (shipped.stages - 1, shipped.stages + 1) if n > 0]
    found.append(shipped._replace(warps=12 - shipped.warps))
    return [one for one in dict.fromkeys(found) if one != shipped]
