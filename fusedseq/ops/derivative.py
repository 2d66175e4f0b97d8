"""Autograd of the two operators, for torch.compile, torch.func and whoever calls them directly.

The kernels are written out instead of going through `torch.library.register_autograd`, whose nodes refuse to run
inside torch.func and flatten their arguments anew on every call. A `_SingleLevelFunction` is the node that torch.func
itself records: it belongs to the level that is being differentiated and leaves all others to the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fusedseq import registry
from fusedseq.backends import reference
from fusedseq.ops import check

_is_batched = torch._C._functorch.is_legacy_batchedtensor

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor] | tuple[()]]


def call(*args: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`fusedseq::scan` with None for what does not apply; arguments as in its schema."""
    y, h_n, c_n, c_all, _ = torch.ops.fusedseq.scan.default(*args)
    return y, h_n, c_n if args[0] == "lstm" else None, c_all if args[10] else None


def call_backward(*args: Any) -> Grads:
    """`fusedseq::scan_backward`, likewise."""
    dx, dh0, dc0, dweights = torch.ops.fusedseq.scan_backward.default(*args)
    return dx if args[16] else None, dh0, dc0 if args[0] == "lstm" else None, dweights


def scan(keys: Any, *args: Any) -> tuple[Tensor, ...]:
    """The Autograd kernel of `fusedseq::scan`."""
    if _dual(args):
        return _forward_mode(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
        cell, x, h0, c0, weights, *options = args
        with enable_single_level_autograd_function():
            return _Scan.apply(keys, cell, options, x, h0, c0, *weights)
    return _below(torch.ops.fusedseq.scan.default, keys, args)


def scan_backward(keys: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The Autograd kernel of `fusedseq::scan_backward`."""
    if _dual(args):
        return _forward_mode_backward(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
        cell, weights, options = args[0], args[8], args[9:]
        with enable_single_level_autograd_function():
            dx, dh0, dc0, *dweights = _ScanBackward.apply(keys, cell, options, *args[1:8], *weights)
        return dx, dh0, dc0, dweights
    return _below(torch.ops.fusedseq.scan_backward.default, keys, args)


def _dual(args: tuple[Any, ...]) -> bool:
    """Some argument carries a tangent of the forward-mode level at hand."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(args))


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(t, Tensor)]


def _forward_mode(cell: str, x: Tensor, h0: Any, c0: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """Tangents go through the specification, operator by operator, as second derivatives do."""
    bidirectional, batch_first, lengths, batch_sizes, resets, cells, save, batch, _ = options
    sizes = check.scan(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, batch
    )  # fmt: skip
    lengths, batch_sizes = check.data(lengths, batch_sizes, x, sizes)
    module = registry.choose(
        registry.scan_call(cell, x, sizes, batch_sizes, lengths, resets, cells, bool(save)), reference.name
    )  # fmt: skip
    y, h_n, c_n, c_all, _ = module.scan_forward(
        cell,
        x,
        h0,
        c0,
        weights,
        bidirectional,
        batch_first,
        lengths,
        batch_sizes,
        resets,
        cells,
        reference.Save.NOTHING,
    )
    none = x.new_empty(0)
    return y, h_n, none if c_n is None else c_n, none.clone() if c_all is None else c_all, none.clone()


def _forward_mode_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    args = (*args[:11], check.index(args[11]), check.index(args[12]), *args[13:18])
    x, (dx, dh0, dc0, dweights) = args[5], reference.scan_backward(*args)
    return x.new_empty(0) if dx is None else dx, dh0, x.new_empty(0) if dc0 is None else dc0, dweights


def is_watched(*upstream: Tensor | None) -> bool:
    """Whether a backward pass has to be made of operators: its own derivative is wanted (create_graph=True), it is
    being compiled, or these gradients are a batch that is_grads_batched=True made of them, with no data to point at.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    return any(t is not None and _is_batched(t) for t in upstream)


def _below(op: Any, keys: Any, args: tuple[Any, ...]) -> Any:
    """Run the operator under the autograd level at hand."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


class _Scan(_SingleLevelFunction):
    apply: Any  # inherited from C++, where mypy cannot see it

    @staticmethod
    def forward(ctx: Any, keys: Any, cell: str, options: list[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        x, h0, c0, *weights = tensors
        outputs = _below(torch.ops.fusedseq.scan.default, keys, (cell, x, h0, c0, weights, *options))
        y, _, c_n, c_all, reserve = outputs
        bidirectional, batch_first, lengths, batch_sizes, resets, cells, _, batch, backend = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(reserve, *(() if cell == "lstm" else (c_n,)), *(() if cells else (c_all,)))
        ctx.save_for_backward(lengths, batch_sizes, resets, y, reserve, x, h0, c0, *weights)
        ctx.cell, ctx.layout, ctx.cells = cell, (bidirectional, batch_first), cells
        ctx.batch, ctx.backend = batch, backend
        return outputs

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc_all: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        lengths, batch_sizes, resets, y, reserve, x, h0, c0, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        # Zeros may be handed in for outputs that do not apply.
        dc_n = dc_n if ctx.cell == "lstm" else None
        dc_all = dc_all if ctx.cells else None
        if dy is None and dh_n is None and dc_n is None and dc_all is None:
            return (None,) * len(ctx.needs_input_grad)
        need_dw = any(needs[3:])
        dx, dh0, dc0, dweights = call_backward(
            ctx.cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights, *ctx.layout, lengths, batch_sizes, resets,
            y, reserve, needs[0], need_dw, ctx.batch, ctx.backend,
        )  # fmt: skip
        return (
            None,
            None,
            None,
            dx,
            dh0 if needs[1] else None,
            dc0 if needs[2] else None,
            *(dweights if need_dw else (None,) * len(weights)),
        )


class _ScanBackward(_SingleLevelFunction):
    apply: Any

    @staticmethod
    def forward(ctx: Any, keys: Any, cell: str, options: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        args = (cell, *tensors[:7], list(tensors[7:]), *options)
        dx, dh0, dc0, dweights = _below(torch.ops.fusedseq.scan_backward.default, keys, args)
        bidirectional, batch_first, lengths, batch_sizes, resets, _, _, need_dx, *_ = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(() if need_dx else (dx,)), *(() if cell == "lstm" else (dc0,)))
        ctx.save_for_backward(lengths, batch_sizes, resets, *tensors)
        ctx.cell, ctx.layout, ctx.need_dx = cell, (bidirectional, batch_first), need_dx
        return (dx, dh0, dc0, *dweights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Double backward, through the specification's own backward: slow, right, and itself differentiable."""
        lengths, batch_sizes, resets, *tensors = ctx.saved_tensors
        g_dx, g_dh0, g_dc0, *g_dweights = grads
        cotangents = [g_dx if ctx.need_dx else None, g_dh0, g_dc0 if ctx.cell == "lstm" else None, *g_dweights]
        given = [i for i, t in enumerate(tensors) if t is not None]
        wanted = [i for i, g in enumerate(cotangents) if g is not None]

        def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
            dense: list[Any] = [None] * len(tensors)
            for i, t in zip(given, primals, strict=True):
                dense[i] = t
            args = (*dense[:7], dense[7:], *ctx.layout, lengths, batch_sizes, resets, None, None, True, True)
            dx, dh0, dc0, dweights = reference.scan_backward(ctx.cell, *args)
            every: list[Any] = [dx, dh0, dc0, *dweights]
            return tuple(every[i] for i in wanted)

        result: list[Any] = [None] * len(tensors)
        if wanted:
            # vjp returns a third value only if asked to, which its type does not say.
            pull: Any = torch.func.vjp(gradients, *(tensors[i] for i in given))[1]
            for i, g in zip(given, pull(tuple(cotangents[i] for i in wanted)), strict=True):
                result[i] = g
        return (None, None, None, *result)
