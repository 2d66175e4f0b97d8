"""The first half of attention's backward: probabilities again from lse, and the gradients of logits, tile by tile.

With D = dout . out - dlse of a row, the gradient of its logit is P (dP - D), where dP = dout . v (0 where dropped; Dao
et al. 2022, arXiv:2205.14135, algorithm 4). The gradient of a sink is -P_sink D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_mask import (
    ALIBI,
    DENSE,
    DROPOUT,
    EXACT,
    INNER,
    LOG2E,
    PADDED_EV,
    kept,
    load_rows,
    load_table,
    logits,
    visible,
    weight,
)


@triton.jit
def attention_delta_kernel(
    out, dout, lse, dlse, ready, delta, sob, soh, son, sdob, sdoh, sdon, rows, Hq, L, Ev,
    FEATURES: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """D of BM rows, and their lse in the units of the logits; +inf where nothing is seen makes every probability 0.

    out, dout [B, Hq, L, Ev]; lse, dlse, ready, delta [B, Hq, L] float32.
    """
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    real = n < rows
    i, h, b = n % L, n // L % Hq, n // L // Hq
    o = load_rows(out, b * sob + h * soh + i * son, 1, real, Ev, BV, True, PADDED_EV & FEATURES)
    g = load_rows(dout, b * sdob + h * sdoh + i * sdon, 1, real, Ev, BV, True, PADDED_EV & FEATURES)
    D = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if WITH_DLSE:
        D -= tl.load(dlse + n, mask=real, other=0.0)
    x = tl.load(lse + n, mask=real, other=0.0)
    nothing = x == float("-inf")
    tl.store(delta + n, tl.where(nothing, 0.0, D), mask=real)
    if not (EXACT & FEATURES):
        x *= LOG2E
    tl.store(ready + n, tl.where(nothing, float("inf"), x), mask=real)


@triton.jit
def row_places(b, h, i, position, shift, Hq, L, slopes, bias, dense, table_strides, k0, FEATURES: tl.constexpr):
    """Of rows: where they are aligned, their place in [B, Hq, L], the slope of their head, their rows of the tables."""
    sbb, sbh, sbl, sbs, sdb, sdh, sdl, sds = table_strides
    b64, h64, i64, k64 = b.to(tl.int64), h.to(tl.int64), i.to(tl.int64), k0.to(tl.int64)
    slope = tl.zeros_like(i).to(tl.float32)
    bias_rows = tl.zeros_like(i64)
    dense_rows = tl.zeros_like(i64)
    if ALIBI & FEATURES:
        slope = tl.load(slopes + h)
    if bias is not None:
        bias_rows = bias + b64 * sbb + h64 * sbh + i64 * sbl + k64 * sbs
    if dense is not None:
        dense_rows = dense + b64 * sdb + h64 * sdh + i64 * sdl + k64 * sds
    return position + shift, (b64 * Hq + h64) * L + i64, slope, bias_rows, dense_rows


@triton.jit
def keys_by_rows(x, ROWS_FIRST: tl.constexpr):
    """A vector of rows, as it lies in a tile."""
    return x[:, None] if ROWS_FIRST else x[None, :]


# How the values of rows come: as values, or as addresses, of rows that are all there or only some of them.
HELD = tl.constexpr(0)
AT_ALL = tl.constexpr(1)
AT_SOME = tl.constexpr(2)


@triton.jit
def of_rows(x, real, other: tl.constexpr, HOW: tl.constexpr):
    if HOW == HELD:
        return x
    elif HOW == AT_ALL:  # noqa: RET505 - only one of them is compiled
        return tl.load(x)
    else:
        return tl.load(x, mask=real, other=other)


@triton.jit
def gradients(query, dout, k, v, lse, delta, real, j, j0, row, tables, numbers, random,
              MODE: tl.constexpr, ROWS_FIRST: tl.constexpr, HOW: tl.constexpr, FEATURES: tl.constexpr,
              DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of rows [M] and keys [N], [M, N] if ROWS_FIRST else [N, M]: the probabilities that the output was made of, the
    gradients of logits, the derivative of the softcap and the distance from the diagonal.

    lse and delta are read where they are needed, HOW they come: side by side in a tile they fill many registers.
    """
    begin, end, reach, d, i, h, b, k0, keys, slope = row
    bias_rows, bias_stride, dense_rows, dense_stride = tables
    scale, softcap, keep_scale = numbers
    seed, limit = random
    at = j[None, :] if ROWS_FIRST else j[:, None]
    d = keys_by_rows(d, ROWS_FIRST)
    if ROWS_FIRST:
        x = tl.dot(query, tl.trans(k), input_precision=PRECISION)
    else:
        x = tl.dot(k, tl.trans(query), input_precision=PRECISION)
    s, tangent = logits(
        x, at, d, keys, keys_by_rows(bias_rows, ROWS_FIRST), bias_stride, keys_by_rows(slope, ROWS_FIRST),
        scale, softcap, MODE, FEATURES,
    )  # fmt: skip
    if MODE != INNER:
        s = tl.where(visible(at, keys_by_rows(begin, ROWS_FIRST), keys_by_rows(end, ROWS_FIRST),
                             keys_by_rows(reach, ROWS_FIRST), MODE, FEATURES), s, float("-inf"))  # fmt: skip
    if DENSE & FEATURES:
        allowed = load_table(keys_by_rows(dense_rows, ROWS_FIRST), at, dense_stride, keys, MODE)
        s = tl.where(allowed != 0, s, float("-inf"))
    p = weight(s - keys_by_rows(of_rows(lse, real, float("inf"), HOW), ROWS_FIRST), FEATURES)
    if ROWS_FIRST:
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    else:
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    made = p
    if DROPOUT & FEATURES:
        keep = kept(seed, limit, j, j0, k0, i, h, b, MODE, FEATURES)
        if not ROWS_FIRST:
            keep = tl.trans(keep)
        made = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - keys_by_rows(of_rows(delta, real, 0.0, HOW), ROWS_FIRST))
    return made, ds, tangent, tl.abs(at - d).to(tl.float32)
