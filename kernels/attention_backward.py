"""Attention's backward pass: queries' gradients tile of rows by tile of rows, keys' and values' tile of keys by tile.

Every sum has one owner and one order, so that there are no atomics and two runs are bitwise equal. A tile of keys goes
over the rows of its pair, which are the queries of all heads of its group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_gradients import AT_ALL, AT_SOME, HELD, gradients, of_rows, row_places
from .attention_mask import (
    ALIBI,
    CAUSAL,
    DENSE,
    DROPOUT,
    EDGE,
    EXACT,
    FAR,
    GLOBAL,
    INNER,
    LEFT,
    LENGTHS,
    PADDED_E,
    PADDED_EV,
    RIGHT,
    SOFTCAP,
    TILED,
    WITH_DK,
    WITH_DV,
    allows,
    bounds,
    far_keys,
    far_range,
    key_range,
    load_rows,
    load_tile,
    row_range,
    rows_from,
    schedule,
    sequence,
)


@triton.jit
def _query_tile(dq, slopes, query, dout, lse, delta, key_at, value_at, strides, sizes, j, j0, row, tables, numbers,
                random, MODE: tl.constexpr, FEATURES: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
                DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What one tile of keys adds to dq of a tile of rows, unscaled, and to the gradients of their slopes, negated."""
    key_stride, value_stride, pair = strides
    E, Ev, keys = sizes
    k = load_tile(key_at, j, j0, key_stride, j < keys, pair, E, BE, MODE, FEATURES, PADDED_E & FEATURES)
    v = load_tile(value_at, j, j0, value_stride, j < keys, pair, Ev, BV, MODE, FEATURES, PADDED_EV & FEATURES).to(DOT)
    _, ds, tangent, distance = gradients(query, dout, k.to(DOT), v, lse, delta, 0, j, j0, row, tables, numbers, random,
                                         MODE, True, HELD, FEATURES, DOT, PRECISION)  # fmt: skip
    if ALIBI & FEATURES:
        slopes += tl.sum(ds * distance, 1)
    if SOFTCAP & FEATURES:
        ds *= tangent
    return tl.dot(ds.to(k.dtype).to(DOT), k.to(DOT), dq, input_precision=PRECISION), slopes


@triton.jit
def _query_step(dq, slopes, query, dout, lse, delta, key_at, value_at, strides, sizes, j, j0, row, tables, numbers,
                random, MODE: tl.constexpr, FEATURES: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
                DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The same, unless the table hides the tile from all rows."""
    if DENSE & FEATURES:
        if allows(tables[2][:, None], j[None, :], tables[3], sizes[2], MODE):
            dq, slopes = _query_tile(dq, slopes, query, dout, lse, delta, key_at, value_at, strides, sizes, j, j0, row,
                                     tables, numbers, random, MODE, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    else:
        dq, slopes = _query_tile(dq, slopes, query, dout, lse, delta, key_at, value_at, strides, sizes, j, j0, row,
                                 tables, numbers, random, MODE, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    return dq, slopes


@triton.jit
def attention_dq_kernel(
    q, k, v, dout, lse, delta, dq, row_slopes, bias, dense, slopes, lengths, cu_q, cu_k, positions, ranks,
    tile_sequence, tile_first, seed_at, key_descriptor, value_descriptor,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son, sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
    positions_stride, ranks_stride, Hq, G, L, S, E, Ev, left, right, scale, raw_scale, softcap, limit, keep_scale,
    tiles, pairs, section,
    FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: dq of one tile of BM rows, and with ALIBI row_slopes [B, Hq, L], what each row adds to -dalibi.

    Strides g are those of dout, o those of dq; lse and delta come from `attention_delta_kernel`.
    """
    n, hkv, tile = schedule(
        tl.program_id(0), tiles, pairs, section, tile_sequence, tile_first, Hq // G, FEATURES, CAUSAL & FEATURES
    )  # fmt: skip
    b, q0, queries, k0, keys, shift = sequence(n, L, S, lengths, cu_q, cu_k, FEATURES)
    first_row = tile * BM
    real, position, h = rows_from(first_row, queries, hkv, G, BM, FEATURES)
    i = q0 + position
    d, at, slope, bias_rows, dense_rows = row_places(
        b, h, i, position, shift, Hq, L, slopes, bias, dense, (sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds), k0, FEATURES
    )  # fmt: skip
    begin, end, reach = bounds(d, keys, left, right, FEATURES)
    d_low = first_row // G + shift
    d_high = tl.minimum(first_row + BM - 1, queries * G - 1) // G + shift
    upper = tl.where(first_row < queries * G, keys, 0)
    first, inner_first, inner_last, last = key_range(
        d_low, d_high, keys, left, right, tl.full((), 0, tl.int32), upper, BN, FEATURES
    )  # fmt: skip

    b64, h64, i64, k64, head = b.to(tl.int64), h.to(tl.int64), i.to(tl.int64), k0.to(tl.int64), hkv.to(tl.int64)
    if TILED & FEATURES:
        key_at, value_at = key_descriptor, value_descriptor
    else:
        key_at = k + b64 * skb + head * skh + k64 * skn
        value_at = v + b64 * svb + head * svh + k64 * svn
    query = load_rows(q + b64 * sqb, h64 * sqh + i64 * sqn, 1, real, E, BE, True, PADDED_E & FEATURES).to(DOT)
    upstream = load_rows(dout + b64 * sgb, h64 * sgh + i64 * sgn, 1, real, Ev, BV, True, PADDED_EV & FEATURES).to(DOT)
    row_lse = tl.load(lse + at, mask=real, other=float("inf"))
    row_delta = tl.load(delta + at, mask=real, other=0.0)
    row = (begin, end, reach, d, i, h, b, k0, keys, slope)
    tables = (bias_rows, sbs, dense_rows, sds)
    random = (tl.load(seed_at) if DROPOUT & FEATURES else 0, limit)
    strides, sizes, numbers = (skn, svn, (b, hkv)), (E, Ev, keys), (scale, softcap, keep_scale)

    acc = tl.zeros((BM, BE), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    lanes = tl.arange(0, BN)
    if LEFT & FEATURES:
        for j0 in range(first, inner_first, BN):
            acc, sums = _query_step(acc, sums, query, upstream, row_lse, row_delta, key_at, value_at, strides, sizes,
                                    j0 + lanes, j0, row, tables, numbers, random, EDGE, FEATURES, BE, BV, DOT,
                                    PRECISION)  # fmt: skip
    for j0 in range(inner_first, inner_last, BN):
        acc, sums = _query_step(acc, sums, query, upstream, row_lse, row_delta, key_at, value_at, strides, sizes,
                                j0 + lanes, j0, row, tables, numbers, random, INNER, FEATURES, BE, BV, DOT,
                                PRECISION)  # fmt: skip
    for j0 in range(inner_last, last, BN):
        acc, sums = _query_step(acc, sums, query, upstream, row_lse, row_delta, key_at, value_at, strides, sizes,
                                j0 + lanes, j0, row, tables, numbers, random, EDGE, FEATURES, BE, BV, DOT,
                                PRECISION)  # fmt: skip
    if GLOBAL & FEATURES:
        seen_to = tl.minimum(tl.maximum(d_high + 1, 0), keys) if CAUSAL & FEATURES else keys
        far_first, far_last = far_range(ranks + b64 * ranks_stride, k0, seen_to)
        for n_far in range(far_first, far_last, BN):
            j = far_keys(positions + b64 * positions_stride, n_far, far_last, k0, BN)
            acc, sums = _query_step(acc, sums, query, upstream, row_lse, row_delta, key_at, value_at, strides, sizes,
                                    j, n_far, row, tables, numbers, random, FAR, FEATURES, BE, BV, DOT,
                                    PRECISION)  # fmt: skip
    e = tl.arange(0, BE)
    address = dq + (b64 * sob + h64 * soh + i64 * son)[:, None] + e[None, :]
    tl.store(address, (acc * raw_scale).to(dq.dtype.element_ty), mask=real[:, None] & (e < E)[None, :])
    if ALIBI & FEATURES:
        tl.store(row_slopes + at, sums, mask=real)


@triton.jit
def _key_tile(dk, dv, k, v, sources, strides, sizes, j, j0, real, at, row, tables, numbers, random, MODE: tl.constexpr,
              ALL_ROWS: tl.constexpr, FEATURES: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
              DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What a tile of rows adds to dk, unscaled, and dv of a tile of keys."""
    q, dout, lse, delta, _, _, _ = sources
    sqb, sqh, sqn, sgb, sgh, sgn = strides
    E, Ev = sizes[0], sizes[1]
    b64, h64, i64 = row[6].to(tl.int64), row[5].to(tl.int64), row[4].to(tl.int64)
    query = load_rows(q + b64 * sqb, h64 * sqh + i64 * sqn, 1, real, E, BE, not ALL_ROWS, PADDED_E & FEATURES).to(DOT)
    upstream = load_rows(dout + b64 * sgb, h64 * sgh + i64 * sgn, 1, real, Ev, BV, not ALL_ROWS, PADDED_EV & FEATURES)
    LATER: tl.constexpr = AT_ALL if ALL_ROWS else AT_SOME
    HOW: tl.constexpr = HELD if EXACT & FEATURES else LATER
    row_lse, row_delta = lse + at, delta + at
    if HOW == HELD:  # products outside the tensor cores leave no registers for addresses meanwhile
        row_lse, row_delta = of_rows(row_lse, real, float("inf"), LATER), of_rows(row_delta, real, 0.0, LATER)
    made, ds, tangent, _ = gradients(query, upstream.to(DOT), k, v, row_lse, row_delta, real, j, j0, row, tables,
                                     numbers, random, MODE, False, HOW, FEATURES, DOT, PRECISION)  # fmt: skip
    if WITH_DV & FEATURES:
        dv = tl.dot(made.to(upstream.dtype).to(DOT), upstream.to(DOT), dv, input_precision=PRECISION)
    if WITH_DK & FEATURES:
        if SOFTCAP & FEATURES:
            ds *= tangent
        dk = tl.dot(ds.to(upstream.dtype).to(DOT), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_step(dk, dv, k, v, row0, place, sources, strides, sizes, j, j0, options, table_strides, numbers, random,
              MODE: tl.constexpr, ALL_ROWS: tl.constexpr, FEATURES: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
              BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The same for the rows from row0 on, unless the table hides the keys from all of them."""
    b, hkv, q0, queries, k0, keys, shift = place
    _, _, _, _, slopes, bias, dense = sources
    _, _, Hq, G, L = sizes
    left, right = options
    real, position, h = rows_from(row0, queries, hkv, G, BM, FEATURES)
    i = q0 + position
    d, at, slope, bias_rows, dense_rows = row_places(
        b, h, i, position, shift, Hq, L, slopes, bias, dense, table_strides, k0, FEATURES
    )  # fmt: skip
    begin, end, reach = bounds(d, keys, left, right, FEATURES)
    tables = (bias_rows, table_strides[3], dense_rows, table_strides[7])
    row = (begin, end, reach, d, i, h, b, k0, keys, slope)
    if DENSE & FEATURES:
        if allows(dense_rows[None, :], j[:, None], table_strides[7], keys, MODE):
            dk, dv = _key_tile(dk, dv, k, v, sources, strides, sizes, j, j0, real, at, row, tables, numbers, random,
                               MODE, ALL_ROWS, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    else:
        dk, dv = _key_tile(dk, dv, k, v, sources, strides, sizes, j, j0, real, at, row, tables, numbers, random,
                           MODE, ALL_ROWS, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    return dk, dv


@triton.jit
def attention_dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, bias, dense, slopes, lengths, cu_q, cu_k, positions, ranks,
    tile_sequence, tile_first, seed_at,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdkb, sdkh, sdkn, sdvb, sdvh, sdvn,
    sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
    positions_stride, ranks_stride, Hq, G, L, S, E, Ev, left, right, scale, raw_scale, softcap, limit, keep_scale,
    tiles, pairs, section,
    FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of one tile of BN keys, from the rows to whose window they belong.

    EDGES tiles are in flight where some rows see only some of the keys: those loops are short, and more of them than
    two leave too few registers for the loop that is long.
    """
    n, hkv, tile = schedule(
        tl.program_id(0), tiles, pairs, section, tile_sequence, tile_first, Hq // G, FEATURES, False
    )  # fmt: skip
    b, q0, queries, k0, keys, shift = sequence(n, L, S, lengths, cu_q, cu_k, FEATURES)
    j0 = tile * BN
    j = j0 + tl.arange(0, BN)
    first, inner_first, inner_last, last = row_range(
        j0, tl.minimum(j0 + BN, keys) - 1, queries, shift, left, right, G, BM, FEATURES
    )  # fmt: skip
    last = tl.where(j0 < keys, last, 0)
    # Rows of an inner tile exist, and they see all of these keys.
    whole = j0 + BN <= keys
    inner_first = tl.where(whole, inner_first, first)
    inner_last = tl.where(whole, inner_last, first)

    b64, head, k64 = b.to(tl.int64), hkv.to(tl.int64), k0.to(tl.int64)
    here = j < keys
    key = load_rows(k + b64 * skb + head * skh + k64 * skn, j, skn, here, E, BE, True, PADDED_E & FEATURES).to(DOT)
    value = load_rows(v + b64 * svb + head * svh + k64 * svn, j, svn, here, Ev, BV, True, PADDED_EV & FEATURES).to(DOT)
    place = (b, hkv, q0, queries, k0, keys, shift)
    sources = (q, dout, lse, delta, slopes, bias, dense)
    strides, sizes, options = (sqb, sqh, sqn, sgb, sgh, sgn), (E, Ev, Hq, G, L), (left, right)
    table_strides = (sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds)
    numbers = (scale, softcap, keep_scale)
    random = (tl.load(seed_at) if DROPOUT & FEATURES else 0, limit)
    dkey = tl.zeros((BN, BE), tl.float32)
    dvalue = tl.zeros((BN, BV), tl.float32)
    if RIGHT & FEATURES:
        for row0 in tl.range(first, inner_first, BM, num_stages=EDGES):
            dkey, dvalue = key_step(dkey, dvalue, key, value, row0, place, sources, strides, sizes, j, j0, options,
                                     table_strides, numbers, random, EDGE, False, FEATURES, BM, BE, BV, DOT,
                                     PRECISION)  # fmt: skip
    for row0 in range(inner_first, inner_last, BM):
        dkey, dvalue = key_step(dkey, dvalue, key, value, row0, place, sources, strides, sizes, j, j0, options,
                                 table_strides, numbers, random, INNER, True, FEATURES, BM, BE, BV, DOT,
                                 PRECISION)  # fmt: skip
    for row0 in tl.range(inner_last, last, BM, num_stages=EDGES):
        dkey, dvalue = key_step(dkey, dvalue, key, value, row0, place, sources, strides, sizes, j, j0, options,
                                 table_strides, numbers, random, EDGE, False, FEATURES, BM, BE, BV, DOT,
                                 PRECISION)  # fmt: skip
    # Keys behind the length of a row have a gradient too, which is 0.
    stored = j < (S if LENGTHS & FEATURES else keys)
    if WITH_DK & FEATURES:
        e = tl.arange(0, BE)
        address = dk + b64 * sdkb + head * sdkh + (k64 + j)[:, None] * sdkn + e[None, :]
        dkey = tl.where(here[:, None], dkey * raw_scale, 0.0)
        tl.store(address, dkey.to(dk.dtype.element_ty), mask=stored[:, None] & (e < E)[None, :])
    if WITH_DV & FEATURES:
        f = tl.arange(0, BV)
        address = dv + b64 * sdvb + head * sdvh + (k64 + j)[:, None] * sdvn + f[None, :]
        dvalue = tl.where(here[:, None], dvalue, 0.0)
        tl.store(address, dvalue.to(dv.dtype.element_ty), mask=stored[:, None] & (f < Ev)[None, :])
