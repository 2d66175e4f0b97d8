"""Dropout's random bits: Philox 4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), the same on every backend.

Element j of a row has word (j // 16) % 4 of the counter (16 (j // 64) + j % 16, c1, c2, c3) and is dropped if that word
is below a threshold. Rows of a tensor count r mod 2^32, 0, r // 2^32 in c1, c2, c3 (`fusedseq.reference.dropout`),
attention the query, its head and its batch entry (`fusedseq.reference.attention`).
"""

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def words(seed, c0, c1, c2, c3):
    """Four words of 32 bits for every counter; `seed` is an int64 scalar, the counters uint32 and of one shape."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    m0 = tl.full((), _M0, tl.uint32)
    m1 = tl.full((), _M1, tl.uint32)
    w0 = tl.full((), _W0, tl.uint32)
    w1 = tl.full((), _W1, tl.uint32)
    for _ in tl.static_range(10):
        a_low, a_high = c0 * m0, tl.umulhi(c0, tl.broadcast_to(m0, c0.shape))
        b_low, b_high = c2 * m1, tl.umulhi(c2, tl.broadcast_to(m1, c2.shape))
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def kept_blocks(seed, limit, block, c1, c2, c3, BLOCKS: tl.constexpr):
    """Whether each element is kept, [M, 64 BLOCKS], for the columns from 64 `block` on.

    `limit` is the threshold, uint32 or wider; c1 [M]; c2 and c3 [M] or scalars. One evaluation gives four columns.
    """
    M: tl.constexpr = c1.shape[0]
    zero = tl.zeros((M, 16 * BLOCKS), tl.uint32)
    c0 = zero + (16 * block + tl.arange(0, 16 * BLOCKS)).to(tl.uint32)[None, :]
    c1 = zero + c1.to(tl.uint32)[:, None]
    c2 = zero + tl.broadcast_to(tl.cast(c2, tl.uint32), (M,))[:, None]
    c3 = zero + tl.broadcast_to(tl.cast(c3, tl.uint32), (M,))[:, None]
    w0, w1, w2, w3 = words(seed, c0, c1, c2, c3)
    # Compared before they move between threads: a byte for an element and not four.
    least = tl.cast(limit, tl.uint32)
    even = tl.join((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.join((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    # [.., 16 BLOCKS, 2, 2] with word 2 k + l at [.., k, l]; column 64 a + 16 w + n has word w of counter 16 a + n.
    grouped = tl.reshape(tl.join(even, odd), (M, BLOCKS, 16, 4))
    return tl.reshape(tl.permute(grouped, (0, 1, 3, 2)), (M, 64 * BLOCKS)) != 0


@triton.jit
def kept(seed, limit, column, c1, c2, c3):
    """The same for columns [N] that do not come in blocks of 64: one evaluation for each element. c1 [M] -> [M, N]."""
    M: tl.constexpr = c1.shape[0]
    N: tl.constexpr = column.shape[0]
    zero = tl.zeros((M, N), tl.uint32)
    c0 = zero + (16 * (column // 64) + column % 16).to(tl.uint32)[None, :]
    c1 = zero + c1.to(tl.uint32)[:, None]
    c2 = zero + tl.broadcast_to(tl.cast(c2, tl.uint32), (M,))[:, None]
    c3 = zero + tl.broadcast_to(tl.cast(c3, tl.uint32), (M,))[:, None]
    w0, w1, w2, w3 = words(seed, c0, c1, c2, c3)
    which = ((column // 16) % 4)[None, :]
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return word >= tl.cast(limit, tl.uint32)
