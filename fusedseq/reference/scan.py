"""One recurrent layer over a whole sequence, all its directions, in every layout of the operator.

`forward` is differentiable by autograd, any number of times. `backward` is the same derivative written by hand, step by
step, so that the formulas a kernel implements can be debugged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gru, lstm, rnn

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu")


class _Weights(NamedTuple):
    """The parameters of one direction."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, R]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [R, H]


class _Layout(NamedTuple):
    """How the caller's rows lie on the dense [T, B] grid that the scan walks."""

    T: int
    B: int
    batch_first: bool
    rows: Tensor | None  # [N] the grid position of each packed row
    live: Tensor | None  # [T, B, 1] bool; None where every position is live

    def pad(self, t: Tensor) -> Tensor:  # the caller's layout -> [T, B, ...]
        if self.rows is not None:
            grid = t.new_zeros(self.T * self.B, *t.shape[1:])
            return grid.index_copy(0, self.rows, t).unflatten(0, (self.T, self.B))
        return t.transpose(0, 1) if self.batch_first else t

    def unpad(self, t: Tensor) -> Tensor:  # [T, B, ...] -> the caller's layout
        if self.rows is not None:
            return t.flatten(0, 1).index_select(0, self.rows)
        return t.transpose(0, 1) if self.batch_first else t

    def clear(self, t: Tensor) -> Tensor:  # [T, B, ...] with zeros wherever no step happens
        return t if self.live is None else t.masked_fill(~self.live, 0.0)


class _Step(NamedTuple):
    """What the backward pass needs to know about one step of one direction."""

    h: Tensor  # [B, R] the state that entered, after resets
    c: Tensor | None  # [B, H]
    saved: tuple[Tensor, ...]


class _Run(NamedTuple):
    """One direction, walked to its end."""

    ys: list[Tensor]  # T of [B, R], in time order
    cs: list[Tensor]  # T of [B, H], LSTM only
    h: Tensor  # [B, R]
    c: Tensor | None  # [B, H]
    steps: list[_Step]  # in time order


def _layout(
    x: Tensor, h0: Tensor | None, batch_first: bool, lengths: Tensor | None, batch_sizes: Tensor | None
) -> _Layout:
    if batch_sizes is not None:
        T = batch_sizes.shape[0]
        B = int(batch_sizes[0]) if T else (0 if h0 is None else h0.shape[1])
        live = torch.arange(B) < batch_sizes.unsqueeze(1)
        rows = live.flatten().nonzero().squeeze(1)
        return _Layout(T, B, False, rows.to(x.device), live.unsqueeze(2).to(x.device))
    T, B = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    if lengths is None:
        return _Layout(T, B, batch_first, None, None)
    live = torch.arange(T).unsqueeze(1) < lengths
    return _Layout(T, B, batch_first, None, live.unsqueeze(2).to(x.device))


def _directions(weights: Sequence[Tensor], D: int, dtype: torch.dtype) -> list[_Weights]:
    """Split the flat list; the count per direction says which tensors are there."""
    n = len(weights) // D
    out = []
    for d in range(D):
        w = [t.to(dtype) for t in weights[d * n : (d + 1) * n]]
        b_ih, b_hh = w[2:4] if n >= 4 else (None, None)
        out.append(_Weights(w[0], w[1], b_ih, b_hh, w[-1] if n in (3, 5) else None))
    return out


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _initial(state: Tensor | None, D: int, B: int, S: int, like: Tensor) -> Tensor:  # [D, B, S]
    return like.new_zeros(D, B, S) if state is None else state.to(like.dtype)


def _step(
    cell: str, gx: Tensor, h: Tensor, c: Tensor | None, w: _Weights
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:  # h [B, R], c [B, H], saved
    if cell == "lstm":
        assert c is not None
        return lstm.step(gx, h, c, w.w_hh, w.b_hh, w.w_hr)
    if cell == "gru":
        h, saved = gru.step(gx, h, w.w_hh, w.b_hh)
        return h, None, saved
    if cell == "gru_reset_before":
        h, saved = gru.step_reset_before(gx, h, w.w_hh, w.b_hh)
        return h, None, saved
    h = rnn.step(gx, h, w.w_hh, w.b_hh, relu=cell == "rnn_relu")
    return h, None, (h,)


def _walk(
    cell: str,
    x: Tensor,  # [T, B, I]
    h: Tensor,  # [B, R]
    c: Tensor | None,  # [B, H]
    w: _Weights,
    live: Tensor | None,  # [T, B, 1]
    resets: Tensor | None,  # [T, B, 1]
    reverse: bool,
) -> _Run:
    # Unbound at once: the derivative of T separate gx[t] would fill T tensors of the size of gx.
    gx = F.linear(x, w.w_ih, w.b_ih).unbind(0)
    steps, ys, cs = [], [], []
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        h_in, c_in = h, c
        if resets is not None:
            h_in = h.masked_fill(resets[t], 0.0)
            c_in = None if c is None else c.masked_fill(resets[t], 0.0)
        h_new, c_new, saved = _step(cell, gx[t], h_in, c_in, w)
        # A row that has ended, or in reverse has not begun, carries its state along unchanged.
        h = h_new if live is None else torch.where(live[t], h_new, h)
        ys.append(h)
        if c is not None and c_new is not None:
            c = c_new if live is None else torch.where(live[t], c_new, c)
            cs.append(c)
        steps.append(_Step(h_in, c_in, saved))
    if reverse:
        steps, ys, cs = steps[::-1], ys[::-1], cs[::-1]
    return _Run(ys, cs, h, c, steps)


class _Problem(NamedTuple):
    """The arguments of a scan, brought to one layout and dtype."""

    layout: _Layout
    x: Tensor  # [T, B, I]
    h0: Tensor  # [D, B, R]
    c0: Tensor | None  # [D, B, H]
    weights: list[_Weights]
    resets: Tensor | None  # [T, B, 1]

    def walk(self, cell: str, d: int) -> _Run:
        c = None if self.c0 is None else self.c0[d]
        return _walk(cell, self.x, self.h0[d], c, self.weights[d], self.layout.live, self.resets, reverse=d == 1)


def _prepare(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    dtype: torch.dtype,
) -> _Problem:
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}: expected one of {', '.join(CELLS)}")
    D = 2 if bidirectional else 1
    layout = _layout(x, h0, batch_first, lengths, batch_sizes)
    params = _directions(weights, D, dtype)
    R = params[0].w_hh.shape[1]
    # Padding is never part of the sum, so not even a NaN in it may reach an output or a weight gradient.
    xs = layout.clear(layout.pad(x.to(dtype)))
    hs = _initial(h0, D, layout.B, R, xs)
    cs = _initial(c0, D, layout.B, params[0].w_hh.shape[0] // 4, xs) if cell == "lstm" else None
    if resets is not None:
        resets = layout.pad(resets).unsqueeze(2)
        # In reverse the padding comes first, and a reset there would otherwise wipe out h0.
        resets = resets if layout.live is None else resets & layout.live
    return _Problem(layout, xs, hs, cs, params, resets)


def _stack(per_direction: list[list[Tensor]], layout: _Layout, like: Tensor, S: int) -> Tensor:
    """D lists of T tensors [B, S] -> [T, B, D*S] in the caller's layout, zero where no step happened."""
    dense = [torch.stack(ts) if ts else like.new_zeros(0, layout.B, S) for ts in per_direction]
    return layout.unpad(layout.clear(torch.cat(dense, dim=-1)))


def forward(
    cell: str,
    x: Tensor,  # [T, B, I], [B, T, I] or [N, I]
    h0: Tensor | None,  # [D, B, R]
    c0: Tensor | None,  # [D, B, H]
    weights: Sequence[Tensor],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,  # [B]
    batch_sizes: Tensor | None = None,  # [T]
    resets: Tensor | None = None,  # the shape of x without its last dimension
    cells: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # y [.., D*R], h_n [D, B, R], c_n [D, B, H], c_all [.., D*H]
    """Run one layer. `compute_dtype` overrides the rule that half types compute in float32 and others as they are."""
    p = _prepare(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets,
        compute_dtype or _compute_dtype(x.dtype),
    )  # fmt: skip
    runs = [p.walk(cell, d) for d in range(len(p.weights))]
    y = _stack([r.ys for r in runs], p.layout, p.x, p.h0.shape[2]).to(x.dtype)
    h_n = torch.stack([r.h for r in runs]).to(x.dtype)
    if p.c0 is None:
        return y, h_n, None, None
    c_n = torch.stack([r.c for r in runs if r.c is not None]).to(x.dtype)
    c_all = _stack([r.cs for r in runs], p.layout, p.x, p.c0.shape[2]).to(x.dtype) if cells else None
    return y, h_n, c_n, c_all


class _Grads(NamedTuple):
    """What one direction sends back."""

    dgx: Tensor  # [T, B, G*H]
    dh0: Tensor  # [B, R]
    dc0: Tensor | None  # [B, H]
    dweights: list[Tensor]


def _step_backward(
    cell: str, dh: Tensor, dc: Tensor | None, step: _Step, w: _Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # dgx, dgh [B, G*H], dh [B, R], dc [B, H]
    if cell == "lstm":
        assert dc is not None and step.c is not None and len(step.saved) == 5
        dgates, dh, dc = lstm.step_backward(dh, dc, step.saved, step.c, w.w_hh, w.w_hr)
        return dgates, dgates, dh, dc
    if cell == "gru":
        dgx, dgh, dh = gru.step_backward(dh, step.saved, step.h, w.w_hh)
        return dgx, dgh, dh, None
    if cell == "gru_reset_before":
        dgates, dh = gru.step_reset_before_backward(dh, step.saved, step.h, w.w_hh)
        return dgates, dgates, dh, None
    dgates, dh = rnn.step_backward(dh, step.saved[0], w.w_hh, relu=cell == "rnn_relu")
    return dgates, dgates, dh, None


def _outer(d: list[Tensor], operand: list[Tensor]) -> Tensor:  # T of [B, M], T of [B, K] -> [M, K]
    return torch.cat(d).T @ torch.cat(operand)


def _weight_grads(
    cell: str, x: Tensor, steps: list[_Step], dgx: list[Tensor], dgh: list[Tensor], dh: list[Tensor], w: _Weights
) -> list[Tensor]:
    """One product over all steps for each weight, in the order of the flat list."""
    if not steps:
        return [torch.zeros_like(t) for t in w if t is not None]
    hs = [s.h for s in steps]
    dw_ih = _outer(dgx, list(x))
    dw_hh = _outer(dgh, hs)
    if cell == "gru_reset_before":
        n_gate = slice(2 * w.w_hh.shape[1], None)
        dw_n = _outer([d[:, n_gate] for d in dgh], [s.saved[0] * s.h for s in steps])
        dw_hh = torch.cat([dw_hh[: 2 * w.w_hh.shape[1]], dw_n])
    out = [dw_ih, dw_hh]
    if w.b_ih is not None:
        out += [torch.cat(dgx).sum(0), torch.cat(dgh).sum(0)]
    if w.w_hr is not None:
        out.append(_outer(dh, [lstm.hidden(s.saved[3], s.saved[4]) for s in steps]))
    return out


def _walk_backward(
    cell: str,
    p: _Problem,
    d: int,
    dy: Tensor,  # [T, B, R]
    dh: Tensor,  # [B, R]
    dc: Tensor | None,  # [B, H]
    dc_all: Tensor | None,  # [T, B, H]
) -> _Grads:
    steps, w, live = p.walk(cell, d).steps, p.weights[d], p.layout.live
    T = len(steps)
    dgx: list[Tensor] = [dh] * T
    dgh: list[Tensor] = [dh] * T
    dhs: list[Tensor] = [dh] * T
    for t in range(T) if d == 1 else reversed(range(T)):
        dh = dh + dy[t]
        if dc is not None and dc_all is not None:
            dc = dc + dc_all[t]
        dh_old, dc_old = None, None
        if live is not None:
            # What belongs to a row that took no step here goes straight to the step before.
            dh_old, dh = dh.masked_fill(live[t], 0.0), dh.masked_fill(~live[t], 0.0)
            if dc is not None:
                dc_old, dc = dc.masked_fill(live[t], 0.0), dc.masked_fill(~live[t], 0.0)
        dhs[t] = dh
        dgx[t], dgh[t], dh, dc = _step_backward(cell, dh, dc, steps[t], w)
        if p.resets is not None:
            dh = dh.masked_fill(p.resets[t], 0.0)
            dc = None if dc is None else dc.masked_fill(p.resets[t], 0.0)
        dh = dh if dh_old is None else dh + dh_old
        if dc is not None and dc_old is not None:
            dc = dc + dc_old
    dense = torch.stack(dgx) if T else p.x.new_zeros(0, p.layout.B, w.w_hh.shape[0])
    return _Grads(dense, dh, dc, _weight_grads(cell, p.x, steps, dgx, dgh, dhs, w))


def backward(
    cell: str,
    dy: Tensor | None,  # like y; here and below None stands for zeros
    dh_n: Tensor | None,  # [D, B, R]
    dc_n: Tensor | None,  # [D, B, H]
    dc_all: Tensor | None,  # like c_all
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    cells: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:  # dx, dh0, dc0, dweights, each like what it belongs to
    """Gradients of `forward` by hand. The forward scan is run again: nothing but its arguments is needed.

    `cells` is accepted so that both functions take the same keywords; whether c_all took part shows in `dc_all`.
    """
    dtype = compute_dtype or _compute_dtype(x.dtype)
    p = _prepare(cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, dtype)
    D, B, R = p.h0.shape

    def dense(t: Tensor, S: int) -> tuple[Tensor, ...]:  # -> D of [T, B, S]
        return p.layout.clear(p.layout.pad(t.to(dtype))).split(S, dim=-1)

    zeros = p.x.new_zeros(p.layout.T, B, R)
    dys = [zeros] * D if dy is None else dense(dy, R)
    dhs = torch.zeros_like(p.h0) if dh_n is None else dh_n.to(dtype)
    dcs: Sequence[Tensor | None] = [None] * D
    dcells: Sequence[Tensor | None] = [None] * D
    if p.c0 is not None:
        dcs = (torch.zeros_like(p.c0) if dc_n is None else dc_n.to(dtype)).unbind(0)
        if dc_all is not None:
            dcells = dense(dc_all, p.c0.shape[2])
    grads = [_walk_backward(cell, p, d, dys[d], dhs[d], dcs[d], dcells[d]) for d in range(D)]

    dxs = (g.dgx @ w.w_ih for g, w in zip(grads, p.weights, strict=True))
    dx = p.layout.unpad(sum(dxs, p.x.new_zeros(())))
    dh0 = torch.stack([g.dh0 for g in grads])
    dc0 = None if p.c0 is None else torch.stack([g.dc0 for g in grads if g.dc0 is not None]).to(x.dtype)
    return dx.to(x.dtype), dh0.to(x.dtype), dc0, [w.to(x.dtype) for g in grads for w in g.dweights]
