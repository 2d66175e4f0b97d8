"""The lean autograd path of a scan: what an ordinary eager training step goes through."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedseq.backends.reference import Save
from fusedseq.ops import derivative

# Arguments of `forward` before x, h0, c0 and the weights.
_FIXED = 1


class Call(NamedTuple):
    """What has no gradient. One argument, since autograd looks at each in Python."""

    backend: ModuleType
    cell: str
    bidirectional: bool
    batch_first: bool
    lengths: Tensor | None
    batch_sizes: Tensor | None
    resets: Tensor | None
    cells: bool
    batch: int
    save: Save
    step: bool  # one step on [B, ...] tensors


class Scan(torch.autograd.Function):
    """One scan, or one step of it, run by a backend that has been chosen."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        if call.step:
            h_n, c_n, reserve = call.backend.cell_forward(call.cell, x, h0, c0, weights, Save.GATES)
            ctx.save_for_backward(x, h0, c0, h_n, reserve, *weights)
            return None, h_n, c_n, None
        y, h_n, c_n, c_all, reserve = call.backend.scan_forward(
            call.cell, x, h0, c0, weights, call.bidirectional, call.batch_first, call.lengths, call.batch_sizes,
            call.resets, call.cells, call.save,
        )  # fmt: skip
        ctx.save_for_backward(x, h0, c0, y, reserve, *weights, call.lengths, call.batch_sizes, call.resets)
        return y, h_n, c_n, c_all

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc_all: Tensor | None
    ) -> tuple[Any, ...]:
        call = ctx.call
        x, h0, c0, y, reserve, *weights = ctx.saved_tensors
        lengths = batch_sizes = resets = None
        if not call.step:
            # As saved, not as in `call`: saved tensors notice being written to.
            lengths, batch_sizes, resets = weights[-3:]
            del weights[-3:]
        needs = ctx.needs_input_grad
        if dy is None and dh_n is None and dc_n is None and dc_all is None:
            return (None,) * len(needs)
        need_dx, need_dw = needs[_FIXED], any(needs[_FIXED + 3 :])
        dx: Any
        dh0: Any
        dc0: Any
        if derivative.is_watched(dy, dh_n, dc_n, dc_all):  # the operator knows its own derivative
            if call.step:
                dx, dh0, dc0, dweights = differentiable_step_backward(
                    call.cell, dh_n, dc_n, x, h0, c0, weights, y, reserve, need_dx, need_dw, call.backend.name
                )
            else:
                dx, dh0, dc0, dweights = derivative.call_backward(
                    call.cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights, call.bidirectional, call.batch_first,
                    lengths, batch_sizes, resets, y, reserve, need_dx, need_dw, call.batch, call.backend.name,
                )  # fmt: skip
        elif call.step:
            dx, dh0, dc0, dweights = call.backend.cell_backward(
                call.cell, dh_n, dc_n, x, h0, c0, weights, y, reserve, need_dx, need_dw
            )
        else:
            dx, dh0, dc0, dweights = call.backend.scan_backward(
                call.cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights, call.bidirectional, call.batch_first, lengths,
                batch_sizes, resets, y, reserve, need_dx, need_dw,
            )  # fmt: skip
        return (
            None,
            dx if need_dx else None,
            dh0 if needs[_FIXED + 1] else None,
            dc0 if needs[_FIXED + 2] else None,
            *(dweights if need_dw else (None,) * len(weights)),
        )


def as_scan(x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give one step's tensors the leading dimension of a scan: T = 1 for x, D = 1 for the states."""
    return x.unsqueeze(0), None if h is None else h.unsqueeze(0), None if c is None else c.unsqueeze(0)


def differentiable_step_backward(
    cell: str, dh: Tensor | None, dc: Tensor | None, x: Tensor, h: Tensor | None, c: Tensor | None,
    weights: list[Tensor], h_n: Tensor, reserve: Tensor, need_dx: bool, need_dw: bool, backend: str,
) -> Any:  # fmt: skip
    """The backward of one step as the operator, which knows its own derivative: dx, dh, dc, dweights."""
    rows, h, c = as_scan(x, h, c)
    y, dh_n, dc_n = as_scan(h_n, dh, dc)
    dx, dh0, dc0, dweights = derivative.call_backward(
        cell, None, dh_n, dc_n, None, rows, h, c, weights, False, False, None, None, None, y, reserve, need_dx, need_dw,
        x.shape[0], backend,
    )  # fmt: skip
    dx, dh0, dc0 = (None if g is None else g.squeeze(0) for g in (dx, dh0, dc0))
    return dx, dh0, dc0, dweights
