"""Attention's forward pass: online softmax over the keys that a tile of rows sees (Dao et al. 2022, arXiv:2205.14135).

With SPLIT each program takes a part of the keys and leaves sums that `attention_decode` merges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_mask import (
    ALIBI,
    BIAS,
    CAUSAL,
    DEALT,
    DENSE,
    DROPOUT,
    EDGE,
    FAR,
    FOLDED,
    GLOBAL,
    INNER,
    LEFT,
    PADDED_E,
    PADDED_EV,
    SINKS,
    SPLIT,
    TILED,
    allows,
    bounds,
    dealt,
    far_keys,
    far_range,
    finish,
    kept,
    key_range,
    load_rows,
    load_table,
    load_tile,
    logits,
    rows_from,
    schedule,
    sequence,
    visible,
    weight,
)


@triton.jit
def _absorb_tile(acc, total, top, query, key_at, value_at, strides, sizes, j, j0, row, tables, numbers, random,
            MODE: tl.constexpr, FEATURES: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys joins the sums of all rows."""
    key_stride, value_stride, pair = strides
    E, Ev, keys = sizes
    begin, end, reach, diagonal, i, h, b, k0, slope = row
    bias_rows, bias_stride, dense_rows, dense_stride = tables
    scale, softcap = numbers
    seed, limit = random
    seen = tl.full((query.shape[0], j.shape[0]), 1, tl.int1)
    if MODE != INNER:
        seen = seen & visible(j[None, :], begin[:, None], end[:, None], reach[:, None], MODE, FEATURES)
    if DENSE & FEATURES:
        seen = seen & (load_table(dense_rows[:, None], j[None, :], dense_stride, keys, MODE) != 0)
    k = load_tile(key_at, j, j0, key_stride, j < keys, pair, E, BE, MODE, FEATURES, PADDED_E & FEATURES)
    x = tl.dot(query, tl.trans(k.to(DOT)), input_precision=PRECISION)
    s, _ = logits(x, j[None, :], diagonal[:, None], keys, bias_rows[:, None], bias_stride, slope[:, None],
                  1.0 if FOLDED & FEATURES else scale, softcap, MODE, FEATURES)  # fmt: skip
    if (MODE != INNER) or (DENSE & FEATURES):
        s = tl.where(seen, s, float("-inf"))
    most = tl.max(s, 1)
    if FOLDED & FEATURES:
        most *= scale
    now = tl.maximum(top, most)
    base = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp2(s * scale - base[:, None]) if FOLDED & FEATURES else weight(s - base[:, None], FEATURES)
    shrink = weight(top - base, FEATURES)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT & FEATURES:
        p = tl.where(kept(seed, limit, j, j0, k0, i, h, b, MODE, FEATURES), p, 0.0)
    v = load_tile(value_at, j, j0, value_stride, j < keys, pair, Ev, BV, MODE, FEATURES, PADDED_EV & FEATURES)
    acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, now


@triton.jit
def _absorb(acc, total, top, query, key_at, value_at, strides, sizes, j, j0, row, tables, numbers, random,
            MODE: tl.constexpr, FEATURES: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The same, unless the table hides the tile from all rows."""
    if DENSE & FEATURES:
        if allows(tables[2][:, None], j[None, :], tables[3], sizes[2], MODE):
            acc, total, top = _absorb_tile(acc, total, top, query, key_at, value_at, strides, sizes, j, j0, row,
                                           tables, numbers, random, MODE, FEATURES, BE, BV, DOT,
                                           PRECISION)  # fmt: skip
    else:
        acc, total, top = _absorb_tile(acc, total, top, query, key_at, value_at, strides, sizes, j, j0, row, tables,
                                       numbers, random, MODE, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    return acc, total, top


@triton.jit
def _forward_tile(
    pid, q, k, v, out, lse, part_total, bias, dense, slopes, sinks, lengths, cu_q, cu_k, positions, ranks,
    tile_sequence, tile_first, seed_at, key_descriptor, value_descriptor,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
    positions_stride, ranks_stride, B, Hq, G, L, S, E, Ev, left, right, scale, softcap, limit, keep_scale,
    tiles, pairs, section, part,
    FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM rows against all of its keys, or those of one part of `part` keys."""
    n, hkv, tile = schedule(
        pid, tiles, pairs, section, tile_sequence, tile_first, Hq // G, FEATURES, CAUSAL & FEATURES
    )  # fmt: skip
    b, q0, queries, k0, keys, shift = sequence(n, L, S, lengths, cu_q, cu_k, FEATURES)
    first_row = tile * BM
    real, position, h = rows_from(first_row, queries, hkv, G, BM, FEATURES)
    i = q0 + position
    d = position + shift
    begin, end, reach = bounds(d, keys, left, right, FEATURES)
    d_low = first_row // G + shift
    d_high = tl.minimum(first_row + BM - 1, queries * G - 1) // G + shift
    lower = tl.program_id(1) * part if SPLIT & FEATURES else tl.full((), 0, tl.int32)
    upper = lower + part if SPLIT & FEATURES else keys
    # Behind the last row of a packed sequence there is nothing to do.
    upper = tl.where(first_row < queries * G, upper, 0)
    first, inner_first, inner_last, last = key_range(
        d_low, d_high, keys, left, right, lower, upper, BN, FEATURES
    )  # fmt: skip

    b64, h64, i64, k64 = b.to(tl.int64), h.to(tl.int64), i.to(tl.int64), k0.to(tl.int64)
    if TILED & FEATURES:
        key_at, value_at = key_descriptor, value_descriptor
    else:
        key_at = k + b64 * skb + hkv.to(tl.int64) * skh + k64 * skn
        value_at = v + b64 * svb + hkv.to(tl.int64) * svh + k64 * svn
    query = load_rows(q + b64 * sqb, h64 * sqh + i64 * sqn, 1, real, E, BE, True, PADDED_E & FEATURES).to(DOT)
    zero = tl.zeros((BM,), tl.int64)
    slope = tl.zeros((BM,), tl.float32)
    if ALIBI & FEATURES:
        slope = tl.load(slopes + h)
    tables = (
        bias + b64 * sbb + h64 * sbh + i64 * sbl + k64 * sbs if BIAS & FEATURES else zero, sbs,
        dense + b64 * sdb + h64 * sdh + i64 * sdl + k64 * sds if DENSE & FEATURES else zero, sds,
    )  # fmt: skip
    row = (begin, end, reach, d, i, h, b, k0, slope)
    random = (tl.load(seed_at) if DROPOUT & FEATURES else 0, limit)
    strides, sizes, numbers = (skn, svn, (b, hkv)), (E, Ev, keys), (scale, softcap)

    acc = tl.zeros((BM, BV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    lanes = tl.arange(0, BN)
    if LEFT & FEATURES:
        for j0 in range(first, inner_first, BN):
            acc, total, top = _absorb(acc, total, top, query, key_at, value_at, strides, sizes, j0 + lanes, j0, row,
                                      tables, numbers, random, EDGE, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    for j0 in range(inner_first, inner_last, BN):
        acc, total, top = _absorb(acc, total, top, query, key_at, value_at, strides, sizes, j0 + lanes, j0, row,
                                  tables, numbers, random, INNER, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    for j0 in range(inner_last, last, BN):
        acc, total, top = _absorb(acc, total, top, query, key_at, value_at, strides, sizes, j0 + lanes, j0, row,
                                  tables, numbers, random, EDGE, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip
    if GLOBAL & FEATURES:
        seen_to = tl.minimum(tl.maximum(d_high + 1, 0), keys) if CAUSAL & FEATURES else keys
        far_first, far_last = far_range(ranks + b64 * ranks_stride, k0, seen_to)
        if SPLIT & FEATURES:  # the last part has no near keys, and all far ones
            far_last = tl.where(tl.program_id(1) + 1 == tl.num_programs(1), far_last, far_first)
        for at in range(far_first, far_last, BN):
            j = far_keys(positions + b64 * positions_stride, at, far_last, k0, BN)
            acc, total, top = _absorb(acc, total, top, query, key_at, value_at, strides, sizes, j, at, row,
                                      tables, numbers, random, FAR, FEATURES, BE, BV, DOT, PRECISION)  # fmt: skip

    at = (b64 * Hq + h64) * L + i64
    if SPLIT & FEATURES:
        number = tl.program_id(1).to(tl.int64)
        at += number * B * Hq * L
        tl.store(lse + at, top, mask=real)
        tl.store(part_total + at, total, mask=real)
        out += number * B * sob
    else:
        sink = tl.load(sinks + h) if SINKS & FEATURES else slope
        factor, row_lse = finish(top, total, sink, keep_scale, FEATURES)
        tl.store(lse + at, row_lse, mask=real)
        acc *= factor[:, None]
    e = tl.arange(0, BV)
    address = out + (b64 * sob + h64 * soh + i64 * son)[:, None] + e[None, :]
    tl.store(address, acc.to(out.dtype.element_ty), mask=real[:, None] & (e < Ev)[None, :])


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, part_total, bias, dense, slopes, sinks, lengths, cu_q, cu_k, positions, ranks,
    tile_sequence, tile_first, seed_at, key_descriptor, value_descriptor,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
    positions_stride, ranks_stride, B, Hq, G, L, S, E, Ev, left, right, scale, softcap, limit, keep_scale,
    tiles, pairs, section, part,
    FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: one tile of BM rows, or DEALT: one after the other, the longest first.

    q [B, Hq, L, E], k and v [B, Hkv, S, E | Ev], out [B, Hq, L, Ev], lse [B, Hq, L] float32. SPLIT: out, lse and
    part_total have the parts as a further first dimension and are float32: sums, largest logits, sums of weights.
    """
    if DEALT & FEATURES:
        for turn in tl.range(0, tl.cdiv(tiles * pairs, tl.num_programs(0)), num_stages=1):
            pid = dealt(turn)
            if pid < tiles * pairs:
                _forward_tile(
                    pid, q, k, v, out, lse, part_total, bias, dense, slopes, sinks, lengths, cu_q, cu_k, positions,
                    ranks, tile_sequence, tile_first, seed_at, key_descriptor, value_descriptor,
                    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
                    positions_stride, ranks_stride, B, Hq, G, L, S, E, Ev, left, right, scale, softcap, limit,
                    keep_scale, tiles, pairs, section, part, FEATURES, BM, BN, BE, BV, DOT, PRECISION,
                )  # fmt: skip
    else:
        _forward_tile(
            tl.program_id(0), q, k, v, out, lse, part_total, bias, dense, slopes, sinks, lengths, cu_q, cu_k,
            positions, ranks, tile_sequence, tile_first, seed_at, key_descriptor, value_descriptor,
            sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
            positions_stride, ranks_stride, B, Hq, G, L, S, E, Ev, left, right, scale, softcap, limit, keep_scale,
            tiles, pairs, section, part, FEATURES, BM, BN, BE, BV, DOT, PRECISION,
        )  # fmt: skip
