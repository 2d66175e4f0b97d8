"""The lean autograd path of a scan: what an ordinary eager training step goes through."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedseq.ops import derivative

# Arguments of `forward` before x, h0, c0 and the weights; none of them has a gradient.
_FIXED = 10


class Scan(torch.autograd.Function):
    """One scan, or with `step` one step of it on [B, ...] tensors, run by a backend that has been chosen."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        cell: str,
        bidirectional: bool,
        batch_first: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        cells: bool,
        batch: int,
        step: bool,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        y: Tensor | None
        if step:
            h_n, c_n, reserve = backend.cell_forward(cell, x, h0, c0, weights, True)
            y, c_all = None, None
        else:
            y, h_n, c_n, c_all, reserve = backend.scan_forward(
                cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, True
            )
        ctx.backend, ctx.cell, ctx.layout, ctx.batch, ctx.step = (
            backend, cell, (bidirectional, batch_first), batch, step
        )  # fmt: skip
        ctx.save_for_backward(x, h0, c0, lengths, batch_sizes, resets, h_n if step else y, reserve, *weights)
        return y, h_n, c_n, c_all

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc_all: Tensor | None
    ) -> tuple[Any, ...]:
        x, h0, c0, lengths, batch_sizes, resets, y, reserve, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dy is None and dh_n is None and dc_n is None and dc_all is None:
            return (None,) * len(needs)
        need_dx, need_dw = needs[_FIXED], any(needs[_FIXED + 3 :])
        dx: Any
        dh0: Any
        dc0: Any
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            # create_graph=True, or a backward that is being traced: the operator knows its own derivative.
            if ctx.step:
                x, h0, c0 = as_scan(x, h0, c0)
                y, dh_n, dc_n = as_scan(y, dh_n, dc_n)
            dx, dh0, dc0, dweights = derivative.call_backward(
                ctx.cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights, *ctx.layout, lengths, batch_sizes, resets, y,
                reserve, need_dx, need_dw, ctx.batch, ctx.backend.name,
            )  # fmt: skip
            if ctx.step:
                dx, dh0, dc0 = (None if g is None else g.squeeze(0) for g in (dx, dh0, dc0))
        elif ctx.step:
            dx, dh0, dc0, dweights = ctx.backend.cell_backward(
                ctx.cell, dh_n, dc_n, x, h0, c0, weights, y, reserve, need_dx, need_dw
            )
        else:
            dx, dh0, dc0, dweights = ctx.backend.scan_backward(
                ctx.cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights, *ctx.layout, lengths, batch_sizes, resets, y,
                reserve, need_dx, need_dw,
            )  # fmt: skip
        return (
            *(None,) * _FIXED,
            dx if need_dx else None,
            dh0 if needs[_FIXED + 1] else None,
            dc0 if needs[_FIXED + 2] else None,
            *(dweights if need_dw else (None,) * len(weights)),
        )


def as_scan(x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give one step's tensors the leading dimension of a scan: T = 1 for x, D = 1 for the states."""
    return x.unsqueeze(0), None if h is None else h.unsqueeze(0), None if c is None else c.unsqueeze(0)
