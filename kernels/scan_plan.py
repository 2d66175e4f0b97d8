"""Which kernel runs a scan, in what tiles. Nothing here has been tuned on a GPU: the limits are those of registers."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Up to these the weights of one direction stay in the registers of one program.
RESIDENT = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
# Up to this one program streams all of W_hh in each step; beyond, the blocks of units go to programs of their own.
STREAMED = 256


class Plan(NamedTuple):
    """Tile sizes: batch entries, units, and the depth of a partial product."""

    kind: str  # "resident", "streamed" or "step"
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; None: what the assembler likes


def plan(cell: str, H: int, R: int, B: int, D: int, dtype: torch.dtype) -> Plan:
    half = dtype != torch.float32
    if R == H and RESIDENT[dtype] >= H:
        width = max(16, 1 << (H - 1).bit_length())
        if width <= 32:
            return Plan("resident", 16, width, width, 4, 1)
        # Left to itself the assembler gives a thread half as many, spills, and has room for a second program in vain.
        return Plan("resident", 16, width, width, 8, 1, 240)
    kind = "streamed" if max(H, R) <= STREAMED else "step"
    # Of float32, whose products go without tensor cores, a thread holds more.
    return Plan(kind, 16, 32, 32, 4 if half or kind == "step" else 8, 3 if half else 2)
