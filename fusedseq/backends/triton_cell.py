"""One step of a cell: the products by torch, all that is pointwise by one kernel; part of the backend `triton`.

`pointwise_forward` and `pointwise_backward` are the kernels with their launch: from pre-activations of the gates, in
any strides, to the states and back. A whole cell with its recurrent product in the same kernel is a scan of one step
(`triton_scan.cell_forward`), which `FUSEDSEQ_AUTOTUNE=1` tries beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedseq.backends import triton_scan as scans
from fusedseq.backends.reference import as_told
from fusedseq.backends.triton_device import on_device
from fusedseq.backends.triton_tuning import Block, choose
from fusedseq.kernels import pointwise

# Values saved of each unit, and columns of the gradient of the pre-activations.
KEPT = {"lstm": 5, "gru": 4, "gru_reset_before": 3, "rnn_tanh": 0, "rnn_relu": 0}
_TILE = 1024  # elements: two or one 16-byte accesses of a thread to each operand


class Step(NamedTuple):
    """What enters the pointwise part of a step. G gates; a state that is None is zero."""

    cell: str
    gx: Tensor  # [B, G H] x W_ih'
    gh: Tensor | None  # [B, G H] h W_hh'; [B, 2 H] for "gru_reset_before"
    b_ih: Tensor | None  # [G H]
    b_hh: Tensor | None  # [G H]
    h: Tensor | None  # [B, H]
    c: Tensor | None  # [B, H]


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 1) if t is None else (t.stride(0), t.stride(1))


def _block(H: int) -> Block:
    """The tile that ships."""
    BN = min(512, max(32, 1 << (H - 1).bit_length()))
    return Block(_TILE // BN, BN)


def _grid(B: int, H: int, block: Block) -> tuple[int, int]:
    return -(-B // block.BM), -(-H // block.BN)


def pointwise_forward(
    step: Step, w_hn: Tensor | None, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # h' [B, H], c' [B, H] or None, kept [B, S H] float32 or None
    """The new states, in `dtype`. `w_hn` [H, H] is the product in the middle of "gru_reset_before"."""
    cell, gx = step.cell, step.gx
    B, H = gx.shape[0], gx.shape[1] // scans.GATES[cell]
    before = cell == "gru_reset_before"
    h_new = gx.new_empty((B, H), dtype=dtype)
    c_new = torch.empty_like(h_new) if cell == "lstm" else None
    kept = gx.new_empty((B, KEPT[cell] * H), dtype=torch.float32) if (save or before) and KEPT[cell] else None
    if B == 0:
        return h_new, c_new, kept if save else None
    h = step.h if cell.startswith("gru") else None
    c = step.c if cell == "lstm" else None

    def launch(block: Block, gh: Tensor | None, out: Tensor, phase: int) -> None:
        pointwise.forward[_grid(B, H, block)](
            gx, gh, step.b_ih, step.b_hh, h, c, out, c_new, kept, B, H, *_strides(gx), *_strides(gh), *_strides(h),
            *_strides(c), CELL=cell, PHASE=phase, BM=block.BM, BN=block.BN, num_warps=block.warps,
        )  # fmt: skip

    out = torch.empty_like(h_new) if before else h_new
    shipped, there = _block(H), tuple(t is not None for t in (step.gh, step.b_ih, h, c, kept))
    key = ("pointwise", "forward", cell, H, gx.dtype, dtype, there)
    block = choose(key, shipped, shipped.others, lambda block: launch(block, step.gh, out, 0), gx)
    launch(block, step.gh, out, 0)
    if before:
        assert w_hn is not None
        launch(block, None if h is None else scans.product(out, w_hn), h_new, 1)
    return h_new, c_new, kept if save else None


def pointwise_backward(
    step: Step, w_hn: Tensor | None, kept: Tensor | None, h_new: Tensor, dh: Tensor | None, dc: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the pre-activations [B, Q H] in `dtype`, of h as far as it bypasses the products [B, H] float32
    (None but for a GRU) and of c [B, H] (None but for an LSTM). Of `step` only the states are read.

    The columns of "gru" are those of r, z, n and of h W_hn' + b_hn; others have one for each gate.
    """
    cell = step.cell
    B, H = h_new.shape
    dg = h_new.new_empty((B, scans.GRADS[cell] * H), dtype=dtype)
    dh_past = h_new.new_empty((B, H), dtype=torch.float32) if cell.startswith("gru") else None
    dc_past = h_new.new_empty((B, H), dtype=dtype) if cell == "lstm" else None
    if B == 0:
        return dg, dh_past, dc_past
    y = h_new if cell.startswith("rnn") else None
    h = step.h if cell.startswith("gru") else None
    c = step.c if cell == "lstm" else None

    def launch(block: Block, up: Tensor | None, phase: int) -> None:
        pointwise.backward[_grid(B, H, block)](
            kept, y, h, c, up, dc, dg, dh_past, dc_past, B, H, *_strides(y), *_strides(h), *_strides(c), *_strides(up),
            *_strides(dc), CELL=cell, PHASE=phase, BM=block.BM, BN=block.BN, num_warps=block.warps,
        )  # fmt: skip

    shipped, there = _block(H), tuple(t is not None for t in (h, c, dh, dc))
    key = ("pointwise", "backward", cell, H, dtype, there)
    # The second phase adds to what it writes, and so cannot be tried twice: it takes the tile of the first.
    block = choose(key, shipped, shipped.others, lambda block: launch(block, dh, 0), h_new)
    launch(block, dh, 0)
    if cell == "gru_reset_before":
        assert w_hn is not None
        launch(block, scans.product(dg[:, 2 * H :], w_hn.t()), 1)
    return dg, dh_past, dc_past


def _w_hn(cell: str, w_hh: Tensor) -> Tensor | None:
    return w_hh[2 * w_hh.shape[1] :] if cell == "gru_reset_before" else None


def cell_forward(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], save: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if len(weights) in (3, 5):  # a projection makes another product of what this kernel would end with
        return scans.cell_forward(cell, x, h, c, weights, save)

    def run(way: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (scans.cell_forward if way == "fused" else _products_forward)(cell, x, h, c, weights, save)

    key = ("cell", cell, x.dtype, *weights[0].shape, bool(save), h is None, len(weights))
    with on_device(x):
        return run(choose(key, "products", lambda: ["fused"], run, x))


def _products_forward(
    cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], save: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    (w,) = scans.directions(weights, 1)
    with as_told(x):
        rows = w.w_hh[: 2 * w.w_hh.shape[1]] if cell == "gru_reset_before" else w.w_hh
        gh = None if h is None else scans.product(h, rows)
        step = Step(cell, scans.product(x, w.w_ih), gh, w.b_ih, w.b_hh, h, c)
        h_new, c_new, kept = pointwise_forward(step, _w_hn(cell, w.w_hh), x.dtype, bool(save))
    if save:
        # An RNN keeps nothing, in the shape that says so.
        kept = x.new_empty((1, x.shape[0], 0), dtype=torch.float32) if kept is None else kept.unsqueeze(0)
    return h_new, c_new, kept


def cell_backward(
    cell: str,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    h_new: Tensor,
    reserve: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    if len(weights) in (3, 5):
        return scans.cell_backward(cell, dh, dc, x, h, c, weights, h_new, reserve, need_dx, need_dw)
    table = scans.directions(weights, 1)
    w, H = table[0], h_new.shape[1]
    with as_told(x), on_device(x):
        before = (x.new_zeros(h_new.shape) if h is None else h).unsqueeze(0)
        if cell == "rnn_tanh" and x.dtype != torch.float32:
            h_new = scans.gates_again(cell, x, before, table, reserve)[0]
        step = Step(cell, x, None, None, None, h, c)
        kept = reserve[0] if KEPT[cell] else None
        dg, past, dc_prev = pointwise_backward(step, _w_hn(cell, w.w_hh), kept, h_new, dh, dc, x.dtype)
        if cell == "gru":
            back = scans.product(dg[:, : 2 * H], w.w_hh[: 2 * H].t()) + scans.product(
                dg[:, 3 * H :], w.w_hh[2 * H :].t()
            )
        elif cell == "gru_reset_before":
            back = scans.product(dg[:, : 2 * H], w.w_hh[: 2 * H].t())
        else:
            back = scans.product(dg, w.w_hh.t())
        dh_prev = (back if past is None else back.add_(past)).to(x.dtype)
        dx = (dg[:, : 3 * H] if cell == "gru" else dg) @ w.w_ih if need_dx else None
        dweights = scans.weight_grads(cell, x, before, dg.unsqueeze(0), None, reserve, table) if need_dw else []
    return dx, dh_prev, dc_prev, dweights
