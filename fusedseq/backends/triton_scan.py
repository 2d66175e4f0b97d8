"""Scans and cells on the Triton kernels: products of whole sequences by torch, the recurrence by a kernel.

Part of the backend `triton`. A half type's products take it as it is and sum in float32; states, and all that is kept
for the backward pass, are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedseq.backends.one_step import cells
from fusedseq.backends.reference import as_told, reserve_like
from fusedseq.backends.triton_device import capability, on_device
from fusedseq.backends.triton_launch import Repeated
from fusedseq.backends.triton_layout import Layout
from fusedseq.backends.triton_tuning import choose
from fusedseq.kernels import scan_backward as backward_kernels
from fusedseq.kernels import scan_forward as forward_kernels
from fusedseq.kernels.runtime import INTERPRETING, dot_precision, dot_type
from fusedseq.kernels.scan_plan import Plan, others, plan, takes_many

if TYPE_CHECKING:
    from fusedseq.registry import ScanCall

GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}
# Columns of the gate gradients for each unit.
GRADS = {"lstm": 4, "gru": 4, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}
# A recurrent product of one gate and tile takes the interpreter some ten milliseconds; more of them would take minutes.
INTERPRETED_PRODUCTS = 700
# Half types in, float32 out, as one call: from torch 2.8 on, for CUDA.
_MM_WIDENS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def supports(call: ScanCall) -> str | None:
    if INTERPRETING:
        p = plan(call.cell, call.H, call.R, call.B, call.D, call.dtype)
        tiles = -(-call.B // p.BM) * -(-call.H // p.BN) * -(-call.R // p.BK)
        products = call.T * call.D * tiles * GATES[call.cell]
        if products > INTERPRETED_PRODUCTS:
            return f"the interpreter would take minutes for {products} products"
    return None


class _Weights(NamedTuple):
    """The parameters of one direction, dense."""

    w_ih: Tensor  # [G H, I]
    w_hh: Tensor  # [G H, R]
    b_ih: Tensor | None  # [G H]
    b_hh: Tensor | None  # [G H]
    w_hr: Tensor | None  # [R, H]


def directions(weights: Sequence[Tensor], D: int) -> list[_Weights]:
    count = len(weights) // D
    table = []
    for d in range(D):
        w = [t.contiguous() for t in weights[d * count : (d + 1) * count]]
        b_ih, b_hh = w[2:4] if count >= 4 else (None, None)
        table.append(_Weights(w[0], w[1], b_ih, b_hh, w[-1] if count in (3, 5) else None))
    return table


def _pair(table: list[_Weights], field: str) -> tuple[Tensor | None, Tensor | None]:
    """Of both directions, as kernels take them; of one, twice the same."""
    return getattr(table[0], field), getattr(table[-1], field)


def _state(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """float32, and the caller's to write to."""
    if state is None:
        return like.new_zeros(shape, dtype=torch.float32)
    return torch.empty(shape, dtype=torch.float32, device=like.device).copy_(state)


def product(x: Tensor, w: Tensor) -> Tensor:  # [N, K], [M, K] -> [N, M] float32
    if x.dtype == torch.float32:
        return x @ w.t()
    if x.is_cuda and _MM_WIDENS:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return x.float() @ w.float().t()


def _product_of_x(x: Tensor, table: list[_Weights]) -> Tensor:  # [D, N, G H] float32
    if len(table) == 1:
        return product(x, table[0].w_ih).unsqueeze(0)
    return torch.stack([product(x, w.w_ih) for w in table])


def _biases(cell: str, table: list[_Weights]) -> Tensor | None:  # [D, Q H] float32, Q = 4 for "gru", else G
    rows = []
    for w in table:
        if w.b_ih is None or w.b_hh is None:
            return None
        b_ih, b_hh = w.b_ih.float(), w.b_hh.float()
        keep = 2 * b_ih.shape[0] // 3 if cell == "gru" else b_ih.shape[0]
        rows.append(torch.cat([b_ih[:keep] + b_hh[:keep], b_ih[keep:], b_hh[keep:]]))
    return torch.stack(rows)


def _constants(p: Plan, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "BM": p.BM, "BN": p.BN, "DOT": dot_type(dtype), "PRECISION": dot_precision(dtype), "num_warps": p.warps,
        "maxnreg": p.registers,
    }  # fmt: skip


def _steps(
    kernel: Any, blocks: Sequence[int], others: tuple[int, int], args: tuple[Any, ...], options: dict[str, Any]
) -> list[Repeated]:
    """The phases of a step, each with its number of blocks."""
    return [Repeated(kernel, (n, *others), args, {**options, "PHASE": phase}) for phase, n in enumerate(blocks)]


def _chosen(
    what: tuple[object, ...], cell: str, w: _Weights, D: int, lay: Layout, x: Tensor, run: Callable[[Plan], object]
) -> Plan:
    """The plan that ships for a scan, or, if asked for, the fastest."""
    H, R = w.w_hh.shape[0] // GATES[cell], w.w_hh.shape[1]
    shipped = plan(cell, H, R, lay.B, D, x.dtype, capability(x))
    # Of the batch only whether it fills a tile of many rows.
    many = takes_many(H, R, lay.B, x.dtype)
    has = tuple(t is not None for t in (w.b_ih, w.w_hr, *lay.data()))
    key = ("scan", *what, cell, H, R, D, lay.T > 1, x.dtype, dot_precision(x.dtype), many, has)
    return choose(key, shipped, lambda: others(shipped, H, R, many, x.dtype), run, x)


def scan_forward(
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
    cells: bool,
    save: int,
    panels: object = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    D = 2 if bidirectional else 1
    table = directions(weights, D)
    H, R = table[0].w_hh.shape[0] // GATES[cell], table[0].w_hh.shape[1]
    batch = None if h0 is None else h0.shape[1]
    lay = Layout.of(x, batch_first, lengths, batch_sizes, resets, batch)
    T, B, N = lay.T, lay.B, lay.N
    make = x.new_empty if lengths is None else x.new_zeros  # rows past a length are not visited
    y = make((*x.shape[:-1], D * R))
    c_all = make((*x.shape[:-1], D * H)) if cells else None
    reserve = None
    if save:
        reserve = reserve_like(cell, x, weights, bidirectional, save)
        if lengths is not None:
            reserve.zero_()
    if N == 0:
        h_n = _state(h0, (D, B, R), x)
        c = _state(c0, (D, B, H), x) if cell == "lstm" else None
        return y, h_n.to(x.dtype), None if c is None else c.to(x.dtype), c_all, reserve

    with as_told(x), on_device(x):
        gx, biases = _product_of_x(x.reshape(N, x.shape[-1]), table), _biases(cell, table)

        def run(p: Plan) -> tuple[Tensor, Tensor | None]:
            """All steps: the last states, float32."""
            c = _state(c0, (D, B, H), x) if cell == "lstm" else None
            common: dict[str, Any] = {**_constants(p, x.dtype), "CELL": cell, "KEEP": int(save)}
            tiles = -(-B // p.BM)
            if p.kind == "resident":
                h = _state(h0, (D, B, R), x)
                forward_kernels.resident_forward[(tiles, D)](
                    gx, *_pair(table, "w_hh"), biases, h, c, y, c_all, reserve, *lay.data(),
                    T, B, N, H, *lay.strides, **common,
                )  # fmt: skip
                return h, c
            states = x.new_empty((2, D, B, R), dtype=torch.float32)
            states[0].zero_() if h0 is None else states[0].copy_(h0)
            projected = table[0].w_hr is not None
            phases = 2 if projected or cell == "gru_reset_before" else 1
            mid = x.new_empty((D, B, H if projected else 2 * H), dtype=torch.float32) if phases == 2 else None
            args = (
                gx, *_pair(table, "w_hh"), biases, *_pair(table, "w_hr"), states, c, mid, y, c_all,
                reserve, *lay.data(), T, B, N, H, R, *lay.strides,
            )  # fmt: skip
            common.update(PROJECTED=projected, BK=p.BK, num_stages=p.stages)
            if p.kind == "streamed":
                forward_kernels.streamed_forward[(tiles, D)](*args, **common)
            else:
                blocks = [-(-(R if phase else H) // p.BN) for phase in range(phases)]
                steps = _steps(forward_kernels.step_forward, blocks, (tiles, D), args, common)
                for s in range(T):
                    for step in steps:
                        step(s)
            return states[T % 2], c

        h_n, c = run(_chosen(("forward", int(save), cells), cell, table[0], D, lay, x, run))
    return y, h_n.to(x.dtype), None if c is None else c.to(x.dtype), c_all, reserve


def gates_again(
    cell: str, x: Tensor, hp: Tensor, table: list[_Weights], reserve: Tensor
) -> Tensor:  # x [N, I], hp [D, N, R], reserve [D, N, H or 0] -> [D, N, S]; of an RNN the states [D, N, H]
    """What a forward pass that kept only the states did not write, float32: one product for all steps at once."""
    gx, biases = _product_of_x(x, table), _biases(cell, table)
    kept = []
    for d, w in enumerate(table):
        H = w.w_hh.shape[0] // GATES[cell]
        gates = [g + b for g, b in zip(*_blocks(gx[d], None if biases is None else biases[d], H), strict=True)]
        if cell == "lstm":
            a = [g + h for g, h in zip(gates, product(hp[d], w.w_hh).split(H, 1), strict=True)]
            columns = [a[0].sigmoid(), a[1].sigmoid(), a[2].tanh(), a[3].sigmoid(), reserve[d]]
        elif cell == "gru":
            hr, hz, hn = product(hp[d], w.w_hh).split(H, 1)
            hn = hn if biases is None else hn + biases[d][3 * H :]
            r, z = (gates[0] + hr).sigmoid(), (gates[1] + hz).sigmoid()
            columns = [r, z, (gates[2] + r * hn).tanh(), hn]
        elif cell == "rnn_tanh":
            columns = [(gates[0] + product(hp[d], w.w_hh)).tanh()]
        else:
            hr, hz = product(hp[d], w.w_hh[: 2 * H]).split(H, 1)
            r, z = (gates[0] + hr).sigmoid(), (gates[1] + hz).sigmoid()
            columns = [r, z, (gates[2] + product((r * hp[d]).to(x.dtype), w.w_hh[2 * H :])).tanh()]
        kept.append(torch.cat(columns, 1))
    return torch.stack(kept)


def _blocks(gx: Tensor, b: Tensor | None, H: int) -> tuple[Sequence[Tensor], Sequence[Tensor | float]]:
    """The gates of gx [N, G H] and the bias of each."""
    gates = gx.split(H, 1)
    return gates, [0.0] * len(gates) if b is None else b[: gx.shape[1]].split(H)


def weight_grads(
    cell: str, x: Tensor, hp: Tensor, dg: Tensor, dhr: Tensor | None, reserve: Tensor | None, table: list[_Weights]
) -> list[Tensor]:
    """One product over all rows for each weight, in the order of the flat list."""
    grads: list[Tensor] = []
    for d, w in enumerate(table):
        H = w.w_hh.shape[0] // GATES[cell]
        dgx = dg[d] if cell != "gru" else dg[d][:, : 3 * H]
        dw_hh = torch.empty_like(w.w_hh)
        if cell == "gru":
            torch.mm(dg[d][:, : 2 * H].t(), hp[d], out=dw_hh[: 2 * H])
            torch.mm(dg[d][:, 3 * H :].t(), hp[d], out=dw_hh[2 * H :])
        elif cell == "gru_reset_before":
            assert reserve is not None
            torch.mm(dg[d][:, : 2 * H].t(), hp[d], out=dw_hh[: 2 * H])
            torch.mm(dg[d][:, 2 * H :].t(), (reserve[d][:, :H] * hp[d]).to(hp.dtype), out=dw_hh[2 * H :])
        else:
            torch.mm(dg[d].t(), hp[d], out=dw_hh)
        grads += [dgx.t() @ x, dw_hh]
        if w.b_ih is not None:
            db = dgx.sum(0)
            grads += [db, torch.cat([db[: 2 * H], dg[d][:, 3 * H :].sum(0)]) if cell == "gru" else db.clone()]
        if w.w_hr is not None:
            assert dhr is not None and reserve is not None
            m = reserve[d][:, 3 * H : 4 * H] * reserve[d][:, 4 * H :].tanh()
            grads.append(dhr[d].t() @ m.to(dhr.dtype))
    return grads


def scan_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    D = 2 if bidirectional else 1
    table = directions(weights, D)
    H, R = table[0].w_hh.shape[0] // GATES[cell], table[0].w_hh.shape[1]
    batch = None if h0 is None else h0.shape[1]
    lay = Layout.of(x, batch_first, lengths, batch_sizes, resets, batch)
    T, B, N = lay.T, lay.B, lay.N
    lstm, dtype = cell == "lstm", x.dtype
    if N == 0:
        dh, dc = _state(dh_n, (D, B, R), x), _state(dc_n, (D, B, H), x) if lstm else None
        dx = x.new_zeros(x.shape) if need_dx else None
        zeros = [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights] if need_dw else []
        return dx, dh.to(dtype), None if dc is None else dc.to(dtype), zeros

    with as_told(x), on_device(x):
        rows = lay.clear(x.reshape(N, x.shape[-1]))  # not even a NaN in the padding may reach a weight gradient
        y = y.reshape(N, D * R)
        states_only = reserve.shape[2] == (H if lstm else 0) and not cell.startswith("rnn")
        hp = None
        # 1 - h^2 keeps few digits of an h near 1 that has been rounded to a half type.
        again = states_only or (cell == "rnn_tanh" and dtype != torch.float32)
        if need_dw or again or cell.startswith("gru"):
            hp = lay.states_before(y, h0, D)
        kept: Tensor | None = reserve
        if again:
            assert hp is not None
            kept = gates_again(cell, rows, hp, table, reserve)
        if cell.startswith("rnn"):
            if kept is not None and again:
                y = torch.cat(list(kept), 1)
            kept = None
        dg = (x.new_empty if lengths is None else x.new_zeros)((D, N, GRADS[cell] * H))
        dy = None if dy is None else dy.contiguous()
        dc_all = None if dc_all is None else dc_all.contiguous()
        before = _state(c0, (D, B, H), x) if lstm and c0 is not None else None
        entered = hp if cell.startswith("gru") else None
        projected = table[0].w_hr is not None
        dhr = (x.new_empty if lengths is None else x.new_zeros)((D, N, R)) if projected else None

        def run(p: Plan) -> tuple[Tensor, Tensor | None]:
            """All steps, from the last: gradients of the initial states, float32."""
            dh, dc = _state(dh_n, (D, B, R), x), _state(dc_n, (D, B, H), x) if lstm else None
            common: dict[str, Any] = {**_constants(p, dtype), "CELL": cell}
            tiles = -(-B // p.BM)
            if p.kind == "resident":
                backward_kernels.resident_backward[(tiles, D)](
                    *_pair(table, "w_hh"), kept, y, entered, before, dy, dc_all, dh, dc, dg, *lay.data(),
                    T, B, N, H, *lay.strides, **common,
                )  # fmt: skip
                return dh, dc
            carry = x.new_empty((D, B, H), dtype=torch.float32) if cell.startswith("gru") else None
            phases = 2 if projected or cell == "gru_reset_before" else 1
            args = (
                *_pair(table, "w_hh"), *_pair(table, "w_hr"), kept, y, entered, before, dy, dc_all, dh, dc, carry,
                dhr, dg, *lay.data(), T, B, N, H, R, *lay.strides,
            )  # fmt: skip
            common.update(PROJECTED=projected, BK=p.BK, num_stages=p.stages)
            if p.kind == "streamed":
                backward_kernels.streamed_backward[(tiles, D)](*args, **common)
            else:
                blocks = [-(-(H if phase else R) // p.BN) for phase in range(phases)]
                steps = _steps(backward_kernels.step_backward, blocks, (tiles, D), args, common)
                for s in range(T - 1, -2, -1):
                    for step in steps if s >= 0 else steps[:1]:
                        step(s)
            return dh, dc

        given = tuple(t is not None for t in (dy, dc_all, before))
        dh, dc = run(_chosen(("backward", *given), cell, table[0], D, lay, x, run))
        dx = None
        if need_dx:
            dgx = dg[..., : 3 * H] if cell == "gru" else dg
            dx = dgx[0] @ table[0].w_ih
            for d in range(1, D):
                dx.addmm_(dgx[d], table[d].w_ih)
            dx = dx.reshape(x.shape)
        dweights: list[Tensor] = []
        if need_dw:
            assert hp is not None
            dweights = weight_grads(cell, rows, hp, dg, dhr, kept, table)
    return dx, dh.to(dtype), None if dc is None else dc.to(dtype), dweights


cell_forward, cell_backward = cells(scan_forward, scan_backward)
