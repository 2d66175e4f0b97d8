"""The gradient of attention's bias: each tile of the table sums, in order, what it is broadcast over."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_gradients import HELD, gradients, row_places
from .attention_mask import (
    DROPOUT,
    EDGE,
    FAR,
    GLOBAL,
    LEFT,
    NOWHERE,
    PADDED_E,
    PADDED_EV,
    RIGHT,
    bounds,
    load_rows,
    sequence,
)


@triton.jit
def _tile(acc, n, h, row_tile, key_tile, sources, places, strides, table_strides, sizes, options, numbers, random,
          FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
          DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of the logits of a tile of the table [L, S], one head of one sequence, added to `acc`."""
    q, k, v, dout, lse, delta, slopes, bias, dense = sources
    lengths, cu_q, cu_k, global_keys, global_stride, ranks, ranks_stride = places
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn = strides
    E, Ev, Hq, G, L, S = sizes
    left, right = options
    b, q0, queries, k0, keys, shift = sequence(n, L, S, lengths, cu_q, cu_k, FEATURES)
    row0, key0 = row_tile * BM, key_tile * BN
    d_low = tl.maximum(row0 - q0, 0) + shift
    d_high = tl.minimum(row0 + BM - q0, queries) - 1 + shift
    j_low = tl.maximum(key0 - k0, 0)
    j_high = tl.minimum(key0 + BN - k0, keys) - 1
    there = (d_low <= d_high) & (j_low <= j_high)
    near, far = there, there
    if LEFT & FEATURES:
        near = near & (j_high >= d_low - left)
    if RIGHT & FEATURES:
        near = near & (j_low <= d_high + right)
    b64 = b.to(tl.int64)
    if GLOBAL & FEATURES:
        counts = ranks + b64 * ranks_stride + k0
        far = far & (tl.load(counts + tl.where(there, j_high + 1, 0)) > tl.load(counts + tl.where(there, j_low, 0)))
        # Together: they differ only in which keys take part.
        visit = near | far
    else:
        visit = near
    if visit:
        a = row0 + tl.arange(0, BM) - q0
        real = (a >= 0) & (a < queries)
        position = tl.minimum(tl.maximum(a, 0), queries - 1)
        i = q0 + position
        heads = h + tl.zeros((BM,), tl.int32)
        d, at, slope, bias_rows, dense_rows = row_places(
            b, heads, i, position, shift, Hq, L, slopes, bias, dense, table_strides, k0, FEATURES
        )  # fmt: skip
        begin, end, reach = bounds(d, keys, left, right, FEATURES)
        head_index = tl.full((), 0, tl.int32) + h
        h64, head, k64 = head_index.to(tl.int64), (head_index // G).to(tl.int64), k0.to(tl.int64)
        query = load_rows(q + b64 * sqb + h64 * sqh, i, sqn, real, E, BE, True, PADDED_E & FEATURES).to(DOT)
        upstream = load_rows(dout + b64 * sgb + h64 * sgh, i, sgn, real, Ev, BV, True, PADDED_EV & FEATURES).to(DOT)
        row_lse = tl.load(lse + at, mask=real, other=float("inf"))
        row_delta = tl.load(delta + at, mask=real, other=0.0)
        c = key0 - k0 + tl.arange(0, BN)
        here = (c >= 0) & (c < keys)
        j = tl.where(here, c, NOWHERE)
        key_at, value_at = k + b64 * skb + head * skh + k64 * skn, v + b64 * svb + head * svh + k64 * svn
        key = load_rows(key_at, j, skn, here, E, BE, True, PADDED_E & FEATURES).to(DOT)
        value = load_rows(value_at, j, svn, here, Ev, BV, True, PADDED_EV & FEATURES).to(DOT)
        row = (begin, end, reach, d, i, heads, b, k0, keys, slope)
        tables = (bias_rows, table_strides[3], dense_rows, table_strides[7])
        _, ds, _, _ = gradients(query, upstream, key, value, row_lse, row_delta, 0, j, key0, row, tables, numbers,
                                random, EDGE, True, HELD, FEATURES, DOT, PRECISION)  # fmt: skip
        acc += ds
        if GLOBAL & FEATURES:
            marked = tl.load(global_keys + b64 * global_stride + k64 + c, mask=here, other=0) != 0
            j = tl.where(marked, j, NOWHERE)
            _, ds, _, _ = gradients(query, upstream, key, value, row_lse, row_delta, 0, j, key0, row, tables, numbers,
                                    random, FAR, True, HELD, FEATURES, DOT, PRECISION)  # fmt: skip
            acc += ds
    return acc


@triton.jit
def attention_dbias_kernel(
    q, k, v, dout, lse, delta, dbias, bias, dense, slopes, lengths, cu_q, cu_k, global_keys, ranks, seed_at,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
    global_stride, ranks_stride, sequences, Hq, G, L, S, E, Ev, left, right, scale, softcap, limit, keep_scale,
    row_tiles, key_tiles,
    OVER_BATCH: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_ROWS: tl.constexpr, OVER_KEYS: tl.constexpr,
    FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of dbias [1|B, 1|Hq, 1|L, 1|S], dense float32. OVER_..: what the table is broadcast over."""
    job = tl.program_id(0)
    zero = tl.full((), 0, tl.int32)
    key_first, key_last = zero, zero + key_tiles
    if not OVER_KEYS:
        key_first = job % key_tiles
        key_last = key_first + 1
        job = job // key_tiles
    row_first, row_last = zero, zero + row_tiles
    if not OVER_ROWS:
        row_first = job % row_tiles
        row_last = row_first + 1
        job = job // row_tiles
    head_first, head_last = zero, zero + Hq
    if not OVER_HEADS:
        head_first = job % Hq
        head_last = head_first + 1
        job = job // Hq
    n_first, n_last = zero, zero + sequences
    if not OVER_BATCH:
        n_first = job
        n_last = job + 1
    sources = (q, k, v, dout, lse, delta, slopes, bias, dense)
    places = (lengths, cu_q, cu_k, global_keys, global_stride, ranks, ranks_stride)
    strides = (sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn)
    table_strides = (sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds)
    sizes, options, numbers = (E, Ev, Hq, G, L, S), (left, right), (scale, softcap, keep_scale)
    random = (tl.load(seed_at) if DROPOUT & FEATURES else 0, limit)
    acc = tl.zeros((BM, BN), tl.float32)
    for n in range(n_first, n_last):
        for h in range(head_first, head_last):
            for row_tile in range(row_first, row_last):
                for key_tile in range(key_first, key_last):
                    acc = _tile(acc, n, h, row_tile, key_tile, sources, places, strides, table_strides, sizes,
                                options, numbers, random, FEATURES, BM, BN, BE, BV, DOT, PRECISION)  # fmt: skip
    table = (zero if OVER_BATCH else n_first).to(tl.int64) * (1 if OVER_HEADS else Hq)
    table += zero if OVER_HEADS else head_first
    height, width = 1 if OVER_ROWS else L, 1 if OVER_KEYS else S
    rows, columns = row_first * BM + tl.arange(0, BM), key_first * BN + tl.arange(0, BN)
    to = dbias + table * height * width
    if OVER_ROWS and OVER_KEYS:
        tl.store(to, tl.sum(tl.sum(acc, 1), 0))
    elif OVER_ROWS:
        tl.store(to + columns, tl.sum(acc, 0), mask=columns < S)
    elif OVER_KEYS:
        tl.store(to + rows, tl.sum(acc, 1), mask=rows < L)
    else:
        address = to + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(address, acc, mask=(rows < L)[:, None] & (columns < S)[None, :])
