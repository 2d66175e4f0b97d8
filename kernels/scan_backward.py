"""The backward scan of one layer: gate gradients of every step, and what reaches the initial states.

The kernels and the notation are those of `scan_forward`; a step is walked from its end. Weight gradients and that of x
are products over all steps at once, which the backend forms afterwards from the gate gradients `dg` [D, N, Q]:
    lstm              di, df, dg, do            Q = 4 H
    gru               dr, dz, dn, dhn           Q = 4 H, dhn of W_hn h + b_hn
    gru_reset_before  dr, dz, dn                Q = 3 H
    rnn_*             da                        Q = H
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedseq.kernels import cells
from fusedseq.kernels.scan_forward import _load, cut_by, living, row_index


@triton.jit
def _product(
    a, a_stride, rows, take, w, units, in_units, K, R, skip_from, skip,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] product of rows of a with columns `units` of w [K, R]; a leaves out `skip` columns at `skip_from`."""
    p = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        column = k + tl.where(k >= skip_from, skip, 0)
        x = tl.load(a + rows[:, None] * a_stride + column[None, :], mask=take[:, None] & (k < K)[None, :], other=0.0)
        at = w + k[:, None].to(tl.int64) * R + units[None, :]
        v = tl.load(at, mask=(k < K)[:, None] & in_units[None, :], other=0.0)
        p = tl.dot(x.to(DOT), v.to(DOT), p, input_precision=PRECISION)
    return p


@triton.jit
def _previous_cell(
    c0, reserve, entries, units, t, d, T, B, H, inside, cut, lengths, starts, time_stride, batch_stride
):  # fmt: skip
    """An LSTM's cell state before step t of the walk, from the reserve or, in the first step, from c0."""
    before = tl.where(d == 0, t - 1, t + 1)
    last = tl.zeros_like(entries) + (T - 1)
    if lengths is not None:
        last = (tl.load(lengths + entries, mask=entries < B, other=0) - 1).to(tl.int32)
    first = tl.where(d == 0, tl.zeros_like(entries), last) == t
    rows = row_index(starts, tl.minimum(tl.maximum(before, 0), T - 1), entries, time_stride, batch_stride)
    inside = inside & ~cut[:, None]
    c_prev = _load(reserve, rows[:, None] * (5 * H) + 4 * H + units[None, :], inside & ~first[:, None])
    if c0 is not None:
        at = (tl.cast(d, tl.int64) * B + entries)[:, None] * H + units[None, :]
        c_prev += _load(c0, at, inside & first[:, None])
    return c_prev


@triton.jit
def _lstm_gates(
    dg, reserve, dc_all, c0, rows, entries, units, t, d, D, T, B, H, inside, cut, dh, dc, lengths, starts, time_stride,
    batch_stride,
):  # fmt: skip
    """Stores the gate gradients of one step [BM, BN] and returns them with that of the cell state before it."""
    c_prev = _previous_cell(
        c0, reserve, entries, units, t, d, T, B, H, inside, cut, lengths, starts, time_stride, batch_stride
    )
    if dc_all is not None:
        dc += _load(dc_all, rows[:, None] * (D * H) + d * H + units[None, :], inside)
    at = rows[:, None] * (5 * H) + units[None, :]
    i, f, g = _load(reserve, at, inside), _load(reserve, at + H, inside), _load(reserve, at + 2 * H, inside)
    o, c = _load(reserve, at + 3 * H, inside), _load(reserve, at + 4 * H, inside)
    di, df, dg_, do, dc_prev = cells.lstm_bwd(i, f, g, o, c, c_prev, dh, dc)
    out = dg + rows[:, None] * (4 * H) + units[None, :]
    tl.store(out, di.to(dg.dtype.element_ty), mask=inside)
    tl.store(out + H, df.to(dg.dtype.element_ty), mask=inside)
    tl.store(out + 2 * H, dg_.to(dg.dtype.element_ty), mask=inside)
    tl.store(out + 3 * H, do.to(dg.dtype.element_ty), mask=inside)
    return di, df, dg_, do, tl.where(cut[:, None], 0.0, dc_prev)


@triton.jit
def _gru_gates(dg, reserve, hp, rows, units, H, inside, dh):
    """The same for a GRU: gradients of r, z, n and hn, and of h before the step without the products."""
    at = rows[:, None] * (4 * H) + units[None, :]
    r, z = _load(reserve, at, inside), _load(reserve, at + H, inside)
    n, hn = _load(reserve, at + 2 * H, inside), _load(reserve, at + 3 * H, inside)
    h_prev = _load(hp, rows[:, None] * H + units[None, :], inside)
    dr, dz, dn, dhn, dh_prev = cells.gru_bwd(r, z, n, hn, h_prev, dh)
    tl.store(dg + at, dr.to(dg.dtype.element_ty), mask=inside)
    tl.store(dg + at + H, dz.to(dg.dtype.element_ty), mask=inside)
    tl.store(dg + at + 2 * H, dn.to(dg.dtype.element_ty), mask=inside)
    tl.store(dg + at + 3 * H, dhn.to(dg.dtype.element_ty), mask=inside)
    return dr, dz, dhn, dh_prev


@triton.jit
def _before_gates(dg, reserve, hp, rows, units, H, inside, dh):
    """Reset before the product, as far as no product is needed: dz, dn, and dh_prev without them."""
    at = rows[:, None] * (3 * H) + units[None, :]
    z, n = _load(reserve, at + H, inside), _load(reserve, at + 2 * H, inside)
    h_prev = _load(hp, rows[:, None] * H + units[None, :], inside)
    dn, dz, dh_prev = cells.gru_before_bwd(z, n, h_prev, dh)
    tl.store(dg + at + H, dz.to(dg.dtype.element_ty), mask=inside)
    tl.store(dg + at + 2 * H, dn.to(dg.dtype.element_ty), mask=inside)
    return dz, dn, dh_prev


@triton.jit
def _before_reset(dg, reserve, hp, rows, units, H, inside, drh, dh_prev):
    """The rest, once dn has met W_hn: dr, and dh_prev but for the products of r and z."""
    at = rows[:, None] * (3 * H) + units[None, :]
    r = _load(reserve, at, inside)
    h_prev = _load(hp, rows[:, None] * H + units[None, :], inside)
    dr, dh_prev = cells.gru_before_bwd_reset(r, h_prev, drh, dh_prev)
    tl.store(dg + at, dr.to(dg.dtype.element_ty), mask=inside)
    return dr, dh_prev


@triton.jit
def _rnn_gates(dg, y, rows, d, D, units, H, inside, dh, CELL: tl.constexpr):
    h = _load(y, rows[:, None] * (D * H) + d * H + units[None, :], inside)
    da = cells.rnn_bwd(h, dh, RELU=CELL == "rnn_relu")
    tl.store(dg + rows[:, None] * H + units[None, :], da.to(dg.dtype.element_ty), mask=inside)
    return da


@triton.jit
def _tile(w, gate, H, units, in_units, DOT: tl.constexpr):
    """W_hh of one gate, [units, k], whole."""
    at = w + gate * H * H + units[:, None] * H + units[None, :]
    return tl.load(at, mask=in_units[None, :] & in_units[:, None], other=0.0).to(DOT)


@triton.jit(do_not_specialize=["T"])
def resident_backward(
    w0, w1,  # [G H, H] of each direction
    reserve,  # [D, N, S] float32, or None (RNN)
    y,  # [N, D H], RNN only; float32 or the type of x
    hp,  # [D, N, H] the state that entered each step, GRU only
    c0,  # [D, B, H] float32 or None
    dy,  # [N, D H] or None
    dc_all,  # [N, D H] or None
    dh, dc,  # [D, B, H] float32: gradients of the last states, overwritten with those of the first
    dg,  # [D, N, Q] written where a step happens
    lengths, starts, resets,
    T, B, N, H, time_stride, batch_stride,
    CELL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1)
    D = tl.num_programs(1)
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    Q: tl.constexpr = 4 if CELL == "lstm" or CELL == "gru" else G
    S: tl.constexpr = 5 if CELL == "lstm" else 4 if CELL == "gru" else 3
    wide = tl.cast(d, tl.int64)
    w = w0
    if d == 1:
        w = w1
    dg += wide * N * (Q * H)
    if reserve is not None:
        reserve += wide * N * (S * H)
    if hp is not None:
        hp += wide * N * H
    entries = tl.program_id(0) * BM + tl.arange(0, BM)
    units = tl.arange(0, BN)
    in_units = units < H
    state_at = (wide * B + entries)[:, None] * H + units[None, :]
    in_state = (entries < B)[:, None] & in_units[None, :]
    state = tl.load(dh + state_at, mask=in_state, other=0.0)
    if CELL == "lstm":
        memory = tl.load(dc + state_at, mask=in_state, other=0.0)
    W0 = _tile(w, 0, H, units, in_units, DOT)
    if G > 1:
        W1 = _tile(w, 1, H, units, in_units, DOT)
        W2 = _tile(w, 2, H, units, in_units, DOT)
    if G > 3:
        W3 = _tile(w, 3, H, units, in_units, DOT)
    for step in tl.range(0, T, num_stages=1):
        s = T - 1 - step
        t = tl.where(d == 0, s, T - 1 - s)
        rows = row_index(starts, t, entries, time_stride, batch_stride)
        live = living(lengths, t, entries, B)
        cut = cut_by(resets, rows, live)
        inside = live[:, None] & in_units[None, :]
        total = state
        if dy is not None:
            total += _load(dy, rows[:, None] * (D * H) + d * H + units[None, :], inside)
        if CELL == "lstm":
            a0, a1, a2, a3, before = _lstm_gates(
                dg, reserve, dc_all, c0, rows, entries, units, t, d, D, T, B, H, inside, cut, total, memory, lengths,
                starts, time_stride, batch_stride,
            )  # fmt: skip
            memory = tl.where(live[:, None], before, memory)
            into = tl.dot(a0.to(DOT), W0, input_precision=PRECISION)
            into = tl.dot(a1.to(DOT), W1, into, input_precision=PRECISION)
            into = tl.dot(a2.to(DOT), W2, into, input_precision=PRECISION)
            into = tl.dot(a3.to(DOT), W3, into, input_precision=PRECISION)
        elif CELL == "gru":
            a0, a1, a2, past = _gru_gates(dg, reserve, hp, rows, units, H, inside, total)
            into = tl.dot(a0.to(DOT), W0, past, input_precision=PRECISION)
            into = tl.dot(a1.to(DOT), W1, into, input_precision=PRECISION)
            into = tl.dot(a2.to(DOT), W2, into, input_precision=PRECISION)
        elif CELL == "gru_reset_before":
            a1, a2, past = _before_gates(dg, reserve, hp, rows, units, H, inside, total)
            drh = tl.dot(a2.to(DOT), W2, input_precision=PRECISION)
            a0, past = _before_reset(dg, reserve, hp, rows, units, H, inside, drh, past)
            into = tl.dot(a0.to(DOT), W0, past, input_precision=PRECISION)
            into = tl.dot(a1.to(DOT), W1, into, input_precision=PRECISION)
        else:
            a0 = _rnn_gates(dg, y, rows, d, D, units, H, inside, total, CELL)
            into = tl.dot(a0.to(DOT), W0, input_precision=PRECISION)
        state = tl.where(live[:, None], tl.where(cut[:, None], 0.0, into), state)
    tl.store(dh + state_at, state, mask=in_state)
    if CELL == "lstm":
        tl.store(dc + state_at, memory, mask=in_state)


@triton.jit
def _units_backward(
    block, tile, d, s, D,
    w0, w1, p_0, p_1, reserve, y, hp, c0, dy, dc_all, dh, dc, carry, dhr, dg, lengths, starts, resets,
    T, B, N, H, R, time_stride, batch_stride,
    CELL: tl.constexpr, PHASE: tl.constexpr, PROJECTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step s, or for s = -1 what remains for the initial states, of one tile of the batch and one block of units."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    Q: tl.constexpr = 4 if CELL == "lstm" or CELL == "gru" else G
    S: tl.constexpr = 5 if CELL == "lstm" else 4 if CELL == "gru" else 3
    BEFORE: tl.constexpr = CELL == "gru_reset_before"
    CARRIED: tl.constexpr = CELL == "gru" or CELL == "gru_reset_before"
    wide = tl.cast(d, tl.int64)
    w, w_hr = w0, p_0
    if d == 1:
        w, w_hr = w1, p_1
    dg += wide * N * (Q * H)
    if reserve is not None:
        reserve += wide * N * (S * H)
    if hp is not None:
        hp += wide * N * H
    if dhr is not None:
        dhr += wide * N * R
    t = tl.where(d == 0, s, T - 1 - s)
    later_t = tl.where(d == 0, t + 1, t - 1)
    entries = tile * BM + tl.arange(0, BM)
    units = block * BN + tl.arange(0, BN)
    rows = row_index(starts, tl.minimum(tl.maximum(t, 0), T - 1), entries, time_stride, batch_stride)
    live = living(lengths, t, entries, B) & (s >= 0)
    cut = cut_by(resets, rows, live)
    state_rows = wide * B + entries

    if PHASE == 0:
        in_units = units < R
        later_rows = row_index(starts, tl.minimum(tl.maximum(later_t, 0), T - 1), entries, time_stride, batch_stride)
        later = living(lengths, later_t, entries, B) & (s + 1 < T)
        take = later & ~cut_by(resets, later_rows, later)
        K = (2 if BEFORE else G) * H
        into = _product(
            dg, Q * H, later_rows, take, w, units, in_units, K, R, 2 * H if CELL == "gru" else K, H,
            BM, BN, BK, DOT, PRECISION,
        )  # fmt: skip
        at = state_rows[:, None] * R + units[None, :]
        if CARRIED:
            into += _load(carry, at, take[:, None] & in_units[None, :])
        # The buffer still holds the gradient of a row's last state until its first state's takes the place.
        into += _load(dh, at, (live & ~later)[:, None] & in_units[None, :])
        tl.store(dh + at, into, mask=(later & ~live)[:, None] & in_units[None, :])
        inside = live[:, None] & in_units[None, :]
        total = into
        if dy is not None:
            total += _load(dy, rows[:, None] * (D * R) + d * R + units[None, :], inside)
        if PROJECTED:
            tl.store(dhr + rows[:, None] * R + units[None, :], total.to(dhr.dtype.element_ty), mask=inside)
        elif BEFORE:
            _, _, past = _before_gates(dg, reserve, hp, rows, units, H, inside, total)
            tl.store(carry + at, past, mask=inside)
        elif CELL == "gru":
            _, _, _, past = _gru_gates(dg, reserve, hp, rows, units, H, inside, total)
            tl.store(carry + at, past, mask=inside)
        elif CELL != "lstm":
            _rnn_gates(dg, y, rows, d, D, units, H, inside, total, CELL)
    else:
        in_units = units < H
        inside = live[:, None] & in_units[None, :]
        at = state_rows[:, None] * H + units[None, :]
        if PROJECTED:
            total = _product(dhr, R, rows, live, w_hr, units, in_units, R, H, R, 0, BM, BN, BK, DOT, PRECISION)
        else:
            drh = _product(
                dg + 2 * H, Q * H, rows, live, w + 2 * tl.cast(H, tl.int64) * H, units, in_units, H, H, H, 0,
                BM, BN, BK, DOT, PRECISION,
            )  # fmt: skip
            _, past = _before_reset(dg, reserve, hp, rows, units, H, inside, drh, _load(carry, at, inside))
            tl.store(carry + at, past, mask=inside)
    if CELL == "lstm" and (PHASE == 1) == PROJECTED:
        at = state_rows[:, None] * H + units[None, :]
        _, _, _, _, before = _lstm_gates(
            dg, reserve, dc_all, c0, rows, entries, units, t, d, D, T, B, H, inside, cut, total, _load(dc, at, inside),
            lengths, starts, time_stride, batch_stride,
        )  # fmt: skip
        tl.store(dc + at, before, mask=inside)


@triton.jit(do_not_specialize=["T"])
def streamed_backward(
    w0, w1,  # [G H, R] of each direction
    p_0, p_1,  # [R, H] or None: W_hr
    reserve, y, hp, c0,  # as above
    dy,  # [N, D R] or None
    dc_all,  # [N, D H] or None
    dh,  # [D, B, R] float32: the gradient of the last states, overwritten with that of the first
    dc,  # [D, B, H] float32, LSTM only: likewise
    carry,  # [D, B, H] float32, GRU only: what bypasses the products from one step to the one before
    dhr,  # [D, N, R], with a projection only: the gradient of the state after each step
    dg, lengths, starts, resets,
    T, B, N, H, R, time_stride, batch_stride,
    CELL: tl.constexpr, PROJECTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, d, D = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    for step in tl.range(0, T + 1, num_stages=1):
        s = T - 1 - step
        for block in tl.range(0, tl.cdiv(R, BN), num_stages=1):
            _units_backward(
                block, tile, d, s, D, w0, w1, p_0, p_1, reserve, y, hp, c0, dy, dc_all, dh, dc, carry, dhr, dg, lengths,
                starts, resets, T, B, N, H, R, time_stride, batch_stride, CELL, 0, PROJECTED, BM, BN, BK, DOT,
                PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # a thread reads what others of its program have written
        if PROJECTED or CELL == "gru_reset_before":
            for block in tl.range(0, tl.cdiv(H, BN), num_stages=1):
                _units_backward(
                    block, tile, d, s, D, w0, w1, p_0, p_1, reserve, y, hp, c0, dy, dc_all, dh, dc, carry, dhr, dg,
                    lengths, starts, resets, T, B, N, H, R, time_stride, batch_stride, CELL, 1, PROJECTED, BM, BN, BK,
                    DOT, PRECISION,
                )  # fmt: skip
            tl.debug_barrier()


@triton.jit(do_not_specialize=["s", "T"])
def step_backward(
    s,  # the step, from T - 1 down to -1
    w0, w1, p_0, p_1, reserve, y, hp, c0, dy, dc_all, dh, dc, carry, dhr, dg, lengths, starts, resets,  # as above
    T, B, N, H, R, time_stride, batch_stride,
    CELL: tl.constexpr, PHASE: tl.constexpr, PROJECTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _units_backward(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), s, tl.num_programs(2),
        w0, w1, p_0, p_1, reserve, y, hp, c0, dy, dc_all, dh, dc, carry, dhr, dg, lengths, starts, resets,
        T, B, N, H, R, time_stride, batch_stride, CELL, PHASE, PROJECTED, BM, BN, BK, DOT, PRECISION,
    )  # fmt: skip
