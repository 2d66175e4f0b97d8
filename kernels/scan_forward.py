"""The forward scan of one layer: three kernels over the same cells.

`resident_forward`: one program owns a tile of the batch in one direction and walks through time with the states, and
    W_hh, in registers; for the smallest H.
`streamed_forward`: the same, with the states in memory and W_hh read again in each step, block by block, out of the L2
    cache; up to where one multiprocessor is too slow for that.
`step_forward`: one step, or one phase of it, a program for each tile of batch and units; any H, T launches.

No program waits for another one. All of x W_ih' (`gx`) is there before the scan begins.

Notation: T time, B batch, H units, R state size (H, or that of the projection), D directions, N rows of x: T B, or
those of a packed sequence. Row (t, b) is `t * time_stride + b * batch_stride`, packed `starts[t] + b`. A row b lives at
the times t < lengths[b]; outside them its states stay what they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedseq.kernels import cells


@triton.jit
def row_index(starts, t, b, time_stride, batch_stride):
    """int64 rows of x, y and the reserve for the batch entries b at time t."""
    if starts is not None:
        return tl.load(starts + t) + b.to(tl.int64)
    return tl.cast(t, tl.int64) * time_stride + b.to(tl.int64) * batch_stride


@triton.jit
def living(lengths, t, b, B):
    """Which of the batch entries b take a step at time t."""
    if lengths is not None:
        return (b < B) & (t < tl.load(lengths + b, mask=b < B, other=0))
    return b < B


@triton.jit
def products(
    a, a_stride, rows, take, w, w_rows, units, in_units, K,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to four products [BM, BN] of rows of a [., K] with rows of w: those of gate g begin at g * w_rows.

    Only rows in `take` are read, the others count as zero.
    """
    p0 = tl.zeros((BM, BN), tl.float32)
    p1 = tl.zeros((BM, BN), tl.float32)
    p2 = tl.zeros((BM, BN), tl.float32)
    p3 = tl.zeros((BM, BN), tl.float32)
    gate = tl.cast(w_rows, tl.int64) * K
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * a_stride + k[None, :], mask=take[:, None] & (k < K)[None, :], other=0.0)
        x = x.to(DOT)
        at = w + units[None, :].to(tl.int64) * K + k[:, None]
        inside = (k < K)[:, None] & in_units[None, :]
        p0 = tl.dot(x, tl.load(at, mask=inside, other=0.0).to(DOT), p0, input_precision=PRECISION)
        if G > 1:
            p1 = tl.dot(x, tl.load(at + gate, mask=inside, other=0.0).to(DOT), p1, input_precision=PRECISION)
        if G > 2:
            p2 = tl.dot(x, tl.load(at + 2 * gate, mask=inside, other=0.0).to(DOT), p2, input_precision=PRECISION)
        if G > 3:
            p3 = tl.dot(x, tl.load(at + 3 * gate, mask=inside, other=0.0).to(DOT), p3, input_precision=PRECISION)
    return p0, p1, p2, p3


@triton.jit
def _bias(b, gate, H, units, in_units):
    """[1, BN] of the biases [Q H], zeros if there are none."""
    if b is not None:
        return tl.load(b + gate * H + units, mask=in_units, other=0.0)[None, :]
    return tl.zeros_like(units).to(tl.float32)[None, :]


@triton.jit
def _load(base, at, inside):
    return tl.load(base + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def advance(
    gx, reserve, rows, units, inside, H, p0, p1, p2, p3, b, h_prev, c_prev, CELL: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """One step [BM, BN] from the recurrent products; h and, of an LSTM, c. Not for a reset before the product.

    KEEP: 0 nothing, 1 all that backward needs, 2 an LSTM's cell states.
    """
    in_units = units < H
    unit = units[None, :]
    if CELL == "lstm":
        at = rows[:, None] * (4 * H) + unit
        i, f, g, o, c, h = cells.lstm_fwd(
            _load(gx, at, inside) + p0 + _bias(b, 0, H, units, in_units),
            _load(gx, at + H, inside) + p1 + _bias(b, 1, H, units, in_units),
            _load(gx, at + 2 * H, inside) + p2 + _bias(b, 2, H, units, in_units),
            _load(gx, at + 3 * H, inside) + p3 + _bias(b, 3, H, units, in_units),
            c_prev,
        )
        if KEEP == 1:
            kept = reserve + rows[:, None] * (5 * H) + unit
            tl.store(kept, i, mask=inside)
            tl.store(kept + H, f, mask=inside)
            tl.store(kept + 2 * H, g, mask=inside)
            tl.store(kept + 3 * H, o, mask=inside)
            tl.store(kept + 4 * H, c, mask=inside)
        if KEEP == 2:
            tl.store(reserve + rows[:, None] * H + unit, c, mask=inside)
        return h, c
    if CELL == "gru":
        at = rows[:, None] * (3 * H) + unit
        hn = p2 + _bias(b, 3, H, units, in_units)
        r, z, n, h = cells.gru_fwd(
            _load(gx, at, inside) + p0 + _bias(b, 0, H, units, in_units),
            _load(gx, at + H, inside) + p1 + _bias(b, 1, H, units, in_units),
            _load(gx, at + 2 * H, inside) + _bias(b, 2, H, units, in_units),
            hn,
            h_prev,
        )
        if KEEP == 1:
            kept = reserve + rows[:, None] * (4 * H) + unit
            tl.store(kept, r, mask=inside)
            tl.store(kept + H, z, mask=inside)
            tl.store(kept + 2 * H, n, mask=inside)
            tl.store(kept + 3 * H, hn, mask=inside)
        return h, h
    a = _load(gx, rows[:, None] * H + unit, inside) + p0 + _bias(b, 0, H, units, in_units)
    h = cells.rnn_fwd(a, RELU=CELL == "rnn_relu")
    return h, h


@triton.jit
def before_gates(gx, reserve, rows, units, inside, H, p0, p1, b, KEEP: tl.constexpr):
    """r and z of a GRU that resets before the product."""
    in_units = units < H
    at = rows[:, None] * (3 * H) + units[None, :]
    r = cells.sigmoid(_load(gx, at, inside) + p0 + _bias(b, 0, H, units, in_units))
    z = cells.sigmoid(_load(gx, at + H, inside) + p1 + _bias(b, 1, H, units, in_units))
    if KEEP == 1:
        tl.store(reserve + at, r, mask=inside)
        tl.store(reserve + at + H, z, mask=inside)
    return r, z


@triton.jit
def before_state(gx, reserve, rows, units, inside, H, p0, b, z, h_prev, KEEP: tl.constexpr):
    """Its new state, once r h has met W_hn."""
    at = rows[:, None] * (3 * H) + 2 * H + units[None, :]
    n = cells.tanh(_load(gx, at, inside) + p0 + _bias(b, 2, H, units, units < H))
    if KEEP == 1:
        tl.store(reserve + at, n, mask=inside)
    return cells.gru_blend(z, n, h_prev)


@triton.jit
def cut_by(resets, rows, live):
    """[BM] whether a row's states are zeroed before the step."""
    if resets is not None:
        return live & (tl.load(resets + rows, mask=live, other=0) != 0)
    return live & False


@triton.jit
def weight_tile(w, gate, H, units, in_units, DOT: tl.constexpr):
    """W_hh' of one gate, [k, units], whole: H is no larger than the tile."""
    at = w + gate * H * H + units[None, :] * H + units[:, None]
    return tl.load(at, mask=in_units[None, :] & in_units[:, None], other=0.0).to(DOT)


@triton.jit(do_not_specialize=["T"])
def resident_forward(
    gx,  # [D, N, G H] float32
    w0, w1,  # [G H, H] of each direction
    biases,  # [D, Q H] float32 or None: b_ih + b_hh, of a GRU with r, z, b_in, b_hn in this order
    h, c,  # [D, B, H] float32: the states before, overwritten with those after; c None but for an LSTM
    y,  # [N, D H]
    c_all,  # [N, D H] or None
    reserve,  # [D, N, S] float32 or None
    lengths,  # [B] int64 or None
    starts,  # [T] int64, packed rows only
    resets,  # [N] uint8 or None
    T, B, N, H, time_stride, batch_stride,
    CELL: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1)
    D = tl.num_programs(1)
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    S: tl.constexpr = 1 if KEEP == 2 else 5 if CELL == "lstm" else 4 if CELL == "gru" else 3
    Q: tl.constexpr = 4 if CELL == "gru" else G
    w, b = w0, biases
    if d == 1:
        w = w1
    if biases is not None:
        b += d * (Q * H)
    gx += tl.cast(d, tl.int64) * N * (G * H)
    if KEEP != 0:
        reserve += tl.cast(d, tl.int64) * N * (S * H)
    entries = tl.program_id(0) * BM + tl.arange(0, BM)
    units = tl.arange(0, BN)
    in_units = units < H
    state_at = (tl.cast(d, tl.int64) * B + entries)[:, None] * H + units[None, :]
    in_state = (entries < B)[:, None] & in_units[None, :]
    state = tl.load(h + state_at, mask=in_state, other=0.0)
    memory = state
    if CELL == "lstm":
        memory = tl.load(c + state_at, mask=in_state, other=0.0)
    W0 = weight_tile(w, 0, H, units, in_units, DOT)
    if G > 1:
        W1 = weight_tile(w, 1, H, units, in_units, DOT)
        W2 = weight_tile(w, 2, H, units, in_units, DOT)
    if G > 3:
        W3 = weight_tile(w, 3, H, units, in_units, DOT)
    for s in tl.range(0, T, num_stages=1):
        t = tl.where(d == 0, s, T - 1 - s)
        rows = row_index(starts, t, entries, time_stride, batch_stride)
        live = living(lengths, t, entries, B)
        inside = live[:, None] & in_units[None, :]
        h_prev, c_prev = state, memory
        if resets is not None:
            cut = cut_by(resets, rows, live)[:, None]
            h_prev = tl.where(cut, 0.0, state)
            c_prev = tl.where(cut, 0.0, memory)
        x = h_prev.to(DOT)
        p0 = tl.dot(x, W0, input_precision=PRECISION)
        p1, p2, p3 = p0, p0, p0
        if G > 1:
            p1 = tl.dot(x, W1, input_precision=PRECISION)
        if CELL == "gru_reset_before":
            r, z = before_gates(gx, reserve, rows, units, inside, H, p0, p1, b, KEEP)
            p2 = tl.dot((r * h_prev).to(DOT), W2, input_precision=PRECISION)
            h_new = before_state(gx, reserve, rows, units, inside, H, p2, b, z, h_prev, KEEP)
            c_new = h_new
        else:
            if G > 1:
                p2 = tl.dot(x, W2, input_precision=PRECISION)
            if G > 3:
                p3 = tl.dot(x, W3, input_precision=PRECISION)
            h_new, c_new = advance(gx, reserve, rows, units, inside, H, p0, p1, p2, p3, b, h_prev, c_prev, CELL, KEEP)
        state = tl.where(live[:, None], h_new, state)
        if CELL == "lstm":
            memory = tl.where(live[:, None], c_new, memory)
        out = rows[:, None] * (D * H) + d * H + units[None, :]
        tl.store(y + out, h_new.to(y.dtype.element_ty), mask=inside)
        if c_all is not None:
            tl.store(c_all + out, c_new.to(c_all.dtype.element_ty), mask=inside)
    tl.store(h + state_at, state, mask=in_state)
    if CELL == "lstm":
        tl.store(c + state_at, memory, mask=in_state)


@triton.jit
def _units_forward(
    block, tile, d, s, D,
    gx, w0, w1, biases, p_0, p_1, h, c, mid, y, c_all, reserve, lengths, starts, resets,
    T, B, N, H, R, time_stride, batch_stride,
    CELL: tl.constexpr, PHASE: tl.constexpr, PROJECTED: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step s of one tile of the batch and one block of units; of R in the phase that forms h, else of H."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    S: tl.constexpr = 1 if KEEP == 2 else 5 if CELL == "lstm" else 4 if CELL == "gru" else 3
    BEFORE: tl.constexpr = CELL == "gru_reset_before"
    Q: tl.constexpr = 4 if CELL == "gru" else G
    w, w_hr, b = w0, p_0, biases
    if d == 1:
        w, w_hr = w1, p_1
    if biases is not None:
        b += d * (Q * H)
    wide = tl.cast(d, tl.int64)
    gx += wide * N * (G * H)
    if KEEP != 0:
        reserve += wide * N * (S * H)
    t = tl.where(d == 0, s, T - 1 - s)
    entries = tile * BM + tl.arange(0, BM)
    units = block * BN + tl.arange(0, BN)
    rows = row_index(starts, t, entries, time_stride, batch_stride)
    live = living(lengths, t, entries, B)
    cut = cut_by(resets, rows, live)
    state_rows = wide * B + entries
    h_in = h + tl.cast(s % 2, tl.int64) * D * B * R
    h_out = h + tl.cast(1 - s % 2, tl.int64) * D * B * R

    if PHASE == 1 and PROJECTED:
        in_units = units < R
        inside = live[:, None] & in_units[None, :]
        h_new, _, _, _ = products(mid, H, state_rows, live, w_hr, 0, units, in_units, H, 1, BM, BN, BK, DOT, PRECISION)
    else:
        in_units = units < H
        inside = live[:, None] & in_units[None, :]
        h_prev = _load(h_in, state_rows[:, None] * R + units[None, :], inside & ~cut[:, None])
        if PHASE == 1:
            p0, _, _, _ = products(
                mid, 2 * H, state_rows, live, w + 2 * tl.cast(H, tl.int64) * H, 0, units, in_units, H,
                1, BM, BN, BK, DOT, PRECISION,
            )  # fmt: skip
            z = _load(mid, state_rows[:, None] * (2 * H) + H + units[None, :], inside)
            h_new = before_state(gx, reserve, rows, units, inside, H, p0, b, z, h_prev, KEEP)
        else:
            p0, p1, p2, p3 = products(
                h_in,
                R,
                state_rows,
                live & ~cut,
                w,
                H,
                units,
                in_units,
                R,
                2 if BEFORE else G,
                BM,
                BN,
                BK,
                DOT,
                PRECISION,
            )
            if BEFORE:
                r, z = before_gates(gx, reserve, rows, units, inside, H, p0, p1, b, KEEP)
                at = mid + state_rows[:, None] * (2 * H) + units[None, :]
                tl.store(at, r * h_prev, mask=inside)
                tl.store(at + H, z, mask=inside)
            else:
                c_prev = h_prev
                at = state_rows[:, None] * H + units[None, :]
                if CELL == "lstm":
                    c_prev = _load(c, at, inside & ~cut[:, None])
                h_new, c_new = advance(
                    gx, reserve, rows, units, inside, H, p0, p1, p2, p3, b, h_prev, c_prev, CELL, KEEP
                )
                if CELL == "lstm":
                    tl.store(c + at, c_new, mask=inside)
                    if c_all is not None:
                        out = rows[:, None] * (D * H) + d * H + units[None, :]
                        tl.store(c_all + out, c_new.to(c_all.dtype.element_ty), mask=inside)
                if PROJECTED:
                    tl.store(mid + at, h_new, mask=inside)

    if PHASE == 1 or not (PROJECTED or BEFORE):
        at = state_rows[:, None] * R + units[None, :]
        if lengths is not None:
            in_state = (entries < B)[:, None] & in_units[None, :]
            tl.store(h_out + at, tl.where(live[:, None], h_new, _load(h_in, at, in_state)), mask=in_state)
        else:
            tl.store(h_out + at, h_new, mask=inside)
        out = rows[:, None] * (D * R) + d * R + units[None, :]
        tl.store(y + out, h_new.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def streamed_forward(
    gx,  # [D, N, G H] float32
    w0, w1,  # [G H, R] of each direction
    biases,  # [D, Q H] float32 or None: b_ih + b_hh, of a GRU with r, z, b_in, b_hn in this order
    p_0, p_1,  # [R, H] or None: W_hr
    h,  # [2, D, B, R] float32: the states before in h[0], those after in h[T % 2]
    c,  # [D, B, H] float32 or None: overwritten
    mid,  # float32, between the phases of a step: [D, B, H] with a projection, [D, B, 2 H] for gru_reset_before
    y,  # [N, D R]
    c_all,  # [N, D H] or None
    reserve,  # [D, N, S] float32 or None
    lengths,  # [B] int64 or None
    starts,  # [T] int64, packed rows only
    resets,  # [N] uint8 or None
    T, B, N, H, R, time_stride, batch_stride,
    CELL: tl.constexpr, PROJECTED: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, d, D = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    for s in tl.range(0, T, num_stages=1):
        for block in tl.range(0, tl.cdiv(H, BN), num_stages=1):
            _units_forward(
                block, tile, d, s, D, gx, w0, w1, biases, p_0, p_1, h, c, mid, y, c_all, reserve, lengths, starts,
                resets, T, B, N, H, R, time_stride, batch_stride, CELL, 0, PROJECTED, KEEP, BM, BN, BK, DOT, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # a thread reads what others of its program have written
        if PROJECTED or CELL == "gru_reset_before":
            for block in tl.range(0, tl.cdiv(R, BN), num_stages=1):
                _units_forward(
                    block, tile, d, s, D, gx, w0, w1, biases, p_0, p_1, h, c, mid, y, c_all, reserve, lengths, starts,
                    resets, T, B, N, H, R, time_stride, batch_stride, CELL, 1, PROJECTED, KEEP, BM, BN, BK, DOT,
                    PRECISION,
                )  # fmt: skip
            tl.debug_barrier()


@triton.jit(do_not_specialize=["s", "T"])
def step_forward(
    s,  # the step, counted in the order in which they are walked
    gx, w0, w1, biases, p_0, p_1, h, c, mid, y, c_all, reserve, lengths, starts, resets,  # as above
    T, B, N, H, R, time_stride, batch_stride,
    CELL: tl.constexpr, PHASE: tl.constexpr, PROJECTED: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _units_forward(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), s, tl.num_programs(2),
        gx, w0, w1, biases, p_0, p_1, h, c, mid, y, c_all, reserve, lengths, starts, resets,
        T, B, N, H, R, time_stride, batch_stride, CELL, PHASE, PROJECTED, KEEP, BM, BN, BK, DOT, PRECISION,
    )  # fmt: skip
