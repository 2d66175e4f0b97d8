"""The pointwise part of one step, forward and backward, where both products of the gates come from a vendor's library.

One pass over memory: every operand is read once, in 16-byte accesses where its units lie side by side, and every result
written once. Which values are saved, and in what form, is what the scans and `csrc/cells` say.

A GRU that resets before the product takes two phases each way, with a product between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedseq.kernels import cells


@triton.jit
def _read(base, rows, units, row_stride, unit_stride, inside):
    """[BM, BN] float32 of a strided matrix; zeros if there is none."""
    if base is not None:
        at = rows[:, None] * row_stride + units[None, :].to(tl.int64) * unit_stride
        return tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - only one of them is compiled
        return tl.zeros(inside.shape, tl.float32)


@triton.jit
def _bias(b, gate, H, units):
    """[1, BN] of a bias [G H]; zeros if there is none."""
    if b is not None:
        return tl.load(b + gate * H + units, mask=units < H, other=0.0).to(tl.float32)[None, :]
    else:  # noqa: RET505 - only one of them is compiled
        return tl.zeros(units.shape, tl.float32)[None, :]


@triton.jit
def _input(gx, b_ih, gate, rows, units, H, row_stride, unit_stride, inside):
    """What x gives to a gate."""
    return _read(gx, rows, units + gate * H, row_stride, unit_stride, inside) + _bias(b_ih, gate, H, units)


@triton.jit
def _write(base, rows, units, row_stride, value, inside):
    at = rows[:, None] * row_stride + units[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    gx,  # [B, G H] x W_ih', G gates
    gh,  # [B, G H] h W_hh', None: zeros; reset before: [B, 2 H] of r and z, then [B, H] of r h
    b_ih, b_hh,  # [G H], both or none
    h,  # [B, H] GRU only: the state before; None: zeros
    c,  # [B, H] LSTM only: the cell state before; None: zeros
    h_new,  # [B, H], phase 0 of a reset before: r h instead
    c_new,  # [B, H] LSTM only
    kept,  # [B, S H] float32 or None (never None for a reset before, which passes z on in it)
    B, H, gx_row, gx_unit, gh_row, gh_unit, h_row, h_unit, c_row, c_unit,
    CELL: tl.constexpr, PHASE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Strides are in elements; what is written is dense."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    units = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < B)[:, None] & (units < H)[None, :]
    if CELL == "lstm":
        x0 = _input(gx, b_ih, 0, rows, units, H, gx_row, gx_unit, inside)
        x1 = _input(gx, b_ih, 1, rows, units, H, gx_row, gx_unit, inside)
        x2 = _input(gx, b_ih, 2, rows, units, H, gx_row, gx_unit, inside)
        x3 = _input(gx, b_ih, 3, rows, units, H, gx_row, gx_unit, inside)
        i, f, g, o, c_out, h_out = cells.lstm_fwd(
            x0 + _input(gh, b_hh, 0, rows, units, H, gh_row, gh_unit, inside),
            x1 + _input(gh, b_hh, 1, rows, units, H, gh_row, gh_unit, inside),
            x2 + _input(gh, b_hh, 2, rows, units, H, gh_row, gh_unit, inside),
            x3 + _input(gh, b_hh, 3, rows, units, H, gh_row, gh_unit, inside),
            _read(c, rows, units, c_row, c_unit, inside),
        )
        _write(c_new, rows, units, H, c_out, inside)
        if kept is not None:
            _write(kept, rows, units, 5 * H, i, inside)
            _write(kept + H, rows, units, 5 * H, f, inside)
            _write(kept + 2 * H, rows, units, 5 * H, g, inside)
            _write(kept + 3 * H, rows, units, 5 * H, o, inside)
            _write(kept + 4 * H, rows, units, 5 * H, c_out, inside)
    elif CELL == "gru":
        xr = _input(gx, b_ih, 0, rows, units, H, gx_row, gx_unit, inside)
        xz = _input(gx, b_ih, 1, rows, units, H, gx_row, gx_unit, inside)
        hn = _input(gh, b_hh, 2, rows, units, H, gh_row, gh_unit, inside)
        r, z, n, h_out = cells.gru_fwd(
            xr + _input(gh, b_hh, 0, rows, units, H, gh_row, gh_unit, inside),
            xz + _input(gh, b_hh, 1, rows, units, H, gh_row, gh_unit, inside),
            _input(gx, b_ih, 2, rows, units, H, gx_row, gx_unit, inside),
            hn,
            _read(h, rows, units, h_row, h_unit, inside),
        )
        if kept is not None:
            _write(kept, rows, units, 4 * H, r, inside)
            _write(kept + H, rows, units, 4 * H, z, inside)
            _write(kept + 2 * H, rows, units, 4 * H, n, inside)
            _write(kept + 3 * H, rows, units, 4 * H, hn, inside)
    elif CELL == "gru_reset_before":
        h_prev = _read(h, rows, units, h_row, h_unit, inside)
        if PHASE == 0:
            xr = _input(gx, b_ih, 0, rows, units, H, gx_row, gx_unit, inside)
            xz = _input(gx, b_ih, 1, rows, units, H, gx_row, gx_unit, inside)
            r = cells.sigmoid(xr + _input(gh, b_hh, 0, rows, units, H, gh_row, gh_unit, inside))
            z = cells.sigmoid(xz + _input(gh, b_hh, 1, rows, units, H, gh_row, gh_unit, inside))
            _write(kept, rows, units, 3 * H, r, inside)
            _write(kept + H, rows, units, 3 * H, z, inside)
            h_out = r * h_prev
        else:
            xn = _input(gx, b_ih, 2, rows, units, H, gx_row, gx_unit, inside)
            n = cells.tanh(xn + _read(gh, rows, units, gh_row, gh_unit, inside) + _bias(b_hh, 2, H, units))
            h_out = cells.gru_blend(_read(kept + H, rows, units, 3 * H, 1, inside), n, h_prev)
            _write(kept + 2 * H, rows, units, 3 * H, n, inside)
    else:
        a = _input(gx, b_ih, 0, rows, units, H, gx_row, gx_unit, inside)
        a += _input(gh, b_hh, 0, rows, units, H, gh_row, gh_unit, inside)
        h_out = cells.rnn_fwd(a, RELU=CELL == "rnn_relu")
    _write(h_new, rows, units, H, h_out, inside)


@triton.jit
def backward(
    kept,  # [B, S H] float32, None for an RNN
    y,  # [B, H] RNN only: the state after the step
    h,  # [B, H] GRU only: the state before; None: zeros
    c,  # [B, H] LSTM only: the cell state before; None: zeros
    dh,  # [B, H] gradient of the state after, None: zeros; phase 1: that of r h
    dc,  # [B, H] LSTM only: gradient of the cell state after, None: zeros
    dg,  # [B, Q H] written: gradients of the pre-activations; "gru": of r, z, n and h W_hn' + b_hn
    dh_past,  # [B, H] float32, GRU only: what reaches h past all products
    dc_past,  # [B, H] LSTM only: the gradient of c
    B, H, y_row, y_unit, h_row, h_unit, c_row, c_unit, dh_row, dh_unit, dc_row, dc_unit,
    CELL: tl.constexpr, PHASE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """As above. Phase 1 of a reset before writes the gradient of r and completes dh_past."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    units = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < B)[:, None] & (units < H)[None, :]
    up = _read(dh, rows, units, dh_row, dh_unit, inside)
    if CELL == "lstm":
        di, df, dgate, do, past = cells.lstm_bwd(
            _read(kept, rows, units, 5 * H, 1, inside),
            _read(kept + H, rows, units, 5 * H, 1, inside),
            _read(kept + 2 * H, rows, units, 5 * H, 1, inside),
            _read(kept + 3 * H, rows, units, 5 * H, 1, inside),
            _read(kept + 4 * H, rows, units, 5 * H, 1, inside),
            _read(c, rows, units, c_row, c_unit, inside),
            up,
            _read(dc, rows, units, dc_row, dc_unit, inside),
        )
        _write(dg, rows, units, 4 * H, di, inside)
        _write(dg + H, rows, units, 4 * H, df, inside)
        _write(dg + 2 * H, rows, units, 4 * H, dgate, inside)
        _write(dg + 3 * H, rows, units, 4 * H, do, inside)
        _write(dc_past, rows, units, H, past, inside)
    elif CELL == "gru":
        dr, dz, dn, dhn, past = cells.gru_bwd(
            _read(kept, rows, units, 4 * H, 1, inside),
            _read(kept + H, rows, units, 4 * H, 1, inside),
            _read(kept + 2 * H, rows, units, 4 * H, 1, inside),
            _read(kept + 3 * H, rows, units, 4 * H, 1, inside),
            _read(h, rows, units, h_row, h_unit, inside),
            up,
        )
        _write(dg, rows, units, 4 * H, dr, inside)
        _write(dg + H, rows, units, 4 * H, dz, inside)
        _write(dg + 2 * H, rows, units, 4 * H, dn, inside)
        _write(dg + 3 * H, rows, units, 4 * H, dhn, inside)
        _write(dh_past, rows, units, H, past, inside)
    elif CELL == "gru_reset_before":
        h_prev = _read(h, rows, units, h_row, h_unit, inside)
        if PHASE == 0:
            z = _read(kept + H, rows, units, 3 * H, 1, inside)
            n = _read(kept + 2 * H, rows, units, 3 * H, 1, inside)
            dn, dz, past = cells.gru_before_bwd(z, n, h_prev, up)
            _write(dg + H, rows, units, 3 * H, dz, inside)
            _write(dg + 2 * H, rows, units, 3 * H, dn, inside)
        else:
            r = _read(kept, rows, units, 3 * H, 1, inside)
            dr, past = cells.gru_before_bwd_reset(r, h_prev, up, _read(dh_past, rows, units, H, 1, inside))
            _write(dg, rows, units, 3 * H, dr, inside)
        _write(dh_past, rows, units, H, past, inside)
    else:
        after = _read(y, rows, units, y_row, y_unit, inside)
        _write(dg, rows, units, H, cells.rnn_bwd(after, up, RELU=CELL == "rnn_relu"), inside)
