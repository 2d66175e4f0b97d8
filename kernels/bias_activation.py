"""Bias, activation, dropout and residual connection in one pass over memory, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedseq.kernels import activation, philox
from fusedseq.kernels.layer_norm import load_rows


@triton.jit
def _input(x, bias, at, column, d, inside):
    a = load_rows(x, at, inside)
    if bias is not None:
        a += load_rows(bias, column, column < d)[None, :]
    return a


@triton.jit
def _dropped(v, seed, limit, scale, row, block, BN: tl.constexpr):
    if seed is not None:
        keep = philox.kept_blocks(tl.load(seed), limit, block * (BN // 64), row, 0, row >> 32, BN // 64)
        v = tl.where(keep, v * scale, 0.0)
    return v


@triton.jit
def forward(
    x, bias, residual,  # [rows, d]; [d] or None; [rows, d] or None
    seed,  # [1] int64, None without dropout
    out,  # [rows, d], may be x
    rows, d, limit, scale,
    NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    at = row[:, None] * d + column[None, :]
    v = activation.forward(_input(x, bias, at, column, d, inside), NAME)
    v = _dropped(v, seed, limit, scale, row, tl.program_id(1), BN)
    if residual is not None:
        v += load_rows(residual, at, inside)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x, bias, seed, dout,  # as above; dout [rows, d]
    dx,  # [rows, d] or None
    dbias,  # [programs, d] float32 or None: the shares, to be added up
    rows, d, limit, scale, tiles,
    NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each program takes one block of columns and `tiles` tiles of BM rows, one after the other."""
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * BM + tl.arange(0, BM)
        inside = (row < rows)[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        g = _dropped(load_rows(dout, at, inside), seed, limit, scale, row, tl.program_id(1), BN)
        g = tl.where(inside, g * activation.backward(_input(x, bias, at, column, d, inside), NAME), 0.0)
        total += tl.sum(g, 0)
        if dx is not None:
            tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + tl.program_id(0).to(tl.int64) * d + column, total, mask=column < d)
