"""The public operators: a recurrent layer over a sequence, and one step of it.

Ordinary eager calls go straight to the backend that the registry chose, through one lean autograd.Function if a
gradient is wanted. Whatever watches or transforms operators (torch.compile, torch.func, dispatch modes, tracing,
tensor subclasses) is given `fusedseq::scan` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedseq import registry
from fusedseq.backends.reference import Save
from fusedseq.ops import check, derivative, library
from fusedseq.ops.autograd import Call, Scan, as_scan
from fusedseq.ops.frozen import Frozen

Output = tuple[Any, Tensor, Tensor | None, Tensor | None]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_LISTS = frozenset((list, tuple))
# Looked up once: a streaming step is a few microseconds in all.
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_interpreters = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
is_autocasting = torch._C._is_any_autocast_enabled


def is_ordinary(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Nothing transforms, traces or intercepts operators, and the tensors are what they seem, with data behind them."""
    if _interpreters() is not None or _dispatch_modes() or _function_modes() or _tracing_state() is not None:
        return False
    if (h0 is not None and type(h0) not in _PLAIN) or (c0 is not None and type(c0) not in _PLAIN):
        return False
    return type(weights) in _LISTS and _PLAIN.issuperset(map(type, (x, *weights))) and not x.is_meta


def wants_grad(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether autograd, if it is enabled, has something to record."""
    if x.requires_grad or (h0 is not None and h0.requires_grad) or (c0 is not None and c0.requires_grad):
        return True
    return True in [w.requires_grad for w in weights]


def _packed_batch(h0: Tensor | None, batch_sizes: Tensor) -> int:
    """No shape of packed input shows B; without a state it has to be read from the data."""
    if h0 is not None and h0.dim() == 3:
        return h0.shape[1]
    return int(batch_sizes[0]) if batch_sizes.numel() else 0


def _watched(
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
    step: bool,
    save: int,
) -> Output:
    """The call as `fusedseq::scan`, which validates, casts and chooses the backend where it runs."""
    if step:
        x, h0, c0 = as_scan(x, h0, c0)
    batch = 0 if batch_sizes is None else _packed_batch(h0, batch_sizes)
    y, h_n, c_n, c_all = derivative.call(
        cell, x, h0, c0, list(weights), bidirectional, batch_first, lengths, batch_sizes, resets, cells, save, batch,
        registry.forced(),
    )  # fmt: skip
    if step:
        h_n, c_n = h_n.squeeze(0), None if c_n is None else c_n.squeeze(0)
    return y, h_n, c_n, c_all


def _run(
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
    step: bool,
    recompute: bool,
    frozen: Frozen | None,
) -> Output:
    kept = Save.STATES if recompute else Save.GATES
    if _is_compiling():
        save = _is_grad_enabled() and wants_grad(x, h0, c0, weights)
        return _watched(
            cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, step,
            kept if save else Save.NOTHING,
        )  # fmt: skip
    ordinary = is_ordinary(x, h0, c0, weights)
    if not ordinary or lengths is not None or batch_sizes is not None or resets is not None:
        check.types(x, h0, c0, weights, lengths, batch_sizes, resets, step)
    if not ordinary or forward_ad._current_level >= 0:
        # Inside a transform no tensor tells for sure whether some outer level will differentiate it; a trace must look
        # the same with and without gradients. Where nothing was saved, the backward pass scans again.
        save = _is_grad_enabled() and (_interpreters() is not None or wants_grad(x, h0, c0, weights))
        return _watched(
            cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, step,
            kept if save and _tracing_state() is None else Save.NOTHING,
        )  # fmt: skip

    if is_autocasting() and torch.is_autocast_enabled(x.device.type):
        x, h0, c0, weights = library.autocast(x.device.type, x, h0, c0, weights)
    batch = 0 if batch_sizes is None else _packed_batch(h0, batch_sizes)
    sizes = check.scan(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, batch, step
    )
    if lengths is not None or batch_sizes is not None:
        lengths, batch_sizes = check.data(lengths, batch_sizes, x, sizes)
    grad = _is_grad_enabled() and wants_grad(x, h0, c0, weights)
    backend = registry.choose(registry.scan_call(cell, x, sizes, batch_sizes, lengths, resets, cells, grad))
    if grad:
        call = Call(
            backend, cell, bidirectional, batch_first, lengths, batch_sizes, resets, cells, sizes.B, kept, step
        )  # fmt: skip
        return Scan.apply(call, x, h0, c0, *weights)
    if step:
        h_new, c_new, _ = backend.cell_forward(cell, x, h0, c0, weights, Save.NOTHING)
        return None, h_new, c_new, None
    panels = None
    if frozen is not None and sizes.T > 1:  # one step reads the weights where they are
        panels = frozen.packed(backend, cell, weights, bidirectional)
    y, h_n, c_n, c_all, _ = backend.scan_forward(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, Save.NOTHING, panels
    )
    return y, h_n, c_n, c_all


def scan(
    cell: str,
    x: Tensor,  # [T, B, I], [B, T, I] with batch_first, [N, I] with batch_sizes
    h0: Tensor | None,  # [D, B, R]
    c0: Tensor | None,  # [D, B, H]
    weights: Sequence[Tensor],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,  # [B] int64
    batch_sizes: Tensor | None = None,  # [T] int64
    resets: Tensor | None = None,  # bool, the shape of x without its last dimension
    cells: bool = False,
    recompute: bool = False,
    frozen: Frozen | None = None,
) -> Output:  # y [..., D*R], h_n [D, B, R], c_n [D, B, H] or None, c_all [..., D*H] or None
    """Run one recurrent layer, all its directions.

    `weights` is flat, per direction `w_ih, w_hh, (b_ih, b_hh), (w_hr)`. A state that is None starts from zeros.
    Row b stops after `lengths[b]` steps; `batch_sizes` is the layout of a PackedSequence instead. Where `resets` is
    true the state is zeroed before the step. `cells` also returns an LSTM's cell state after every step.
    `recompute` keeps no gates for the backward pass, which forms them again from the states: about a third more time,
    and of an LSTM's five values per unit and step (GRU: four) one is kept (none). `frozen` keeps packed weights for
    calls without gradients.
    Forward-mode derivatives and second ones are computed by the reference, whichever backend runs.
    """
    return _run(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, False, recompute,
        frozen,
    )  # fmt: skip


def cell(
    cell: str,
    x: Tensor,  # [B, I]
    h: Tensor | None,  # [B, R]
    c: Tensor | None,  # [B, H], LSTM only
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:  # h' [B, R], c' [B, H] or None
    """Run one step: a scan of length one without its price."""
    _, h_new, c_new, _ = _run(cell, x, h, c, weights, False, False, None, None, None, False, True, False, None)
    return h_new, c_new
