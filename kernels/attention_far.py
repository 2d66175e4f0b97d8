"""dk and dv of global keys from the rows beyond whose window they lie, added to what their windows gave."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward import key_step
from .attention_mask import (
    CAUSAL,
    DROPOUT,
    FAR,
    PADDED_E,
    PADDED_EV,
    WITH_DK,
    WITH_DV,
    far_keys,
    far_range,
    load_rows,
    sequence,
)


@triton.jit
def attention_far_kernel(
    q, k, v, dout, lse, delta, dk, dv, bias, dense, slopes, lengths, cu_q, cu_k, positions, ranks, seed_at,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdkb, sdkh, sdkn, sdvb, sdvh, sdvn,
    sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds,
    positions_stride, ranks_stride, Hq, G, L, S, E, Ev, left, right, scale, raw_scale, softcap, limit, keep_scale,
    tiles,
    FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: every `tiles`-th tile of BN global keys of a pair. dk and dv are float32, and what they hold counts.

    Each key has one owner, and this runs after the kernel that wrote dk and dv: the order of every sum is fixed.
    """
    Hkv = Hq // G
    pair = tl.program_id(0) // tiles
    n, hkv = pair // Hkv, pair % Hkv
    b, q0, queries, k0, keys, shift = sequence(n, L, S, lengths, cu_q, cu_k, FEATURES)
    b64, head, k64 = b.to(tl.int64), hkv.to(tl.int64), k0.to(tl.int64)
    place = (b, hkv, q0, queries, k0, keys, shift)
    sources = (q, dout, lse, delta, slopes, bias, dense)
    strides, sizes, options = (sqb, sqh, sqn, sgb, sgh, sgn), (E, Ev, Hq, G, L), (left, right)
    table_strides = (sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds)
    numbers = (scale, softcap, keep_scale)
    random = (tl.load(seed_at) if DROPOUT & FEATURES else 0, limit)
    e, f = tl.arange(0, BE), tl.arange(0, BV)
    far_first, far_last = far_range(ranks + b64 * ranks_stride, k0, keys)
    for at in range(far_first + tl.program_id(0) % tiles * BN, far_last, tiles * BN):
        j = far_keys(positions + b64 * positions_stride, at, far_last, k0, BN)
        here = j < keys
        key = load_rows(k + b64 * skb + head * skh + k64 * skn, j, skn, here, E, BE, True, PADDED_E & FEATURES)
        value = load_rows(v + b64 * svb + head * svh + k64 * svn, j, svn, here, Ev, BV, True, PADDED_EV & FEATURES)
        key, value = key.to(DOT), value.to(DOT)
        dkey = tl.zeros((BN, BE), tl.float32)
        dvalue = tl.zeros((BN, BV), tl.float32)
        first = tl.maximum(tl.min(j, 0) - shift, 0) * G // BM * BM if CAUSAL & FEATURES else tl.full((), 0, tl.int32)
        for row0 in range(first, queries * G, BM):
            dkey, dvalue = key_step(dkey, dvalue, key, value, row0, place, sources, strides, sizes, j, at, options,
                                    table_strides, numbers, random, FAR, False, FEATURES, BM, BE, BV, DOT,
                                    PRECISION)  # fmt: skip
        j64 = k64 + j
        if WITH_DK & FEATURES:
            address = dk + b64 * sdkb + head * sdkh + j64[:, None] * sdkn + e[None, :]
            mask = here[:, None] & (e < E)[None, :]
            tl.store(address, tl.load(address, mask=mask, other=0.0) + dkey * raw_scale, mask=mask)
        if WITH_DV & FEATURES:
            address = dv + b64 * sdvb + head * sdvh + j64[:, None] * sdvn + f[None, :]
            mask = here[:, None] & (f < Ev)[None, :]
            tl.store(address, tl.load(address, mask=mask, other=0.0) + dvalue, mask=mask)
