"""Steps that repeat: a call checked in full once is recognised again by one guard, and goes straight to the core.

A streaming step is a few microseconds of arithmetic, and checking its arguments in Python takes longer. TorchDynamo has
a guard in C++ that compares type, dispatch keys, dtype, device, sizes and strides of a list of tensors with those
recorded; the keys tell whether autocast, a transform or a mode would have to see the call. Where that guard is missing
(it is not public), nothing repeats and every call takes the long way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedseq import registry
from fusedseq.ops import check
from fusedseq.ops.scan import is_autocasting, is_ordinary

_Guards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _Guards
except ImportError:
    _Guards = None

_function_modes = torch._C._len_torch_function_stack
_is_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads
_empty_like = torch.empty_like

Step = tuple[Tensor, Tensor, Tensor | None]


class Repeat:
    """One step of a stack of layers without gradients, for tensors like those it was made of."""

    __slots__ = ("_cell", "_check", "_generation", "_run", "_y")

    def __init__(self, cell: str, check: Any, run: Any, y: Tensor | None) -> None:
        self._cell = cell
        self._check = check
        self._run = run
        self._y = y
        self._generation = registry.generation()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy of a module, on disk or not, makes its own when it needs one.
        return type(None), ()

    def __call__(self, cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor]) -> Step | None:
        """y, h_n and c_n, or None if this is another kind of call. For a cell y is h_n."""
        if self._generation != registry.generation() or cell is not self._cell or _function_modes():
            return None
        if _is_grad_enabled() or forward_ad._current_level >= 0:
            return None
        c_n = None
        if cell == "lstm":
            if not self._check(x, h0, c0, *weights):
                return None
            c_n = _empty_like(c0)  # type: ignore[arg-type]
        elif not self._check(x, h0, *weights):
            return None
        h_n = _empty_like(h0)
        y = h_n if self._y is None else _empty_like(self._y)
        self._run(_threads(), x, h0, c0, y, h_n, c_n, weights)
        return y, h_n, c_n


def prepare(
    cell: str,
    x: Tensor,  # [B, I], or [1, B, I] or [B, 1, I] with y
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    y: Tensor | None,  # the output of the call just made, None for a cell
    layers: int = 1,
    bidirectional: bool = False,
) -> Repeat | None:
    """Make ready for the next call like the one that has just been answered with `y`; None if it cannot repeat."""
    if _Guards is None or _is_grad_enabled() or registry.generation() is None:
        return None
    if h0 is None or (cell == "lstm") != (c0 is not None):
        return None
    if not is_ordinary(x, h0, c0, weights) or is_autocasting() or forward_ad._current_level >= 0:
        return None
    states = [h0] if c0 is None else [h0, c0]
    tensors = [x, *states, *weights]
    if any(t.numel() == 0 for t in tensors) or any(not s.is_contiguous() for s in states):
        return None
    rows = x if y is None else x.squeeze(0) if x.shape[0] == 1 else x.squeeze(1)
    GH, R = weights[1].shape
    sizes = (1, *rows.shape, GH // check.GATES[cell], R, 2 if bidirectional else 1)
    backend = registry.choose(registry.scan_call(cell, x, sizes, None, None, None, False, False))
    step = getattr(backend, "step", None)
    run = step(cell, rows, weights, layers, bidirectional) if step else None
    if run is None:
        return None
    shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        guards = _Guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    except TypeError:
        return None
    if not guards.check(*tensors):  # one tensor in two places is nothing that it can tell
        return None
    return Repeat(cell, guards.check, run, None if y is None else torch.empty_like(y))
