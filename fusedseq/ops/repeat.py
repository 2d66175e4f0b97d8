"""Steps that repeat: a call checked in full once is recognised again by one guard, and goes straight to the core.

A streaming step is a few microseconds of arithmetic, and checking its arguments in Python takes longer. TorchDynamo has
a guard in C++ that compares type, dispatch keys, dtype, device, sizes and strides of a list of tensors with those
recorded; the keys tell whether autocast, a transform or a mode would have to see the call. Where that guard is missing
(it is not public), nothing repeats and every call takes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fusedseq import registry
from fusedseq.backends.reference import reserve_like
from fusedseq.ops import check
from fusedseq.ops.autograd import differentiable_step_backward
from fusedseq.ops.derivative import is_watched
from fusedseq.ops.scan import is_autocasting, is_ordinary, wants_grad

_Guards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _Guards
except ImportError:
    _Guards = None

_function_modes = torch._C._len_torch_function_stack
_is_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads
_empty_like = torch.empty_like
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# Dtypes whose weight gradients the core writes as they are.
_UNCONVERTED = (torch.float32, torch.float64)

Saved = tuple[Tensor, Tensor | None, Tensor]
Step = tuple[Tensor, Tensor, Tensor | None]
States = tuple[Tensor, Tensor | None]


class Repeat:
    """One step of a stack of layers without gradients, for tensors like those it was made of."""

    __slots__ = ("_cell", "_check", "_generation", "_run", "_y", "zeros")

    def __init__(self, cell: str, check: Any, step: Any, y: Tensor | None, zeros: States | None = None) -> None:
        self.zeros = zeros  # the states of a layer's call without any
        self._cell = cell
        self._check = check
        self._run = step.run
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
        self._run(_threads(), x, h0, c0, y, h_n, c_n, weights, None)
        return y, h_n, c_n


class GradRepeat(Repeat):
    """One step of a cell that autograd records, for tensors like those it was made of."""

    __slots__ = ("_reserve", "_row", "_run_backward", "backend")

    def __init__(self, cell: str, check: Any, step: Any, x: Tensor, backend: ModuleType, reserve: Tensor) -> None:
        super().__init__(cell, check, step, None)
        self._run_backward = step.backward
        self.backend = backend
        # What results are made like; of x, whose rows may lie apart, one that is dense.
        self._row = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._reserve = reserve

    def __call__(self, cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor]) -> Step | None:
        """h', h' again and c', or None if this is another kind of call."""
        if self._generation != registry.generation() or cell is not self._cell or _function_modes():
            return None
        if not _is_grad_enabled() or forward_ad._current_level >= 0 or _saving_hooks(False) is not None:
            return None
        if cell == "lstm":
            if not self._check(x, h0, c0, *weights):
                return None
            h_n, c_n = _record(self, x, h0, c0, *weights)
            return h_n, h_n, c_n
        if not self._check(x, h0, *weights):
            return None
        h_n = _record(self, x, h0, None, *weights)
        return h_n, h_n, None

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor]) -> Saved:
        """h', c' and the reserve."""
        h_n = _empty_like(h)
        c_n = None if c is None else _empty_like(c)
        reserve = _empty_like(self._reserve)
        self._run(_threads(), x, h, c, h_n, h_n, c_n, weights, reserve)
        return h_n, c_n, reserve

    def backward(
        self, dh: Tensor | None, dc: Tensor | None, x: Tensor, h: Tensor, c: Tensor | None, h_n: Tensor,
        reserve: Tensor, weights: Sequence[Tensor], need_dx: bool, need_dw: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Sequence[Tensor]]:  # fmt: skip
        """What `cell_backward` of the backend gives."""
        if dh is not None and not dh.is_contiguous():
            dh = dh.contiguous()
        if dc is not None and not dc.is_contiguous():
            dc = dc.contiguous()
        dx = _empty_like(self._row) if need_dx else None
        dh0 = _empty_like(h_n)
        dc0 = None if c is None else _empty_like(c)
        dweights = [_empty_like(w) for w in weights] if need_dw else ()
        self._run_backward(_threads(), dh, dc, x, h, c, h_n, reserve, weights, dx, dh0, dc0, dweights)
        return dx, dh0, dc0, dweights


class _Recorded(_SingleLevelFunction):
    """The node of a step that repeats."""

    apply: Any  # inherited from C++, where mypy cannot see it

    @staticmethod
    def forward(ctx: Any, repeat: GradRepeat, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor) -> Any:
        h_n, c_n, reserve = repeat.forward(x, h, c, weights)
        ctx.repeat = repeat
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, c, h_n, reserve, *weights)
        return h_n if c_n is None else (h_n, c_n)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None = None) -> tuple[Any, ...]:
        x, h, c, h_n, reserve, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dh is None and dc is None:
            return (None,) * len(needs)
        need_dx, need_dw = needs[1], True in needs[4:]
        repeat = ctx.repeat
        if is_watched(dh, dc):
            dx, dh0, dc0, dweights = differentiable_step_backward(
                repeat._cell, dh, dc, x, h, c, weights, h_n, reserve, need_dx, need_dw, repeat.backend.name
            )
        else:
            dx, dh0, dc0, dweights = repeat.backward(dh, dc, x, h, c, h_n, reserve, weights, need_dx, need_dw)
        return (
            None, dx, dh0 if needs[2] else None, dc0 if needs[3] else None,
            *(dweights if need_dw else (None,) * len(weights)),
        )  # fmt: skip


# The C++ half of `apply`. What torch.autograd.Function adds to it in Python is for torch.func, which never gets here.
_record = _Recorded.apply


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
    """Make ready for the next call like the one that has just been answered with `y`; None if it cannot repeat.

    With gradients enabled only a cell's step can, and only if a gradient is wanted.
    """
    if _Guards is None or registry.generation() is None:
        return None
    grad = _is_grad_enabled()
    if grad and (y is not None or x.dtype not in _UNCONVERTED or not wants_grad(x, h0, c0, weights)):
        return None
    zeros = None
    if h0 is None and y is not None:
        h0, c0 = zeros = _zero_states(cell, x, weights, y, layers, bidirectional)
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
    backend = registry.choose(registry.scan_call(cell, x, sizes, None, None, None, False, grad))
    make = getattr(backend, "step", None)
    step = make(cell, rows, weights, layers, bidirectional) if make else None
    if step is None:
        return None
    shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        guards = _Guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    except TypeError:
        return None
    if not guards.check(*tensors):  # one tensor in two places is nothing that it can tell
        return None
    if grad:
        reserve = reserve_like(cell, x.detach().unsqueeze(0), weights, False)
        return GradRepeat(cell, guards.check, step, x.detach(), backend, reserve)
    if y is None:
        return Repeat(cell, guards.check, step, None)
    zeros = zeros or (torch.zeros_like(h0), None if c0 is None else torch.zeros_like(c0))
    return Repeat(cell, guards.check, step, torch.empty_like(y), zeros)


def _zero_states(cell: str, x: Tensor, weights: list[Tensor], y: Tensor, layers: int, bidirectional: bool) -> States:
    """Those that a call without states starts from; ordinary tensors, in whatever mode they are made."""
    D = 2 if bidirectional else 1
    H, B = weights[1].shape[0] // check.GATES[cell], y.numel() // y.shape[-1] if y.shape[-1] else 0
    with torch.inference_mode(False):
        h0 = x.new_zeros((layers * D, B, y.shape[-1] // D))
        return h0, x.new_zeros((layers * D, B, H)) if cell == "lstm" else None
