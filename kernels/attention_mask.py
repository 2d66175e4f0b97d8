"""What the attention kernels share: how work is cut, which keys a query sees, its logits.

A pair is one key head of one batch row (or packed sequence) with the G query heads that use it. Its rows are the
queries of those heads, head by head within each position, so that keys and values are read once for a whole group and
decoding fills a tile. Positions count from the first query and the first key of the pair; blocks of keys begin at
multiples of the block, so that a row's result does not depend on what else is in the batch.

Which parts a call has is one integer, `FEATURES`, made of the bits below: each combination is compiled on its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import philox

LEFT = tl.constexpr(1 << 0)  # the window has a bound on this side
RIGHT = tl.constexpr(1 << 1)  # also by causality
CAUSAL = tl.constexpr(1 << 2)
BOTTOM_RIGHT = tl.constexpr(1 << 3)
LENGTHS = tl.constexpr(1 << 4)
PACKED = tl.constexpr(1 << 5)
GLOBAL = tl.constexpr(1 << 6)  # some keys are seen from beyond the window
DENSE = tl.constexpr(1 << 7)
BIAS = tl.constexpr(1 << 8)
ALIBI = tl.constexpr(1 << 9)
SOFTCAP = tl.constexpr(1 << 10)
SINKS = tl.constexpr(1 << 11)
DROPOUT = tl.constexpr(1 << 12)
GROUPED = tl.constexpr(1 << 13)  # G > 1
PADDED_E = tl.constexpr(1 << 14)  # E is less than the tile's width
PADDED_EV = tl.constexpr(1 << 15)
# Logits in natural units, rounded once, alike in forward and backward: where a row sees one key its weight is 1 to the
# last bit of float32. Else they are in units of ln 2 from the start, which saves a product for each.
EXACT = tl.constexpr(1 << 16)
FOLDED = tl.constexpr(1 << 17)  # a logit is no more than a product times a positive scale: one multiply-add to 2^x
SPLIT = tl.constexpr(1 << 18)  # keys are cut into parts that a second kernel merges
WITH_DK = tl.constexpr(1 << 19)  # which gradients a program sums: wide heads have registers for one at a time
WITH_DV = tl.constexpr(1 << 20)
TILED = tl.constexpr(1 << 21)  # keys and values come through tensor descriptors (TMA)
DEALT = tl.constexpr(1 << 22)  # as many programs as run at once are dealt the tiles, instead of one program for each
ALTERED = tl.constexpr(SOFTCAP.value | BIAS.value | ALIBI.value)

# How a tile of keys is looked at: all rows see all of it; some do not; its keys are picked from beyond the window.
INNER = tl.constexpr(0)
EDGE = tl.constexpr(1)
FAR = tl.constexpr(2)

NOWHERE = tl.constexpr(1 << 30)  # no key is there
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def schedule(
    pid, tiles, pairs, section, tile_sequence, tile_first, G, FEATURES: tl.constexpr, LAST_FIRST: tl.constexpr
):  # fmt: skip
    """Sequence, key head and tile of the piece of work `pid`, which is the program that takes it unless they are DEALT.

    Pairs come in sections whose keys and values fit L2 together; within one, tiles of all pairs go from the longest
    to the shortest, so that the last ones to start are short. Packed: `pairs` are heads, and two tables tell the
    sequence of a tile and the first tile of a sequence.
    """
    group, rest = pid // (tiles * section), pid % (tiles * section)
    width = tl.minimum(section, pairs - group * section)
    tile, pair = rest // width, group * section + rest % width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    if PACKED & FEATURES:
        n = tl.load(tile_sequence + tile).to(tl.int32)
        return n, pair, tile - tl.load(tile_first + n).to(tl.int32)
    return pair // G, pair % G, tile


@triton.jit
def dealt(turn):
    """The piece of work that this program takes in its `turn`: there and back again, so that whoever had the longest
    of one turn has the shortest of the next."""
    first, programs = tl.program_id(0), tl.num_programs(0)
    return turn * programs + tl.where(turn % 2 == 0, first, programs - 1 - first)


@triton.jit
def sequence(n, L, S, lengths, cu_q, cu_k, FEATURES: tl.constexpr):
    """Of a sequence: batch row, first query, queries, first key, keys, and the key its first query is aligned with."""
    zero = tl.full((), 0, tl.int32)
    b, q0, queries, k0, keys, diagonal = zero + n, zero, zero + L, zero, zero + S, zero
    if PACKED & FEATURES:
        b = zero
        q0 = tl.load(cu_q + n).to(tl.int32)
        queries = tl.load(cu_q + n + 1).to(tl.int32) - q0
        k0 = tl.load(cu_k + n).to(tl.int32)
        keys = tl.load(cu_k + n + 1).to(tl.int32) - k0
    if LENGTHS & FEATURES:
        keys = tl.load(lengths + n).to(tl.int32)
    if BOTTOM_RIGHT & FEATURES:
        diagonal = keys - queries
    return b, q0, queries, k0, keys, diagonal


@triton.jit
def rows_from(first, queries, head, G, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """Rows of a pair: whether each is there, its position and its head; what is not there repeats the last row."""
    r = first + tl.arange(0, BLOCK)
    real = r < queries * G
    r = tl.maximum(tl.minimum(r, queries * G - 1), 0)
    if GROUPED & FEATURES:
        return real, r // G, head * G + r % G
    return real, r, head + tl.zeros((BLOCK,), tl.int32)


@triton.jit
def bounds(d, keys, left, right, FEATURES: tl.constexpr):
    """For queries at keys d: the first key seen, the one behind the last, and that behind the last global one."""
    begin, end, reach = tl.zeros_like(d), tl.zeros_like(d) + keys, tl.zeros_like(d) + keys
    if LEFT & FEATURES:
        begin = tl.maximum(d - left, 0)
    if RIGHT & FEATURES:
        end = tl.minimum(d + right + 1, keys)
    if CAUSAL & FEATURES:
        reach = tl.minimum(d + 1, keys)
    return begin, end, reach


@triton.jit
def key_range(d_low, d_high, keys, left, right, lower, upper, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """Where keys begin and end that queries at keys d_low to d_high see, within [lower, upper); and the blocks between
    that all of them see wholly: first, inner_first, inner_last, last."""
    first, last = lower, tl.minimum(keys, upper)
    inner_first, inner_last = first, last
    seen = tl.full((), 0, tl.int32)
    if LEFT & FEATURES:
        seen = tl.maximum(d_low - left, 0)
        first = tl.maximum(seen // BLOCK * BLOCK, lower)
        inner_first = tl.maximum(tl.cdiv(tl.maximum(d_high - left, 0), BLOCK) * BLOCK, lower)
    if RIGHT & FEATURES:
        inner_last = tl.minimum(tl.maximum(d_low + right + 1, 0), last)
        last = tl.minimum(tl.maximum(d_high + right + 1, 0), last)
    last = tl.where(seen < last, last, 0)
    inner_first = tl.minimum(inner_first, tl.cdiv(last, BLOCK) * BLOCK)
    inner_last = tl.minimum(inner_last, last) // BLOCK * BLOCK
    return first, inner_first, tl.maximum(inner_last, inner_first), last


@triton.jit
def row_range(j_low, j_high, queries, diagonal, left, right, G, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """The other way round: the rows that see keys j_low to j_high, and the tiles of rows that see all of them."""
    first = tl.full((), 0, tl.int32)
    last = queries
    inner_first, inner_last = first, last
    if RIGHT & FEATURES:
        first = tl.maximum(j_low - right - diagonal, 0)
        inner_first = tl.maximum(j_high - right - diagonal, 0)
    if LEFT & FEATURES:
        last = tl.minimum(tl.maximum(j_high + left - diagonal + 1, 0), queries)
        inner_last = tl.minimum(tl.maximum(j_low + left - diagonal + 1, 0), queries)
    first, last = first * G // BLOCK * BLOCK, tl.where(first < last, last, 0) * G
    inner_first, inner_last = tl.cdiv(inner_first * G, BLOCK) * BLOCK, tl.minimum(inner_last * G, last) // BLOCK * BLOCK
    inner_first = tl.minimum(inner_first, tl.cdiv(last, BLOCK) * BLOCK)
    return first, inner_first, tl.maximum(inner_last, inner_first), last


@triton.jit
def far_range(ranks, k0, reach):
    """Which of the sorted positions of global keys lie in the first `reach` keys from k0 on."""
    return tl.load(ranks + k0).to(tl.int32), tl.load(ranks + k0 + reach).to(tl.int32)


@triton.jit
def far_keys(positions, first, last, k0, BLOCK: tl.constexpr):
    """Up to BLOCK of these positions, counted from k0, with NOWHERE behind them."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(positions + at, mask=at < last, other=NOWHERE).to(tl.int32) - tl.where(at < last, k0, 0)


@triton.jit
def visible(j, begin, end, reach, MODE: tl.constexpr, FEATURES: tl.constexpr):
    """Which keys the structure lets rows see; keys and rows are expanded along the other dimension."""
    if MODE == FAR:
        return ((j < begin) | (j >= end)) & (j < reach)
    if LEFT & FEATURES:
        return (j >= begin) & (j < end)
    return j < end


@triton.jit
def load_rows(base, at, stride, real, width, WIDTH: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr):
    """Rows `at` of a matrix, [len(at), WIDTH]; 0 where they are not `real`, and behind their width."""
    e = tl.arange(0, WIDTH)
    address = base + at.to(tl.int64)[:, None] * stride + e[None, :]
    if MASKED and PADDED:
        return tl.load(address, mask=real[:, None] & (e < width)[None, :], other=0.0)
    if MASKED:
        return tl.load(address, mask=real[:, None], other=0.0)
    if PADDED:
        return tl.load(address, mask=(e < width)[None, :], other=0.0)
    return tl.load(address)


@triton.jit
def load_tile(source, at, first, stride, real, pair, width, WIDTH: tl.constexpr, MODE: tl.constexpr,
              FEATURES: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Rows `at` of keys or values, the first of them `first`: by the copy engine, which fills up with 0, if `source` is
    a descriptor of [B, Hkv, S, width], else as `load_rows`; `pair` is the batch row and the key head."""
    if TILED & FEATURES:
        return source.load([pair[0], pair[1], first, 0]).reshape(at.shape[0], WIDTH)
    else:  # noqa: RET505 - only one of them is compiled
        return load_rows(source, at, stride, real, width, WIDTH, MODE != INNER, PADDED)


@triton.jit
def load_table(rows, j, stride, keys, MODE: tl.constexpr):
    """Entries of a bias or a boolean table; `rows` are addresses of key 0. Behind the last key: 0."""
    address = rows + j.to(tl.int64) * stride
    if MODE == INNER:
        return tl.load(address)
    return tl.load(address, mask=j < keys, other=0)


@triton.jit
def allows(rows, j, stride, keys, MODE: tl.constexpr):
    """Whether a boolean table lets any of the rows see any of the keys, a scalar."""
    return tl.max(tl.max(load_table(rows, j, stride, keys, MODE).to(tl.int32), 1), 0) > 0


@triton.jit
def kept(seed, limit, j, j0, k0, i, h, b, MODE: tl.constexpr, FEATURES: tl.constexpr):
    """Which keys j [N], from j0 on, dropout leaves to queries i [M] of heads h [M] of batch row b, [M, N].

    Keys count from k0, all else absolutely.
    """
    N: tl.constexpr = j.shape[0]
    if (MODE == FAR) or (PACKED & FEATURES) or (N % 64):
        return philox.kept(seed, limit, j + k0, i, h, b)
    else:  # noqa: RET505 - only one of them is compiled
        return philox.kept_blocks(seed, limit, j0 // 64, i, h, b, N // 64)


@triton.jit
def tanh(x):
    """Within a few ulp: a polynomial in x^2 near 0, where 1 - 2 / (e^2x + 1) cancels."""
    a = tl.abs(x)
    z = x * x
    q = 0.13331924 + z * (-0.05378383 + z * (0.020795972 + z * -0.0058951585))
    near = x + x * z * (-0.33333298 + z * q)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    return tl.where(a < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def logits(x, j, diagonal, keys, bias_rows, bias_stride, slope, scale, softcap, MODE: tl.constexpr,
           FEATURES: tl.constexpr):  # fmt: skip
    """From products to logits, and the softcap's derivative. In units of ln 2 unless EXACT; `scale` is then too, where
    nothing else is done to a logit."""
    s = x * scale
    tangent = s
    if SOFTCAP & FEATURES:
        t = tanh(s * (1.0 / softcap))
        s = t * softcap
        tangent = 1.0 - t * t
    if BIAS & FEATURES:
        s += load_table(bias_rows, j, bias_stride, keys, MODE).to(tl.float32)
    if ALIBI & FEATURES:
        s -= slope * tl.abs(j - diagonal).to(tl.float32)
    if (ALTERED & FEATURES) and not (EXACT & FEATURES):
        s *= LOG2E
    return s, tangent


@triton.jit
def weight(x, FEATURES: tl.constexpr):
    """e^x of a difference of logits."""
    if EXACT & FEATURES:
        return tl.exp2(x * LOG2E)
    return tl.exp2(x)


@triton.jit
def finish(top, total, sink, keep_scale, FEATURES: tl.constexpr):
    """What makes a row's sum of weighted values its output, and its lse in natural units.

    `top` and `total` are the largest logit and the sum of weights relative to it, `sink` a further logit of the sum.
    """
    factor = tl.full(top.shape, 1.0, tl.float32)
    if SINKS & FEATURES:
        if not (EXACT & FEATURES):
            sink = sink * LOG2E
        now = tl.maximum(top, sink)
        base = tl.where(now == float("-inf"), 0.0, now)
        factor = weight(top - base, FEATURES)
        total = total * factor + weight(sink - base, FEATURES)
        top = now
    nothing = total == 0.0
    some = tl.where(nothing, 1.0, total)
    lse = top + tl.log(some) if EXACT & FEATURES else (top + tl.log2(some)) * LN2
    return tl.where(nothing, 0.0, factor * keep_scale / some), tl.where(nothing, float("-inf"), lse)
