"""Residual connection, dropout and layer normalisation (Ba et al. 2016, arXiv:1607.06450), forward and backward.

A program holds whole rows. Backward forms the sum and its moments again, so that forward keeps nothing but its inputs;
its programs each sum their share of the weight gradients, and the caller adds those up: no atomics, one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedseq.kernels import philox


@triton.jit
def load_rows(base, at, inside):
    return tl.load(base + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def keep_mask(seed, limit, row, BN: tl.constexpr):
    """[BM, BN] which elements of the rows dropout keeps."""
    return philox.kept_blocks(tl.load(seed), limit, 0, row, 0, row >> 32, BN // 64)


@triton.jit
def _sum(x, residual, at, inside, keep, scale):
    s = load_rows(x, at, inside)
    if keep is not None:
        s = tl.where(keep, s * scale, 0.0)
    if residual is not None:
        s += load_rows(residual, at, inside)
    return s


@triton.jit
def _normalize(s, inside, d, eps):
    """(s - mean) rstd, and rstd [BM, 1]; 0 beyond the row."""
    centred = tl.where(inside, s - tl.sum(s, 1, keep_dims=True) / d, 0.0)
    # What rounding left of a mean far from 0.
    centred = tl.where(inside, centred - tl.sum(centred, 1, keep_dims=True) / d, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1, keep_dims=True) / d + eps)
    return centred * rstd, rstd


@triton.jit
def forward(
    x, residual,  # [rows, d]; residual None if there is none
    weight, bias,  # [d] or None
    seed,  # [1] int64, None without dropout
    out, total,  # [rows, d]; total, the sum that was normalised, or None
    rows, d, eps, limit, scale,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BN)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    at = row[:, None] * d + column[None, :]
    keep = None
    if seed is not None:
        keep = keep_mask(seed, limit, row, BN)
    s = _sum(x, residual, at, inside, keep, scale)
    n, _ = _normalize(s, inside, d, eps)
    if weight is not None:
        n = n * load_rows(weight, column, column < d)[None, :]
    if bias is not None:
        n += load_rows(bias, column, column < d)[None, :]
    tl.store(out + at, n.to(out.dtype.element_ty), mask=inside)
    if total is not None:
        tl.store(total + at, s.to(total.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x, residual, weight, seed,  # as above
    dout, dtotal,  # [rows, d] or None: upstream
    dx, dresidual,  # [rows, d] or None; without dropout the two are the same and dresidual is None
    dweight, dbias,  # [programs, d] float32 or None: the shares
    rows, d, eps, limit, scale, tiles,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each program takes `tiles` tiles of BM rows, one after the other."""
    column = tl.arange(0, BN)
    w_sum = tl.zeros((BN,), tl.float32)
    b_sum = tl.zeros((BN,), tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * BM + tl.arange(0, BM)
        inside = (row < rows)[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        keep = None
        if seed is not None:
            keep = keep_mask(seed, limit, row, BN)
        ds = tl.zeros((BM, BN), tl.float32)
        if dout is not None:
            n, rstd = _normalize(_sum(x, residual, at, inside, keep, scale), inside, d, eps)
            dy = load_rows(dout, at, inside)
            g = dy
            if weight is not None:
                g = g * load_rows(weight, column, column < d)[None, :]
            mean_g = tl.sum(g, 1, keep_dims=True) / d
            mean_gn = tl.sum(g * n, 1, keep_dims=True) / d
            ds = rstd * (g - n * mean_gn - mean_g)
            if dweight is not None:
                w_sum += tl.sum(dy * n, 0)
            if dbias is not None:
                b_sum += tl.sum(dy, 0)
        if dtotal is not None:
            ds += load_rows(dtotal, at, inside)
        if dresidual is not None:
            tl.store(dresidual + at, ds.to(dresidual.dtype.element_ty), mask=inside)
        if dx is not None:
            if keep is not None:
                ds = tl.where(keep, ds * scale, 0.0)
            tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=inside)
    share = tl.program_id(0).to(tl.int64) * d + column
    if dweight is not None:
        tl.store(dweight + share, w_sum, mask=column < d)
    if dbias is not None:
        tl.store(dbias + share, b_sum, mask=column < d)
