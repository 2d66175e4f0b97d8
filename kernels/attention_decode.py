"""Merges the parts of keys that `attention_forward` with SPLIT has left, in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_mask import SINKS, finish, weight


@triton.jit
def attention_merge_kernel(
    part_out, part_top, part_total, out, lse, sinks, sob, soh, son, rows, Hq, L, Ev, keep_scale, parts,
    FEATURES: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program: one row. part_out [parts, B, Hq, L, Ev], part_top and part_total [parts, B, Hq, L], all float32."""
    row = tl.program_id(0).to(tl.int64)
    i, h, b = row % L, row // L % Hq, row // L // Hq
    e = tl.arange(0, BV)
    acc = tl.zeros((BV,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    top = tl.full((1,), float("-inf"), tl.float32)
    one = tl.arange(0, 1)
    for part in range(parts):
        at = row + tl.cast(part, tl.int64) * rows
        its_top = tl.load(part_top + at + one)
        now = tl.maximum(top, its_top)
        base = tl.where(now == float("-inf"), 0.0, now)
        mine, its = weight(top - base, FEATURES), weight(its_top - base, FEATURES)
        total = total * mine + tl.load(part_total + at + one) * its
        acc = acc * mine + tl.load(part_out + at * Ev + e, mask=e < Ev, other=0.0) * its
        top = now
    sink = tl.load(sinks + h + one) if SINKS & FEATURES else total
    factor, row_lse = finish(top, total, sink, keep_scale, FEATURES)
    tl.store(lse + row + one, row_lse)
    address = out + b * sob + h * soh + i * son + e
    tl.store(address, (acc * factor).to(out.dtype.element_ty), mask=e < Ev)
