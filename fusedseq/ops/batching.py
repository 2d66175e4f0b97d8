"""torch.func.vmap for the scan: the vmapped dimension V joins the batch wherever the weights are shared.

V always becomes the inner part of the batch, [.., B, V, ..] -> [.., B*V, ..]: that way packed input folds as well.
What cannot be folded (weights per example, or their gradients, or batch sizes per example) runs as a loop.

A reserve is opaque and has no place for V, so the forward rule saves none and the backward rule scans again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedseq.backends.reference import Save

Dims = tuple[Any, ...]


def _fold(t: Tensor | None, dim: int | None, at: int, V: int) -> Tensor | None:
    """Merge V into the batch dimension `at`."""
    if t is None:
        return None
    t = t.unsqueeze(at + 1).expand(*t.shape[: at + 1], V, *t.shape[at + 1 :]) if dim is None else t.movedim(dim, at + 1)
    return t.flatten(at, at + 1)


def _unfold(t: Tensor, at: int, V: int) -> Tensor:
    return t.unflatten(at, (t.shape[at] // V, V))


def _pick(t: Any, dim: Any, v: int) -> Any:
    """The arguments of one example."""
    if isinstance(t, (list, tuple)):
        return [_pick(one, d, v) for one, d in zip(t, dim or [None] * len(t), strict=True)]
    return t if dim is None else t.select(dim, v)


def _stack(examples: list[tuple[Any, ...]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    columns = list(zip(*examples, strict=True))
    outs = tuple(
        [torch.stack(ts) for ts in zip(*column, strict=True)] if isinstance(column[0], list) else torch.stack(column)
        for column in columns
    )
    return outs, tuple([0] * len(out) if isinstance(out, list) else 0 for out in outs)


def _batched(dims: Any) -> bool:
    return any(d is not None for d in dims) if isinstance(dims, (list, tuple)) else dims is not None


def scan(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    op = torch.ops.fusedseq.scan.default
    V = info.batch_size
    cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, _, batch, backend = args
    if _batched(in_dims[4]) or _batched(in_dims[8]):
        each = [[_pick(a, d, v) for a, d in zip(args[:11], in_dims[:11], strict=True)] for v in range(V)]
        return _stack([op(*one, Save.NOTHING, batch, backend) for one in each])
    at = 0 if batch_first or batch_sizes is not None else 1
    y, h_n, c_n, c_all, reserve = op(
        cell,
        _fold(x, in_dims[1], at, V),
        _fold(h0, in_dims[2], 1, V),
        _fold(c0, in_dims[3], 1, V),
        weights,
        bidirectional,
        batch_first,
        _fold(lengths, in_dims[7], 0, V),
        None if batch_sizes is None else batch_sizes * V,
        _fold(resets, in_dims[9], at, V),
        cells,
        Save.NOTHING,
        batch * V,
        backend,
    )
    lstm = cell == "lstm"
    outs = (
        _unfold(y, at, V),
        _unfold(h_n, 1, V),
        _unfold(c_n, 1, V) if lstm else c_n,
        _unfold(c_all, at, V) if cells else c_all,
        reserve,
    )
    return outs, (at + 1, 2, 2 if lstm else None, at + 1 if cells else None, None)


def scan_backward(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    op = torch.ops.fusedseq.scan_backward.default
    V = info.batch_size
    cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights, bidirectional, batch_first = args[:11]
    lengths, batch_sizes, resets, y, _, need_dx, need_dw, batch, backend = args[11:]
    # Batched y tells that the forward scan was vmapped too: its reserve is not one of this call's.
    stale = in_dims[14] is not None
    none = x.new_empty(0)
    if need_dw or _batched(in_dims[8]) or _batched(in_dims[12]):
        examples = []
        for v in range(V):
            one = [_pick(a, d, v) for a, d in zip(args, in_dims, strict=True)]
            if stale:
                one[15] = none
            examples.append(op(*one))
        return _stack(examples)
    at = 0 if batch_first or batch_sizes is not None else 1
    dx, dh0, dc0, _ = op(
        cell,
        _fold(dy, in_dims[1], at, V),
        _fold(dh_n, in_dims[2], 1, V),
        _fold(dc_n, in_dims[3], 1, V),
        _fold(dc_all, in_dims[4], at, V),
        _fold(x, in_dims[5], at, V),
        _fold(h0, in_dims[6], 1, V),
        _fold(c0, in_dims[7], 1, V),
        weights,
        bidirectional,
        batch_first,
        _fold(lengths, in_dims[11], 0, V),
        None if batch_sizes is None else batch_sizes * V,
        _fold(resets, in_dims[13], at, V),
        _fold(y, in_dims[14], at, V),
        none,
        need_dx,
        False,
        batch * V,
        backend,
    )
    lstm = cell == "lstm"
    outs: tuple[Any, ...] = (
        _unfold(dx, at, V) if need_dx else dx,
        _unfold(dh0, 1, V),
        _unfold(dc0, 1, V) if lstm else dc0,
        [],
    )
    return outs, (at + 1 if need_dx else None, 2, 2 if lstm else None, [])
